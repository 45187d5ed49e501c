"""What of Pyro's statements and handlers a program refuses, or takes with a warning."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger

from langppl.warn import warn


def check_subsample(msg: Any) -> None:
    """Raises ValueError for the site of a plate that draws which rows it has."""
    fn = msg["fn"]
    if type(fn).__name__ != "_Subsample" or msg["value"] is not None:
        return
    size, own = fn.size, fn.subsample_size
    if own is None or not 0 <= own < size:
        return
    raise ValueError(
        f"the plate {msg['name']!r} draws {own} of its {size} rows at random, and a model must be "
        f"a function of its sites: give it all rows, or subsample= with fixed ones (a tensor of "
        "their indices); rows of data are drawn by guide.fit(model, data, observations=...), and "
        "lp.infer_many(model, data) takes each"
    )


def check_intervention(name: str) -> None:
    """Raises TypeError if Pyro's own `do` sets a site to what is no number."""
    for handler in _PYRO_STACK:
        value = handler.data.get(name) if isinstance(handler, DoMessenger) else None
        if value is not None and not isinstance(value, torch.Tensor | numbers.Number):
            raise TypeError(
                f"poutine.do sets site {name!r} to {value!r} ({type(value).__name__}), and Pyro's "
                f"takes numbers alone; write lp.do(model, {{{name!r}: {value!r}}})"
            )


def check_latent(name: str, fn: Any, mask: Any) -> None:
    """Raises ValueError if a mask hides real numbers that are latent, as no prior holds those.

    Args:
        name: the site.
        fn: its distribution, of numbers.
        mask: Pyro's mask.
    """
    if mask is None or bool(torch.as_tensor(mask).all()):
        return
    try:
        if fn.support.is_discrete:
            return
    except (NotImplementedError, AttributeError):  # a distribution that does not say
        return
    if name.endswith("_unobserved"):
        mend = (
            "obs_mask makes such a site of what is missing: leave the missing elements out of the "
            "observation, in a plate of as many as there are"
        )
    else:
        mend = (
            "mask what is observed of it, not the number itself; leave out of the plate the "
            "elements that nothing is known of"
        )
    raise ValueError(
        f"site {name!r} is a latent real number ({fn!r}), and Pyro's mask hides its density: all "
        f"of its values would count alike, and there are too many for that; {mend}"
    )


def warn_of_subsample(name: str) -> None:
    """Warns of a latent in a plate that has some of its rows, whose prior counts several times."""
    for handler in _PYRO_STACK:
        if not isinstance(handler, SubsampleMessenger) or handler.subsample_size == handler.size:
            continue
        size, own = handler.size, handler.subsample_size
        warn(
            f"latent site {name!r} is inside the plate {handler.name!r}, which has {own} of "
            f"{size} rows: Pyro counts each of them {size}/{own} times, the latent's prior too, so "
            "the posterior is narrower than that of these rows; give the plate all rows, or as "
            "its size the number of those that it has",
            once=("subsampled", handler.name),
        )
