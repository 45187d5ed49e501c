"""Values and tools as keys: equal where they have the same content, or else only to themselves."""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from langppl.lm.functions import Same, content_of_cell, module_of
from langppl.lm.texts import plain_text

MUTABLE = (list, dict, set, bytearray, np.ndarray, torch.Tensor)
"""What a function closes over of these is told from others by its identity: it may keep a log."""

_MOST_PARTS = 20_000
"""Parts of one object that are looked at before it counts as itself."""


def is_function(value: Any) -> bool:
    """Whether something is a function of Python's, bound or not."""
    return isinstance(value, functools.partial | types.MethodType | types.FunctionType)


def tool_key(fn: Any, within: tuple[int, ...] = ()) -> Any:
    """A function as something that tells it from others by its code and what is bound to it.

    A model that defines its tools anew in every execution has equal ones wherever they do the same.

    Args:
        fn: the function.
        within: the functions that it was found in, by identity.
    """
    if id(fn) in within:
        return ("itself", within.index(id(fn)))
    within = (*within, id(fn))

    def own(value: Any) -> Any:
        if is_function(value):
            return tool_key(value, within)
        return Same(value) if isinstance(value, MUTABLE) else hashable(value)

    if isinstance(fn, functools.partial):
        named = tuple((k, own(v)) for k, v in fn.keywords.items())
        return ("partial", own(fn.func), tuple(map(own, fn.args)), named)
    if isinstance(fn, types.MethodType):
        return ("method", own(fn.__func__), own(fn.__self__))
    if isinstance(fn, types.FunctionType):
        cells = tuple(own(content_of_cell(cell)) for cell in fn.__closure__ or ())
        named = tuple((k, own(v)) for k, v in (fn.__kwdefaults__ or {}).items())
        return ("function", fn.__code__, cells, tuple(map(own, fn.__defaults__ or ())), named)
    return hashable(fn)


class _TooManyParts(Exception):
    """An object leads to more than can be looked at."""


def hashable(value: Any) -> Any:
    """A value as something that can be compared and hashed by content.

    Numbers are compared bit by bit, so that NaN equals itself and 0.0 is not -0.0. Objects that
    have a hash are compared as they compare themselves; the others by what `pickle` would write of
    them, and where it could not, or that is too much, by their identity.
    """
    return _key(value, (), None)


