"""What Pyro's guides must keep to, for numbers alone and as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide

import langppl as lp
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=2)
XS = torch.tensor([0.3, 1.2, -0.5])


def model(xs: torch.Tensor) -> None:
    z = lp.sample("z", lp.LMString(LM, "a", stop=".", max_tokens=2))
    mu = lp.sample("mu", dist.Normal(1.0 if "b" in z else -1.0, 1.0))
    with pyro.plate("o", 3):
        lp.sample("x", dist.Normal(mu, 1.0), obs=xs)


def numbers_alone(fn: Callable[..., Any]) -> lp.guides.Guide:
    return lp.GFlowNetGuide(LM, numeric=fn)


WAYS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "numeric": numbers_alone,
    "function": lp.FunctionGuide,
}


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["AutoNormal", "AutoDiagonalNormal", "AutoDelta"])
def test_an_autoguide_is_refused_with_what_to_write(kind: str, way: str) -> None:
    fn = getattr(autoguide, kind)(poutine.block(model, hide=["z"]))
    with pytest.raises(ValueError, match=rf"(?s)guide '{kind}' draws site 'mu' .*pyro.param\("):
        lp.infer(model, XS, guide=WAYS[way](fn), num_samples=4, progress=False)


def with_delta() -> None:
    eps = pyro.sample("eps", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Delta(eps * 0.7))


def with_factor() -> None:
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.tensor(-1.0))


def with_scale() -> None:
    with poutine.scale(scale=0.5):
        pyro.sample("mu", dist.Normal(0.0, 1.0))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "delta": (with_delta, "a guide needs a density"),
    "kind": (lambda: pyro.sample("mu", dist.Poisson(2.0)), "a guide needs a density"),
    "shape": (
        lambda: pyro.sample("mu", dist.Normal(0.0, 1.0).expand([3]).to_event(1)),
        r"'mu' with shape \(3,\), and the model with shape \(\)",
    ),
    "observes": (
        lambda: pyro.sample("mu", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3)),
        "observes 'mu'; a guide draws latents",
    ),
    "factor": (with_factor, "has a factor at 'f'"),
    "scale": (with_scale, "draws 'mu' under Pyro's scale"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_guide_is_refused(kind: str, way: str) -> None:
    body, message = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        guide = WAYS[way](lambda xs: body())
        lp.infer(model, XS, guide=guide, num_samples=4, progress=False)


@pytest.mark.parametrize("kind", WRONG)
def test_nor_does_it_know_how_likely_values_are(kind: str) -> None:
    body, message = WRONG[kind]
    values = {"z": "b", "mu": 0.3} | ({"eps": 0.4} if kind == "delta" else {})
    program = lp.compile(model, XS)
    with pytest.raises(ValueError, match=message):
        numbers_alone(lambda xs: body()).log_q(program, [values])


@pytest.mark.parametrize("way", WAYS)
def test_a_misspelt_number_is_told_once(way: str) -> None:
    def guide(xs: torch.Tensor) -> None:
        pyro.sample("mut", dist.Normal(0.0, 1.0))

    with pytest.warns(lp.InferenceWarning, match="'mut', .* did you mean 'mu'") as told:
        lp.infer(model, XS, guide=WAYS[way](guide), num_samples=4, progress=False)
    assert len([w for w in told if "mut" in str(w.message)]) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_guide_with_parameters_and_a_site_of_its_own_is_right(way: str) -> None:
    def guide(xs: torch.Tensor) -> None:
        eps = pyro.sample("own", dist.Normal(0.0, 0.3))
        pyro.sample("mu", dist.Normal(eps + pyro.param("at", torch.tensor(0.2)), 0.8))

    truth = lp.infer(model, XS, num_samples=3000, progress=False)
    found = lp.infer(model, XS, guide=WAYS[way](guide), num_samples=3000, progress=False)
    error = truth.log_evidence_error + found.log_evidence_error
    assert error < 0.1
    assert found.log_evidence == pytest.approx(truth.log_evidence, abs=3 * error)


def test_the_later_sites_of_a_loop_are_not_misspelt() -> None:
    def loop() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", stop=".", max_tokens=3))
        for k in range(len(z)):
            lp.sample(f"n_{k}", dist.Normal(0.0, 1.0))

    def guide() -> None:
        for k in range(40):
            pyro.sample(f"n_{k}", dist.Normal(0.0, 1.0))

    # Nothing is warned of, which would be an error here.
    lp.infer(loop, guide=numbers_alone(guide), num_samples=4, progress=False)
