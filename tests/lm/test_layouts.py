"""Rules that differ in lengths share what is legal; it is what rules of their own would have."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import langppl as lp
from langppl.lm import LM, layouts, rules
from langppl.lm.layouts import Layout, Step
from langppl.lm.rules import BoundRules, StringRules
from langppl.testing import tiny_lm

GRAMMARS = [None, lp.regex(r"[ab]*\.?"), lp.one_of(["ab.", "b", "aé"])]


def make_lm() -> LM:
    return tiny_lm("ab.", seed=3, merged=["ab", "b.", "..", ".a"], split=["é", "😀"])


SHARED = make_lm()
FRESH = make_lm().vocabulary


def fresh(own: StringRules) -> BoundRules:
    """Rules over a vocabulary for which nothing is known."""
    layouts._layouts.pop(FRESH, None)
    return own.bind(FRESH)


def shown(step: Step) -> tuple[Any, ...]:
    groups = {text: ids.tolist() for text, ids in step.groups.items()}
    return (
        step.legal.tolist(),
        step.kept,
        list(groups.items()),
        step.end_ids.tolist(),
        step.canonical.tolist(),
        step.canonical_token,
        step.is_dead,
        step.name,
    )


def is_read(text: str) -> bool:
    return text != "b."


ruled = st.builds(
    dict,
    max_tokens=st.one_of(st.none(), st.integers(1, 12)),
    min_tokens=st.integers(0, 3),
    stop=st.sampled_from([(), (".",), ("ab.",), ("b", "..")]),
    truncate=st.sampled_from(["keep", "reject"]),
    temperature=st.sampled_from([1.0, 0.5]),
    ban=st.sampled_from([None, ("..",), ("a",)]),
    allow=st.sampled_from([None, is_read, ("a", "b", ".")]),
    grammar=st.sampled_from(GRAMMARS),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ruled, min_size=1, max_size=4), st.lists(st.integers(0, 10**6), max_size=10))
def test_shared_steps_are_those_of_rules_of_their_own(
    every: list[dict[str, Any]], picks: list[int]
) -> None:
    for options in every:
        try:
            own = StringRules(**options)
        except ValueError:
            continue
        try:
            apart = fresh(own)
        except ValueError as error:
            with pytest.raises(ValueError) as found:
                SHARED.bind(own)
            assert str(found.value) == str(error)
            continue
        shared = SHARED.bind(own)
        assert np.array_equal(shared.allowed, apart.allowed) and shared.stops == apart.stops
        state = shared.start(own.max_tokens)
        for pick in picks:
            if state.remaining == 0:
                break
            step, expected = shared.step(state), apart.step(state)
            assert shown(step) == shown(expected)
            on = [t for t in step.legal.nonzero()[:, 0].tolist() if t not in step.kept]
            on = [t for t in on if t not in SHARED.vocabulary.end_ids]
            if not on:
                break
            token = on[pick % len(on)]
            state, other = shared.advance(state, token), apart.advance(state, token)
            assert state == other


def test_lengths_share_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    read, made = [], []
    let_through, make = layouts.let_through, Layout._make_step

    def counted(*args: Any) -> np.ndarray:
        read.append(args)
        return let_through(*args)

    def counting(self: Layout, *kind: Any) -> Step:
        made.append(kind)
        return make(self, *kind)

    monkeypatch.setattr(layouts, "let_through", counted)
    monkeypatch.setattr(Layout, "_make_step", counting)
    lm = make_lm()
    kept = []
    for most in range(20, 50):
        bound = lm.bind(StringRules(max_tokens=most, stop=".", ban=("..",), temperature=1 / most))
        state = bound.start(most)
        for _ in range(5):
            bound.step(state)
            state = bound.advance(state, int(lm.encode_text("a")[0]))
        kept.append(bound)
    assert len(read) == 1 and len({id(b.layout) for b in kept}) == 1
    # One before a string may end, and one after.
    assert len(made) == 2
    # Other stops and filters have others.
    others = [
        StringRules(max_tokens=10, stop=".."),
        StringRules(max_tokens=10, stop="."),
        StringRules(max_tokens=10, stop=".", ban=("b.",)),
    ]
    different = {id(lm.bind(other).layout) for other in others}
    assert len(different) == 3 and id(kept[0].layout) not in different


def test_lengths_share_the_masks_of_a_grammar() -> None:
    lm = make_lm()
    first, second = (
        lm.bind(StringRules(max_tokens=most, grammar=GRAMMARS[1])) for most in (20, 30)
    )
    assert first._matcher is second._matcher
    assert first.step(first.start(20)) is second.step(second.start(30))
    other = lm.bind(StringRules(max_tokens=20, grammar=GRAMMARS[2]))
    assert other._matcher is not first._matcher
    # The end is near for one of them alone.
    with pytest.raises(ValueError, match="no string of the grammar"):
        lm.bind(StringRules(max_tokens=1, grammar=lp.one_of(["ab."])))


@pytest.mark.parametrize("is_new", [False, True])
def test_a_predicate_that_reads_something_else_by_now_has_a_layout_of_its_own(
    is_new: bool,
) -> None:
    lm, banned = make_lm(), {"ab"}

    def ban(text: str) -> bool:
        return text in banned

    before = lm.bind(StringRules(max_tokens=5, ban=ban))
    again = lm.bind(StringRules(max_tokens=6, ban=ban))
    assert again.layout is before.layout
    banned.add("b.")
    after = lm.bind(StringRules(max_tokens=7 if is_new else 5, ban=ban))
    (token,) = (i for i, data in enumerate(lm.vocabulary.bytes) if data == b"b.")
    assert before.allowed[token] and not after.allowed[token]
    assert not after.step(after.start(5)).legal[token]
    assert before.step(before.start(5)).legal[token]


def test_layouts_go_with_their_rules() -> None:
    lm = make_lm()
    own = StringRules(max_tokens=5, stop=".", grammar=GRAMMARS[1])
    own.bind(lm.vocabulary)
    gc.collect()
    assert len(layouts._layouts[lm.vocabulary]) == 0
    bound = own.bind(lm.vocabulary)
    assert len(layouts._layouts[lm.vocabulary]) == 1 and len(rules._masks[bound.layout]) == 1


def test_fragments_are_followed_as_the_bytes_say() -> None:
    """Against a look at every token."""
    vocabulary = SHARED.vocabulary
    layout = SHARED.bind(StringRules(max_tokens=5, ban=("a",))).layout
    for fragment in (b"", b"\xc3", b"\xf0", b"\xf0\x9f", b"\xf0\x9f\x98"):
        found = {left: sorted(ids.tolist()) for left, ids in layout._followers(fragment).items()}
        expected: dict[bytes, list[int]] = {}
        for token in np.flatnonzero(layout.allowed).tolist():
            left = layouts.utf8_fragment(fragment + vocabulary.bytes[token])
            if left is not None:
                expected.setdefault(left, []).append(token)
        assert found == expected, fragment
