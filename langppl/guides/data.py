"""What a training learns from, made of what `GFlowNetGuide.fit` is given."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langppl.guides.observations import GivenLatents, Observation
from langppl.guides.replay import ReplayBuffer
from langppl.guides.settings import ON_POLICY
from langppl.guides.trajectories import Draw
from langppl.lm.counts import as_number
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.program.arguments import ModelOrProgram, pairs_of, rows_in

Pair = tuple[ModelOrProgram, list[tuple[Any, ...]]]
"""A model, or a compiled program, and its rows of data."""

_FORM_OF_GIVEN = (
    'given must be a list of mappings (latent → value), such as [{"middle": " of"}], or a '
    "posterior; for several observations a list of such, one for each"
)


def observations_in_a_step(rows: int, weights: Any) -> int:
    """How many a step takes by default."""
    # With one row for each place in a step there would be nothing to weight.
    return max(1, min(4, rows if weights is None else rows // 2))


def given_latents(given: Any, objective: str, count: int) -> list[GivenLatents]:
    """The given latents of each observation.

    Args:
        given: as `fit` takes them.
        objective: what the guide is trained with.
        count: how many observations there are.

    Raises:
        TypeError: if they are of another form.
        ValueError: if they do not belong to the observations, or the objective takes none, or needs
            some.
    """
    given = () if given is None else _latents_in(given)
    if isinstance(given, Posterior):
        found: list[GivenLatents] = [given]
    else:
        several = _rows("given", given)
        if several and all(isinstance(g, Mapping) for g in several) and count == 1:
            found = [several]
        else:
            found = [_given_row(k, g) for k, g in enumerate(several)]
    if not found:
        if objective == "mle":
            raise ValueError('objective="mle" learns from given latents: fit(..., given=...)')
        return [()] * count
    if len(found) != count:
        raise ValueError(
            f"given latents belong to one observation each: data has {count}, and given has "
            f"{len(found)}"
        )
    if objective in ON_POLICY or objective == "forward_kl":
        raise ValueError(
            f"objective={objective!r} learns from the guide's own draws, and given latents are "
            'none; use a balance loss, or "mle"'
            if objective in ON_POLICY
            else 'objective="forward_kl" learns from simulated latents; give none, or use "mle"'
        )
    return found


def _latents_in(given: Any) -> Any:
    """Given latents; the rows of a `DataFrame`."""
    if not hasattr(given, "columns"):
        return given
    if "log_weight" in given.columns:
        raise TypeError(
            "given is a table of weighted samples, and of a table each row counts alike; give the "
            "posterior itself, whose weights count"
        )
    return rows_in(given)


def _given_row(number: int, given: Any) -> GivenLatents:
    """The given latents of one of several observations."""
    if isinstance(given, Posterior):
        return given
    if isinstance(given, Mapping):
        return [given]
    rows = _rows(f"given[{number}]", given)
    for k, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"given[{number}][{k}] is {row!r}; {_FORM_OF_GIVEN}")
    return rows


def _rows(what: str, given: Any) -> list[Any]:
    if isinstance(given, Mapping | str) or not isinstance(given, Iterable):
        raise TypeError(f"{what} is {given!r}; {_FORM_OF_GIVEN}")
    return list(given)


def held_out_rows(pairs: Sequence[Pair], validation: Any) -> list[Observation]:
    """The observations to validate on, given as those to learn from are."""
    if validation is None:
        return []
    models = [m for m, _ in pairs]
    if len(models) == 1 and not isinstance(models[0], Program):
        validation = [(models[0], validation)]
    found = pairs_of(list(validation), None)
    return rows_of(found, lambda: ReplayBuffer(0), itertools.repeat(()))


def rows_of(
    pairs: Sequence[Pair],
    buffer: Callable[[], ReplayBuffer[Draw]],
    latents: Iterable[GivenLatents],
) -> list[Observation]:
    """A row of the training for each row of the data, with a buffer of its own."""
    given, made = iter(latents), []
    for model, rows in pairs:
        first: Observation | None = None
        for row in rows:
            made.append(Observation(model, row, buffer(), next(given), first))
            first = first or made[-1]
    return made


def shares_of(
    pairs: Sequence[Pair],
    weights: Sequence[float] | None,
) -> NDArray[Any] | None:
    """How often each observation is to be taken; None for equally often."""
    if weights is None:
        return None
    if len(weights) != len(pairs):
        raise ValueError(f"there are {len(pairs)} programs, and {len(weights)} weights")
    if not all(0.0 < as_number("each of weights", w) < float("inf") for w in weights):
        raise ValueError(f"weights must be above 0, got {list(weights)}")
    each = [[w / len(rows)] * len(rows) for w, (_, rows) in zip(weights, pairs, strict=True)]
    return np.array([w for own in each for w in own])
