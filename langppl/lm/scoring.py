"""Scoring: log-probabilities of the actions of strings, with and without gradients.

Requests go to the transformer by one of two routes, which give the same numbers: *packed*, where
no common prefix is computed twice (`langppl.lm.packed`), or in *padded* batches
(`langppl.lm.padded`), the plain route, for models that refuse the mask that packing needs. Either
yields the logits at the positions that are asked for; what is read from them is decided here: a
float32 log-softmax over the legal tokens of each state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from langppl.lm import packed, padded
from langppl.lm.requests import ScoreReply, ScoreRequest
from langppl.lm.rules import Step

if TYPE_CHECKING:
    from langppl.lm.model import LM

Read = tuple[torch.Tensor, dict[int, np.ndarray]]
"""Logits [n, vocabulary], and for each request (by its number) the rows that it reads."""


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
        for logits, wanted in _route(lm, requests):
            members = list(wanted)
            found = read([requests[at] for at in members], [wanted[at] for at in members], logits)
            results.update(zip(members, found, strict=True))
    return [results[at] for at in range(len(requests))]


def _route(lm: LM, requests: Sequence[ScoreRequest]) -> Iterator[Read]:
    sequences = [r.prompt + r.path.tokens for r in requests]
    first = [len(r.prompt) - 1 for r in requests]
    count = [len(r.path.steps) for r in requests]
    if lm.packs is not None and max(map(len, sequences)) <= lm.packs.window:
        return packed.logits(lm, sequences, first, count)
    return padded.logits(lm, sequences, first, count)


def read(
    requests: Sequence[ScoreRequest], rows: Sequence[np.ndarray], logits: torch.Tensor
) -> list[PathLogProbs]:
    """Log-probabilities of strings' actions.

    Args:
        requests: the strings.
        rows: for each, the row of `logits` before each of its actions, shape [len(path.steps)].
        logits: shape [n, vocabulary].
    """
    # What several strings ask of one position under the same rules is computed once.
    slots: dict[tuple[int, int, float], int] = {}
    steps: dict[int, Step] = {}
    where: list[list[int]] = []
    for request, own in zip(requests, rows, strict=True):
        mine = []
        for row, step in zip(own.tolist(), request.path.steps, strict=True):
            steps[id(step)] = step
            mine.append(slots.setdefault((row, id(step), request.temperature), len(slots)))
        where.append(mine)
    device = logits.device
    never = torch.full((1,), -torch.inf, device=device)
    if not slots:
        none = never.new_zeros(0)
        return [PathLogProbs(none, none.sum(), never) for _ in requests]

    scaled = (
        logits
        if _each_once(list(slots), len(logits))
        else logits[torch.tensor([row for row, _, _ in slots], device=device)]
    )
    scaled = scaled.float()
    temperatures = [t for _, _, t in slots]
    if any(t != 1.0 for t in temperatures):
        scaled = scaled / torch.tensor(temperatures, device=device)[:, None]
    kinds = list(steps.values())
    number = {key: k for k, key in enumerate(steps)}
    which = [number[key] for _, key, _ in slots]
    illegal = ~torch.stack([s.legal_on(device) for s in kinds])
    # The logits of masked tokens are left out of the sum, never replaced: gradients stay exact.
    mask = illegal if len(kinds) == 1 else illegal[torch.tensor(which, device=device)]
    normaliser = scaled.masked_fill(mask, -torch.inf).logsumexp(-1)

    # One gather for all strings: the backward pass of each is as large as all logits.
    paths = [r.path for r in requests]
    at = [
        slot for path, mine in zip(paths, where, strict=True) for slot in mine[: len(path.tokens)]
    ]
    at_slots = torch.tensor(at, dtype=torch.long, device=device)
    targets = [t for path in paths for t in path.tokens]
    tokens = scaled[at_slots, torch.tensor(targets, dtype=torch.long, device=device)]
    tokens = (tokens - normaliser[at_slots]).split([len(path.tokens) for path in paths])

    sums: dict[tuple[int, int], int] = {}  # (slot, ids of an ending action) → place in `ends`
    sets: dict[int, torch.Tensor] = {}
    ending, canonical = [], []
    for path, mine in zip(paths, where, strict=True):
        places = []
        for slot, step in zip(mine, path.steps, strict=True):
            places.append(-1)
            if len(step.canonical):
                sets[id(step.canonical)] = step.canonical
                places[-1] = sums.setdefault((slot, id(step.canonical)), len(sums))
        canonical.append(places + [-1] * (len(path.tokens) + 1 - len(places)))
        if path.ending in ("end", "stop"):
            sets[id(path.ending_ids)] = path.ending_ids
            ending.append(sums.setdefault((mine[-1], id(path.ending_ids)), len(sums)))
        else:
            ending.append(-1)
    ends = torch.cat([_sums(scaled, normaliser, list(sums), sets), never])
    forced = normaliser.new_zeros(())
    return [
        PathLogProbs(
            tokens[k],
            forced if ending[k] < 0 else ends[ending[k]],
            ends[torch.tensor(canonical[k], device=device)],
        )
        for k in range(len(requests))
    ]


def _each_once(slots: Sequence[tuple[int, int, float]], rows: int) -> bool:
    return len(slots) == rows and all(row == k for k, (row, _, _) in enumerate(slots))


def _sums(
    scaled: torch.Tensor,
    normaliser: torch.Tensor,
    wanted: Sequence[tuple[int, int]],
    sets: dict[int, torch.Tensor],
) -> torch.Tensor:
    """Log-probabilities of sets of tokens, shape [wanted], one gather for each size of set."""
    device = scaled.device
    by_size: dict[int, list[int]] = {}
    for k, (_, key) in enumerate(wanted):
        by_size.setdefault(len(sets[key]), []).append(k)
    if not by_size:
        return normaliser.new_zeros(0)
    order: list[int] = []
    pieces = []
    for members in by_size.values():
        at = torch.tensor([wanted[k][0] for k in members], device=device)
        ids = torch.stack([sets[wanted[k][1]] for k in members]).to(device)
        pieces.append(scaled[at[:, None], ids].logsumexp(-1) - normaliser[at])
        order += members
    place = torch.empty(len(order), dtype=torch.long)
    place[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(pieces)[place.to(device)]
