"""What a backward pass makes again instead of keeping: elementwise steps of gated layers.

A layer such as down(act(gate(x)) · up(x)) keeps four tensors of its inner width for the backward
pass: gate(x), act(gate(x)), up(x) and their product. The second and the fourth are cheap functions
of the others, and are made again from them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_ACTIVATIONS = ("act_fn", "act", "activation", "activation_fn")
"""How transformers' architectures call the activation function of a layer."""
_GATED = ("act_fn", "gate_proj", "up_proj", "down_proj")
"""What a layer has whose input to `down_proj` is act_fn(gate_proj(x)) · up_proj(x)."""


@dataclass(frozen=True)
class _Made:
    """A tensor that can be made again.

    Attributes:
        output: the tensor, as long as it lives.
        version: of it, when it was noted.
        again: makes its numbers.
    """

    output: weakref.ref[Tensor]
    version: int
    again: Callable[[], Tensor]

    def is_of(self, kept: Tensor) -> bool:
        """Whether another tensor holds its numbers."""
        # Memory of an output that has gone may hold another tensor by now.
        alive = self.output()
        return (
            alive is not None
            and alive.data_ptr() == kept.data_ptr()
            and alive.device == kept.device
            and alive._version == self.version
            and alive.numel() == kept.numel()
            and alive.is_contiguous()
            and kept.is_contiguous()
        )


@dataclass(frozen=True)
class _Again:
    """Stands for a tensor that is not kept.

    Attributes:
        made: how it is made.
        shape: of it.
    """

    made: _Made
    shape: torch.Size


@dataclass
class _Notes:
    """What a forward pass has met."""

    made: dict[int, _Made] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)
    ups: dict[int, Tensor] = field(default_factory=dict)

    def note(self, output: Tensor, again: Callable[[], Tensor]) -> None:
        place = output.data_ptr()
        if place:  # a tensor that does not say where its numbers are cannot be told from others
            self.made[place] = _Made(weakref.ref(output), output._version, again)

    def pack(self, kept: Tensor) -> Tensor | _Again:
        made = self.made.get(kept.data_ptr()) if self.made else None
        return _Again(made, kept.shape) if made is not None and made.is_of(kept) else kept

    def activation(self, layer: nn.Module) -> Callable[..., None]:
        """A hook for the activation function of a layer."""

        def hook(function: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad and len(args) == 1:
                gate = args[0].detach()
                self.gates[id(layer)] = gate
                self.note(output, lambda: function(gate))

        return hook

    def up(self, layer: nn.Module) -> Callable[..., None]:
        """A hook for what a gated layer multiplies with."""

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.ups[id(layer)] = output.detach()

        return hook

    def down(self, layer: Any) -> Callable[..., None]:
        """A hook before the projection that takes a gated layer's product."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            gate, up = self.gates.pop(id(layer), None), self.ups.pop(id(layer), None)
            product = args[0]
            if gate is None or up is None or not product.requires_grad:
                return

            def again() -> Tensor:
                found: Tensor = layer.act_fn(gate) * up
                return found

            # Layers of these names may do something else.
            with torch.no_grad():
                is_it = product.shape == up.shape and torch.equal(again(), product)
            if is_it:
                self.note(product, again)

        return hook


@contextlib.contextmanager
def elementwise_again(model: nn.Module) -> Iterator[None]:
    """Within it, forward passes keep less for the backward pass; gradients are the same."""
    notes = _Notes()
    handles: list[Any] = []
    for layer in model.modules():
        for name in _ACTIVATIONS:
            function = getattr(layer, name, None)
            if isinstance(function, nn.Module) and not any(True for _ in function.parameters()):
                handles.append(function.register_forward_hook(notes.activation(layer)))
        if all(isinstance(getattr(layer, name, None), nn.Module) for name in _GATED):
            own: Any = layer
            handles.append(own.up_proj.register_forward_hook(notes.up(layer)))
            handles.append(own.down_proj.register_forward_pre_hook(notes.down(layer)))

    def unpack(kept: Tensor | _Again) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept.made.again().view(kept.shape)

    try:
        with torch.autograd.graph.saved_tensors_hooks(notes.pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for known in (notes.made, notes.gates, notes.ups):
            known.clear()
