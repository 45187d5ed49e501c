"""Strings that their own rules reject: in predictions, enumeration, and moves under a mask."""

from __future__ import annotations

import math
from typing import Any

import pytest

import langppl as lp
from langppl.testing import tiny_lm

LM = tiny_lm("ab.1", merged=["ab", "b.", "aa"], split=["é"], seed=3)
GRAMMAR = lp.regex("a[ab]*[.]")


def base() -> None:
    z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
    lp.sample("o", lp.LMString(LM, "b" + z), obs="a")


@pytest.mark.parametrize(
    "rules", [{"grammar": GRAMMAR}, {"stop": ".", "ban": "1", "truncate": "reject"}]
)
def test_predictions_keep_the_rules(rules: dict[str, Any]) -> None:
    def further() -> tuple[str, str]:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        n = lp.sample("n", lp.LMString(LM, "b" + z, max_tokens=3, **rules))
        if "grammar" in rules:
            assert n.endswith(".")  # as a parser breaks on an unfinished text
        return z, n

    posterior = lp.infer(base, num_samples=32, progress=False)
    found = [d["_RETURN"] for d in posterior.predict(further, num_samples=60)]
    assert len(found) == 60
    for z, n in found:
        fn = lp.LMString(LM, "b" + z, max_tokens=3, **rules)
        assert fn.why_impossible(n) is None, (z, n)


def test_predictions_that_nothing_can_accept_say_so() -> None:
    def never() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        lp.sample("n", lp.LMString(LM, "b" + z, max_tokens=6, grammar=lp.regex("[ab1]{13,}")))

    posterior = lp.infer(base, num_samples=4, progress=False)
    with pytest.raises(ValueError, match="'n' was rejected by its own rules; give"):
        posterior.predict(never, num_samples=2)


def test_an_enumeration_of_nothing_possible_says_why() -> None:
    def never() -> None:
        lp.sample("z", lp.LMString(LM, "a", max_tokens=6, grammar=lp.regex("[ab1]{13,}")))

    with pytest.warns(lp.InferenceWarning):
        found = lp.infer(never, method="exact", progress=False)
    assert found.log_evidence == -math.inf
    assert "'z'" in str(found.diagnose())


def test_moves_under_a_mask_keep_to_it() -> None:
    grammar = lp.regex("1[1.]*")

    def hard() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=4))
        lp.factor("g", lp.log_matches(z, grammar))
        lp.sample("o", lp.LMString(LM, "b" + z), obs="a")

    program = lp.compile(hard)
    truth = lp.infer(program, method="exact", progress=False)
    guide = lp.MaskedGuide({"z": grammar})
    for own in (guide, lp.MixtureGuide([guide, "prior"], shares=[0.8, 0.2])):
        chains = lp.infer(
            program, method="mh", guide=own, num_samples=960, chains=32, tail_share=1.0, seed=1,
            progress=False,
        )  # fmt: skip
        assert chains.chains is not None
        # From the unmasked LM it is one in nine.
        if own is guide:
            assert chains.chains.acceptance["tail"] > 0.4
        expected: dict[str, float] = {}
        for row, weight in zip(truth.samples, truth.weights, strict=True):
            expected[str(row["z"])] = expected.get(str(row["z"]), 0.0) + float(weight)
        counts: dict[str, float] = {}
        for row in chains.samples:
            counts[str(row["z"])] = counts.get(str(row["z"]), 0.0) + 1 / chains.num_samples
        distance = sum(abs(expected.get(k, 0.0) - counts.get(k, 0.0)) for k in expected | counts)
        assert distance / 2 < 0.1


def test_lone_surrogates_are_named() -> None:
    for make, value in (
        (lp.regex, "\ud800"),
        (lp.lark, 'start: "\ud800"'),
        (lp.one_of, ["\ud800"]),
    ):
        with pytest.raises(ValueError, match="not valid Unicode"):
            make(value)
