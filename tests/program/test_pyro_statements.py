"""What Pyro's own statements and handlers are to a program."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import langppl as lp
from langppl.program.scheduler import run
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)


def plain() -> None:
    x = lp.sample("x", dist.Normal(0.0, 1.0))
    lp.sample("y", dist.Normal(3.0 * x, 0.5), obs=torch.tensor(2.0))


def with_deterministic() -> None:
    x = lp.sample("x", dist.Normal(0.0, 1.0))
    r = pyro.deterministic("r", 3.0 * x)
    lp.sample("y", dist.Normal(r, 0.5), obs=torch.tensor(2.0))


def test_pyros_deterministic_is_computed_and_no_observation() -> None:
    program = lp.compile(with_deterministic)
    assert (program.latents, program.observed) == (("x",), ("y",))
    assert set(program.graph.edges) == {("x", "r"), ("r", "y")}
    execution = program.executions([{"x": torch.tensor(0.5)}])[0]
    assert execution.sites["r"].kind == "deterministic"
    assert float(execution.sites["r"].value) == 1.5
    (simulated,) = run([lambda: program.simulated((0, "k"))])
    latents, pair = simulated
    assert set(latents) == {"x"} and float(pair.sites["y"].value) != 2.0


def test_bounds_are_those_without_the_deterministic_site() -> None:
    options = {"num_samples": 16, "num_observations": 24, "progress": False}
    found = [lp.evidence_bounds(m, **options) for m in (plain, with_deterministic)]
    np.testing.assert_allclose(found[0].lower, found[1].lower, atol=1e-5)
    np.testing.assert_allclose(found[0].upper, found[1].upper, atol=1e-5)
    # log N(y; 0, 3² + 0.5²) on average: that the values come from the prior, too.
    assert float(np.mean(found[1].lower)) < -1.0


def test_what_a_scale_or_a_mask_depends_on_is_a_parent() -> None:
    def scaled() -> None:
        a = lp.sample("a", lp.LMChoice(LM, "a", ["a", "b"]))
        b = lp.sample("b", lp.LMChoice(LM, "b", ["a", "b"]))
        with poutine.scale(scale=5.0 if a == "a" else 0.1):
            lp.sample("y", lp.LMString(LM, f"{b}"), obs="ab")

    def masked() -> None:
        a = lp.sample("a", lp.LMChoice(LM, "a", ["a", "b"]))
        b = lp.sample("b", lp.LMChoice(LM, "b", ["a", "b"]))
        with poutine.mask(mask=a == "a"):
            lp.sample("y", lp.LMString(LM, f"{b}"), obs="ab")

    for model in (scaled, masked):
        program = lp.compile(model)
        assert {("a", "y"), ("b", "y")} <= set(program.graph.edges)
        assert [set(g) for g in program.graph.independent()] == [{"a", "b"}]


@pytest.mark.parametrize("objective", ["vargrad", "subtb"])
def test_a_guide_learns_what_a_scale_says(objective: str) -> None:
    def scaled() -> None:
        a = lp.sample("a", lp.LMChoice(LM, "a", ["a", "b"]))
        b = lp.sample("b", lp.LMChoice(LM, "b", ["a", "b"]))
        with poutine.scale(scale=2.0 if a == "a" else 0.1):
            lp.sample("y", lp.LMString(LM, f"{b}"), obs="ab")

    exact = lp.infer(scaled, method="exact", progress=False)
    prior = lp.infer(lambda: lp.sample("a", lp.LMChoice(LM, "a", ["a", "b"])), method="exact")
    truth = exact.probabilities("a")["a"]
    assert abs(truth - math.exp(prior.log_weights[0])) > 0.2
    guide = lp.GFlowNetGuide(LM, rank=4, objective=objective)
    guide.fit(
        scaled,
        steps=60,
        batch=16,
        learning_rate=1e-2,
        schedule=lp.RewardSchedule(start=1.0),
        progress=False,
    )
    program = lp.compile(scaled)
    rows = [{"a": a, "b": b} for a in "ab" for b in "ab"]
    q = np.exp(guide.log_q(program, rows))
    assert q.sum() == pytest.approx(1.0, abs=1e-4)
    assert q[0] + q[1] == pytest.approx(truth, abs=0.1)


@pytest.mark.parametrize("own", [True, False])
def test_what_is_computed_may_be_zero_or_a_vector(own: bool) -> None:
    stated = lp.deterministic if own else pyro.deterministic

    def model() -> torch.Tensor:
        x = lp.sample("x", dist.Normal(0.0, 1.0))
        is_large = stated("is large", (x > 5.0).float())
        both = stated("both", torch.stack([x, 2.0 * x]))
        lp.sample("y", dist.Normal(both.sum() + is_large, 0.5), obs=torch.tensor(2.0))
        return both

    program = lp.compile(model)
    # No value that was tried is large.
    assert set(program.graph.edges) == {("x", "both"), ("both", "y")}
    assert program.observed == ("y",)
    posterior = lp.infer(program, num_samples=8, progress=False)
    for computed, returned in zip(posterior.computed, posterior.returns or (), strict=True):
        assert computed["is large"] == 0.0 and torch.equal(computed["both"], returned)


@pytest.mark.parametrize("twist", ["lookahead", None])
def test_smc_sees_pyros_deterministic_as_the_model_does(twist: str | None) -> None:
    def make(stated: Any) -> Any:
        def model() -> None:
            z = lp.sample("z", lp.LMString(LM, "a", stop=".", max_tokens=6))
            n = stated("n", torch.tensor(z.count("b")))
            lp.sample("seen", lp.LMString(LM, f"{'b' * int(n)}"), obs="bb")
            if twist is None:
                lp.potential("few", lambda text: -2.0 * text.count("b") - 0.0 * float(n), z)

        return model

    options = {"method": "smc", "every": 1, "ess_threshold": 1.0, "num_samples": 16, "seed": 3}
    if twist:
        options |= {"twist": twist, "twist_power": 1.0}
    found = [
        lp.infer(make(stated), progress=False, **options)  # type: ignore[arg-type]
        for stated in (lp.deterministic, pyro.deterministic)
    ]
    assert found[0].resampled == found[1].resampled > 1
    assert found[0].samples == found[1].samples
    np.testing.assert_allclose(found[0].log_weights, found[1].log_weights, atol=1e-5)
