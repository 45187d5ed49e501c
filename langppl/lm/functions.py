"""Functions by what they do, as far as that can be seen: their code and what it refers to."""

from __future__ import annotations

import functools
import os
import site
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from typing import Any


class Same:
    """An object that equals itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


_PLAIN = (str, bytes, int, float, complex, type(None))


def content_of(value: Any, within: tuple[int, ...] = ()) -> Any:
    """A function as something hashable that equals those which now do the same.

    A function that is written inside of another is a new object each time; its code, what it
    closes over, its defaults and the globals that it names tell whether it is another one. One
    that a module defines is not made anew, and counts as itself.
    Objects other than functions, numbers, texts and containers of these count as themselves.

    Args:
        value: the function, or what one refers to.
        within: the objects that it was found in, by identity.
    """
    if id(value) in within:
        return ("itself", within.index(id(value)))
    inner = (*within, id(value))

    def own(part: Any) -> Any:
        return content_of(part, inner)

    if isinstance(value, Same):
        return value
    if isinstance(value, _PLAIN):
        return (type(value).__name__, value)
    if isinstance(value, list | tuple):
        return (type(value).__name__, tuple(map(own, value)))
    if isinstance(value, set | frozenset):
        return (type(value).__name__, frozenset(map(own, value)))
    if isinstance(value, Mapping):
        return (type(value).__name__, tuple((own(k), own(v)) for k, v in value.items()))
    if isinstance(value, functools.partial):
        return ("partial", own(value.func), own(value.args), own(value.keywords))
    if isinstance(value, types.MethodType):
        return ("method", own(value.__func__), own(value.__self__))
    if isinstance(value, types.BuiltinMethodType | types.MethodWrapperType):
        return ("builtin", value.__name__, own(value.__self__))
    if isinstance(value, types.FunctionType):
        globals_ = value.__globals__
        if globals_.get(value.__name__) is value:
            return Same(value)
        # Those are not made anew; functions lead through whole libraries, and containers may be
        # large, or a memory that grows.
        named = {n: globals_[n] for n in names_of(value.__code__) if n in globals_}
        named = {n: v if isinstance(v, _PLAIN) else Same(v) for n, v in named.items()}
        closed = [content_of_cell(cell) for cell in value.__closure__ or ()]
        return (
            "function",
            value.__code__,
            own(closed),
            own(value.__defaults__),
            own(value.__kwdefaults__),
            own(named),
        )
    return Same(value)


def names_of(code: types.CodeType) -> Iterator[str]:
    """What a function's code may look up among the globals, that of functions in it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_of(constant)


def content_of_cell(cell: types.CellType) -> Any:
    """What a function closes over at one place; None for what is not assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _folders_of_libraries() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    found = [paths[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")]
    found += [*site.getsitepackages(), site.getusersitepackages()]
    found.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return tuple({os.path.join(os.path.realpath(p), "") for p in found})


_LIBRARIES = _folders_of_libraries()


@functools.lru_cache(maxsize=4096)
def _is_users_file(name: str) -> bool:
    if name.startswith("<frozen"):
        return False
    return not os.path.realpath(name).startswith(_LIBRARIES)


def is_users_code(code: types.CodeType) -> bool:
    """Whether code is the user's own: neither Python's, nor an installed library's, nor ours."""
    return _is_users_file(code.co_filename)


def module_of(kind: type) -> str:
    """The name of the module of a class; empty if it does not tell.

    What Cython 3.1 makes of functions, those of NumPy 2.2 among them, is of a class that has the
    `__module__` of its instances, a descriptor, for its own.
    """
    name: object = kind.__module__
    return name if isinstance(name, str) else ""


def is_users_class(value: type | types.ModuleType) -> bool:
    """Whether a class, or a module, is the user's own."""
    name = value.__name__ if isinstance(value, types.ModuleType) else module_of(value)
    if not name or name in sys.builtin_module_names:
        return False
    if name.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is None or _is_users_file(file)
