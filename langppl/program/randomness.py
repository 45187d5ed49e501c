"""Randomness that a model takes from elsewhere than its sites, found while its structure is.

Every execution begins with the same state of torch's generator, so a coin that a model tosses with
`torch.rand` falls the same way in all of them: its posterior would be that of one side. What the
model takes from the generators of torch, numpy and `random` is seen by their states.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from langppl.program.hidden import told_of_hidden
from langppl.program.statements import Model
from langppl.warn import warn

REPEATS = 16
"""Equal runs under other random numbers: a coin falls the same way in all of them once in 2^16."""


class RandomnessWarning(UserWarning):
    """A model draws random numbers outside of its sites."""


def _numpy() -> Any:
    # A model that has not imported numpy does not draw from it.
    return sys.modules.get("numpy")


def _states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
    }
    if (numpy := _numpy()) is not None:
        _, keys, position, *_ = numpy.random.get_state()
        states["numpy.random"] = keys.tobytes(), position
    return states


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Leaves the generators as they were. Torch's is each execution's own."""
    own, numpy = random.getstate(), _numpy()
    of_numpy = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(own)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


class Watched:
    """A model that notes from which generators it draws.

    Attributes:
        drew: names of the generators that runs have drawn from.
        left: the states in which runs have left these, one for each run.
        seed: what the generators are seeded with before a run; None leaves them as they are.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.drew: dict[str, None] = {}
        self.left: dict[str, list[Any]] = {}
        self.seed: int | None = None

    def __call__(self, *args: Any) -> Any:
        """Runs the model."""
        if self.seed is not None:
            torch.default_generator.manual_seed(self.seed)
            random.seed(self.seed)
            if (numpy := _numpy()) is not None:
                numpy.random.seed(self.seed)
        before = _states()
        try:
            return self.model(*args)
        finally:
            after = _states()
            self.drew.update({n: None for n in before if before[n] != after[n]})
            for name in self.drew:
                self.left.setdefault(name, []).append(after[name])


def _is_fixed(left: list[Any]) -> bool:
    """Whether runs under all seeds, the same ones under each, have left equal states."""
    runs = len(left) // REPEATS
    return len(left) == runs * REPEATS and left == left[:runs] * REPEATS


def check_randomness(watched: Watched, check: Callable[[], None]) -> None:
    """Whether what a model has drawn outside of its sites matters to them.

    Args:
        watched: the model, after a run or more.
        check: runs it once more with known values, and raises ValueError if it meets other sites.

    Raises:
        ValueError: if a run under other random numbers meets other sites.
    """
    if not watched.drew:
        return
    watched.drew, watched.left = {}, {}
    try:
        with _kept():
            for watched.seed in range(REPEATS):
                check()
    finally:
        watched.seed = None
    # What draws in its first run only, to make the weights of a model that it loads, is no matter,
    # nor what seeds a generator itself: whatever the seed, its runs leave equal states.
    free = [n for n in watched.drew if not _is_fixed(watched.left[n])]
    if free:
        names = " and ".join(free)
        warn(
            f"the model draws from the generator of {names} outside of lp.sample. In {REPEATS} "
            "runs its sites did not depend on that; if they ever do, the posterior is that of one "
            "draw. Make it a site (lp.sample), or give it a generator of its own with a fixed seed"
            f"{told_of_hidden()}",
            RandomnessWarning,
        )
