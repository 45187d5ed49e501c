"""A second device that is not there: tensors on the CPU that say they are elsewhere.

Where no accelerator is at hand, that everything is moved to the LM's device is shown by an LM whose
tensors claim to live on "meta", while their numbers are in a tensor of the CPU. An operation of
tensors from both sides is an error, as it is between the CPU and a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("meta")
aten = torch.ops.aten
_BETWEEN = {aten._to_copy.default, aten.copy_.default}
# A GPU's tensor may be indexed by one of the CPU.
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Far(torch.Tensor):
    """A tensor that says it is elsewhere.

    Attributes:
        inner: its numbers, on the CPU.
    """

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Far:
        found: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=FAR,
        )
        return found

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == FAR.type


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Far) else value


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    far = [x for x in tensors if isinstance(x, Far)]
    near = [x for x in tensors if not isinstance(x, Far)]
    if any(_is_far(x.device) for x in near):
        raise AssertionError(f"{func} met a tensor without numbers: it was made past this module")
    if far and func not in _BETWEEN:
        indices = args[1] if func in _INDEXED else ()
        alien = [x for x in near if x.ndim and not any(x is i for i in indices)]
        if alien:
            raise RuntimeError(f"tensors on two devices in {func}: {[x.shape for x in alien]}")
    if func is aten.copy_.default:
        _inner(args[0]).copy_(_inner(args[1]))
        return args[0]
    goes_far = bool(far) if kwargs.get("device") is None else _is_far(kwargs["device"])
    own = {k: tree_map(_inner, v) for k, v in kwargs.items()}
    if own.get("device") is not None:
        own["device"] = torch.device("cpu")
    known = {id(x.inner): x for x in far}

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return Far(value) if goes_far else value

    return tree_map(outer, func(*tree_map(_inner, args), **own))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What makes or reads tensors without an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and _is_far(kwargs.get("device")):
            del kwargs["device"]
            return torch.tensor(*args, **kwargs).to(FAR)
        if args and isinstance(args[0], Far):
            if func is torch.Tensor.tolist:
                return args[0].inner.tolist()
            if func is torch.Tensor.new_tensor:
                return torch.tensor(args[1], dtype=args[0].dtype).to(FAR)
            if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
                return args[0][torch.tensor(args[1])]
        return func(*args, **kwargs)


@contextlib.contextmanager
def far_away(*modules: torch.nn.Module) -> Iterator[None]:
    """Moves modules to the other device for good; within the block there is one."""
    for module in (m for own in modules for m in own.modules()):
        for name, p in module._parameters.items():
            if p is not None:
                moved = torch.nn.Parameter(Far(p.detach().clone()), p.requires_grad)
                module._parameters[name] = moved
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else Far(b.clone())
    with _Operations(), _Functions():
        yield
