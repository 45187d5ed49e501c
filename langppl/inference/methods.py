"""`infer`: the posterior of a program's latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from langppl.distributions import StringDistribution
from langppl.guides import GFlowNetGuide, Guide, PriorGuide, PromptedGuide
from langppl.inference.exact import exact
from langppl.inference.importance import importance
from langppl.posterior import Posterior
from langppl.program import Program, compile

GUIDES = ("prior", "prompted", "gflownet")
METHODS = ("importance", "exact")
EXACT_LIMIT = 100_000


def infer(
    model: Callable[..., Any] | Program,
    *args: Any,
    guide: str | Guide = "prior",
    method: str = "importance",
    num_samples: int = 256,
    seed: int = 0,
    progress: bool = True,
    limit: int = EXACT_LIMIT,
) -> Posterior:
    """The posterior over a program's latents, given its observations.

    Args:
        model: a model function, or a compiled `Program` (then without `args`).
        *args: the model's arguments.
        guide: what proposes the latents: `"prior"` (the model itself), `"prompted"` (the LM shown
            the observations), `"gflownet"` (that, trained on these very observations first), or a
            guide object.
        method: `"importance"`, or `"exact"`, which lists all latents and takes no guide.
        num_samples: how many samples to draw and weight.
        seed: equal seeds give equal results.
        progress: whether to show progress bars on a terminal.
        limit: for `method="exact"`, most executions to list.

    Returns:
        The posterior. If no sample explains the observations, its evidence is −inf, with a
        warning that says which site failed.

    Raises:
        ValueError: for an unknown guide or method, fewer than one sample, or a model without
            sites.

    Example:
        >>> infer(story, "The cat was hungry.", " Now it sleeps.")  # doctest: +SKIP
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; methods are: {', '.join(METHODS)}")
    if isinstance(guide, str) and guide not in GUIDES:
        raise ValueError(f"unknown guide {guide!r}; guides are: {', '.join(GUIDES)}, or an object")
    if not isinstance(guide, str | Guide):
        raise TypeError(f"a guide is a name or a Guide, got {guide!r}")
    check_count("num_samples", num_samples, 1)
    program = as_program(model, args, seed)
    if method == "exact":
        return exact(program, limit, progress)
    return importance(
        program, make_guide(guide, program, seed, progress), num_samples, seed, progress
    )


def as_program(model: Callable[..., Any] | Program, args: tuple[Any, ...], seed: int) -> Program:
    """A model and its arguments as a program; a program as it is."""
    if not isinstance(model, Program):
        return compile(model, *args, seed=seed)
    if args:
        raise TypeError("a compiled Program has its arguments already; give none")
    return model


def check_count(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless a number is an integer of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def given_guide(guide: str | Guide) -> Guide:
    """A guide for many observations: one that needs no training, or is trained already."""
    if isinstance(guide, Guide):
        return guide
    if guide == "prior":
        return PriorGuide()
    if guide == "prompted":
        return PromptedGuide()
    if guide == "gflownet":
        raise ValueError(
            'guide="gflownet" is trained for one observation, and here many are simulated; train '
            'a GFlowNetGuide on the model\'s own data (fit(..., objective="forward_kl"), or '
            "simulated_share) and give it"
        )
    if not isinstance(guide, str):
        raise TypeError(f"a guide is a name or a Guide, got {guide!r}")
    raise ValueError(f"unknown guide {guide!r}; here it is: prior, prompted, or an object")


def make_guide(guide: str | Guide, program: Program, seed: int, progress: bool) -> Guide:
    """A guide by name, trained where it needs training; a guide object as it is."""
    if isinstance(guide, Guide):
        return guide
    if guide == "prior":
        return PriorGuide()
    if guide == "prompted":
        return PromptedGuide()
    latents = [program.sites[name] for name in program.latents]
    lm = next((s.fn.lm for s in latents if isinstance(s.fn, StringDistribution)), None)
    if lm is None:
        raise ValueError('guide="gflownet" needs a latent string; this program has none')
    trained = GFlowNetGuide(lm, seed=seed)
    trained.fit(program, progress=progress)
    return trained
