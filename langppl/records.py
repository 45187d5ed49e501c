"""Values of sites as strict JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from langppl.distributions.text import Text
from langppl.lm.texts import plain_text


def number(value: float) -> float | str:
    """A float in strict JSON, which has no infinities: "-inf", "inf", "nan"."""
    return float(value) if math.isfinite(value) else str(float(value))


def optional(value: float | None) -> float | str | None:
    """`number`, or None."""
    return None if value is None else number(value)


def numbers(values: Iterable[float] | None) -> list[float | str] | None:
    """`number` of each, or None."""
    return None if values is None else [number(value) for value in values]


def floats(values: Iterable[float | str] | None) -> list[float] | None:
    """The inverse of `numbers`."""
    return None if values is None else [float(value) for value in values]


def encode(value: Any) -> Any:
    """A sample's value in strict JSON; objects mark the types that JSON lacks."""
    if isinstance(value, Text):
        ids = None if value.ids is None else list(value.ids)
        return {"text": plain_text(value), "ids": ids, "tokenizer": value.tokenizer}
    if isinstance(value, str):
        return plain_text(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": number(value)}
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": encode(value.detach().cpu().tolist()), "dtype": dtype}
    if isinstance(value, (np.ndarray, np.generic)):
        return encode(value.tolist())
    if isinstance(value, list):
        return [encode(entry) for entry in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(entry) for entry in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {plain_text(key): encode(entry) for key, entry in value.items()}}
    raise TypeError(f"a value of type {type(value).__name__} cannot be written as JSON")


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if "text" in value:
        return Text(value["text"], value["ids"], value["tokenizer"])
    if "float" in value:
        return float(value["float"])
    if "tensor" in value:
        dtype = getattr(torch, value["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value['dtype']!r} is not a tensor type")
        return torch.tensor(decode(value["tensor"]), dtype=dtype)
    if "tuple" in value:
        return tuple(decode(entry) for entry in value["tuple"])
    return {key: decode(entry) for key, entry in value["dict"].items()}
