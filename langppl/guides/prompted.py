"""The untrained LM, shown the observations in its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langppl.distributions import StringDistribution
from langppl.guides.base import Guide, Key, raw_log_prob
from langppl.guides.context import ContextFunction, context_ids, default_context
from langppl.guides.identity import of_function
from langppl.program import Program
from langppl.program.execution import Choice, Chooser, Execution, draw_prior
from langppl.program.execution import given as given_values


class PromptedGuide(Guide):
    """Proposes with the site's own LM and rules, after a context that shows the observations.

    Args:
        context: makes the context; the default shows the observations that depend on the latent.

    Raises:
        TypeError: for a context that is no function.
    """

    name = "prompted"

    def __init__(self, context: ContextFunction | None = None) -> None:
        if context is not None and not callable(context):
            raise TypeError(f"context must be a function of a ContextInfo, got {context!r}")
        self.context = context or default_context

    def __repr__(self) -> str:
        """The context function, if it is not the default."""
        own = "" if self.context is default_context else getattr(self.context, "__name__", "...")
        return f"PromptedGuide({own})"

    def identity(self) -> str:
        """See `Guide.identity`."""
        if type(self) is PromptedGuide and self.context is default_context:
            return self.name
        return f"{super().identity()} {of_function(self.context)}"

    def chooser(self, program: Program, key: Key) -> Chooser:
        """See `Guide.chooser`."""

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            if not isinstance(fn, StringDistribution):
                return draw_prior(fn, (*key, name))
            prompt, _ = self.reads(program, name, fn, execution)
            value, log_q = fn.draw((*key, name), prompt=prompt)
            return Choice(value, log_q)

        return choose

    def given(self, program: Program, values: Mapping[str, Any]) -> Chooser:
        """See `Guide.given`."""
        take = given_values(values)

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            value = take(name, fn, execution).value
            prompt = None
            if isinstance(fn, StringDistribution):
                prompt = context_ids(program, name, fn, execution, self.context, fn.lm)
            return Choice(value, raw_log_prob(fn, value, prompt))

        return choose

    def reads(
        self, program: Program, name: str, fn: Any, execution: Execution
    ) -> tuple[tuple[int, ...] | None, str | None]:
        """See `Guide.reads`."""
        return context_ids(program, name, fn, execution, self.context, fn.lm), None
