"""Guidance: a guide that adds to the prior what the observations change, not all that they say.

A language model that is shown the observations does not draw from the posterior: it also writes as
one does in a text of that form. Guidance takes the form away again,

    log q(next) = log p(next | prior's prompt)
                  + scale · (log p(next | context) − log p(next | context without observations)),

normalised over what may come next. A scale of 0 is the prior. See `langppl.lm.guided`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from langppl.distributions import StringDistribution
from langppl.guides.context import (
    OWN_CONTEXTS,
    ContextFunction,
    context_ids,
    context_info,
    encode_context,
)
from langppl.lm import LM
from langppl.lm.counts import as_number
from langppl.lm.requests import Guided, Reading
from langppl.program import Program
from langppl.program.execution import Execution


@dataclass(frozen=True)
class Guidance:
    """Has a guide propose from the prior, changed by what its context shows.

    Args:
        scale: how much that counts, above 0. Less is nearer to the prior. Measured untrained on
            one kind of story, a quarter to a half did best with the whole story as the context, and
            a quarter with the default context (`docs/benchmarks.md`).
        without: makes the guide's context without what it is to be guided by, for a guide with a
            context function of its own that takes the observations out of the model's arguments.
            By default the guide's context function is asked again, with no observations.

    Raises:
        TypeError: for a `without` that is no function.
        ValueError: for a scale that is no number above 0.

    Example:
        >>> guide = PromptedGuide(guidance=Guidance(0.25))
        >>> infer(story, *pair, guide=guide, num_samples=8).num_samples
        8
    """

    scale: float
    without: ContextFunction | None = None

    def __post_init__(self) -> None:
        scale = as_number("scale", self.scale)
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"the scale of a guidance must be above 0 and finite, got {scale}")
        object.__setattr__(self, "scale", scale)
        if self.without is not None and not callable(self.without):
            raise TypeError(f"without must be a function of a ContextInfo, got {self.without!r}")


def check_guidance(guidance: Any) -> None:
    """Raises TypeError for what is no guidance."""
    if guidance is not None and not isinstance(guidance, Guidance):
        raise TypeError(f"guidance must be a Guidance, such as Guidance(0.8), got {guidance!r}")


@dataclass(frozen=True)
class Reader:
    """What a guide has an LM read before a latent.

    Attributes:
        context: makes the context.
        guidance: how much of what it shows counts; None to draw after the context as it is.
    """

    context: ContextFunction
    guidance: Guidance | None = None

    def reading(
        self, program: Program, site: str, fn: Any, execution: Execution, lm: LM
    ) -> Reading:
        """What is read before a latent; with guidance if it is a string or a choice.

        Raises:
            ValueError: if a context of the user's own is the same without the observations.
        """
        guidance = self.guidance
        if guidance is None or not isinstance(fn, StringDistribution):
            return context_ids(program, site, fn, execution, self.context, lm)
        info = context_info(program, site, fn, execution)
        own = encode_context(self.context(info), site, lm)
        if guidance.without is not None:
            without = encode_context(guidance.without(info), site, lm)
            return Guided(own, without, guidance.scale)
        unseeing = replace(info, observations=(), observed={})
        without = encode_context(self.context(unseeing), site, lm)
        if without == own and info.observations and self.context not in OWN_CONTEXTS:
            name = getattr(self.context, "__name__", repr(self.context))
            raise ValueError(
                f"the guide's context for site {site!r} is the same without the observations, so "
                f"guidance would change nothing: {name} takes them out of the model's arguments; "
                "give Guidance(scale, without=...) a function that leaves them out"
            )
        return Guided(own, without, guidance.scale)
