"""The replay buffer."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langppl.guides.replay import ReplayBuffer


def test_the_best_are_kept() -> None:
    buffer = ReplayBuffer[str](2)
    for key, reward in (("low", -3.0), ("high", -1.0), ("middle", -2.0), ("lowest", -9.0)):
        buffer.add(key, reward, key)
    assert len(buffer) == 2
    assert set(buffer.sample(5, np.random.default_rng(0))) == {"high", "middle"}


def test_equal_and_impossible_trajectories_are_not_added() -> None:
    buffer = ReplayBuffer[int](3)
    buffer.add("a", -1.0, 1)
    buffer.add("a", -1.0, 2)
    buffer.add("b", -np.inf, 3)
    assert buffer.sample(3, np.random.default_rng(0)) == [2]  # renewed, not kept twice


def test_samples_are_different_weighted_and_seeded() -> None:
    buffer = ReplayBuffer[int](4)
    for k, weight in enumerate((0.1, 0.2, 0.3, 0.4)):
        buffer.add(k, float(np.log(weight)), k)
    firsts = [buffer.sample(1, np.random.default_rng(seed))[0] for seed in range(2000)]
    share = np.bincount(firsts, minlength=4) / 2000
    # 4.5 standard deviations of at most 0.011.
    assert share == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.05)
    draws = [buffer.sample(3, np.random.default_rng(seed)) for seed in range(50)]
    assert all(len(set(d)) == 3 for d in draws)
    assert buffer.sample(2, np.random.default_rng(7)) == buffer.sample(2, np.random.default_rng(7))
    assert buffer.sample(0, np.random.default_rng(0)) == []


def test_some_can_be_left_out() -> None:
    buffer = ReplayBuffer[int](4)
    for k in range(4):
        buffer.add(k, 0.0, k)
    assert set(buffer.sample(4, np.random.default_rng(0), {1, 2})) == {0, 3}


def test_a_new_weight_takes_the_place_of_the_old() -> None:
    buffer = ReplayBuffer[str](2)
    buffer.add("a", 5.0, "a")
    buffer.add("b", 1.0, "b")
    buffer.add("a", 0.0, "a")
    buffer.add("c", 2.0, "c")
    assert set(buffer.sample(2, np.random.default_rng(0))) == {"b", "c"}


# --- near-duplicates ---


def words(buffer: ReplayBuffer[str]) -> list[str]:
    return [item for _, item in buffer.items()]


def add(buffer: ReplayBuffer[str], word: str, log_weight: float) -> None:
    buffer.add(word, log_weight, word, [ord(letter) for letter in word])


def edits(a: Sequence[object], b: Sequence[object]) -> int:
    """Levenshtein's distance by its recursion, row by row (Wagner and Fischer 1974)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_the_reference_counts_edits() -> None:
    assert edits("kitten", "sitting") == 3 and edits("", "abc") == 3 and edits("flaw", "lawn") == 2


@pytest.mark.parametrize(
    ("first", "second"), [("abcde", "abXde"), ("abcde", "abcd"), ("abcd", "Xabcd")]
)
def test_of_near_duplicates_the_heavier_stays(first: str, second: str) -> None:
    for order in ((first, second), (second, first)):
        buffer = ReplayBuffer[str](4, distance=0.25)  # one edit in five tokens, two in eight
        weights = {first: -1.0, second: -2.0}
        for word in order:
            add(buffer, word, weights[word])
        add(buffer, "vwxyz", -9.0)
        assert words(buffer) == [first, "vwxyz"]


def test_the_limit_is_a_share_of_the_longer_ones_tokens() -> None:
    for share, kept in ((0.25, ["abcd"]), (0.24, ["abcd", "abc"])):
        buffer = ReplayBuffer[str](4, distance=share)
        add(buffer, "abcd", 0.0)
        add(buffer, "abc", -1.0)
        assert words(buffer) == kept


