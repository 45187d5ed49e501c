"""A draw of one of many shares from one uniform number, without running sums over all of them."""

from __future__ import annotations

import torch

SUMMED = 256
"""Shares of a block: running sums are taken of blocks, then within a single one."""

ROWS = 16
"""Rows whose blocks are summed at once on the CPU."""


def by_inverse_cdf(shares: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token at which the running sum of shares first exceeds a uniform part of it all.

    Sums are in double, so that a draw does not depend on how many rows are summed at once. Running
    sums over a whole vocabulary take several times as long as all else that is done with it.

    Args:
        shares: at least 0, shape [rows, vocabulary], float32.
        uniforms: in [0, 1), shape [rows, 1], float64.

    Returns:
        Shape [rows, 1]; a token whose share is above 0, if the row has any.
    """
    size = shares.shape[1]
    whole = size - size % SUMMED
    # A sum in double first copies: on the CPU a few rows at a time, into memory that is used again.
    few = ROWS if shares.device.type == "cpu" else len(shares)
    parts = shares[:, :whole].unflatten(1, (-1, SUMMED)).split(few)
    sums = torch.cat([part.sum(-1, dtype=torch.float64) for part in parts])
    if whole < size:
        sums = torch.cat([sums, shares[:, whole:].sum(-1, True, dtype=torch.float64)], 1)
    block, rest = _first_above(sums, uniforms * sums.sum(-1, True))
    at = block * SUMMED + torch.arange(SUMMED, device=shares.device)
    inner = shares.gather(1, at.clamp(max=size - 1)).double().masked_fill_(at >= size, 0.0)
    place, _ = _first_above(inner, rest)
    return (block * SUMMED + place).clamp_(max=size - 1)


def _first_above(parts: torch.Tensor, below: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where running sums first exceed a number, and what of it is left there; each [rows, 1]."""
    running = parts.cumsum(-1)
    # Sums in another order may differ in their last digits, and nothing lies beyond the last.
    last = torch.nextafter(running[:, -1:], running.new_zeros(()))
    below = torch.minimum(below, last)
    place = torch.searchsorted(running, below, right=True).clamp_(max=parts.shape[1] - 1)
    before = running.gather(1, place) - parts.gather(1, place)
    return place, (below - before).clamp_(min=0.0)
