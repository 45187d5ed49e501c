"""How far two states of an LM are apart, action by action: KL(q‖p) over all legal actions.

A sampled log q − log p says the same on average; the sum over the vocabulary has no noise, and its
gradient none but that of the states that were met (Amini et al. 2025, *Better estimation of the KL
divergence between language models*, arXiv 2504.10637).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from langppl.lm.products import mixed
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

    Raises:
        ValueError: if an adapter is on the LM's head: q and p are read by one.
    """
    if getattr(lm.model.get_output_embeddings(), "scaling", None):
        raise ValueError(
            f"an adapter of {lm!r} is on its head, and the exact divergence reads both states by "
            "one head; leave the head out of target_modules, or train by another objective than "
            "rao_blackwell"
        )
    most = max(1, logit_bytes(own.device) // (4 * 4 * lm.vocabulary.size))
    by_step: dict[int, list[int]] = {}
    for k, step in enumerate(steps):
        by_step.setdefault(id(step), []).append(k)
    places, pieces = [], []
    for members in by_step.values():
        step = steps[members[0]]
        passed = functools.partial(
            _of_states, lm, step.legal_on(own.device), _endings(step, own.device), temperature
        )
        for start in range(0, len(members), most):
            part = members[start : start + most]
            at = torch.tensor(part, device=own.device)
            pieces.append(passed(own[at], other[at]))
            places += part
    if not pieces:
        return own.new_zeros(0, dtype=torch.float32)
    order = torch.argsort(torch.tensor(places, device=own.device))
    return torch.cat(pieces)[order]


@dataclass(frozen=True)
class _Endings:
    """Tokens that end a string like others: their ids, and the action that each is of, [tokens]."""

    ids: Tensor
    action: Tensor
    actions: int

    def whole(self, log_probs: Tensor) -> Tensor:
        """Of each token [n, vocabulary], the log-probability of its action [n, tokens]."""
        own = log_probs[:, self.ids]
        at = self.action.expand_as(own)
        top = own.new_full((len(own), self.actions), -torch.inf).scatter_reduce(1, at, own, "amax")
        total = torch.zeros_like(top).scatter_add(1, at, (own - top.gather(1, at)).exp())
        return (top + total.log()).gather(1, at)


def _endings(step: Step, device: torch.device) -> _Endings | None:
    several = [ids for ids in (step.end_ids, *step.groups.values()) if len(ids) > 1]
    if not several:
        return None
    counts = torch.tensor([len(ids) for ids in several])
    action = torch.arange(len(several)).repeat_interleave(counts)
    return _Endings(torch.cat(several).to(device), action.to(device), len(several))


def _of_states(
    lm: LM, legal: Tensor, endings: _Endings | None, temperature: float, own: Tensor, other: Tensor
) -> Tensor:
    with_gradients = torch.is_grad_enabled() and own.requires_grad
    head = lm.model.get_output_embeddings()
    if with_gradients and (not lm.splits_head or any(p.requires_grad for p in head.parameters())):

        def passed(q: Tensor, p: Tensor) -> Tensor:
            log_q = _log_probs(lm.logits_of(q), legal, temperature)
            gap = _gap(log_q.detach(), lm.logits_of(p), legal, endings, temperature)
            return (log_q.exp() * gap).sum(-1)

        # Logits are large: they are made again in the backward pass, not kept.
        found: Tensor = checkpoint(passed, own, other, use_reentrant=False)
        return found
    with torch.no_grad():
        log_q = _log_probs(lm.logits_of(own), legal, temperature)
        gap = _gap(log_q, lm.logits_of(other), legal, endings, temperature)
        chances = log_q.exp_()
        kl = (chances * gap).sum(-1)
        if not with_gradients:
            return kl
        # Of a logit: q (gap − KL), as the chances' derivatives add up to nothing. Of a state: that
        # many output embeddings, which takes as much room as the state itself.
        chances *= gap.sub_(kl[:, None]).div_(temperature)
        slope = mixed(chances, head.weight)
    along = (own.float() * slope).sum(-1)
    kls: Tensor = kl + (along - along.detach())
    return kls


def _log_probs(logits: Tensor, legal: Tensor, temperature: float) -> Tensor:
    return (logits.float() / temperature).masked_fill_(~legal, -torch.inf).log_softmax(-1)


def _gap(
    log_q: Tensor, of_p: Tensor, legal: Tensor, endings: _Endings | None, temperature: float
) -> Tensor:
    """Log q − log p of the action that each token is of, without gradients; 0 where illegal."""
    with torch.no_grad():
        log_p = _log_probs(of_p, legal, temperature)
        whole = None if endings is None else endings.whole(log_q) - endings.whole(log_p)
        gap = log_p.neg_().add_(log_q).masked_fill_(~legal, 0.0)
        if endings is not None and whole is not None:
            gap[:, endings.ids] = whole
        return gap
