"""Reports as text, in notebooks and as pandas frames, the same for all of them."""

from __future__ import annotations

import abc
import importlib
import io
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import rich.console

_HTML = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:'
    "Menlo,'DejaVu Sans Mono',consolas,'Courier New',monospace\">{code}</pre>"
)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class Report(abc.ABC):
    """A result that shows as a table wherever it is printed, in notebooks too."""

    report_width: ClassVar[int | None] = None
    """Columns of the text; None for as wide as the terminal."""

    @abc.abstractmethod
    def __rich__(self) -> rich.console.RenderableType:
        """The report, for rich."""

    def __str__(self) -> str:
        """The report of `__rich__` as plain text."""
        return as_text(self, width=self.report_width)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        """What Jupyter and IPython show: they choose among the forms themselves."""
        return {"text/plain": str(self), "text/html": as_html(self, width=self.report_width)}


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
    return "\n".join(escaped(line.rstrip()) for line in capture.get().rstrip().split("\n"))


def as_html(report: rich.console.RenderableType, width: int | None = None) -> str:
    """What rich prints as one HTML element, its styles within.

    Args:
        report: what to print.
        width: columns; as wide as the terminal if None.
    """
    console = rich.console.Console(
        file=io.StringIO(), width=width, record=True, force_terminal=False, force_jupyter=False
    )
    console.print(report)
    html = console.export_html(code_format=_HTML, inline_styles=True)
    return "\n".join(map(escaped, html.split("\n")))


def escaped(text: str) -> str:
    r"""A text with control characters as Python writes them: names may come from data.

    On a terminal such characters would recolour it, retitle it or hide what follows.

    Example:
        >>> escaped("\x1b[31mred")
        '\\x1b[31mred'
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def shown(value: Any, longest: int | None = None) -> str:
    """A value as reports show it: quoted, so that spaces at its ends can be seen.

    Args:
        value: the value, numbers as floats.
        longest: characters; of longer ones the middle is left out. None for any length.
    """
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    if longest is not None and len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} … {text[-half:]}"
    return text


def moments(table: Mapping[float, float]) -> str:
    """Mean and standard deviation of numbers, in words.

    Args:
        table: finite number → weight; the weights need not sum to one.
    """
    mass = math.fsum(table.values())
    mean = math.fsum(v * p for v, p in table.items()) / mass
    # A product of floats may be infinite where a power would be an error.
    variance = math.fsum((v - mean) * (v - mean) * p for v, p in table.items()) / mass
    return f"mean {mean:.4g}, sd {math.sqrt(variance):.4g} ({len(table)} values)"


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
