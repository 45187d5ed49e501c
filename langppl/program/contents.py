"""Distributions by what they are made of, so that two can be told apart."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pyro.distributions import Unit
from torch.distributions import Transform
from torch.distributions.utils import lazy_property

from langppl.distributions import StringDistribution
from langppl.distributions.tempered import TemperedFactor
from langppl.lm.texts import plain_text
from langppl.program.keys import hashable
from langppl.program.statements import Known

_PLAIN = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray)
_CACHES = ("_cache", "_inv")
"""How attributes begin in which transforms of torch and Pyro remember their last use."""
_OURS = ("torch", "pyro", "langppl")
_DEEPEST = 6


def parameters(fn: Any) -> Any:
    """What a distribution is made of, comparable with `==`."""
    if isinstance(fn, StringDistribution):
        return (type(fn).__name__, fn.fields())
    if isinstance(fn, TemperedFactor):
        return ("TemperedFactor", fn.power, fn.base.fields(), plain_text(fn.value))
    if isinstance(fn, Known):
        return ("Known", hashable(fn.inputs))
    if isinstance(fn, Unit):
        return (type(fn).__name__, fn.log_factor.tolist())
    return _described(fn, 0)


def _described(value: Any, depth: int) -> Any:
    """A distribution, or what one is made of, by its content; what is unknown by its type.

    Not all that a distribution is made of stands in its `arg_constraints`: transforms, mixtures
    and a user's own distributions keep it in attributes.
    """
    if isinstance(value, list | tuple | torch.Size):
        return (type(value).__name__, tuple(_described(v, depth) for v in value))
    if isinstance(value, Mapping):
        return ("mapping", tuple((str(k), _described(v, depth)) for k, v in value.items()))
    if isinstance(value, torch.nn.Module):
        # A layer without weights, such as an activation, may be made anew in each execution.
        weights = (*value.parameters(), *value.buffers())
        return (type(value).__name__, repr(value), tuple(id(w) for w in weights))
    if isinstance(value, _PLAIN):
        return hashable(value)
    if callable(value) and not isinstance(value, torch.distributions.Distribution | Transform):
        return ("function", getattr(value, "__qualname__", type(value).__name__))
    found: dict[str, Any] = {}
    for name in getattr(value, "arg_constraints", None) or ():
        found[name] = _described(getattr(value, name), depth + 1)
    if depth < _DEEPEST:
        own = getattr(value, "__dict__", {})
        found |= {
            n: _described(v, depth + 1)
            for n, v in own.items()
            if n not in found and not n.startswith(_CACHES) and not _is_cached(type(value), n)
        }
    return (type(value).__name__, tuple(sorted(found.items(), key=lambda item: item[0])))


def _is_cached(kind: type, name: str) -> bool:
    return isinstance(getattr(kind, name, None), lazy_property | functools.cached_property)


def is_users_own(fn: Any) -> bool:
    """Whether a distribution, or one that it is made from, is of a class of the user's."""
    while fn is not None:
        if type(fn).__module__.partition(".")[0] not in _OURS:
            return True
        fn = getattr(fn, "base_dist", None)
    return False
