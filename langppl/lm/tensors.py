"""Tensors in files (safetensors), which may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from langppl.lm.formats import shown, unreadable


def packed(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors as the content of a file."""
    from safetensors.torch import save

    own = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    return save(own, metadata={"format": "pt"})


def unpacked(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file, by name.

    Raises:
        ValueError: if it is corrupt, or cannot be read; names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # By its name safetensors opens no file in a folder whose name is no Unicode.
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        return load(content)
    # Types of numbers that torch does not have are unknown keys to safetensors.
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{shown(path)} is corrupt: {error}") from error


def check_like(
    what: str,
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    misfit: str = "is corrupt",
) -> None:
    """Checks that tensors may take the places of others: names, shapes, kinds, and all finite.

    Args:
        what: what they are of, for the error.
        found: tensors by name.
        expected: those in whose places they are to be; they need not have any numbers.
        misfit: what is to be said of them where names or shapes differ.

    Raises:
        ValueError: if one may not.
    """
    one, two = ({k: tuple(v.shape) for k, v in own.items()} for own in (expected, found))
    if one != two:
        differing = sorted(set(one.items()) ^ set(two.items()))
        raise ValueError(
            f"{what} {misfit}: {len(differing)} tensors differ in name or shape, for instance "
            f"{differing[0]}"
        )
    for name, tensor in found.items():
        own = expected[name].dtype
        is_real = tensor.dtype.is_floating_point and own.is_floating_point
        if not is_real and tensor.dtype != own:
            raise ValueError(
                f"{what} is corrupt: {name!r} has numbers of {tensor.dtype}, and not of {own}"
            )
        # What is finite in a wider type may not be in the one that it is to have.
        if is_real and not bool(torch.isfinite(tensor.to(own)).all()):
            raise ValueError(f"{what} is corrupt: it holds NaN or infinity, in {name!r}")
