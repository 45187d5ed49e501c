from __future__ import annotations

import math
from typing import Any

import pytest

from langppl import infer, regex, sample
from langppl.distributions import LMString, Tempered
from langppl.testing import tiny_lm

TINY = tiny_lm("ab. ")


def test_log_prob_is_divided() -> None:
    base = LMString(TINY, "", max_tokens=3)
    tempered = Tempered(base, 0.5)
    assert float(tempered.log_prob("ab")) == pytest.approx(2 * float(base.log_prob("ab")))
    assert float(tempered.log_prob("x")) == float("-inf")
    assert isinstance(tempered(), str)


def test_at_infinite_temperature_all_strings_count_alike() -> None:
    base = LMString(TINY, "a", max_tokens=4, grammar=regex("a|b|a[ab]"))
    tempered = Tempered(base, math.inf)
    assert [float(tempered.log_prob(z)) for z in ("a", "ab", "ba")] == [0.0, 0.0, -math.inf]

    def model() -> None:
        sample("z", tempered)

    exact = infer(model, method="exact", progress=False)
    found = exact.probabilities("z")
    assert found == pytest.approx({"a": 0.25, "b": 0.25, "aa": 0.25, "ab": 0.25})
    assert exact.log_evidence == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    ("rules", "temperature", "message"),
    [
        ({"max_tokens": 3}, 0, "temperature must be above 0"),
        ({"max_tokens": 3}, -1.0, "temperature must be above 0"),
        ({"max_tokens": 3}, float("nan"), "temperature must be above 0"),
        ({"stop": "."}, math.inf, "has no max_tokens"),
        ({}, 0.5, "an open string cannot be tempered"),
        ({"stop": "."}, 1.5, "has no max_tokens"),
    ],
)
def test_errors(rules: dict[str, Any], temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tempered(LMString(TINY, "", **rules), temperature)


def test_another_base() -> None:
    with pytest.raises(TypeError, match="Tempered takes an LMString or an LMChoice"):
        Tempered("a", 0.5)  # type: ignore[arg-type]
