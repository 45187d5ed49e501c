"""Scores: batched, one by one and by a plain forward pass; gradients to an adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from langppl.distributions import LMString, Text
from langppl.lm import LM, ScoreRequest, perform
from langppl.lm.padded import _chunks
from langppl.lm.requests import ScoreReply, StateReply, StateRequest
from langppl.lm.scoring import score, score_with_gradients
from langppl.testing import tiny_lm

LMS = {budget: tiny_lm("ab. ", merged=["b.", "ab", ". "], split=["é"]) for budget in (1, 37, 4096)}
for _budget, _lm in LMS.items():
    _lm.token_budget = _budget
TINY = LMS[4096]

strings = st.text(alphabet="ab. é", max_size=7)
RULES = [
    {},
    {"max_tokens": 8},
    {"max_tokens": 9, "min_tokens": 0, "stop": "."},
    {"max_tokens": 6, "stop": ["a.", ". "], "temperature": 0.5},
    {"ban": "b"},
]


def request(lm: LM, prompt: str, value: str, rules: int) -> ScoreRequest | None:
    return LMString(lm, prompt, **RULES[rules]).request(Text(value))  # type: ignore[arg-type]


def chunks_of(lm: LM, requests: Sequence[ScoreRequest]) -> Any:
    sequences = [r.prompt + r.path.tokens for r in requests]
    return _chunks(lm, sequences, [len(r.prompt) - 1 for r in requests])


def plain(request: ScoreRequest) -> tuple[list[float], float, list[float]]:
    """The same three things from one unpadded forward pass, in float64 loops."""
    path = request.path
    with torch.no_grad(), request.lm.adapter(request.adapter):
        ids = torch.tensor([[*request.prompt, *path.tokens]])
        logits = request.lm.model(input_ids=ids, use_cache=False).logits[0].double()
    rows = (logits[len(request.prompt) - 1 :] / request.temperature).tolist()

    def log_sum(row: list[float], ids: list[int]) -> float:
        return math.log(math.fsum(math.exp(row[i]) for i in ids)) if ids else -math.inf

    def total(at: int) -> float:
        return log_sum(rows[at], path.steps[at].legal.nonzero()[:, 0].tolist())

    tokens = [rows[at][token] - total(at) for at, token in enumerate(path.tokens)]
    ending = 0.0
    if path.ending in ("end", "stop"):
        last = len(path.tokens)
        ending = log_sum(rows[last], path.ending_ids.tolist()) - total(last)
    canonical = [
        log_sum(rows[at], path.steps[at].canonical.tolist()) - total(at)
        for at in range(len(path.steps))
    ]
    return tokens, ending, canonical + [-math.inf] * (len(tokens) + 1 - len(canonical))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(strings, strings, st.integers(0, len(RULES) - 1)), min_size=1, max_size=9),
    st.sampled_from([1, 37, 4096]),
)
def test_a_batch_is_its_members_is_a_plain_forward_pass(
    wanted: list[tuple[str, str, int]], budget: int
) -> None:
    found = [request(LMS[budget], *one) for one in wanted]
    requests = [r for r in found if r is not None]
    together = perform(requests)
    for one, reply in zip(requests, together, strict=True):
        tokens, ending, canonical = plain(one)
        (alone,) = perform([one])
        for answer in (reply, alone):
            assert isinstance(answer, ScoreReply)
            assert answer.tokens.dtype == np.float64
            np.testing.assert_allclose(answer.tokens, tokens, atol=1e-4)
            assert answer.ending == pytest.approx(ending, abs=1e-4)
            np.testing.assert_allclose(answer.canonical, canonical, atol=1e-4)
            assert answer.log_prob == pytest.approx(sum(tokens) + ending, abs=2e-4)


def test_a_sequence_that_begins_another_shares_its_row() -> None:
    values = ["abab", "aba", "a", "", "abab", "b", "abb"]
    dist = LMString(TINY, ".")
    spelled = [
        Text(v, [TINY.vocabulary.exact[c.encode()] for c in v], TINY.fingerprint) for v in values
    ]
    requests = [r for v in spelled if (r := dist.request(v)) is not None]
    assert len(requests) == len(values)
    # The prompt's own end and the other string's middle are in the same row too.
    inner = LMString(TINY, ".ab").request(
        Text("ab", [TINY.vocabulary.exact[c.encode()] for c in "ab"], TINY.fingerprint)
    )
    assert inner is not None
    ((rows, members),) = chunks_of(TINY, [*requests, inner])
    sequences = [ids for ids, _, _ in rows]
    assert len(members) == 8
    assert len(sequences) == 4  # .abab, .abb, .b, and .ab-ab, whose prompt has the token "ab"
    for reply, one in zip(perform([*requests, inner]), [*requests, inner], strict=True):
        assert isinstance(reply, ScoreReply)
        np.testing.assert_allclose(reply.tokens, plain(one)[0], atol=1e-4)


def test_every_chunk_keeps_the_budget() -> None:
    lm = LMS[37]
    dist = LMString(lm, "ab", max_tokens=9)
    requests = [r for k in range(30) if (r := dist.request(dist.draw(("chunk", k))[0])) is not None]
    chunks = chunks_of(lm, requests)
    assert sorted(at for _, members in chunks for at, _ in members) == list(range(30))
    for rows, _ in chunks:
        assert len(rows) == 1 or len(rows) * max(len(ids) for ids, _, _ in rows) <= 37
    assert len(chunks) > 1


def test_nothing_to_score() -> None:
    assert score([]) == [] and score_with_gradients([]) == []


def with_adapter() -> tuple[LM, list[torch.nn.Parameter]]:
    lm = tiny_lm("ab. ", seed=2, merged=["b.", "ab"])
    parameters = lm.add_adapter("guide", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return lm, parameters


def test_gradients_are_those_of_a_plain_forward_pass() -> None:
    lm, parameters = with_adapter()
    dist = LMString(lm, "ab", max_tokens=6, stop=".", min_tokens=2, ban=" ")
    texts = [dist.draw(("g", k), adapter="guide")[0] for k in range(6)]
    requests = [r for t in texts if (r := dist.request(t, adapter="guide")) is not None]
    assert len(requests) == 6
    found = score_with_gradients(requests)
    loss = sum((p.total - p.canonical[2:].clamp(min=-50).sum()) ** 2 for p in found)
    gradients = torch.autograd.grad(loss, parameters)  # type: ignore[arg-type]

    plain_loss = torch.zeros(())
    with lm.adapter("guide"):
        for one in requests:
            path = one.path
            ids = torch.tensor([[*one.prompt, *path.tokens]])
            logits = lm.model(input_ids=ids, use_cache=False).logits[0, len(one.prompt) - 1 :]
            total = torch.zeros(())
            canonical = torch.zeros(())
            for at in range(len(path.tokens) + 1):
                if at == len(path.steps):
                    canonical = canonical + (-50.0 if at >= 2 else 0.0)
                    continue
                legal = path.steps[at].legal.nonzero()[:, 0]
                row = logits[at] - logits[at, legal].logsumexp(0)
                if at < len(path.tokens):
                    total = total + row[path.tokens[at]]
                elif path.ending in ("end", "stop"):
                    total = total + row[path.ending_ids].logsumexp(0)
                if at >= 2:
                    ids_ = path.steps[at].canonical
                    canonical = canonical + (row[ids_].logsumexp(0) if len(ids_) else -50.0)
            plain_loss = plain_loss + (total - canonical) ** 2
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-4)  # type: ignore[union-attr]
    expected = torch.autograd.grad(plain_loss, parameters)
    for g, e in zip(gradients, expected, strict=True):
        assert torch.isfinite(g).all()
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-3 * float(e.abs().max()))
    assert any(float(g.abs().max()) > 0 for g in gradients)


def test_requests_are_answered_under_their_own_adapter() -> None:
    lm, _ = with_adapter()
    dist = LMString(lm, "ab", max_tokens=6)
    value = dist.draw(("own", 1))[0]
    off, on = dist.request(value), dist.request(value, adapter="guide")
    assert off is not None and on is not None
    replies = perform([off, on, off])
    sums = [r.log_prob for r in replies if isinstance(r, ScoreReply)]
    assert sums[0] == sums[2] == pytest.approx(float(dist.log_prob(value)), abs=1e-6)
    assert sums[1] == pytest.approx(sum(plain(on)[0]) + plain(on)[1], abs=1e-4)
    assert abs(sums[1] - sums[0]) > 1e-2


def test_log_softmax_is_float32_for_a_bfloat16_model() -> None:
    lm = tiny_lm("ab.", seed=4)
    lm = LM.from_parts(lm.model.to(torch.bfloat16), lm.tokenizer, "bfloat16")
    dist = LMString(lm, "ab", max_tokens=6)
    value, log_prob = dist.draw(("bf", 1))
    one = dist.request(value)
    assert one is not None
    (found,) = score_with_gradients([one])
    assert found.tokens.dtype == found.canonical.dtype == found.ending.dtype == torch.float32
    tokens, ending, _ = plain(one)  # its logits are bfloat16, its sums float64
    assert float(found.total) == pytest.approx(sum(tokens) + ending, abs=1e-4)
    # The cached pass rounds its keys and values differently; each logit has 8 bits.
    assert log_prob == pytest.approx(sum(tokens) + ending, abs=0.1)


# -- states --------------------------------------------------------------------------------------


def plain_state(lm: LM, prompt: Sequence[int], adapter: str | None) -> torch.Tensor:
    with lm.adapter(adapter):
        found = lm.model.base_model(input_ids=torch.tensor([[*prompt]]), use_cache=False)
    state: torch.Tensor = found.last_hidden_state[0, -1]
    return state


PROMPTS = ["", "ab", "ab. ab", "ab. b.", "b.b.b.ab ", "ab"]


@pytest.fixture(params=["packed", "padded"])
def lm_by_route(request: pytest.FixtureRequest) -> tuple[LM, list[torch.nn.Parameter]]:
    lm, parameters = with_adapter()
    assert lm.packs is not None
    if request.param == "padded":
        lm.packs = None
    return lm, parameters


@pytest.mark.parametrize("adapter", [None, "guide"])
@pytest.mark.parametrize("budget", [1024, 3])
def test_a_state_is_that_of_a_plain_forward_pass(
    lm_by_route: tuple[LM, Any], adapter: str | None, budget: int
) -> None:
    lm, _ = lm_by_route
    lm.node_budget = lm.token_budget = budget
    prompts = [lm.encode_prompt(p) for p in PROMPTS]
    replies = perform([StateRequest(lm, p, adapter) for p in prompts])
    for prompt, reply in zip(prompts, replies, strict=True):
        assert isinstance(reply, StateReply)
        assert reply.state.shape == (lm.state_width,) == (32,)
        assert reply.state.dtype == np.float32
        with torch.no_grad():
            expected = plain_state(lm, prompt, adapter)
        np.testing.assert_allclose(reply.state, expected, atol=2e-5)
    with torch.no_grad():
        other = plain_state(lm, prompts[1], "guide" if adapter is None else None)
    assert isinstance(replies[1], StateReply)
    assert float(np.abs(replies[1].state - other.numpy()).max()) > 1e-2


def test_states_are_answered_beside_scores_and_draws() -> None:
    lm, _ = with_adapter()
    dist = LMString(lm, "ab", max_tokens=6)
    value = dist.draw(("beside", 1))[0]
    one = dist.request(value)
    assert one is not None
    prompt = lm.encode_prompt("ab. b.")
    wanted = [StateRequest(lm, prompt), one, StateRequest(lm, prompt, "guide")]
    off, scored, on = perform(wanted)
    assert isinstance(off, StateReply) and isinstance(on, StateReply)
    assert isinstance(scored, ScoreReply)
    assert scored.log_prob == pytest.approx(float(dist.log_prob(value)), abs=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(off.state, plain_state(lm, prompt, None), atol=2e-5)
        np.testing.assert_allclose(on.state, plain_state(lm, prompt, "guide"), atol=2e-5)


def test_states_beside_scores_with_gradients(
    lm_by_route: tuple[LM, list[torch.nn.Parameter]],
) -> None:
    lm, parameters = lm_by_route
    wanted: list[ScoreRequest | StateRequest] = []
    for k, prompt in enumerate(PROMPTS):
        dist = LMString(lm, prompt, max_tokens=6, stop=".", min_tokens=0)
        scored = dist.request(dist.draw(("state", k))[0], adapter="guide")
        assert scored is not None
        wanted += [scored, StateRequest(lm, lm.encode_prompt(prompt + "b"), "guide")]
    found = score_with_gradients(wanted)
    direction = torch.randn(lm.state_width, generator=torch.Generator().manual_seed(1))
    loss, plain_loss = torch.zeros(()), torch.zeros(())
    for one, own in zip(wanted, found, strict=True):
        expected = plain_state(lm, one.prompt, "guide")
        assert own.state is not None
        torch.testing.assert_close(own.state, expected, atol=2e-5, rtol=1e-4)
        if isinstance(one, ScoreRequest):
            tokens, ending, _ = plain(one)
            assert float(own.total.detach()) == pytest.approx(sum(tokens) + ending, abs=1e-4)
        else:
            assert float(own.total.detach()) == 0.0 and own.canonical.tolist() == [-math.inf]
        loss = loss + torch.tanh(own.state @ direction / 8.0)
        plain_loss = plain_loss + torch.tanh(expected @ direction / 8.0)
    gradients = torch.autograd.grad(loss, parameters)
    expected_gradients = torch.autograd.grad(plain_loss, parameters)
    size = max(float(e.abs().max()) for e in expected_gradients)
    assert size > 1e-2
    for g, e in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(g, e, atol=1e-4 * size, rtol=1e-3)


def test_where_nothing_is_read_after_the_prompt_there_is_no_state() -> None:
    one = LMString(TINY, "ab").request(Text("", (), TINY.fingerprint))
    assert one is not None and not one.path.steps
    (found,) = score_with_gradients([one])
    assert found.state is None
