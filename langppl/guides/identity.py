"""What tells one guide from another, in words that are the same in every process."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch

from langppl.guides.checkpoints import name_of, plain
from langppl.guides.guidance import Guidance
from langppl.lm import LM, adapters
from langppl.program.calls import bound_to

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def of_object(guide: Any) -> str:
    """A guide's type, name and repr, and its adapter as it is if it has one."""
    # Where an object lies in memory differs between processes.
    found = f"{name_of(type(guide))} {guide.name} {_ADDRESS.sub('', repr(guide))}"
    lm, adapter = getattr(guide, "lm", None), getattr(guide, "adapter", None)
    if isinstance(lm, LM) and isinstance(adapter, str):
        found += f" {of_adapter(lm, adapter)}"
    return found


def of_adapter(lm: LM, adapter: str) -> str:
    """An adapter's weights and scales."""
    return adapters.digest(lm.model, adapter).hex()


def of_function(fn: Any) -> str:
    """A function's name, and the strings and numbers that it is bound to."""
    inner = fn
    while hasattr(inner, "func"):  # a functools.partial
        inner = inner.func
    return f"{name_of(inner)} {plain(bound_to(fn))!r}"


def of_guidance(guidance: Guidance) -> str:
    """A guidance's scale, and the function that it has of its own."""
    own = "" if guidance.without is None else f" without {of_function(guidance.without)}"
    return f"guidance {guidance.scale!r}{own}"


def of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Weights by their names."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
