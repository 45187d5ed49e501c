"""Reports as plain text and as pandas frames, the same for all of them."""

from __future__ import annotations

import importlib
import io
from typing import Any

import rich.console


def as_text(report: rich.console.RenderableType, width: int | None = None) -> str:
    """What rich prints, without colours, wherever it goes.

    Args:
        report: what to print.
        width: columns; as wide as the terminal if None.
    """
    console = rich.console.Console(
        file=io.StringIO(),
        width=width,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
    )
    with console.capture() as capture:
        console.print(report)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def pandas_for(what: str) -> Any:
    """The pandas module.

    Args:
        what: the method that needs it.

    Raises:
        ImportError: if it is not installed; says how to install it.
    """
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError(f"{what} needs pandas: pip install 'langppl[plots]'") from error
