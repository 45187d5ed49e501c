"""Counting strings agrees with listing them."""

from __future__ import annotations

from typing import Any

import pytest

from langppl.distributions import LMString
from langppl.lm import enumeration
from langppl.lm.rules import State, StringRules
from langppl.testing import enumerate_strings, tiny_lm

CASES: dict[str, dict[str, Any]] = {
    "end only": {"max_tokens": 3},
    "empty string allowed": {"max_tokens": 3, "min_tokens": 0},
    "min": {"max_tokens": 4, "min_tokens": 3, "stop": "."},
    "min is max": {"max_tokens": 3, "min_tokens": 3},
    "a stop": {"max_tokens": 4, "stop": "."},
    "two stops": {"max_tokens": 4, "stop": ["a.", ".b"]},
    "long stop": {"max_tokens": 4, "stop": "aba", "min_tokens": 2},
    "reject": {"max_tokens": 3, "stop": ".", "truncate": "reject"},
    "ban": {"max_tokens": 3, "ban": ["b"]},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("split", [(), ("é",), ("é", "€")], ids=["ascii", "two", "three"])
def test_count_is_the_length_of_the_list(name: str, split: tuple[str, ...]) -> None:
    lm = tiny_lm("ab.", merged=["ab", "b.", ".."], split=split)
    bound = LMString(lm, "a", **CASES[name]).bound
    limit = CASES[name]["max_tokens"]
    listed = list(enumeration.strings(bound, limit))
    assert len({(ids, text) for ids, text, _ in listed}) == len(listed)
    assert enumeration.count(bound, limit) == len(listed)


def test_count_worked_out_by_hand() -> None:
    # Tokens a, b and "."; up to two actions, at least one token before the ending action.
    lm = tiny_lm("ab.")
    bound = LMString(lm, "a", stop=".", max_tokens=2).bound
    texts = sorted(text for _, text, _ in enumeration.strings(bound, 2))
    assert texts == sorted(["a", "b", "a.", "b.", "aa", "ab", "ba", "bb"])
    assert enumeration.count(bound, 2) == 8


def test_fragments_are_not_places_to_end() -> None:
    lm = tiny_lm("a", split=["é"])
    texts = [t for _, t, _ in enumeration.strings(LMString(lm, "a", max_tokens=2).bound, 2)]
    assert sorted(texts) == sorted(["a", "aa", "é"])


def test_count_needs_no_list() -> None:
    # 3 tokens that go on and the end of the text, so Σ 3^k for k = 5..200 strings.
    lm = tiny_lm("abc")
    bound = LMString(lm, "a", max_tokens=200, min_tokens=5).bound
    assert enumeration.count(bound, 200) == sum(3**k for k in range(5, 201))


def test_a_long_limit_is_no_recursion() -> None:
    lm = tiny_lm("ab")
    assert enumeration.count(LMString(lm, "a", max_tokens=3000).bound, 3000) == 2**3001 - 2


def test_the_vocabulary_is_walked_once_a_kind_of_state(monkeypatch: pytest.MonkeyPatch) -> None:
    # What may follow is worked out for each kind of step, not at each of the 200 levels: with the
    # 49,152 tokens of SmolLM2 one walk takes about 0.1 s.
    bound = StringRules(stop=("ab.",), max_tokens=200, min_tokens=50).bind(
        tiny_lm("ab.").vocabulary
    )
    asked = []
    advance = bound.advance

    def counted(state: State, token: int) -> State:
        asked.append(token)
        return advance(state, token)

    monkeypatch.setattr(bound, "advance", counted)
    assert enumeration.count(bound, 200) > 10**80
    # Three tails ("", "a", "ab"), three tokens, and at most 16 kinds of step for each tail.
    assert len(asked) <= 3 * 3 * 16


def test_enumerate_strings_gives_up_and_refuses_open_strings() -> None:
    lm = tiny_lm("ab")
    with pytest.raises(ValueError, match="more than 10 strings"):
        list(enumerate_strings(LMString(lm, "a", max_tokens=5), most=10))
    with pytest.raises(ValueError, match="open string"):
        list(enumerate_strings(LMString(lm, "a")))
