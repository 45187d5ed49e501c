"""What is made again in a backward pass is what it was: gradients are the same to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from langppl.lm.recompute import elementwise_again

WIDE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
HEADS: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 8}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**WIDE, num_key_value_heads=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE, **HEADS)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**WIDE, **HEADS)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_head=2, n_layer=2, n_positions=64)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE)),
}
GATED = ("llama", "mistral", "qwen3", "gemma3")


def with_adapter(name: str) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
        task_type="CAUSAL_LM",
    )
    return inject_adapter_in_model(config, MODELS[name]().eval())


def kept_of(model: Any, run: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # which keeps its memory from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_are_the_same_to_the_last_bit(name: str) -> None:
    model = with_adapter(name)
    own = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))

    def gradients() -> list[Tensor]:
        found = model(input_ids=ids).logits.square().mean()
        return list(torch.autograd.grad(found, own))

    plain = gradients()
    with elementwise_again(model):
        loss = model(input_ids=ids).logits.square().mean()
    again = torch.autograd.grad(loss, own)
    assert max(float(g.abs().max()) for g in plain) > 0.0
    for p, q in zip(plain, again, strict=True):
        assert torch.equal(p, q)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", list(MODELS))
def test_less_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(name)
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    found: list[Tensor] = []
    whole = kept_of(model, lambda: found.append(model(input_ids=ids).logits))
    made: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def watched(pack: Any, unpack: Any) -> Any:
        def noting(tensor: Tensor) -> Any:
            kept = pack(tensor)
            if not isinstance(kept, Tensor):
                made.append(tensor.nbytes)
            return kept

        return hooks(noting, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", watched)
    with elementwise_again(model):
        found.append(model(input_ids=ids).logits)
    inner = 2 * 12 * 64 * 4
    # In each layer the activation's output and, in a gated one, the product.
    assert sum(made) >= (4 if name in GATED else 2) * inner
    assert sum(made) > 0.05 * whole


class Layer(nn.Module):
    """Named as a gated layer, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        one = self.act_fn(self.gate_proj(x))
        two = self.act_fn(one + 1.0)  # a tensor of the same size, where the first has been
        product = (one * two) + self.up_proj(x)
        del one, two
        for _ in range(3):
            product = product * torch.ones_like(product)
        found: Tensor = self.down_proj(product)
        return found


def test_another_layer_of_these_names_is_not_taken_for_one() -> None:
    torch.manual_seed(0)
    layer = Layer()
    x = torch.randn(5, 4)
    plain = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    with elementwise_again(layer):
        loss = layer(x).square().sum()
    for p, q in zip(plain, torch.autograd.grad(loss, list(layer.parameters())), strict=True):
        assert torch.equal(p, q)
