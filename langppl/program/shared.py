"""What Pyro keeps of one run in objects that all executions share.

A handler that a model is wrapped in, such as `poutine.equalize`, is one object, and so is what a
`PyroModule` remembers of the samples of its call that is going on. Neither foresees a second run
before the first one is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from pyro.nn.module import _Context
from pyro.poutine.reentrant_messenger import ReentrantMessenger

_entered: WeakSet[Any] = WeakSet()
"""What `PyroModule`s that are being called remember of their samples."""

_enter = _Context.__enter__


def _noted(self: Any) -> None:
    _entered.add(self)
    _enter(self)


# Pyro has no list of the calls that are going on.
_Context.__enter__ = _noted  # type: ignore[method-assign]


class Shared:
    """A snapshot of these objects."""

    def __init__(self, handlers: list[tuple[Any, dict[str, Any]]], calls: list[Any]) -> None:
        self.handlers = handlers
        self.calls = calls

    @classmethod
    def capture(cls, stack: Sequence[Any]) -> Shared:
        """What they hold now.

        Args:
            stack: the handlers that are in use.
        """
        return cls(
            [(h, dict(vars(h))) for h in stack if _is_of_one_run(h)],
            [(c, c.active, c.cache) for c in _entered if c.active] if _entered else [],
        )

    def install(self) -> None:
        """Makes them hold it again."""
        for handler, state in self.handlers:
            vars(handler).clear()
            vars(handler).update(state)
        if _entered:
            for call in _entered:
                _set(call, 0, {})
            _entered.clear()
        for call, active, cache in self.calls:
            _set(call, active, cache)
            _entered.add(call)


def _is_of_one_run(handler: Any) -> bool:
    # langppl makes its own for each run.
    if type(handler).__module__.startswith("langppl."):
        return False
    # One that may be entered again counts how often it was, and no run says what it began with.
    return hasattr(handler, "__dict__") and not isinstance(handler, ReentrantMessenger)


def _set(call: Any, active: int, cache: dict[str, Any]) -> None:
    call.cache = cache
    # With parameters of its own (`module_local_params`) it holds the one store for all calls.
    if not hasattr(call, "_param_ctx"):
        call.active = active
