"""The story task: answers by weight, and the figures that are shown."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import langppl as lp
from langppl.testing import tiny_lm


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in ("benchmarks", "benchmarks/tasks"):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / folder))
    return importlib.import_module("infilling")


def test_an_answer_is_taken_by_weight(bench: ModuleType) -> None:
    weights, endings = np.log([1.0, 3.0]), np.array([-1.0, -2.0])
    rows = [bench.chosen(["a", "b"], weights, endings, -7.0, k) for k in range(2000)]
    counts = Counter(row["text"] for row in rows)
    assert counts["b"] / 2000 == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 2000))
    assert {(r["text"], r["ending"], r["weight"]) for r in rows} == {
        ("a", -1.0, -7.0),
        ("b", -2.0, -7.0),
    }
    none = bench.chosen(["a", "b"], np.full(2, -np.inf), endings, -np.inf, 0)
    assert none == {"text": "a", "weight": None, "ending": None}


def test_particles_and_resampled_draws_answer_for_each_program(bench: ModuleType) -> None:
    lm = tiny_lm("ab.!?", seed=2)
    story = bench.make_story(lm)
    programs = [lp.compile(story, *args) for args in (("ab", "ba"), ("ba", "b"))]
    for found in (
        bench.raw(bench.PriorGuide(), programs, 3, 0),
        bench.importance(programs, 3, 8, 0),
        bench.smc(programs, 3, 8, 4, 0),
    ):
        assert [len(row) for row in found] == [3, 3]
        for program, row in zip(programs, found, strict=True):
            for d in row:
                if d["weight"] is None:
                    continue
                (run,) = program.executions([{"middle": d["text"]}])
                # A text's canonical tokens: on this LM there are no others.
                assert d["ending"] == pytest.approx(run.sites["ending"].log_prob, abs=1e-4)


def test_the_figures_of_a_story(bench: ModuleType) -> None:
    pytest.importorskip("sacrebleu")
    vectors = {"The cat ran.": [1.0, 0.0], "The dog sat.": [0.0, 1.0], "The cat sat.": [1.0, 0.0]}

    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.array([vectors[t] for t in texts])

    draws = [
        {"text": "The cat ran.", "weight": -4.0, "ending": -3.0},
        {"text": "The dog sat.", "weight": -6.0, "ending": -5.0},
        {"text": "cut", "weight": None, "ending": None},
        {"text": "cut", "weight": None, "ending": None},
    ]
    found = bench.of_story(draws, "The cat sat.", "The dog sat down.", embed)
    assert found["ELBO"] == pytest.approx(-5.0 + math.log(0.5))
    assert found["log p(s5)"] == -4.0 and found["impossible"] == 0.5
    assert found["similarity"] == 0.5 and found["distance"] == 1.0 and found["distinct"] == 1.0
    assert found["GLEU-4"] == (3 / 6 + 2 / 6) / 2  # 2 + 1 and 2 + 0 of 3 + 2 + 1
    assert found["GLEU to s5"] == (1 / 10 + 6 / 10) / 2
    nothing = bench.of_story(draws[2:], "The cat sat.", "The dog sat down.", embed)
    assert nothing["impossible"] == 1.0 and math.isnan(nothing["ELBO"])


def test_differences_are_paired_by_story(bench: ModuleType) -> None:
    values = np.array([1.0, 2.0, 4.0])
    figures = {
        "prompted": {"ELBO": values},
        "supervised": {"ELBO": values + 1.0},
        "gflownet": {"ELBO": values + 0.5},
    }
    rows = bench.differences(figures, ["ELBO"])
    assert [(r["less"], r["ELBO"]) for r in rows] == [
        ("prompted", "0.50 ± 0.00"),
        ("supervised", "-0.50 ± 0.00"),
    ]
