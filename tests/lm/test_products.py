"""The laid-out product is the plain one, with its gradients, and follows its weight."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

import langppl as lp
from langppl.lm import products
from langppl.lm.products import FrozenLinear, unchanged
from langppl.lm.requests import ScoreRequest
from langppl.lm.rules import StringRules
from langppl.lm.scoring import score_with_gradients
from langppl.testing import tiny_lm

pytestmark = pytest.mark.skipif(
    not products._works(torch.float32), reason="torch has no oneDNN products here"
)


def layers(inputs, outputs, bias, seed=0):
    torch.manual_seed(seed)
    plain = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    return plain, FrozenLinear(copy.deepcopy(plain))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 99)
)
def test_equal_with_gradients(rows, inputs, outputs, bias, seed):
    plain, frozen = layers(inputs, outputs, bias, seed)
    x = torch.randn(2, rows, inputs)
    ends = torch.randn(2, rows, outputs)
    found = []
    for layer in (plain, frozen):
        own = x.clone().requires_grad_(True)
        y = layer(own)
        (y * ends).sum().backward()
        found.append((y.detach(), own.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(frozen(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not products._works(torch.bfloat16), reason="no bfloat16 products here")
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_equal_with_gradients_in_bfloat16(rows, inputs, outputs, bias):
    plain, frozen = (layer.bfloat16() for layer in layers(inputs, outputs, bias))
    x = torch.randn(2, rows, inputs, dtype=torch.bfloat16)
    found = []
    for layer in (plain, frozen):
        own = x.clone().requires_grad_(True)
        y = layer(own)
        y.sum().backward()
        found.append((y.detach(), own.grad))
    assert frozen._laid is not None
    for a, b in zip(*found, strict=True):  # sums in another order, rounded to 8 bits
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


def test_a_changed_weight_is_laid_out_anew():
    plain, frozen = layers(6, 5, True)
    x = torch.randn(3, 6)
    before = frozen(x)
    with torch.no_grad():
        for layer in (plain, frozen):
            layer.weight.mul_(2.0)
    torch.testing.assert_close(frozen(x), plain(x))
    assert (frozen(x) - before).abs().max() > 0.1
    for layer in (plain, frozen):  # as peft merges an adapter
        layer.weight.data += 0.5
    torch.testing.assert_close(frozen(x), plain(x))
    frozen.weight = nn.Parameter(plain.weight * 3.0, requires_grad=False)
    torch.testing.assert_close(frozen(x), nn.functional.linear(x, plain.weight * 3.0, plain.bias))


def test_a_weight_that_takes_gradients_gets_them():
    _, frozen = layers(6, 5, True)
    frozen.requires_grad_(True)
    frozen(torch.ones(2, 6)).sum().backward()
    torch.testing.assert_close(frozen.weight.grad, torch.full((5, 6), 2.0))
    torch.testing.assert_close(frozen.bias.grad, torch.full((5,), 2.0))


def test_other_float_types_take_the_plain_road():
    plain, frozen = layers(6, 5, False)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(frozen.double()(x), plain.double()(x))


def test_second_gradients():
    plain, frozen = layers(6, 5, True)
    found = []
    for own in (plain, frozen):
        x = torch.linspace(-1.0, 1.0, 6).requires_grad_(True)
        (first,) = torch.autograd.grad(own(x**2).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert found[0].abs().max() > 0.1


@pytest.mark.parametrize("bias", [torch.ones(10)[::2], torch.ones(5, dtype=torch.float64)])
def test_a_bias_of_another_form_takes_the_plain_road(bias):
    plain, frozen = layers(6, 5, True)
    frozen.bias.data = bias
    x = torch.randn(3, 6)
    if bias.dtype == torch.float32:
        torch.testing.assert_close(frozen(x), x @ plain.weight.T + bias)
    else:
        with pytest.raises(RuntimeError):
            frozen(x)


def test_it_can_be_copied_after_use():
    plain, frozen = layers(6, 5, True)
    x = torch.randn(3, 6)
    frozen(x)
    torch.testing.assert_close(copy.deepcopy(frozen)(x), plain(x))


def test_a_stretch_without_changes_looks_at_each_layer_once():
    plain, frozen = layers(8, 5, bias=True)
    x = torch.randn(3, plain.in_features)
    with torch.no_grad():
        with unchanged():
            torch.testing.assert_close(frozen(x), plain(x))
            before = frozen(x)
            frozen.weight.mul_(2.0)  # what the stretch promises not to do it does not see
            assert torch.equal(frozen(x), before)
            with torch.enable_grad():
                own = x.clone().requires_grad_()
                assert frozen(own).requires_grad
        plain.weight.mul_(2.0)
        torch.testing.assert_close(frozen(x), plain(x))
        with unchanged():
            torch.testing.assert_close(frozen(x), plain(x))
            torch.testing.assert_close(frozen(x), plain(x))
        frozen.weight.mul_(2.0)
        with unchanged():
            torch.testing.assert_close(frozen(x), plain(x) + plain(x) - plain.bias)


def large_lm(freeze):
    """A Llama whose layers are large enough to be laid out; `freeze` says whether they are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tiny_lm(["a", "b", ".", " "], seed=1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=base.vocabulary.size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        eos_token_id=base.model.config.eos_token_id,
        bos_token_id=None,
    )
    lm = lp.LM.from_parts(LlamaForCausalLM(config), base.tokenizer, "large")
    assert any(isinstance(m, FrozenLinear) for m in lm.model.modules())
    if not freeze:
        for parent in list(lm.model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, FrozenLinear):
                    plain = nn.Linear(1, 1, bias=False)
                    plain.in_features, plain.out_features = layer.in_features, layer.out_features
                    plain.weight = layer.weight
                    setattr(parent, name, plain)
    return lm


def test_scores_and_adapter_gradients_are_those_of_the_plain_model():
    found = []
    for freeze in (False, True):
        lm = large_lm(freeze)
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        parameters = lm.add_adapter("guide", config)
        rules = lm.bind(StringRules(stop=".", max_tokens=6))
        requests = [
            ScoreRequest(
                lm, lm.encode_prompt(p), rules.parse(lm.encode_text(z), z.encode(), 6), 1.0, "guide"
            )
            for p, z in [("ab", "ab."), ("ab", "abb."), ("b", "a b.")]
        ]
        scores = torch.stack([f.total for f in score_with_gradients(requests)])
        scores.sum().backward()
        found.append((scores.detach(), [p.grad for p in parameters]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert a.abs().max() > 1e-4
