"""What a function may read, as far as that can be seen: two looks tell whether it has changed.

Unlike `langppl.lm.functions`, by which functions are equal, this looks into objects and into what
a module keeps: a memory that grows makes no other function, but may let it give other answers.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import re
import types
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from langppl.lm.functions import (
    Same,
    content_of_cell,
    is_users_class,
    is_users_code,
    module_of,
    names_of,
)

_PLAIN = {str, bytes, int, float, complex, bool, type(None)}
_FIXED = (
    re.Pattern, range, enum.Enum, decimal.Decimal, fractions.Fraction, datetime.date,
    datetime.time, datetime.timedelta, np.generic, np.dtype, torch.dtype, types.ModuleType,
    types.BuiltinFunctionType,
)  # fmt: skip
"""What does not change."""

CHEAP = 200
"""Parts, items of containers included, that are looked at in less time than a mask is used."""

_MOST_ITEMS = 2**17
_MOST_OBJECTS = 5_000
_LISTED = 32
_MOST_BYTES = 2**22


@dataclass(frozen=True)
class Look:
    """What a function read at one moment.

    Attributes:
        content: by which two looks are compared; None where something cannot be seen.
        parts: how much there was to look at.
    """

    content: object | None
    parts: int


class _UnseenError(Exception):
    """Something whose content cannot be told, or is too much."""


def look(fn: Any) -> Look:
    """Everything that a function may read, by content.

    Args:
        fn: a function, or an object that can be called.
    """
    looking = _Looking()
    try:
        is_function = isinstance(fn, types.FunctionType)  # one of a library's is looked into too
        content = looking.function(fn) if is_function else looking.at(fn)
    except (_UnseenError, RecursionError):
        content = None
    return Look(content, looking.parts)


class _Looking:
    """One look: each object is described once."""

    def __init__(self) -> None:
        # With the objects, whose places others might take.
        self.seen: dict[int, tuple[int, Any]] = {}
        self.parts = 0

    def at(self, value: Any) -> Any:
        kind: Any = type(value)
        if kind in _PLAIN:
            return (kind, repr(value) if kind in (float, complex) else value)
        if isinstance(value, str | bytes | int | float | complex):
            return (kind, str(value) if isinstance(value, str) else repr(value))
        if id(value) in self.seen:
            return ("again", self.seen[id(value)][0])
        if isinstance(value, types.BuiltinMethodType | types.MethodWrapperType):
            # Other than a function of a module, a method such as that of a set is bound to it.
            own = value.__self__
            is_bound = own is not None and not isinstance(own, types.ModuleType)
            return ("builtin", value.__name__, self.at(own) if is_bound else None)
        if isinstance(value, _FIXED):
            return Same(value)
        self.seen[id(value)] = (len(self.seen), value)
        self.parts += 1
        if len(self.seen) > _MOST_OBJECTS:
            raise _UnseenError
        if isinstance(value, list | tuple | set | frozenset | dict):
            return (kind, self.items(value), self.attributes(value))
        if isinstance(value, np.ndarray | torch.Tensor):
            return self.numbers(value)
        if isinstance(value, functools.partial):
            return ("partial", self.at(value.func), self.at(value.args), self.at(value.keywords))
        if isinstance(value, types.MethodType):
            return ("method", self.at(value.__func__), self.at(value.__self__))
        if isinstance(value, types.FunctionType):
            return self.function(value) if is_users_code(value.__code__) else Same(value)
        if isinstance(value, property):
            return ("property", self.at(value.fget))
        if isinstance(value, staticmethod | classmethod) or hasattr(value, "__wrapped__"):
            return ("wrapped", self.at(value.__wrapped__), self.attributes(value))
        if isinstance(value, type):
            return self.of_class(value) if is_users_class(value) else Same(value)
        if module_of(kind).partition(".")[0] == "langppl":
            return Same(value)
        if not (is_users_class(kind) or kind is types.SimpleNamespace):
            raise _UnseenError
        return ("object", self.at(kind), self.attributes(value))

    def function(self, value: Any) -> Any:
        names = set(names_of(value.__code__))
        named = {n: value.__globals__[n] for n in names if n in value.__globals__}
        for module in [m for m in named.values() if isinstance(m, types.ModuleType)]:
            if is_users_class(module):
                named |= {(module.__name__, n): v for n, v in vars(module).items() if n in names}
        closed = [content_of_cell(cell) for cell in value.__closure__ or ()]
        own = (closed, value.__defaults__, value.__kwdefaults__, vars(value))
        return (value.__code__, self.each(own), self.mapping(named))

    def of_class(self, value: type) -> Any:
        own = {n: v for n, v in vars(value).items() if n not in _OF_EVERY_CLASS}
        return (Same(value), self.each(value.__mro__[1:]), self.mapping(own))

    def attributes(self, value: Any) -> Any:
        own = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name):
                    own[name] = getattr(value, name)
        return self.mapping(own)

    def items(self, value: Collection[Any]) -> Any:
        self.parts += len(value)
        if len(value) > _MOST_ITEMS:
            raise _UnseenError
        if isinstance(value, dict):
            return (self.plain_or_each(value, list), self.plain_or_each(value.values(), list))
        if isinstance(value, set | frozenset):
            return self.plain_or_each(value, _sorted)
        return self.plain_or_each(value, list)

    def plain_or_each(self, value: Collection[Any], ordered: Callable[[Any], list[Any]]) -> Any:
        if set(map(type, value)) <= _PLAIN:
            shown = repr(ordered(value))
            if len(value) <= _LISTED:
                return shown
            return hashlib.blake2b(shown.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return self.each(value)

    def each(self, values: Iterable[Any]) -> Any:
        return tuple([self.at(v) for v in values])

    def mapping(self, values: dict[Any, Any]) -> Any:
        return tuple((n, self.at(values[n])) for n in sorted(values, key=str))

    def numbers(self, value: Any) -> Any:
        try:
            array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        except (RuntimeError, TypeError) as error:
            raise _UnseenError from error
        if array.dtype.hasobject or array.nbytes > _MOST_BYTES:
            raise _UnseenError
        self.parts += array.size
        digest = hashlib.blake2b(array.tobytes(), digest_size=16).digest()
        return (str(array.dtype), array.shape, digest)


def _sorted(values: Iterable[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:  # of several types
        return sorted(values, key=repr)


_OF_EVERY_CLASS = {"__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__slots__"}
