"""Sites as data: what a site's distribution is made of, and templates of it.

A *signature* holds all that a site's log-probability depends on, so two runs of a program agree
if their signatures do. A *template* is a site whose prompts hold markers; filled with values it
is the site that a run with those values would have met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.distributions import Unit

from langppl.distributions import LMChoice, LMString, StringDistribution
from langppl.distributions.tempered import TemperedFactor
from langppl.program.execution import Execution, Site
from langppl.program.placeholders import MARKER, fill
from langppl.program.statements import Known, hashable


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
    found: list[Any] = [type(fn).__name__]
    for name in sorted(getattr(fn, "arg_constraints", {})):
        value = getattr(fn, name)
        found.append((name, value.tolist() if isinstance(value, torch.Tensor) else value))
    if isinstance(getattr(fn, "base_dist", None), torch.distributions.Distribution):
        found.append(parameters(fn.base_dist))
    return tuple(found)


def signature(site: Site) -> Any:
    """All that a site's log-probability depends on, but for a latent's own value."""
    value = hashable(site.value) if site.kind == "observed" else None
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
    whole = MARKER.fullmatch(str(value))
    if whole and whole[1] in values:
        found: str = values[whole[1]]
        return found
    filled: str = fill(str(value), values)
    return value if filled == str(value) else filled


def fill_all(templates: Sequence[Site], values: Mapping[str, Any]) -> Execution:
    """The execution that a run with these values makes, unscored."""
    return Execution({t.name: fill_site(t, values) for t in templates})
