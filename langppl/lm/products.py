"""Faster matrix products with frozen weights on the CPU.

`torch.nn.functional.linear` lays the weight out anew in every call; oneDNN takes one that was laid
out once, and so do the products that are compiled for the machine (`langppl.lm.native`), which
serve where there are any. The copy costs as much memory as the weight, and frozen weights
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
from langppl.lm.nested import reset

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
        reset(_unchanged, token)


Laid = Tensor | native.Weight
"""A weight in oneDNN's layout, or in panels."""


def stretch() -> object:
    """The innermost such block; None outside."""
    return _unchanged.get()


def _lay_out(weight: Tensor) -> Laid:
    if native.takes(weight.dtype):
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
        own = gradients[0]
        if ctx.is_compiled and not torch.is_grad_enabled():
            found = native.multiply_back(own.float(), weight)
            return found.to(own.dtype), None, None, None
        return own @ weight.to(own.dtype), None, None, None


class FrozenLinear(nn.Linear):
    """A linear layer that keeps a second copy of its weight, laid out for products.

    It shares the parameters of the layer it replaces. The copy is made at the first call, and anew
    when the weight has changed; off the CPU, in a float type that is not multiplied so here, or
    where the weight itself takes gradients, it is a plain linear layer. Where products are
    compiled, a bfloat16 weight takes float32 too, and gives it.

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
        if is_known and laid is not None and _takes(laid, input):
            return _multiply(input, laid, self.bias)
        weight, bias = self.weight, self.bias
        if self._takes_gradients() or not _suits(weight, bias) or not _takes(weight, input):
            return super().forward(input)
        laid = self._current()
        if not torch.is_grad_enabled():
            self._looked = stretch
        elif input.requires_grad:
            apply: Any = _Product.apply
            product: Tensor = apply(input, weight, laid, bias)
            return product
        return _multiply(input, laid, bias)

    def takes(self, input: Tensor) -> bool:
        """Whether it multiplies numbers of such a float type."""
        is_own = input.dtype == self.weight.dtype
        return is_own or (
            not self._takes_gradients()
            and _suits(self.weight, self.bias)
            and _takes(self.weight, input)
        )

    def _takes_gradients(self) -> bool:
        return torch.is_grad_enabled() and (
            self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        )

    def in_panels(self) -> native.Weight | None:
        """The weight as compiled layers take it; None if it is not laid out so."""
        stretch, laid = _unchanged.get(), self._laid
        if stretch is None or stretch is not self._looked or laid is None:
            if not (native.takes(self.weight.dtype) and _suits(self.weight, self.bias)):
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


def _takes(weight: Laid, x: Tensor) -> bool:
    """Whether a weight is multiplied with numbers of such a float type."""
    return x.dtype == weight.dtype or (
        x.dtype == torch.float32
        and native.takes(weight.dtype)
        and not torch.is_autocast_enabled("cpu")
    )


def _suits(weight: Tensor, bias: Tensor | None) -> bool:
    return (
        (bias is None or (bias.dtype == weight.dtype and bias.is_contiguous()))
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.dtype in _TOLERANCE
        and _works(weight.dtype)
    )


def mixed(chances: Tensor, weight: Tensor) -> Tensor:
    """The product of chances [n, rows] with a weight [rows, width], without gradients; float32.

    In the weight's float type, which torch multiplies slowly on processors that have none of it.
    """
    compiled = native.library() if weight.device.type == "cpu" else None
    if (
        compiled is not None
        and weight.dtype == torch.bfloat16
        and chances.dtype == torch.float32
        and not compiled.langppl_has_brief()
    ):
        return native.multiply_back(chances, weight)
    return (chances.to(weight.dtype) @ weight).float()


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
    if native.takes(dtype):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.ones(2, 3, dtype=dtype), torch.arange(12.0).reshape(4, 3).to(dtype)
    try:
        found = _multiply(x, _lay_out(weight), None)
    except (AttributeError, RuntimeError):  # the operators are torch's own, and may go
        return False
    return torch.allclose(found, x @ weight.T, rtol=_TOLERANCE[dtype])
