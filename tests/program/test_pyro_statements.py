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


@pytest.mark.parametrize("defensive", [0.0, 0.3])
def test_a_scale_counts_in_the_joint_and_not_in_the_proposal(defensive: float) -> None:
    def scaled() -> None:
        with poutine.scale(scale=0.5):
            z = lp.sample("z", BASE)
        lp.sample("y", lp.LMString(LM, f"a{z}"), obs="b")

    # Untrained and with the model's own prompt, a guide proposes as the prior does.
    guide = lp.GFlowNetGuide(LM, rank=2, context=lambda info: info.prompt, defensive=defensive)
    found = lp.infer(scaled, guide=guide if defensive else "prior", num_samples=30, progress=False)
    log_p = [float(BASE.log_prob(z)) for z in found["z"]]
    seen = [float(lp.LMString(LM, f"a{z}").log_prob("b")) for z in found["z"]]
    joint = [0.5 * p + s for p, s in zip(log_p, seen, strict=True)]
    assert found.log_joint == pytest.approx(joint, abs=1e-4)
    assert found.log_q == pytest.approx(log_p, abs=1e-4)
    weights = [j - p for j, p in zip(joint, log_p, strict=True)]
    assert found.log_weights == pytest.approx(weights, abs=1e-4)


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


BASE = lp.LMString(LM, "a", max_tokens=2)
TEMPERED = lp.Tempered(BASE, 0.25)


def tempered_by(sample: Any, obs: str | None = None, scale: float = 1.0) -> Any:
    def model() -> None:
        a = lp.sample("a", lp.LMChoice(LM, "a", ["a", "b"]))
        for i in pyro.plate("strings", 1):
            with poutine.scale(scale=scale):
                z = sample(f"z{i}", TEMPERED, obs=obs)
            lp.sample(f"y{i}", lp.LMString(LM, f"{a}{z}"), obs="b")

    return model


@pytest.mark.parametrize("obs", [None, "ab"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_pyros_sample_tempers_as_langppls_does(obs: str | None, scale: float) -> None:
    ours, pyros = (lp.compile(tempered_by(s, obs, scale)) for s in (lp.sample, pyro.sample))
    assert list(pyros.sites) == list(ours.sites) == ["a", "z0", "z0/tempered", "y0"]
    assert pyros.latents == ours.latents and pyros.is_static
    rows = [{"a": "b", **({} if obs else {"z0": z})} for z in ("ab", "b", "x")]
    np.testing.assert_array_equal(pyros.log_joint(rows), ours.log_joint(rows))
    options: dict[str, Any] = {"num_samples": 16, "progress": False}
    for method in ("importance", "smc", "mh", "exact"):
        found = [lp.infer(p, method=method, **options) for p in (ours, pyros)]
        assert found[1].samples == found[0].samples
        np.testing.assert_array_equal(found[1].log_weights, found[0].log_weights)


def test_pyros_tempered_site_has_the_evidence_of_the_power() -> None:
    plain = lp.infer(lambda: lp.sample("z", BASE), method="exact", progress=False)
    powers = {z: p**4 for z, p in plain.probabilities("z").items()}
    program = lp.compile(lambda: pyro.sample("z", TEMPERED))
    exact = lp.infer(program, method="exact", progress=False)
    # The texts of this LM have one tokenisation each.
    assert exact.log_evidence == pytest.approx(math.log(sum(powers.values())), abs=1e-5)
    with pytest.raises(ValueError, match="site 'z/tempered' is a factor"):
        program.simulate(1)
    guide = lp.GFlowNetGuide(LM, rank=4)
    guide.fit(program, steps=20, batch=16, learning_rate=2e-2, progress=False)
    drawn = lp.infer(program, guide=guide, num_samples=64, progress=False)
    assert drawn.log_evidence == pytest.approx(exact.log_evidence, abs=0.3)
    q = np.exp(guide.log_q(program, [{"z": exact.mode("z")}]))
    # Untempered it has the prior's probability of it.
    truth = exact.probabilities("z")[exact.mode("z")]
    before = plain.probabilities("z")[exact.mode("z")]
    assert q[0] > (truth + before) / 2


@pytest.mark.parametrize("changed", ["block", "do", "condition"])
def test_handlers_see_a_tempered_site_of_pyro_as_ours(changed: str) -> None:
    def change(model: Any) -> Any:
        if changed == "block":
            return poutine.block(model, hide=["z0"])
        return getattr(lp, changed)(model, {"z0": "ab"})

    obs = "ab" if changed == "block" else None
    programs = [lp.compile(change(tempered_by(s, obs))) for s in (lp.sample, pyro.sample)]
    assert list(programs[0].sites) == list(programs[1].sites)
    assert ("z0/tempered" in programs[1].sites) == (changed == "condition")
    found = [float(p.log_joint({"a": "a"})) for p in programs]
    assert found[0] == found[1]


def test_a_tempered_site_of_pyro_in_a_vectorised_plate() -> None:
    def model() -> None:
        with pyro.plate("strings", 2):
            pyro.sample("z", TEMPERED)

    with pytest.raises(ValueError, match="use a sequential plate"):
        lp.compile(model)
