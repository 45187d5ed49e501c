"""Guides whose proposals SMC could get wrong: Pyro's for numbers, and shares of the prior."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import langppl as lp
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)


def difference() -> None:
    a = lp.sample("a", dist.Normal(0.0, 3.0))
    b = lp.sample("b", dist.Normal(0.0, 3.0))
    lp.sample("z", lp.LMString(LM, "a", max_tokens=1))
    lp.sample("d", dist.Normal(a - b, 0.05), obs=0.0)


def nearby() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 2.2))
    pyro.sample("b", dist.Normal(a, 0.06))


# d = a − b is normal, with variance 3² + 3² + 0.05².
EXACT = -0.5 * math.log(2 * math.pi * (18.0 + 0.05**2))


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_a_pyro_guide_goes_on_from_the_numbers_that_a_particle_has(method: str) -> None:
    guide = lp.GFlowNetGuide(LM, numeric=nearby)
    options = {"ess_threshold": 0.0} if method == "smc" else {}
    found = lp.infer(difference, guide=guide, method=method, num_samples=500, **options)
    assert found.ess > 200  # its b drawn beside another a: 4
    assert found.log_evidence is not None and found.log_evidence_error is not None
    assert abs(found.log_evidence - EXACT) <= 4 * found.log_evidence_error


def test_markov_chains_move_by_it_too() -> None:
    guide = lp.GFlowNetGuide(LM, numeric=nearby)
    found = lp.infer(difference, guide=guide, method="mh", num_samples=400, chains=40, seed=1)
    assert found.chains is not None
    # b beside its own a is taken about every time, a beside its own b never: 1/3 and z's third.
    assert found.chains.acceptance["site"] > 0.4


def story() -> None:
    z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
    lp.sample("end", lp.LMString(LM, f"a{z}"), obs="b")


def test_a_share_of_the_prior_is_not_for_smc() -> None:
    guide = lp.GFlowNetGuide(LM, defensive=0.1)
    with pytest.raises(ValueError, match=r"one of several laws.*defensive=0"):
        lp.infer(story, guide=guide, method="smc", num_samples=8)
    guide.defensive = 0.0
    lp.infer(story, guide=guide, method="smc", num_samples=8)


def test_draws_of_a_trained_guide_are_weighed_by_its_own_log_q() -> None:
    """The guide reads what the prior reads: only the adapter tells the two apart."""
    guide = lp.GFlowNetGuide(LM, rank=2, context=lambda info: info.prompt, defensive=0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in LM.model.named_parameters():
            if f".{guide.adapter}." in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    program = lp.compile(story)
    options: dict[str, Any] = {"method": "smc", "num_samples": 20, "ess_threshold": 0.0}
    found = lp.infer(program, guide=guide, progress=False, **options)
    log_q = guide.log_q(program, found.samples)
    prior = lp.PriorGuide().log_q(program, found.samples)
    assert np.abs(log_q - prior).max() > 0.1
    log_joint = program.log_joint(found.samples).numpy()
    assert found.log_joint == pytest.approx(log_joint, abs=1e-4)
    assert found.log_q == pytest.approx(log_q, abs=1e-4)
    assert found.log_weights == pytest.approx(log_joint - log_q, abs=1e-4)


def scaled() -> None:
    z = lp.sample("z", lp.LMString(LM, "a", max_tokens=1))
    scale = torch.tensor([0.5, 2.0])
    with pyro.plate("two", 2), pyro.poutine.scale(scale=scale):
        lp.sample("y", dist.Normal(float("a" in z), 1.0), obs=torch.tensor([0.1, 0.9]))


@pytest.mark.parametrize("method", ["exact", "importance", "smc", "mh"])
def test_a_scale_of_several_numbers(method: str) -> None:
    found = lp.infer(scaled, method=method, num_samples=400, progress=False)

    def log_likelihood(mean: float) -> float:
        own = dist.Normal(mean, 1.0).log_prob(torch.tensor([0.1, 0.9]))
        return float((own * torch.tensor([0.5, 2.0])).sum())

    program = lp.compile(scaled)
    rows = [{"z": "a"}, {"z": "b"}]
    prior = lp.PriorGuide().log_q(program, rows)
    expected = [p + log_likelihood(m) for p, m in zip(prior, (1.0, 0.0), strict=True)]
    assert program.log_joint(rows) == pytest.approx(expected, abs=1e-5)
    exact = lp.infer(scaled, method="exact", progress=False).log_evidence
    if method in ("importance", "smc"):
        assert exact is not None and found.log_evidence is not None
        # Weights between exp(-2.6) and exp(-2.0): relative error at most 0.3 / 20.
        assert found.log_evidence == pytest.approx(exact, abs=0.06)


def test_policy_gradients_of_a_text_beside_a_number() -> None:
    def model() -> None:
        lp.sample("n", dist.Normal(0.0, 1.0))
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        lp.sample("end", lp.LMString(LM, f"a{z}"), obs="b")

    guide = lp.GFlowNetGuide(LM, objective="rao_blackwell")
    guide.fit(model, steps=2, batch=4, progress=False)
    assert len(guide.history.to_pandas()) == 2
