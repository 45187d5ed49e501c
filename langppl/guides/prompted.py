"""The untrained LM, shown the observations in its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langppl.distributions import StringDistribution
from langppl.guides.base import Guide, Key, raw_log_prob
from langppl.guides.context import ContextFunction, default_context
from langppl.guides.guidance import Guidance, Reader, check_guidance
from langppl.guides.identity import of_function, of_guidance
from langppl.lm.requests import Reading
from langppl.program import Program
from langppl.program.execution import Choice, Chooser, Execution, draw_prior
from langppl.program.execution import given as given_values


class PromptedGuide(Guide):
    """Proposes with the site's own LM and rules, after a context that shows the observations.

    Args:
        context: makes the context; the default shows the observations that depend on the latent.
        guidance: draws from the prior, changed by what the context shows (see `Guidance`); None
            draws after the context as it is.

    Raises:
        TypeError: for a context that is no function, or a guidance that is none.
    """

    name = "prompted"

    def __init__(
        self, context: ContextFunction | None = None, *, guidance: Guidance | None = None
    ) -> None:
        if context is not None and not callable(context):
            raise TypeError(f"context must be a function of a ContextInfo, got {context!r}")
        check_guidance(guidance)
        self.context = context or default_context
        self.guidance = guidance

    def __repr__(self) -> str:
        """The context function, if it is not the default, and the guidance."""
        own = [] if self.context is default_context else [getattr(self.context, "__name__", "...")]
        if self.guidance is not None:
            own.append(f"guidance={self.guidance.scale:g}")
        return f"PromptedGuide({', '.join(own)})"

    def identity(self) -> str:
        """See `Guide.identity`."""
        if type(self) is not PromptedGuide or self.context is not default_context:
            own = f"{super().identity()} {of_function(self.context)}"
        else:
            own = self.name
        return own if self.guidance is None else f"{own} {of_guidance(self.guidance)}"

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
                prompt, _ = self.reads(program, name, fn, execution)
            return Choice(value, raw_log_prob(fn, value, prompt))

        return choose

    def reads(
        self, program: Program, name: str, fn: Any, execution: Execution
    ) -> tuple[Reading | None, str | None]:
        """See `Guide.reads`."""
        reader = Reader(self.context, self.guidance)
        return reader.reading(program, name, fn, execution, fn.lm), None
