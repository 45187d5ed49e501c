"""Where in a model a statement stands, which the turns of a loop or a recursion have in common."""

from __future__ import annotations

import sys
from collections.abc import Hashable

_BELOW = ("pyro", "langppl.program")


def place() -> Hashable:
    """The lines that lead from a model to the statement that is being met.

    A function that calls itself, by way of others or not, counts with its innermost lines, so that
    the place is the same however deep it is: a name may tell its turns by letters or by texts.
    """
    lines = []
    # Of a run, whose greenlet begins with it.
    frame = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if not any(name == own or name.startswith(f"{own}.") for own in _BELOW):
            lines.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    lines.reverse()
    codes = [code for code, _ in lines]
    last = {code: k for k, code in enumerate(codes)}
    again = [k for k, code in enumerate(codes) if last[code] > k]
    if again:
        first = again[0]
        end = max(last[codes[k]] for k in again)
        lines[first:end] = []
    return tuple(lines)
