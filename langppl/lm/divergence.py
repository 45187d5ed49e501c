"""How far two states of an LM are apart, action by action: KL(q‖p) over all legal actions.

A sampled log q − log p says the same on average; the sum over the vocabulary has no noise, and its
gradient none but that of the states that were met (Amini et al. 2025, *Better estimation of the KL
divergence between language models*, arXiv 2504.10637).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from langppl.lm.reading import logit_bytes
from langppl.lm.rules import Step

if TYPE_CHECKING:
    from langppl.lm.model import LM


def step_divergences(
    lm: LM, steps: Sequence[Step], own: Tensor, other: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL divergence between what two states say of the next action.

    An action is a token that goes on or an ending; tokens that end a string alike are one action.

    Args:
        lm: the LM.
        steps: the legal actions, n of them.
        own: states of q, shape [n, width] (see `LM.states`), with gradients.
        other: states of p, shape [n, width], without.
        temperature: divides the logits of both.

    Returns:
        Shape [n], nats, float32, with gradients to q's states.
    """
    most = max(1, logit_bytes(own.device) // (4 * 4 * lm.vocabulary.size))
    by_step: dict[int, list[int]] = {}
    for k, step in enumerate(steps):
        by_step.setdefault(id(step), []).append(k)
    places, pieces = [], []
    for members in by_step.values():
        step = steps[members[0]]
        endings = [step.end_ids, *step.groups.values()]
        several = [ids.to(own.device) for ids in endings if len(ids) > 1]
        legal = step.legal_on(own.device)
        for start in range(0, len(members), most):
            part = members[start : start + most]
            at = torch.tensor(part, device=own.device)

            def passed(
                q: Tensor, p: Tensor, legal: Tensor = legal, several: list[Tensor] = several
            ) -> Tensor:
                return _divergence(lm.logits_of(q), lm.logits_of(p), legal, several, temperature)

            if torch.is_grad_enabled() and own.requires_grad:
                # Logits are large: they are made again in the backward pass, not kept.
                pieces.append(checkpoint(passed, own[at], other[at], use_reentrant=False))
            else:
                pieces.append(passed(own[at], other[at]))
            places += part
    if not pieces:
        return own.new_zeros(0, dtype=torch.float32)
    order = torch.argsort(torch.tensor(places, device=own.device))
    return torch.cat(pieces)[order]


def _divergence(
    q: Tensor, p: Tensor, legal: Tensor, several: Sequence[Tensor], temperature: float
) -> Tensor:
    """The same from logits [n, vocabulary]; `several`: tokens that are one action."""
    log_q, log_p = (
        (x.float() / temperature).masked_fill(~legal, -torch.inf).log_softmax(-1) for x in (q, p)
    )
    gap = torch.where(legal, log_q - log_p, 0.0)
    found = (log_q.exp() * gap).sum(-1)
    for ids in several:
        apart = (log_q[:, ids].exp() * gap[:, ids]).sum(-1)
        whole, of_p = log_q[:, ids].logsumexp(-1), log_p[:, ids].logsumexp(-1)
        found = found - apart + whole.exp() * (whole - of_p)
    return found
