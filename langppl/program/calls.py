"""Tool calls: sites whose values are fixed functions of their arguments, and are remembered."""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from greenlet import getcurrent, greenlet
from pyro.poutine.messenger import Messenger

from langppl.lm.functions import content_of_cell
from langppl.lm.model import LM
from langppl.lm.requests import Asked, noted_by, tell, undone_after, wait, weights_of
from langppl.program.keys import hashable, is_function, shortened, size_of, tool_key
from langppl.program.statements import Known, check_name, meet_known, own_copy

R = TypeVar("R")
Memo = dict[Any, Any]
memo_of_calls: ContextVar[Memo | None] = ContextVar("langppl_memo_of_calls", default=None)
_is_within: ContextVar[bool] = ContextVar("langppl_is_within", default=False)
"""Whether a tool is being evaluated."""
MOST_CALLS = 16_384
MOST_BYTES = 64 * 2**20
"""Results of tools that a program keeps from one inference to the next, and their bytes, about."""
MOST_IMPURE = 2**20
_impure: OrderedDict[Any, None] = OrderedDict()
"""Calls with `pure=False`, by what stands for their keys."""
_grown: dict[int, Memo] = {}
"""Memos that have got a result since the outermost function that is alone began, by identity."""


def call(name: str, fn: Callable[..., R], *args: Any, pure: bool = True, **kwargs: Any) -> R:
    """A tool call: a site whose value is a fixed function of its arguments.

    Within one inference, the tool is evaluated once for each name, tool and arguments, and again
    when the weights of an LM that it has asked have changed. From one inference to the next a
    program keeps the latest results (16,384, and 64 MiB of them). Arguments are compared by
    content, as far as that can be known; an object that has a hash, as it compares itself. What a
    lambda or another function closes over, and what a `functools.partial` or a method is bound to,
    are arguments too. Of lists, dicts, arrays and other objects among these it is their identity
    that counts, and the graph does not see what is in them: what depends on latents is better given
    as an argument.

    Args:
        name: the site's name.
        fn: the tool.
        *args: its arguments.
        pure: False for a tool that must not be evaluated twice with the same arguments, in the
            life of the process: a second evaluation is an error (of the latest million calls).
        **kwargs: its arguments by name.

    Returns:
        What the tool returned; of lists, dicts, sets and arrays a copy for each execution.

    Raises:
        RuntimeError: if a tool that is not pure would be evaluated a second time.
        ValueError: if it has sites; a model that it infers with `infer` may have them.
        TypeError: if it is no function, or returns an iterator.
    """
    check_name(name)
    if not callable(fn):
        raise TypeError(f"call {name!r} needs a function, got {fn!r}; write call(name, fn, *args)")

    def evaluate() -> R:
        memo = memo_of_calls.get()
        if memo is None:
            memo = {}
        key = (name, tool_key(fn), tuple(hashable(a) for a in args), hashable(kwargs))
        # While it asks an LM in one execution, others wait for what it returns: not within a tool,
        # whose own result may be waited for.
        while _is_elsewhere(memo.get(key)) and not _is_within.get():
            wait()
        known = memo.get(key)
        if isinstance(known, _Remembered) and (known.holds() or not pure):
            tell(known.asked())
            memo[key] = memo.pop(key)
            return cast(R, known.result)
        if not pure:
            short = shortened(key)
            if short in _impure:
                raise RuntimeError(
                    f"call {name!r} was evaluated with {(*args, *kwargs.values())!r} before, and "
                    "pure=False forbids a second time"
                )
            _impure[short] = None
            if len(_impure) > MOST_IMPURE:
                _impure.popitem(last=False)
        asked: set[Asked] = set()
        token = _is_within.set(True)
        own = memo[key] = _Started(getcurrent())
        try:
            with noted_by(asked.update), _Tool(name):
                result = fn(*args, **kwargs)
            _check_result(name, fn, result)
            states = [(weakref.ref(lm), adapter, weights_of(lm, adapter)) for lm, adapter in asked]
            is_pure = pure and not (_impure and shortened(key) in _impure)
            memo[key] = _Remembered(result, states, is_pure, size_of(key) + size_of(result))
            if memo is memo_of_calls.get():
                _grown[id(memo)] = memo
        finally:
            _is_within.reset(token)
            if memo[key] is own:
                del memo[key]
        return result

    inputs = (*args, *kwargs.values(), *bound_to(fn))
    return cast(R, own_copy(meet_known(name, Known(evaluate, inputs, "call"))))


