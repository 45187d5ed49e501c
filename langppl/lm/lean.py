"""A pass over decoder layers of Llama's form, without the modules between their products.

A pass over few tokens spends much of its time in Python, in modules within modules. Of layers of
Llama's form (Llama, SmolLM2, Mistral, Qwen2) this runs the products as they stand, adapters
included, and what lies between them in one loop. Layers without an adapter run in functions that
are compiled for the machine, where there are any (`langppl.lm.native`). It serves passes without
gradients on the CPU.

Architectures of this form are listed, as others have the same parts and do more with them; the
states are also compared with those of transformers' own pass (`langppl.lm.packed.lean_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from langppl.lm import native
from langppl.lm.attention import Blocks, attend_to
from langppl.lm.products import FrozenLinear

_TYPES = {"llama", "mistral", "qwen2"}
"""As transformers' configs name them."""

_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_PRODUCTS = (*(f"{name}_proj" for name in "qkvo"), "gate_proj", "up_proj", "down_proj")
"""The products of a layer, as `native.Layer` takes them."""

_SILU = {"SiLU", "SiLUActivation"}

MOST_ROWS = 128
"""Nodes of a pass whose attention is compiled too: of more, torch's products are faster."""

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
        self._compiled: list[native.Layer | None] = [None] * len(self.layers)

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
        turns: tuple[Tensor, Tensor] | None = None
        for number, layer in enumerate(self.layers):
            own = self._layer(number) if x.dtype == torch.float32 else None
            if own is not None:
                if turns is None:
                    turns = cos[:, 0].contiguous(), sin[:, 0].contiguous()
                    room = x.new_empty(own.room(n))
                    x = x.contiguous()
                both, values = own.before(x, *turns, room)
            else:
                parts, norm = layer.self_attn._modules, layer.input_layernorm
                h = _normed(x, norm)
                values = parts["v_proj"](h).view(n, -1, width).transpose(0, 1)
                both = torch.cat([parts["q_proj"](h), parts["k_proj"](h)], -1).view(n, -1, width)
                both = torch.addcmul(both * cos, both.roll(width // 2, -1), sin).transpose(0, 1)
            heads = len(both) - len(values)
            queries, keys, values = both[None, :heads], both[None, heads:], values[None]
            if cache is not None:
                keys, values = cache.update(keys, values, number)
            found = self._attended(seen, queries, keys, values)
            if own is not None:
                own.after(found, x, room)
                continue
            x = x + parts["o_proj"](found)
            gated = layer.mlp._modules
            h = _normed(x, layer.post_attention_layernorm)
            h = gated["act_fn"](gated["gate_proj"](h)).mul_(gated["up_proj"](h))
            x = x + gated["down_proj"](h)
        return _normed(x[keep], self.base.norm)

    def _attended(self, seen: Blocks, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention's result [n, heads · width]."""
        _, heads, n, _ = queries.shape
        shared = keys.shape[1]
        if (
            n <= MOST_ROWS
            and queries.dtype == torch.float32
            and native.attends(self.width, heads // shared, seen.keys.shape[1])
            and all(x.stride(2) == self.width and x.stride(3) == 1 for x in (keys, values))
        ):
            starts, places = seen.lists()
            own = queries[0].contiguous()
            return native.attend(own, keys[0], values[0], starts, places, self.scaling)
        found = attend_to(seen, queries, keys, values, scaling=self.scaling)
        return found.reshape(n, -1)

    def _layer(self, number: int) -> native.Layer | None:
        """A layer as compiled functions take it, if all its products are frozen weights' alone."""
        if native.library() is None:
            return None
        layer = self.layers[number]
        modules = {**layer.self_attn._modules, **layer.mlp._modules}
        weights = []
        for name in _PRODUCTS:
            product = _frozen(modules[name])
            panels = None if product is None else product.in_panels()
            if product is None or panels is None:
                return None
            weights.append((panels, product.bias))
        norms = [
            (norm.weight, float(norm.variance_epsilon))
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        if type(modules["act_fn"]).__name__ not in _SILU or not all(
            weight.dtype == torch.float32 and weight.is_contiguous() for weight, _ in norms
        ):
            return None
        before = self._compiled[number]
        if before is None or not _are_same(before, weights, norms):
            self._compiled[number] = before = native.Layer(weights, norms, self.width)
        return before


def _are_same(
    layer: native.Layer,
    weights: Sequence[tuple[native.Weight, Tensor | None]],
    norms: Sequence[tuple[Tensor, float]],
) -> bool:
    return all(
        a is b and s is t for (a, s), (b, t) in zip(layer.weights, weights, strict=True)
    ) and all(a is b and s == t for (a, s), (b, t) in zip(layer.norms, norms, strict=True))


def _frozen(module: Any) -> FrozenLinear | None:
    """The product with a frozen weight that a module is, or that is left of it without adapters."""
    for _ in range(2):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        if type(module) is FrozenLinear:
            return module
        if not getattr(module, "disable_adapters", False) or module.merged:
            return None
        module = module.base_layer
    return None


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
