from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from langppl.distributions import JoinWarning, LMChoice, LMString, Text, sites
from langppl.testing import enumerate_strings, tiny_lm

TINY = tiny_lm("ab. ", merged=["ab"])


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langppl.warn._said", OrderedDict())


def test_another_tokenizer_tokenises_anew() -> None:
    dist = LMString(TINY, ".", max_tokens=4)
    a, b, ab = (TINY.vocabulary.exact[s] for s in (b"a", b"b", b"ab"))
    own = Text("ab", (a, b), TINY.fingerprint)
    assert dist.tokens_of(own) == (a, b)
    assert dist.tokens_of("ab") == dist.tokens_of(Text("ab", (a, b), "other")) == (ab,)
    assert dist.tokens_of(Text("ab")) == dist.tokens_of(own[:]) == (ab,)
    assert float(dist.log_prob(own)) != float(dist.log_prob("ab"))


def test_an_open_string_is_the_sum_of_what_begins_so() -> None:
    prompt, begin = ". ", Text("ab", TINY.encode_text("ab"), TINY.fingerprint)
    open_string = LMString(TINY, prompt)
    assert float(open_string.log_prob("")) == 0.0
    whole = LMString(TINY, prompt, max_tokens=3)
    assert begin.ids is not None
    total = sum(
        math.exp(float(whole.log_prob(text)))
        for text, _ in enumerate_strings(whole)
        if (text.ids or ())[: len(begin.ids)] == begin.ids
    )
    assert float(open_string.log_prob(begin)) == pytest.approx(math.log(total), abs=1e-5)
    with sites.naming("ending"), pytest.raises(ValueError, match="'ending': an open string cannot"):
        open_string.sample()


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.text(), st.text(alphabet="ab. \ud800é")),
    st.sampled_from([{}, {"max_tokens": 3}, {"stop": ".", "max_tokens": 5, "min_tokens": 2}]),
    st.sampled_from(["", "ab", "."]),
)
def test_impossible_values_are_minus_infinity(value: Any, rules: Any, prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JoinWarning)
        dist = LMString(TINY, prompt, **rules)
        log_prob = float(dist.log_prob(value))
    assert not math.isnan(log_prob) and log_prob <= 0
    assert (log_prob == -np.inf) == (dist.why_impossible(value) is not None)


@pytest.mark.parametrize(
    ("rules", "value", "reason"),
    [
        ({"max_tokens": 2}, "a.a", "has 3 tokens and max_tokens is 2"),
        ({"max_tokens": 4, "stop": "."}, "a.a", "goes on after the stop completed by '.'"),
        ({"max_tokens": 4, "ban": "."}, "a.", "token '.' at position 1 is banned or not allowed"),
        ({"max_tokens": 4, "min_tokens": 2}, "a", "1 tokens before its end and min_tokens is 2"),
        ({"max_tokens": 4, "min_tokens": 2, "stop": "."}, ".", "completes a stop after 0 tokens"),
        ({"max_tokens": 2, "stop": ".", "truncate": "reject"}, "aa", "unfinished after 2 tokens"),
        ({}, "xyz", "its tokens spell ''"),
        ({}, "\ud800", "lone surrogate"),
        ({}, Text("a", (1,), TINY.fingerprint), "is a special token"),
        ({}, Text("a", (999,), TINY.fingerprint), "token 999"),
    ],
)
def test_why_impossible_names_the_rule(rules: dict[str, Any], value: Any, reason: str) -> None:
    dist = LMString(TINY, ". ", **rules)
    assert reason in (dist.why_impossible(value) or "")
    assert float(dist.log_prob(value)) == -np.inf


@pytest.mark.parametrize("value", [["a", "b"], ("a",), 3, None, b"a", torch.tensor([1])])
def test_a_value_that_is_no_string_is_an_error(value: Any) -> None:
    for dist in (LMString(TINY, ". "), LMChoice(TINY, ". ", ["a", "b"])):
        with pytest.raises(TypeError, match="over strings takes one str, got"):
            dist.log_prob(value)
    assert LMString(TINY, ". ").why_impossible(3) == "it is a int, not a string"


def test_join_warning_once_a_site_and_line() -> None:
    dist = LMString(TINY, ". ab")
    with pytest.warns(JoinWarning) as heard:
        for site in ("x", "y", "x"):
            for value in ("ab", "abab"):
                with sites.naming(site):
                    dist.log_prob(value)
    assert [str(w.message)[:23] for w in heard] == [
        "site 'x': the string 'a",
        "site 'y': the string 'a",
    ]
    assert {w.filename for w in heard} == {__file__}
    with sites.naming("x"), pytest.warns(JoinWarning, match="site 'x'"):
        dist.log_prob("ab")  # another model may call its site the same
    dist.log_prob(" ab")
    dist.log_prob(Text("ab", TINY.encode_text("ab"), TINY.fingerprint))


def test_window_error_names_both_lengths() -> None:
    lm = tiny_lm("a", window=8)
    dist = LMString(lm, "a" * 6, max_tokens=5)
    with sites.naming("z"), pytest.raises(ValueError) as error:
        dist.sample()
    assert "site 'z': the prompt has 6 tokens and the string needs up to 5 more" in str(error.value)
    assert "at most 8" in str(error.value)
    assert np.isfinite(float(LMString(lm, "a" * 6, max_tokens=2).log_prob(Text("a"))))


@pytest.mark.parametrize("prompt", [3, None, [], [{"role": "user"}], b"a", ["a"]])
def test_prompts_of_another_kind(prompt: Any) -> None:
    with pytest.raises(TypeError, match="a prompt must be a string or a non-empty list"):
        LMString(TINY, prompt)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1"),
        ({"max_tokens": -1}, "max_tokens must be an integer of at least 1"),
        ({"max_tokens": 1, "min_tokens": 2}, "min_tokens=2 is above max_tokens=1"),
        ({"stop": ""}, "a stop must be a non-empty string"),
        ({"max_tokens": 1, "temperature": 0}, "temperature must be above 0"),
    ],
)
def test_bad_rules(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LMString(TINY, "a", **rules)


def test_several_strings_are_scored_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from langppl.distributions import base

    lm = tiny_lm("ab.", seed=1)
    string = LMString(lm, "a", stop=".", max_tokens=4)
    choice = LMChoice(lm, "a", ["ab", "b"])
    asked: list[int] = []
    perform = base.perform

    def counted(requests: Sequence[Any]) -> Any:
        asked.append(len(requests))
        return perform(requests)

    monkeypatch.setattr(base, "perform", counted)
    for fn, values in ((string, ["ab.", "b.", "a.b", "", "."]), (choice, ["b", "ab", "a"])):
        asked.clear()
        found = fn.log_prob_many(values)
        assert len(asked) == 1 and found.shape == (len(values),) and found.dtype == torch.float64
        alone = [float(fn.log_prob(v)) for v in values]
        np.testing.assert_allclose(found.numpy(), alone, atol=1e-5)
        assert found[-3 if fn is string else -1] == -math.inf  # "a.b" goes on behind its stop
    assert string.log_prob_many([]).shape == (0,)
    with pytest.raises(TypeError, match="takes several strings, got one, 'ab'"):
        string.log_prob_many("ab")
    with pytest.raises(TypeError, match=r"takes strings, got 3 \(int\)"):
        string.log_prob_many(["a", 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="for several at once: log_prob_many"):
        string.log_prob(["a"])  # type: ignore[arg-type]
