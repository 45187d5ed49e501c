"""Seeds, and the random numbers that depend on them."""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import numpy as np


def generator(key: tuple[int | str, ...]) -> np.random.Generator:
    """Random numbers that depend on a key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def as_seed(seed: Any) -> int:
    """A seed of any integer type; equal ones must give equal random numbers.

    Raises:
        TypeError: if it is no integer.
    """
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, got {seed!r}") from None
