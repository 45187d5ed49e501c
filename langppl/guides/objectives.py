"""What a guide is trained with, each a function of tensors.

The balance losses (`subtb`, `detailed_balance`, `trajectory_balance`, `vargrad`) take draws from
anywhere; at their minimum, 0, the guide's draws follow the reward. The others are what one would
use instead: `reverse_kl` (policy gradient on the ELBO, which is what reinforcement learning with a
KL penalty does), `rao_blackwell` (the same with less noise), `reward` (the same without the
entropy), `wake` (reweighted wake-sleep) and `likelihood` (maximum likelihood of given latents).

References:
    Malkin et al. 2022, *Trajectory balance* (arXiv 2201.13259).
    Madan et al. 2023, *Learning GFlowNets from partial episodes* (arXiv 2209.12782): SubTB(λ).
    Zhang et al. 2023, *Robust scheduling with GFlowNets* (arXiv 2302.05446): VarGrad.
    Bengio et al. 2023, *GFlowNet foundations* (arXiv 2111.09266): detailed balance.
    Deleu et al. 2022, *Bayesian structure learning with GFNs* (arXiv 2202.13903): detailed balance
    without a flow network, where every state can end.
    Williams 1992, *Simple statistical gradient-following algorithms* (REINFORCE).
    Kool et al. 2019, *Buy 4 REINFORCE samples, get a baseline for free*: leave-one-out.
    Bornschein and Bengio 2015, *Reweighted wake-sleep* (arXiv 1406.2751).
    Hu et al. 2024, *Amortizing intractable inference in LLMs* (arXiv 2310.04363): the form of
    SubTB in which every prefix that can end has the flow R(z₁..t ⊤)/q(⊤ | z₁..t).

All log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

FLOOR = 3.0
"""An impossible trajectory counts as one that is drawn e^3 times too often."""

MOST_AT_ONCE = 512
"""Most end points of which SubTB keeps all pairs for the backward pass."""

BLOCK = 256
"""End points whose pairs are looked at together beyond that."""


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


@dataclass(frozen=True)
class Actions:
    """One draw of all latents, action by action.

    Attributes:
        log_q: of each action, shape [A], nats, with gradients.
        divergence: KL of the policy from the prior at the state before each, shape [A], nats, with
            gradients; 0 where it is not known.
        sampled: there, log q − log p of the action itself, shape [A], nats; else 0.
        cost: log q − log p of each action, whether or not its divergence is known, shape [A], nats.
    """

    log_q: Tensor
    divergence: Tensor
    sampled: Tensor
    cost: Tensor


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


def trajectory_balance(
    log_reward: Tensor, log_q: Tensor, log_z: Tensor, own: Tensor | None = None
) -> Tensor:
    """Trajectory balance with a given (or learned) log Z.

    Args:
        log_reward: shape [n]; −inf marks an impossible trajectory.
        log_q: shape [n], with gradients.
        log_z: scalar, or shape [n].
        own: bool [n], the policy's own draws. The floor of these has a baseline, which is nothing
            on average and takes noise from the gradient; see `penalties`.

    Returns:
        The mean squared residual, a scalar.
    """
    gap = log_reward - log_q
    loss = (_residuals(gap, log_q, log_z) ** 2).mean()
    if own is None or not bool(own.any()):
        return loss
    possible = torch.isfinite(gap[own])
    baseline = penalties(possible) - FLOOR * (~possible)
    less = 2.0 * (baseline * log_q[own]).sum() / len(log_q)
    return loss + less - less.detach()


def log_evidence(gap: Tensor) -> Tensor:
    """The batch's estimate of log Z: the mean of the possible log R − log q, detached."""
    possible = gap[torch.isfinite(gap)].detach()
    return possible.mean() if possible.numel() else gap.new_zeros(())


