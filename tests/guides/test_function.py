"""Guides that are written as functions, against enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import langppl as lp
from langppl.guides import FunctionGuide
from langppl.testing import tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore::langppl.JoinWarning")

LM = tiny_lm("ab.", seed=2, sharpness=0.1)
OTHER = tiny_lm("ab.x", seed=3)
MANY: dict[str, Any] = {"num_samples": 1500, "progress": False}


def story(ending: str) -> None:
    one = lp.sample("one", lp.LMString(LM, "a", stop=".", max_tokens=2))
    two = lp.sample("two", lp.LMString(LM, f"b{one}", max_tokens=1))
    lp.sample("ending", lp.LMString(LM, f"{one}{two}b"), obs=ending)


def forwards(ending: str) -> None:
    one = lp.sample("one", lp.LMString(LM, f"{ending}b", stop=".", max_tokens=2, temperature=1.5))
    lp.sample("two", lp.LMString(LM, f"{ending}{one}", max_tokens=1))


def backwards(ending: str) -> None:
    two = lp.sample("two", lp.LMString(LM, f"{ending}", max_tokens=1))
    lp.sample("one", lp.LMString(LM, f"{two}{ending}", stop=".", max_tokens=2))


def one_alone(ending: str) -> None:
    lp.sample("one", lp.LMString(LM, f"{ending}b", stop=".", max_tokens=2))


def with_more(ending: str) -> None:
    coin = lp.sample("coin", dist.Bernoulli(0.5))
    prompt = "a" if coin > 0.5 else "b."
    lp.sample("one", lp.LMString(LM, prompt, stop=".", max_tokens=2))


def branches(ending: str) -> None:
    k = lp.sample("k", dist.Bernoulli(0.4))
    text = lp.sample("z", lp.LMString(LM, "a", max_tokens=1)) if k > 0.5 else "b"
    lp.sample("ending", lp.LMString(LM, f"{text}a"), obs=ending)


def of_branches(ending: str) -> None:
    lp.sample("k", dist.Bernoulli(0.7))
    lp.sample("z", lp.LMString(LM, f"b{ending}", max_tokens=1))


def exact_of(model: Callable[..., Any]) -> lp.Posterior:
    return lp.infer(model, "a", method="exact", progress=False)


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (story, forwards),
        (story, backwards),
        (story, one_alone),
        pytest.param(
            story, with_more, marks=pytest.mark.filterwarnings("ignore:the guide 'with_more' draws")
        ),
        (branches, of_branches),
    ],
)
def test_the_posterior_is_the_models(model: Callable[..., Any], guide: Callable[..., Any]) -> None:
    if model is story:
        truth = exact_of(story)
        expected, site = truth.probabilities("one"), "one"
        log_evidence = truth.log_evidence
    else:
        # A coin by hand: its two branches weigh .4 and .6.
        shown = [lp.LMString(LM, f"{z}a") for z in ("a", "b", ".", "")]
        own = lp.LMString(LM, "a", max_tokens=1)
        heads = sum(
            0.4 * math.exp(own.log_prob(z) + fn.log_prob("a"))
            for z, fn in zip(("a", "b", ".", ""), shown, strict=True)
        )
        tails = 0.6 * math.exp(shown[1].log_prob("a"))
        expected, site = {1.0: heads / (heads + tails), 0.0: tails / (heads + tails)}, "k"
        log_evidence = math.log(heads + tails)
    found = lp.infer(model, "a", guide=guide, seed=1, **MANY)
    assert found.guide == guide.__name__
    assert found.log_evidence_error is not None and 0.0 < found.log_evidence_error < 0.05
    assert abs(found.log_evidence - log_evidence) < 4 * found.log_evidence_error
    shares = found.probabilities(site)
    # With an ESS of at least 400, four standard errors of a share are at most 0.1.
    assert found.ess > 400
    assert max(abs(shares.get(k, 0.0) - p) for k, p in expected.items()) < 0.1


def test_log_q_is_that_of_the_sites() -> None:
    program = lp.compile(story, "a")
    rows = exact_of(story).samples
    for guide in (forwards, backwards):
        log_q = FunctionGuide(guide).log_q(program, rows)
        assert np.exp(log_q).sum() == pytest.approx(1.0, abs=1e-4)
    row = {"one": "b.", "two": "a"}
    by_hand = float(
        lp.LMString(LM, "a", max_tokens=1).log_prob("a")
        + lp.LMString(LM, "aa", stop=".", max_tokens=2).log_prob("b.")
    )
    assert FunctionGuide(backwards).log_q(program, [row])[0] == pytest.approx(by_hand, abs=1e-5)


def test_a_chain_moves_by_it() -> None:
    truth = exact_of(story).probabilities("one")
    found = lp.infer(
        story, "a", guide=forwards, method="mh", chains=64, num_samples=2560, progress=False
    )
    assert found.chains.acceptance["site"] > 0.05
    shares = found.probabilities("one")
    assert found.ess > 400
    assert max(abs(shares.get(k, 0.0) - p) for k, p in truth.items()) < 0.1


def test_what_is_not_known_of_it_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"draws 'two' before 'one', and what it drew there"):
        lp.infer(story, "a", guide=backwards, method="mh", num_samples=8, progress=False)
    program = lp.compile(story, "a")
    with pytest.raises(ValueError, match="draws 'coin' before 'one'"):
        FunctionGuide(with_more).log_q(program, [{"one": "b.", "two": "a"}])
    with pytest.raises(ValueError, match=r"'forwards' is a function, which draws whole .*\"smc\""):
        lp.infer(story, "a", guide=forwards, method="smc", num_samples=8, progress=False)


def test_everything_that_takes_a_guide_takes_it() -> None:
    few: dict[str, Any] = {"num_samples": 8, "progress": False}
    (many,) = lp.infer_many(story, [("a",)], guide=forwards, **few)
    assert many.guide == "forwards"
    found = lp.compare(story, "a", guides=["prior", forwards], **few)
    assert not found.errors and [r["name"] for r in found.rows()] == ["prior", "forwards"]
    bounds = lp.evidence_bounds(story, "a", guide=forwards, num_observations=3, **few)
    assert "forwards" in str(bounds)
    lp.calibrate(story, "a", guide=forwards, simulations=4, draws=3, **few)
    mixture = lp.MixtureGuide([forwards, "prior"], shares=[0.5, 0.5])
    mixed = lp.infer(story, "a", guide=mixture, seed=1, **MANY)
    truth = exact_of(story).log_evidence
    assert abs(mixed.log_evidence - truth) < 4 * mixed.log_evidence_error
    draws = FunctionGuide(forwards).sample(story, "a", n=5)
    assert all({"one", "two"} <= set(draw) for draw in draws)


def test_numbers_in_a_plate() -> None:
    data = torch.tensor([0.5, 1.5, -0.2])

    def model() -> None:
        with pyro.plate("rows", 3):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=data)

    def guide() -> None:
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(data / 2, math.sqrt(0.5)))

    found = lp.infer(model, guide=guide, num_samples=20, progress=False)
    expected = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(data).sum())
    # The posterior itself: each draw has the same weight.
    assert np.ptp(np.asarray(found.log_weights)) < 1e-5
    assert found.log_evidence == pytest.approx(expected, abs=1e-5)


def observing(ending: str) -> None:
    lp.sample("one", lp.LMString(LM, "a"), obs=ending)


def factoring(ending: str) -> None:
    lp.factor("f", -1.0)


def of_another_lm(ending: str) -> None:
    lp.sample("one", lp.LMString(OTHER, "a", max_tokens=2))


def of_a_number(ending: str) -> None:
    lp.sample("one", dist.Normal(0.0, 1.0))


def scaled(ending: str) -> None:
    with pyro.poutine.scale(scale=2.0):
        one_alone(ending)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (observing, "'observing' observes 'one'; a guide draws latents"),
        (factoring, "'factoring' has a factor at 'f'"),
        (of_another_lm, "must have the same tokenizer"),
        (of_a_number, "draws a number at site 'one', and the model a string"),
        (scaled, "draws 'one' under Pyro's scale or mask"),
    ],
)
def test_functions_that_are_no_guides(guide: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.infer(story, "a", guide=guide, num_samples=4, progress=False)


def test_an_option_has_one_spelling() -> None:
    def choice(ending: str) -> None:
        one = lp.sample("one", lp.LMChoice(LM, "a", ["ab", "b"]))
        lp.sample("ending", lp.LMString(LM, one), obs=ending)

    def good(ending: str) -> None:
        lp.sample("one", lp.LMChoice(LM, ending, ["b", "ab"]))

    with pytest.raises(ValueError, match="spells an option in several ways"):
        lp.infer(choice, "a", guide=one_alone, num_samples=4, progress=False)
    found = lp.infer(choice, "a", guide=good, seed=1, **MANY)
    truth = lp.infer(choice, "a", method="exact", progress=False)
    assert abs(found.log_evidence - truth.log_evidence) < 4 * found.log_evidence_error


def test_names_that_no_latent_has() -> None:
    def misspelt(ending: str) -> None:
        lp.sample("oen", lp.LMString(LM, "a", max_tokens=2))

    with pytest.warns(lp.InferenceWarning, match=r"draws 'oen', .* did you mean 'one'\?"):
        lp.infer(story, "a", guide=misspelt, num_samples=4, progress=False)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (3, "a guide is a name, a Guide or a function, got 3"),
        (lp.GFlowNetGuide, r"the class; make one: GFlowNetGuide\(...\)"),
        (lp.compile(story, "a"), "a guide is a name, a Guide or a function"),
    ],
)
def test_what_is_no_guide(guide: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        lp.infer(story, "a", guide=guide, progress=False)
    with pytest.raises(TypeError, match=message):
        lp.MixtureGuide([guide, "prior"])


def mixed_kinds(ending: str) -> None:
    u = lp.sample("u", dist.Bernoulli(0.3))
    z = lp.sample("z", lp.LMString(LM, "a" if u > 0.5 else "b", max_tokens=1))
    lp.sample("ending", lp.LMString(LM, f"{z}a"), obs=ending)


def z_alone(ending: str) -> None:
    lp.sample("z", lp.LMString(LM, f"{ending}b", max_tokens=1))


def test_a_latent_that_it_never_draws_may_come_first() -> None:
    importance = lp.infer(mixed_kinds, "a", guide=z_alone, seed=1, **MANY)
    mixture = lp.infer(mixed_kinds, "a", guide=lp.MixtureGuide([z_alone, "prior"]), seed=2, **MANY)
    prior = lp.infer(mixed_kinds, "a", seed=3, **MANY)
    for found in (importance, mixture):
        error = math.hypot(found.log_evidence_error, prior.log_evidence_error)
        assert abs(found.log_evidence - prior.log_evidence) < 4 * error
    chain = lp.infer(
        mixed_kinds, "a", guide=z_alone, method="mh", chains=64, num_samples=1920, progress=False
    )
    assert chain.expect("u") == pytest.approx(importance.expect("u"), abs=0.1)


def test_one_that_draws_in_another_order_by_what_it_has_drawn_is_told() -> None:
    def by_value(ending: str) -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=1))
        if z == "a":
            lp.sample("u", dist.Bernoulli(0.9))

    guide = lp.MixtureGuide([by_value, "prior"])
    with pytest.raises(ValueError, match="draws 'z' before 'u'"):
        lp.infer(mixed_kinds, "a", guide=guide, **MANY)


def test_parameters_of_pyro_leave_no_graph_behind() -> None:
    def model() -> None:
        p = lp.sample("p", dist.Normal(0.0, 1.0))
        lp.sample("y", dist.Normal(p, 1.0), obs=1.0)

    def guide() -> None:
        mean = pyro.param("test_function_mean", torch.tensor(0.5))
        lp.sample("p", dist.Normal(mean, 0.7))

    for method in ("importance", "mh"):
        found = lp.infer(model, guide=guide, method=method, num_samples=64, progress=False)
        assert not found.samples[0]["p"].requires_grad


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), r"with shape \(3,\), and the model"),
        (lambda: dist.Delta(torch.tensor(0.5)), "a guide needs a density"),
        (lambda: dist.Poisson(1.0), "a guide needs a density"),
    ],
)
def test_numbers_without_a_density_over_the_models(fn: Callable[[], Any], message: str) -> None:
    def model() -> None:
        p = lp.sample("p", dist.Normal(0.0, 1.0))
        lp.sample("y", dist.Normal(p, 1.0), obs=1.0)

    def guide() -> None:
        lp.sample("p", fn())

    with pytest.raises(ValueError, match=message):
        lp.infer(model, guide=guide, num_samples=4, progress=False)


@pytest.mark.filterwarnings("ignore:the guide 'stops' cannot draw")
def test_a_stop_that_the_model_lacks_gives_strings_two_spellings() -> None:
    lm = tiny_lm("ab.", seed=5, merged=[".b", "a.b"])

    def model() -> None:
        z = lp.sample("z", lp.LMString(lm, "a", max_tokens=2))
        lp.factor("f", 0.0 if z == "a." else -math.inf)

    def stops() -> None:
        lp.sample("z", lp.LMString(lm, "a", max_tokens=2, stop="."))

    # "a." is "a", "." and the token "a.b", which goes on after the guide's stop.
    for method in ("importance", "mh"):
        with pytest.raises(ValueError, match="past a stop that the model's site has not") as found:
            lp.infer(model, guide=stops, method=method, num_samples=400, progress=False)
        assert "'z'" in str(found.value)
