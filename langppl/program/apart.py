"""Statements that no handler of the model around them sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyro.poutine import runtime


@contextmanager
def unseen() -> Iterator[None]:
    """Runs what is inside as if no handler and no plate of Pyro's were around it."""
    stack, dims = list(runtime._PYRO_STACK), list(runtime._DIM_ALLOCATOR._stack)
    try:
        runtime._PYRO_STACK[:], runtime._DIM_ALLOCATOR._stack[:] = [], []
        yield
    finally:
        runtime._PYRO_STACK[:], runtime._DIM_ALLOCATOR._stack[:] = stack, dims