def penalties(possible: Tensor) -> Tensor:
    """What each of a policy's own draws counts for being impossible, less what the others do.

    As a factor of ∇ log q it minimises FLOOR · P(impossible). Without the others' mean it would be
    the same on average, but where many draws are impossible it pushes down what they have in common
    with the possible ones, and nothing pushes it up.

    Args:
        possible: bool [n].

    Returns:
        Shape [n], in float32; of a single draw FLOOR or 0.
    """
    own = FLOOR * (~possible).float()
    return own - (own.sum() - own) / max(len(own) - 1, 1)


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
        log_z: scalar, or shape [trajectories]; the batch's own estimate by default.

    Returns:
        The weighted mean squared residual, a scalar.
    """
    if log_z is None:
        log_z = log_evidence(root_gaps(trajectories))
    losses = []
    for t, root in zip(trajectories, log_z.expand(len(trajectories)), strict=True):
        u, reached, at = _end_points(t, root)
        if len(u) > MOST_AT_ONCE:
            losses.append(_over_many_pairs(t, u - reached, at, lam))
            continue
        i, j = torch.triu_indices(len(u), len(u), 1, device=u.device)
        residual = u[i] + reached[j] - reached[i] - u[j]
        losses.append(_weighted(t, residual, lam, at[j] - at[i]))
    return torch.stack(losses).mean()


def detailed_balance(trajectories: Sequence[Trajectory], log_z: Tensor | None = None) -> Tensor:
    """Balance between neighbouring end points alone, the root with log Z the first of them.

    Args:
        trajectories: of one observation.
        log_z: scalar, or shape [trajectories]; the batch's own estimate by default.

    Returns:
        The mean squared residual, a scalar; see `subtb`.
    """
    if log_z is None:
        log_z = log_evidence(root_gaps(trajectories))
    losses = []
    for t, root in zip(trajectories, log_z.expand(len(trajectories)), strict=True):
        u, reached, _ = _end_points(t, root)
        residual = u[:-1] + reached[1:] - reached[:-1] - u[1:]
        losses.append(_weighted(t, residual, 1.0, torch.zeros_like(residual)))
    return torch.stack(losses).mean()


def _end_points(t: Trajectory, log_z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the root and every possible end point: u, log q of what leads there, position."""
    possible = torch.isfinite(t.log_reward)
    c = torch.cat([t.log_q.new_zeros(1), t.log_q.cumsum(0)])
    ends = t.ends[possible]
    u = torch.cat([log_z[None], (t.log_reward - t.log_q_end)[possible]])
    return u, torch.cat([c[:1], c[ends]]), torch.cat([ends.new_zeros(1), ends])


def _weighted(t: Trajectory, residual: Tensor, lam: float, distance: Tensor) -> Tensor:
    """Mean of squared residuals by λ^distance; an impossible last end point is pushed down."""
    if not torch.isfinite(t.log_reward[-1]):
        residual = torch.cat([residual, _floored(t)[None]])
        distance = torch.cat([distance, distance.new_zeros(1)])
    # A factor of all weights is none of the mean; without it, long strings' leave float32.
    heaviest = distance.min() if lam < 1.0 else distance.max()
    weight = lam ** (distance - heaviest).to(residual.dtype)
    return (weight * residual**2).sum() / weight.sum()


def _floored(t: Trajectory) -> Tensor:
    """The residual of an impossible last end point: FLOOR, with the gradient of its log q."""
    log_q = t.log_q.sum() + t.log_q_end[-1]
    return log_q - log_q.detach() + FLOOR


def _over_many_pairs(t: Trajectory, level: Tensor, at: Tensor, lam: float) -> Tensor:
    """`_weighted` of all pairs of end points, in memory that is linear in their number.

    The residual of a pair is the difference of their levels, so the gradient is known with the sum,
    and no pair is kept for a backward pass.

    Args:
        t: the string.
        level: of each end point u less the log q of what leads there, shape [n], with gradients.
        at: their positions, shape [n], ascending.
        lam: λ.
    """
    is_cut = not torch.isfinite(t.log_reward[-1])
    nearest = at.new_zeros(()) if is_cut else at.diff().min()
    heaviest = nearest if lam < 1.0 else at[-1] - at[0]
    known = level.detach()
    slope = torch.zeros_like(known)
    total, weights = known.new_zeros(()), known.new_zeros(())
    for first in range(0, len(known), BLOCK):
        rows = slice(first, first + BLOCK)
        gap = known[rows, None] - known
        weight = torch.ones_like(gap)
        if lam != 1.0:
            distance = (at[rows, None] - at).abs()
            weight = lam ** (distance - heaviest).to(known.dtype)
        weight.diagonal(first).zero_()  # an end point and itself are no pair
        slope[rows] = 2.0 * (weight * gap).sum(1)
        # Each pair is met from both of its ends.
        total = total + 0.5 * (weight * gap**2).sum()
        weights = weights + 0.5 * weight.sum()
    way = (slope * level).sum()
    total = total + way - way.detach()
    if is_cut:
        weight = lam ** (-heaviest).to(known.dtype)
        total, weights = total + weight * _floored(t) ** 2, weights + weight
    return total / weights


def reverse_kl(log_reward: Tensor, log_q: Tensor) -> Tensor:
    """Policy gradient on the ELBO with a leave-one-out baseline.

    Args:
        log_reward: shape [n], of draws from the policy itself; −inf marks an impossible one, which
            counts by the balance losses' floor; see `penalties`.
        log_q: shape [n], with gradients.

    Returns:
        A scalar: the mean of log q − log R over the possible draws, whose gradient is the
        policy gradient's estimate.
    """
    return _policy_gradient(log_q.detach() - log_reward, log_q)


