"""The untrained LM, shown the observations in its prompt."""

from __future__ import annotations

from typing import Any

from langppl.distributions import StringDistribution
from langppl.guides.base import Guide, Key, Scorer, log_prior
from langppl.guides.context import ContextFunction, context_ids, default_context
from langppl.lm.requests import perform
from langppl.program import Program
from langppl.program.execution import Choice, Chooser, Execution, draw_prior


class PromptedGuide(Guide):
    """Proposes with the site's own LM and rules, after a context that shows the observations.

    Args:
        context: makes the context; the default shows the observations that depend on the latent.
    """

    name = "prompted"

    def __init__(self, context: ContextFunction | None = None) -> None:
        self.context = context or default_context

    def chooser(self, program: Program, key: Key) -> Chooser:
        """See `Guide.chooser`."""

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            if not isinstance(fn, StringDistribution):
                return draw_prior(fn, (*key, name))
            prompt, _ = self.reads(program, name, fn, execution)
            value, log_q = fn.draw((*key, name), prompt=prompt)
            return Choice(value, log_q)

        return choose

    def scorer(self, program: Program, key: Key) -> Scorer:
        """See `Guide.scorer`."""

        def log_q(name: str, fn: Any, value: Any, execution: Execution) -> float:
            if not isinstance(fn, StringDistribution):
                return log_prior(fn, value)
            prompt, _ = self.reads(program, name, fn, execution)
            wanted = fn.pending(value, prompt=prompt)
            return wanted.finish(perform(wanted.requests))

        return log_q

    def reads(
        self, program: Program, name: str, fn: Any, execution: Execution
    ) -> tuple[tuple[int, ...] | None, str | None]:
        """See `Guide.reads`."""
        return context_ids(program, name, fn, execution, self.context, fn.lm), None
