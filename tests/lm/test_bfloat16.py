"""Compiled layers of a bfloat16 LM: weights rounded, and what they are multiplied with.

The expected numbers are those of the same weights in float32, in transformers' own layers, whose
products round what goes in. A sum in another order may round a number the other way, so they agree
to less than float32's digits; the rounding itself is much larger.
"""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from test_lean import FORMS, as_drawn, whole
from test_lean_gradients import TEXTS, gradients, used
from test_native import compiled, every_product_frozen, has_compiled, of_bfloat16  # noqa: F401
from test_packed import requests

import langppl as lp
from langppl.lm import native
from langppl.lm.decoding import draw
from langppl.lm.products import FrozenLinear, mixed
from langppl.lm.scoring import score

pytestmark = has_compiled

CLOSE = 3e-3


class Rounded(torch.autograd.Function):
    """x in bfloat16's digits; gradients pass."""

    @staticmethod
    def forward(ctx, x):
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx, gradients):
        return gradients


class RoundedBack(torch.autograd.Function):
    """Gradients in bfloat16's digits; x passes."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradients):
        return gradients.bfloat16().float()


def pair(family, **changes):
    """A bfloat16 LM, and one of the same weights in float32."""
    base = compiled(family, **{**FORMS[family], **changes})
    base.model.bfloat16().float()
    with every_product_frozen():
        exact = lp.LM.from_parts(base.model, base.tokenizer, "exact")
        other = compiled(family, **{**FORMS[family], **changes})
        other.model.load_state_dict(base.model.state_dict())
        brief = lp.LM.from_parts(other.model.bfloat16(), base.tokenizer, "brief")
    assert brief.lean is not None
    assert all(brief.lean._layer(k) is not None for k in range(2))
    return brief, exact


@contextlib.contextmanager
def rounding(lm):
    """Within the block, products of the LM's layers round what goes in, and its gradients."""
    own = [m for m in lm.model.modules() if isinstance(m, FrozenLinear)]

    def rounds(module):
        def forward(x):
            product = torch.nn.functional.linear(Rounded.apply(x), module.weight, module.bias)
            return RoundedBack.apply(product)

        return forward

    for module in own:
        module.forward = rounds(module)
    try:
        with whole(lm):
            lm.memo.clear()
            yield
    finally:
        for module in own:
            del module.forward
        lm.memo.clear()


@pytest.mark.parametrize("family", FORMS)
def test_scores_are_those_of_rounded_products(of_bfloat16, family):  # noqa: F811
    brief, exact = pair(family)
    # Prompts that begin apart, so that nothing goes through a cache of keys and values.
    texts = [
        ("ab .a", "ab ab"),
        ("b", "b"),
        (" .", "ab"),
        *(("a b"[k % 3], "ab" * k) for k in range(9)),
    ]
    found = score(requests(brief, texts))
    plain = score(requests(exact, texts))
    with rounding(exact):
        expected = score(requests(exact, texts))
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f.tokens, e.tokens, atol=CLOSE)
        np.testing.assert_allclose(f.ending, e.ending, atol=CLOSE)
    apart = max(
        np.abs(f.tokens - p.tokens).max()
        for f, p in zip(found, plain, strict=True)
        if len(f.tokens)
    )
    assert 0.0 < apart < 0.1


@pytest.mark.parametrize("family", FORMS)
def test_draws_have_the_probabilities_that_they_are_scored_with(family, monkeypatch):
    brief, exact = pair(family, **({} if family == "Qwen2" else {"head_dim": 16}))
    kinds = []
    own = native.run
    monkeypatch.setattr(native, "run", lambda *a: kinds.append(a[4][0][0].dtype) or own(*a))
    prompts = ["ab .a", "ab", "b a b"] * 7
    drawn = draw(as_drawn(brief, prompts, 3, max_tokens=6))
    assert set(kinds) == ({torch.bfloat16} if family != "Qwen2" else set())
    for lm, most in ((brief, 0.1), (exact, 0.1)):
        lm.memo.clear()
        for prompt, d in zip(prompts, drawn, strict=True):
            fn = lp.LMString(lm, prompt, max_tokens=6)
            assert fn.log_prob(fn.text_of(d)).item() == pytest.approx(d.log_prob, abs=most)


def adapted(lms, scale=1.0, **options):
    """Adds like adapters, and gives their parameters."""
    found = []
    for lm in lms:
        torch.manual_seed(2)
        config = LoraConfig(
            r=3, target_modules="all-linear", init_lora_weights=False, lora_alpha=4.0, **options
        )
        found.append(lm.add_adapter("own", config))
        # peft rounds a bfloat16 LM's once, when it makes them.
        for parameter, like in zip(found[-1], found[0], strict=True):
            assert parameter.dtype == torch.float32
            parameter.data = scale * parameter.data if like is parameter else like.data.clone()
    return found


def near(found, expected, most=2e-4):
    """Relative to their norms: were it not rounded, it would be some 1e-3."""
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= most * float(b.norm())


