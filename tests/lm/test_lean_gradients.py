"""Gradients through compiled layers are those of transformers' and peft's own."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_lean import FORMS, as_drawn, whole
from test_native import compiled, has_compiled, instructions  # noqa: F401
from test_packed import requests

from langppl.lm import native
from langppl.lm.decoding import draw
from langppl.lm.lean import Lean
from langppl.lm.scoring import score, score_with_gradients

pytestmark = has_compiled

WORDS = ["", "a", "ab", "b a", "ab ab", "abab a", "b b b"]
TEXTS = [(p, w) for p, w in itertools.product(["ab", "b ab a", "ab a"], WORDS)]


def gradients(lm, parameters, texts, times=1):
    """Scores, and gradients of a weighted sum of them, on an adapter."""
    for parameter in parameters:
        parameter.grad = None
    found = score_with_gradients(requests(lm, texts, adapter="own"))
    totals = torch.stack([f.total for f in found])
    loss = (totals * torch.linspace(-1.0, 2.0, len(totals))).sum()
    for left in range(times, 0, -1):
        loss.backward(retain_graph=left > 1)
    return totals.detach().numpy(), [p.grad.clone() for p in parameters]


def used(monkeypatch):
    """Counts the passes with gradients through compiled layers."""
    calls = []
    own = Lean._trained
    monkeypatch.setattr(Lean, "_trained", lambda *args: calls.append(1) or own(*args))
    return calls


def agree(found, expected):
    np.testing.assert_allclose(found[0], expected[0], atol=5e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * max(float(b.abs().max()), 1.0)
    assert max(float(b.abs().max()) for b in expected[1]) > 1e-2


def with_adapter(family, targets="all-linear", rank=3, **changes):
    lm = compiled(family, **{**FORMS[family], **changes})
    torch.manual_seed(2)
    config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
    return lm, lm.add_adapter("own", config)


@pytest.mark.parametrize(
    ("family", "targets", "rank", "changes"),
    [
        *((family, "all-linear", 3, {}) for family in FORMS),
        ("Llama", "all-linear", 33, {"head_dim": 16, "intermediate_size": 45}),
        ("Llama", ["q_proj", "v_proj"], 4, {}),
        ("Mistral", ["k_proj", "down_proj"], 2, {}),
        ("Llama", ["o_proj", "up_proj"], 1, {"num_hidden_layers": 3}),
        ("Qwen2", ["gate_proj"], 2, {}),
    ],
)
def test_gradients_are_those_of_whole_layers(
    instructions,  # noqa: F811
    family,
    targets,
    rank,
    changes,
    monkeypatch,
):
    lm, parameters = with_adapter(family, targets, rank, **changes)
    calls = used(monkeypatch)
    found = gradients(lm, parameters, TEXTS)
    assert calls
    before = len(calls)
    with whole(lm):
        expected = gradients(lm, parameters, TEXTS)
    assert len(calls) == before
    agree(found, expected)


@pytest.mark.parametrize("budget", [3, 8, 20])
def test_rows_that_are_run_again(budget, monkeypatch):
    lm, parameters = with_adapter("Llama", head_dim=16)
    with whole(lm):
        expected = gradients(lm, parameters, TEXTS)
    monkeypatch.setattr(lm, "gradient_node_budget", budget)
    calls = used(monkeypatch)
    found = gradients(lm, parameters, TEXTS)
    assert len(calls) > 2
    agree(found, expected)
    with whole(lm):
        agree(gradients(lm, parameters, TEXTS), expected)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab ", min_size=1, max_size=12), st.text("ab ", max_size=10)),
        min_size=2,
        max_size=12,
    )
)
def test_any_strings(texts):
    lm, parameters = LM
    texts = [(p, w) for p, w in texts if len(lm.encode_text(w)) <= 24]
    found = gradients(lm, parameters, texts)
    with whole(lm):
        expected = gradients(lm, parameters, texts)
    np.testing.assert_allclose(found[0], expected[0], atol=5e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * max(float(b.abs().max()), 1.0)


LM = with_adapter("Llama", head_dim=16) if native.library() is not None else None


def test_a_graph_that_is_kept_gives_its_gradients_again():
    lm, parameters = with_adapter("Llama")
    once, twice = (gradients(lm, parameters, TEXTS, times) for times in (1, 2))
    for a, b in zip(once[1], twice[1], strict=True):
        torch.testing.assert_close(2.0 * a, b, rtol=1e-5, atol=1e-6)


def test_backward_within_autocast_and_second_gradients():
    lm, parameters = with_adapter("Llama")
    _, expected = gradients(lm, parameters, TEXTS)
    found = score_with_gradients(requests(lm, TEXTS, adapter="own"))
    totals = torch.stack([f.total for f in found])
    loss = (totals * torch.linspace(-1.0, 2.0, len(totals))).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = torch.autograd.grad(loss, parameters, retain_graph=True)
    for a, b in zip(own, expected, strict=True):  # the part that reads logits is torch's own
        assert float((a - b).abs().max()) <= 0.1 * max(float(b.abs().max()), 1.0)
    with pytest.raises(NotImplementedError, match="no second gradients"):
        torch.autograd.grad(loss, parameters, create_graph=True)


def test_a_backward_hook_is_heeded(monkeypatch):
    lm, parameters = with_adapter("Llama")
    calls = used(monkeypatch)
    seen = []
    layer = lm.model.model.layers[1]
    for module in (layer, layer.mlp.gate_proj, layer.mlp.act_fn):
        handle = module.register_full_backward_hook(lambda *args: seen.append(1))
        gradients(lm, parameters, TEXTS)
        assert seen and not calls
        handle.remove()
        seen.clear()


def test_adapters_of_some_layers_alone():
    lm = compiled("Llama", head_dim=16, num_hidden_layers=3)
    torch.manual_seed(2)
    config = LoraConfig(
        r=1,
        target_modules=["q_proj", "down_proj", "up_proj"],
        layers_to_transform=[1, 2],
        rank_pattern={r"layers\.2\.mlp\.down_proj": 70, r"layers\.2\.mlp\.up_proj": 45},
        init_lora_weights=False,
    )
    parameters = lm.add_adapter("own", config)
    assert {len(p) for p in parameters} > {1, 45, 70}
    found = gradients(lm, parameters, TEXTS)
    scores = [s.tokens for s in score(requests(lm, TEXTS, adapter="own"))]
    draws = [
        replace(r, adapter="own") for r in as_drawn(lm, [p for p, _ in TEXTS], 3, max_tokens=6)
    ]
    drawn = draw(draws)
    with whole(lm):
        lm.memo.clear()
        agree(found, gradients(lm, parameters, TEXTS))
        for own, expected in zip(scores, score(requests(lm, TEXTS, adapter="own")), strict=True):
            np.testing.assert_allclose(own, expected.tokens, atol=2e-5)
        assert [d.ids for d in drawn] == [d.ids for d in draw(draws)]


def test_what_is_not_an_adapter_of_frozen_weights_is_left_to_torch(monkeypatch):
    lm, parameters = with_adapter("Llama")
    calls = used(monkeypatch)
    layer = lm.model.model.layers[1]
    weight = layer.post_attention_layernorm.weight.requires_grad_(True)
    gradients(lm, parameters, TEXTS)
    assert not calls and weight.grad is not None
    weight.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients(lm, parameters, TEXTS)
    assert not calls
    handle = layer.mlp.gate_proj.register_forward_hook(lambda module, args, out: out)
    gradients(lm, parameters, TEXTS)
    assert not calls
    handle.remove()
    gradients(lm, parameters, TEXTS)
    assert calls


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_norms_and_gates(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    x, of_y, start = (torch.randn(rows, width, generator=generator) * 3 for _ in range(3))
    weight = torch.randn(width, generator=generator)
    layer = native.Layer.__new__(native.Layer)
    layer.norms, layer._library = [(weight, 1e-3), (weight, 1e-3)], native.library()
    exact = x.double().requires_grad_(True)
    y = torch.nn.functional.rms_norm(exact, (width,), weight.double(), 1e-3)
    y.backward(of_y.double())
    torch.testing.assert_close(layer.normed(x, 0).double(), y.detach(), rtol=1e-5, atol=1e-5)
    into = start.clone()
    layer.normed_back(x, 1, of_y, into)
    torch.testing.assert_close((into - start).double(), exact.grad, rtol=1e-4, atol=1e-4)

    gates, ups = x.double().requires_grad_(True), start.double().requires_grad_(True)
    product = torch.nn.functional.silu(gates) * ups
    product.backward(of_y.double())
    found = layer.gated_back(x, start, of_y)
    for own, expected in zip(found, (product.detach(), gates.grad, ups.grad), strict=True):
        torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-5)


def test_gates_far_from_zero():
    layer = native.Layer.__new__(native.Layer)
    layer._library = native.library()
    gates = torch.tensor([[-200.0, -90.0, -30.0, 0.0, 30.0, 90.0, 200.0]])
    ones = torch.ones_like(gates)
    product, of_gates, of_ups = layer.gated_back(gates, ones, ones)
    for own in (product, of_ups):
        torch.testing.assert_close(own, torch.nn.functional.silu(gates), rtol=1e-5, atol=1e-11)
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(of_gates, expected, rtol=1e-5, atol=1e-11)