def _key(value: Any, within: tuple[int, ...], left: list[int] | None) -> Any:
    """See `hashable`.

    Args:
        value: the value.
        within: the objects that it was found in, by identity.
        left: how many more parts of an object may be looked at; None outside of such objects.
    """
    if isinstance(value, str):
        text = plain_text(value)
        # What prints otherwise than it reads may be printed.
        return ("str", text) if str(value) == text else (_name(type(value)), text, str(value))
    kind = _name(type(value))
    if isinstance(value, float):
        return (kind, value.hex())
    if isinstance(value, complex):
        return (kind, value.real.hex(), value.imag.hex())
    if isinstance(value, np.generic) and not value.dtype.hasobject:
        return (kind, str(value.dtype), value.tobytes())
    if id(value) in within:
        return ("itself", within.index(id(value)))
    if left is not None:
        left[0] -= 1
        if left[0] < 0:
            raise _TooManyParts

    def own(part: Any) -> Any:
        return _key(part, (*within, id(value)), left)

    if isinstance(value, torch.Tensor):
        return _tensor_key(value)
    if isinstance(value, np.ndarray):
        plain = np.asarray(value)
        inside = own(plain.tolist()) if plain.dtype.hasobject else plain.tobytes()
        return (kind, plain.shape, str(plain.dtype), inside, _attributes(value, own))
    if isinstance(value, Mapping):
        items = tuple((own(k), own(v)) for k, v in value.items())
        return (kind, items, _attributes(value, own))
    if isinstance(value, list | tuple):
        return (kind, tuple(map(own, value)), _attributes(value, own))
    if isinstance(value, set | frozenset):
        return (kind, frozenset(map(own, value)), _attributes(value, own))
    has_hash = _has_hash(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        if not has_hash:
            named = {f.name: getattr(value, f.name, None) for f in fields}
            return (kind, own(named | getattr(value, "__dict__", {})))
        made: Any = type(value).__dataclass_params__  # type: ignore[attr-defined]
        # Else its hash is written by hand, and it compares as it says.
        if made.eq and (made.frozen or made.unsafe_hash):
            return (kind, *(own(getattr(value, f.name, None)) for f in fields if f.compare))
    if not has_hash:
        return _reduced(value, within, left)
    if left is not None:
        # Of what an object is made of, identity says nothing: it may be a copy's.
        if is_function(value):
            return tool_key(value)
        if isinstance(value, type) and "<locals>" in value.__qualname__:
            return ("class", _name(value))
        own_hash: Any = type(value).__hash__
        if own_hash is object.__hash__ and not _stands_for_itself(value):
            return _reduced(value, within, left)
    return (kind, value)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _has_hash(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _stands_for_itself(value: Any) -> bool:
    is_fixed = isinstance(value, type | types.ModuleType | types.BuiltinFunctionType)
    is_ours = module_of(type(value)).partition(".")[0] == "langppl"
    return is_fixed or is_ours or isinstance(value, torch.nn.Module)


def _attributes(value: Any, own: Callable[[Any], Any]) -> Any:
    """What a container of a class of the user's has besides its items."""
    found = getattr(value, "__dict__", None)
    return own(dict(found)) if found else None


def _tensor_key(value: torch.Tensor) -> Any:
    try:
        plain = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        plain = plain.resolve_conj().resolve_neg().cpu().contiguous()
        # One number that was expanded counts as contiguous, with a stride of 0 that no view takes.
        plain = plain.reshape(-1).clone(memory_format=torch.contiguous_format)
        bits = plain.view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError, NotImplementedError):  # one without numbers that can be had
        return Same(value)
    return ("tensor", str(value.layout), str(value.dtype), tuple(value.shape), bits)


def _reduced(value: Any, within: tuple[int, ...], left: list[int] | None) -> Any:
    """An object by what `pickle` would write of it; nothing is ever made of that."""
    if left is None:
        try:
            return _reduced(value, within, [_MOST_PARTS])
        except (_TooManyParts, RecursionError):
            return Same(value)
    try:
        special = copyreg.dispatch_table.get(type(value))
        found = value.__reduce_ex__(4) if special is None else special(value)
    except Exception:  # whatever does not let itself be pickled
        return Same(value)
    parts = (found,) if isinstance(found, str) else found
    inner = (*within, id(value))
    kept = tuple(tuple(p) if isinstance(p, Iterator) else p for p in parts)
    return (_name(type(value)), tuple(_key(p, inner, left) for p in kept))


_PLAIN = (str, bytes, int, float, bool, type(None))
_MOST_PLAIN = 64


def shortened(key: Any) -> Any:
    """What stands for a key that is kept for long: of its texts and numbers a digest.

    Objects that a key compares as they compare themselves stay in it.
    """
    if _is_plain(key):
        text = repr(key)
        if len(text) <= _MOST_PLAIN:
            return key
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return tuple(map(shortened, key)) if type(key) is tuple else key


def _is_plain(key: Any) -> bool:
    if type(key) is tuple:
        return all(map(_is_plain, key))
    return type(key) in _PLAIN


def size_of(value: Any) -> int:
    """Bytes that a value takes, about; what objects refer to does not count."""
    found, pending = 0, [value]
    seen: set[int] = set()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        found += sys.getsizeof(part, 64)
        if isinstance(part, torch.Tensor):
            found += part.numel() * part.element_size()
        elif isinstance(part, np.ndarray) and part.base is not None:
            found += part.nbytes
        elif type(part) is dict:
            pending += [*part.keys(), *part.values()]
        elif type(part) in (list, tuple, set, frozenset):
            pending += part
    return found
