"""Conditional SMC: the mean of Z/Ẑ is 1 where one particle keeps to an exact posterior sample."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from mixed import LM, everything
from scipy.stats import norm

from langppl import LMString, MaskedGuide, compile, infer, regex, sample
from langppl.guides import Guide, PriorGuide, PromptedGuide
from langppl.inference import conditional, particles
from langppl.inference.conditional import smc_evidence
from langppl.inference.resampling import SCHEMES, resample, resample_conditionally
from langppl.program import Program
from langppl.program.scheduler import run_whole

RUNS = 160
TOGETHER = 20


def ratios(
    program: Program, guide: Guide, runs: int = RUNS, num_samples: int = 6, **options: Any
) -> np.ndarray:
    """Z/Ẑ of some runs, each with an exact posterior sample of its own; shape [runs].

    Few of the samples have small weights, and 1/Ẑ is large with those; so the samples are spread
    evenly over the posterior in the order of their weights. Each follows it, and the error, which
    is that of independent ones, errs on the large side.
    """
    exact = infer(program, method="exact", progress=False)
    assert exact.log_evidence is not None
    order = np.argsort(exact.log_weights - guide.log_q(program, exact.samples))
    points = (np.arange(runs) + np.random.default_rng(3).random()) / runs
    chosen = order[np.searchsorted(exact.weights[order].cumsum(), points)]
    settings: dict[str, Any] = {"every": 1, "ess_threshold": 0.9, **options}
    tasks = [
        partial(smc_evidence, program, guide, num_samples, run, held, **settings)
        for run, held in enumerate(exact.samples[k] for k in chosen)
    ]
    found = [
        z for first in range(0, runs, TOGETHER) for z in run_whole(tasks[first : first + TOGETHER])
    ]
    return np.exp(exact.log_evidence - np.array(found))


def z_score(found: np.ndarray) -> float:
    """Distance of the mean from 1, in standard errors."""
    return float((found.mean() - 1.0) / (found.std(ddof=1) / math.sqrt(len(found))))


CELLS = [
    ("infilling", "prior", "none", "multinomial", 6),
    ("infilling", "prompted", "lookahead", "systematic", 12),
    ("infilling", "prior", "lookahead, whole", "stratified", 12),
    ("infilling", "gflownet", "flow", "residual", 6),
    ("branch", "prior", "user", "stratified", 6),
    ("branch", "prompted", "none", "residual", 16),
    ("steered", "prior", "lookahead", "systematic", 6),
    ("everything", "prior", "lookahead", "stratified", 8),
]
MOST = float(norm.isf(0.01 / 2 / len(CELLS)))
"""Standard errors, two-sided at 1 % over all cells."""


def found_in(truth: ModuleType, cell: tuple[Any, ...], **options: Any) -> np.ndarray:
    name, guide, twist, scheme, num_samples = cell
    program = compile(everything if name == "everything" else truth.PROGRAMS[name])
    return ratios(
        program,
        truth.GUIDES[guide](program),
        num_samples=num_samples,
        **truth.TWISTS[twist],
        resampling=scheme,
        **options,
    )


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_the_inverse_is_unbiased(truth: ModuleType, cell: tuple[Any, ...]) -> None:
    found = found_in(truth, cell)
    assert abs(z_score(found)) <= MOST, (found.mean(), found.std(ddof=1))
    assert found.std(ddof=1) <= 1.5


def _uncounted(g: Any, held: Any, every: int | None) -> Any:
    """Keeps to the latents, as if they were drawn with the probability of their ending alone."""
    return replace(followed(g, held, every), log_q=0.0)


followed = particles.followed
WRONG: dict[str, tuple[Any, str, Any, tuple[Any, ...]]] = {
    "uncounted": (
        particles,
        "followed",
        _uncounted,
        ("infilling", "prompted", "lookahead", "systematic", 6),
    ),
    "nothing held": (
        conditional,
        "Held",
        lambda *_: None,
        ("infilling", "prior", "lookahead, whole", "systematic", 6),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_noticed(
    truth: ModuleType, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, replacement, cell = WRONG[wrong]
    monkeypatch.setattr(module, name, replacement)
    found = found_in(truth, cell, runs=300)
    assert abs(z_score(found)) > MOST, (found.mean(), found.std(ddof=1))


Conditional = Callable[[np.ndarray, str, int, np.random.Generator], tuple[np.ndarray, int]]


def distance(way: Conditional, scheme: str) -> float:
    """How far a way's ancestors are from the law given one of them, in standard errors."""
    rng = np.random.default_rng(0)
    weights = np.array([0.05, 0.45, 0.3, 0.2])
    n, runs, scores = 4, 6000, []
    plain = Counter(tuple(resample(weights, scheme, rng).tolist()) for _ in range(runs))
    for held in range(n):
        found: Counter[tuple[int, ...]] = Counter()
        places: list[float] = []
        for _ in range(runs):
            chosen, at = way(weights, scheme, held, rng)
            assert chosen[at] == held
            found[tuple(sorted(chosen.tolist()))] += 1
            if (count := int((chosen == held).sum())) > 1:
                first = int(np.flatnonzero(chosen == held)[0])
                places.append((at - first) / (count - 1))
        for ancestors in set(plain) | set(found):
            ratio = ancestors.count(held) / (n * weights[held])
            p, q = plain[ancestors] / runs, found[ancestors] / runs
            variance = (ratio**2 * p * (1 - p) + q * (1 - q)) / runs + (1 / runs) ** 2
            scores.append((q - ratio * p) / math.sqrt(variance))
        if places:  # any of its copies alike
            scores.append(2.0 * (np.mean(places) - 0.5) * math.sqrt(len(places)))
    return float(np.abs(scores).max())


