"""The loss of one observation's draws, by objective: from scores to `langppl.guides.objectives`."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch

from langppl.guides import objectives
from langppl.guides.heads import Heads
from langppl.guides.objectives import Actions
from langppl.guides.observations import WHOLE, Turn
from langppl.guides.settings import OF_WHOLE_DRAWS, Settings
from langppl.guides.trajectories import Draw, Found, plus, site_trajectory, trajectory

EXACT = 2.0**13
"""Log rewards beyond this (nats) are taken as differences: float32 has a thousandth of it."""


def loss_of(
    turn: Turn,
    scores: Sequence[Found],
    log_qs: Sequence[torch.Tensor],
    settings: Settings,
    heads: Heads,
    power: float,
    actions: Sequence[Actions] | None,
) -> torch.Tensor:
    """The loss of one observation's draws, a scalar with gradients.

    Args:
        turn: the draws; the simulated ones are not of this loss.
        scores: what the policy said of each.
        log_qs: log q of each one's parts, shape [parts].
        settings: the objective, and λ.
        heads: the learned flows.
        power: of the reward.
        actions: the draws action by action, for `rao_blackwell`.
    """
    objective, draws = settings.objective, turn.own
    total = torch.stack([q.sum() for q in log_qs])
    if objective == "mle":
        return objectives.likelihood(total)
    whole = [plus(d.log_prior, d.log_rest, power) for d in draws]
    offset = _offset(whole)
    less = [w - offset for w in whole]
    if objective == "rao_blackwell":
        assert actions is not None
        # The actions have the prior of what they make.
        made = [sum(p.site.log_prob or 0.0 for p in d.parts) for d in draws]
        rest = [-math.inf if w == -math.inf else w - m for w, m in zip(less, made, strict=True)]
        return objectives.rao_blackwell(actions, total.new_tensor(rest)) - offset
    reward = total.new_tensor(less)
    if objective in OF_WHOLE_DRAWS:
        loss = OF_WHOLE_DRAWS[objective](reward, total)
        return loss if objective == "rws" else loss - offset
    if draws[0].ends:
        return _over_prefixes(turn, scores, log_qs, settings, power, offset)
    if objective in ("subtb", "db"):
        return _over_sites(turn, scores, log_qs, settings, heads, power)
    learned = heads if objective == "tb" else None
    if learned is not None:  # the flow is of the reward itself
        offset, reward = 0.0, total.new_tensor(whole)
    # Draws that were made ahead are those of an older policy.
    is_own = [
        settings.draw_ahead == 1 and k < turn.fresh and not (d.is_tempered or d.is_given)
        for k, d in enumerate(draws)
    ]
    drawn = torch.tensor(is_own, device=total.device)
    counts = {len(d.pieces) for d in draws}
    if len(counts) > 1 or counts == {0}:
        roots: list[list[int]] = [[0]] * len(draws)
        if learned is not None:
            groups = turn.observation.program.graph.independent()
            roots = [_roots(groups, d) for d in draws]
        return _balance(turn, WHOLE, reward, total, scores, roots, learned, power, drawn, offset)
    losses = []
    for k in range(counts.pop()):
        pieces = [d.pieces[k] for d in draws]
        own = torch.stack([q[p.parts].sum() for q, p in zip(log_qs, pieces, strict=True)])
        of_piece = [plus(p.log_prior, p.log_rest, power) for p in pieces]
        offset = 0.0 if learned is not None else _offset(of_piece)
        reward = own.new_tensor([w - offset for w in of_piece])
        first = [[p.parts[0]] for p in pieces]
        losses.append(_balance(turn, k, reward, own, scores, first, learned, power, drawn, offset))
    return torch.stack(losses).sum()


def _offset(log_rewards: Sequence[float]) -> float:
    """What may be taken off log rewards (nats) that differ by little beside what they are.

    Every balance that estimates log Z, and every baseline, is the same without it.
    """
    known = next((w for w in log_rewards if w > -math.inf), 0.0)
    return known if abs(known) > EXACT else 0.0


def _roots(groups: Sequence[Collection[str]], draw: Draw) -> list[int]:
    """The first part of each independent piece, at which a flow is the log Z of that piece."""
    names = [p.site.name for p in draw.parts]
    found = [next((k for k, n in enumerate(names) if n in g), None) for g in groups]
    return [k for k in found if k is not None] or [0]


def _balance(
    turn: Turn,
    piece: int,
    reward: torch.Tensor,
    own: torch.Tensor,
    scores: Sequence[Found],
    first: Sequence[Sequence[int]],
    learned: Heads | None,
    power: float,
    drawn: torch.Tensor,
    offset: float,
) -> torch.Tensor:
    """Trajectory balance of one independent piece, or of the whole.

    Args:
        turn: the draws.
        piece: its number, or `WHOLE`.
        reward: log R of it in each draw less the offset, shape [n].
        own: log q, shape [n], with gradients.
        scores: what the policy said of each draw.
        first: the piece's first part in each; of the whole the first of every piece.
        learned: heads of which one gives log Z; None for the batch's own estimate.
        power: of the reward.
        drawn: bool [n], which of them the policy drew as it is.
        offset: nats.
    """
    if learned is not None:
        log_z = torch.stack(
            [
                torch.stack([_flow(learned, f, k) for k in own_first]).sum()
                for f, own_first in zip(scores, first, strict=True)
            ]
        )
    else:
        gap = reward - own
        log_z = turn.observation.estimate(
            piece, gap[: turn.fresh], gap, power, turn.learns_from_given, offset
        )
    return objectives.trajectory_balance(reward, own, log_z, drawn)


def _over_prefixes(
    turn: Turn,
    scores: Sequence[Found],
    log_qs: Sequence[torch.Tensor],
    settings: Settings,
    power: float,
    offset: float,
) -> torch.Tensor:
    paths = [
        trajectory(d, f[0][0], power, q[1:].sum(), offset)
        for d, f, q in zip(turn.own, scores, log_qs, strict=True)
    ]
    log_z = turn.observation.estimate(
        WHOLE,
        objectives.root_gaps(paths[: turn.fresh] or paths),
        objectives.root_gaps(paths),
        power,
        turn.learns_from_given,
        offset,
    )
    return _between_end_points(paths, log_z, settings)


def _over_sites(
    turn: Turn,
    scores: Sequence[Found],
    log_qs: Sequence[torch.Tensor],
    settings: Settings,
    heads: Heads,
    power: float,
) -> torch.Tensor:
    paths, roots = [], []
    for d, found, own in zip(turn.own, scores, log_qs, strict=True):
        flows = torch.stack([_flow(heads, found, k) for k in range(len(d.parts))])
        roots.append(flows[0])
        paths.append(site_trajectory(d, own, flows[1:], power))
    log_z = torch.stack(roots)
    return _between_end_points(paths, log_z, settings)


def _between_end_points(
    paths: Sequence[objectives.Trajectory], log_z: torch.Tensor, settings: Settings
) -> torch.Tensor:
    if settings.objective == "db":
        return objectives.detailed_balance(paths, log_z)
    return objectives.subtb(paths, settings.lam, log_z)


def _flow(heads: Heads, found: Found, part: int) -> torch.Tensor:
    """Log flow (nats) of the program's state before a part, a scalar with gradients."""
    state = found[part][0].state
    assert state is not None
    return heads.flow(state)
