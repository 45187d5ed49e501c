"""Mixtures of guides, against enumeration and against the guides that they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest

import langppl as lp
from langppl import LMChoice, LMString, MaskedGuide, MixtureGuide, PriorGuide, PromptedGuide
from langppl.guides import Guide
from langppl.testing import check_guide, check_log_q, tiny_lm

LM = tiny_lm("ab.0123456789", seed=1, merged=["ab", "b."])
OTHER = tiny_lm("ab.", seed=2)
RULES: dict[str, Any] = {"stop": ".", "max_tokens": 2, "allow": ["a", "b", "."]}
ONLY_A = lp.regex("a*\\.")


def story(truncate: Any = "keep") -> None:
    kind = lp.sample("kind", LMChoice(LM, "a", ["a", "b"]))
    text = lp.sample("text", LMString(LM, f"b{kind}", truncate=truncate, **RULES))
    lp.sample("end", LMString(LM, f"{kind}{text}"), obs="ab")


def branch() -> None:
    first = lp.sample("first", LMString(LM, "ab", max_tokens=2, allow=["a", "b"]))
    if "a" in first:
        second = lp.sample("second", LMString(OTHER, "a", max_tokens=2))
        lp.sample("end", LMString(LM, f"{first}{second}"), obs="b")
    else:
        lp.sample("end", LMString(LM, f"{first}a"), obs="b")


def numbers() -> None:
    p = lp.sample("p", dist.Beta(2.0, 3.0))
    text = lp.sample("text", LMString(LM, "a" if p < 0.5 else "b", **RULES))
    lp.sample("x", dist.Normal(p, 0.2), obs=0.7)
    lp.sample("end", LMString(LM, f"a{text}"), obs="b")


@cache
def taught(model: Callable[..., None], seed: int = 1, defensive: float = 0.0) -> lp.GFlowNetGuide:
    guide = lp.GFlowNetGuide(LM, seed=seed, defensive=defensive)
    return guide.fit(model, steps=3, batch=8, learning_rate=1e-2, progress=False)


MIXTURES: dict[str, Callable[[Callable[..., None]], MixtureGuide]] = {
    "two untrained": lambda _: MixtureGuide(["prior", "prompted"], [0.3, 0.7]),
    "trained": lambda model: MixtureGuide([taught(model), "prior"], [0.8, 0.2]),
    "trained twice": lambda model: MixtureGuide([taught(model), taught(model, seed=2)]),
    "defensive": lambda model: MixtureGuide([taught(model, defensive=0.3), PromptedGuide()]),
    "nested": lambda model: MixtureGuide(
        [MixtureGuide([taught(model), "prior"]), "prompted"], [0.6, 0.4]
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("truncate", ["keep", "reject"])
def test_it_draws_with_the_probability_that_it_says(name: str, truncate: str) -> None:
    check_guide(MIXTURES[name](story), story, truncate, samples=300)


@pytest.mark.parametrize("name", MIXTURES)
def test_latents_that_come_and_go(name: str) -> None:
    check_guide(MIXTURES[name](branch), branch, samples=300)


@pytest.mark.parametrize("name", MIXTURES)
def test_numbers_beside_strings(name: str) -> None:
    check_log_q(MIXTURES[name](numbers), numbers, samples=30)


def test_it_is_the_sum_of_its_guides_over_whole_executions() -> None:
    parts: list[Guide] = [taught(story), taught(story, seed=2), PriorGuide()]
    shares = [0.5, 0.3, 0.2]
    program = lp.compile(story)
    rows = program.simulate(20, lengths={"end": 1})
    own = np.array(
        [math.log(s) + g.log_q(program, rows) for s, g in zip(shares, parts, strict=True)]
    )
    expected = np.logaddexp.reduce(own, axis=0)
    # Not what guides mixed anew at each latent would have.
    assert MixtureGuide(parts, shares).log_q(program, rows) == pytest.approx(expected, abs=1e-5)
    assert (expected >= PriorGuide().log_q(program, rows) + math.log(0.2) - 1e-5).all()


def masked_story() -> None:
    z = lp.sample("z", LMString(LM, "b", **RULES))
    lp.sample("end", LMString(LM, f"b{z}"), obs="ab")


def test_each_guide_has_its_share_of_the_draws() -> None:
    program = lp.compile(masked_story)
    masked = MaskedGuide({"z": ONLY_A})

    def share_inside(guide: Guide) -> float:
        posterior = lp.infer(program, guide=guide, num_samples=2000, progress=False)
        return float(np.mean([set(s["z"]) <= {"a", "."} for s in posterior.samples]))

    with pytest.warns(lp.InferenceWarning, match="nothing in the program conditions it"):
        assert share_inside(masked) == 1.0
    of_prior = share_inside(PriorGuide())
    assert of_prior < 0.6
    found = share_inside(MixtureGuide([masked, "prior"], [0.75, 0.25]))
    # Four standard errors of both shares.
    error = 4 * math.sqrt(0.25 / 2000) * math.sqrt(1 + 0.25**2)
    assert abs(found - (0.75 + 0.25 * of_prior)) <= error


def test_one_guide_draws_what_the_other_cannot() -> None:
    """A grammar's guide alone misses strings of the posterior; mixed with the prior it does not."""
    exact = lp.infer(masked_story, method="exact", progress=False)
    assert exact.log_evidence is not None
    mixed = MixtureGuide([MaskedGuide({"z": ONLY_A}), "prior"], [0.5, 0.5])
    check_guide(mixed, masked_story, samples=500)
    with pytest.warns(lp.InferenceWarning, match="nothing in the program conditions it"):
        alone = lp.infer(
            masked_story, guide=MaskedGuide({"z": ONLY_A}), num_samples=2000, progress=False
        )
    assert alone.log_evidence is not None
    assert alone.log_evidence < exact.log_evidence - 0.2


