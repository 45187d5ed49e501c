"""Bounds of the evidence and of a guide's divergences, against enumeration and closed forms."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import langppl as lp
from langppl import GFlowNetGuide, LMChoice, LMString, compile, evidence_bounds, infer, sample
from langppl.guides import Guide, PriorGuide
from langppl.inference import EvidenceBounds
from langppl.inference.bounds import figures
from langppl.inference.simulated import simulate_pairs
from langppl.inference.sites import log_weight
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.program.execution import Choice, Chooser, score
from langppl.testing import tiny_lm

LM = tiny_lm("abcd.", seed=1)
OBSERVATIONS = 60


def story(first: str, second: str, truncate: Any = "keep") -> None:
    rules: dict[str, Any] = {"stop": ".", "max_tokens": 2, "allow": list("abcd.")}
    z = sample("z", LMString(LM, "a", truncate=truncate, **rules))
    sample("first", LMString(LM, z, temperature=0.6), obs=first)
    sample("second", LMString(LM, f"b{z}", temperature=0.6), obs=second)


PROGRAM = compile(story, "ab", "a")


@functools.cache
def trained() -> Guide:
    guide = GFlowNetGuide(LM, rank=16, objective="forward_kl", seed=0)
    return guide.fit(PROGRAM, steps=25, batch=48, learning_rate=8e-3, progress=False)


GUIDES = {"prior": PriorGuide, "prompted": lp.PromptedGuide, "gflownet": trained}


@functools.cache
def truths() -> list[tuple[Program, Posterior]]:
    """The observations of every test with seed 0, and what is exactly known of them."""
    pairs = simulate_pairs(PROGRAM, OBSERVATIONS, (0, "bounds"))
    return [(p, infer(p, method="exact", progress=False)) for _, p in pairs]


@functools.cache
def bounds(name: str) -> EvidenceBounds:
    return evidence_bounds(
        PROGRAM,
        guide=GUIDES[name](),
        num_samples=16,
        num_observations=OBSERVATIONS,
        progress=False,
    )


def z_score(differences: np.ndarray) -> float:
    return float(differences.mean() / (differences.std(ddof=1) / math.sqrt(len(differences))))


def test_the_observations_differ() -> None:
    evidences = [t.log_evidence for _, t in truths()]
    assert len({round(e, 6) for e in evidences}) > 10


@pytest.mark.parametrize("name", GUIDES)
def test_the_exact_evidence_lies_between(name: str) -> None:
    found = bounds(name)
    exact = np.array([t.log_evidence for _, t in truths()])
    lower, upper = (np.array(found.observations[k]) for k in ("lower", "upper"))
    # Each bound holds in expectation: one-sided, at 3 standard errors of the paired difference.
    assert z_score(exact - lower) >= -3.0
    assert z_score(upper - exact) >= -3.0
    assert found.lower < exact.mean() + 3 * found.lower_error
    assert found.upper > exact.mean() - 3 * found.upper_error
    assert found.gap == pytest.approx(found.upper - found.lower)
    assert 0.0 <= found.gap <= 1.0


@pytest.mark.parametrize("name", GUIDES)
def test_both_divergences_are_the_enumerated_ones(name: str) -> None:
    found, guide = bounds(name), GUIDES[name]()
    exact = np.array([t.log_evidence for _, t in truths()])
    q_p, p_q = [], []
    for program, truth in truths():
        log_q = guide.log_q(program, truth.samples)
        assert np.exp(log_q).sum() == pytest.approx(1.0, abs=1e-4)
        log_p = truth.log_weights - truth.log_evidence
        q_p.append(float((np.exp(log_q) * (log_q - log_p)).sum()))
        p_q.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
    for interval, errors, value in (
        (found.kl_q_p, found.kl_q_p_error, np.mean(q_p)),
        (found.kl_p_q, found.kl_p_q_error, np.mean(p_q)),
    ):
        assert interval[0] <= interval[1]
        assert interval[0] - 3 * errors[0] <= value <= interval[1] + 3 * errors[1]
    # With the exact evidence in the place of the bounds, they are unbiased.
    elbo, eubo = (np.array(found.observations[k]) for k in ("elbo", "eubo"))
    assert abs(z_score(exact - elbo - np.array(q_p))) <= 3.0
    assert abs(z_score(eubo - exact - np.array(p_q))) <= 3.0


def test_training_shows() -> None:
    prior, guide = bounds("prior"), bounds("gflownet")
    assert prior.kl_q_p[0] > 1.0
    assert guide.kl_q_p[1] < 0.5 * prior.kl_q_p[0]
    assert guide.kl_p_q[1] < prior.kl_p_q[0]
    assert guide.gap < prior.gap


def test_the_bounds_meet_with_many_particles() -> None:
    few = evidence_bounds(PROGRAM, num_samples=4, num_observations=6, progress=False)
    many = evidence_bounds(PROGRAM, num_samples=400, num_observations=6, progress=False)
    exact = np.array([t.log_evidence for _, t in truths()[:6]])
    assert many.gap < 0.05 < few.gap
    for name in ("lower", "upper"):
        assert np.abs(np.array(many.observations[name]) - exact).max() < 0.25
        assert np.mean(many.observations[name]) == pytest.approx(exact.mean(), abs=0.05)


def test_a_number_has_a_closed_form() -> None:
    def model() -> None:
        mean = sample("mean", dist.Normal(0.0, 1.0))
        sample("x", dist.Normal(mean, 0.5), obs=0.0)

    found = evidence_bounds(model, num_samples=16, num_observations=100, progress=False)
    xs = [p.sites["x"].value for _, p in simulate_pairs(compile(model), 100, (0, "bounds"))]
    evidence = dist.Normal(0.0, math.sqrt(1.25)).log_prob(torch.stack(xs)).numpy()
    assert z_score(evidence - np.array(found.observations["lower"])) >= -3.0
    assert z_score(np.array(found.observations["upper"]) - evidence) >= -3.0
    # The posterior is Normal(0.8 x, √0.2), and on average over x:
    q_p = np.log(math.sqrt(0.2)) + (1.0 + 0.64 * 1.25) / (2 * 0.2) - 0.5
    p_q = -np.log(math.sqrt(0.2)) + (0.2 + 0.64 * 1.25) / 2 - 0.5
    assert found.kl_q_p[0] - 3 * found.kl_q_p_error[0] <= q_p
    assert q_p <= found.kl_q_p[1] + 3 * found.kl_q_p_error[1]
    assert found.kl_p_q[0] - 3 * found.kl_p_q_error[0] <= p_q
    assert p_q <= found.kl_p_q[1] + 3 * found.kl_p_q_error[1]


class Narrow(PriorGuide):
    """Draws the first option only."""

    def chooser(self, program: Program, key: Any) -> Chooser:
        return lambda name, fn, execution: Choice(fn.text(0), 0.0)

    def given(self, program: Program, values: Mapping[str, Any]) -> Chooser:
        def choose(name: str, fn: Any, execution: Any) -> Choice:
            value = values[name]
            return Choice(value, 0.0 if value == fn.options[0] else -math.inf)

        return choose


def choice(seen: str) -> None:
    kind = sample("kind", LMChoice(LM, "a", ["a", "b", "c"]))
    sample("seen", LMString(LM, kind), obs=seen)


def test_a_guide_that_misses_exact_samples() -> None:
    found = evidence_bounds(
        choice, "a", guide=Narrow(), num_samples=4, num_observations=20, progress=False
    )
    assert 0.0 < found.missed < 1.0
    assert found.upper == math.inf and math.isfinite(found.lower)
    assert found.kl_p_q == (math.inf, math.inf)
    assert math.isfinite(found.kl_q_p[0]) and found.kl_q_p[1] == math.inf
    assert found.kl_p_q_error == (math.inf, math.inf)
    assert "cannot draw" in str(found) and "nan" not in str(found)


def test_a_guide_with_impossible_draws() -> None:
    found = evidence_bounds(
        story, "ab", "a", "reject", num_samples=8, num_observations=20, progress=False
    )
    assert 0.0 < found.impossible < 1.0
    assert found.kl_q_p == (math.inf, math.inf)
    assert math.isfinite(found.kl_p_q[0])
    assert "impossible" in str(found) and "nan" not in str(found)


@pytest.mark.parametrize("name", ["prior", "gflownet"])
@pytest.mark.parametrize(
    "options", [{}, {"twist": "lookahead", "every": 1, "resampling": "residual"}]
)
def test_smc_bounds_from_both_sides(name: str, options: dict[str, Any]) -> None:
    found = evidence_bounds(
        PROGRAM,
        guide=GUIDES[name](),
        method="smc",
        num_samples=8,
        num_observations=OBSERVATIONS,
        progress=False,
        **options,
    )
    assert found.method == "smc"
    exact = np.array([t.log_evidence for _, t in truths()])
    lower, upper = (np.array(found.observations[k]) for k in ("lower", "upper"))
    assert z_score(exact - lower) >= -3.0
    assert z_score(upper - exact) >= -3.0
    assert 0.0 <= found.gap <= 1.0
    # The inverse of the upper one is unbiased, and so is the lower one.
    assert abs(z_score(np.exp(exact - upper) - 1.0)) <= 3.5
    assert abs(z_score(np.exp(lower - exact) - 1.0)) <= 3.5
    # The exact samples are the same, whatever the method.
    assert found.observations["eubo"] == bounds(name).observations["eubo"]


def test_smc_cannot_hold_what_the_guide_cannot_draw() -> None:
    found = evidence_bounds(
        choice,
        "a",
        guide=Narrow(),
        method="smc",
        num_samples=4,
        num_observations=20,
        progress=False,
    )
    missed = np.array(found.observations["eubo"]) == math.inf
    assert 0 < missed.sum() < 20
    assert (np.isinf(found.observations["upper"]) == missed).all()


def test_another_particle_method() -> None:
    calls: list[Any] = []

    def particles(
        program: Program, guide: Guide, n: int, seed: int, held: Mapping[str, Any] | None
    ) -> float:
        calls.append((seed, held))
        choosers = [guide.chooser(program, (seed, i)) for i in range(n)]
        if held is not None:
            choosers[0] = guide.given(program, held)
        weights = [log_weight(e) for e in program.run(choosers, score)]
        return float(np.logaddexp.reduce(weights) - math.log(n))

    found = evidence_bounds(
        PROGRAM,
        method=particles,
        num_samples=8,
        num_observations=OBSERVATIONS,
        progress=False,
    )
    assert found.method == "particles"
    assert len({seed for seed, _ in calls}) == 2 * OBSERVATIONS
    assert [held is None for _, held in calls] == [True, False] * OBSERVATIONS
    exact = np.array([t.log_evidence for _, t in truths()])
    assert z_score(exact - np.array(found.observations["lower"])) >= -3.0
    assert z_score(np.array(found.observations["upper"]) - exact) >= -3.0
    # The exact samples are the same, whatever the method.
    assert found.observations["eubo"] == bounds("prior").observations["eubo"]
    with pytest.raises(ValueError, match="lower estimate of the evidence is NaN"):
        evidence_bounds(PROGRAM, method=lambda *_: math.nan, num_observations=2, progress=False)


def test_the_report() -> None:
    found = bounds("prior")
    frame = found.to_pandas()
    assert list(frame.columns) == ["lower", "upper", "elbo", "eubo", "log_joint"]
    assert len(frame) == OBSERVATIONS
    assert frame["lower"].mean() == pytest.approx(found.lower)
    text = str(found)
    for word in ("log evidence", "KL(q‖p)", "KL(p‖q)", "60 simulated observations", "guide prior"):
        assert word in text
    again = evidence_bounds(PROGRAM, num_samples=16, num_observations=OBSERVATIONS, progress=False)
    assert again == found
    single = evidence_bounds(PROGRAM, num_samples=1, num_observations=1, progress=False)
    assert single.lower_error == math.inf


def test_the_error_of_the_gap_is_that_of_its_own_mean() -> None:
    """Both ends rise and fall with the observation, and the gap does not."""
    low, high = np.array([0.0, 2.0]), np.array([1.0, 3.0])
    found = figures(low, high, elbo=low - 1.0, eubo=high + 1.0, log_joint=low)
    assert (found["lower"], found["upper"], found["gap"]) == (1.0, 2.0, 1.0)
    # A standard deviation of √2 over √2.
    assert found["lower_error"] == found["upper_error"] == pytest.approx(1.0)
    assert found["gap_error"] == pytest.approx(0.0)


def test_open_strings_take_the_length_that_is_asked_for() -> None:
    pairs = simulate_pairs(PROGRAM, 3, (0, "lengths"), {"first": 3})
    lengths = [
        [len(p.sites[n].fn.tokens_of(p.sites[n].value)) for n in ("first", "second")]
        for _, p in pairs
    ]
    assert lengths == [[3, 1]] * 3


def test_bad_input() -> None:
    def weighted() -> None:
        z = sample("z", LMString(LM, "a", max_tokens=1))
        lp.factor("f", 1.0)
        sample("x", LMString(LM, z), obs="a")

    def unobserved() -> None:
        sample("z", LMString(LM, "a", max_tokens=1))

    def sometimes() -> None:
        z = sample("z", LMChoice(LM, "a", ["a", "b"]))
        sample("x", LMString(LM, z), obs="a")
        if z == "a":
            sample("y", LMString(LM, z), obs="b")

    quick: dict[str, Any] = {"num_samples": 4, "num_observations": 4, "progress": False}
    with pytest.raises(ValueError, match="'f' is a factor"):
        evidence_bounds(weighted, **quick)
    with pytest.raises(ValueError, match="observes nothing"):
        evidence_bounds(unobserved, **quick)
    with pytest.raises(ValueError, match="'y' is observed in some executions and not in others"):
        evidence_bounds(sometimes, **quick)
    with pytest.raises(ValueError, match="trained for one observation"):
        evidence_bounds(PROGRAM, guide="gflownet", **quick)
    with pytest.raises(ValueError, match="unknown guide 'posterior'"):
        evidence_bounds(PROGRAM, guide="posterior", **quick)
    with pytest.raises(TypeError, match="a name, a Guide or a function"):
        evidence_bounds(PROGRAM, guide=3, **quick)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method must be"):
        evidence_bounds(PROGRAM, method="smoke", **quick)
    with pytest.raises(ValueError, match="lengths name 'z'"):
        evidence_bounds(PROGRAM, lengths={"z": 3}, **quick)
    with pytest.raises(TypeError, match="method 'importance' has no settings, got twist"):
        evidence_bounds(PROGRAM, twist="lookahead", **quick)
    for name in ("num_samples", "num_observations"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            evidence_bounds(PROGRAM, **{**quick, name: 0})