def rao_blackwell(actions: Sequence[Actions], log_rest: Tensor) -> Tensor:
    """Policy gradient on the ELBO whose divergence from the prior is exact at every state met.

    The ELBO is E[log_rest] − E[Σ KL(q(·|state) ‖ p(·|state))]. Each state's KL is a sum over all
    actions with a gradient of its own; only what comes after an action is left to the policy
    gradient: later states' KLs and the rest of the reward, with a leave-one-out baseline for each
    position. The mean is that of `reverse_kl`; the noise is a part of its.

    The exchange of log q − log p for a KL holds over all draws, impossible ones too. `reverse_kl`
    takes the cost of the possible alone, so what the impossible ones cost, action by action, is
    taken off again, and that part keeps its noise.

    Args:
        actions: of n draws from the policy itself.
        log_rest: log R without the latents' prior, shape [n], nats; −inf marks an impossible
            draw, which counts by the balance losses' floor; see `penalties`.

    Returns:
        A scalar: the mean of log q − log R over the possible draws, as of `reverse_kl`; the
        policy gradient is in its gradient.

    References:
        Amini et al. 2025, *Better estimation of the KL divergence between language models*
        (arXiv 2504.10637).
    """
    possible = torch.isfinite(log_rest)
    n, count = len(actions), int(possible.sum())
    longest = max(len(a.log_q) for a in actions)

    def padded(rows: Sequence[Tensor]) -> Tensor:
        return torch.stack([pad(row, (0, longest - len(row))) for row in rows])

    log_q = padded([a.log_q for a in actions])
    exact = padded([a.divergence for a in actions])
    known = exact.detach()
    # An action that the prior forbids makes its draw impossible, whose cost does not count.
    sampled, cost = (
        torch.nan_to_num(padded(rows).detach(), posinf=0.0, neginf=0.0)
        for rows in ([a.sampled for a in actions], [a.cost for a in actions])
    )
    whole = cost.sum(1)
    rest = torch.where(possible, log_rest, 0.0)
    # What an action has led to: later divergences and its own sampled cost.
    later = known.flip(1).cumsum(1).flip(1) - known + sampled.flip(1).cumsum(1).flip(1)
    # For each draw, what the others' possible ones cost, and whether there are any.
    others = count - possible.long()
    costs = torch.where(possible, whole - rest, 0.0)
    level = ((costs.sum() - costs) / others.clamp(min=1))[:, None]
    # Of draw j beside draw i: what the possible cost by themselves, or is taken off again.
    beside = -torch.where(possible, rest + level, whole)
    own = later + beside.diagonal()[:, None]
    mean = (later.sum(0) - later + (beside.sum(1) - beside.diagonal())[:, None]) / max(n - 1, 1)
    is_compared = (others > 0)[:, None]
    advantage = torch.where(is_compared, own - mean, 0.0) + penalties(possible)[:, None]
    surrogate = (advantage * log_q).sum() / n
    takes_part = is_compared if n > 1 else possible[:, None]
    direct = torch.where(takes_part, exact, 0.0).sum() / n
    gradient = surrogate + direct
    return gradient - gradient.detach() + costs.sum() / max(count, 1)


def reward(log_reward: Tensor, log_q: Tensor) -> Tensor:
    """Policy gradient on the mean log R alone, which collapses onto a mode; see `reverse_kl`."""
    return _policy_gradient(-log_reward, log_q)


def _policy_gradient(cost: Tensor, log_q: Tensor) -> Tensor:
    possible = torch.isfinite(cost)
    n = int(possible.sum())
    known = torch.where(possible, cost, 0.0)
    baseline = (known.sum() - known) / max(n - 1, 1)
    advantage = torch.where(possible & (n > 1), known - baseline, 0.0) + penalties(possible)
    surrogate = (advantage * log_q).mean()
    value = known.sum() / max(n, 1)
    return surrogate - surrogate.detach() + value


def wake(log_reward: Tensor, log_q: Tensor) -> Tensor:
    """Maximum likelihood of draws weighted by R/q, self-normalised (the wake phase for q).

    Args:
        log_reward: shape [n], of draws from the policy itself; −inf marks an impossible one.
        log_q: shape [n], with gradients.

    Returns:
        A scalar; 0, without gradient, if no draw is possible.
    """
    gap = log_reward - log_q.detach()
    if not bool(torch.isfinite(gap).any()):
        return 0.0 * log_q.sum()
    return -(gap.softmax(0) * log_q).sum()


def likelihood(log_q: Tensor) -> Tensor:
    """Maximum likelihood of given latents: −mean log q, of log q of shape [n]."""
    return -log_q.mean()
