"""From an LM's states to log-probabilities of actions, without ever holding all logits.

Logits over a vocabulary are by far the largest tensor of a language model, and of each row only a
few numbers are wanted: log-probabilities of some tokens and of some sets of tokens, under the rules
of that position. So the output layer is applied to some rows at a time. For gradients not even that
is kept: with p the distribution over the legal tokens and W the output layer's weight,

    ∂ log p(token) / ∂ state = (W[token] − Σᵥ p(v) W[v]) / temperature,

and the sum, the expected output embedding, takes as much room as the state itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from langppl.lm.products import mixed

if TYPE_CHECKING:
    from langppl.lm.model import LM

LOGIT_BYTES = 32 * 2**20
"""Most bytes of logits (float32) at once on the CPU, unless a single row is larger."""

ACCELERATED = 16
"""How many times as many there are at once on an accelerator, where each piece has its price."""


def logit_bytes(device: torch.device) -> int:
    """Most bytes of logits (float32) at once, unless a single row is larger."""
    return LOGIT_BYTES * (1 if device.type == "cpu" else ACCELERATED)


@dataclass(frozen=True)
class Wanted:
    """What to read from states. A *slot* is one row of states under one step of a string's rules.

    Attributes:
        rows: row of each slot, shape [slots].
        legal: legal tokens of each kind of step, bool [kinds, vocabulary].
        kinds: kind of each slot, shape [slots].
        temperatures: of each slot, shape [slots].
        token_slots: slot of each token, shape [tokens].
        tokens: the tokens, shape [tokens].
        sets: sets of tokens, each with the slots that it is wanted at.
    """

    rows: Tensor
    legal: Tensor
    kinds: Tensor
    temperatures: Tensor
    token_slots: Tensor
    tokens: Tensor
    sets: Sequence[tuple[Tensor, Tensor]]

    def parts(self, most: int) -> Iterator[tuple[Wanted, Tensor, Tensor, list[Tensor]]]:
        """Pieces of at most so many slots, in the order of their rows.

        Yields:
            A piece (its rows are the whole's), its slots, its tokens' places among the whole's,
            and for each set the places of its slots.
        """
        order = torch.argsort(self.rows, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        ranks = [rank[self.token_slots], *(rank[slots] for _, slots in self.sets)]
        sorted_ranks, places = zip(*(r.sort() for r in ranks), strict=True)
        for first in range(0, len(order), most):
            last = min(first + most, len(order))
            slots = order[first:last]
            bounds = torch.tensor([first, last], device=order.device)
            own: list[Tensor] = []
            for found, place in zip(sorted_ranks, places, strict=True):
                low, high = torch.searchsorted(found, bounds).tolist()
                own.append(place[low:high])
            yield (
                Wanted(
                    self.rows[slots],
                    self.legal,
                    self.kinds[slots],
                    self.temperatures[slots],
                    rank[self.token_slots[own[0]]] - first,
                    self.tokens[own[0]],
                    [
                        (ids, rank[at[p]] - first)
                        for (ids, at), p in zip(self.sets, own[1:], strict=True)
                    ],
                ),
                slots,
                own[0],
                own[1:],
            )


def log_probs(lm: LM, states: Tensor, wanted: Wanted) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities over the legal tokens, nats, float32; with gradients to the states.

    Args:
        lm: the LM.
        states: shape [n, width], see `LM.states`.
        wanted: what to read.

    Returns:
        Of the tokens, shape [tokens], and of each set at its slots, shape [its slots].
    """
    if torch.is_grad_enabled() and states.requires_grad:
        head = lm.model.get_output_embeddings()
        if not lm.splits_head or any(p.requires_grad for p in head.parameters()):
            return plain(lm.logits_of(states), wanted)
        apply: Any = _Read.apply
        found, *sets = apply(states, lm, wanted)
        return found, sets
    return _read(lm, states, wanted, None)


def plain(logits: Tensor, wanted: Wanted) -> tuple[Tensor, list[Tensor]]:
    """The same from all logits at once, [n, vocabulary], by differentiable operations."""
    scaled = logits[wanted.rows].float() / wanted.temperatures[:, None]
    # The logits of masked tokens are left out of the sum, never replaced: gradients stay exact.
    normaliser = scaled.masked_fill(~wanted.legal[wanted.kinds], -torch.inf).logsumexp(-1)
    found = scaled[wanted.token_slots, wanted.tokens] - normaliser[wanted.token_slots]
    sets = [
        scaled[slots[:, None], ids].logsumexp(-1) - normaliser[slots] for ids, slots in wanted.sets
    ]
    return found, sets


@dataclass
class _Expected:
    """Expected output embeddings, float32: of each slot, and of each set at its slots."""

    slots: Tensor
    sets: list[Tensor]


def _read(
    lm: LM, states: Tensor, wanted: Wanted, expected: _Expected | None
) -> tuple[Tensor, list[Tensor]]:
    """Reads piece by piece, and fills in the expectations if there are any to fill."""
    found = torch.empty(len(wanted.tokens), dtype=torch.float32, device=states.device)
    sets = [
        torch.empty(len(slots), dtype=torch.float32, device=states.device)
        for _, slots in wanted.sets
    ]
    illegal = ~wanted.legal
    tempered = bool((wanted.temperatures != 1.0).any())
    weight = lm.model.get_output_embeddings().weight if expected is not None else None
    most = max(1, logit_bytes(states.device) // (4 * wanted.legal.shape[1]))
    for part, slots, places, set_places in wanted.parts(most):
        rows, back = torch.unique_consecutive(part.rows, return_inverse=True)
        logits = lm.logits_of(states[rows]).float()
        if len(rows) < len(slots):
            logits = logits[back]
        if tempered:
            logits = logits / part.temperatures[:, None]
        found[places] = logits[part.token_slots, part.tokens]
        for k, ((ids, at), place) in enumerate(zip(part.sets, set_places, strict=True)):
            members = logits[at[:, None], ids]
            sets[k][place] = members.logsumexp(-1)
            if expected is not None and weight is not None:
                expected.sets[k][place] = mixed(members.softmax(-1), weight[ids])
        logits.masked_fill_(illegal if len(illegal) == 1 else illegal[part.kinds], -torch.inf)
        top = logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        chances = logits.sub_(top).exp_()
        total = chances.sum(-1)
        normaliser = total.log() + top[:, 0]
        found[places] -= normaliser[part.token_slots]
        for k, ((_, at), place) in enumerate(zip(part.sets, set_places, strict=True)):
            sets[k][place] -= normaliser[at]
        if expected is not None and weight is not None:
            expected.slots[slots] = mixed(chances, weight) / total[:, None]
    return found, sets


class _Read(torch.autograd.Function):
    """`_read` with gradients to the states."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, lm: LM, wanted: Wanted) -> tuple[Tensor, ...]:
        width = states.shape[1]
        options: dict[str, Any] = {"dtype": torch.float32, "device": states.device}
        expected = _Expected(
            torch.empty(len(wanted.rows), width, **options),
            [torch.empty(len(slots), width, **options) for _, slots in wanted.sets],
        )
        found, sets = _read(lm, states, wanted, expected)
        ctx.wanted, ctx.expected, ctx.like = wanted, expected, (states.shape, states.dtype)
        ctx.weight = lm.model.get_output_embeddings().weight
        return (found, *sets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted: Wanted = ctx.wanted
        expected: _Expected = ctx.expected
        of_tokens, *of_sets = gradients
        slots = torch.zeros_like(expected.slots)
        sums = slots.new_zeros(len(slots))
        # Weights may be of float64 too.
        weighted = of_tokens[:, None] * ctx.weight[wanted.tokens]
        slots.index_add_(0, wanted.token_slots, weighted.to(slots.dtype))
        sums.index_add_(0, wanted.token_slots, of_tokens)
        for (_, at), own, mean in zip(wanted.sets, of_sets, expected.sets, strict=True):
            slots.index_add_(0, at, own[:, None] * mean)
            sums.index_add_(0, at, own)
        slots -= sums[:, None] * expected.slots
        slots /= wanted.temperatures[:, None]
        shape, dtype = ctx.like
        found = torch.zeros(shape, dtype=slots.dtype, device=slots.device)
        found.index_add_(0, wanted.rows, slots)
        return found.to(dtype), None, None
