"""The sentence task: its guide follows p^(1/T) where that is known, and what is compared."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import langppl as lp
from langppl.guides import PriorGuide
from langppl.testing import tiny_lm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in ("benchmarks", "benchmarks/tasks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module("continuation")


def test_one_guide_follows_the_tempered_sentences_of_two_prompts(bench: ModuleType) -> None:
    example = bench.continuation
    lm = tiny_lm("ab.", seed=1, merged=["ab", "b."])
    model = example.make_continuation(lm, 0.5, max_tokens=4)
    guide = lp.GFlowNetGuide(lm, seed=0)
    options = {"learning_rate": 1e-2, "batch": 16, "every": 1, "progress": False}
    example.train(guide, model, ["ba", "ab"], 60, **options)
    for prompt in ("ba", "ab"):
        program = lp.compile(model, prompt)
        exact = lp.infer(program, method="exact", progress=False)
        possible = np.isfinite(exact.log_weights)
        target = exact.log_weights[possible] - np.logaddexp.reduce(exact.log_weights)
        values = [s for s, p in zip(exact.samples, possible, strict=True) if p]

        def kl(log_q: np.ndarray, target: np.ndarray = target) -> float:
            return float(np.sum(np.exp(target) * (target - log_q)))

        before = kl(PriorGuide().log_q(program, values))
        after = kl(guide.log_q(program, values))
        assert before > 0.3 and after < 0.03, (before, after)


def test_sentences_are_scored_by_the_lm_itself(bench: ModuleType) -> None:
    example = bench.continuation
    lm = tiny_lm("ab.", seed=1)
    prompts = ["ba", "ab"]
    cooled = [lp.compile(example.make_continuation(lm, 1.0, 2.0, 3), p) for p in prompts]
    plain = [lp.compile(example.make_continuation(lm, max_tokens=3), p) for p in prompts]
    found = example.draws(PriorGuide(), cooled, plain, 40, 0)
    assert any(w == -math.inf for row in found for _, w in row)  # the unfinished
    for prompt, row in zip(prompts, found, strict=True):
        string = lp.LMString(lm, prompt, stop=".", max_tokens=3, truncate="reject")
        for z, w in row:
            assert w == pytest.approx(float(string.log_prob(z)), abs=1e-4)


def test_the_best_of_several_and_the_curves(bench: ModuleType) -> None:
    answers = {"texts": list("abcdef"), "logs": [-3.0, -1.0, None, -2.0, None, None], "tokens": [9]}
    assert bench.best_of(answers, 2, 6) == {"texts": ["b", "d", "e"], "logs": [-1.0, -2.0, None]}
    assert bench.best_of(answers, 2, 5)["texts"] == ["b", "d"]
    curve = [(0.5, -10.0), (0.3, -6.0)]
    assert bench.at_distance(curve, 0.4) == pytest.approx(-8.0)
    assert math.isnan(bench.at_distance(curve, 0.6))

    def rows(log_prob: float, distance: float) -> np.ndarray:
        return np.tile([log_prob, distance], (4, 1))

    figures = {
        "guide 0.8": rows(-7.0, 0.4),
        "nucleus 0.5": rows(-6.0, 0.3),
        "nucleus 0.9": rows(-10.0, 0.5),
        "temperature 1": rows(-9.0, 0.45),
        "best of 2": rows(-7.0, 0.35),
    }
    (row,) = bench.gaps(figures, dict.fromkeys(figures, 1), 4)
    assert row["nucleus"] == "+1.00 ± 0.00" and row["best of N"] == "+1.00 ± 0.00"
    assert row["temperature"] == "–"  # a single setting, at another diversity
