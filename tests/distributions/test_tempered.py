from __future__ import annotations

from typing import Any

import pytest

from langppl.distributions import LMString, Tempered
from langppl.testing import tiny_lm

TINY = tiny_lm("ab. ")


def test_log_prob_is_divided() -> None:
    base = LMString(TINY, "", max_tokens=3)
    tempered = Tempered(base, 0.5)
    assert float(tempered.log_prob("ab")) == pytest.approx(2 * float(base.log_prob("ab")))
    assert float(tempered.log_prob("x")) == float("-inf")
    assert isinstance(tempered(), str)


@pytest.mark.parametrize(
    ("rules", "temperature", "message"),
    [
        ({"max_tokens": 3}, 0, "temperature must be above 0"),
        ({"max_tokens": 3}, -1.0, "temperature must be above 0"),
        ({"max_tokens": 3}, float("inf"), "above 0 and finite"),
        ({"max_tokens": 3}, float("nan"), "above 0 and finite"),
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
