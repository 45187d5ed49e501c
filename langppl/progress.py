"""Progress bars."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(title: str, total: int, show: bool) -> Iterator[Callable[..., None]]:
    """A bar for long work, on stderr, if it is a terminal.

    Args:
        title: what is being done.
        total: how many steps.
        show: False for none.

    Yields:
        A function to call with the steps done, and `text=` for a new title.
    """
    if not (show and sys.stderr.isatty()):
        yield lambda steps=1, text=None: None
        return
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


def say(text: str, show: bool) -> None:
    """Prints a line on stderr, if it is a terminal.

    Args:
        text: the line.
        show: False for nothing.
    """
    if show and sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
