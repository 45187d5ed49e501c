"""Models that call themselves: a tree and a list, against all that they can grow to."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import langppl as lp
from langppl.posterior import Posterior
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1, merged=["ab", "b."], sharpness=0.25)


def grown(before: str, node: int = 1, depth: int = 2) -> str:
    """A tree: a leaf "a", or "b" and two trees. What stands before it decides which."""
    if not depth or lp.sample(f"kind_{node}", lp.LMChoice(LM, before, ["a", "b"])) == "a":
        return "a"
    left = grown(f"{before}b", 2 * node, depth - 1)
    return f"b{left}{grown(f'{before}b{left}', 2 * node + 1, depth - 1)}"


def tree(seen: str) -> str:
    found = grown("ab")
    lp.sample("seen", lp.LMString(LM, f"ab{found}"), obs=seen)
    return found


def items(before: str, n: int = 0) -> str:
    """A list of at most two strings."""
    if n == 2 or lp.sample(f"more_{n}", lp.LMChoice(LM, before, ["b", "."])) == ".":
        return ""
    own = lp.sample(f"own_{n}", lp.LMString(LM, f"{before}b", max_tokens=1))
    return f"b{own}{items(f'{before}b{own}', n + 1)}"


def listed(seen: str) -> str:
    found = items("ab")
    lp.sample("seen", lp.LMString(LM, f"ab{found}"), obs=seen)
    return found


MODELS = {"tree": tree, "listed": listed}


@functools.cache
def exact(model: str) -> tuple[lp.Program, Posterior]:
    program = lp.compile(MODELS[model], "...")  # rare under both, so that the prior is far off
    return program, lp.infer(program, method="exact", progress=False)


def divergences(model: str, guide: lp.guides.Guide) -> tuple[float, float]:
    """KL(q‖p) and KL(p‖q) over all executions."""
    program, truth = exact(model)
    log_p = np.asarray(truth.log_weights) - truth.log_evidence
    log_q = np.asarray(guide.log_q(program, truth.samples))
    assert np.exp(log_q).sum() == pytest.approx(1.0, abs=1e-4)
    gap = log_q - log_p
    return float((np.exp(log_q) * gap).sum()), float(-(np.exp(log_p) * gap).sum())


def test_all_that_recursion_can_grow_is_listed() -> None:
    program, truth = exact("tree")
    assert program.latents == ("kind_1", "kind_2", "kind_3") and not program.is_static
    trees = {"a", "baa", "bbaaa", "babaa", "bbaabaa"}
    assert set(truth.probabilities("_RETURN")) == trees and truth.num_samples == 5
    # A tree that is a leaf at once has no further nodes.
    assert [set(s) for s in truth.samples if s["kind_1"] == "a"] == [{"kind_1"}]
    # Lists of none, one or two strings of one token: "a", "b", "." and the two merged ones.
    _, truth = exact("listed")
    assert truth.num_samples == 1 + 5 + 5**2
    assert {len(s) for s in truth.samples} == {1, 3, 4}


@pytest.mark.parametrize(
    ("model", "objective", "most"),
    [
        ("tree", "vargrad", 0.1),
        ("tree", "subtb", 0.1),
        ("tree", "db", 0.2),
        ("listed", "subtb", 0.5),
    ],
)
def test_a_guide_learns_what_recursion_grows(model: str, objective: str, most: float) -> None:
    program, truth = exact(model)
    # What stands before a node says where it is, and the observation is always the same.
    guide = lp.GFlowNetGuide(LM, context=lambda info: info.prompt, objective=objective, seed=1)
    assert min(divergences(model, guide)) > 1.5
    guide.fit(
        program,
        steps=40,
        batch=8,
        learning_rate=1e-2,
        betas=(0.8, 0.95),
        schedule=lp.RewardSchedule(start=1.0),
        replay_share=0.0,
        progress=False,
    )
    assert max(divergences(model, guide)) < most
    guide.defensive = 0.3  # what it has lost is drawn now and then, so that the error is honest
    found = lp.infer(program, guide=guide, num_samples=200, seed=1, progress=False)
    assert found.log_evidence_error < 0.2
    assert abs(found.log_evidence - truth.log_evidence) < 4 * found.log_evidence_error


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["importance", "smc"])
def test_the_evidence_of_what_recursion_grows(model: str, method: str) -> None:
    program, truth = exact(model)
    options: dict[str, Any] = {"num_samples": 1000, "seed": 2, "progress": False}
    found = lp.infer(program, method=method, **options)
    error = found.log_evidence_error
    assert error < 0.25 and abs(found.log_evidence - truth.log_evidence) < 4 * error
    for site in (program.latents[0], program.latents[1]):
        expected, own = truth.probabilities(site), found.probabilities(site)
        for value, p in expected.items():
            assert own.get(value, 0.0) == pytest.approx(p, abs=0.08), (site, value)