@pytest.mark.parametrize("rows", [1, 5, 30])
def test_halves_of_a_layer_and_their_gradients(of_bfloat16, rows):  # noqa: F811
    lms = pair("Llama", head_dim=16, attention_bias=True)
    brief, exact = lms
    parameters = adapted(lms)
    layer = exact.lean.layers[0]
    attention, gated = layer.self_attn, layer.mlp
    generator = torch.Generator().manual_seed(rows)

    def some(*size):
        return torch.randn(*size, generator=generator)

    cosines, sines = some(rows, 16), some(rows, 16)
    width = attention.q_proj.in_features
    x, y = some(rows, width), some(rows, width)
    shared, heads = (p.out_features // 16 for p in (attention.k_proj, attention.q_proj))
    found = some(rows, heads * 16)
    ends = [some(heads + shared, rows, 16), some(shared, rows, 16), some(rows, width)]

    def expected(x, found, y):
        h = layer.input_layernorm(x)
        both = torch.cat([attention.q_proj(h), attention.k_proj(h)], -1).view(rows, -1, 16)
        both = (both * cosines[:, None] + both.roll(8, -1) * sines[:, None]).transpose(0, 1)
        values = attention.v_proj(h).view(rows, -1, 16).transpose(0, 1)
        middle = y + attention.o_proj(found)
        h = layer.post_attention_layernorm(middle)
        h = torch.nn.functional.silu(gated.gate_proj(h)) * gated.up_proj(h)
        return both, values, middle + gated.down_proj(h)

    def compiled_ones(x, found, y):
        trained = brief.lean._layer(0)
        return *trained.before(x, cosines, sines), trained.after(found, y)

    results = []
    for lm, way, own in zip(lms, (compiled_ones, expected), parameters, strict=True):
        given = [v.clone().requires_grad_(True) for v in (x, found, y)]
        with lm.adapter("own"), rounding(lm) if lm is exact else contextlib.nullcontext():
            out = way(*given)
            torch.autograd.backward(out, ends)
        of_own = [p.grad for p in own if p.grad is not None]
        assert len(of_own) == 14
        results.append([*(o.detach() for o in out), *(g.grad for g in given), *of_own])
    near(*results)


def test_gradients_of_strings(of_bfloat16, monkeypatch):  # noqa: F811
    lms = pair("Llama", head_dim=16, attention_bias=True)
    calls = used(monkeypatch)
    found = [
        gradients(lm, own, TEXTS) for lm, own in zip(lms, adapted(lms, scale=0.5), strict=True)
    ]
    assert len(calls) == 2
    np.testing.assert_allclose(found[0][0], found[1][0], atol=0.1)
    near(found[0][1], found[1][1], most=0.05)


def test_adapters_of_a_bfloat16_lm():
    lms = pair("Llama", head_dim=16)
    adapted(lms)
    found, expected, bare = (
        score([replace(r, adapter=a) for r in requests(lm, TEXTS)])
        for lm, a in ((lms[0], "own"), (lms[1], "own"), (lms[0], None))
    )
    apart = []
    for f, e, b in zip(found, expected, bare, strict=True):
        np.testing.assert_allclose(f.tokens, e.tokens, atol=0.1)
        apart += np.abs(f.tokens - b.tokens).tolist()
    assert max(apart) > 0.5


def test_logits_of_states_in_float32():
    brief, exact = pair("Llama")
    states = torch.randn(3, brief.state_width)
    rounded = states.bfloat16()
    found = brief.logits_of(states)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.logits_of(rounded.float()), rtol=1e-5, atol=1e-5)
    assert brief.logits_of(rounded).dtype == torch.bfloat16
    # A head whose weight takes gradients is torch's own.
    brief.model.get_output_embeddings().weight.requires_grad_(True)
    assert brief.logits_of(states).dtype == torch.bfloat16


def test_expected_embeddings(of_bfloat16):  # noqa: F811
    chances = torch.rand(7, 90).softmax(-1)
    weight = torch.randn(90, 33).bfloat16()
    found = mixed(chances, weight)
    expected = chances.bfloat16().double() @ weight.double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)
    if of_bfloat16 == "no products of bfloat16":
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"method": "smc"}, {"method": "mh"}])
def test_inference_on_a_bfloat16_lm(options):
    brief, exact = pair("Llama", head_dim=16)

    def model(lm):
        z = lp.sample("z", lp.LMString(lm, "ab a", stop=".", max_tokens=3))
        lp.sample("y", lp.LMString(lm, f"ab a{z}", max_tokens=3), obs="b a")

    found, expected = (lp.infer(model, lm, method="exact") for lm in (brief, exact))
    assert found.log_evidence == pytest.approx(expected.log_evidence, abs=0.05)
    sampled = lp.infer(model, brief, num_samples=2_000, seed=1, progress=False, **options)
    if sampled.log_evidence is not None:
        assert sampled.log_evidence == pytest.approx(found.log_evidence, abs=0.15)
