"""A remembered score is the score: under mixed prompts, rules, adapters and training steps."""

import gc
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from langppl import LMString
from langppl.lm import adapters, memo, scoring
from langppl.lm.memo import Memo
from langppl.lm.requests import (
    ScoreReply,
    ScoreRequest,
    perform,
    same_weights,
    serve,
    weights_changed,
)
from langppl.lm.rules import Path, StringRules
from langppl.testing import tiny_lm

PROMPTS = ["a", "ab", "b.", " "]
TEXTS = ["a.", "ab.", "abb.", "b a.", "."]
RULES = [
    StringRules(stop=".", max_tokens=6),
    StringRules(stop=".", max_tokens=6, min_tokens=2),
    StringRules(stop=("b.", "."), max_tokens=6),
]


@pytest.fixture(scope="module")
def lm():
    found = tiny_lm(["a", "b", ".", " "], seed=4, merged=["ab"])
    for k, name in enumerate("uv"):
        torch.manual_seed(k)
        found.add_adapter(
            name, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        )
    return found


def request(lm, prompt, text, rules, adapter, temperature=1.0):
    path = lm.bind(rules).parse(lm.encode_text(text), text.encode(), rules.max_tokens)
    return ScoreRequest(lm, lm.encode_prompt(prompt), path, temperature, adapter)


