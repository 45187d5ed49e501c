"""Many executions of a program at once, so that the LM always sees full batches.

Each execution is a greenlet. It runs until it performs a request (see `langppl.lm.requests`),
which switches back here; when every execution waits, all requests are served in one batch and the
executions go on. User code is plain synchronous Python.

Tasks may run tasks of their own. By default their requests are served apart; `run_whole` has those
of many whole inferences served together.

Pyro, torch and Python keep ambient state per process or per thread: handler stack, what handlers
and `PyroModule`s hold of a run, plate dimensions, grad mode, autocast, default float type, random
numbers, filters of warnings, where print goes. Each execution owns its own, swapped in and out at
every switch; context variables come with the greenlet. Threads take turns, one scheduler each.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from pyro.poutine import runtime

from langppl.distributions import sites
from langppl.lm.filters import looking_once
from langppl.lm.kept import keeping
from langppl.lm.requests import (
    Reply,
    Request,
    Server,
    alone,
    same_weights,
    serve,
    served_by,
    tell,
    undone_after,
    when_orphaned,
)
from langppl.program.shared import Shared

T = TypeVar("T")

_is_inside_whole: ContextVar[bool] = ContextVar("langppl_is_inside_whole", default=False)


class _Warnings:
    """A snapshot of what is done with warnings, as `warnings.catch_warnings` changes it."""

    def __init__(self, filters: Any, content: list[Any], shown_by: tuple[Any, Any]) -> None:
        self.filters = filters
        self.content = content
        self.shown_by = shown_by

    @classmethod
    def capture(cls) -> _Warnings:
        module: Any = warnings
        filters = module.filters
        return cls(filters, list(filters), (module.showwarning, module._showwarnmsg_impl))

    def install(self) -> None:
        module: Any = warnings
        module.showwarning, module._showwarnmsg_impl = self.shown_by
        if module.filters is self.filters and self.filters == self.content:
            return
        module.filters = self.filters
        module.filters[:] = self.content
        _forget_warned()


# Python's own name for it changed with 3.14.
_forget_warned: Callable[[], None] = getattr(
    warnings, "_filters_mutated", getattr(warnings, "_filters_mutated_lock_held", lambda: None)
)


_Autocast = tuple[tuple[str, bool, torch.dtype], ...]


def _autocast() -> _Autocast:
    return tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
    )


def _set_modes(grad: bool, autocast: _Autocast, dtype: torch.dtype) -> None:
    torch.set_grad_enabled(grad)
    for kind, enabled, of_kind in autocast:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, of_kind)
    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)


class _Ambient:
    """A snapshot of the state that Pyro, torch and Python keep outside of any object."""

    def __init__(
        self,
        stack: list[Any],
        dims: list[Any],
        grad: bool,
        autocast: _Autocast,
        rng: torch.Tensor,
        dtype: torch.dtype,
        warned: _Warnings,
        streams: tuple[Any, Any],
        shared: Shared,
    ) -> None:
        self.stack = stack
        self.dims = dims
        self.grad = grad
        self.autocast = autocast
        self.rng = rng
        self.dtype = dtype
        self.warned = warned
        self.streams = streams
        self.shared = shared

    def without_handlers(self) -> _Ambient:
        """The same outside of Pyro's handlers, plates and modules."""
        found = copy.copy(self)
        found.stack, found.dims, found.shared = [], [], Shared([], [])
        return found

    @classmethod
    def capture(cls) -> _Ambient:
        return cls(
            list(runtime._PYRO_STACK),
            list(runtime._DIM_ALLOCATOR._stack),
            torch.is_grad_enabled(),
            _autocast(),
            torch.get_rng_state(),
            torch.get_default_dtype(),
            _Warnings.capture(),
            (sys.stdout, sys.stderr),
            Shared.capture(runtime._PYRO_STACK),
        )

    def install(self) -> None:
        # In place: Pyro's modules hold references to these very lists.
        runtime._PYRO_STACK[:] = self.stack
        self.shared.install()
        runtime._DIM_ALLOCATOR._stack[:] = self.dims
        _set_modes(self.grad, self.autocast, self.dtype)
        torch.set_rng_state(self.rng)
        self.warned.install()
        sys.stdout, sys.stderr = self.streams


@undone_after
def _restore_modes() -> Callable[[], None]:
    stack, dims = list(runtime._PYRO_STACK), list(runtime._DIM_ALLOCATOR._stack)
    grad, dtype, autocast = torch.is_grad_enabled(), torch.get_default_dtype(), _autocast()

    def restore() -> None:
        runtime._PYRO_STACK[:], runtime._DIM_ALLOCATOR._stack[:] = stack, dims
        _set_modes(grad, autocast, dtype)

    return restore


