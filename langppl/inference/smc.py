"""Sequential Monte Carlo: particles that are resampled while their strings grow, and between sites.

Each particle carries w = target / q of where it stands. When their effective number falls below a
share of their number, they are chosen anew by weight and all carry the mean on. The mean weight at
the end estimates the evidence without bias, under every proposal, twist and scheme: what is counted
when (see `langppl.inference.twists`) changes the intermediate targets, and these cancel.

References:
    Del Moral, Doucet, Jasra 2006, *Sequential Monte Carlo samplers*.
    Lew et al. 2023, *Sequential Monte Carlo steering of LLMs* (arXiv 2306.03081).
    Zhao et al. 2024, *Probabilistic inference in language models via twisted SMC*
    (arXiv 2404.17546).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from langppl import diagnostics
from langppl.defaults import ESS_THRESHOLD, EVERY, REJECTIONS, TAIL_SHARE
from langppl.guides.base import Guide
from langppl.guides.function import FunctionGuide
from langppl.inference.failures import failures
from langppl.inference.particles import Crowd
from langppl.inference.potentials import Passed, killing_notes
from langppl.inference.rejuvenation import rejuvenate
from langppl.inference.resampling import resample, resample_conditionally
from langppl.inference.screening import Screen
from langppl.inference.settings import check_values
from langppl.inference.sites import kept_of
from langppl.inference.twists import UserTwist, make_twist
from langppl.lm.kept import keeping
from langppl.lm.seeds import generator
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.progress import bar


def smc(
    program: Program,
    guide: Guide,
    num_samples: int,
    seed: int,
    progress: bool,
    *,
    twist: str | UserTwist | None = None,
    twist_power: float | None = None,
    resampling: str = "systematic",
    ess_threshold: float = ESS_THRESHOLD,
    every: int = EVERY,
    rejections: int = REJECTIONS,
    rejuvenation: int = 0,
    tail_share: float = TAIL_SHARE,
) -> Posterior:
    """Runs particles through a program, resampling them on the way.

    Args:
        program: the program.
        guide: proposes the latents.
        num_samples: how many particles.
        seed: equal seeds give equal results.
        progress: whether to show a bar.
        twist: how promising an unfinished string is: None for the model over the proposal alone,
            `"lookahead"`, `"flow"`, or a function of site and text so far to log ψ (nats).
        twist_power: of `"lookahead"`, from 0 to 1: how much it tells unfinished strings apart.
        resampling: `"multinomial"`, `"stratified"`, `"systematic"` or `"residual"`.
        ess_threshold: particles are resampled when their effective number is below this share of
            their number; 0 for never, 1 for whenever their weights differ.
        every: tokens of a string between two looks at the weights.
        rejections: at each place of a string, most tokens that are drawn anew because the `prefix`
            of a potential is −inf after them; see `langppl.inference.screening`.
        rejuvenation: Metropolis–Hastings moves of each particle after each latent; see
            `langppl.inference.rejuvenation`.
        tail_share: of these, see `langppl.inference.kernels.move`.

    Returns:
        The weighted particles, with their ancestors.

    Raises:
        ValueError: for an unknown scheme or twist, or numbers out of range.
    """
    started = time.monotonic()
    crowd = Crowd(program, guide, num_samples, seed)
    course = run_crowd(
        crowd,
        progress,
        twist=twist,
        twist_power=twist_power,
        resampling=resampling,
        ess_threshold=ess_threshold,
        every=every,
        rejections=rejections,
        rejuvenation=rejuvenation,
        tail_share=tail_share,
    )
    executions = [p.execution for p in crowd.particles]
    failed, notes = failures(program, executions)
    return Posterior(
        log_weights=[p.log_weight for p in crowd.particles],
        method="smc",
        # A particle that has moved was not drawn by its guide; of one that was screened, what it
        # was drawn with is estimated.
        log_q=None if rejuvenation or course.is_screened else [e.log_q for e in executions],
        elapsed=time.monotonic() - started,
        failed_sites=failed,
        notes=(*notes, *killing_notes(crowd.particles), *course.passed.notes, *guide.remarks),
        ancestors=[p.ancestor for p in crowd.particles],
        resampled=course.resampled,
        moves=(course.moves, course.accepted),
        **kept_of(program, guide, executions),
    )


@dataclass
class Course:
    """What happened to particles on their way.

    Attributes:
        resampled: how often they were resampled.
        moves: Metropolis–Hastings moves of all of them.
        accepted: of these.
        passed: how often potentials without `prefix` were −inf.
        is_screened: whether tokens were drawn that might have been rejected.
    """

    resampled: int = 0
    moves: int = 0
    accepted: int = 0
    passed: Passed = field(default_factory=Passed)
    is_screened: bool = False


def run_crowd(
    crowd: Crowd,
    progress: bool = False,
    *,
    twist: str | UserTwist | None = None,
    twist_power: float | None = None,
    resampling: str = "systematic",
    ess_threshold: float = ESS_THRESHOLD,
    every: int = EVERY,
    rejections: int = REJECTIONS,
    rejuvenation: int = 0,
    tail_share: float = TAIL_SHARE,
) -> Course:
    """Leads particles through their program; see `smc`."""
    program, seed = crowd.program, crowd.seed
    check_values(
        resampling=resampling,
        ess_threshold=ess_threshold,
        every=every,
        rejections=rejections,
        rejuvenation=rejuvenation,
        tail_share=tail_share,
    )
    if rejuvenation and crowd.held is not None:
        raise ValueError(
            "rejuvenation moves particles away from the latents that one of them must keep to; "
            "leave it out"
        )
    if isinstance(crowd.guide, FunctionGuide):
        raise ValueError(
            f"the guide {crowd.guide.name!r} is a function, which draws whole strings; "
            'method="smc" lets them grow token by token: use method="importance" or "mh", or for '
            '"smc" "prior", "prompted", a MaskedGuide or a GFlowNetGuide'
        )
    if not crowd.guide.is_sequential:
        raise ValueError(
            f"the guide {crowd.guide.name!r} ({type(crowd.guide).__name__}) draws a string from "
            'one of several laws; method="smc" follows one, token by token: give a guide of the '
            'mixture alone, a GFlowNetGuide with defensive=0, or use method="importance" or "mh"'
        )
    crowd.guide.check(program)
    twisted = make_twist(twist, program, crowd.guide, twist_power)
    course = Course()
    screen = Screen(crowd, rejections)

    def look(*key: int | str) -> None:
        rng = generator((seed, "smc", "resample", *key))
        course.resampled += resample_crowd(crowd, resampling, ess_threshold, rng)

    def move_all(decided: int | None) -> None:
        if rejuvenation and decided != 0:
            tried, accepted = rejuvenate(crowd, decided, rejuvenation, tail_share)
            course.moves += tried
            course.accepted += accepted
            twisted.weigh_at_rest(crowd)

    with keeping(), bar("sequential Monte Carlo", len(program.latents), progress) as advance:
        crowd.begin()
        twisted.weigh_at_rest(crowd)
        stage = 0
        while any(not (p.is_over or p.is_dead) for p in crowd.particles):
            look(stage, "site")
            move_all(stage)
            crowd.decide(stage)
            turns = every if twisted.needs_turns(crowd) else None
            turn = 0
            while crowd.is_growing:
                screen.grow(stage, turn, turns)
                turn += 1
                if crowd.is_growing and twisted.weigh(crowd):
                    look(stage, turn)
            before = {
                id(p): set(p.execution.sites) for p in crowd.particles if p.growing is not None
            }
            crowd.finish()
            course.passed.count(crowd, before)
            twisted.weigh_at_rest(crowd)
            stage += 1
            advance(1)
        move_all(None)
    course.is_screened = screen.is_active
    return course


def resample_crowd(crowd: Crowd, scheme: str, threshold: float, rng: np.random.Generator) -> bool:
    """Chooses particles anew if their effective number is below a share of their number.

    Args:
        crowd: the particles, weighed.
        scheme: how.
        threshold: the share.
        rng: random numbers.

    Returns:
        Whether it did.
    """
    log_weights = np.array([p.log_weight for p in crowd.particles])
    if not (log_weights > -np.inf).any():
        return False
    ess = diagnostics.effective_sample_size(log_weights)
    if ess >= threshold * crowd.count * (1.0 - 1e-9):
        return False
    weights = diagnostics.normalized_weights(log_weights)
    mean = diagnostics.log_evidence(log_weights)[0]
    if crowd.held is None:
        ancestors = resample(weights, scheme, rng)
    else:
        ancestors, crowd.held.at = resample_conditionally(weights, scheme, crowd.held.at, rng)
    chosen = [crowd.particles[k] for k in ancestors]
    # Each carries the mean weight on, less the ratio that it is weighed by from here.
    crowd.particles = [p.copy(mean - p.ratio) for p in chosen]
    return True
