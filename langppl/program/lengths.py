"""Lengths of open strings that are to be simulated, as they are asked for by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langppl.distributions import LMString, Text
from langppl.distributions.base import Key
from langppl.distributions.sites import pattern
from langppl.lm.counts import as_count
from langppl.warn import warn

if TYPE_CHECKING:
    from langppl.program.program import Program


MOST_ATTEMPTS = 200
"""Runs for one draw, before it is given up."""


class EndedEarly(BaseException):
    """The LM ended an open string before the length asked for, or the string was rejected."""


class RejectedDraw(EndedEarly):
    """A string was drawn that its own rules reject.

    Args:
        name: of its site.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"the string {name!r} was rejected by its own rules")


def draw_open(name: str, fn: LMString, key: Key, lengths: Mapping[str, int], by: str) -> Text:
    """Draws the first tokens of an open string.

    Args:
        name: of its site.
        fn: its distribution.
        key: what the random numbers depend on.
        lengths: tokens of each open string.
        by: what the user calls, for an error.

    Raises:
        ValueError: if its length is not among them.
        EndedEarly: if the LM ended the text before.
    """
    if name not in lengths:
        raise ValueError(
            f"site {name!r} is an open string; say how long it is to be: "
            f"{by}(..., lengths={{{name!r}: 10}})"
        )
    drawn = fn.draw_open(key, lengths[name])
    if drawn is None:
        raise EndedEarly(f"the open string {name!r} ended before its {lengths[name]} tokens")
    return drawn[0]


def too_short(lengths: Mapping[str, int]) -> ValueError:
    """What is raised when no attempt succeeds."""
    return ValueError(
        f"in {MOST_ATTEMPTS} attempts the LM ended an open string before its length "
        f"{dict(lengths)}; ask for shorter ones"
    )


def as_lengths(lengths: Any) -> dict[str, int]:
    """Lengths as plain numbers; None for none.

    Raises:
        TypeError: if they are no mapping.
        ValueError: if one is no integer of at least 1.
    """
    if lengths is not None and not isinstance(lengths, Mapping):
        raise TypeError(
            f"lengths must be a mapping from the names of open strings to numbers of tokens, got "
            f"{lengths!r}"
        )
    return {name: as_count(f"lengths[{name!r}]", n, 1) for name, n in (lengths or {}).items()}


def check_lengths(
    programs: Sequence[Program], lengths: Mapping[str, int] | None, loosely: bool = False
) -> None:
    """Looks for names that are no open string in any of some programs.

    A name that no run has met may still be one where the sites depend on the latents, and is a
    warning there.

    Args:
        programs: the programs.
        lengths: tokens of each open string.
        loosely: whether numbers in names do not count, as other arguments may make more turns of
            a loop.

    Raises:
        ValueError: if there is one.
    """
    sites = {n: s for p in programs for n, s in p.sites.items()}
    opens = [n for n, s in sites.items() if isinstance(s.fn, LMString) and s.fn.is_open]
    patterns = {pattern(n) for n in opens} if loosely else set(opens)
    for name in lengths or ():
        if (pattern(str(name)) if loosely else name) in patterns:
            continue
        said = f"lengths name {name!r}, which is no open string; these are: "
        said += ", ".join(map(repr, opens)) or "none"
        if name in sites or all(p.is_static for p in programs):
            raise ValueError(said)
        warn(f"{said}, as far as runs of the model have met them")
