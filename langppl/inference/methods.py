"""`infer`: the posterior of a program's latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from langppl.defaults import CHAINS, ESS_THRESHOLD, EVERY, NUM_SAMPLES, REJECTIONS, TAIL_SHARE
from langppl.distributions import StringDistribution
from langppl.guides import GFlowNetGuide, Guide, PriorGuide, PromptedGuide
from langppl.guides.function import GuideLike, as_guide
from langppl.inference.exact import exact
from langppl.inference.importance import importance
from langppl.inference.mh import mh
from langppl.inference.resampling import Scheme
from langppl.inference.settings import METHODS, OPTIONS, Method, check_values, names_of
from langppl.inference.smc import smc
from langppl.inference.twists import TwistLike
from langppl.keywords import did_you_mean
from langppl.lm.counts import as_count
from langppl.lm.requests import alone
from langppl.lm.seeds import as_seed
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.program.program import as_program

GUIDES = ("prior", "prompted", "gflownet")
_NOT_FIT = ("self", "model", "data")
"""Arguments of `GFlowNetGuide.fit` that whoever trains it here gives."""
EXACT_LIMIT = 100_000


def infer(
    model: Callable[..., Any] | Program,
    *args: Any,
    guide: GuideLike = "prior",
    method: Method = "importance",
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    progress: bool = True,
    limit: int = EXACT_LIMIT,
    twist: TwistLike = None,
    twist_power: float | None = None,
    resampling: Scheme = "systematic",
    ess_threshold: float = ESS_THRESHOLD,
    every: int = EVERY,
    rejections: int = REJECTIONS,
    rejuvenation: int = 0,
    chains: int = CHAINS,
    warmup: int | None = None,
    thin: int = 1,
    tail_share: float = TAIL_SHARE,
    fit: Mapping[str, Any] | None = None,
    **named: Any,
) -> Posterior:
    """The posterior over a program's latents, given its observations.

    Args:
        model: a model function, or a compiled `Program` (then without `args`).
        *args: the model's arguments.
        guide: what proposes the latents: `"prior"` (the model itself), `"prompted"` (the LM shown
            the observations), `"gflownet"` (that, trained on these very observations first; it is
            `.guide_object` of the posterior), a guide object, or a function that is written as
            a guide of Pyro's (see `langppl.guides.FunctionGuide`).
        fit: for `guide="gflownet"`, arguments of `GFlowNetGuide.fit`, such as `{"steps": 200}`.
        method: `"importance"`; `"smc"`, whose particles are resampled on the way; `"exact"`, which
            lists all latents and takes no guide; or `"mh"`, Metropolis–Hastings: Markov chains
            that move one latent at a time, with the guide as proposal. Its samples are equally
            weighted, it does not estimate the evidence, and `.chains` says how far to believe it
            (see `langppl.inference.kernels`).
        num_samples: how many samples to draw and weight; for `"mh"`, of all chains together,
            rounded up so that all have as many.
        seed: equal seeds give equal results.
        progress: whether to report progress: bars on a terminal or in a notebook, else in the log.
        limit: for `method="exact"`, most executions to list.
        chains: for `method="mh"`, how many chains; they move together, so the LM sees batches of
            this size.
        warmup: for `method="mh"`, steps of each chain to leave out first; None for as many as are
            sampled.
        thin: for `method="mh"`, steps from one sample to the next.
        tail_share: for `method="mh"` and for rejuvenation, the share of the moves of an `LMString`
            that keep its beginning and redraw the rest; the others redraw it whole.
        twist: for `method="smc"`, how promising an unfinished string is: None for the model over
            the guide alone, `"lookahead"` (the observations as if it ended there), `"flow"` (a
            GFlowNet guide's own flow; for several latents one that it has learned by `subtb` or
            `db`), or a function of the site's name and the text so far to nats. It changes the
            variance, never the answer.
        twist_power: for `twist="lookahead"`, from 0 to 1: the power of it by which unfinished
            strings are told apart, 0.4 if None. What it says of a string that has hardly begun is
            mostly noise.
        resampling: for `method="smc"`, `"multinomial"`, `"stratified"`, `"systematic"` or
            `"residual"`.
        ess_threshold: for `method="smc"`, the share of the particles below which their effective
            number has them resampled.
        every: for `method="smc"`, tokens of a string between two looks at the weights.
        rejections: for `method="smc"`, at each place of a string, most tokens that are drawn anew
            because the `prefix` of a potential is −inf after them, with the weight that is due
            (see `langppl.inference.screening`); 0 for none, whose particles are then dead.
        rejuvenation: for `method="smc"`, Metropolis–Hastings moves of each particle after each
            latent, which make copies different again; 0 for none.
        **named: the model's arguments by their names. One that is called as an argument above
            (`seed`, `limit`, `every`, `chains`, `fit`, `method`, ...) must be given by place.

    Returns:
        The posterior. If no sample explains the observations, its evidence is −inf, with a
        warning that says which site failed.

    Raises:
        ValueError: for an unknown guide or method, an argument of another method, fewer than one
            sample, an option out of range, or a model without sites; for `method="mh"`, if no
            possible execution is found to begin at.
        TypeError: for a guide or a twist that is none, a seed that is no integer, or arguments
            that do not fit the model.

    Example:
        >>> posterior = infer(story, "The cat was hungry.", " Now it sleeps.", num_samples=32)
        >>> middles = posterior.probabilities("middle")
    """
    check_names(method, guide)
    guide = as_guide(guide)
    num_samples = as_count("num_samples", num_samples, 1)
    seed = as_seed(seed)
    options: dict[str, Any] = {
        "limit": limit,
        "twist": twist,
        "twist_power": twist_power,
        "resampling": resampling,
        "ess_threshold": ess_threshold,
        "every": every,
        "rejections": rejections,
        "rejuvenation": rejuvenation,
        "chains": chains,
        "warmup": warmup,
        "thin": thin,
        "tail_share": tail_share,
    }
    _check_belong(method, {"guide": guide, **options})
    options = check_values(**options)
    check_fit(fit, [guide])
    # Whole, since beside a training each turn in between would wait for a step.
    program = alone(as_program)(model, args, seed, named, names_of(infer))
    if method == "exact":
        return alone(exact)(program, limit, progress)
    # Not alone, as a training lets others in between its steps.
    made = make_guide(guide, program, seed, progress, fit)
    own: dict[str, Any] = {name: options[name] for name in OPTIONS[method]}
    return _weighted(method, program, made, num_samples, seed, progress, own)


@alone
def _weighted(
    method: str,
    program: Program,
    made: Guide,
    num_samples: int,
    seed: int,
    progress: bool,
    own: Mapping[str, Any],
) -> Posterior:
    if method == "smc":
        return smc(program, made, num_samples, seed, progress, **own)
    if method == "mh":
        return mh(program, made, num_samples, seed, progress, **own)
    return importance(program, made, num_samples, seed, progress)


def check_fit(fit: Mapping[str, Any] | None, guides: Collection[Any]) -> None:
    """Raises ValueError or TypeError unless one of the guides can be trained as `fit` says."""
    if fit is None:
        return
    if not any(isinstance(guide, str) and guide == "gflownet" for guide in guides):
        shown = " and ".join(map(repr, guides))
        raise ValueError(f'fit is of guide="gflownet", and the guide is {shown}')
    known = [n for n in inspect.signature(GFlowNetGuide.fit).parameters if n not in _NOT_FIT]
    for name in fit:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise TypeError(f"fit has {name!r}, which is no argument of GFlowNetGuide.fit{hint}")


def check_names(method: Any, guide: Any) -> None:
    """Raises ValueError or TypeError unless there is such a method, and such a guide."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; methods are: {', '.join(METHODS)}")
    if isinstance(guide, str) and guide not in GUIDES:
        raise ValueError(f"unknown guide {guide!r}; guides are: {', '.join(GUIDES)}, or an object")
    as_guide(guide)


