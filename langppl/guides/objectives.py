"""Balance losses: at their minimum, 0, the guide's draws follow the reward.

References:
    Malkin et al. 2022, *Trajectory balance* (arXiv 2201.13259).
    Madan et al. 2023, *Learning GFlowNets from partial episodes* (arXiv 2209.12782): SubTB(λ).
    Zhang et al. 2023, *Robust scheduling with GFlowNets* (arXiv 2302.05446): VarGrad.
    Hu et al. 2024, *Amortizing intractable inference in LLMs* (arXiv 2310.04363): the form of
    SubTB in which every prefix that can end has the flow R(z₁..t ⊤)/q(⊤ | z₁..t).

All log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 3.0
"""An impossible trajectory counts as one that is drawn e^3 times too often."""


@dataclass(frozen=True)
class Trajectory:
    """One string with the prefixes at which it could have ended.

    Attributes:
        log_q: of each token that goes on, shape [T].
        ends: positions of the end points, shape [m], ascending; the last is where it really ended.
        log_q_end: of the ending action at each, shape [m]; the canonical one before the last, the
            one that it really took at the last.
        log_reward: at each, shape [m]; −inf where that string is impossible.
    """

    log_q: Tensor
    ends: Tensor
    log_q_end: Tensor
    log_reward: Tensor


def vargrad(log_reward: Tensor, log_q: Tensor) -> Tensor:
    """Trajectory balance with the batch's own estimate of log Z: Var(log R − log q).

    Args:
        log_reward: shape [n], at least 2; −inf marks an impossible trajectory.
        log_q: shape [n], with gradients.

    Returns:
        The mean squared residual, a scalar.
    """
    gap = log_reward - log_q
    return (_residuals(gap, log_q, log_evidence(gap)) ** 2).mean()


def trajectory_balance(log_reward: Tensor, log_q: Tensor, log_z: Tensor) -> Tensor:
    """Trajectory balance with a given (or learned) log Z.

    Args:
        log_reward: shape [n]; −inf marks an impossible trajectory.
        log_q: shape [n], with gradients.
        log_z: scalar.
    """
    return (_residuals(log_reward - log_q, log_q, log_z) ** 2).mean()


def log_evidence(gap: Tensor) -> Tensor:
    """The batch's estimate of log Z: the mean of the possible log R − log q, detached."""
    possible = gap[torch.isfinite(gap)].detach()
    return possible.mean() if possible.numel() else gap.new_zeros(())


def _residuals(gap: Tensor, log_q: Tensor, log_z: Tensor) -> Tensor:
    # For an impossible trajectory the residual is FLOOR, and its gradient that of log q: on-policy
    # this minimises FLOOR · P(impossible).
    floored = log_q - log_q.detach() + FLOOR
    return torch.where(torch.isfinite(gap), log_z - gap, floored)


def root_gaps(trajectories: Sequence[Trajectory]) -> Tensor:
    """Log R − log q of every end point, seen from the root: what SubTB estimates log Z from.

    Args:
        trajectories: of one observation.

    Returns:
        Shape [end points], nats; −inf where the string is impossible.
    """
    gaps = []
    for t in trajectories:
        reached = torch.cat([t.log_q.new_zeros(1), t.log_q.cumsum(0)])[t.ends]
        gaps.append(t.log_reward - t.log_q_end - reached)
    return torch.cat(gaps)


def subtb(
    trajectories: Sequence[Trajectory], lam: float = 1.0, log_z: Tensor | None = None
) -> Tensor:
    """Sub-trajectory balance over all pairs of end points, the root with log Z among them.

    With u_t = log R(z₁..t ⊤) − log q(⊤ | z₁..t), the residual from i to j is
    u_i + Σ_{t=i}^{j−1} log q(z_{t+1} | z₁..t) − u_j, weighted λ^(j−i). The root's u is log Z,
    so the loss has the posterior as its only zero also where the empty string
    cannot end. Prefixes that cannot end, or whose string is impossible, are no end points; an
    impossible last end point is pushed down alone.

    Args:
        trajectories: of one observation.
        lam: λ, above 0.
        log_z: scalar; the batch's own estimate by default.

    Returns:
        The weighted mean squared residual, a scalar.
    """
    if log_z is None:
        log_z = log_evidence(root_gaps(trajectories))
    losses = []
    for t in trajectories:
        c = torch.cat([t.log_q.new_zeros(1), t.log_q.cumsum(0)])
        possible = torch.isfinite(t.log_reward)
        ends = t.ends[possible]
        u = torch.cat([log_z[None], (t.log_reward - t.log_q_end)[possible]])
        reached = torch.cat([c[:1], c[ends]])
        at = torch.cat([ends.new_zeros(1), ends])
        i, j = torch.triu_indices(len(u), len(u), 1, device=u.device)
        residual = u[i] + reached[j] - reached[i] - u[j]
        weight = lam ** (at[j] - at[i]).to(u.dtype)
        total, norm = (weight * residual**2).sum(), weight.sum()
        if not possible[-1]:
            log_q = c[-1] + t.log_q_end[-1]
            total = total + (log_q - log_q.detach() + FLOOR) ** 2
            norm = norm + 1
        losses.append(total / norm)
    return torch.stack(losses).mean()
