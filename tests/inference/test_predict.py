"""Bayesian model averaging: a second model run on posterior draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from langppl import LMString, PriorGuide, compile, infer, sample
from langppl.testing import enumerate_strings, tiny_lm

LM = tiny_lm("ab.", seed=2)


def story() -> None:
    middle = sample("middle", LMString(LM, "ab", stop=".", max_tokens=2))
    sample("ending", LMString(LM, f"ab{middle}"), obs="bb.")


def after(prompt: str) -> str:
    middle = sample("middle", LMString(LM, "ab", stop=".", max_tokens=2))
    return sample("next", LMString(LM, f"{prompt}{middle}", max_tokens=1))


def test_predictions_average_over_the_posterior() -> None:
    posterior = infer(story, method="exact", progress=False)
    want: dict[str, float] = {}
    for middle, p in zip(posterior.samples, posterior.weights, strict=True):
        fn = LMString(LM, f"b{middle['middle']}", max_tokens=1)
        for value, _ in enumerate_strings(fn):
            want[value] = want.get(value, 0.0) + p * math.exp(float(fn.log_prob(value)))
    assert sum(want.values()) == pytest.approx(1.0, abs=1e-4)
    n = 2000
    found = posterior.predict(after, "b", num_samples=n, seed=1)
    assert all(set(row) == {"next", "_RETURN"} and row["next"] == row["_RETURN"] for row in found)
    for value, p in want.items():
        share = np.mean([row["next"] == value for row in found])
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n) + 1e-4


def test_a_seed_repeats_predictions_and_foreign_models_are_refused() -> None:
    posterior = infer(story, num_samples=16, progress=False)
    assert len(posterior.predict(after, "b")) == 16
    assert posterior.predict(after, "b", seed=4) == posterior.predict(after, "b", seed=4)

    def other() -> None:
        sample("x", LMString(LM, "a", max_tokens=1))

    with pytest.raises(ValueError, match="none of this posterior's sites"):
        posterior.predict(other)


def test_a_compiled_program_predicts_as_its_model_does() -> None:
    posterior = infer(story, num_samples=16, progress=False)
    program = compile(after, "b")
    assert posterior.predict(program, seed=4) == posterior.predict(after, "b", seed=4)
    with pytest.raises(TypeError, match="has its arguments already"):
        posterior.predict(program, "b")
    with pytest.raises(TypeError, match="log_q takes a compiled Program"):
        PriorGuide().log_q(after, posterior.samples)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**200, np.int64(3)])
def test_seeds_are_of_any_size(seed: int) -> None:
    posterior = infer(story, num_samples=16, seed=seed, progress=False)
    assert posterior.resample(5, seed=seed) == posterior.resample(5, seed=seed)
    assert len(posterior.predict(after, "b", num_samples=3, seed=seed)) == 3


def goes_on(prompt: str, ending: str | None = None) -> None:
    middle = sample("middle", LMString(LM, prompt, stop=".", max_tokens=2))
    sample("ending", LMString(LM, f"{prompt}{middle}"), obs=ending)


def test_an_open_string_is_predicted_at_a_given_length() -> None:
    posterior = infer(goes_on, "ab", "bb.", method="exact", progress=False)
    n = 600
    found = posterior.predict(goes_on, prompt="ab", lengths={"ending": 1}, num_samples=n, seed=1)
    want: dict[str, float] = {}
    for z, p in zip(posterior.samples, posterior.weights, strict=True):
        fn = LMString(LM, f"ab{z['middle']}")
        firsts = {c: math.exp(float(fn.log_prob(c))) for c in "ab."}
        for c, own in firsts.items():
            want[c] = want.get(c, 0.0) + p * own / sum(firsts.values())
    for c, p in want.items():
        share = np.mean([row["ending"] == c for row in found])
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n), c
    with pytest.raises(ValueError, match=r"predict\(..., lengths=\{'ending': 10\}\)"):
        posterior.predict(goes_on, "ab", None)
    with pytest.raises(TypeError, match=r"'promt' is no argument .* did you mean 'prompt'"):
        posterior.predict(goes_on, promt="ab")
    with pytest.warns(UserWarning, match="lengths name 'endng'.*did you mean 'ending'"):
        posterior.predict(goes_on, "ab", lengths={"endng": 1, "ending": 2}, num_samples=2)
