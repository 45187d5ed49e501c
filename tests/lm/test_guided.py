"""Guided strings: the probabilities that their definition gives, and draws that follow them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from langppl.distributions import LMChoice, LMString, Text
from langppl.lm import LM, DrawRequest, ScoreRequest, guided, perform
from langppl.lm.requests import Beside, DrawReply, Guided, ScoreReply, StateRequest
from langppl.lm.scoring import score_with_gradients
from langppl.lm.trie import shared
from langppl.testing import tiny_lm

TINY = tiny_lm("ab.", merged=["b.", "ab"], split=["é"])
PROMPTS = ["", "a", "ab.ab", "b" * 17, "é.a", "a.a.a.a.b.b"]
SCALES = [0.4, 1.0, 2.5]


def with_adapter(lm: LM, name: str = "own", seed: int = 0) -> LM:
    """The LM with an adapter of random weights."""
    linear = {n.rpartition(".")[2] for n, _ in lm.model.named_modules() if n.endswith("_proj")}
    lm.add_adapter(name, LoraConfig(r=3, lora_alpha=6, target_modules=sorted(linear)))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in lm.model.named_parameters():
            if f".{name}." in n:
                p.copy_(0.3 * torch.randn(p.shape, generator=random))
    return lm


ADAPTED = with_adapter(tiny_lm("ab.", merged=["b.", "ab"], split=["é"], seed=3))


def reading(lm: LM, prompt: str, without: str, scale: float) -> Guided:
    return Guided(lm.encode_prompt(prompt), lm.encode_prompt(without), scale)


def logits(lm: LM, ids: tuple[int, ...], adapter: str | None) -> torch.Tensor:
    with lm.adapter(adapter):
        return lm.model(torch.tensor([ids])).logits[0].float()


def by_definition(request: ScoreRequest) -> torch.Tensor:
    """Log-probability of each action, from whole passes of the model over each text."""
    lm, path, beside = request.lm, request.path, request.beside
    assert beside is not None
    rows = []
    for prompt, adapter in (
        (beside.base, beside.adapter),
        (request.prompt, request.adapter),
        (beside.without, beside.adapter),
    ):
        rows.append(logits(lm, prompt + path.tokens, adapter)[len(prompt) - 1 :])
    base, own, without = rows
    found = []
    for t, step in enumerate(path.steps):
        mixed = (base[t] + beside.scale * (own[t] - without[t])) / request.temperature
        log_probs = mixed.masked_fill(~step.legal, -torch.inf).log_softmax(-1)
        ids = [path.tokens[t]] if t < len(path.tokens) else path.ending_ids.tolist()
        found.append(log_probs[ids].logsumexp(-1))
    return torch.stack(found)


def total(request: ScoreRequest) -> float:
    return float(by_definition(request).sum().detach())


RULES: list[dict[str, Any]] = [
    {"max_tokens": 5},
    {"max_tokens": 9, "stop": "."},
    {"max_tokens": 6, "min_tokens": 2, "stop": ["a.", "."], "temperature": 0.7},
    {"max_tokens": 6, "ban": "b", "temperature": 2.0, "truncate": "reject"},
]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(PROMPTS),
    st.sampled_from(PROMPTS),
    st.sampled_from(PROMPTS),
    st.sampled_from(SCALES),
    st.sampled_from(RULES),
    st.integers(0, 99),
)
def test_scores_and_draws_are_those_of_the_definition(
    base: str, prompt: str, without: str, scale: float, rules: dict[str, Any], seed: int
) -> None:
    fn = LMString(ADAPTED, base, **rules)
    read = reading(ADAPTED, prompt, without, scale)
    text, log_q = fn.draw(("k", seed), prompt=read, adapter="own")
    request = fn.request(text, prompt=read, adapter="own")
    assert request is not None
    expected = total(request)
    assert log_q == pytest.approx(expected, abs=1e-4)
    (reply,) = perform([request])
    assert isinstance(reply, ScoreReply)
    assert reply.log_prob == pytest.approx(expected, abs=1e-4)


def test_gradients_are_those_of_the_definition() -> None:
    lm = with_adapter(tiny_lm("ab.", seed=5))
    own = {n: p for n, p in lm.model.named_parameters() if ".own." in n}
    fns = [LMString(lm, p, stop=".", max_tokens=6) for p in ("a", "ab", "a")]
    reads = [
        reading(lm, *r) for r in (("ab.ab", "ab.", 0.8), ("bb", "b", 1.7), ("ab.ab", "b", 0.8))
    ]
    requests = []
    for k, (fn, read) in enumerate(zip(fns, reads, strict=True)):
        text, _ = fn.draw(("g", k), prompt=read, adapter="own")
        request = fn.request(text, prompt=read, adapter="own")
        assert request is not None
        requests.append(request)
    with torch.enable_grad():
        found = torch.stack([f.total for f in score_with_gradients(requests)])
        expected = torch.stack([by_definition(r).sum() for r in requests])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        weights = torch.tensor([1.0, -2.0, 0.5])
        ours = torch.autograd.grad((weights * found).sum(), list(own.values()))
        theirs = torch.autograd.grad((weights * expected).sum(), list(own.values()))
    assert max(float(g.abs().max()) for g in theirs) > 1e-2
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_guided_strings_stand_beside_others_in_one_pass() -> None:
    """Those that are not guided, and texts whose state is asked for, are as they would be alone."""
    fn = LMString(ADAPTED, "a", stop=".", max_tokens=8)
    reads = [
        reading(ADAPTED, "ab.ab", "b", 0.7),
        ADAPTED.encode_prompt("ab.ab"),
        reading(ADAPTED, "ab.ab", "b", 1.3),
        reading(ADAPTED, "ab.ab", "a", 0.7),
    ]
    text, _ = fn.draw(("m",), prompt=reads[1], adapter="own")
    requests: list[Any] = [fn.request(text, prompt=r, adapter="own") for r in reads]
    requests.insert(2, StateRequest(ADAPTED, ADAPTED.encode_prompt("ab.ab"), "own"))
    with torch.no_grad():
        together = score_with_gradients(requests, with_states=True)
        alone = [score_with_gradients([r], with_states=True)[0] for r in requests]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.canonical, other.canonical, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.states, other.states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.state, other.state, atol=1e-5, rtol=1e-5)
    # What is read after the prompt is the same, guided or not: heads and flows rest on it.
    torch.testing.assert_close(together[0].state, together[1].state)
    totals = [float(f.total) for k, f in enumerate(together) if k != 2]
    assert len({round(t, 4) for t in totals}) == 4


@pytest.mark.parametrize("scale", [1e-9, 1.0])
def test_at_its_ends_it_is_the_prior_and_the_prompted(scale: float) -> None:
    fn = LMString(TINY, "ab", stop=".", max_tokens=8)
    ids = TINY.encode_prompt("b.b.")
    read = Guided(ids, fn.prompt_ids(), scale)
    plain = None if scale < 1.0 else ids
    for k in range(5):
        guided_draw = fn.draw(("e", k), prompt=read)
        expected = fn.draw(("e", k), prompt=plain)
        assert guided_draw[0] == expected[0]
        assert guided_draw[1] == pytest.approx(expected[1], abs=1e-4)


def drawn(lm: LM, readings: list[Guided], **options: Any) -> list[DrawReply]:
    requests = []
    for k, read in enumerate(readings):
        fn = LMString(lm, PROMPTS[k % 3], stop=".", max_tokens=12)
        own = fn.prompt_ids()
        requests.append(
            DrawRequest(
                lm,
                read.prompt,
                fn.bound,
                fn.limit(len(own)),
                ("d", k),
                adapter="own",
                beside=read.beside(own, None),
                **options,
            )
        )
    return [r for r in perform(requests) if isinstance(r, DrawReply)]


@pytest.mark.parametrize("budget", [1, 60, 4096])
@pytest.mark.parametrize("packs", [True, False])
def test_a_draw_does_not_depend_on_its_batch_or_route(budget: int, packs: bool) -> None:
    reads = [
        reading(ADAPTED, PROMPTS[k % 5 + 1], PROMPTS[(k + 2) % 6], SCALES[k % 3]) for k in range(9)
    ]
    expected = [drawn(ADAPTED, [reads[0]] * k + [read])[-1] for k, read in enumerate(reads)]
    lm = LM.from_parts(ADAPTED.model, ADAPTED.tokenizer, "other", token_budget=budget)
    if not packs:
        lm.packs = None
    found = drawn(lm, reads)
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.text) == (other.ids, other.text)
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)


FAR = with_adapter(tiny_lm("ab.", seed=3, window=1024))


@pytest.mark.parametrize("length", [60, 127, 129, 400])
def test_long_texts_are_read_once_for_all_their_strings(length: int) -> None:
    lm = LM.from_parts(FAR.model, FAR.tokenizer, "other", token_budget=600)
    lm.node_budget = 128
    random = np.random.default_rng(length)
    shown, base, without = ("".join(random.choice(list("ab."), length)) for _ in range(3))
    replies = []
    for each in (lm, FAR):
        fn = LMString(each, base, min_tokens=3, max_tokens=3)
        own, read = fn.prompt_ids(), reading(each, shown, without, 1.5)
        beside = read.beside(own, None)
        replies.append(
            perform(
                [
                    DrawRequest(
                        each, read.prompt, fn.bound, 3, ("far", k), adapter="own", beside=beside
                    )
                    for k in range(20)
                ]
            )
        )
    found, expected = replies
    assert [r.ids for r in found] == [r.ids for r in expected]
    begun = {r.ids[:n] for r in found for n in (1, 2)}
    alike = shared(lm.encode_prompt(base), lm.encode_prompt(without))
    assert lm.tally.drawn == 3 * length - alike + 3 * len(begun)


def test_a_string_drawn_in_pieces_is_the_string_drawn_at_once() -> None:
    read = reading(ADAPTED, "ab.ab", "bb", 0.8)
    for k in range(6):
        fn = LMString(ADAPTED, "a", max_tokens=9, min_tokens=4)
        whole, log_q = fn.draw(("p", k), prompt=read, adapter="own")
        rest, log_rest = fn.draw_on(whole.ids[:3], ("p", k), prompt=read, adapter="own")
        assert (rest, rest.ids) == (whole, whole.ids)
        request = fn.request(whole, prompt=read, adapter="own")
        assert request is not None
        (reply,) = perform([request])
        assert isinstance(reply, ScoreReply)
        assert log_rest == pytest.approx(log_q - reply.tokens[:3].sum(), abs=1e-4)


def test_scores_that_differ_in_what_guides_are_remembered_apart() -> None:
    fn = LMString(TINY, "a", stop=".", max_tokens=8)
    text, _ = fn.draw(("r",))
    reads = [reading(TINY, "ab", w, s) for w in ("b", "bb") for s in (0.5, 1.5)]
    requests: list[Any] = [fn.request(text, prompt=r) for r in (*reads, TINY.encode_prompt("ab"))]
    TINY.memo.clear()
    first = [r.log_prob for r in perform(requests) if isinstance(r, ScoreReply)]
    again = [r.log_prob for r in perform(requests) if isinstance(r, ScoreReply)]
    assert first == again and len({round(v, 5) for v in first}) == 5
    TINY.memo.clear()
    alone = [perform([r])[0] for r in requests]
    assert first == pytest.approx(
        [r.log_prob for r in alone if isinstance(r, ScoreReply)], abs=1e-5
    )


def test_a_choice_is_guided_by_its_options_tokens() -> None:
    choice = LMChoice(ADAPTED, "a", ["ab.", "b"])
    read = reading(ADAPTED, "ab.", "b", 1.4)
    found = choice.log_probs(prompt=read, adapter="own")
    scores = [total(r) for r in choice.requests(prompt=read, adapter="own")]
    expected = np.array(scores) - np.logaddexp.reduce(scores)
    assert found == pytest.approx(expected, abs=1e-4)
    counts = [choice.draw((k,), prompt=read, adapter="own")[0] == "b" for k in range(400)]
    p = float(np.exp(found[1]))
    assert abs(np.mean(counts) - p) < 4 * (p * (1 - p) / 400) ** 0.5


def test_the_base_may_stand_on_an_adapter_of_its_own() -> None:
    lm = with_adapter(with_adapter(tiny_lm("ab.", seed=7), "own", 1), "view", 2)
    fn = LMString(lm, "a", stop=".", max_tokens=6)
    text = Text("ab.", lm.encode_text("ab."), lm.fingerprint)
    request = fn.request(text, prompt=reading(lm, "bb", "b", 0.9), adapter="own")
    assert request is not None and request.beside is not None
    other = replace(request, beside=replace(request.beside, adapter="view"))
    found = [r.log_prob for r in perform([request, other]) if isinstance(r, ScoreReply)]
    expected = [total(r) for r in (request, other)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-2


def test_an_adapter_on_the_head_is_refused() -> None:
    lm = tiny_lm("ab.", seed=9)
    head = next(n for n, m in lm.model.named_modules() if m is lm.model.get_output_embeddings())
    lm.add_adapter("own", LoraConfig(r=2, target_modules=[head.rpartition(".")[2], "q_proj"]))
    fn = LMString(lm, "a", stop=".", max_tokens=6)
    read = reading(lm, "ab", "b", 0.9)
    with pytest.raises(ValueError, match="on its head"):
        fn.draw(("h",), prompt=read, adapter="own")
    text, log_q = fn.draw(("h",))  # those that are not guided are not concerned
    assert float(fn.log_prob(text)) == pytest.approx(log_q, abs=1e-4)
    request = fn.request(text, prompt=read, adapter="own")
    assert request is not None
    with pytest.raises(ValueError, match="on its head"):
        perform([request])


def test_blending_keeps_what_is_not_guided() -> None:
    found = torch.arange(12.0).reshape(6, 2)
    beside = Beside((1,), (2,), 0.5)
    others = {1: (torch.ones(2, 2), torch.zeros(2, 2)), 2: (torch.ones(2, 2), torch.zeros(2, 2))}
    rows = {0: np.array([0, 1]), 1: np.array([2, 3]), 2: np.array([2, 4])}
    states, at = guided.blend(found, rows, [None, beside, beside], others)
    assert torch.equal(states[torch.from_numpy(at[0])], found[:2])
    expected = 1.0 + 0.5 * found
    assert torch.equal(states[torch.from_numpy(at[1])], expected[[2, 3]])
    assert torch.equal(states[torch.from_numpy(at[2])], expected[[2, 4]])
    assert len(states) == 9 and at[1][0] == at[2][0]  # the row that they share is mixed once
