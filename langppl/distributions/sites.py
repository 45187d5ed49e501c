"""Names of sites: that of the one at hand, for error messages, and what those of a loop share."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar

from langppl.lm.nested import reset

_site: ContextVar[str | None] = ContextVar("langppl_site", default=None)


@contextlib.contextmanager
def naming(site: str) -> Iterator[None]:
    """Within the block, errors and warnings speak of this site."""
    token = _site.set(site)
    try:
        yield
    finally:
        reset(_site, token)


def where() -> str:
    """How a message begins: the site at hand, or nothing."""
    site = _site.get()
    return f"site {site!r}: " if site is not None else ""


def current() -> str | None:
    """The site at hand."""
    return _site.get()


def pattern(name: str) -> str:
    """A site's name with its numbers left open, as the turns of a loop have it in common."""
    return re.sub(r"\d+", "#", name)
