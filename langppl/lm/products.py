"""Faster matrix products with frozen weights on the CPU.

`torch.nn.functional.linear` lays the weight out anew in every call; oneDNN takes one that was laid
out once, and so do the products that are compiled for the machine (`langppl.lm.native`), which
serve float32 where there are any. The copy costs as much memory as the weight, and frozen weights
are worth it: every strings' forward pass reads them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from langppl.lm import native

SMALLEST = 2**16
"""Weights of fewer numbers gain nothing: the call itself costs more."""

_PROBES = 64

_ROWS = 128
"""Rows of input for which the layout is chosen; it takes any number."""

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Float types that are laid out, and how far a product may be from the plain one, relative."""


_unchanged: ContextVar[object] = ContextVar("langppl_unchanged", default=None)


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Within the block no weight is changed, so each layer looks once whether one was."""
    token = _unchanged.set(object())
    try:
        yield
    finally:
        _unchanged.reset(token)


Laid = Tensor | native.Weight
"""A weight in oneDNN's layout, or in panels."""


def stretch() -> object:
    """The innermost such block; None outside."""
    return _unchanged.get()


def _lay_out(weight: Tensor) -> Laid:
    if weight.dtype == torch.float32 and native.library() is not None:
        return native.lay_out(weight)
    laid: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    return laid


def _multiply(x: Tensor, laid: Laid, bias: Tensor | None) -> Tensor:
    if isinstance(laid, native.Weight):
        return native.multiply(x, laid, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, laid, bias, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    """x Wᵀ + b whose gradient goes to x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, laid: Laid, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.is_compiled = isinstance(laid, native.Weight)
        return _multiply(x, laid, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if ctx.is_compiled and not torch.is_grad_enabled():
            return native.multiply_back(gradients[0], weight), None, None, None
        return gradients[0] @ weight, None, None, None


class FrozenLinear(nn.Linear):
    """A linear layer that keeps a second copy of its weight, laid out for products.

    It shares the parameters of the layer it replaces. The copy is made at the first call, and anew
    when the weight has changed; off the CPU, in a float type that is not multiplied so here, or
    where the weight itself takes gradients, it is a plain linear layer.

    A change is seen by the weight's identity, memory and version, and, since what is written
    through `.data` (as peft's merging does) leaves no trace in these, by some of its numbers.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.training = layer.training
        self._laid: Laid | None = None
        self._of: tuple[Tensor, int, int] | None = None
        self._probe = self._seen = torch.empty(0)
        self._looked: object = None

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Linear`."""
        stretch, laid = _unchanged.get(), self._laid
        is_known = stretch is not None and stretch is self._looked and not torch.is_grad_enabled()
        if is_known and laid is not None and input.dtype == laid.dtype:
            return _multiply(input, laid, self.bias)
        weight, bias = self.weight, self.bias
        takes_gradients = torch.is_grad_enabled() and (
            weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        if takes_gradients or not _suits(weight, bias) or input.dtype != weight.dtype:
            return super().forward(input)
        laid = self._current()
        if not torch.is_grad_enabled():
            self._looked = stretch
        elif input.requires_grad:
            apply: Any = _Product.apply
            product: Tensor = apply(input, weight, laid, bias)
            return product
        return _multiply(input, laid, bias)

    def in_panels(self) -> native.Weight | None:
        """The weight as compiled layers take it; None if it is not laid out so."""
        stretch, laid = _unchanged.get(), self._laid
        if stretch is None or stretch is not self._looked or laid is None:
            if self.weight.dtype != torch.float32 or not _suits(self.weight, self.bias):
                return None
            laid = self._current()
            self._looked = stretch
        return laid if isinstance(laid, native.Weight) else None

    def __getstate__(self) -> dict[str, Any]:
        """Without the second copy, which does not let itself be copied or written."""
        return {**self.__dict__, "_laid": None, "_of": None}

    def _current(self) -> Laid:
        weight = self.weight
        if self._laid is None or not self._is_current():
            self._laid, self._of = _lay_out(weight), (weight, weight.data_ptr(), weight._version)
            numbers = weight.detach().flatten()
            self._probe = numbers[:: max(1, len(numbers) // _PROBES)]
            self._seen = self._probe.clone()
        return self._laid

    def _is_current(self) -> bool:
        assert self._of is not None
        weight, pointer, version = self._of
        return (
            weight is self.weight
            and pointer == weight.data_ptr()
            and version == weight._version
            and torch.equal(self._probe, self._seen)
        )


def _suits(weight: Tensor, bias: Tensor | None) -> bool:
    return (
        (bias is None or (bias.dtype == weight.dtype and bias.is_contiguous()))
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.dtype in _TOLERANCE
        and _works(weight.dtype)
    )


def freeze(model: nn.Module) -> None:
    """Replaces a model's large linear layers, if this machine has products for them."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if (
                type(layer) is nn.Linear
                and layer.weight.numel() >= SMALLEST
                and _suits(layer.weight, layer.bias)
            ):
                setattr(parent, name, FrozenLinear(layer))


@cache
def _works(dtype: torch.dtype) -> bool:
    """Whether such products work here; not all machines' oneDNN multiplies in bfloat16."""
    if dtype == torch.float32 and native.library() is not None:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.ones(2, 3, dtype=dtype), torch.arange(12.0).reshape(4, 3).to(dtype)
    try:
        found = _multiply(x, _lay_out(weight), None)
    except (AttributeError, RuntimeError):  # the operators are torch's own, and may go
        return False
    return torch.allclose(found, x @ weight.T, rtol=_TOLERANCE[dtype])
