"""Progress bars, and lines in the log where there is nobody to see them."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

LOG = logging.getLogger("langppl")
EVERY = 10.0
"""Seconds between two lines in the log."""

Advance = Callable[..., None]


@contextlib.contextmanager
def bar(title: str, total: int, show: bool) -> Iterator[Advance]:
    """A bar for long work: on stderr if it is a terminal, or in a notebook.

    Elsewhere the logger `langppl` gets a line at level INFO every ten seconds.

    Args:
        title: what is being done.
        total: how many steps.
        show: False for none.

    Yields:
        A function to call with the steps done, and `text=` for a new title.
    """
    if not show:
        yield lambda steps=1, text=None: None
    elif sys.stderr.isatty() or _is_notebook():
        with _drawn(title, total) as advance:
            yield advance
    else:
        yield _logged(title, total)


@contextlib.contextmanager
def _drawn(title: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)

        def advance(steps: int = 1, text: str | None = None) -> None:
            progress.update(task, advance=steps, description=text)

        yield advance


def _logged(title: str, total: int) -> Advance:
    began = said = time.monotonic()
    done = 0

    def advance(steps: int = 1, text: str | None = None) -> None:
        nonlocal said, done
        done += steps
        now = time.monotonic()
        if now - said >= EVERY:
            said = now
            LOG.info("%s: %d of %d, %.0f s", text or title, done, total, now - began)

    return advance


def _is_notebook() -> bool:
    # What has not been imported does not run this.
    if "IPython" not in sys.modules:
        return False
    from rich.console import Console

    return Console(stderr=True).is_jupyter


def say(text: str, show: bool) -> None:
    """Prints a line on stderr if it is a terminal; elsewhere it goes to the logger.

    Args:
        text: the line.
        show: False for nothing.
    """
    if show and (sys.stderr.isatty() or _is_notebook()):
        print(text, file=sys.stderr, flush=True)
    elif show:
        LOG.info("%s", text)
