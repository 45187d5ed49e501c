"""Numbers of things, as they are given to langppl."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def as_count(name: str, value: Any, least: int) -> int:
    """A number of things, of any integer type.

    Args:
        name: what it is called in the error.
        value: the number.
        least: the smallest allowed.

    Raises:
        ValueError: if it is no integer, or below that.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)