def train(lm, adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, p in lm.model.named_parameters():
        if f".{adapter}." in name:
            with torch.no_grad():
                # Larger ones, at a scale of 4, make states that round to worse than the tolerance.
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


asked = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from(TEXTS),
    st.sampled_from(RULES),
    st.sampled_from([None, "u", "v"]),
    st.sampled_from([1.0, 0.7]),
)
happens = st.one_of(
    st.lists(asked, min_size=1, max_size=6),
    st.tuples(st.sampled_from(["u", "v"]), st.integers(0, 99)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(happens, min_size=2, max_size=8), st.sampled_from([2**20, 3000]))
def test_every_answer_is_the_score(lm, story, capacity):
    lm.memo = Memo(capacity)
    for event in story:
        if isinstance(event, tuple):
            train(lm, *event)
            continue
        wanted = [request(lm, *e) for e in event]
        wanted = [r for r in wanted if isinstance(r.path, Path)]  # the rules may refuse the text
        for r, reply in zip(wanted, serve(wanted), strict=True):
            (fresh,) = scoring.score([r])
            np.testing.assert_allclose(reply.tokens, fresh.tokens, atol=2e-5)
            np.testing.assert_allclose(reply.canonical, fresh.canonical, atol=2e-5)
            assert reply.ending == pytest.approx(fresh.ending, abs=2e-5)
        assert lm.memo._bytes <= capacity


@pytest.mark.parametrize(
    "change",
    [{"prompt": "b."}, {"text": "ab."}, {"rules": 1}, {"adapter": "v"}, {"temperature": 0.7}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_the_score_depends_on_is_in_the_key(lm, change):
    lm.memo = Memo()
    first = {"prompt": "a", "text": "abb.", "rules": 0, "adapter": None, "temperature": 1.0}
    scores = []
    for case in (first, {**first, **change}):
        one = request(lm, **{**case, "rules": RULES[case["rules"]]})
        (reply,), (fresh,) = serve([one]), scoring.score([one])
        assert reply.log_prob == pytest.approx(fresh.log_prob, abs=2e-5)
        scores.append(reply.log_prob)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_what_is_known_is_not_scored_again(lm, monkeypatch):
    lm.memo = Memo()
    passes = []
    original = scoring.score
    monkeypatch.setattr(scoring, "score", lambda r: passes.append(len(r)) or original(r))
    one = request(lm, "a", "ab.", RULES[0], None)
    two = request(lm, "a", "abb.", RULES[0], None)
    perform([one, two, one])
    perform([two])
    assert passes[0] == 2 and sum(passes) == 2
    assert (lm.memo.hits, lm.memo.misses) == (2, 2)
    lm.memo.clear()
    perform([two])
    assert sum(passes) == 3


def test_steps_that_have_no_name_live_as_long_as_what_is_known_by_them():
    """Where one went, its address, which is the key, could be another's."""
    lm = tiny_lm("ab.", seed=4)
    one = request(lm, "a", "ab.", RULES[0], None)
    assert all(step.name is None for step in one.path.steps)
    steps = [weakref.ref(step) for step in one.path.steps]
    serve([one])
    lm._rules.clear()
    del one
    gc.collect()
    assert all(step() is not None for step in steps)
    lm.memo.clear()
    gc.collect()
    assert all(step() is None for step in steps)


def test_the_least_recently_used_goes_first(lm):
    rows = [request(lm, p, "ab.", RULES[0], None) for p in PROMPTS[:3]]
    lm.memo = Memo()
    serve([rows[0]])
    lm.memo = Memo(int(2.5 * lm.memo._bytes))
    for r in (rows[0], rows[1], rows[0], rows[2]):
        serve([r])
    hits = lm.memo.hits
    serve([rows[0]])
    assert lm.memo.hits == hits + 1
    serve([rows[1]])
    assert lm.memo.hits == hits + 1
    assert len(lm.memo) == 2


def test_the_bound_is_one_of_bytes(lm):
    rng = np.random.default_rng(0)
    # Ids beyond Python's own small integers.
    prompts = [tuple(int(i) for i in rng.integers(1000, 30_000, 2000)) for _ in range(40)]
    path = request(lm, "a", "ab.", RULES[0], None).path
    reply = ScoreReply(np.zeros(3), 0.0, np.zeros(4))
    memo = Memo(60_000)
    kept = []
    tracemalloc.start()
    try:
        for prompt in prompts:
            # As a request's own ids are, which nobody else keeps.
            ids = tuple(i + 1 for i in prompt)
            memo.answer([ScoreRequest(lm, ids, path)], lambda r: [reply])
            kept.append(len(memo))
        del ids
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert max(kept) == len(memo) > 4
    assert used < 1.5 * memo.capacity


def test_changed_base_weights_are_seen(lm):
    lm.memo = Memo()
    dist = LMString(lm, "a", stop=".", max_tokens=4)
    before = float(dist.log_prob("ab."))
    weight = lm.model.get_output_embeddings().weight
    kept = weight.detach().clone()
    try:
        weight.data *= 0.5  # leaves no trace in the tensor's version
        changed = float(dist.log_prob("ab."))
    finally:
        weight.data.copy_(kept)
    assert abs(changed - before) > 1e-3
    assert float(dist.log_prob("ab.")) == pytest.approx(before, abs=1e-5)


def test_an_adapter_is_read_once_in_a_run(lm, monkeypatch):
    read = []
    whole = adapters.digest
    monkeypatch.setattr(adapters, "digest", lambda *a: read.append(a[1]) or whole(*a))
    with same_weights():
        for text in TEXTS[:4] * 2:
            serve([request(lm, "a", text, RULES[0], name) for name in (None, "u", "v")])
    assert read == ["u", "v"]
    # Outside of runs whoever likes writes to weights, in ways that are not seen.
    serve([request(lm, "a", "ab.", RULES[0], "u")] * 2)
    serve([request(lm, "a", "ab.", RULES[0], "u")])
    assert read == ["u", "v", "u", "u"]


@pytest.mark.parametrize("how", ["copied", "optimised", "exchanged", "said", "scaled", "anew"])
def test_an_adapter_that_changes_in_a_run_is_read_again(how):
    lm = tiny_lm(["a", "b", ".", " "], seed=4)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    own = lm.add_adapter("u", config)
    generator = torch.Generator().manual_seed(5)
    asked = request(lm, "a", "ab.", RULES[0], "u")
    with same_weights():
        before = serve([asked])[0].log_prob
        if how == "copied":
            train(lm, "u", 3)
        elif how == "optimised":
            for p in own:
                p.grad = torch.randn(p.shape, generator=generator)
            torch.optim.AdamW(own, lr=0.1).step()
        elif how == "exchanged":
            for p in own:
                p.data = torch.randn(p.shape, generator=generator)
        elif how == "said":
            for p in own:
                p.data.copy_(torch.randn(p.shape, generator=generator))
            weights_changed()
        elif how == "scaled":
            for layer in adapters._layers(lm.model):
                layer.scaling["u"] *= 3
        else:
            lm.remove_adapter("u")
            torch.manual_seed(6)
            lm.add_adapter("u", config)
        found = serve([asked])[0].log_prob
    (expected,) = scoring.score([asked])
    assert found == pytest.approx(expected.log_prob, abs=1e-6)
    assert abs(found - before) > 1e-6


def test_a_memo_of_nothing_and_a_negative_one(lm):
    lm.memo = Memo(0)
    one = request(lm, "a", "ab.", RULES[0], None)
    serve([one])
    serve([one])
    assert lm.memo.hits == 0 and len(lm.memo) == 0
    with pytest.raises(ValueError, match="capacity must be at least 0"):
        memo.Memo(-1)


def test_scores_under_autocast_are_others(lm):
    lm.memo = Memo()
    fn = LMString(lm, "a", stop=".", max_tokens=6)
    plain = float(fn.log_prob("abb."))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = float(fn.log_prob("abb."))
        assert float(fn.log_prob("abb.")) == rough
    assert rough != plain and abs(rough - plain) < 0.2
    assert float(fn.log_prob("abb.")) == plain
    assert (lm.memo.misses, lm.memo.hits) == (2, 2)
