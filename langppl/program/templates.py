"""Sites as data: what a site's distribution is made of, and templates of it.

A *signature* holds all that a site's log-probability depends on, so two runs of a program agree
if their signatures do. A *template* is a site whose prompts hold markers; filled with values it
is the site that a run with those values would have met.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pyro.distributions import Unit
from torch.distributions import Transform
from torch.distributions.utils import lazy_property

from langppl.distributions import LMChoice, LMString, StringDistribution
from langppl.distributions.tempered import TemperedFactor
from langppl.program.execution import Execution, Site
from langppl.program.placeholders import MARKER, Placeholder, fill
from langppl.program.statements import Known, hashable

_PLAIN = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray)
_CACHES = frozenset(("_cached_x_y", "_inv"))
"""What torch's transforms remember of their last use."""
_DEEPEST = 6


def parameters(fn: Any) -> Any:
    """What a distribution is made of, comparable with `==`."""
    if isinstance(fn, StringDistribution):
        return (type(fn).__name__, fn.fields())
    if isinstance(fn, TemperedFactor):
        return ("TemperedFactor", fn.power, fn.base.fields(), str(fn.value))
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
        return (type(value).__name__, id(value))
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
            if n not in found and n not in _CACHES and not _is_cached(type(value), n)
        }
    return (type(value).__name__, tuple(sorted(found.items(), key=lambda item: item[0])))


def _is_cached(kind: type, name: str) -> bool:
    return isinstance(getattr(kind, name, None), lazy_property | functools.cached_property)


def signature(site: Site) -> Any:
    """All that a site's log-probability depends on, but for a latent's own value."""
    value = None
    if site.kind == "observed":
        # Equal texts of other tokens have another probability.
        value = (hashable(site.value), getattr(site.value, "ids", None))
    return (site.kind, parameters(site.fn), value, hashable(site.scale), hashable(site.mask))


def signatures(execution: Execution) -> dict[str, Any]:
    """The signature of each site, in the order they were met."""
    return {name: signature(site) for name, site in execution.sites.items()}


def fill_site(site: Site, values: Mapping[str, Any]) -> Site:
    """The site that a run with these values meets."""
    fn = _fill_distribution(site.fn, values)
    value = site.value
    if site.kind == "latent":
        value = values[site.name]
    elif isinstance(value, str):
        value = _fill_value(value, values)
    return replace(site, fn=fn, value=value, log_prob=None, log_q=None)


def _fill_distribution(fn: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(fn, LMString):
        prompt = fill(fn.prompt, values)
        return fn if prompt == fn.prompt else fn.with_prompt(prompt)
    if isinstance(fn, LMChoice):
        return fn.with_prompt(fill(fn.prompt, values), fill(fn.options, values))
    if isinstance(fn, TemperedFactor):
        base = _fill_distribution(fn.base, values)
        return TemperedFactor(base, fn.power, _fill_value(fn.value, values))
    return fn


def _fill_value(value: str, values: Mapping[str, Any]) -> str:
    """A value that is one latent keeps that latent's tokens."""
    # A string that was put together from the latent's text is tokenised anew, as in a run.
    whole = MARKER.fullmatch(str(value)) if isinstance(value, Placeholder) else None
    if whole and whole[1] in values:
        found: str = values[whole[1]]
        return found
    filled: str = fill(str(value), values)
    return value if filled == str(value) else filled


def fill_all(templates: Sequence[Site], values: Mapping[str, Any]) -> Execution:
    """The execution that a run with these values makes, unscored."""
    return Execution({t.name: fill_site(t, values) for t in templates})
