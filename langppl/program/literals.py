"""The strings that a model is written with, in whatever it is made of."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from langppl.lm.functions import (
    content_of_cell,
    is_users_class,
    is_users_code,
    module_of,
    names_of,
)
from langppl.lm.texts import plain_text

_DEEPEST = 4
_MOST_LOOKED_AT = 200
_MOST_ITEMS = 50
_OF_EVERY_CLASS = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__"}


def literals(model: Any) -> Iterator[str]:
    """String constants of a model and of the user's own functions that it leads to, nearest first.

    It leads to what it wraps, is bound to, closes over, has by default, and names among the globals
    of its module. Libraries are not looked into.

    Args:
        model: a function, or an object that can be called.
    """
    looked: set[int] = set()
    waiting: deque[tuple[Any, int]] = deque([(model, 0)])
    package = _package(model)
    while waiting and len(looked) < _MOST_LOOKED_AT:
        value, depth = waiting.popleft()
        if isinstance(value, str):
            yield plain_text(value)
            continue
        if id(value) in looked or depth > _DEEPEST:
            continue
        looked.add(id(value))
        if isinstance(value, types.FunctionType):
            is_own = not depth or is_users_code(value.__code__) or _package(value) == package
            if is_own:
                yield from _in_code(value.__code__)
            parts = _of_function(value, is_own)
        else:
            parts = list(_of_object(value))
        waiting.extend((part, depth + 1) for part in parts)


def _package(value: Any) -> str | None:
    name = getattr(value, "__module__", None) or module_of(type(value))
    found: str = name.partition(".")[0]
    return None if found in ("langppl", "builtins", "functools") else found


def _in_code(code: types.CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple | frozenset):
            yield from (c for c in constant if isinstance(c, str))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _in_code(constant)


def _of_function(value: types.FunctionType, is_own: bool) -> list[Any]:
    found = [content_of_cell(cell) for cell in value.__closure__ or ()]
    found += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if is_own:
        names = dict.fromkeys(names_of(value.__code__))
        globals_ = value.__globals__
        named = [globals_[n] for n in names if n in globals_]
        for module in [m for m in named if isinstance(m, types.ModuleType) and is_users_class(m)]:
            named += [vars(module)[n] for n in names if n in vars(module)]
        found += named
    return _with_wrapped(value, found)


def _with_wrapped(value: Any, found: list[Any]) -> list[Any]:
    wrapped = getattr(value, "__wrapped__", None)
    return found if wrapped is None else [wrapped, *found]


def _of_object(value: Any) -> Iterable[Any]:
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)[:_MOST_ITEMS]
    if isinstance(value, dict):
        return [*value, *value.values()][: 2 * _MOST_ITEMS]
    if isinstance(value, type):
        own = [v for n, v in vars(value).items() if n not in _OF_EVERY_CLASS]
        return own if is_users_class(value) else []
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget]
    if is_users_class(type(value)):
        return [*type(value).__mro__[:-1], *getattr(value, "__dict__", {}).values()]
    return _with_wrapped(value, [])