def test_one_that_beats_all_its_near_duplicates_takes_their_place() -> None:
    buffer = ReplayBuffer[str](8, distance=0.25)
    for word, weight in (("Xbcd", -3.0), ("mnop", -9.0), ("abcY", -2.0)):  # two edits apart
        add(buffer, word, weight)
    add(buffer, "abcd", -2.5)  # one edit from both, heavier than one
    assert words(buffer) == ["Xbcd", "mnop", "abcY"]
    add(buffer, "abcd", -2.0)  # as heavy as the other: the first stays
    assert words(buffer) == ["Xbcd", "mnop", "abcY"]
    add(buffer, "abcd", -1.0)
    assert words(buffer) == ["mnop", "abcd"]


def test_a_refused_one_costs_no_place() -> None:
    buffer = ReplayBuffer[str](2, distance=0.25)
    for word, weight in (("abcd", -1.0), ("mnop", -3.0), ("abcX", -2.0)):
        add(buffer, word, weight)
    assert words(buffer) == ["abcd", "mnop"]


def test_one_that_is_renewed_is_not_its_own_near_duplicate() -> None:
    buffer = ReplayBuffer[str](2, distance=0.25)
    add(buffer, "abcd", -1.0)
    add(buffer, "mnop", -2.0)
    add(buffer, "abcd", -3.0)
    assert buffer.items() == [(-3.0, "abcd"), (-2.0, "mnop")]
    add(buffer, "abcX", -2.5)  # it now beats the renewed weight
    assert buffer.items() == [(-2.0, "mnop"), (-2.5, "abcX")]
    add(buffer, "wxyz", -np.inf)
    assert words(buffer) == ["mnop", "abcX"]


def test_tokens_that_are_equal_or_not_known() -> None:
    buffer = ReplayBuffer[str](8, distance=0.01)
    for key, tokens in (("a", [1, 2]), ("b", [1, 2]), ("c", []), ("d", [])):
        buffer.add(key, 0.0, key, tokens)
    assert words(buffer) == ["a", "c", "d"]


def test_without_a_distance_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    buffer = ReplayBuffer[str](8)
    add(buffer, "abcd", 0.0)
    add(buffer, "abcX", -1.0)
    buffer.add("same tokens", -2.0, "same tokens", [ord(letter) for letter in "abcd"])
    assert words(buffer) == ["abcd", "abcX", "same tokens"]
    with pytest.raises(ImportError, match=r"rapidfuzz\.distance"):
        add(ReplayBuffer[str](8, distance=0.1), "abcd", 0.0)


@pytest.mark.parametrize("distance", [-0.1, 1.0, float("nan")])
def test_a_distance_out_of_range(distance: float) -> None:
    with pytest.raises(ValueError, match=f"at least 0 and below 1, got {distance}"):
        ReplayBuffer[str](1, distance)


# Of few letters, so that many are near to one another.
some_words = st.text("ab", min_size=1, max_size=9)
additions = st.lists(st.tuples(some_words, st.integers(-9, 9)), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(additions, st.integers(1, 6), st.floats(0.01, 0.99))
def test_no_two_that_are_kept_are_near(
    rows: list[tuple[str, int]], capacity: int, distance: float
) -> None:
    buffer = ReplayBuffer[str](capacity, distance)
    for word, weight in rows:
        add(buffer, word, float(weight))
        assert 1 <= len(buffer) <= capacity
        for a, b in itertools.combinations(words(buffer), 2):
            assert edits(a, b) > distance * max(len(a), len(b))
    restored = ReplayBuffer[str](capacity, distance)
    for log_weight, word in buffer.items():
        add(restored, word, log_weight)
    assert restored.items() == buffer.items()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(some_words, min_size=1, max_size=30, unique=True).flatmap(
        lambda found: st.tuples(st.just(found), st.permutations(range(len(found))))
    ),
    st.integers(1, 6),
    st.floats(0.0, 0.99),
)
def test_the_heaviest_is_always_kept(
    rows: tuple[list[str], list[int]], capacity: int, distance: float
) -> None:
    buffer = ReplayBuffer[str](capacity, distance)
    weights = dict(zip(*rows, strict=True))
    for count, (word, weight) in enumerate(weights.items(), 1):
        add(buffer, word, float(weight))
        best = max(list(weights)[:count], key=lambda w: weights[w])
        assert best in words(buffer)
