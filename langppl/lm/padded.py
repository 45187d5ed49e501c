"""The plain route to states: batches padded on the right.

Kept as the oracle for the packed route, and for models that refuse its mask: one row for each
distinct token sequence (a sequence that begins another shares its row), one forward pass a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from langppl.lm.trie import LEAST_STEM, Ids, shared

if TYPE_CHECKING:
    from langppl.lm.model import LM

LOGIT_ROWS = 1024
"""Most positions whose logits are in memory at once, where the head is not split off."""

_Row = tuple[Ids, int, int]
"""Ids, the first position needed, one past the last."""


def states(
    lm: LM, sequences: Sequence[Ids], first: Sequence[int], count: Sequence[int]
) -> Iterator[tuple[torch.Tensor, dict[int, NDArray[Any]]]]:
    """States at `count` positions of each sequence, from `first` on; see `packed.states`."""
    for rows, members in _chunks(lm, sequences, first):
        found, offset = _forward(lm, rows)
        kept = found.shape[1]
        yield (
            found.flatten(0, 1),
            {
                at: row * kept + np.arange(first[at] - offset, first[at] - offset + count[at])
                for at, row in members
            },
        )


def _chunks(
    lm: LM, sequences: Sequence[Ids], first: Sequence[int]
) -> list[tuple[list[_Row], list[tuple[int, int]]]]:
    """Rows to run together, and the sequences (number, row) read from them."""
    rows: list[_Row] = []
    owners: list[list[int]] = []
    for at in sorted(range(len(sequences)), key=lambda at: sequences[at], reverse=True):
        ids = sequences[at]
        if rows and rows[-1][0][: len(ids)] == ids:
            longer, low, high = rows[-1]
            rows[-1] = (longer, min(low, first[at]), max(high, len(ids)))
            owners[-1].append(at)
        else:
            rows.append((ids, first[at], len(ids)))
            owners.append([at])

    by_length = sorted(range(len(rows)), key=lambda k: len(rows[k][0]))
    chunks = []
    batch: list[int] = []

    def fits(k: int) -> bool:
        together = [rows[j] for j in [*batch, k]]
        longest = max(len(ids) for ids, _, _ in together)
        kept = max(last for _, _, last in together) - min(first for _, first, _ in together)
        fits = len(together) * longest <= lm.token_budget
        return fits and (lm.splits_head or len(together) * kept <= LOGIT_ROWS)

    def close() -> None:
        members = [(at, row) for row, k in enumerate(batch) for at in owners[k]]
        chunks.append(([rows[k] for k in batch], members))

    for k in by_length:
        if batch and not fits(k):
            close()
            batch = []
        batch.append(k)
    close()
    return chunks


def _forward(lm: LM, rows: list[_Row]) -> tuple[torch.Tensor, int]:
    """States [rows, kept, width] of a padded batch, and the position of the first kept."""
    first = min(first for _, first, _ in rows)
    last = max(last for _, _, last in rows)
    stem = _stem([ids for ids, _, _ in rows], first)
    longest = max(len(ids) for ids, _, _ in rows) - stem
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for k, (sequence, _, _) in enumerate(rows):
        own = sequence[stem:]
        ids[k, : len(own)] = torch.tensor(own)
        mask[k, : len(own)] = 1
    keep = torch.arange(first - stem, last - stem)
    return lm.padded_states(ids, mask, keep, rows[0][0][:stem]), first


def _stem(rows: list[Ids], most: int) -> int:
    """How many first tokens the rows share, at most `most`; 0 if sharing would not pay."""
    if len(rows) < 2:
        return 0
    common = min(most, shared(min(rows), max(rows)))
    return common if common >= LEAST_STEM else 0
