"""Seeds, and the random numbers that depend on them."""

from __future__ import annotations

import contextlib
import hashlib
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def generator(key: tuple[int | str, ...]) -> np.random.Generator:
    """Random numbers that depend on a key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def row_seed(seed: int, row: int) -> int:
    """The seed of a row of data, of which each has random numbers of its own.

    With it `langppl.infer` gives what `infer_many` gives for that row, and so with a guide's
    `sample` and `sample_many`.

    Args:
        seed: that of all rows.
        row: its number, from 0.
    """
    return int(generator((seed, "infer_many", row)).integers(2**62))


def as_seed(seed: Any) -> int:
    """A seed of any integer type; equal ones must give equal random numbers.

    Raises:
        TypeError: if it is no integer.
    """
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, got {seed!r}") from None


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's generators with a seed; what they were before, afterwards.

    For a GPU that nothing has used yet seeding takes milliseconds, in which it notes who called.
    Where executions take turns, only the CPU's generator goes with each: a block that draws on a
    GPU must not wait for an LM.

    Args:
        seed: the seed.
    """
    uses_cuda, has_mps = torch.cuda.is_initialized(), torch.backends.mps.is_available()
    devices = list(range(torch.cuda.device_count())) if uses_cuda else []
    of_mps = torch.mps.get_rng_state() if has_mps else None
    try:
        with torch.random.fork_rng(devices=devices):
            if uses_cuda or has_mps:
                torch.manual_seed(seed)
            else:
                torch.default_generator.manual_seed(seed)
            yield
    finally:
        if of_mps is not None:
            torch.mps.set_rng_state(of_mps)
