"""What a guide's rules leave out of what a model allows, where that can be told beforehand.

Importance weights mend everything but what is never drawn: a guide that leaves out strings of the
posterior gives another posterior, and nothing in its weights shows it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

from langppl.diagnostics import InferenceWarning
from langppl.distributions import LMChoice, LMString, StringDistribution
from langppl.program import Program
from langppl.warn import warn

MEND = (
    "what a guide never draws no weight brings back, so the evidence and the posterior are those "
    "of a model without it"
)

_covered: ContextVar[bool] = ContextVar("langppl_covered", default=False)


@contextlib.contextmanager
def covered(by_others: bool = True) -> Iterator[None]:
    """Within the block, what a guide leaves out is drawn by others that it is mixed with."""
    token = _covered.set(by_others or _covered.get())
    try:
        yield
    finally:
        _covered.reset(token)


def is_covered() -> bool:
    """Whether what a guide leaves out is drawn by others."""
    return _covered.get()


def is_conditioned(program: Program, name: str) -> bool:
    """Whether something in a program may rule out values of a latent."""
    if program.is_static and name in program.graph:
        below = program.graph.below(name, ("observed", "factor"))
    else:
        below = list(program.sites)
    found = (program.sites[n] for n in below if n in program.sites)
    return any(
        s.kind == "factor" or (s.kind == "observed" and not isinstance(s.fn, StringDistribution))
        for s in found
    )


def tell_left_out(
    guide: str, program: Program, name: str, fn: Any, own: Any, told: set[str]
) -> None:
    """Warns, once, if a guide that is a function cannot draw all that a latent may be.

    Args:
        guide: what the guide is called.
        program: the model.
        name: the latent.
        fn: the model's distribution.
        own: the guide's.
        told: what is known; the latent is added with a mark of its own.
    """
    mark = f"left out of {name}"
    if mark in told:
        return
    lost = left_out(fn, own, conditioned=False)
    if lost is None:
        return
    told.add(mark)
    # The graph is searched last: this is asked at every draw.
    if left_out(fn, own, conditioned=True) is None and is_conditioned(program, name):
        return
    warn(
        f"the guide {guide!r} cannot draw, at site {name!r}, {lost}; {MEND}, unless the model "
        "rules it out elsewhere. Widen the guide's site, or mix the guide with the prior: "
        'lp.MixtureGuide([guide, "prior"])',
        InferenceWarning,
    )


def left_out(fn: Any, own: Any, conditioned: bool) -> str | None:
    """What the model allows at a site and a guide's distribution cannot draw.

    Args:
        fn: the model's distribution.
        own: the guide's, of the same kind.
        conditioned: whether the program may rule out more than `fn` does.

    Returns:
        A few words, or None if nothing is seen to be left out.
    """
    if isinstance(fn, LMChoice):
        missing = [o for o in fn.options if o not in own.options]
        return f"the options {missing!r}" if missing else None
    if isinstance(fn, LMString):
        if isinstance(own, LMChoice):
            grammar = fn.rules.grammar
            texts = None if grammar is None else grammar.texts
            known = conditioned or (bool(texts) and set(texts or ()) <= set(own.options))
            return None if known else f"all strings but {list(own.options)!r}"
        return _of_rules(fn, own, conditioned)
    return _of_numbers(fn, own)


def _of_rules(fn: LMString, own: LMString, conditioned: bool) -> str | None:
    theirs, mine = fn.rules, own.rules
    if theirs.is_open or mine.is_open:
        return None
    if mine.max_tokens is not None and mine.max_tokens < (theirs.max_tokens or math.inf):
        most = "no limit" if theirs.max_tokens is None else theirs.max_tokens
        return f"strings of more tokens (max_tokens={mine.max_tokens}, the model's: {most})"
    if mine.min_tokens > theirs.min_tokens:
        return (
            f"strings of fewer tokens (min_tokens={mine.min_tokens}, the model's: "
            f"{theirs.min_tokens})"
        )
    stops = [s for s in mine.stop if not any(other in s for other in theirs.stop)]
    if stops:
        return f"strings that go on after {' or '.join(map(repr, stops))} (its stop)"
    if mine.filters != theirs.filters:
        lost = np.flatnonzero(fn.bound.allowed & ~own.bound.allowed)
        if len(lost):
            return f"tokens such as {fn.lm.vocabulary.text(int(lost[0]))!r} (its allow or ban)"
    if mine.grammar is not None:
        same = conditioned or mine.grammar == theirs.grammar
        return None if same else f"strings outside of its grammar {mine.grammar.shown}"
    return None


def _of_numbers(fn: Any, own: Any) -> str | None:
    theirs, mine = _bounds(fn), _bounds(own)
    if theirs is None or mine is None:
        return None
    try:
        is_less = bool((mine[0] > theirs[0]).any() or (mine[1] < theirs[1]).any())
    except RuntimeError:  # shapes that differ are an error of their own
        return None
    return f"numbers outside of {_shown(mine)} (the model's: {_shown(theirs)})" if is_less else None


def _bounds(fn: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The ends of what numbers of a distribution can be; None where they are no interval."""
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return None
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    low = getattr(support, "lower_bound", None)
    high = getattr(support, "upper_bound", None)
    if low is None and high is None and support is not torch.distributions.constraints.real:
        return None
    return (
        torch.as_tensor(-math.inf if low is None else low),
        torch.as_tensor(math.inf if high is None else high),
    )


def _shown(bounds: tuple[torch.Tensor, torch.Tensor]) -> str:
    return f"{float(bounds[0].max()):g} to {float(bounds[1].min()):g}"
