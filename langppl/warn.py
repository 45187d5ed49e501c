"""Warnings that point at the user's own line."""

from __future__ import annotations

import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Hashable

from greenlet import getcurrent, greenlet

_INSIDE = ("langppl", "pyro", "torch", "greenlet", "contextlib", "functools")
_MOST_SAID = 1024
_said: OrderedDict[tuple[Hashable, str, int], None] = OrderedDict()


def warn(message: str, category: type[Warning] = UserWarning, once: Hashable = None) -> None:
    """Warns, naming the innermost line that is neither langppl's nor of what it stands on.

    In an execution that is the line of the model which the warning is about, elsewhere the one
    that called langppl.

    Args:
        message: what to say.
        category: the warning's class.
        once: what it is about; the same is said once for each line, whatever the message, among
            the last thousand or so.
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
    warnings.warn_explicit(
        message,
        category,
        file,
        line,
        module=frame.f_globals.get("__name__", "?"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


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
