"""What is kept within the outermost of nested blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any


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
        kept.reset(token)