# Up to 35 outcomes of 4 held particles under 4 schemes: 5 standard errors are 3e-4 over them all.
@pytest.mark.parametrize("scheme", SCHEMES)
def test_conditional_resampling_has_the_law_of_the_ancestors_given_one(scheme: str) -> None:
    assert distance(resample_conditionally, scheme) <= 5.0
    # Too little weight for a number is no error: a posterior sample is never impossible.
    rng = np.random.default_rng(0)
    chosen, at = resample_conditionally(np.array([0.0, 1.0]), scheme, 0, rng)
    assert chosen.tolist() == [0, 1] and at == 0


def _in_the_first_place(
    weights: np.ndarray, scheme: str, held: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Resamples the others as if nothing were held: right for independent ancestors alone."""
    chosen = resample(weights, scheme, rng)
    chosen[0] = held
    return chosen, 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_law_is_noticed(scheme: str) -> None:
    assert distance(_in_the_first_place, scheme) > 5.0


def test_one_particle_is_the_weight_of_the_sample() -> None:
    program = compile(everything)
    exact = infer(program, method="exact", progress=False)
    for guide in (PriorGuide(), PromptedGuide()):
        for seed, held in enumerate(exact.resample(5, seed=1)):
            found = smc_evidence(program, guide, 1, seed, held, every=1, twist="lookahead")
            weight = float(program.log_joint(held)) - float(guide.log_q(program, [held])[0])
            assert found == pytest.approx(weight, abs=2e-4)


def test_the_weight_of_the_sample_counts_the_temperature_of_its_site() -> None:
    fn = LMString(LM, "a", max_tokens=2, temperature=0.5)

    def story() -> None:
        z = sample("z", fn)
        sample("y", LMString(LM, f"b{z}"), obs="ab")

    # The context of a prompted guide is another, so the held string is scored anew.
    program, guide = compile(story), PromptedGuide()
    for row in infer(program, method="exact", progress=False).samples:
        weight = float(program.log_joint(row)) - float(guide.log_q(program, [row])[0])
        assert smc_evidence(program, guide, 1, 0, row) == pytest.approx(weight, abs=2e-4)


def test_the_held_particle_is_the_sample_to_the_end(
    truth: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = compile(truth.steered)
    exact = infer(program, method="exact", progress=False)
    crowds = []
    run_crowd = conditional.run_crowd

    def note(crowd: Any, **options: Any) -> Any:
        crowds.append((crowd, run_crowd(crowd, **options)))

    monkeypatch.setattr(conditional, "run_crowd", note)
    for seed, held in enumerate(exact.resample(12, seed=2)):
        smc_evidence(program, PriorGuide(), 5, seed, held, every=1, ess_threshold=1.0)
        crowd, _ = crowds[-1]
        own = crowd.particles[crowd.held.at]
        assert own.execution.latents == held
        assert own.execution.log_joint == pytest.approx(float(program.log_joint(held)), abs=2e-4)
    assert len({crowd.held.at for crowd, _ in crowds}) > 1
    assert any(course.resampled > 0 for _, course in crowds)


@pytest.mark.filterwarnings("ignore:MaskedGuide keeps site 'z'")
def test_a_guide_that_cannot_draw_the_sample() -> None:
    def story() -> None:
        z = sample("z", LMString(LM, "a", max_tokens=2))
        sample("y", LMString(LM, f"b{z}"), obs="ab")

    guide = MaskedGuide({"z": regex("b+")})
    program = compile(story)
    rows = infer(program, method="exact", progress=False).samples
    held = next(row for row in rows if row["z"] == "a")
    assert smc_evidence(program, guide, 3, 0, held) == math.inf
    with pytest.raises(ValueError, match="'z' has no value"):
        smc_evidence(program, PriorGuide(), 3, 0, {})
