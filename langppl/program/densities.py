"""The density with which a number is drawn, which its distribution's `log_prob` need not be."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import Unit

from langppl.distributions.sites import where
from langppl.program.statements import Known

_INNER = ("base_dist", "_component_distribution", "component0", "component1")
"""Where distributions keep those that they are made of, and that draw for them."""


def drawing(fn: Any) -> Any:
    """The distribution whose `log_prob` is that of what `fn` draws.

    A mask (`fn.mask`) hides values from `log_prob` and a `Delta`'s `log_density` is added to it,
    but neither changes what is drawn; so they belong to the model's term and not to the proposal's.

    Args:
        fn: one of Pyro's distributions, masks within others included.

    Returns:
        `fn` itself where the two are the same.
    """
    if isinstance(fn, dist.MaskedDistribution):
        return drawing(fn.base_dist)
    changed: dict[str, Any] = {}
    if isinstance(fn, dist.Delta) and bool((fn.log_density != 0.0).any()):
        changed["log_density"] = torch.zeros_like(fn.log_density)
    for name in _INNER:
        inner = getattr(fn, "__dict__", {}).get(name)
        if inner is not None and (own := drawing(inner)) is not inner:
            changed[name] = own
    if not changed:
        return fn
    found = copy.copy(fn)
    vars(found).update(changed)
    return found


def log_density(fn: Any, value: Any) -> float:
    """Log-density (nats) with which one of Pyro's distributions draws a value.

    Args:
        fn: the distribution.
        value: the value.

    Returns:
        −inf outside of its support.

    Raises:
        ValueError: if the distribution refuses the value, such as NaN; names the site.
    """
    own = drawing(fn)
    try:
        return -math.inf if is_outside(own, value) else float(own.log_prob(value).detach().sum())
    except ValueError as error:
        raise ValueError(f"{where()}{fn!r}: {error}") from error


def is_outside(fn: Any, value: Any, mask: Any = None) -> bool:
    """Whether a value is outside of a distribution's support, where that can be told.

    Args:
        fn: one of Pyro's distributions.
        value: the value.
        mask: Pyro's mask: where it is false, any value will do.
    """
    if isinstance(fn, Known | Unit) or not isinstance(value, torch.Tensor):
        return False
    own = fn
    while own is not None:
        # Told not to look at values, as for labels between 0 and 1 of a Bernoulli.
        if not getattr(own, "_validate_args", True):
            return False
        own = getattr(own, "base_dist", None)
    try:
        is_inside = fn.support.check(value)
    except (NotImplementedError, AttributeError, RuntimeError):  # no support, or no such shape
        return False
    if bool(torch.isnan(value).any()):
        return False  # an error, which the distribution raises
    if mask is None:
        return not bool(is_inside.all())
    try:
        return not bool((is_inside | ~torch.as_tensor(mask)).all())
    except RuntimeError:
        return False
