"""Running a second model on posterior draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from langppl.distributions import LMString
from langppl.distributions.base import Key
from langppl.keywords import did_you_mean
from langppl.program import Program
from langppl.program.execution import Choice, Execution, draw_prior, given, run_many, run_once
from langppl.program.lengths import (
    MOST_ATTEMPTS,
    EndedEarly,
    RejectedDraw,
    draw_open,
    too_short,
)
from langppl.program.statements import Model
from langppl.values import RETURN
from langppl.warn import warn


def predict(
    model: Model | Program,
    args: Sequence[Any],
    draws: Sequence[Mapping[str, Any]],
    sites: Collection[str],
    seed: int,
    lengths: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Runs a model once for each draw; see `Posterior.predict`.

    Args:
        model: a model function, or a compiled program.
        args: its arguments; of a program none.
        draws: the values that its latents of these names take.
        sites: all names that draws may have.
        seed: of its other latents.
        lengths: tokens of each open string that is predicted.
    """
    met: set[str] = set()

    def task(i: int, values: Mapping[str, Any]) -> dict[str, Any]:
        execution = _repeated(model, args, values, (seed, "predict", i), lengths)
        if not any(name in execution.sites for name in sites):
            raise ValueError(
                f"the model has none of this posterior's sites ({', '.join(sites)}), so "
                "there is nothing to predict from"
            )
        met.update(execution.sites)
        new = {s.name: s.content for s in execution.sites.values() if s.name not in sites}
        return {**new, RETURN: execution.returned}

    found = run_many([functools.partial(task, i, v) for i, v in enumerate(draws)], {})
    for name in sorted(lengths.keys() - met):
        hint = did_you_mean(name, met)
        warn(f"lengths name {name!r}, and no run of the model has met that site{hint}")
    return found


def _repeated(
    model: Model | Program,
    args: Sequence[Any],
    values: Mapping[str, Any],
    key: Key,
    lengths: Mapping[str, int],
) -> Execution:
    """A run on one draw, the first in which no string is rejected or ends early."""
    rejected: set[str] = set()
    for attempt in range(MOST_ATTEMPTS):
        try:
            return _run(model, args, values, (*key, attempt) if attempt else key, lengths)
        except RejectedDraw as early:
            rejected.add(str(early))
        except EndedEarly:
            pass
    if rejected:
        raise ValueError(
            f"{MOST_ATTEMPTS} runs on one posterior draw came to nothing: "
            f"{' or '.join(sorted(rejected))}; give strings that are rejected more "
            "max_tokens"
        )
    raise too_short(lengths)


def _run(
    model: Model | Program,
    args: Sequence[Any],
    values: Mapping[str, Any],
    key: Key,
    lengths: Mapping[str, int],
) -> Execution:
    def prior(name: str, fn: Any, execution: Execution) -> Choice:
        if isinstance(fn, LMString) and fn.is_open:
            return Choice(draw_open(name, fn, (*key, name), lengths, "predict"))
        choice = draw_prior(fn, (*key, name))
        if choice.log_prob == -math.inf:
            raise RejectedDraw(name)
        return choice

    choose = given(values, prior)
    if isinstance(model, Program):
        return model.run_once(choose, forgive=False)
    return run_once(model, args, choose)
