"""Rows of data that a model treats alike, as far as its arguments show.

That a program is its templates is found by many runs with made-up values. For another row of the
data that need not be done again if the model goes the same way there, and which way it goes depends
on its arguments alone: on flags and numbers, on what is missing, on how many items there are, and
on texts that it compares with strings of its own. The *form* of a row is made of these, and of the
sites that a run with placeholders meets, without their texts.

A model may look at a text in other ways too (how long it is, a regular expression), so a form is
no proof. Rows of a known form are still run with some values, and draws are compared with the
templates during inference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from langppl.lm.texts import plain_text
from langppl.program.execution import Site
from langppl.program.keys import hashable
from langppl.program.literals import literals
from langppl.program.placeholders import MARKER
from langppl.program.templates import signature

_MOST_KNOWN = 1_000
_PLAIN = (bool, int, float, bytes, type(None))
_ARRAYS = (np.generic, np.ndarray, torch.Tensor)


class _NoForm(Exception):
    """An argument is an object that shows nothing of what a model does with it."""


class Forms:
    """The forms of rows whose templates were compared with many runs.

    Args:
        model: the model.
    """

    def __init__(self, model: Any) -> None:
        self._constants = [c for c in dict.fromkeys(literals(model)) if c.strip()]
        self._known: set[Any] = set()

    def add(self, args: Sequence[Any], templates: Sequence[Site]) -> None:
        """Notes a row whose templates hold."""
        form = self._form(args, templates)
        if form is not None and len(self._known) < _MOST_KNOWN:
            self._known.add(form)

    def has(self, args: Sequence[Any], templates: Sequence[Site]) -> bool:
        """Whether a row is of the form of one that was noted."""
        form = self._form(args, templates)
        return form is not None and form in self._known

    def _form(self, args: Sequence[Any], templates: Sequence[Site]) -> Any:
        try:
            of_args = self._of_argument(tuple(args))
        except (_NoForm, RecursionError):
            return None
        return of_args, tuple((t.name, _shape(signature(t))) for t in templates)

    def _of_argument(self, value: Any) -> Any:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, str):
            return kind, str(value) == plain_text(value), self._of_text(plain_text(value))
        if isinstance(value, list | tuple):
            return kind, tuple(self._of_argument(v) for v in value)
        if type(value) is dict:
            return kind, tuple((hashable(k), self._of_argument(v)) for k, v in value.items())
        if type(value) in _PLAIN or isinstance(value, _ARRAYS):
            return hashable(value)
        raise _NoForm

    def _of_text(self, text: str) -> Any:
        """How a text compares with each of the model's own strings, as it is and without case."""
        folded = text.strip().casefold()
        found = []
        for k, constant in enumerate(self._constants):
            own = constant.strip().casefold()
            if own in folded:
                found.append((k, _compared(text, constant), _compared(folded, own)))
        return bool(text), bool(folded), tuple(found)


def _compared(text: str, own: str) -> tuple[bool, ...]:
    return own in text, text.startswith(own), text.endswith(own), text == own


def _shape(value: Any) -> Any:
    """A signature without its texts, of which the sites that flow into them are left."""
    if isinstance(value, str):
        return tuple(MARKER.findall(plain_text(value)))
    if isinstance(value, Mapping):
        return tuple((_shape_of_key(k), _shape(v)) for k, v in value.items())
    if isinstance(value, tuple | list):
        return tuple(_shape(v) for v in value)
    if isinstance(value, set | frozenset):
        return len(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a string's rules
        return tuple(_shape(getattr(value, f.name)) for f in dataclasses.fields(value))
    if type(value) in _PLAIN:
        return hashable(value)
    return type(value).__qualname__


def _shape_of_key(key: Any) -> Any:
    return key if isinstance(key, str) else type(key).__qualname__
