"""Under `torch.set_default_dtype(torch.float64)`, ordinary with Pyro, all is as under float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import langppl as lp
from langppl.testing import tiny_lm


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def make_lm() -> Any:
    return tiny_lm("ab. ", merged=["ab", "b."], seed=1)


def story(lm: Any) -> None:
    z = lp.sample("z", lp.LMString(lm, "a", max_tokens=2, temperature=0.8))
    k = lp.sample("k", lp.LMChoice(lm, f"a{z}", ["a", "bb"]))
    lp.sample("y", lp.LMString(lm, f"a{z}{k}"), obs="ab")


def numeric(lm: Any) -> None:
    n = lp.sample("n", dist.Bernoulli(0.3))
    lp.sample("m", dist.Normal(n, 1.0))
    lp.sample("y", lp.LMString(lm, "ab" if float(n) else "b", max_tokens=2), obs="ab")


def log_probs(lm: Any) -> list[float]:
    string = lp.LMString(lm, "a", max_tokens=4, stop=".", temperature=0.7)
    options = lp.LMChoice(lm, "a", ["a", "bb"])
    open_ = lp.LMString(lm, "a")
    found = [string.log_prob("ab."), string.log_prob("b"), open_.log_prob("")]
    return [float(x) for x in [*found, options.log_prob("bb"), *options.log_probs()]]


def by_method(**options: Any) -> Callable[[Any], list[float]]:
    def run(lm: Any) -> list[float]:
        found = lp.infer(story, lm, progress=False, **options)
        return [found.log_evidence, *found.log_weights]

    return run


def trained(objective: str, model: Callable[[Any], None] = story) -> Callable[[Any], list[float]]:
    def run(lm: Any) -> list[float]:
        guide = lp.GFlowNetGuide(lm, rank=2, objective=objective)
        guide.fit(lp.compile(model, lm), steps=3, batch=4, progress=False)
        found = lp.infer(model, lm, guide=guide, num_samples=4, seed=1, progress=False)
        return [*guide.history["loss"], *found.log_weights]

    return run


RUNS: dict[str, Callable[[Any], list[float]]] = {
    "log_prob": log_probs,
    "exact": by_method(method="exact"),
    "importance": by_method(num_samples=10, seed=1),
    "smc": by_method(method="smc", num_samples=10, seed=1),
    "vargrad": trained("vargrad"),
    "tb": trained("tb"),
    "subtb": trained("subtb"),
    "rao_blackwell": trained("rao_blackwell"),
    "forward_kl": trained("forward_kl"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_it_is_as_under_float32(kind: str) -> None:
    expected = RUNS[kind](make_lm())
    torch.set_default_dtype(torch.float64)
    found = RUNS[kind](make_lm())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_heads_learn_beside_numbers_of_float64() -> None:
    """Draws of another float type are other draws."""
    lm = make_lm()
    torch.set_default_dtype(torch.float64)
    found = trained("subtb", numeric)(lm)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("objective", ["subtb", "forward_kl"])
def test_a_model_whose_weights_are_float64(objective: str) -> None:
    expected = trained(objective)(make_lm())
    own = make_lm()
    lm = lp.LM.from_parts(own.model.double(), own.tokenizer, "double")
    np.testing.assert_allclose(trained(objective)(lm), expected, rtol=1e-3, atol=1e-3)
