"""Values of sites as strict JSON, and files that are whole or not there."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from langppl.distributions.text import Text


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
        return {"text": str(value), "ids": ids, "tokenizer": value.tokenizer}
    if isinstance(value, str):
        return str(value)
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
        return {"dict": {str(key): encode(entry) for key, entry in value.items()}}
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


def write_atomically(path: Path, text: str, what: str) -> None:
    """Replaces a file in one step, so that a broken write never looks like a good file.

    Args:
        path: the file; missing folders are made.
        text: what it is to hold.
        what: what that is, for the error.

    Raises:
        OSError: if the file cannot be written; names the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        # Errors of the temporary file, or of a folder above, would not say what was to be written.
        mend = "give a file in a folder that can be written to"
        reason = f"the {what} cannot be saved ({error.strerror}); {mend}"
        raise OSError(error.errno, reason, str(path)) from error
