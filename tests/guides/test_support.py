"""Guides whose rules leave out what a model allows: no weight shows it, so a warning does."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pyro.distributions as dist
import pytest
import torch

import langppl as lp
from langppl.guides.support import left_out
from langppl.testing import tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore::langppl.JoinWarning")

LM = tiny_lm("ab.", seed=2)
FORM = lp.one_of(["a", "b"])
RULES: dict[str, Any] = {"stop": ".", "max_tokens": 3}


def model() -> None:
    z = lp.sample("z", lp.LMString(LM, "a", **RULES))
    lp.sample("ending", lp.LMString(LM, f"{z}"), obs="b")


def string(**rules: Any) -> lp.LMString:
    return lp.LMString(LM, "a", **{**RULES, **rules})


def run(guide: Any, of: Any = model) -> lp.Posterior:
    return lp.infer(of, guide=guide, num_samples=8, progress=False)


NARROW = {
    "strings of more tokens (max_tokens=2, the model's: 3)": string(max_tokens=2),
    "strings of fewer tokens (min_tokens=2, the model's: 1)": string(min_tokens=2),
    "strings that go on after 'a' (its stop)": string(stop=[".", "a"]),
    "tokens such as 'b' (its allow or ban)": string(ban="b"),
    "strings outside of its grammar": string(grammar=FORM),
    "all strings but ['a', 'b']": lp.LMChoice(LM, "a", ["a", "b"]),
}
WIDE = [
    string(),
    string(max_tokens=4),
    string(min_tokens=0),
    string(stop=[".", "a."]),  # what holds it was cut before it
    string(temperature=1.5),
    string(truncate="reject"),  # the model's rules say what becomes of a draw
    string(allow=["a", "b", "."]),  # all that there is
]


@pytest.mark.parametrize("what", NARROW)
def test_a_function_guide_that_leaves_something_out_says_so(what: str) -> None:
    def narrow() -> None:
        lp.sample("z", NARROW[what])

    with pytest.warns(lp.InferenceWarning) as found:
        run(narrow)
    said = [str(w.message) for w in found if "cannot draw, at site 'z'" in str(w.message)]
    assert len(said) == 1 and what in said[0]


@pytest.mark.parametrize("own", WIDE, ids=lambda fn: repr(fn.rules))
def test_rules_that_leave_nothing_out(own: lp.LMString) -> None:
    assert left_out(string(), own, conditioned=False) is None


def test_what_is_left_out_is_missing_from_the_evidence() -> None:
    def narrow() -> None:
        lp.sample("z", string(ban="b"))

    exact = lp.infer(model, method="exact")
    without = math.log(sum(p for t, p in exact.probabilities("z").items() if "b" not in t))
    with pytest.warns(lp.InferenceWarning, match="tokens such as 'b'"):
        found = lp.infer(model, guide=narrow, num_samples=2000, progress=False)
    # The error of 2,000 weighted draws is below 0.05 nats here.
    assert found.log_evidence == pytest.approx(exact.log_evidence + without, abs=0.1)
    assert without < -0.2


def test_a_string_that_the_program_conditions_may_be_narrow() -> None:
    def conditioned() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=3))
        lp.factor("form", lp.log_matches(z, FORM))

    def narrow() -> None:
        lp.sample("z", lp.LMString(LM, "a", max_tokens=3, grammar=FORM))

    for guide in (narrow, lp.MaskedGuide({"z": FORM})):
        run(guide, conditioned)
    for _ in range(4):  # each guide says it, also one in the place of another
        with pytest.warns(lp.InferenceWarning, match=r"MaskedGuide keeps site 'z' to one_of"):
            run(lp.MaskedGuide({"z": FORM}))


def test_a_mixture_draws_what_one_guide_leaves_out() -> None:
    def narrow() -> None:
        lp.sample("z", string(ban="b"))

    masked = lp.MaskedGuide({"z": FORM})
    for guide in ([narrow, "prior"], [masked, "prior"], [narrow, masked, "prompted"]):
        run(lp.MixtureGuide(guide))
    with pytest.warns(lp.InferenceWarning):
        run(lp.MixtureGuide([narrow, masked]))


def test_choices_and_numbers() -> None:
    def choosing() -> None:
        lp.sample("label", lp.LMChoice(LM, "a", ["a", "b"]))
        lp.sample("rate", dist.Beta(2.0, 2.0))

    def wide() -> None:
        lp.sample("label", lp.LMChoice(LM, "b", ["b", "a", "."]))
        lp.sample("rate", dist.Uniform(0.0, 1.0))

    def narrow() -> None:
        lp.sample("label", lp.LMChoice(LM, "b", ["b"]))
        lp.sample("rate", dist.Uniform(0.0, 0.5))

    run(wide, choosing)
    with pytest.warns(lp.InferenceWarning) as found:
        run(narrow, choosing)
    said = " ".join(str(w.message) for w in found)
    assert (
        "the options ['a']" in said and "numbers outside of 0 to 0.5 (the model's: 0 to 1)" in said
    )


PAIR = dist.Beta(torch.ones(2), torch.ones(2)).to_event(1)


@pytest.mark.parametrize(
    ("fn", "own", "is_less"),
    [
        (dist.Normal(0.0, 1.0), dist.Normal(3.0, 1.0), False),
        (dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0), True),
        (dist.Gamma(1.0, 1.0), dist.Exponential(1.0), False),
        (PAIR, dist.Uniform(torch.tensor([0.0, 0.2]), 1.0).to_event(1), True),
        (PAIR, dist.Uniform(torch.zeros(2), 1.0).to_event(1), False),
        (dist.Categorical(torch.ones(3)), dist.Categorical(torch.ones(2)), True),
        (dist.Categorical(torch.ones(3)), dist.Categorical(torch.ones(3)), False),
        (dist.Dirichlet(torch.ones(3)), dist.Dirichlet(torch.ones(3)), False),
    ],
    ids=repr,
)  # fmt: skip
def test_numbers_by_their_support(fn: Any, own: Any, is_less: bool) -> None:
    assert (left_out(fn, own, conditioned=False) is not None) == is_less


def test_the_numbers_of_a_trained_guide() -> None:
    def numbered() -> None:
        rate = lp.sample("rate", dist.Beta(2.0, 2.0))
        lp.sample("z", lp.LMChoice(LM, "a" if rate > 0.5 else "b", ["a", "b"]))

    def narrow() -> None:
        lp.sample("rate", dist.Uniform(0.0, 0.5))

    guide = lp.GFlowNetGuide(LM, numeric=narrow)
    with pytest.warns(lp.InferenceWarning, match="cannot draw, at site 'rate', numbers outside"):
        run(guide, numbered)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(guide, numbered)  # it is said once
