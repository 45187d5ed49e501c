"""Warnings that point at the user's own line."""

from __future__ import annotations

import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from greenlet import getcurrent, greenlet

_INSIDE = ("langppl", "pyro", "torch", "greenlet", "contextlib", "functools")
_MOST_SAID = 1024
_MOST_FILES = 256
_said: OrderedDict[tuple[Hashable, str, int], None] = OrderedDict()
_registries: OrderedDict[str, dict[Any, Any]] = OrderedDict()
"""By file, what Python notes of warnings that were shown, to show equal ones once for each line."""


def warn(message: str, category: type[Warning] = UserWarning, once: Hashable = None) -> None:
    """Warns, naming the innermost line that is neither langppl's nor of what it stands on.

    In an execution that is the line of the model which the warning is about, elsewhere the one
    that called langppl.

    Args:
        message: what to say.
        category: the warning's class.
        once: what it is about; the same is said once for each line, whatever the message, among
            the last thousand or so. Otherwise equal messages are, by Python's default filter.
    """
    frame = _line_of_user()
    file, line = frame.f_code.co_filename, frame.f_lineno
    if once is not None:
        key = (once, file, line)
        if key in _said:
            _said.move_to_end(key)
            return
        _said[key] = None
        # Sites may have a name of their own in every request of a service.
        if len(_said) > _MOST_SAID:
            _said.popitem(last=False)
    # Not the module's own, which would keep every message: they may name what is in the data.
    registry = _registries.setdefault(file, {})
    _registries.move_to_end(file)
    if len(_registries) > _MOST_FILES:
        _registries.popitem(last=False)
    module = frame.f_globals.get("__name__", "?")
    try:
        warnings.warn_explicit(message, category, file, line, module=module, registry=registry)
    finally:
        # Beside the messages there is a number, which says of which filters they are.
        if len(registry) > _MOST_SAID + 1:
            first = next(key for key in list(registry)[:2] if isinstance(key, tuple))
            registry.pop(first, None)


def _line_of_user() -> types.FrameType:
    first = frame = sys._getframe(2)
    task: greenlet | None = getcurrent()
    while frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        if frame.f_back is not None:
            frame = frame.f_back
            continue
        # Executions have stacks of their own; what called langppl stands in their parent's.
        task = task.parent if task is not None else None
        if task is None or task.gr_frame is None:
            return first
        frame = task.gr_frame
    return frame
