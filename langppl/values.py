"""Values of sites in samples: what stands for one that is not there, and what tells two apart."""

from __future__ import annotations

import enum
from typing import Any, Final

import numpy as np
import torch

from langppl.lm.texts import plain_text
from langppl.tables import shown

LONGEST_VALUE = 160
"""Characters of a value that a table or an error shows."""

RETURN: Final = "_RETURN"
"""The name of what the model returned, as in Pyro's traces."""


class Absent(enum.Enum):
    """The type of `ABSENT`."""

    ABSENT = "(absent)"

    def __str__(self) -> str:
        """`(absent)`, as it is printed in tables."""
        return "(absent)"

    __repr__ = __str__


ABSENT: Final = Absent.ABSENT
"""The value of a latent in executions that never reached it.

Its text is "(absent)", but it equals no string, so a latent that really takes the value "(absent)"
keeps a row of its own.
"""


class UnknownSiteError(KeyError):
    """A value was asked for that no sample has."""

    def __str__(self) -> str:
        """The message itself: `KeyError` would print it in quotation marks."""
        return str(self.args[0])


class UncountableError(TypeError):
    """Values that cannot be told apart by hashing have no table of probabilities."""


def plain(value: Any) -> Any:
    """A site's value as plain Python: `str`, number or (nested) list."""
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return value


def key_of(value: Any) -> Any:
    """A site's value as a key: equal values have equal keys.

    Numbers stay what they are, as Python hashes equal ones alike, whatever their types.
    """
    value = plain(value)
    if isinstance(value, (list, tuple)):
        return tuple(key_of(entry) for entry in value)
    return value


def is_number(key: Any) -> bool:
    """Whether a key is a number that has a mean: no truth value, no integer beyond the floats."""
    if isinstance(key, int) and not isinstance(key, bool):
        try:
            return float(key) == key
        except OverflowError:
            return False
    return isinstance(key, float)


def hashable_key(site: str, value: Any) -> Any:
    """The value's key, if it has one."""
    key = key_of(value)
    try:
        hash(key)
    except TypeError:
        raise UncountableError(
            f"{site!r} has values that are not hashable, such as {shown(value, LONGEST_VALUE)} "
            f"({type(value).__name__}), so they have no table of probabilities; make them strings, "
            "numbers or tuples in the model, or use expect"
        ) from None
    return key
