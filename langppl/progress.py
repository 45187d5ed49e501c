"""Progress bars, and lines in the log where there is nobody to see them."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from langppl.tables import escaped

LOG = logging.getLogger("langppl")
EVERY = 10.0
"""Seconds between two lines in the log."""
PATIENCE = 1.0
"""Seconds before a notebook has a line."""
RENEWED = 0.25
"""Seconds between two states of it."""

Advance = Callable[..., None]


@contextlib.contextmanager
def bar(title: str, total: int, show: bool) -> Iterator[Advance]:
    """A bar for long work: on stderr if it is a terminal; in a notebook a line that is renewed.

    Elsewhere the logger `langppl` gets a line at level INFO every ten seconds.

    Args:
        title: what is being done.
        total: how many steps.
        show: False for none.

    Yields:
        A function to call with the steps done, and `text=` for a new title.
    """
    title = escaped(title)
    if not show:
        yield lambda steps=1, text=None: None
    elif _is_notebook():
        with _displayed(title, total) as advance:
            yield advance
    elif sys.stderr.isatty():
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

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    # What is redirected is printed above the bar, on stderr: not what goes into a file or a pipe.
    redirected = sys.stdout.isatty()
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, redirect_stdout=redirected
    ) as progress:
        task = progress.add_task(title, total=total)

        def advance(steps: int = 1, text: str | None = None) -> None:
            shown = None if text is None else escaped(text)
            progress.update(task, advance=steps, description=shown)

        yield advance


@contextlib.contextmanager
def _displayed(title: str, total: int) -> Iterator[Advance]:
    """A line in a notebook; none for what is soon done."""
    display: Any = importlib.import_module("IPython.display").display

    began = time.monotonic()
    shown = began + PATIENCE - RENEWED
    done, latest = 0, title
    handle: Any = None

    def show() -> None:
        nonlocal handle
        line = {"text/plain": f"{latest}: {done} of {total}, {time.monotonic() - began:.0f} s"}
        if handle is None:
            handle = display(line, raw=True, display_id=True)
        else:
            handle.update(line, raw=True)

    def advance(steps: int = 1, text: str | None = None) -> None:
        nonlocal shown, done, latest
        done, latest = done + steps, escaped(text) if text else latest
        if time.monotonic() - shown >= RENEWED:
            shown = time.monotonic()
            show()

    try:
        yield advance
    finally:
        if handle is not None:
            show()


def _logged(title: str, total: int) -> Advance:
    began = said = time.monotonic()
    done = 0

    def advance(steps: int = 1, text: str | None = None) -> None:
        nonlocal said, done
        done += steps
        now = time.monotonic()
        if now - said >= EVERY:
            said = now
            named = escaped(text) if text else title
            LOG.info("%s: %d of %d, %.0f s", named, done, total, now - began)

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
    text = escaped(text)
    if show and (_is_notebook() or sys.stderr.isatty()):
        print(text, file=sys.stderr, flush=True)
    elif show:
        LOG.info("%s", text)
