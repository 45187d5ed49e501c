"""Warnings that point at the user's own line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Hashable

_INSIDE = ("langppl", "pyro", "torch", "greenlet", "contextlib", "functools")
_said: set[tuple[Hashable, str, int]] = set()


def warn(message: str, category: type[Warning] = UserWarning, once: Hashable = None) -> None:
    """Warns, naming the innermost line that is neither langppl's nor of what it stands on.

    In an execution that is the line of the model which the warning is about, elsewhere the one
    that called langppl.

    Args:
        message: what to say.
        category: the warning's class.
        once: what it is about; the same is said once for each line, whatever the message.
    """
    level, frame = 1, sys._getframe(0)
    while frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        if frame.f_back is None:
            level = 2
            break
        level, frame = level + 1, frame.f_back
    if once is not None:
        key = (once, frame.f_code.co_filename, frame.f_lineno)
        if key in _said:
            return
        _said.add(key)
    warnings.warn(message, category, stacklevel=level)
