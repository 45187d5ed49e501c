"""Executions that are impossible already may fail; others say with which values they did."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pyro.poutine
import pytest
import torch

import langppl as lp
from langppl.testing import tiny_lm

LM = tiny_lm('ab{}":1', seed=1)
FORM = lp.regex(r'\{"a":1{1,3}\}')


def record(reads: Callable[[str], Any]) -> None:
    """A record that is often unfinished after eight tokens."""
    z = lp.sample("z", lp.LMString(LM, "a", grammar=FORM, max_tokens=8, truncate="reject"))
    size = len(str(reads(z)["a"]))
    lp.sample("y", lp.LMString(LM, "b" * size, min_tokens=0, max_tokens=2), obs="ab")


def safe(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"a": 1}


def by_factor(reads: Callable[[str], Any]) -> None:
    z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2, allow=["a", "b"]))
    lp.factor("has b", 0.0 if "b" in z else -math.inf)
    lp.sample("y", lp.LMString(LM, "b" * reads(z), min_tokens=0, max_tokens=2), obs="ab")


PAIRS: dict[str, tuple[Callable[..., None], Any, Any]] = {
    "record": (record, json.loads, safe),
    "factor": (by_factor, lambda z: z.index("b"), lambda z: max(z.find("b"), 0)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "exact"},
        {"method": "importance"},
        {"method": "smc", "every": 2},
        {"method": "smc", "twist": "lookahead", "every": 1},
        {"method": "mh", "chains": 20},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::langppl.diagnostics.InferenceWarning")
def test_they_count_as_those_that_do_not_fail(pair: str, options: dict[str, Any]) -> None:
    model, fails, never = PAIRS[pair]
    one, other = (
        lp.infer(model, reads, num_samples=200, progress=False, **options)
        for reads in (fails, never)
    )
    assert one.log_evidence == pytest.approx(other.log_evidence, abs=1e-6)
    assert one.impossible_share == other.impossible_share
    assert one.probabilities("z") == pytest.approx(other.probabilities("z"), abs=1e-6)


def test_a_guide_is_trained_on_them() -> None:
    guide = lp.GFlowNetGuide(LM, rank=2, seed=0)
    guide.fit(record, [(json.loads,)], steps=3, batch=16, progress=False)
    found = lp.infer(record, json.loads, guide=guide, num_samples=400, progress=False)
    exact = lp.infer(record, json.loads, method="exact", progress=False)
    assert found.log_evidence is not None and found.log_evidence_error is not None
    assert exact.log_evidence is not None
    assert abs(found.log_evidence - exact.log_evidence) <= 4 * found.log_evidence_error


def test_a_possible_execution_fails_and_says_with_what() -> None:
    def model() -> None:
        number = lp.sample("number", dist.Categorical(torch.ones(1)))
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2, allow=["a", "b"]))
        int(z) + number

    with pytest.raises(ValueError, match="invalid literal for int") as caught:
        lp.infer(model, progress=False)
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert note.startswith("raised in an execution with number=tensor(0), z='")


def test_a_masked_impossible_string_is_possible() -> None:
    """Pyro's mask takes its factor away, so an error after it counts."""

    def model() -> None:
        with pyro.poutine.mask(mask=False):
            z = lp.sample("z", lp.LMString(LM, "a", grammar=FORM, max_tokens=8, truncate="reject"))
        json.loads(z)

    with pytest.raises(ValueError, match=r"Unterminated|Expecting|Invalid"):
        lp.infer(model, num_samples=200, progress=False)


@pytest.mark.filterwarnings("ignore::langppl.diagnostics.InferenceWarning")
def test_if_all_are_the_error_is_told() -> None:
    def model() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2, allow=["a", "b"]))
        lp.factor("never", -math.inf)
        int(z)

    (note,) = lp.infer(model, num_samples=8, progress=False).notes
    assert note.startswith("impossible already, an execution then raised ValueError: invalid lit")
    assert note.endswith(", and errors in 7 others")
