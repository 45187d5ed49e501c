"""Layers taken apart give the states of transformers' own pass."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_packed import other, requests, small

from langppl.distributions import LMString
from langppl.lm import caches, packed
from langppl.lm.decoding import draw
from langppl.lm.requests import DrawRequest
from langppl.lm.scoring import score

FORMS = {
    "Llama": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "Mistral": {"head_dim": 8, "sliding_window": None},
    "Qwen2": {"use_sliding_window": False},
}
LMS = {name: other(name, **changes) for name, changes in FORMS.items()}


@contextlib.contextmanager
def whole(lm):
    """Within the block, transformers' own layers run."""
    lean, lm.lean = lm.lean, None
    try:
        yield
    finally:
        lm.lean = lean


def as_drawn(lm, prompts, seed, **rules):
    dists = [LMString(lm, p, **rules) for p in prompts]
    return [
        DrawRequest(lm, d.prompt_ids(), lm.bind(d.rules), d.rules.max_tokens, (seed, k))
        for k, d in enumerate(dists)
    ]


@pytest.mark.parametrize("family", FORMS)
def test_models_of_the_form_are_taken_apart(family):
    assert LMS[family].lean is not None


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("GPT2", {}),
        ("Qwen3", {"head_dim": 8}),
        ("Gemma3Text", {"head_dim": 8, "sliding_window": 64}),
        ("Mistral", {"head_dim": 8, "sliding_window": 16}),
        # Llama's parts, and a scale of the queries that begins at far positions alone.
        ("Ministral3", {"head_dim": 8, "sliding_window": None, "pad_token_id": 1}),
    ],
)
def test_other_models_are_not(family, changes):
    assert other(family, **changes).lean is None


@pytest.mark.parametrize("family", FORMS)
@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(
        st.tuples(st.text("ab .", min_size=1, max_size=40), st.text("ab", max_size=12)),
        min_size=1,
        max_size=30,
    ),
    seed=st.integers(0, 99),
)
def test_scores_and_draws_are_those_of_whole_layers(family, texts, seed):
    lm = LMS[family]
    wanted = requests(lm, texts)
    lm.memo.clear()
    found = score(wanted)
    lm.memo.clear()
    drawn = draw(as_drawn(lm, [p for p, _ in texts], seed, max_tokens=6))
    with whole(lm):
        expected = score(wanted)
        expected_draws = draw(as_drawn(lm, [p for p, _ in texts], seed, max_tokens=6))
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f.tokens, e.tokens, atol=2e-5)
        np.testing.assert_allclose(f.ending, e.ending, atol=2e-5)
    assert [d.ids for d in drawn] == [d.ids for d in expected_draws]
    np.testing.assert_allclose(
        [d.log_prob for d in drawn], [d.log_prob for d in expected_draws], atol=1e-4
    )


def test_under_an_adapter():
    lm = small(5)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    lm.add_adapter("own", config)
    wanted = requests(lm, [("ab", "aba"), ("ab", "bb"), ("a b", "ab")], adapter="own")
    plain = requests(lm, [("ab", "aba"), ("ab", "bb"), ("a b", "ab")])
    found, of_base = score(wanted), score(plain)
    lm.memo.clear()
    with whole(lm):
        expected, base = score(wanted), score(plain)
    for f, e, b, w in zip(found, expected, of_base, base, strict=True):
        np.testing.assert_allclose(f.tokens, e.tokens, atol=2e-5)
        np.testing.assert_allclose(b.tokens, w.tokens, atol=2e-5)
        assert np.abs(f.tokens - b.tokens).max() > 1e-3


def test_layers_that_only_have_the_names_are_left_whole():
    lm = small(6)
    layer = lm.model.model.layers[0].mlp
    own = type(layer)

    class Odd(own):
        def forward(self, x):
            return super().forward(x) + 1.0

    layer.__class__ = Odd
    assert packed.lean_of(lm) is None
    layer.__class__ = own
    assert packed.lean_of(lm) is not None


def test_whatever_goes_wrong_in_comparing_the_layers_are_left_whole():
    lm = small(6)
    norm = lm.model.model.norm
    epsilon, norm.variance_epsilon = norm.variance_epsilon, None
    assert packed.lean_of(lm) is None and lm.lean is None
    norm.variance_epsilon = epsilon
    assert packed.lean_of(lm) is not None


def test_a_forward_put_on_a_module_that_is_left_out_is_heeded():
    lm = small(7)
    wanted = requests(lm, [("ab", "aba")])
    (before,) = score(wanted)
    layer = lm.model.model.layers[0].mlp
    own = layer.forward
    layer.forward = lambda x: own(x) + torch.arange(32.0)
    lm.memo.clear()
    (found,) = score(wanted)
    assert packed.lean_of(lm) is None
    assert np.abs(found.tokens - before.tokens).max() > 1e-3


@pytest.mark.parametrize("name", ["mlp", "input_layernorm", "self_attn", "model"])
def test_a_hook_on_what_is_left_out_is_heeded(name):
    lm = small(7)
    wanted = requests(lm, [("ab", "aba")])
    (before,) = score(wanted)
    base = lm.model.model
    module = base if name == "model" else getattr(base.layers[0], name)

    def more(_module, _args, out):
        if name == "model":
            out.last_hidden_state = out.last_hidden_state + torch.arange(32.0)
            return out
        return (out[0] + 1.0, *out[1:]) if isinstance(out, tuple) else out + 1.0

    handle = module.register_forward_hook(more)
    lm.memo.clear()
    (found,) = score(wanted)
    handle.remove()
    lm.memo.clear()
    (after,) = score(wanted)
    assert np.abs(found.tokens - before.tokens).max() > 1e-3
    np.testing.assert_allclose(after.tokens, before.tokens, atol=1e-6)


def test_a_module_put_in_the_place_of_one_that_is_left_out_is_heeded():
    lm = small(8)
    wanted = requests(lm, [("ab", "aba")])
    (before,) = score(wanted)

    class Doubled(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return 2.0 * self.norm(x)

    lm.model.model.norm = Doubled(lm.model.model.norm).eval()
    lm.memo.clear()
    (found,) = score(wanted)
    assert np.abs(found.tokens - before.tokens).max() > 1e-3


def test_a_cache_writes_into_no_other():
    torch.manual_seed(0)
    stem = torch.randn(1, 2, 3, 4)
    more = [torch.randn(1, 2, n, 4) for n in (1, 2, 1, 5)]
    with torch.no_grad():
        first = caches.cache_of([(stem, -stem)])
        first.update(more[0], -more[0], 0)
        held = caches.keys_and_values(first)
        second, third = caches.cache_of(held), caches.cache_of(held)
        for cache, new in ((second, more[1]), (third, more[3]), (first, more[2])):
            keys, values = cache.update(new, -new, 0)
            assert torch.equal(keys, -values)
    expected = torch.cat([stem, more[0]], dim=2)
    assert torch.equal(held[0][0], expected)
    for cache, new in ((second, more[1]), (third, more[3]), (first, more[2])):
        ((keys, _),) = caches.keys_and_values(cache)
        assert torch.equal(keys, torch.cat([expected, new], dim=2))


def test_a_cache_does_not_hold_what_a_small_part_was_taken_from():
    whole = torch.randn(1, 12, 5, 4)
    with torch.no_grad():
        ((keys, values),) = caches.keys_and_values(caches.cache_of([(whole[:, 9:], whole)]))
    assert torch.equal(keys, whole[:, 9:]) and values is whole
    assert keys.untyped_storage().nbytes() == 3 * 5 * 4 * 4