class _Tool(Messenger):
    """Around a tool: its result is remembered, so what happens in it is met in one run alone.

    A model that the tool infers has a stack of handlers of its own.
    """

    def __init__(self, tool: str) -> None:
        super().__init__()
        self.tool = tool

    def _pyro_sample(self, msg: Any) -> None:
        raise ValueError(
            f"a tool has no sites: {msg['name']!r} is met inside the tool {self.tool!r}; call the "
            "function itself in place of lp.call, or use lp.infer in it"
        )


def _check_result(name: str, fn: Any, result: Any) -> None:
    """Raises TypeError for what can be read only once: a tool's result is read again."""
    if isinstance(result, Iterator | AsyncIterator | Awaitable):
        tool = getattr(fn, "__qualname__", None) or repr(fn)
        raise TypeError(
            f"call {name!r}: the tool {tool} returned a {type(result).__name__}, which can be read "
            "only once, and a tool's result is remembered for other executions; return its items, "
            "as a list or a tuple"
        )


@dataclass(frozen=True)
class _Started:
    """In the place of a tool's result while it is evaluated; by which execution."""

    by: greenlet


def _is_elsewhere(found: Any) -> bool:
    """Whether another execution of the same scheduler is evaluating a tool.

    One of another scheduler's would not go on while this one waits.
    """
    own = getcurrent()
    if own.parent is None or not isinstance(found, _Started):
        return False
    return found.by is not own and found.by.parent is own.parent


@dataclass(frozen=True)
class _Remembered:
    """A tool's result.

    Attributes:
        result: what it returned.
        states: the LMs that it asked, under which adapters, and what their weights were.
        is_pure: whether it may be evaluated again.
        size: bytes that it takes, about, with its arguments.
    """

    result: Any
    states: Sequence[tuple[weakref.ref[LM], str | None, object]]
    is_pure: bool
    size: int

    def asked(self) -> list[Asked]:
        """The LMs that are still there, and the adapters."""
        return [(lm, adapter) for ref, adapter, _ in self.states if (lm := ref()) is not None]

    def holds(self) -> bool:
        """Whether those LMs would still say the same."""
        return len(self.asked()) == len(self.states) and all(
            weights_of(lm, adapter) == before
            for (lm, adapter), (_, _, before) in zip(self.asked(), self.states, strict=True)
        )


def remembered(memo: Memo) -> Memo:
    """What a memo of tool calls holds by now; of calls that are not over, nothing."""
    return {key: own for key, own in memo.items() if isinstance(own, _Remembered)}


@undone_after
def _forget_the_oldest() -> Callable[[], None]:
    """Within an inference all results are kept, from one to the next the latest."""

    def forget() -> None:
        while _grown:
            _, memo = _grown.popitem()
            pure = {k: own.size for k, own in remembered(memo).items() if own.is_pure}
            count, size = len(pure), sum(pure.values())
            for key, own in pure.items():
                if count <= MOST_CALLS and size <= MOST_BYTES:
                    break
                del memo[key]
                count, size = count - 1, size - own

    return forget


def forget_since(memo: Memo, before: Memo) -> None:
    """Takes a memo of tool calls back to what it held before.

    Results of tools with `pure=False` stay, since these must not be evaluated again.

    Args:
        memo: is changed in place, for programs share it.
        before: what `remembered` gave.
    """
    for key, own in remembered(memo).items():
        if key not in before and own.is_pure:
            del memo[key]
    # A result that was known may have been replaced when an LM's weights changed.
    memo.update({k: v for k, v in before.items() if isinstance(memo.get(k), _Remembered | None)})


def bound_to(fn: Any) -> list[Any]:
    """What a function brings with it: what it closes over, is bound to, or has by default.

    Only strings, numbers and tuples: other objects may be others, or changed, in the next run of
    the same program, and tell nothing of what a site is made of.
    """
    found: list[Any] = []
    todo, seen = [fn], set()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, functools.partial):
            own = [one.func, *one.args, *one.keywords.values()]
        elif isinstance(one, types.MethodType):
            own = [one.__func__, one.__self__]
        elif isinstance(one, types.FunctionType):
            own = [content_of_cell(cell) for cell in one.__closure__ or ()]
            own += [*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
        else:
            continue
        todo += [v for v in own if is_function(v)]
        found += [v for v in own if isinstance(v, _PLAIN)]
    return found


_PLAIN = (str, bytes, int, float, tuple)
