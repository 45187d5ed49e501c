"""What a guide that is written as in Pyro must keep to, as a function or for numbers alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pyro.distributions import Delta

from langppl.diagnostics import InferenceWarning
from langppl.distributions.sites import pattern
from langppl.keywords import did_you_mean
from langppl.program import Program
from langppl.program.execution import Execution, is_plain
from langppl.warn import warn


def name_of(fn: Callable[..., Any]) -> str:
    """What a guide that is a function is called."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return str(getattr(fn, "__name__", type(fn).__name__))


def check_number(guide: str, name: str, fn: Any, own: Any) -> None:
    """Raises ValueError if a number of a guide's has no density over the model's values.

    Args:
        guide: what the guide is called.
        name: the site.
        fn: the model's distribution there.
        own: the guide's.
    """
    if own.shape() != fn.shape():
        raise ValueError(
            f"the guide {guide!r} draws site {name!r} with shape {tuple(own.shape())}, and "
            f"the model with shape {tuple(fn.shape())}"
        )
    if _is_point(own) != _is_point(fn) or _is_discrete(own) != _is_discrete(fn):
        raise ValueError(
            f"the guide {guide!r} draws site {name!r} from {own!r}, and the model from "
            f"{fn!r}; of a continuous number a guide needs a density, and of a discrete one "
            f"probabilities{_INSTEAD if _is_point(own) else ''}"
        )


_INSTEAD = (
    ". An AutoGuide draws a Delta of an auxiliary site, whose density is not the number's: write "
    'what it stands for, such as lp.sample("x", dist.Normal(pyro.param("mean"), '
    'pyro.param("spread")))'
)


def check_run(guide: str, program: Program, execution: Execution, told: set[str]) -> None:
    """Raises ValueError if a function is no guide; warns of names that no latent has.

    Args:
        guide: what the guide is called.
        program: the model.
        execution: a run of the guide.
        told: the names of which it has warned.
    """
    for site in execution.sites.values():
        if site.kind in ("observed", "factor"):
            what = "observes" if site.kind == "observed" else "has a factor at"
            raise ValueError(
                f"the guide {guide!r} {what} {site.name!r}; a guide draws latents, and "
                "what is known of them belongs in the model"
            )
        if site.kind != "latent":
            continue
        if not is_plain(site.scale, site.mask):
            raise ValueError(
                f"the guide {guide!r} draws {site.name!r} under Pyro's scale or mask, and "
                "it proposes by its own law whatever they are; leave them out"
            )
        if site.name not in program.latents and site.name not in told:
            hint = did_you_mean(site.name, program.latents)
            if program.is_static or (hint and not _is_of_loop(site.name, program)):
                told.add(site.name)
                warn(
                    f"the guide {guide!r} draws {site.name!r}, which is no latent of the "
                    f"model ({', '.join(program.latents)}){hint}",
                    InferenceWarning,
                )


def _is_of_loop(name: str, program: Program) -> bool:
    """Whether it is a latent's name but for numbers: a loop may meet more than compiling did."""
    return pattern(name) in map(pattern, program.latents)


def _is_point(fn: Any) -> bool:
    while fn is not None:
        if isinstance(fn, Delta):
            return True
        fn = getattr(fn, "base_dist", None)
    return False


def _is_discrete(fn: Any) -> bool | None:
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):  # a distribution that does not say
        return None
