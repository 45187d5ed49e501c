"""Particles that move: the evidence stays unbiased, samples follow the posterior, copies differ."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from langppl import LMString, compile, evidence_bounds, factor, infer, sample
from langppl.guides import Guide, PriorGuide, PromptedGuide
from langppl.inference import kernels, rejuvenation
from langppl.inference.conditional import smc_evidence
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=5, merged=["ab", "b."])
RUNS = 160


def chain() -> None:
    """Evidence between strings, so that particles are resampled there; some have only one."""
    first = sample("first", LMString(LM, "a", max_tokens=2))
    factor("few", 1.5 * first.count("b"))
    if first.startswith("a"):
        second = sample("second", LMString(LM, f"b{first}", max_tokens=1))
        factor("more", -1.5 * second.count("b"))
        third = sample("third", LMString(LM, f"{second}", max_tokens=1))
        factor("same", 1.0 if third == second else 0.0)


def run(program: Program, guide: Guide, seed: int, **options: Any) -> Posterior:
    settings = {"num_samples": 10, "rejuvenation": 1, "ess_threshold": 0.9, "every": 1, **options}
    return infer(program, guide=guide, method="smc", seed=seed, progress=False, **settings)


def z_score(program: Program, guide: Guide, runs: int, **options: Any) -> float:
    """How many standard errors the mean of Ẑ/Z is from 1."""
    log_z = infer(program, method="exact", progress=False).log_evidence
    found = np.exp(
        [run(program, guide, s, **options).log_evidence - log_z for s in range(runs)]  # type: ignore[operator]
    )
    return float((found.mean() - 1.0) / (found.std(ddof=1) / math.sqrt(runs)))


@pytest.mark.parametrize("tail_share", [0.0, 1.0])
def test_the_evidence_is_unbiased(tail_share: float) -> None:
    assert abs(z_score(compile(chain), PriorGuide(), RUNS, tail_share=tail_share)) <= 3.3


def test_the_evidence_is_unbiased_under_a_guide_in_a_loop_with_a_twist(truth: ModuleType) -> None:
    program = compile(truth.steered)
    assert abs(z_score(program, PromptedGuide(), 40, twist="lookahead", rejuvenation=2)) <= 3.3


def _as_drawn(particle: Any, execution: Any) -> None:
    """Forgets that the particle now stands for another share of what it stood for."""
    offset = particle.offset
    _PUT(particle, execution)
    particle.offset = offset


_PUT = rejuvenation._put


def _always(self: Any, execution: Any) -> kernels.Moved:
    accepted = self.log_ratio > -math.inf
    now = execution if accepted else self.state
    return kernels.Moved(now, self.kind, self.site.name, self.log_ratio, accepted)


def test_a_move_that_forgets_the_weight_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejuvenation, "_put", _as_drawn)
    assert abs(z_score(compile(chain), PriorGuide(), RUNS, rejuvenation=2)) > 3.3


def furthest() -> float:
    """Of the samples' probabilities the furthest from the exact ones, in standard errors."""
    program = compile(chain)
    exact = infer(program, method="exact", progress=False)
    runs = [run(program, PriorGuide(), s, num_samples=60) for s in range(12)]
    weights = np.array([math.exp(r.log_evidence - exact.log_evidence) for r in runs])  # type: ignore[operator]
    far = []
    for site in program.latents:
        for value, p in exact.probabilities(site).items():
            # Weighted by the evidence each run's share is unbiased.
            found = weights * [r.probabilities(site).get(value, 0.0) for r in runs]
            error = np.std(found, ddof=1) / math.sqrt(len(runs))
            far.append(max(abs(found.mean() - p) - 1e-3, 0.0) / max(error, 1e-9))
    return max(far)


MOST = 5.9
"""Student's t of 11 degrees of freedom at 1e-4, two-sided."""


def test_probabilities_agree_with_the_exact_ones() -> None:
    assert furthest() <= MOST


def test_a_move_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels._Move, "decide", _always)
    assert furthest() > MOST


def test_copies_become_different_again(tmp_path: Path) -> None:
    def steered() -> None:
        z = sample("z", LMString(LM, "a", max_tokens=12, min_tokens=12))
        factor("begins", 4.0 if z.startswith("b.") else 0.0)
        sample("after", LMString(LM, z, max_tokens=1))

    program = compile(steered)

    def distinct(found: Posterior) -> int:
        return len({str(s["z"]) for s in found.samples})

    options: dict[str, Any] = {"num_samples": 40, "ess_threshold": 1.0}
    still = run(program, PriorGuide(), 0, rejuvenation=0, **options)
    moved = run(program, PriorGuide(), 0, rejuvenation=3, **options)
    assert distinct(moved) > distinct(still)
    assert still.resampled == moved.resampled == 1
    assert still.moves == (0, 0) and still.log_q is not None
    tried, accepted = moved.moves
    assert tried == 3 * (40 + 40) and 0 < accepted < tried and moved.log_q is None
    assert f"{accepted} of {tried} Metropolis–Hastings moves" in str(moved)
    np.testing.assert_allclose(moved.log_joint, program.log_joint(moved.samples), atol=2e-4)
    moved.save(tmp_path / "posterior.json")
    assert Posterior.load(tmp_path / "posterior.json").moves == moved.moves
    again = run(program, PriorGuide(), 0, rejuvenation=3, **options)
    assert again.samples == moved.samples


def test_at_the_end_they_move_with_the_weights_that_they_have(truth: ModuleType) -> None:
    program = compile(truth.infilling)
    still, moved = (run(program, PriorGuide(), 0, rejuvenation=k) for k in (0, 3))
    np.testing.assert_allclose(moved.log_weights, still.log_weights, atol=1e-9)
    assert moved.samples != still.samples


def test_bad_settings() -> None:
    program = compile(chain)
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="rejuvenation must be an integer of at least 0"):
            run(program, PriorGuide(), 0, rejuvenation=bad)
    with pytest.raises(ValueError, match="tail_share must be between 0 and 1"):
        run(program, PriorGuide(), 0, tail_share=1.5)
    exact = infer(program, method="exact", progress=False)
    with pytest.raises(ValueError, match="must keep to"):
        smc_evidence(program, PriorGuide(), 4, 0, exact.samples[0], rejuvenation=1)

    def story() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=2))
        sample("y", LMString(LM, f"ab{z}"), obs="ab")

    with pytest.raises(ValueError, match="must keep to"):
        evidence_bounds(story, method="smc", rejuvenation=1, num_samples=2, num_observations=2)