@when_orphaned
def _leave_handlers() -> None:
    runtime._PYRO_STACK.clear()
    runtime._DIM_ALLOCATOR._stack.clear()


class _Execution(Generic[T]):
    """One task and where it stands."""

    def __init__(self, task: Callable[[], T], ambient: _Ambient) -> None:
        self.ambient = ambient
        self.result: T | None = None
        self.wanted: Sequence[Request] | None = None
        self.greenlet = greenlet(self._main)
        self.greenlet.gr_context = copy_context()
        self._task = task

    def _main(self) -> None:
        with served_by(_asking()):
            self.result = self._task()

    def go_on(self, replies: list[Reply] | None) -> None:
        """Runs until the next requests or the end; what the task raises is raised here."""
        outside = _Ambient.capture()
        try:
            self.ambient.install()
            try:
                self.wanted = self.greenlet.switch(*([] if replies is None else [replies]))
            finally:
                self.ambient = _Ambient.capture()
        finally:
            outside.install()

    def close(self) -> None:
        """Ends an unfinished task as if it had been interrupted where it waits."""
        if self.greenlet and not self.greenlet.dead:
            outside = _Ambient.capture()
            try:
                try:
                    self.ambient.install()
                finally:
                    # Left to the garbage collector, it would end among someone else's handlers.
                    self.greenlet.throw(GreenletExit)
            finally:
                outside.install()


def _asking() -> Server:
    """What hands requests over to the scheduler that the current greenlet runs under."""
    mode = torch.is_inference_mode_enabled()
    thread = threading.get_ident()

    def ask(requests: Sequence[Request]) -> list[Reply]:
        if threading.get_ident() != thread:
            raise RuntimeError(
                f"{sites.where()}an LM is asked from another thread than the model's, with the "
                "model's context (as by asyncio.to_thread); ask it in the thread in which the "
                "model or its tool was called"
            )
        # Nothing but its own block can leave it, so the other executions would run in it too.
        if torch.is_inference_mode_enabled() != mode:
            raise RuntimeError(
                f"{sites.where()}torch.inference_mode is switched within the model, and other "
                "executions go on while this one waits for the LM; do not wrap lp.sample in "
                "torch.inference_mode, use torch.no_grad"
            )
        # A local name for the current greenlet would make it uncollectable.
        replies: list[Reply] = getcurrent().parent.switch(requests)
        return replies

    return ask


@alone
def run(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Runs tasks at once, serving the LM requests of all of them in batches.

    Args:
        tasks: plain functions; what they perform is served together.

    Returns:
        Their results, in order.

    Raises:
        BaseException: the first error that a task raises, with its own traceback; the other
            tasks are closed, and Pyro's, torch's and Python's ambient state is what it was.
    """
    # Served directly, also where this call itself runs inside another scheduler: not by that one's
    # server, which may be watched for what a task asks for itself.
    answer = _asking() if _is_inside_whole.get() else serve
    with same_weights(), looking_once():
        return _run(tasks, answer)


def _run(tasks: Sequence[Callable[[], T]], answer: Server) -> list[T]:
    outside = _Ambient.capture()
    inside = outside.without_handlers()
    executions = [_Execution(task, inside) for task in tasks]
    try:
        with contextlib.ExitStack() as closing:
            for execution in reversed(executions):
                closing.callback(execution.close)
            with served_by(None), keeping():
                for execution in executions:
                    execution.go_on(None)
                while waiting := [e for e in executions if e.wanted is not None]:
                    requests = [r for e in waiting for r in e.wanted or ()]
                    tell((r.lm, r.adapter) for r in requests)
                    replies = iter(answer(requests))
                    for execution in waiting:
                        mine = [next(replies) for _ in execution.wanted or ()]
                        execution.go_on(mine)
    finally:
        # An interrupt may have come in the middle of a switch, or of what undoes it, or come here.
        try:
            outside.install()
        finally:
            outside.install()
    results: list[Any] = [e.result for e in executions]
    return results


def run_whole(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Runs tasks at once that call `run` themselves, such as whole inferences.

    Each time that all of them wait, whatever their own executions ask for is served in one batch.

    Args:
        tasks: plain functions.

    Returns:
        Their results, in order; see `run`.
    """

    def inside(task: Callable[[], T]) -> T:
        _is_inside_whole.set(True)
        return task()

    return run([partial(inside, task) for task in tasks])