def _check_belong(method: str, given: Mapping[str, Any]) -> None:
    """Raises ValueError if an argument that is not at its default is of other methods alone."""
    for name, value in given.items():
        owners = [m for m, own in OPTIONS.items() if name in own]
        if name == "guide":
            owners = [m for m in METHODS if m != "exact"]
        default = inspect.signature(infer).parameters[name].default
        if method not in owners and value is not default and value != default:
            raise ValueError(
                f"method {method!r} takes no {name}, got {value!r}; {name} is of "
                f"{' and '.join(f'method={m!r}' for m in owners)}"
            )


def given_guide(guide: GuideLike) -> Guide:
    """A guide for many observations: one that needs no training, or is trained already."""
    guide = as_guide(guide)
    if isinstance(guide, Guide):
        return guide
    if guide == "prior":
        return PriorGuide()
    if guide == "prompted":
        return PromptedGuide()
    if guide == "gflownet":
        raise ValueError(
            'guide="gflownet" is trained for one observation, and here are many; train a '
            "GFlowNetGuide on them and give it (on data that are simulated: "
            'fit(..., objective="forward_kl"), or simulated_share)'
        )
    raise ValueError(f"unknown guide {guide!r}; here it is: prior, prompted, or an object")


def make_guide(
    guide: str | Guide,
    program: Program,
    seed: int,
    progress: bool,
    fit: Mapping[str, Any] | None = None,
) -> Guide:
    """A guide by name, trained (as `fit` says) where it needs it; a guide object as it is."""
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
    trained.fit(program, **{"progress": progress, **(fit or {})})
    return trained
