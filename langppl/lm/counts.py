"""Numbers, of things and others, as they are given to langppl."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any


def unwrapped(value: Any) -> Any:
    """The number in a tensor or an array of no dimensions; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def as_count(name: str, value: Any, least: int) -> int:
    """A number of things, of any integer type.

    Args:
        name: what it is called in the error.
        value: the number.
        least: the smallest allowed.

    Raises:
        ValueError: if it is no integer, or below that.
    """
    number = unwrapped(value)
    if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(number)


def as_number(name: str, value: Any) -> float:
    """A number, of any real type.

    Args:
        name: what it is called in the error.
        value: the number.

    Raises:
        ValueError: if it is none.
    """
    number = unwrapped(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(number)


def as_share(name: str, value: Any) -> float:
    """A number between 0 and 1, of any real type.

    Args:
        name: what it is called in the error.
        value: the number.

    Raises:
        ValueError: if it is none, or out of range.
    """
    number = as_number(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    return number


def as_part(name: str, value: Any) -> float:
    """A share that leaves something: at least 0 and below 1, of any real type.

    Args:
        name: what it is called in the error.
        value: the number.

    Raises:
        ValueError: if it is none, or out of range.
    """
    number = as_number(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")
    return number


def as_pair(name: str, value: Any, said: str = "two numbers") -> tuple[float, float]:
    """Two numbers, in any sequence.

    Args:
        name: what they are called in the error.
        value: the sequence, such as a list that was read from a file.
        said: what it must be, for the error.

    Raises:
        ValueError: if it is none of two numbers.
    """
    try:
        if isinstance(value, str | bytes | Mapping):
            raise TypeError
        first, second = (as_number(name, v) for v in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be {said}, got {value!r}") from None
    return first, second


def as_betas(value: Any) -> tuple[float, float]:
    """AdamW's betas, in any sequence.

    Raises:
        ValueError: if it is none of two numbers, or one is out of range.
    """
    betas = as_pair("betas", value)
    if not all(0.0 <= b < 1.0 for b in betas):
        raise ValueError(f"betas must be at least 0 and below 1, got {betas}")
    return betas
