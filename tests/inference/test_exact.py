"""Exact inference against loops written by hand."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from langppl import LMChoice, LMString, compile, infer, sample
from langppl.lm import enumeration
from langppl.testing import enumerate_strings, tiny_lm

LM = tiny_lm("ab.", seed=2, merged=["ab", "b."])


def first() -> LMString:
    return LMString(LM, "ab", stop=".", max_tokens=2)


def chain() -> None:
    one = sample("one", first())
    two = sample("two", LMString(LM, f"a{one}", max_tokens=2, truncate="reject"))
    sample("seen", LMString(LM, f"{one}{two}"), obs="bb")


def test_it_is_a_double_loop() -> None:
    want: dict[tuple[object, object], float] = {}
    for one, _ in enumerate_strings(first()):
        second = LMString(LM, f"a{one}", max_tokens=2, truncate="reject")
        for two, rejected in enumerate_strings(second):
            if rejected:
                continue
            seen = LMString(LM, f"{one}{two}").log_prob("bb")
            joint = first().log_prob(one) + second.log_prob(two) + seen
            want[one.ids, two.ids] = float(joint)
    found = infer(chain, method="exact", progress=False)
    got = {
        (s["one"].ids, s["two"].ids): w
        for s, w in zip(found.samples, found.log_weights, strict=True)
    }
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key] == pytest.approx(value, abs=1e-4)
    assert found.log_evidence == pytest.approx(
        float(np.logaddexp.reduce(list(want.values()))), abs=1e-4
    )
    assert found.log_evidence_error == 0.0


def test_the_limit_error_gives_the_count() -> None:
    number = enumeration.count(first().bound, 2)
    with pytest.raises(ValueError, match=f"site 'one' alone has {number} strings, .* limit .* 5"):
        infer(chain, method="exact", limit=5, progress=False)


def test_the_limit_counts_what_was_met_beside_a_latent() -> None:
    """Of three values, the first alone leads to nine more: 9 + 2 executions."""

    def model() -> None:
        first = sample("a", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        mean = first
        if first == 0:
            mean = sample("b", dist.Categorical(torch.arange(1.0, 10.0))) / 4.0
        sample("x", dist.Normal(mean, 1.0), obs=torch.tensor(0.7))

    with pytest.raises(ValueError, match="more than 10 executions: site 'b'"):
        infer(model, method="exact", limit=10, progress=False)
    found = infer(model, method="exact", limit=11, progress=False)
    assert len(found.samples) == 11

    def density(mean: float) -> float:
        return math.exp(-((0.7 - mean) ** 2) / 2.0) / math.sqrt(2.0 * math.pi)

    evidence = 0.3 * density(1.0) + 0.5 * density(2.0)
    evidence += 0.2 * sum(k / 45.0 * density((k - 1) / 4.0) for k in range(1, 10))
    assert found.log_evidence == pytest.approx(math.log(evidence), abs=1e-5)


def test_a_huge_count_is_still_given() -> None:
    def model() -> None:
        sample("z", LMString(LM, "ab", max_tokens=200))
        sample("n", dist.Normal(0.0, 1.0), obs=0.0)

    # About 5^200 strings; 2,000 tokens would be beyond a float.
    with pytest.raises(ValueError, match=r"site 'z' alone has \d\.\d+e\+\d+ strings"):
        infer(model, method="exact", progress=False)


def test_a_count_beyond_floats_is_still_given() -> None:
    lm = tiny_lm("ab.", window=2000)

    def model() -> None:
        sample("z", LMString(lm, "ab", max_tokens=1000))

    with pytest.raises(ValueError, match=r"site 'z' alone has .*e\+?4\d\d strings"):
        infer(model, method="exact", progress=False)


def test_a_string_without_a_length_cannot_be_listed() -> None:
    def model() -> None:
        sample("z", LMString(LM, "ab", stop="."))

    with pytest.raises(ValueError, match="'z' has no max_tokens"):
        infer(model, method="exact", progress=False)


def test_choices_and_discrete_numbers() -> None:
    def model() -> None:
        kind = sample("kind", LMChoice(LM, "a", ["a", "b"]))
        coin = sample("coin", dist.Bernoulli(0.3))
        sample("seen", LMString(LM, kind if coin else "ab"), obs="ba")

    found = infer(model, method="exact", progress=False)
    kinds = np.exp(LMChoice(LM, "a", ["a", "b"]).log_probs())
    want = {}
    for k, kind in enumerate("ab"):
        for coin, p in ((0.0, 0.7), (1.0, 0.3)):
            prompt = kind if coin else "ab"
            want[kind, coin] = kinds[k] * p * math.exp(float(LMString(LM, prompt).log_prob("ba")))
    total = sum(want.values())
    assert found.log_evidence == pytest.approx(math.log(total), abs=1e-5)
    for (kind, coin), mass in want.items():
        here = found.expect(lambda s, k=kind, c=coin: s["kind"] == k and float(s["coin"]) == c)
        assert here == pytest.approx(mass / total, abs=1e-5)


def test_a_continuous_latent_cannot_be_listed() -> None:
    def model() -> None:
        p = sample("p", dist.Beta(1.0, 1.0))
        sample("seen", LMString(LM, "a" if p > 0.5 else "b"), obs="ab")

    with pytest.raises(ValueError, match="site 'p' is Beta, which has no list of values"):
        infer(model, method="exact", progress=False)


def test_other_observations_are_the_ones_that_count() -> None:
    def story(ending: str) -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=2))
        sample("ending", LMString(LM, f"a{z}"), obs=ending)

    other = infer(compile(story, "a").observing({"ending": "bb"}), method="exact", progress=False)
    direct = infer(story, "bb", method="exact", progress=False)
    assert other.log_evidence == pytest.approx(direct.log_evidence, abs=1e-5)


def test_a_loop_without_a_last_turn_cannot_be_listed() -> None:
    met = 0

    def model(most: float) -> int:
        nonlocal met
        turn = 0
        while turn < most and sample(f"more{turn}", dist.Bernoulli(torch.tensor(0.5))):
            turn += 1
            met += 1
            assert met < 100_000  # far fewer than it would take to list 10,000 executions
        return turn

    # Each turn that ends is one more execution.
    posterior = infer(model, 40, method="exact", progress=False)
    assert posterior.num_samples == 41 and posterior.log_evidence == pytest.approx(0.0, abs=1e-5)
    assert posterior.probabilities("_RETURN")[3] == pytest.approx(0.5**4)
    with pytest.raises(ValueError, match=r"'more256' after 256 latents .* go on for ever; end the"):
        infer(model, math.inf, method="exact", limit=10_000, progress=False)
