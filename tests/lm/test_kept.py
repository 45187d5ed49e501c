"""Scores that begin where a draw's tree ends are those from the beginning."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packed import FAMILIES, other

import langppl as lp
from langppl.lm import attention, decoding, kept
from langppl.lm.decoding import draw
from langppl.lm.requests import DrawRequest, ScoreRequest
from langppl.lm.rules import StringRules
from langppl.lm.scoring import score
from langppl.lm.trie import lay_out
from langppl.testing import tiny_lm

LM = tiny_lm(["a", "b", ".", " "], seed=3, merged=["ab", "b.", ".a"])
PROMPTS = ["", "ab", "ab ab", "b"]


def draws_of(lm: lp.LM, seed: int, n: int = 9, length: int = 7) -> list[tuple[int, ...]]:
    """Prompt and tokens of strings that were just drawn."""
    rules = lm.bind(StringRules(stop=(".",), min_tokens=0, max_tokens=length))
    wanted = [
        DrawRequest(lm, lm.encode_prompt(PROMPTS[k % 4]), rules, length, (seed, k))
        for k in range(n)
    ]
    return [(*r.prompt, *d.ids) for r, d in zip(wanted, draw(wanted), strict=True)]


def endings_of(lm: lp.LM, begun: list[tuple[int, ...]], ending: str, cut: int) -> list[Any]:
    """An ending after each string, and after what is left of it without its last tokens."""
    open_rules = lm.bind(StringRules(min_tokens=0))
    path = open_rules.parse(lm.encode_text(ending), ending.encode(), None)
    return [ScoreRequest(lm, ids[: max(1, len(ids) - c)], path) for ids in begun for c in (0, cut)]


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f.tokens, e.tokens, atol=2e-5)
        np.testing.assert_allclose(f.ending, e.ending, atol=2e-5)
        np.testing.assert_allclose(f.canonical, e.canonical, atol=2e-5)


@given(st.integers(0, 50), st.text("ab. ", max_size=6), st.integers(0, 8), st.sampled_from([4, 99]))
@settings(max_examples=150, deadline=None)
def test_scores_after_draws_are_those_from_the_beginning(
    seed: int, ending: str, cut: int, budget: int
) -> None:
    before, LM.node_budget = LM.node_budget, budget
    attention.BLOCK = 5
    try:
        with kept.keeping():
            begun = draws_of(LM, seed)
            requests = endings_of(LM, begun, ending, cut)
            found = score(requests)
        expected = score(requests)
    finally:
        LM.node_budget, attention.BLOCK = before, 64
    assert_equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_for_every_family(family: str) -> None:
    lm = other(family, **{**FAMILIES[family], **({"sliding_window": 6} if "3" in family else {})})
    with kept.keeping():
        begun = draws_of(lm, 1)
        requests = endings_of(lm, begun, "ab a", 2)
        prompts = [(*r.prompt,) for r in requests]
        assert kept.known(kept.trees_of(lm, None), prompts, [len(p) for p in prompts])
        found = score(requests)
    assert_equal(found, score(requests))


class Tokens:
    """Counts the tokens that an LM reads."""

    def __init__(self, lm: lp.LM) -> None:
        self.count = 0
        self.handle = lm.model.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, _module: Any, _args: Any, out: torch.Tensor) -> None:
        self.count += out.shape[0] * out.shape[1]


def beginnings(strings: Iterable[Sequence[int]], most: int) -> int:
    """How many different beginnings strings have, of at most so many tokens."""
    return len({tuple(ids[:n]) for ids in strings for n in range(1, most + 1)})


def test_inference_reads_no_drawn_token_twice() -> None:
    lm = tiny_lm(
        "abcd", seed=3, sharpness=0.1
    )  # one token a character: texts are joined as they were drawn

    def story() -> None:
        z = lp.sample("z", lp.LMString(lm, "abb", min_tokens=6, max_tokens=6))
        lp.sample("y", lp.LMString(lm, f"abb{z}", min_tokens=0), obs="bab")

    program = lp.compile(story)
    lm.memo.clear()
    tokens = Tokens(lm)
    posterior = lp.infer(program, num_samples=12, seed=3, progress=False)
    tokens.handle.remove()
    drawn = [s["z"].ids for s in posterior.samples]
    distinct = len(set(drawn))
    assert distinct > 5
    # To draw, the last token of a string is not read; to score, it and the ending but its last.
    assert tokens.count == 3 + beginnings(drawn, 5) + distinct * 3


def masked_of(lm: lp.LM, seed: int, temperature: float, length: int | None) -> list[ScoreRequest]:
    """Strings drawn under tight rules, not all to their ends, to score under looser ones."""
    tight = lm.bind(StringRules(stop=(".",), min_tokens=2, max_tokens=6, ban=("ab",)))
    free = lm.bind(StringRules(stop=(".",), min_tokens=0, max_tokens=6))
    wanted = [
        DrawRequest(lm, lm.encode_prompt(PROMPTS[k % 4]), tight, 6, (seed, k), length=length)
        for k in range(9)
    ]
    requests = []
    for r, d in zip(wanted, draw(wanted), strict=True):
        path = free.parse(d.ids, d.text.encode(), 6) if d.is_ended else free.begun(d.ids, 6)
        assert path is not None
        requests.append(ScoreRequest(lm, r.prompt, path, temperature=temperature))
    return requests


@given(st.integers(0, 99), st.sampled_from([1.0, 0.5]), st.sampled_from([None, 1, 3]))
@settings(max_examples=100, deadline=None)
def test_draws_are_scored_under_other_rules_without_a_pass(
    seed: int, temperature: float, length: int | None
) -> None:
    tokens = Tokens(LM)
    with kept.keeping():
        requests = masked_of(LM, seed, temperature, length)
        before = tokens.count
        # A text that goes on from a draw is not known as a whole, and is scored beside them.
        unknown = endings_of(LM, [(*r.prompt, *r.path.tokens) for r in requests[:2]], "abab", 0)
        known, rest = score(requests), score([*requests, *unknown])
        tokens.handle.remove()
        asked = {r.prompt + r.path.tokens for r in unknown}
        assert before < tokens.count <= before + sum(map(len, asked))
    expected = score([*requests, *unknown])
    assert_equal(known, expected[: len(requests)])
    assert_equal(rest, expected)


def test_a_masked_guide_reads_no_token_twice() -> None:
    lm = tiny_lm("abcd", seed=3, sharpness=0.1)
    form = lp.regex("[ab]{6}")

    def model() -> None:
        z = lp.sample("z", lp.LMString(lm, "abb", min_tokens=6, max_tokens=6))
        lp.factor("form", lp.log_matches(z, form))

    program = lp.compile(model)
    lm.memo.clear()
    tokens = Tokens(lm)
    guide = lp.MaskedGuide({"z": form})
    posterior = lp.infer(program, num_samples=12, seed=3, progress=False, guide=guide)
    tokens.handle.remove()
    assert tokens.count == 3 + beginnings((s["z"].ids for s in posterior.samples), 5)


@pytest.mark.parametrize("splits", [True, False])
def test_a_string_in_pieces_is_that_in_one_and_reads_each_token_once(
    splits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("abcd", seed=3, sharpness=0.1)
    monkeypatch.setattr(lm, "splits_head", splits)
    rules = lm.bind(StringRules(min_tokens=6, max_tokens=6))
    whole = [DrawRequest(lm, lm.encode_prompt("abb"), rules, 6, (k,)) for k in range(12)]
    expected = draw(whole)
    tokens = Tokens(lm)
    begun = [()] * 12
    log_probs = np.zeros(12)
    with kept.keeping():
        for length in (2, 3, 5, None):
            found = draw(
                [replace(r, begun=b, length=length) for r, b in zip(whole, begun, strict=True)]
            )
            begun = [d.ids for d in found]
            log_probs += [d.log_prob for d in found]
            if length is None:
                break
            paths = [rules.begun(b, 6) for b in begun]
            assert all(paths)
            before = tokens.count
            pairs = zip(whole, paths, strict=True)
            replies = score([ScoreRequest(lm, r.prompt, p) for r, p in pairs if p is not None])
            assert not splits or tokens.count == before
            np.testing.assert_allclose([r.log_prob for r in replies], log_probs, atol=2e-5)
    tokens.handle.remove()
    assert [d.ids for d in found] == [d.ids for d in expected]
    np.testing.assert_allclose(log_probs, [d.log_prob for d in expected], atol=2e-5)
    if splits:
        assert tokens.count == 3 + beginnings(begun, 5)


def test_pieces_of_many_strings_go_on_from_their_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("abcd", seed=3, sharpness=0.1)
    monkeypatch.setattr(decoding, "PACKED_ROWS", 5)
    rules = lm.bind(StringRules(min_tokens=6, max_tokens=6))
    whole = [DrawRequest(lm, lm.encode_prompt("abb"), rules, 6, (k,)) for k in range(12)]
    expected = draw(whole)
    tokens = Tokens(lm)
    begun: list[tuple[int, ...]] = [()] * 12
    with kept.keeping():
        for length in (3, 4, None):
            order = range(12) if length == 3 else range(11, -1, -1)
            pieces = [replace(whole[k], begun=begun[k], length=length) for k in order]
            for k, found in zip(order, draw(pieces), strict=True):
                begun[k] = found.ids
    tokens.handle.remove()
    assert begun == [d.ids for d in expected]
    assert tokens.count == 3 + sum(beginnings(begun[k : k + 5], 5) for k in range(0, 12, 5))


def test_pieces_that_outgrow_the_window_are_not_drawn_on_a_tree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = tiny_lm("abcd", seed=3, sharpness=0.1)
    assert lm.packs is not None
    monkeypatch.setattr(lm, "packs", replace(lm.packs, window=8))
    calls = []
    on_tree = decoding._draw_on

    def counted(*args: Any) -> Any:
        calls.append(len(args[2][0].begun))
        return on_tree(*args)

    monkeypatch.setattr(decoding, "_draw_on", counted)
    rules = lm.bind(StringRules(min_tokens=6, max_tokens=6))
    first = [DrawRequest(lm, lm.encode_prompt("abb"), rules, 6, (k,), length=2) for k in range(5)]
    with kept.keeping():
        begun = draw(first)
        for length in (4, 6):
            requests = [
                replace(r, begun=d.ids, length=length) for r, d in zip(first, begun, strict=True)
            ]
            begun = draw(requests)
    assert calls == [2]  # 3 + 4 tokens; with the last two, nine, the tree's mask would be wrong
    assert all(len(d.ids) == 6 for d in begun)


def test_trees_of_an_adapter_are_its_own() -> None:
    lm = tiny_lm("abcd", seed=3, sharpness=0.1)
    view = lm.trainable("own", rank=2)
    weights = [p for n, p in lm.model.named_parameters() if f"lora_B.{view.adapter}" in n]
    assert weights

    def change(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in weights:
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))

    def asked(adapter: str | None) -> list[ScoreRequest]:
        paths = [rules.begun(d.ids, 6) for d in drawn]
        return [
            ScoreRequest(lm, r.prompt, p, adapter=adapter)
            for r, p in zip(requests, paths, strict=True)
            if p is not None
        ]

    change(1)
    rules = lm.bind(StringRules(min_tokens=6, max_tokens=6))
    requests = [
        DrawRequest(lm, lm.encode_prompt("abb"), rules, 6, (k,), adapter=view.adapter, length=3)
        for k in range(6)
    ]
    with kept.keeping():
        drawn = draw(requests)
        tokens = Tokens(lm)
        own = score(asked(view.adapter))
        assert tokens.count == 0
        base = score(asked(None))
        assert tokens.count > 0
        change(2)
        changed = score(asked(view.adapter))
    tokens.handle.remove()
    assert_equal(changed, score(asked(view.adapter)))
    assert_equal(base, score(asked(None)))
    change(1)
    assert_equal(own, score(asked(view.adapter)))
    totals = [np.array([r.log_prob for r in found]) for found in (own, base, changed)]
    assert all(np.abs(a - b).max() > 1e-2 for a, b in itertools.pairwise(totals))


def test_what_was_computed_with_other_weights_is_not_used() -> None:
    lm = tiny_lm(["a", "b", ".", " "], seed=4, merged=["ab", "b."])
    with kept.keeping():
        requests = endings_of(lm, draws_of(lm, 1), "ab", 1)
        old = score(requests)
        weight = lm.model.get_output_embeddings().weight
        first = next(p for p in lm.model.parameters() if p is not weight)
        with torch.no_grad():
            first.mul_(1.5)
        found = score(requests)
    assert_equal(found, score(requests))
    assert abs(found[0].log_prob - old[0].log_prob) > 1e-3


def test_trees_end_with_the_outermost_block_and_keep_within_their_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def knows() -> bool:
        begun = [(*LM.encode_prompt(p),) for p in PROMPTS]
        return bool(kept.known(kept.trees_of(LM, None), begun, [len(b) for b in begun]))

    with kept.keeping():
        draws_of(LM, 1)
        assert knows()
        with kept.keeping():
            assert knows()
        assert knows()
        monkeypatch.setattr(kept, "KEPT_BYTES", 10)
        draws_of(LM, 2)
        assert knows()  # the new one has no room; the old one is there still
    assert not knows()
    draws_of(LM, 1)
    assert not knows()


def test_a_tree_knows_its_paths() -> None:
    (row,) = lay_out([(1, 2, 3), (1, 2, 4, 5), (7,)], 99).rows
    tree = kept.Tree.of_row(row)
    assert tree.depth == row.depth.tolist()
    assert tree.path((1, 2, 4, 9)) == [0, 1, 3] and tree.path((8,)) == []
    again = tree.add(1, 4)
    assert tree.first[again] == 3 and tree.path((1, 2, 4)) == [0, 1, 3]
    below = tree.add(again, 8)
    assert tree.path((1, 2, 4, 8)) == [0, 1, 3, below]
    new = tree.add(3, 6)
    assert new == len(row.ids) + 2 and tree.depth[new] == 3
    assert tree.path((1, 2, 4, 6)) == [0, 1, 3, new]


def test_only_the_last_trees_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_TREES", 3)
    with kept.keeping():
        for seed in range(5):
            begun = draws_of(LM, seed)
            trees = kept._trees.get()[id(LM)]
            assert len(trees) == min(seed + 1, 3)
            # The last one is among them.
            assert all(len(trees[-1].path(ids[:-1])) == len(ids) - 1 for ids in begun)
