"""Importance sampling against exact answers, on six programs and under three guides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from langppl import GFlowNetGuide, LMChoice, LMString, call, compile, infer, sample
from langppl.diagnostics import InferenceWarning
from langppl.guides import Guide, PriorGuide, PromptedGuide
from langppl.inference import importance
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=5, merged=["ab", "b."])
RUNS = 200


def infilling() -> None:
    middle = sample("middle", LMString(LM, "ab", stop=".", max_tokens=3))
    sample("ending", LMString(LM, f"ab{middle}"), obs="ab")


def chain() -> None:
    one = sample("one", LMString(LM, "a", max_tokens=2))
    two = sample("two", LMString(LM, f"b{one}", stop=".", max_tokens=2))
    sample("seen", LMString(LM, f"{one}{two}"), obs="bb")


def choice_and_string() -> None:
    kind = sample("kind", LMChoice(LM, "a", ["a", "b."]))
    text = sample("text", LMString(LM, f"b{kind}", max_tokens=2))
    sample("seen", LMString(LM, f"{kind}{text}"), obs="bb")


def branch() -> None:
    first = sample("first", LMString(LM, "ab", max_tokens=2))
    if "a" in first:
        second = sample("second", LMString(LM, f"a{first}", stop=".", max_tokens=2))
        sample("seen", LMString(LM, f"{first}{second}"), obs="b")
    else:
        sample("seen", LMString(LM, f"{first}a"), obs="b")


def swap(text: str) -> str:
    return text.translate(str.maketrans("ab", "ba"))


def tool() -> None:
    text = sample("text", LMString(LM, "ab", max_tokens=2))
    found = call("swap", swap, text)
    sample("seen", LMString(LM, f"a{found}"), obs="ab")


def numeric() -> None:
    p = sample("p", dist.Beta(2.0, 3.0))
    sample("seen", LMString(LM, "ab", temperature=0.5 + float(p)), obs="ba.")


def numeric_truth() -> float:
    def density(p: float) -> float:
        likelihood = float(LMString(LM, "ab", temperature=0.5 + p).log_prob("ba."))
        return 12.0 * p * (1.0 - p) ** 2 * math.exp(likelihood)

    value, error = quad(density, 0.0, 1.0, epsabs=0.0, epsrel=1e-6)
    assert error < 1e-5 * value
    return math.log(value)


PROGRAMS: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (infilling, chain, choice_and_string, branch, tool, numeric)
}


def trained(program: Program) -> Guide:
    guide = GFlowNetGuide(LM, seed=0)
    return guide.fit(program, steps=25, batch=16, learning_rate=3e-3, progress=False)


GUIDES: dict[str, Callable[[Program], Guide]] = {
    "prior": lambda _: PriorGuide(),
    "prompted": lambda _: PromptedGuide(),
    "gflownet": trained,
}


@dataclass(frozen=True)
class Cell:
    program: str
    guide: str
    samples: int


LEFT_OUT = {
    ("numeric", "gflownet"): "no latent string, so there is nothing for an LM guide to learn",
    ("chain", "prompted"): "one weight has a relative sd of 16, so 40 of them still have 2.5",
}

CELLS = [
    Cell(program, guide, 40 if guide == "prompted" else 10)
    for program in PROGRAMS
    for guide in GUIDES
    if (program, guide) not in LEFT_OUT
]


def truth_of(program: Program) -> Posterior:
    return infer(program, method="exact", progress=False)


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c.program}-{c.guide}")
def test_the_evidence_is_unbiased(cell: Cell) -> None:
    program = compile(PROGRAMS[cell.program])
    numeric_latent = cell.program == "numeric"
    truth = numeric_truth() if numeric_latent else truth_of(program).log_evidence
    guide = GUIDES[cell.guide](program)
    # Draws are independent, so one call makes all the runs.
    posterior = infer(
        program, guide=guide, num_samples=RUNS * cell.samples, seed=11, progress=False
    )
    ratios = np.exp(posterior.log_weights - truth).reshape(RUNS, cell.samples).mean(1)
    spread = ratios.std(ddof=1)
    assert spread <= 1.0, "with so wide a spread the test says nothing"
    # Two-sided at 1 % over all cells (Bonferroni); 1e-5 is float32's rounding.
    z = norm.isf(0.01 / 2 / len(CELLS))
    assert abs(ratios.mean() - 1.0) <= z * spread / math.sqrt(RUNS) + 1e-5


@pytest.mark.parametrize("name", ["infilling", "branch", "tool"])
def test_probabilities_agree_with_the_exact_ones(name: str) -> None:
    program = compile(PROGRAMS[name])
    exact = truth_of(program)
    found = infer(program, num_samples=4000, seed=1, progress=False)
    for site in program.latents:
        want, got = exact.probabilities(site), found.probabilities(site)
        z = norm.isf(1e-3 / 2 / len(want))
        for value, p in want.items():
            estimate = got.get(value, 0.0)
            here = np.array([s.get(site) == value for s in found.samples])
            if not here.any():
                continue
            error = math.sqrt(float((found.weights**2 * (here - p) ** 2).sum()))
            assert abs(estimate - p) <= z * error + 1e-5, (site, value)


def test_batches_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = infer(infilling, num_samples=20, seed=3, progress=False)
    monkeypatch.setattr(importance, "BATCH", 7)
    parts = infer(infilling, num_samples=20, seed=3, progress=False)
    assert [s["middle"].ids for s in whole.samples] == [s["middle"].ids for s in parts.samples]
    np.testing.assert_allclose(whole.log_weights, parts.log_weights, atol=1e-4)


def test_interrupted_it_keeps_finished_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "BATCH", 10)
    run, calls = Program.run, []

    def interrupted(self: Program, choosers: Any, *rest: Any) -> Any:
        if len(choosers) == 10:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
        return run(self, choosers, *rest)

    program = compile(infilling)
    whole = infer(program, num_samples=20, progress=False)
    monkeypatch.setattr(Program, "run", interrupted)
    with pytest.warns(InferenceWarning, match="first 20 samples of 50"):
        found = infer(program, num_samples=50, progress=False)
    assert found.num_samples == 20
    assert found.samples == whole.samples
    calls[:] = [1, 1]
    with pytest.raises(KeyboardInterrupt):
        infer(program, num_samples=50, progress=False)


def test_when_nothing_explains_the_observation_it_says_why() -> None:
    def model() -> None:
        middle = sample("middle", LMString(LM, "ab", max_tokens=2))
        sample("ending", LMString(LM, f"{middle}", max_tokens=1), obs="aaaa")

    with pytest.warns(InferenceWarning, match="no sample explains the observations") as caught:
        posterior = infer(model, num_samples=8, progress=False)
    assert posterior.log_evidence == -math.inf
    assert posterior.failed_sites == {"ending": 8}
    told = str(caught[0].message) + " ".join(posterior.notes)
    assert "'ending'" in told
    assert "max_tokens is 1" in told
    with pytest.raises(ValueError, match="no sample"):
        posterior.probabilities("middle")
