"""The untrained LM, shown the observations in its prompt."""

from __future__ import annotations

from typing import Any

from langppl.distributions import StringDistribution
from langppl.guides.base import Guide, Key
from langppl.guides.context import ContextFunction, context_ids, default_context
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
            prompt = context_ids(program, name, fn, execution, self.context, fn.lm)
            value, log_q = fn.draw((*key, name), prompt=prompt)
            return Choice(value, log_q)

        return choose
