"""Names of an LM's weights: an adapter is trained for one set of them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator

import numpy as np
import torch

SAMPLE = 256
"""Numbers of each weight that are looked at."""

MARK = "w2-"
"""What names begin with; those without it were made by `by_means`."""

Tensors = Iterator[tuple[str, torch.Tensor]]


def by_sample(tokenizer: str, tensors: Tensors) -> str:
    """A digest of a sample of each weight, in bfloat16.

    Weights in float32 and the same ones rounded to bfloat16 have one name, so what was trained
    under one is read under the other. (Float16 rounds elsewhere.)

    Args:
        tokenizer: the tokenizer's own fingerprint.
        tensors: the weights and their names, without adapters.
    """
    digest = hashlib.sha256(tokenizer.encode())
    samples = []
    for name, tensor in tensors:
        line = f"{name} {tuple(tensor.shape)}"
        digest.update(f"{line}\n".encode())
        flat = tensor.detach().flatten()
        if len(flat) > SAMPLE:
            places = np.random.default_rng(zlib.crc32(line.encode())).integers(
                len(flat), size=SAMPLE
            )
            flat = flat[torch.from_numpy(places).to(flat.device)]
        samples.append(flat.to(torch.bfloat16))
    devices = {s.device for s in samples}
    whole = [torch.cat(samples)] if len(devices) == 1 else samples
    for sample in whole:
        digest.update(sample.cpu().view(torch.int16).numpy().tobytes())
    return MARK + digest.hexdigest()[:24]


def by_means(tokenizer: str, tensors: Tensors) -> str:
    """What folders that were written before have: three digits of a mean of each weight."""
    digest = hashlib.sha256(tokenizer.encode())
    for name, tensor in tensors:
        sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].float()
        line = f"{name} {tuple(tensor.shape)} {float(sample.abs().mean()):.2e}\n"
        digest.update(line.encode())
    return digest.hexdigest()[:16]
