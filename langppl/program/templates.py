"""Sites as data: what a site's distribution is made of, and templates of it.

A *signature* holds all that a site's log-probability depends on, so two runs of a program agree
if their signatures do. A *template* is a site whose prompts hold markers; filled with values it
is the site that a run with those values would have met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from langppl.distributions import LMChoice, LMString
from langppl.distributions.tempered import TemperedFactor
from langppl.program.contents import parameters
from langppl.program.execution import Execution, Site
from langppl.program.keys import hashable
from langppl.program.placeholders import MARKER, Placeholder, fill
from langppl.program.statements import as_value


def signature(site: Site) -> Any:
    """All that a site's log-probability depends on, but for a latent's own value."""
    value = None
    if site.kind == "observed":
        # Equal texts of other tokens have another probability.
        value = (hashable(site.value), getattr(site.value, "ids", None))
    made_of = parameters(site.fn) if site.made_of is None else site.made_of
    return (site.kind, made_of, value, hashable(site.scale), hashable(site.mask))


def signatures(execution: Execution) -> dict[str, Any]:
    """The signature of each site, in the order they were met."""
    return {name: signature(site) for name, site in execution.sites.items()}


def fill_site(site: Site, values: Mapping[str, Any]) -> Site:
    """The site that a run with these values meets."""
    fn = _fill_distribution(site.fn, values)
    value = site.value
    if site.kind == "latent":
        value = as_value(values[site.name]) if site.is_string else values[site.name]
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
