"""Scoring: log-probabilities of the actions of strings, in padded batches.

This is the plain route, kept as the oracle for faster ones: one row for each distinct token
sequence (a sequence that begins another shares its row), padded on the right, one forward pass a
chunk, a float32 log-softmax over the legal tokens of each state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from langppl.lm.requests import ScoreReply, ScoreRequest
from langppl.lm.rules import Step

if TYPE_CHECKING:
    from langppl.lm.model import LM

LOGIT_ROWS = 1024
"""Most positions whose logits are in memory at once, padding included."""

LEAST_SHARED = 8
"""Fewest common first tokens that are worth a pass of their own."""


@dataclass(frozen=True)
class PathLogProbs:
    """Log-probabilities of the actions of one string, as tensors that carry gradients.

    Attributes:
        tokens: shape [T], nats; of each token that goes on.
        ending: scalar, nats; of the ending action, 0 where it is forced or open.
        canonical: shape [T + 1], nats; of the canonical ending action before each token and at
            the end, −inf where no string may end.
    """

    tokens: torch.Tensor
    ending: torch.Tensor
    canonical: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """Log-probability of the whole string, a scalar."""
        return self.tokens.sum() + self.ending


def score(requests: Sequence[ScoreRequest]) -> list[ScoreReply]:
    """Scores strings without gradients.

    Args:
        requests: strings of one LM under one adapter.

    Returns:
        One reply for each request, in their order.
    """
    with torch.no_grad():
        found = score_with_gradients(requests)
    replies = []
    for p in found:
        tokens, ending, canonical = (
            t.detach().double().cpu().numpy() for t in (p.tokens, p.ending, p.canonical)
        )
        replies.append(ScoreReply(tokens, float(ending), canonical))
    return replies


def score_with_gradients(requests: Sequence[ScoreRequest]) -> list[PathLogProbs]:
    """Scores strings, with gradients to the adapter's weights where torch records them.

    Args:
        requests: strings of one LM under one adapter.

    Returns:
        One result for each request, in their order; float32.
    """
    if not requests:
        return []
    lm, adapter = requests[0].lm, requests[0].adapter
    results: dict[int, PathLogProbs] = {}
    with lm.adapter(adapter):
        for rows, members in _chunks(lm, requests):
            logits, offset = _forward(lm, rows)
            for at, row in members:
                results[at] = _read(requests[at], logits[row], offset)
    return [results[at] for at in range(len(requests))]


Sequence_ = tuple[int, ...]


def _chunks(
    lm: LM, requests: Sequence[ScoreRequest]
) -> list[tuple[list[tuple[Sequence_, int, int]], list[tuple[int, int]]]]:
    """Rows to run together, and the requests read from each.

    A row is (ids, first position needed, one past the last); a member is (request, row).
    """
    sequences = [r.prompt + r.path.tokens for r in requests]
    order = sorted(range(len(requests)), key=lambda at: sequences[at])
    rows: list[tuple[Sequence_, int, int]] = []
    owners: list[list[int]] = []
    for at in reversed(order):
        ids, request = sequences[at], requests[at]
        first, last = len(request.prompt) - 1, len(ids)
        if rows and rows[-1][0][: len(ids)] == ids:
            longer, low, high = rows[-1]
            rows[-1] = (longer, min(low, first), max(high, last))
            owners[-1].append(at)
        else:
            rows.append((ids, first, last))
            owners.append([at])

    by_length = sorted(range(len(rows)), key=lambda k: len(rows[k][0]))
    chunks = []
    batch: list[int] = []

    def fits(k: int) -> bool:
        together = [rows[j] for j in [*batch, k]]
        longest = max(len(ids) for ids, _, _ in together)
        kept = max(last for _, _, last in together) - min(first for _, first, _ in together)
        return len(together) * longest <= lm.token_budget and len(together) * kept <= LOGIT_ROWS

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


def _forward(lm: LM, rows: list[tuple[Sequence_, int, int]]) -> tuple[torch.Tensor, int]:
    """Logits [rows, kept, vocabulary] of a padded batch, and the position of the first kept."""
    first = min(first for _, first, _ in rows)
    last = max(last for _, _, last in rows)
    shared = _shared_prefix([ids for ids, _, _ in rows], first)
    longest = max(len(ids) for ids, _, _ in rows) - shared
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for k, (sequence, _, _) in enumerate(rows):
        own = sequence[shared:]
        ids[k, : len(own)] = torch.tensor(own)
        mask[k, : len(own)] = 1
    keep = torch.arange(first - shared, last - shared)
    return lm.forward(ids, mask, keep, rows[0][0][:shared]), first


def _shared_prefix(rows: list[Sequence_], most: int) -> int:
    """How many first tokens the rows share, at most `most`; 0 if sharing would not pay."""
    if len(rows) < 2:
        return 0
    low, high = min(rows), max(rows)
    shared = 0
    while shared < min(most, len(low), len(high)) and low[shared] == high[shared]:
        shared += 1
    return shared if shared >= LEAST_SHARED else 0


def _read(request: ScoreRequest, logits: torch.Tensor, offset: int) -> PathLogProbs:
    """Log-probabilities of a string's actions from the logits of its row."""
    path = request.path
    first = len(request.prompt) - 1 - offset
    rows = logits[first : first + len(path.steps)].float() / request.temperature
    device = logits.device
    length = len(path.tokens)
    never = torch.tensor(-torch.inf, device=device)
    if not path.steps:
        return PathLogProbs(rows.new_zeros(0), rows.new_zeros(()), never[None])

    states: dict[int, Step] = {id(s): s for s in path.steps}
    slot = {key: k for k, key in enumerate(states)}
    legal = torch.stack([s.legal_on(device) for s in states.values()])
    which = torch.tensor([slot[id(s)] for s in path.steps], device=device)
    # The logits of masked tokens are left out of the sum, never replaced: gradients stay exact.
    normaliser = rows.masked_fill(~legal[which], -torch.inf).logsumexp(-1)
    targets = torch.tensor(path.tokens, dtype=torch.long, device=device)
    tokens = rows[torch.arange(length, device=device), targets] - normaliser[:length]

    ending = rows.new_zeros(())
    if path.ending in ("end", "stop"):
        ids = path.ending_ids.to(device)
        ending = rows[length, ids].logsumexp(-1) - normaliser[length]
    canonical = [
        rows[t, step.canonical.to(device)].logsumexp(-1) - normaliser[t]
        if len(step.canonical)
        else never
        for t, step in enumerate(path.steps)
    ]
    canonical += [never] * (length + 1 - len(canonical))
    return PathLogProbs(tokens, ending, torch.stack(canonical))
