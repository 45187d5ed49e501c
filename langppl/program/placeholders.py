"""Marked strings that show where a latent flows, and notice when they are looked into.

A placeholder's text is a marker from Unicode's private use area. f-strings, `+`, `format`, `join`
and `%` carry the marker along, so a prompt in which it stands depends on that latent. Methods that
look inside (`in`, `==`, `split`, ...) are noted: what the program then does is not a template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from langppl.distributions import Text
from langppl.lm.texts import plain_text

MARKER = re.compile("\ue000([^\ue000\ue001]+)\ue001")


def marker(site: str) -> str:
    """The text that stands for a site."""
    return f"\ue000{site}\ue001"


class Placeholder(Text):
    """A string that stands for a site's value and reports being looked into."""

    __slots__ = ("report",)

    report: Callable[[str, tuple[Any, ...]], None]

    @classmethod
    def make(cls, text: str, report: Callable[[str, tuple[Any, ...]], None]) -> Placeholder:
        """A string of some text; `report` gets the name of each method that looks inside."""
        self: Placeholder = cls.__new__(cls, text)  # type: ignore[assignment]
        self.report = report
        return self

    def __format__(self, spec: str) -> str:
        """Plain interpolation carries the marker; padding and truncation look inside."""
        if spec:
            self.report("__format__", (spec,))
        return str.__format__(self, spec)


def _watched(name: str) -> Callable[..., Any]:
    original = getattr(str, name)

    def method(self: Placeholder, *args: Any, **kwargs: Any) -> Any:
        self.report(name, args)
        return original(self, *args, **kwargs)

    method.__name__ = name
    return method


_CARRIES_MARKER = {"join"}
_LOOKS_INSIDE = {
    "__contains__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__",
    "__len__", "__iter__", "__getitem__", "__mod__", "__repr__",
}  # fmt: skip
for _name in dir(str):
    if _name in _LOOKS_INSIDE or not (_name.startswith("_") or _name in _CARRIES_MARKER):
        setattr(Placeholder, _name, _watched(_name))


def strings_in(structure: Any) -> Iterator[str]:
    """All strings in nested tuples, lists and mappings."""
    if isinstance(structure, str):
        yield plain_text(structure)
    elif isinstance(structure, Mapping):
        for value in structure.values():
            yield from strings_in(value)
    elif isinstance(structure, tuple | list | set | frozenset):
        for value in structure:
            yield from strings_in(value)


def sites_in(structure: Any) -> set[str]:
    """The sites whose markers stand anywhere in a structure."""
    return {name for text in strings_in(structure) for name in MARKER.findall(text)}


def fill(structure: Any, values: Mapping[str, str]) -> Any:
    """The structure with markers replaced by values; markers of other sites stay."""
    if isinstance(structure, str):
        if "\ue000" not in structure:
            return structure
        return MARKER.sub(lambda m: plain_text(values.get(m[1], m[0])), structure)
    if isinstance(structure, Mapping):
        return {k: fill(v, values) for k, v in structure.items()}
    if isinstance(structure, tuple):
        return tuple(fill(v, values) for v in structure)
    if isinstance(structure, list):
        return [fill(v, values) for v in structure]
    return structure
