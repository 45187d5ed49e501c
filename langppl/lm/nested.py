"""What is kept within the outermost of nested blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar, Token
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def opened(kept: ContextVar[dict[Any, Any] | None]) -> Iterator[None]:
    """Within the block there is a mapping to keep things in, the outermost block's own.

    Args:
        kept: where it is; None outside of all blocks.
    """
    if kept.get() is not None:
        yield
        return
    token = kept.set({})
    try:
        yield
    finally:
        reset(kept, token)


def reset(variable: ContextVar[T], token: Token[T]) -> None:
    """Gives a context variable the value that it had before a block."""
    # A block whose end an interrupt has skipped is closed when its exception is forgotten, in
    # whatever context that happens; its own has gone by then.
    with contextlib.suppress(ValueError):
        variable.reset(token)
