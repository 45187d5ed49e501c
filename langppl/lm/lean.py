"""A pass over decoder layers of Llama's form, without the modules between their products.

A pass over few tokens spends much of its time in Python, in modules within modules. Of layers of
Llama's form (Llama, SmolLM2, Mistral, Qwen2) this runs the products as they stand, adapters
included, and what lies between them in one loop; in functions that are compiled for the machine
where there are any (`langppl.lm.native`). It serves passes on the CPU without gradients, and, where
all its layers are compiled, passes with gradients of an adapter.

Architectures of this form are listed, as others have the same parts and do more with them; the
states are also compared with those of transformers' own pass (`langppl.lm.packed.lean_of`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from langppl.lm import native, products
from langppl.lm.attention import Blocks, attend_to
from langppl.lm.lean_gradients import Adapted, Trained
from langppl.lm.products import FrozenLinear

_TYPES = {"llama", "mistral", "qwen2"}
"""As transformers' configs name them."""

_NUMBERS = {int, float}

_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_OF_GATED = ("gate_proj", "up_proj", "down_proj")
"""Both in the order in which `native.Layer` takes them."""

_ATTENTION = {*_OF_ATTENTION}
_GATED = {*_OF_GATED, "act_fn"}
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
        self._parts = [
            (x.self_attn._modules, x.mlp._modules, (x.input_layernorm, x.post_attention_layernorm))
            for x in self.layers
        ]
        self._compiled: list[tuple[list[Any], Trained] | None] = [None] * len(self.layers)
        self._adapters: dict[tuple[int, str], tuple[object, Adapted, native.Adapter]] = {}

    def suits(self) -> bool:
        """Whether the modules that it leaves out are as they were when it was made."""
        found = list(_left_out(self.base))
        return len(found) == len(self.left_out) and all(
            now is then and not (now.training or _is_watched(now))
            for now, then in zip(found, self.left_out, strict=True)
        )

    def trains(self) -> bool:
        """Whether it gives the gradients of the adapter that is switched on."""
        every = self._in_panels()
        return (
            None not in every
            and not torch.is_autocast_enabled("cpu")
            and not any(
                p.requires_grad for n, p in self.base.named_parameters() if ".lora_" not in n
            )
            and self.suits()
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
            States, shape [kept, width]; float32 where all layers are compiled, else in the model's
            float type.
        """
        device = self.base.device
        ids, depth, keep = ids.to(device), depth.to(device), keep.to(device)
        n, width = len(ids), self.width
        embedded: Tensor = self.base.embed_tokens(ids[None])[0]
        every = self._in_panels()
        is_whole = None not in every
        x = embedded.float() if is_whole else embedded
        cos, sin = self.base.rotary_emb(x[None], depth[None])
        # Of heads that are turned in part, compiled functions would read more than there is.
        if cos.shape[-1] != width or not (is_whole or x.dtype == torch.float32):
            every, x = [None] * len(self.layers), embedded
        cos, sin = cos[0, :, None], sin[0, :, None].clone()
        # Rotating a half: cat(-b, a) is a roll of (a, b), its first half with the other sign.
        sin[..., : width // 2].neg_()
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        turns = cos[:, 0].contiguous(), sin[:, 0].contiguous()
        if torch.is_grad_enabled():
            x = self._trained(every, seen, x, turns, cache)
            return _normed(x[keep], self.base.norm)
        x = x.clone(memory_format=torch.contiguous_format)  # compiled layers write over it
        compiled = [None if own is None else own.layer for own in every]
        if self._run(compiled, seen, x, turns, cache):
            return _normed(x[keep], self.base.norm)
        # Adapters differ between layers, and with them what these need.
        room = x.new_empty(max((own.room(n) for own in compiled if own is not None), default=0))
        for number, (layer, own) in enumerate(zip(self.layers, compiled, strict=True)):
            if own is not None:
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
                keys, values = keys.to(embedded.dtype), values.to(embedded.dtype)
                # What lies around a layer's own update moves layers between devices.
                one = cache.layers[number] if number < len(cache.layers) else None
                keys, values = (
                    cache.update(keys, values, number) if one is None else one.update(keys, values)
                )
            found = self._attended(seen, queries, keys, values).to(x.dtype)
            if own is not None:
                own.after(found.contiguous(), x, room)
                continue
            x = x + parts["o_proj"](found)
            gated = layer.mlp._modules
            h = _normed(x, layer.post_attention_layernorm)
            h = gated["act_fn"](gated["gate_proj"](h)).mul_(gated["up_proj"](h))
            x = x + gated["down_proj"](h)
        return _normed(x[keep], self.base.norm)

    def _trained(
        self,
        layers: list[Trained | None],
        seen: Blocks,
        x: Tensor,
        turns: tuple[Tensor, Tensor],
        cache: Any,
    ) -> Tensor:
        """What comes out of all layers, with gradients."""
        x = x.contiguous()
        for number, own in enumerate(layers):
            if own is None:
                raise RuntimeError("gradients of layers that are not compiled")
            both, values = own.before(x, *turns)
            heads = len(both) - len(values)
            queries, keys, values = both[None, :heads], both[None, heads:], values[None]
            if cache is not None:
                keys, values = cache.update(keys, values, number)
            found = attend_to(seen, queries, keys, values, scaling=self.scaling)
            x = own.after(found.reshape(len(x), -1).contiguous(), x)
        return x

    def _run(
        self,
        layers: list[native.Layer | None],
        seen: Blocks,
        x: Tensor,
        turns: tuple[Tensor, Tensor],
        cache: Any,
    ) -> bool:
        """Runs all layers in one compiled function, in place; False where that cannot be."""
        n, every = len(x), [own for own in layers if own is not None]
        if len(every) < len(layers) or cache is None or len(cache.layers) != len(layers):
            return False
        first, most = every[0], seen.keys.shape[1]
        shared, width = first.shared, self.width
        if n > MOST_ROWS or not native.attends(width, first.heads // shared, most):
            return False
        if not all(hasattr(layer, "room") and layer.is_initialized for layer in cache.layers):
            return False
        rooms, held = [], set()
        for layer in cache.layers:
            keys, values, own = layer.room(n)
            rooms.append((keys, values))
            held |= {(own, keys.shape, keys.dtype), (own, values.shape, values.dtype)}
        if len(held) > 1:
            return False
        ((tokens, shape, dtype),) = held
        if shape[1] != shared or shape[0] != 1 or dtype not in native.DTYPES:
            return False
        if not all(r.is_contiguous() for pair in rooms for r in pair):
            return False
        native.run(every, x, *turns, rooms, tokens, *seen.lists(), self.scaling)
        for layer in cache.layers:
            layer.grow(n)
        return True

    def _attended(self, seen: Blocks, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention's result [n, heads · width]."""
        _, heads, n, _ = queries.shape
        shared = keys.shape[1]
        if (
            n <= MOST_ROWS
            and queries.dtype == torch.float32
            and keys.dtype == values.dtype
            and keys.dtype in native.DTYPES
            and native.attends(self.width, heads // shared, seen.keys.shape[1])
            and all(x.stride(2) == self.width and x.stride(3) == 1 for x in (keys, values))
        ):
            starts, places = seen.lists()
            own = queries[0].contiguous()
            return native.attend(own, keys[0], values[0], starts, places, self.scaling)
        found = attend_to(seen, queries.to(keys.dtype), keys, values, scaling=self.scaling)
        return found.reshape(n, -1)

    def _in_panels(self) -> list[Trained | None]:
        """Each layer as compiled functions take it, or None."""
        takes = native.library() is not None
        return [self._layer(number) if takes else None for number in range(len(self.layers))]

    def _layer(self, number: int) -> Trained | None:
        """A layer as compiled functions take it, if its products are with frozen weights."""
        attention, gated, norms = self._parts[number]
        found: list[Any] = []
        plain: list[Tensor] = []
        adapters: list[Adapted | None] = []
        for modules, names in ((attention, _OF_ATTENTION), (gated, _OF_GATED)):
            for name in names:
                product, adapted = _product(modules[name])
                panels = None if product is None else product.in_panels()
                if product is None or panels is None:
                    return None
                own = None if adapted is None else self._adapter(number, name, adapted)
                plain.append(product.weight)
                adapters.append(adapted)
                bias = product.bias
                found += (panels, bias, own, 0 if bias is None else bias.data_ptr())
        for norm in norms:
            weight = norm._parameters["weight"]
            found += (weight, float(norm.variance_epsilon), weight.data_ptr())
            if weight.dtype not in native.DTYPES or not weight.is_contiguous():
                return None
        if _is_watched(gated["act_fn"]):
            return None
        found.append(type(gated["act_fn"]))
        before = self._compiled[number]
        if before is None or not all(
            a is b or (type(a) in _NUMBERS and a == b)
            for a, b in zip(found, before[0], strict=True)
        ):
            if found[-1].__name__ not in _SILU:
                return None
            if len({w.dtype for w in (*plain, found[28], found[31])}) > 1:
                return None
            weights = [tuple(found[k : k + 3]) for k in range(0, 28, 4)]
            layer = native.Layer(weights, [tuple(found[k : k + 2]) for k in (28, 31)], self.width)
            self._compiled[number] = before = (found, Trained(layer, plain, adapters))
        return before[1]

    def _adapter(self, number: int, name: str, adapted: Adapted) -> native.Adapter:
        """A product's adapter in panels, laid out anew unless no weight is changed meanwhile."""
        down, up, scale = adapted
        stretch, before = products.stretch(), self._adapters.get((number, name))
        if stretch is not None and before is not None and before[0] is stretch:
            of = before[1]
            if of[0] is down and of[1] is up and of[2] == scale:
                return before[2]
        found = native.Adapter(native.lay_out(down), native.lay_out(up), scale)
        self._adapters[number, name] = (stretch, adapted, found)
        return found


def _product(module: Any) -> tuple[FrozenLinear | None, Adapted | None]:
    """The product with a frozen weight that a module is, and the adapter that it has on it.

    Returns:
        (None, None) for whatever is not known to be that.
    """
    nothing = None, None
    if _is_watched(module):
        return nothing
    if type(module) is FrozenLinear:
        return module, None
    if not hasattr(module, "disable_adapters") or module.merged:
        return nothing
    base, adapted = module.base_layer, None
    if type(base) is not FrozenLinear or _is_watched(base):
        return nothing
    if not module.disable_adapters:
        kind = type(module)
        if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear"):
            return nothing
        names = [name for name in module.active_adapters if name in module.lora_A]
        if len(names) > 1 or any(name in module.lora_variant for name in names):
            return nothing
        for name in names:
            two = module.lora_A[name], module.lora_B[name]
            if module.lora_dropout[name].training or not all(
                type(own) is nn.Linear
                and own.bias is None
                and own.weight.dtype == torch.float32
                and own.weight.device.type == "cpu"
                and not _is_watched(own)
                for own in two
            ):
                return nothing
            adapted = two[0].weight, two[1].weight, float(module.scaling[name])
    return base, adapted


def _is_watched(module: Any) -> bool:
    """Whether more happens with a module than its own forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _left_out(base: Any) -> Iterator[Any]:
    yield base
    yield base.norm
    for layer in base.layers:
        yield layer
        yield from (layer._modules.get(name) for name in _LAYER)


def _normed(x: Tensor, norm: Any) -> Tensor:
    return rms_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), norm.variance_epsilon)


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
