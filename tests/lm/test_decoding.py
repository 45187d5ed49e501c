"""Draws: their probabilities, what they depend on, and five families of transformers."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from langppl.distributions import LMString, Text
from langppl.lm import LM, DrawRequest, perform
from langppl.lm.growing import Encoded, encode, step_padded
from langppl.lm.kept import keeping
from langppl.lm.lean import Lean
from langppl.lm.requests import DrawReply, ScoreReply
from langppl.lm.trie import shared
from langppl.testing import tiny_lm

TINY = tiny_lm("ab.", merged=["b.", "ab"], split=["é"])
PROMPTS = ["", "a", "ab.ab", "b" * 17, "é.a", "a.a.a.a.b.b"]


def request(dist: LMString, key: tuple[int | str, ...], **options: Any) -> DrawRequest:
    prompt = dist.prompt_ids()
    limit = dist.limit(len(prompt))
    assert limit is not None
    return DrawRequest(dist.lm, prompt, dist.bound, limit, key, **options)


def draw(requests: list[DrawRequest]) -> list[DrawReply]:
    replies = perform(requests)
    assert all(isinstance(r, DrawReply) for r in replies)
    return [r for r in replies if isinstance(r, DrawReply)]


def assert_draws_score_alike(lm: LM, prompts: list[str], **rules: Any) -> None:
    dists = [LMString(lm, prompt, **rules) for prompt in prompts]
    replies = draw([request(d, ("k", k)) for k, d in enumerate(dists)])
    for dist, reply in zip(dists, replies, strict=True):
        text = Text(reply.text, reply.ids, lm.fingerprint)
        assert float(dist.log_prob(text)) == pytest.approx(reply.log_prob, abs=1e-4), repr(text)


@pytest.mark.parametrize(
    "rules",
    [
        {"max_tokens": 8},
        {"max_tokens": 20, "stop": "."},
        {"max_tokens": 6, "min_tokens": 3, "stop": ["a.", "."], "temperature": 0.7},
        {"max_tokens": 6, "ban": "b", "temperature": 2.0},
    ],
)
def test_log_prob_of_a_draw_is_its_score(rules: dict[str, Any]) -> None:
    assert_draws_score_alike(TINY, PROMPTS * 8, **rules)


def test_a_draw_that_ends_counts_all_end_tokens() -> None:
    lm = tiny_lm("ab")
    lm.model.generation_config.eos_token_id = [1, 2]
    two = LM.from_parts(lm.model, lm.tokenizer, "two ends")
    assert_draws_score_alike(two, ["a", "b"] * 20, max_tokens=3, min_tokens=0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(0, 9)), min_size=1, max_size=8),
    st.sampled_from([1, 40, 4096]),
)
def test_a_draw_depends_on_its_key_and_prompt_alone(
    wanted: list[tuple[str, int]], token_budget: int
) -> None:
    lm = LM.from_parts(TINY.model, TINY.tokenizer, "tiny", token_budget=token_budget)
    requests = [
        request(LMString(lm, prompt, stop=".", max_tokens=10), (7, "site", key))
        for prompt, key in wanted
    ]
    together = draw(requests)
    for one, reply in zip(requests, together, strict=True):
        (alone,) = draw([one])
        assert (alone.ids, alone.text) == (reply.ids, reply.text)
        assert alone.log_prob == pytest.approx(reply.log_prob, abs=1e-5)


def test_other_keys_give_other_draws() -> None:
    dist = LMString(TINY, "a", max_tokens=12, min_tokens=12)
    keys: list[tuple[int | str, ...]] = [(0, 1), (1, 0), (0, 2), ("0", 1), (0, 1, 0), (1,)]
    replies = draw([request(dist, key) for key in keys])
    assert len({r.ids for r in replies}) == len(keys)


class Watched:
    """Records the shape of every forward pass of a model."""

    def __init__(self, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        base = type(lm.model.base_model)
        forward = base.forward

        def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
            self.shapes.append(tuple(kwargs["input_ids"].shape))
            return forward(model, *args, **kwargs)

        monkeypatch.setattr(base, "forward", watched)
        states = Lean.states

        def of_lean(lean: Lean, ids: torch.Tensor, *args: Any) -> torch.Tensor:
            self.shapes.append((1, len(ids)))
            return states(lean, ids, *args)

        monkeypatch.setattr(Lean, "states", of_lean)


def test_finished_rows_leave_and_prompts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(TINY, monkeypatch)
    dist = LMString(TINY, "ab", stop=".", max_tokens=12)
    replies = draw([request(dist, ("leave", k)) for k in range(40)])
    assert watched.shapes[0] == (1, len(dist.prompt_ids()))
    # A row that took n actions was fed n − 1 of them.
    assert all(rows == 1 for rows, _ in watched.shapes)  # one tree, whose cache all strings share
    going = [strings for _, strings in watched.shapes[1:]]
    actions = []
    for reply in replies:
        is_end = not reply.text.endswith(".") and len(reply.ids) < 12
        actions.append(len(reply.ids) + is_end)
    # Rows that have come the same way go on as one.
    assert going == [
        len({r.ids[:t] for r, a in zip(replies, actions, strict=True) if a > t})
        for t in range(1, max(actions))
    ]
    assert going[-1] < max(going) < 40


def test_finished_rows_leave_a_padded_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TINY, "packs", None)
    watched = Watched(TINY, monkeypatch)
    dist = LMString(TINY, "ab", stop=".", max_tokens=12)
    draw([request(dist, ("leave", k)) for k in range(40)])
    assert watched.shapes[0] == (1, len(dist.prompt_ids()))
    going = [rows for rows, _ in watched.shapes[1:]]
    assert going == sorted(going, reverse=True) and going[-1] < going[0] <= 40


def test_strings_that_may_outgrow_the_budget_are_no_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(TINY, monkeypatch)
    dist = LMString(TINY, "ab", stop=".")
    draw([request(dist, ("long", k)) for k in range(8)])
    assert max(rows for rows, _ in watched.shapes) > 1


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("budget", [512, 4])
def test_strings_of_one_tree_are_those_of_a_padded_batch(
    budget: int, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["", "a", "ab", "ab.", "ab.b", "b b"]
    rules: list[dict[str, Any]] = [{"max_tokens": 9}, {"stop": ".", "max_tokens": 7}, {"ban": "b"}]
    wanted = [
        request(LMString(TINY, prompt, **{"max_tokens": 8, **rule}), ("tree", k))
        for k in range(9)
        for prompt in prompts
        for rule in rules
    ]
    monkeypatch.setattr("langppl.lm.decoding.PACKED_ROWS", 50)
    monkeypatch.setattr(TINY, "node_budget", budget)
    assert TINY.packs is not None and TINY.packs.in_blocks
    monkeypatch.setattr(TINY, "packs", replace(TINY.packs, in_blocks=in_blocks))
    tree = draw(wanted)
    monkeypatch.setattr(TINY, "packs", None)
    padded = draw(wanted)
    assert [r.ids for r in tree] == [r.ids for r in padded]
    np.testing.assert_allclose([r.log_prob for r in tree], [r.log_prob for r in padded], atol=2e-5)


PIECES: list[dict[str, Any]] = [
    {"max_tokens": 9},
    {"stop": ["a.", "."], "max_tokens": 7, "min_tokens": 2},
    {"ban": "b", "max_tokens": 8, "temperature": 2.0},
    {"stop": "."},
]


def in_pieces(whole: list[DrawRequest], most: int) -> list[tuple[DrawReply, float]]:
    """Draws strings at most so many tokens at a time; each with its log-probability."""
    pieces: list[tuple[DrawReply, float]] = [(DrawReply((), "", 0.0), 0.0)] * len(whole)
    going = list(range(len(whole)))
    while going:
        begun = [pieces[k][0].ids for k in going]
        wanted = [
            replace(whole[k], begun=b, length=len(b) + most)
            for k, b in zip(going, begun, strict=True)
        ]
        unfinished = []
        for k, one, reply in zip(going, wanted, draw(wanted), strict=True):
            pieces[k] = (reply, pieces[k][1] + reply.log_prob)
            assert one.length is not None and reply.ids[: len(one.begun)] == one.begun
            if not reply.is_ended:
                assert len(reply.ids) == one.length
                unfinished.append(k)
        going = unfinished
    return pieces


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("way", ["packed", "kept", "padded"])
def test_a_string_drawn_in_pieces_is_the_string_drawn_at_once(
    way: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "padded":
        monkeypatch.setattr(TINY, "packs", None)
    whole = [
        request(LMString(TINY, prompt, **rules), ("pieces", k))
        for k in range(6)
        for prompt in ["", "ab", "b b"]
        for rules in PIECES
    ]
    with keeping() if way == "kept" else contextlib.nullcontext():
        at_once, pieces = draw(whole), in_pieces(whole, most)
    assert [r.ids for r in at_once] == [r.ids for r, _ in pieces]
    assert [r.text for r in at_once] == [r.text for r, _ in pieces]
    np.testing.assert_allclose([r.log_prob for r in at_once], [p for _, p in pieces], atol=5e-5)


def test_a_piece_goes_on_under_the_rules_of_the_whole() -> None:
    """What a string has begun with counts for its stops, its lengths and its limit."""
    dist = LMString(TINY, "a", stop="b.", min_tokens=3, max_tokens=4)
    (a,), (b,), (dot,) = (TINY.encode_text(t) for t in "ab.")
    replies = draw([request(dist, ("rules", k), begun=(a, a, b)) for k in range(60)])
    assert {len(r.ids) for r in replies} == {3, 4}  # it may end at once, and has one action left
    # The dot that completes the stop is an ending action, which takes all that begin with it.
    ends = {r.text for r in replies if r.text.startswith("aab.")}
    assert ends == {"aab."}
    states = [dist.bound.start(4)]
    for token in (a, a, b):
        states.append(dist.bound.advance(states[-1], token))
    assert dot in dist.bound.step(states[-1]).kept
    for reply in replies:
        text = Text(reply.text, reply.ids, TINY.fingerprint)
        score = dist.request(text)
        assert score is not None
        (found,) = perform([score])
        assert isinstance(found, ScoreReply)
        rest = float(found.tokens[3:].sum() + found.ending)
        assert reply.log_prob == pytest.approx(rest, abs=1e-4)


def test_a_string_that_has_all_its_tokens_is_answered_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched(TINY, monkeypatch)
    dist = LMString(TINY, "a", max_tokens=3)
    begun = TINY.encode_text("aba")
    assert len(begun) == 2
    full = request(dist, ("full", 0), begun=(*begun, begun[0]))
    stopped = request(dist, ("full", 0), begun=begun, length=2)
    replies = draw([full, stopped])
    assert [(r.ids, r.text, r.log_prob) for r in replies] == [
        ((*begun, begun[0]), "abaab", 0.0),
        (begun, "aba", 0.0),
    ]
    assert watched.shapes == []


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("aa.", {}, "token 2 ends the string"),
        ("ba", {}, "token 0 is not legal there"),
        ("aaaaa", {}, "1 more tokens than it may have"),
        ("aa", {"length": 1}, "1 more tokens than it may have"),
    ],
)
def test_a_string_that_cannot_have_begun_so_is_an_error(
    text: str, options: dict[str, Any], said: str
) -> None:
    dist = LMString(TINY, "a", stop=".", ban="b", max_tokens=4)
    with pytest.raises(ValueError, match=said):
        draw([request(dist, ("bad", 0), begun=TINY.encode_text(text), **options)])


@pytest.mark.parametrize("packs", [True, False])
def test_token_budget_bounds_every_pass(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM.from_parts(TINY.model, TINY.tokenizer, "tiny", token_budget=60)
    dists = [LMString(lm, prompt, max_tokens=5) for prompt in PROMPTS]
    requests = [request(d, ("b", k)) for k in range(6) for d in dists]
    whole = draw(
        [request(LMString(TINY, r, max_tokens=5), ("b", k)) for k in range(6) for r in PROMPTS]
    )
    if not packs:
        lm.packs = None
    watched = Watched(lm, monkeypatch)
    chunked = draw(requests)
    assert [r.ids for r in chunked] == [r.ids for r in whole]
    assert all(rows * length <= 60 for rows, length in watched.shapes)
    longest = max(len(r.prompt) for r in requests) + 5
    # Strings together: lines of a batch, or nodes of a tree after its prompts.
    together = max(max(shape) if packs else shape[0] for shape in watched.shapes)
    assert longest <= 60 and together >= 60 // longest


def test_a_long_prompt_is_read_once_for_all_its_strings() -> None:
    lm = LM.from_parts(TINY.model, TINY.tokenizer, "tiny", token_budget=200)
    prompt, other = "ab.b" * 15, "ab.b" * 14 + "a"
    dists = [LMString(lm, p, min_tokens=4, max_tokens=4) for p in (prompt, other)]
    requests = [request(d, ("long", k)) for k in range(20) for d in dists]
    lengths = [len(d.prompt_ids()) for d in dists]
    assert 40 * (max(lengths) + 4) > 4 * lm.token_budget  # padded, it would be many batches
    before = lm.tally.copy()
    replies = draw(requests)
    nodes = lengths[0] + lengths[1] - shared(*(d.prompt_ids() for d in dists))
    assert nodes < lengths[0] + 10
    begun = {(r.read, d.ids[:n]) for r, d in zip(requests, replies, strict=True) for n in (1, 2, 3)}
    assert 30 < len(begun) < 3 * len(requests)
    assert (lm.tally - before).drawn == nodes + len(begun)
    for one, reply in zip(requests[:4], replies[:4], strict=True):
        assert draw([one])[0].ids == reply.ids


WIDE = tiny_lm(["a", "b", ".", " "], seed=3, window=2048)


def narrow(node_budget: int, token_budget: int) -> LM:
    """`WIDE` in smaller passes."""
    lm = LM.from_parts(WIDE.model, WIDE.tokenizer, "tiny", token_budget=token_budget)
    lm.node_budget = node_budget
    return lm


def long_text(length: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(list("ab. "), length))


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("length", [255, 256, 257, 300, 513, 1000])
def test_a_prompt_is_read_once_by_a_tree_whatever_its_length(length: int, in_blocks: bool) -> None:
    lm = narrow(node_budget=256, token_budget=300)
    assert lm.packs is not None
    lm.packs = replace(lm.packs, in_blocks=in_blocks)
    text = long_text(length)
    # The tokens of all strings take several trees, which have the prompt's cache in common.
    dists = [LMString(lm, text, min_tokens=9, max_tokens=9) for lm in (lm, WIDE)]
    requests, whole = ([request(d, ("once", k)) for k in range(50)] for d in dists)
    assert len(requests[0].read) == length and lm.token_budget < 50 * 9
    replies = draw(requests)
    at_once = draw(whole)
    assert [r.ids for r in replies] == [r.ids for r in at_once]
    np.testing.assert_allclose(
        [r.log_prob for r in replies], [r.log_prob for r in at_once], atol=2e-5
    )
    first, second = replies[:33], replies[33:]
    steps = [len({r.ids[:n] for r in part for n in range(1, 9)}) for part in (first, second)]
    assert lm.tally.drawn == length + sum(steps)


def test_long_prompts_that_begin_alike_are_one_tree() -> None:
    lm = narrow(node_budget=128, token_budget=1024)
    start = long_text(500)
    dists = [LMString(lm, start + end, min_tokens=3, max_tokens=3) for end in ("a", "b.", "ba")]
    other = LMString(lm, long_text(300, 1), min_tokens=3, max_tokens=3)
    requests = [request(d, ("alike", k)) for k in range(4) for d in (*dists, other)]
    replies = draw(requests)
    begun = {(r.read, d.ids[:n]) for r, d in zip(requests, replies, strict=True) for n in (1, 2)}
    assert lm.tally.drawn == 500 + 4 + 300 + len(begun)  # "a", "b", and "." and "a" after it
    alone = [draw([r])[0] for r in requests]
    assert [r.ids for r in replies] == [r.ids for r in alone]


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("options", [{"max_tokens": 80, "min_tokens": 70}, {"stop": "a"}])
@pytest.mark.parametrize("length", [300, 600, 1100])
def test_a_long_prompt_is_encoded_once_for_all_batches(
    length: int, options: dict[str, Any], packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = narrow(node_budget=256, token_budget=1024)
    if not packs:
        lm.packs = None
    texts = [long_text(length), long_text(length + 1, 1)]
    requests, whole = (
        [request(LMString(lm, t, **options), ("padded", k)) for k in range(7) for t in texts]
        for lm in (lm, WIDE)
    )
    watched = Watched(lm, monkeypatch)
    replies = draw(requests)
    read = [shape for shape in watched.shapes if shape[1] > 1]
    if options.get("max_tokens"):  # some are put off, to batches of their own
        rounds = [read[at : at + 2] for at in range(0, len(read), 2)]
        assert 1 <= len(rounds) <= 2
        assert all(shapes == [(1, length), (1, length + 1)] for shapes in rounds)
    else:
        assert read == [(1, length), (1, length + 1)]
        steps = [len(r.ids) - r.text.endswith("a") for r in replies]  # nothing after a stop
        assert lm.tally.drawn == length + length + 1 + sum(steps)
    # Lines of a batch, unless one alone is longer.
    assert all(rows == 1 or rows * length <= 1024 for rows, _ in watched.shapes)
    assert [r.ids for r in replies] == [r.ids for r in draw(whole)]


def test_the_cache_of_a_prompt_stays_as_it_is() -> None:
    known = Encoded(WIDE)
    ids, other = WIDE.encode_prompt(long_text(20)), WIDE.encode_prompt(long_text(9, 1))
    with torch.no_grad():
        expected = encode(WIDE, [ids])
        for rows in (1, 3):
            states, cache, mask, owner = known.encode([ids] * rows)
            torch.testing.assert_close(states, expected[0])
            assert cache.get_seq_length() == 20 and owner.tolist() == [0] * rows
            assert mask.tolist() == [[1] * 20]
            cache.batch_select_indices(owner)
            step_padded(WIDE, torch.tensor([[3]] * rows), mask[owner], cache)
            assert cache.get_seq_length() == 21
        before = WIDE.tally.copy()
        known.encode([ids])
        assert WIDE.tally == before
        assert known.encode([other])[2].tolist() == [[1] * 9]
        states, _, mask, owner = known.encode([ids, other, ids])
        assert owner.tolist() in ([0, 1, 0], [1, 0, 1]) and mask.shape == (2, 20)
        torch.testing.assert_close(states[owner[0]], expected[0][0])


def test_temperature_multiplies_the_distributions_own() -> None:
    both = LMString(TINY, "a", max_tokens=6, temperature=0.5)
    own = LMString(TINY, "a", max_tokens=6, temperature=0.25)
    for k in range(10):
        (one,) = draw([request(both, ("t", k), temperature=0.5)])
        (two,) = draw([request(own, ("t", k))])
        assert one == two
        text = Text(one.text, one.ids, TINY.fingerprint)
        assert float(own.log_prob(text)) == pytest.approx(one.log_prob, abs=1e-4)
    cold = {both.draw(("c", k), temperature=1e-4)[0] for k in range(10)}
    assert len(cold) == 1


def test_nothing_to_draw() -> None:
    assert perform([]) == []


def test_sampling_through_torch_repeats_with_its_seed() -> None:
    dist = LMString(TINY, "a", max_tokens=8)
    torch.manual_seed(3)
    first = [dist.sample() for _ in range(5)]
    torch.manual_seed(3)
    assert [dist() for _ in range(5)] == first
    assert len(set(first)) > 1
    with pytest.raises(ValueError, match="one by one"):
        dist.sample((3,))


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


def family(name: str) -> LM:
    tokenizer = TINY.tokenizer
    shape: dict[str, Any] = {**SHAPE, "vocab_size": TINY.vocabulary.size}
    configs: dict[str, Any] = {
        "GPT2": lambda: transformers.GPT2Config(
            vocab_size=shape["vocab_size"],
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
        ),
        "GPTNeoX": lambda: transformers.GPTNeoXConfig(**shape),
        "Qwen3": lambda: transformers.Qwen3Config(**shape, **GROUPED),
        "Gemma3": lambda: transformers.Gemma3TextConfig(
            **shape,
            **GROUPED,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        ),
        "Mistral": lambda: transformers.MistralConfig(**shape, **GROUPED, sliding_window=4),
    }
    classes = {
        "GPT2": transformers.GPT2LMHeadModel,
        "GPTNeoX": transformers.GPTNeoXForCausalLM,
        "Qwen3": transformers.Qwen3ForCausalLM,
        "Gemma3": transformers.Gemma3ForCausalLM,
        "Mistral": transformers.MistralForCausalLM,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return LM.from_parts(classes[name](configs[name]()), tokenizer, name)


@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX", "Qwen3", "Gemma3", "Mistral"])
def test_families_draw_what_they_score(name: str) -> None:
    lm = family(name)
    assert lm.window == 128
    assert_draws_score_alike(lm, PROMPTS * 3, max_tokens=12, min_tokens=5, stop=".")
    # And the score is the plain forward pass's, which no window or padding of ours has touched.
    dist = LMString(lm, "ab.ab" * 3, max_tokens=8, min_tokens=8)
    text, log_prob = dist.draw(("plain", 0))
    assert text.ids is not None
    prompt = dist.prompt_ids()
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[*prompt, *text.ids]])).logits[0]
    total, state = 0.0, dist.bound.start(8)
    for at, token in enumerate(text.ids):
        row = logits[len(prompt) - 1 + at].masked_fill(~dist.bound.step(state).legal, -torch.inf)
        total += float(row.log_softmax(-1)[token])
        state = dist.bound.advance(state, token)
    assert log_prob == pytest.approx(total, abs=1e-4)
    assert np.isfinite(total)


@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_is_drawn_from_logits_that_are_no_numbers(rows: int) -> None:
    lm = tiny_lm("ab.", seed=1)
    lm.model.model.layers[0].mlp.up_proj.weight.data.fill_(torch.nan)
    string = LMString(lm, "a", max_tokens=4)
    with pytest.raises(FloatingPointError, match=r"LM.'tiny-1'. gives logits that are not numbers"):
        draw([request(string, ("k", k)) for k in range(rows)])
