"""Bounds of several guides together, against exact sums and enumeration."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from langppl import (
    GFlowNetGuide,
    LMString,
    compile,
    evidence_bounds,
    infer,
    pool_bounds,
    regex,
    sample,
)
from langppl.guides import (
    ContextInfo,
    Guide,
    MaskedGuide,
    MixtureGuide,
    PriorGuide,
    PromptedGuide,
)
from langppl.inference import EvidenceBounds
from langppl.inference.simulated import simulate_pairs
from langppl.lm import adapters
from langppl.testing import tiny_lm

LM = tiny_lm("abcd.", seed=1)
OBSERVATIONS = 60


def story(seen: str) -> None:
    z = sample("z", LMString(LM, "a", stop=".", max_tokens=2, allow=list("abcd.")))
    sample("seen", LMString(LM, z, temperature=0.6), obs=seen)


PROGRAM = compile(story, "ab")


@functools.cache
def trained() -> Guide:
    guide = GFlowNetGuide(LM, rank=16, objective="forward_kl", seed=0)
    return guide.fit(PROGRAM, steps=15, batch=48, learning_rate=8e-3, progress=False)


@functools.cache
def several(method: str = "importance") -> list[EvidenceBounds]:
    # Few particles, so that pooling has something to mend; another number for each guide.
    return [
        evidence_bounds(
            PROGRAM,
            guide=guide,
            method=method,
            num_samples=count,
            num_observations=OBSERVATIONS,
            progress=False,
        )
        for guide, count in ((PriorGuide(), 2), (PromptedGuide(), 3), (trained(), 6))
    ]


def enumerated(weights: Sequence[Sequence[float]], counts: Sequence[int]) -> tuple[float, float]:
    """Expected pooled bounds, less log Z, of guides over a few values, by all that can be drawn.

    Guide g draws value v with probability q_g(v) and weighs it `weights[g][v]`, so that the joint
    p(v, x) = q_g(v) `weights[g][v]` is the same for all.
    """
    joint = np.array([0.1, 0.25, 0.05])
    qs = [joint / np.array(w) for w in weights]
    assert all(q.sum() == pytest.approx(1.0) for q in qs)
    z = joint.sum()
    values, slots = range(len(joint)), [g for g, c in enumerate(counts) for _ in range(c)]
    low = high = 0.0
    for drawn in itertools.product(values, repeat=len(slots)):
        share = math.prod(float(qs[g][v]) for g, v in zip(slots, drawn, strict=True))
        for exact in values:
            columns = []
            for g in range(len(counts)):
                own = [weights[g][v] for h, v in zip(slots, drawn, strict=True) if h == g]
                with_exact = [weights[g][exact], *own[1:]]
                columns.append((math.log(np.mean(own)), math.log(np.mean(with_exact))))
            made = [made_bounds(lo, up, n) for (lo, up), n in zip(columns, counts, strict=True)]
            found = pool_bounds(made)[0]
            chance = share * float(joint[exact]) / z
            low += chance * found.lower
            high += chance * found.upper
    return low - math.log(z), high - math.log(z)


def made_bounds(lower: float, upper: float, count: int) -> EvidenceBounds:
    """Bounds of one observation."""
    rows = {"lower": lower, "upper": upper, "elbo": -3.0, "eubo": -1.0, "log_joint": -2.0}
    return EvidenceBounds(
        guide="made",
        method="importance",
        num_observations=1,
        num_samples=count,
        lower=lower,
        upper=upper,
        gap=upper - lower,
        kl_q_p=(0.0, 0.0),
        kl_p_q=(0.0, 0.0),
        lower_error=0.0,
        upper_error=0.0,
        gap_error=0.0,
        kl_q_p_error=(0.0, 0.0),
        kl_p_q_error=(0.0, 0.0),
        impossible=0.0,
        missed=0.0,
        observations={name: (value,) for name, value in rows.items()},
    )


def test_expected_bounds_are_those_of_the_extended_densities() -> None:
    joint = np.array([0.1, 0.25, 0.05])
    qs = np.array([[0.2, 0.5, 0.3], [0.6, 0.2, 0.2]])
    counts = (1, 2)
    low, high = enumerated((joint / qs).tolist(), counts)
    assert low < 0.0 < high
    # The same from the densities of all particles: E_q[log Ẑ/Z], and KL of q Ẑ/Z from q.
    z, of = joint.sum(), [0, 1, 1]
    expected_low = expected_high = 0.0
    for drawn in itertools.product(range(3), repeat=3):
        q = math.prod(float(qs[g][v]) for g, v in zip(of, drawn, strict=True))
        ratio = np.mean([joint[v] / qs[g][v] for g, v in zip(of, drawn, strict=True)]) / z
        expected_low += q * math.log(ratio)
        expected_high += q * ratio * math.log(ratio)
    assert low == pytest.approx(expected_low, abs=1e-12)
    assert high == pytest.approx(expected_high, abs=1e-12)


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_the_exact_evidence_lies_between_and_the_bounds_are_sharper(method: str) -> None:
    own = several(method)
    pooled = pool_bounds(own)
    pairs = simulate_pairs(PROGRAM, OBSERVATIONS, (0, "bounds"))
    exact = np.array([infer(p, method="exact", progress=False).log_evidence for _, p in pairs])
    lower, upper = (np.array(pooled[0].observations[k]) for k in ("lower", "upper"))
    for difference in (exact - lower, upper - exact):
        # Each holds in expectation: one-sided, at 3 standard errors of the paired difference.
        assert difference.mean() >= -3.0 * difference.std(ddof=1) / math.sqrt(OBSERVATIONS)
    # The halves may choose differently: no wider than the best guide's, at 3 standard errors.
    best = min(own, key=lambda b: b.gap)
    of_best = np.array(best.observations["upper"]) - np.array(best.observations["lower"])
    wider = upper - lower - of_best
    assert wider.mean() <= 3.0 * wider.std(ddof=1) / math.sqrt(OBSERVATIONS)
    assert pooled[0].gap < 0.5 * max(b.gap for b in own)
    assert len({(p.lower, p.upper) for p in pooled}) == 1
    for before, after in zip(own, pooled, strict=True):
        elbo, eubo = (np.array(before.observations[k]).mean() for k in ("elbo", "eubo"))
        assert after.kl_q_p == pytest.approx((after.lower - elbo, after.upper - elbo))
        assert after.kl_p_q == pytest.approx((eubo - after.upper, eubo - after.lower))
        assert (after.guide, after.num_samples) == (before.guide, before.num_samples)


def test_one_guide_alone_keeps_its_bounds() -> None:
    (own,) = several()[:1]
    (pooled,) = pool_bounds([own])
    assert (pooled.lower, pooled.upper) == pytest.approx((own.lower, own.upper))
    assert pooled.kl_q_p == pytest.approx(own.kl_q_p)


def test_the_choice_for_an_observation_does_not_depend_on_it() -> None:
    """Six guides whose lower bounds are noise: choosing by that noise would lift their mean."""
    rng = np.random.default_rng(0)
    means = []
    for _ in range(200):
        made = []
        for _ in range(6):
            lower = 0.1 * rng.normal(size=8)
            rows = {"lower": lower, "upper": lower + 9.0, "elbo": lower - 1.0, "eubo": lower + 9.0}
            table = {k: tuple(map(float, v)) for k, v in rows.items()}
            table["log_joint"] = (-2.0,) * 8
            made.append(replace(made_bounds(0.0, 9.0, 1), num_observations=8, observations=table))
        means.append(pool_bounds(made)[0].lower)
    # The log of the mean of several is 0.005 above the mean of a log; a choice by the same noise
    # would come to 0.06, the largest of six means of four.
    error = 0.1 / math.sqrt(8 * len(means))
    assert np.mean(means) < 0.1**2 / 2 + 3 * error


def test_a_guide_that_misses_the_exact_sample_is_not_chosen() -> None:
    table = {"lower": (-2.0, -2.5), "upper": (-1.0, -1.5), "elbo": (-3.0,) * 2, "eubo": (-1.0,) * 2}
    table["log_joint"] = (-2.0, -2.0)
    good = replace(made_bounds(0.0, 0.0, 4), observations=table)
    bad = replace(
        good,
        observations={
            **table,
            "lower": (-math.inf,) * 2,
            "upper": (math.inf,) * 2,
            "eubo": (math.inf,) * 2,
        },
    )
    first, second = pool_bounds([good, bad])
    assert (first.lower, first.upper) == pytest.approx((-2.25, -1.25))
    assert first.kl_p_q == pytest.approx((0.25, 1.25))
    assert second.kl_p_q == (math.inf, math.inf)


def test_bounds_that_cannot_be_pooled() -> None:
    own = several()
    with pytest.raises(ValueError, match="at least one guide"):
        pool_bounds([])
    with pytest.raises(ValueError, match="of method 'annealed'"):
        pool_bounds([replace(own[0], method="annealed")])
    other = evidence_bounds(
        PROGRAM, num_samples=2, num_observations=OBSERVATIONS, seed=1, progress=False
    )
    with pytest.raises(ValueError, match="guides 'prior' and 'prior' are of other observations"):
        pool_bounds([own[0], other])
    fewer = evidence_bounds(PROGRAM, num_samples=2, num_observations=3, progress=False)
    with pytest.raises(ValueError, match="other observations"):
        pool_bounds([own[0], fewer])


def test_log_joints_that_are_large_are_not_therefore_alike() -> None:
    one, other = made_bounds(-3.0, -1.0, 2), made_bounds(-2.9, -1.1, 3)
    rounded, another = (
        replace(other, observations={**other.observations, "log_joint": (value,)})
        for value in (-100.001, -99.5)
    )
    one = replace(one, observations={**one.observations, "log_joint": (-100.0,)})
    assert len(pool_bounds([one, rounded])) == 2
    with pytest.raises(ValueError, match="are of other observations"):
        pool_bounds([one, another])


# -- independent draws ----------------------------------------------------------------------------


def other_context(info: ContextInfo) -> str:
    return info.args[0] + str(info.prompt)


def shown(info: ContextInfo, mark: str) -> str:
    return f"{mark}{info.prompt}"


def quick(guide: str | Guide = "prior", **options: Any) -> EvidenceBounds:
    given = {"num_samples": 2, "num_observations": 200, "progress": False, **options}
    return evidence_bounds(PROGRAM, guide=guide, **given)


@functools.cache
def observed() -> tuple[list[str], np.ndarray]:
    """What `quick` observes, and its exact log evidence."""
    known: dict[str, float | None] = {}
    seen = []
    for _, p in simulate_pairs(PROGRAM, 200, (0, "bounds")):
        seen.append(str(p.sites["seen"].value))
        if seen[-1] not in known:
            known[seen[-1]] = infer(p, method="exact", progress=False).log_evidence
    return seen, np.array([known[s] for s in seen])


def noise(bounds: EvidenceBounds) -> np.ndarray:
    """Lower bounds, standardised among those of the same data, which all guides have in common."""
    lower, seen = np.array(bounds.observations["lower"]), np.array(observed()[0])
    found = []
    for value in sorted(set(seen)):
        own = lower[seen == value]
        # All of a small group, or one without spread, is told by the data.
        if len(own) >= 5 and own.std() > 1e-3:
            found += ((own - own.mean()) / own.std()).tolist()
    return np.array(found)


def untrained(**options: Any) -> GFlowNetGuide:
    return GFlowNetGuide(LM, rank=2, seed=0, **options)


def defensive() -> GFlowNetGuide:
    return untrained(defensive=0.01)


def renamed() -> Guide:
    guide = PriorGuide()
    guide.name = "the prior once more"
    return guide


MASKS = [regex("[a-d]*[.]?"), regex("[a-d.]*")]
DIFFERENT: dict[str, list[Callable[[], EvidenceBounds]]] = {
    "shares": [
        functools.partial(quick, MixtureGuide(["prior", "prior"], [s, 1 - s]))
        for s in (0.5, 0.55, 0.6)
    ],
    "parts": [
        lambda: quick(MixtureGuide(["prior", untrained()])),
        lambda: quick(MixtureGuide(["prior", untrained(context=other_context)])),
    ],
    "contexts": [
        lambda: quick("prompted"),
        lambda: quick(PromptedGuide(functools.partial(shown, mark="b"))),
        lambda: quick(PromptedGuide(functools.partial(shown, mark="ab"))),
    ],
    "adapters under another context": [
        lambda: quick(untrained()),
        lambda: quick(untrained(context=other_context)),
    ],
    "a defensive share": [lambda: quick(untrained()), lambda: quick(defensive())],
    "grammars": [functools.partial(quick, MaskedGuide({"z": mask})) for mask in MASKS],
    "names": [lambda: quick("prior"), lambda: quick(renamed())],
    "smc": [
        functools.partial(quick, method="smc", **options)
        for options in ({}, {"ess_threshold": 0.6}, {"resampling": "residual"})
    ],
    "methods": [lambda: quick("prior"), lambda: quick("prior", method="smc")],
}


@pytest.mark.filterwarnings("ignore:MaskedGuide keeps site 'z'")
@pytest.mark.parametrize("by", DIFFERENT)
def test_what_is_told_apart_draws_other_numbers(by: str) -> None:
    found = [make() for make in DIFFERENT[by]]
    for one, other in itertools.combinations(map(noise, found), 2):
        assert len(one) == len(other) > 100
        # Of independent ones the correlation is within 4 of its standard errors.
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.0 / math.sqrt(len(one))
    assert len({s for b in found for s in b.streams}) == len(found)
    pooled = pool_bounds(found)
    above = np.array(pooled[0].observations["upper"]) - observed()[1]
    assert above.mean() >= -3.0 * above.std(ddof=1) / math.sqrt(len(above))


class Own(PriorGuide):
    def __init__(self, setting: int) -> None:
        self.setting = setting


def test_draws_that_are_not_independent_are_not_pooled() -> None:
    few: dict[str, Any] = {"num_observations": 4}
    again = quick("prior", num_samples=3, **few)
    for one, other in (
        (quick("prior", **few), again),
        (quick("prior", method="smc", **few), quick("prior", method="smc", num_samples=3, **few)),
        (quick(Own(1), **few), quick(Own(2), **few)),
        # Nothing but rounding tells them apart.
        (
            again,
            replace(
                again,
                observations={
                    **again.observations,
                    "lower": tuple(v + 1e-7 for v in again.observations["lower"]),
                },
            ),
        ),
        tuple(pool_bounds([again, quick("prompted", **few)])),
    ):
        with pytest.raises(ValueError, match="of the same draws, or of some that begin alike"):
            pool_bounds([one, other])
    # Another prior's draws are others.
    pool_bounds([quick("prior", **few), quick(Own(1), **few)])


def test_plain_guides_draw_what_they_always_drew() -> None:
    """The names of their random numbers stay, and so do the figures that were recorded."""
    guide = untrained()
    weights = adapters.digest(LM.model, guide.adapter).hex()
    few: dict[str, Any] = {"num_observations": 2}
    assert quick("prior", **few).streams == ("importance, guide prior",)
    assert quick("prompted", **few).streams == ("importance, guide prompted",)
    assert quick(guide, **few).streams == (f"importance, guide gflownet {weights}",)
    assert quick("prior", method="smc", every=5, **few).streams == ("smc, guide prior",)
    named = quick("prior", method="smc", twist=promising, **few).streams
    assert named == ("smc, guide prior, twist test_pooled.promising []",)


def promising(site: str, text: str) -> float:
    return 0.1 * len(text)


def test_the_name_of_random_numbers_is_the_same_in_every_process() -> None:
    class Shown(PriorGuide):
        def __repr__(self) -> str:
            return f"Shown({object()})"

    (one,), (other,) = (quick(Shown(), num_observations=2).streams for _ in range(2))
    assert one == other
    long = MixtureGuide(["prior"] * 9)
    (stream,) = quick(long, num_observations=2).streams
    assert len(stream) < 160


def test_a_head_that_proposes_numbers_is_part_of_a_guide() -> None:
    first, second, third = untrained(), untrained(), untrained()
    for guide in (first, second):
        guide.heads.ensure("normal-1", 2)
    third.heads.ensure("flow", 1)
    assert first.identity() == second.identity() != untrained().identity() == third.identity()
    with torch.no_grad():
        second.heads.centre += 0.5
    assert first.identity() != second.identity()
