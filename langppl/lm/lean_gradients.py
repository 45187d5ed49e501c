"""Gradients of compiled layers: those of their LoRA adapters, and of what goes through them.

The two halves of a layer (`langppl.lm.native.Layer`), before and after its attention, are functions
to torch, whose forward pass is compiled. For the backward pass they keep what goes in, what gate
and up gave, and the adapters' few numbers in between; norms and the gated product are made again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from langppl.lm import native

Adapted = tuple[Tensor, Tensor, float]
"""An adapter's two weights, [rank, inputs] and [outputs, rank], and its scale."""


@dataclass(frozen=True)
class Trained:
    """A layer for passes with gradients.

    Attributes:
        layer: its compiled form.
        weights: its products' weights, in the order of `native.PARTS`.
        adapters: their adapters.
    """

    layer: native.Layer
    weights: Sequence[Tensor]
    adapters: Sequence[Adapted | None]

    def before(self, x: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
        """As `native.Layer.before`, with gradients."""
        apply: Any = _Before.apply
        turned, values = apply(self, x, cosines, sines, *self._parameters(slice(0, 3)))
        return turned, values

    def after(self, found: Tensor, x: Tensor) -> Tensor:
        """What comes out of the layer, shape [rows, inputs], with gradients."""
        apply: Any = _After.apply
        out: Tensor = apply(self, found, x, *self._parameters(slice(3, 7)))
        return out

    def _parameters(self, which: slice) -> list[Tensor | None]:
        return [p for own in self.adapters[which] for p in (own[:2] if own else (None, None))]


def _low(room: Tensor, first: int, rows: int, ranks: Sequence[int]) -> list[Tensor]:
    """What adapters' first weights gave, scaled, [rows, rank] of each; it lies in a row."""
    own = room[first : first + rows * sum(ranks)].clone()
    return [part.view(rows, -1) for part in own.split([rows * rank for rank in ranks])]


def _back(
    weight: Tensor,
    adapter: tuple[Tensor, Tensor, float] | None,
    x: Tensor,
    low: Tensor,
    gradients: Tensor,
    into: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of one product's x and of its adapter's weights.

    Args:
        weight: shape [outputs, inputs].
        adapter: on it.
        x: shape [rows, inputs].
        low: what the adapter's first weight gave, scaled.
        gradients: of the product's result, shape [rows, outputs].
        into: other gradients of x, which these are added to.
    """
    if adapter is None:
        return native.multiply_back(gradients, weight, into=into), None, None
    down, up, scale = adapter
    of_low = (gradients @ up).mul_(scale)
    of_x = native.multiply_back(gradients, weight, of_low, down, into)
    return of_x, of_low.T @ x, gradients.T @ low


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        trained: Trained,
        x: Tensor,
        cosines: Tensor,
        sines: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        layer, rows = trained.layer, len(x)
        room = x.new_empty(layer.room(rows))
        turned, values = layer.before(x, cosines, sines, room)
        first = rows * (layer.inputs + (layer.heads + 2 * layer.shared) * layer.width)
        low = _low(room, first, rows, layer.ranks()[:3])
        ctx.save_for_backward(x, cosines, sines, *low, *parameters)
        ctx.trained = trained
        return turned, values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with _alone():
            return _before_back(ctx, gradients)


class _After(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, trained: Trained, found: Tensor, x: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        layer, rows = trained.layer, len(x)
        out, room = x.clone(), x.new_empty(layer.room(rows))
        middle = torch.empty_like(x)
        gates, ups = (x.new_empty(rows, layer.inner) for _ in range(2))
        layer.after(found, out, room, (middle, gates, ups))
        first = rows * (layer.inputs + layer.inner)
        low = _low(room, first, rows, layer.ranks()[3:])
        ctx.save_for_backward(found, middle, gates, ups, *low, *parameters)
        ctx.trained = trained
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with _alone():
            return _after_back(ctx, gradients)


def _before_back(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    x, cosines, sines, *kept = ctx.saved_tensors
    trained: Trained = ctx.trained
    layer = trained.layer
    whole = layer.turned_back(cosines, sines, *(g.contiguous() for g in gradients))
    h = layer.normed(x, 0)
    of_h: Tensor | None = None
    of_parameters: list[Tensor | None] = []
    widths = [n * layer.width for n in (layer.heads, layer.shared, layer.shared)]
    for k, own in enumerate(whole.split(widths, 1)):
        adapter = _adapter(trained, k, kept[3:], k)
        of_h, *of_own = _back(trained.weights[k], adapter, h, kept[k], own, of_h)
        of_parameters += of_own
    assert of_h is not None
    of_x = None
    if ctx.needs_input_grad[1]:
        of_x = torch.zeros_like(x)
        layer.normed_back(x, 0, of_h, of_x)
    return None, of_x, None, None, *of_parameters


def _after_back(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    found, middle, gates, ups, *kept = ctx.saved_tensors
    trained: Trained = ctx.trained
    layer, weights = trained.layer, trained.weights
    low, parameters = kept[:4], kept[4:]
    of_out = gradients[0].contiguous()

    def back(
        k: int, x: Tensor, own: Tensor, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        adapter = _adapter(trained, 3 + k, parameters, k)
        return _back(weights[3 + k], adapter, x, low[k], own, into)

    # The gated product is made again beside its gradients, which come of the last product's.
    last = _adapter(trained, 6, parameters, 3)
    of_low = None if last is None else (of_out @ last[1]).mul_(last[2])
    down = None if last is None else last[0]
    of_product = native.multiply_back(of_out, weights[6], of_low, down)
    product, of_gates, of_ups = layer.gated_back(gates, ups, of_product)
    of_last: list[Tensor | None] = [None, None]
    if of_low is not None:
        of_last = [of_low.T @ product, of_out.T @ low[3]]
    del product, of_product
    h = layer.normed(middle, 1)
    of_h, *of_gate = back(1, h, of_gates)
    of_h, *of_up = back(2, h, of_ups, of_h)
    of_middle = of_out.clone()
    layer.normed_back(middle, 1, of_h, of_middle)
    of_found, *of_first = back(0, found, of_middle)
    return None, of_found, of_middle, *of_first, *of_gate, *of_up, *of_last


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """For a backward pass: whatever the caller's autocast says, and once."""
    if torch.is_grad_enabled():
        raise NotImplementedError("compiled layers have no second gradients (create_graph=True)")
    with torch.autocast("cpu", enabled=False):
        yield


def _adapter(
    trained: Trained, number: int, parameters: Sequence[Tensor | None], at: int
) -> Adapted | None:
    """A product's adapter, with the weights that were kept for the backward pass."""
    own = trained.adapters[number]
    down, up = parameters[2 * at], parameters[2 * at + 1]
    return None if own is None or down is None or up is None else (down, up, own[2])
