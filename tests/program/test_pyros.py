"""What of Pyro's statements and handlers a program refuses, and with which words."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoDelta, AutoNormal

import langppl as lp
from langppl.program.randomness import RandomnessWarning
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=2)
XS = torch.tensor([0.3, 1.2, 9.0])


def text(prompt: str = "a") -> lp.LMString:
    return lp.LMString(LM, prompt, stop=".", max_tokens=2)


def infer(model: Any, **options: Any) -> lp.Posterior:
    return lp.infer(model, **{"num_samples": 8, "progress": False, **options})


# -- masks -----------------------------------------------------------------------------------------


def missing(mask: torch.Tensor | bool) -> Callable[[], None]:
    def model() -> None:
        z = lp.sample("z", text())
        with pyro.plate("o", 3):
            normal = dist.Normal(1.0 if "b" in z else -1.0, 1.0)
            pyro.sample("x", normal, obs=XS, obs_mask=mask)

    return model


def test_what_is_missing_of_an_observation_is_refused() -> None:
    model = missing(torch.tensor([True, True, False]))
    with pytest.raises(ValueError, match=r"site 'x_unobserved' .* leave the missing elements out"):
        infer(model)


def test_as_its_message_says_it_is_right() -> None:
    seen = XS[:2]

    def model() -> None:
        z = lp.sample("z", text())
        with pyro.plate("o", 2):
            lp.sample("x", dist.Normal(1.0 if "b" in z else -1.0, 1.0), obs=seen)

    def masked() -> None:
        z = lp.sample("z", text())
        with pyro.plate("o", 3), poutine.mask(mask=torch.tensor([True, True, False])):
            lp.sample("x", dist.Normal(1.0 if "b" in z else -1.0, 1.0), obs=XS)

    found = [infer(m, method="exact").log_evidence for m in (model, masked)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("mask", [False, torch.tensor([True, False])])
def test_a_mask_of_a_latent_real_number_is_refused(mask: Any) -> None:
    def model() -> None:
        with pyro.plate("o", 2), poutine.mask(mask=mask):
            lp.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"site 'mu' .* mask what is observed of it"):
        infer(model)


def test_other_latents_may_be_masked() -> None:
    def model() -> None:
        with poutine.mask(mask=False):
            lp.sample("k", dist.Bernoulli(0.3))
            lp.sample("z", text())
        with poutine.mask(mask=torch.tensor(True)):
            lp.sample("mu", dist.Normal(0.0, 1.0))

    assert infer(model).log_evidence is not None


# -- plates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_turn", [True, False])
def test_rows_that_a_plate_draws_are_refused(in_turn: bool) -> None:
    def model() -> None:
        z = lp.sample("z", text())
        loc = 1.0 if "b" in z else -1.0
        if in_turn:
            for k in pyro.plate("data", 3, subsample_size=2):
                lp.sample(f"x_{k}", dist.Normal(loc, 1.0), obs=XS[k])
        else:
            with pyro.plate("data", 3, subsample_size=2) as rows:
                lp.sample("x", dist.Normal(loc, 1.0), obs=XS[rows])

    with pytest.raises(ValueError, match=r"plate 'data' draws 2 of its 3 rows .* subsample="):
        infer(model)


def test_rows_that_are_given_are_taken() -> None:
    def model(size: int) -> None:
        z = lp.sample("z", text())
        with pyro.plate("data", size, subsample=torch.tensor([0, 1])) as rows:
            lp.sample("x", dist.Normal(1.0 if "b" in z else -1.0, 1.0), obs=XS[rows])

    program = lp.compile(model, 4)
    prior = float(text().log_prob("b."))
    once = float(lp.compile(model, 2).log_joint({"z": "b."})) - prior
    assert float(program.log_joint({"z": "b."})) - prior == pytest.approx(2.0 * once, abs=1e-4)


@pytest.mark.parametrize("in_turn", [True, False])
def test_a_latent_in_some_of_the_rows_is_warned_of(
    in_turn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langppl.warn._said", OrderedDict())

    def model() -> None:
        if in_turn:
            for k in pyro.plate("data", 4, subsample=torch.tensor([0, 1])):
                lp.sample(f"z_{k}", text())
        else:
            with pyro.plate("data", 4, subsample=torch.tensor([0, 1])):
                lp.sample("x", dist.Normal(0.0, 1.0))

    with pytest.warns(UserWarning, match=r"plate 'data', which has 2 of 4 rows") as told:
        infer(model)
    assert len(told) == 1


# -- handlers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("doing", [poutine.do, pyro.do])
def test_pyros_do_of_a_string_says_what_to_write(doing: Any) -> None:
    def model() -> None:
        z = lp.sample("z", text())
        lp.sample("y", text(f"b{z}"))

    mend = re.escape("lp.do(model, {'z': 'b.'})")
    with pytest.raises(TypeError, match=f"sets site 'z' to 'b.' .*{mend}"):
        infer(doing(model, data={"z": "b."}))
    infer(lp.do(model, {"z": "b."}))


def test_pyros_do_of_a_number_stays() -> None:
    def model() -> None:
        lp.sample("z", text())
        mu = lp.sample("mu", dist.Normal(0.0, 1.0))
        lp.sample("x", dist.Normal(mu, 1.0), obs=torch.tensor(0.5))

    found = infer(poutine.do(model, data={"mu": torch.tensor(0.5)}), num_samples=400)
    truth = float(dist.Normal(0.5, 1.0).log_prob(torch.tensor(0.5)))
    assert found.log_evidence == pytest.approx(truth, abs=1e-4)


def chain() -> str:
    z = lp.sample("z", text())
    y = lp.sample("y", text(f"b{z}"))
    lp.sample("seen", lp.LMString(LM, f"a{z}{y}"), obs="ab")
    return z


def aside() -> float:
    lp.sample("z", text())
    return float(lp.sample("b", dist.Bernoulli(0.5)))


def test_a_latent_that_block_hides_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"site 'y' is hidden by poutine.block, .* leave it visible"
    ):
        infer(poutine.block(chain, hide=["y"]))
    with pytest.warns(RandomnessWarning, match=r"site 'b' is hidden by poutine.block"):
        infer(poutine.block(aside, hide=["b"]))


def test_one_that_it_hid_in_another_model_is_not() -> None:
    with pytest.raises(ValueError, match="'y'"):
        infer(poutine.block(chain, hide=["y"]))

    def noisy() -> None:
        lp.sample("z", text())
        lp.sample("x", dist.Normal(torch.rand(()), 1.0), obs=torch.tensor(0.5))

    with pytest.raises(ValueError, match="draws from the generator of torch") as caught:
        infer(noisy)
    assert "block" not in str(caught.value)


def test_an_observation_may_be_hidden() -> None:
    found = infer(poutine.block(chain, hide=["seen"]), method="exact")
    assert found.log_evidence == pytest.approx(0.0, abs=1e-4)


# -- what takes tensors ----------------------------------------------------------------------------


def with_number() -> None:
    lp.sample("z", text())
    lp.sample("mu", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("use", "mend"),
    [
        (lambda: text().mask(False), "with pyro.poutine.mask"),
        (lambda: text().expand([2]), "a site of its own"),
        (lambda: text().to_event(0), "a site of its own"),
        (lambda: text().event_dim, "a site of its own"),
        (lambda: lp.LMChoice(LM, "a", ["a", "b"]).event_shape, "a site of its own"),
        (lambda: infer(lambda: pyro.deterministic("s", chain())), "lp.deterministic"),  # type: ignore[arg-type]
        (lambda: Predictive(with_number, num_samples=2)(), "posterior.predict"),
        (lambda: AutoNormal(with_number)(), r"poutine.block\(model, hide="),
        (lambda: AutoDelta(with_number)(), r"poutine.block\(model, hide="),
        (lambda: infer(with_number, guide=AutoNormal(with_number)), r"poutine.block\(model"),
    ],
)
def test_what_takes_tensors_says_what_to_write(use: Callable[[], Any], mend: str) -> None:
    with pytest.raises(AttributeError, match=mend):
        use()


def test_what_neither_has_is_missing_as_before() -> None:
    assert not hasattr(text(), "event_dim") and not hasattr(lp.Text("a"), "shape")
    with pytest.raises(AttributeError, match=r"^'LMString' object has no attribute 'colour'$"):
        _ = text().colour  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"^'Text' object has no attribute 'colour'$"):
        _ = lp.Text("a").colour  # type: ignore[attr-defined]
    assert math.isfinite(float(text().log_prob("b.")))