@pytest.mark.parametrize("seed", [0, 1])
def test_the_evidence_is_that_of_enumeration(seed: int) -> None:
    exact = lp.infer(story, method="exact", progress=False)
    found = lp.infer(
        story, guide=MIXTURES["trained"](story), num_samples=1000, seed=seed, progress=False
    )
    assert exact.log_evidence is not None and found.log_evidence is not None
    assert found.log_evidence_error is not None
    assert abs(found.log_evidence - exact.log_evidence) <= 4 * found.log_evidence_error


def test_bounds_hold_an_exact_sample_under_it() -> None:
    guide = MIXTURES["two untrained"](story)
    bounds = lp.evidence_bounds(
        story, guide=guide, num_observations=100, num_samples=8, progress=False
    )
    error = math.hypot(bounds.lower_error, bounds.upper_error)
    assert bounds.lower <= bounds.upper + 3 * error


def test_smc_says_that_it_does_not_take_it() -> None:
    with pytest.raises(ValueError, match=r"mixture.*one of several laws.*importance"):
        lp.infer(story, guide=MixtureGuide(["prior", "prompted"]), method="smc", progress=False)


def propose(*args: Any) -> None:
    pyro.sample("p", dist.Beta(5.0, 2.0))


@pytest.mark.parametrize(
    ("guides", "shares", "error", "match"),
    [
        ("prior", None, TypeError, "list of guides, got 'prior'"),
        (PriorGuide(), None, TypeError, "list of guides"),
        (["prior"], None, ValueError, "at least two guides, got 1"),
        ([], None, ValueError, "at least two guides, got 0"),
        (["prior", 3], None, TypeError, "a name, a Guide or a function, got 3"),
        (["prior", "gflownet"], None, ValueError, "'gflownet'.*trained as objects"),
        (["prior", "prompted"], [1.0], ValueError, "2 guides, and 1 shares"),
        (["prior", "prompted"], [0.5, 0.6], ValueError, r"sum to 1, got \[0.5, 0.6\]"),
        (["prior", "prompted"], [1.0, 0.0], ValueError, "above 0"),
        (["prior", "prompted"], [math.nan, 0.5], ValueError, "above 0"),
        (["prior", "prompted"], [1.5, -0.5], ValueError, "above 0"),
    ],
)
def test_what_is_no_mixture(guides: Any, shares: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        MixtureGuide(guides, shares)


def test_a_pyro_guide_cannot_be_part_of_one() -> None:
    guide = lp.GFlowNetGuide(LM, numeric=propose)
    with pytest.raises(ValueError, match="Pyro guide"):
        MixtureGuide([guide, "prior"])


def test_guides_that_do_not_fit_the_program_say_so() -> None:
    mixture = MixtureGuide([MaskedGuide({"nowhere": ONLY_A}), "prior"])
    with pytest.raises(ValueError, match="nowhere"):
        lp.infer(story, guide=mixture, progress=False)


def test_guides_show_what_they_are() -> None:
    assert repr(PriorGuide()) == "PriorGuide()"
    assert repr(PromptedGuide()) == "PromptedGuide()"
    assert repr(PromptedGuide(lp_context)) == "PromptedGuide(lp_context)"
    assert repr(lp.GFlowNetGuide(LM)) == "GFlowNetGuide(LM('tiny-1'), untrained)"
    assert repr(taught(story)) == "GFlowNetGuide(LM('tiny-1'), 3 steps on kind, text)"
    mixture = MixtureGuide([MaskedGuide({"z": ONLY_A}), "prior"], [0.9, 0.1])
    masked = repr(MaskedGuide({"z": ONLY_A}))
    assert masked.startswith("MaskedGuide({'z': ") and "a*" in masked
    assert repr(mixture) == f"MixtureGuide([{masked}, PriorGuide()], [0.9, 0.1])"


def lp_context(info: Any) -> Any:
    return info.prompt
