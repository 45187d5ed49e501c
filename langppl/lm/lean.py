"""A pass over decoder layers of Llama's form, without the modules between their products.

A pass over few tokens spends much of its time in Python, in modules within modules. Of layers of
Llama's form (Llama, SmolLM2, Mistral, Qwen2) this runs the products as they stand, adapters
included, and what lies between them in one loop. It serves passes without gradients on the CPU.

Architectures of this form are listed, as others have the same parts and do more with them; the
states are also compared with those of transformers' own pass (`langppl.lm.packed.lean_of`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from langppl.lm.attention import Blocks, attend_to

_TYPES = {"llama", "mistral", "qwen2"}
"""As transformers' configs name them."""

_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_MODEL = {"embed_tokens", "layers", "norm", "rotary_emb"}


class Lean:
    """A model's layers, taken apart.

    Args:
        base: transformers' model without its head, of the form that `of_model` looks for.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self.layers = list(base.layers)
        attention = self.layers[0].self_attn
        self.width: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.left_out = list(_left_out(base))

    def suits(self) -> bool:
        """Whether the modules that it leaves out are as they were when it was made."""
        found = list(_left_out(self.base))
        return len(found) == len(self.left_out) and all(
            now is then
            and not (now._forward_hooks or now._forward_pre_hooks or now.training)
            and "forward" not in vars(now)
            for now, then in zip(found, self.left_out, strict=True)
        )

    def states(self, ids: Tensor, depth: Tensor, seen: Blocks, keep: Tensor, cache: Any) -> Tensor:
        """States of nodes, as `langppl.lm.packed.run` gives them.

        Args:
            ids: token of each node, shape [n].
            depth: position of each, shape [n].
            seen: what each sees of the cache and of the nodes.
            keep: the nodes whose states are wanted, shape [kept].
            cache: the KV cache, which grows by the nodes; None to keep none.

        Returns:
            States, shape [kept, width].
        """
        device = self.base.device
        ids, depth, keep = ids.to(device), depth.to(device), keep.to(device)
        n, width = len(ids), self.width
        x: Tensor = self.base.embed_tokens(ids[None])[0]
        cos, sin = self.base.rotary_emb(x[None], depth[None])
        cos, sin = cos[0, :, None], sin[0, :, None].clone()
        # Rotating a half: cat(-b, a) is a roll of (a, b), its first half with the other sign.
        sin[..., : width // 2].neg_()
        for number, layer in enumerate(self.layers):
            parts, norm = layer.self_attn._modules, layer.input_layernorm
            h = _normed(x, norm)
            values = parts["v_proj"](h).view(1, n, -1, width).transpose(1, 2)
            both = torch.cat([parts["q_proj"](h), parts["k_proj"](h)], -1).view(n, -1, width)
            both = torch.addcmul(both * cos, both.roll(width // 2, -1), sin)
            both = both.transpose(0, 1)[None]
            heads = both.shape[1] - values.shape[1]
            keys = both[:, heads:]
            if cache is not None:
                keys, values = cache.update(keys, values, number)
            found = attend_to(seen, both[:, :heads], keys, values, scaling=self.scaling)
            x = x + parts["o_proj"](found.reshape(n, -1))
            gated = layer.mlp._modules
            h = _normed(x, layer.post_attention_layernorm)
            h = gated["act_fn"](gated["gate_proj"](h)).mul_(gated["up_proj"](h))
            x = x + gated["down_proj"](h)
        return _normed(x[keep], self.base.norm)


def _left_out(base: Any) -> Iterator[Any]:
    yield base
    yield base.norm
    for layer in base.layers:
        yield layer
        yield from (layer._modules.get(name) for name in _LAYER)


def _normed(x: Tensor, norm: Any) -> Tensor:
    return rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def of_model(model: Any) -> Lean | None:
    """The layers of a model on the CPU taken apart, if its architecture and its parts are known."""
    base = model.base_model
    if base is model or model.device.type != "cpu" or not _names(base) >= _MODEL:
        return None
    config = model.config.get_text_config()
    if config.model_type not in _TYPES:
        return None
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return None
    for layer in base.layers:
        is_like = (
            _names(layer) == {*_LAYER}
            and _names(layer.self_attn) == _ATTENTION
            and _names(layer.mlp) == _GATED
            and all(_is_norm(n) for n in (layer.input_layernorm, layer.post_attention_layernorm))
            and hasattr(layer.self_attn, "scaling")
            and hasattr(layer.self_attn, "head_dim")
        )
        if not is_like:
            return None
    if not (_is_norm(base.norm) and len(base.layers)):
        return None
    found = Lean(base)
    return found if found.suits() else None


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_norm(module: Any) -> bool:
    own = [name for name, _ in module.named_parameters()]
    return own == ["weight"] and hasattr(module, "variance_epsilon")
