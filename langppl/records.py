"""Values of sites as strict JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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


def check_fields(content: Mapping[str, Any], samples: int) -> None:
    """Checks those fields of a posterior's file that would fail only where they are used.

    Args:
        content: the file's.
        samples: how many samples it has.

    Raises:
        ValueError: for a field of another form; names it, its value and its form.
    """

    def is_count(value: Any, below: float = math.inf) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below

    def are_texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)

    def are_counts(value: Any, number: int, below: float = math.inf) -> bool:
        is_whole = isinstance(value, list) and len(value) == number
        return is_whole and all(is_count(entry, below) for entry in value)

    failed, elapsed = content["failed_sites"], content["elapsed"]
    ancestors, seconds = content.get("ancestors"), (int, float, type(None))
    forms = {
        "method": ("a text", isinstance(content["method"], str)),
        "guide": ("a text", isinstance(content["guide"], str)),
        "sites": ("a list of texts", are_texts(content["sites"])),
        "notes": ("a list of texts", are_texts(content["notes"])),
        "elapsed": ("a number or null", isinstance(elapsed, seconds)),
        "failed_sites": (
            "an object of counts",
            isinstance(failed, dict) and all(map(is_count, failed.values())),
        ),
        "moves": ("two counts", are_counts(content.get("moves", [0, 0]), 2)),
        "resampled": ("a count", is_count(content.get("resampled", 0))),
        "ancestors": (
            f"null or {samples} numbers of samples",
            ancestors is None or are_counts(ancestors, samples, samples),
        ),
    }
    for name, (form, holds) in forms.items():
        if not holds:
            raise ValueError(f"{name} is {str(content.get(name))[:80]}, and should be {form}")


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
