"""The balance losses on a tabular policy whose every trajectory is listed.

The tree: tokens "a" and "b", at most three actions, and two ending actions, the end of the text
and a stop. Nothing may end at the root (`min_tokens=1`), and after "b" nothing may end either.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from langppl.guides import objectives
from langppl.guides.objectives import (
    FLOOR,
    Actions,
    Trajectory,
    detailed_balance,
    likelihood,
    penalties,
    rao_blackwell,
    reverse_kl,
    reward,
    subtb,
    trajectory_balance,
    vargrad,
    wake,
)

A, B, END, STOP = range(4)
LIMIT = 3
CANNOT_END = {(), (B,)}
CANONICAL = END

State = tuple[int, ...]
Whole = tuple[State, int | None]  # tokens and the ending action, None where it was cut


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


STATES: list[State] = [s for n in range(LIMIT) for s in itertools.product((A, B), repeat=n)]
WHOLES: list[Whole] = [
    *((s, end) for s in STATES if s not in CANNOT_END for end in (END, STOP)),
    *((s, None) for s in itertools.product((A, B), repeat=LIMIT)),
]
REWARD = dict(
    zip(
        WHOLES,
        (1.5 * torch.randn(len(WHOLES), generator=torch.manual_seed(0))).double(),
        strict=True,
    )
)


def policy(logits: Tensor) -> dict[State, Tensor]:
    """log q of the four actions in each state."""
    found = {}
    for row, state in zip(logits, STATES, strict=True):
        if state in CANNOT_END:
            row = torch.where(torch.arange(4) < 2, row, -math.inf)
        found[state] = row.log_softmax(-1)
    return found


def log_q(table: dict[State, Tensor], whole: Whole) -> Tensor:
    tokens, end = whole
    terms = [table[tokens[:t]][token] for t, token in enumerate(tokens)]
    return torch.stack(terms + ([] if end is None else [table[tokens][end]])).sum()


def trajectory(table: dict[State, Tensor], whole: Whole, reward: dict[Whole, Tensor]) -> Trajectory:
    tokens, end = whole
    inner = [t for t in range(len(tokens)) if tokens[:t] not in CANNOT_END]
    at_end = table[tokens][end] if end is not None else torch.zeros((), dtype=torch.float64)
    return Trajectory(
        log_q=torch.stack([table[tokens[:t]][token] for t, token in enumerate(tokens)]),
        ends=torch.tensor([*inner, len(tokens)]),
        log_q_end=torch.stack([*(table[tokens[:t]][CANONICAL] for t in inner), at_end]),
        log_reward=torch.stack([*(reward[tokens[:t], CANONICAL] for t in inner), reward[whole]]),
    )


def all_log_q(logits: Tensor) -> Tensor:
    table = policy(logits)
    return torch.stack([log_q(table, w) for w in WHOLES])


Loss = Callable[[Tensor, Tensor, dict[Whole, Tensor]], Tensor]


def subtb_loss(logits: Tensor, log_z: Tensor, reward: dict[Whole, Tensor]) -> Tensor:
    table = policy(logits)
    return subtb([trajectory(table, w, reward) for w in WHOLES])


def subtb_half(logits: Tensor, log_z: Tensor, reward: dict[Whole, Tensor]) -> Tensor:
    table = policy(logits)
    return subtb([trajectory(table, w, reward) for w in WHOLES], lam=0.5)


def neighbours(logits: Tensor, log_z: Tensor, reward: dict[Whole, Tensor]) -> Tensor:
    table = policy(logits)
    return detailed_balance([trajectory(table, w, reward) for w in WHOLES])


def vargrad_loss(logits: Tensor, log_z: Tensor, reward: dict[Whole, Tensor]) -> Tensor:
    return vargrad(torch.stack([reward[w] for w in WHOLES]), all_log_q(logits))


def balance_loss(logits: Tensor, log_z: Tensor, reward: dict[Whole, Tensor]) -> Tensor:
    return trajectory_balance(torch.stack([reward[w] for w in WHOLES]), all_log_q(logits), log_z)


LOSSES: dict[str, Loss] = {
    "subtb": subtb_loss,
    "subtb, lambda 0.5": subtb_half,
    "detailed balance": neighbours,
    "vargrad": vargrad_loss,
    "trajectory balance": balance_loss,
}


def posterior(reward: dict[Whole, Tensor]) -> Tensor:
    return torch.stack([reward[w] for w in WHOLES]).log_softmax(0)


def posterior_logits(reward: dict[Whole, Tensor]) -> Tensor:
    """The logits whose policy is the posterior: the mass behind each action."""
    target = posterior(reward).exp()
    logits = torch.zeros(len(STATES), 4, dtype=torch.float64)
    for k, state in enumerate(STATES):
        mass = torch.zeros(4, dtype=torch.float64)
        for (tokens, end), p in zip(WHOLES, target, strict=True):
            if tokens[: len(state)] == state:
                action = tokens[len(state)] if len(tokens) > len(state) else end
                mass[action if action is not None else END] += p
        logits[k] = mass.clamp_min(1e-300).log()
    return logits


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_driven_to_zero_a_loss_gives_the_posterior(name: str, seed: int) -> None:
    start = torch.randn(len(STATES), 4, generator=torch.manual_seed(seed)).double()
    logits = start.requires_grad_()
    log_z = tensor(0.0)[0].clone().requires_grad_()
    # log Z is detached in subtb and vargrad, so the loss is not the potential of its gradient:
    # plain descent, and no line search.
    optimiser = torch.optim.Adam([logits, log_z], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.998)
    for _ in range(2000):
        optimiser.zero_grad()
        loss = LOSSES[name](logits, log_z, REWARD)
        loss.backward()
        optimiser.step()
        schedule.step()
        if float(loss.detach()) < 1e-7:
            break
    assert float(loss.detach()) < 1e-4
    found, target = all_log_q(logits).detach(), posterior(REWARD)
    assert float(found.logsumexp(0)) == pytest.approx(0.0, abs=1e-9)
    assert float((found.exp() * (found - target)).sum()) < 1e-4
    assert float((target.exp() * (target - found)).sum()) < 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_zero_at_the_posterior_and_nowhere_near(name: str) -> None:
    logits = posterior_logits(REWARD)
    log_z = torch.stack(list(REWARD.values())).logsumexp(0)
    torch.testing.assert_close(all_log_q(logits), posterior(REWARD))
    assert float(LOSSES[name](logits, log_z, REWARD)) == pytest.approx(0.0, abs=1e-20)
    for k, state in enumerate(STATES):
        for action in range(2 if state in CANNOT_END else 4):
            moved = logits.clone()
            moved[k, action] += 0.3
            assert float(LOSSES[name](moved, log_z, REWARD)) > 1e-6


@pytest.mark.parametrize("name", ["subtb", "vargrad", "trajectory balance"])
def test_an_impossible_end_point_does_not_bias(name: str) -> None:
    # "aa" cannot be: as an inner end point it is left out, as a whole string it is pushed down.
    reward = dict(REWARD)
    for end in (END, STOP):
        reward[(A, A), end] = tensor(-math.inf)[0]
    logits = posterior_logits(reward)
    log_z = torch.stack(list(reward.values())).logsumexp(0)
    possible = [w for w in WHOLES if reward[w] > -math.inf]
    table = policy(logits)
    if name == "subtb":
        loss = subtb([trajectory(table, w, reward) for w in possible])
    else:
        rewards = torch.stack([reward[w] for w in possible])
        own = torch.stack([log_q(table, w) for w in possible])
        loss = (
            vargrad(rewards, own) if name == "vargrad" else trajectory_balance(rewards, own, log_z)
        )
    assert float(loss) == pytest.approx(0.0, abs=1e-20)


# -- what one would use instead ------------------------------------------------------------------


def drawn(logits: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log rewards and log q of n draws from the policy, and which whole each is."""
    own = all_log_q(logits)
    at = torch.multinomial(own.detach().exp(), n, True, generator=torch.manual_seed(seed))
    return torch.stack(list(REWARD.values()))[at], own[at]


def expected_gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor) -> Tensor:
    """The mean over many batches of two draws: exact, as all pairs are listed."""
    leaf = logits.clone().requires_grad_()
    own, rewards = all_log_q(leaf), torch.stack(list(REWARD.values()))
    total = leaf.new_zeros(())
    chances = own.detach().exp()
    for i, j in itertools.product(range(len(WHOLES)), repeat=2):
        pair = torch.tensor([i, j])
        total = total + chances[i] * chances[j] * loss(rewards[pair], own[pair])
    (gradient,) = torch.autograd.grad(total, leaf)
    return gradient


def true_gradient(logits: Tensor, entropy: float) -> Tensor:
    """Of E[entropy · log q − log R] under the policy, summed over all strings."""
    leaf = logits.clone().requires_grad_()
    own, rewards = all_log_q(leaf), torch.stack(list(REWARD.values()))
    (gradient,) = torch.autograd.grad((own.exp() * (entropy * own - rewards)).sum(), leaf)
    return gradient


@pytest.mark.parametrize(("loss", "entropy"), [(reverse_kl, 1.0), (reward, 0.0)])
def test_policy_gradients_are_unbiased(loss: Callable[..., Tensor], entropy: float) -> None:
    logits = torch.randn(len(STATES), 4, generator=torch.manual_seed(3)).double()
    found, truth = expected_gradient(loss, logits), true_gradient(logits, entropy)
    assert float(truth.abs().max()) > 0.05
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


def test_the_floors_baseline_is_nothing_on_average_and_takes_noise() -> None:
    is_possible = torch.tensor([len(tokens) % 2 == 0 for tokens, _ in WHOLES])
    rewards = torch.stack(list(REWARD.values())).masked_fill(~is_possible, -math.inf)
    leaf = torch.randn(len(STATES), 4, generator=torch.manual_seed(3)).double().requires_grad_()
    own, log_z = all_log_q(leaf), tensor(1.0)[0]
    assert 0.3 < float(own.exp()[~is_possible].sum().detach()) < 0.9

    def balance(pair: Sequence[int], mask: Tensor | None) -> Tensor:
        return trajectory_balance(rewards[list(pair)], own[list(pair)], log_z, mask)

    def floor(pair: Sequence[int]) -> Tensor:
        return (penalties(is_possible[list(pair)]) * own[list(pair)]).mean()

    plain, _ = moments(lambda pair: balance(pair, None), leaf)
    found, _ = moments(lambda pair: balance(pair, torch.tensor([True, True])), leaf)
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)
    # Of two draws the baseline is as noisy as what it is taken from; of eight it is worth it.
    noise = {True: 0.0, False: 0.0}
    for seed in range(300):
        generator = torch.manual_seed(seed)
        at = torch.multinomial(own.detach().exp(), 8, True, generator=generator)
        for has_baseline in noise:
            factor = penalties(is_possible[at]) if has_baseline else FLOOR * ~is_possible[at]
            loss = (factor * own[at]).mean()
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            noise[has_baseline] += float((gradient**2).sum()) / 300
    found, _ = moments(floor, leaf)
    (truth,) = torch.autograd.grad(FLOOR * own.exp()[~is_possible].sum(), leaf)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-9)
    signal = float((truth**2).sum())
    assert noise[True] - signal < 0.7 * (noise[False] - signal)
    # One draw of another policy: the two of this one alone have baselines, the other's floor none.
    at = [k for k in range(len(WHOLES)) if is_possible[k]][:1]
    at += [k for k in range(len(WHOLES)) if not is_possible[k]][:2]
    values = own.detach()[at].requires_grad_()
    mask = torch.tensor([True, True, False])
    loss = trajectory_balance(rewards[at], values, log_z, mask)
    without = trajectory_balance(rewards[at], values, log_z)
    assert float(loss.detach()) == pytest.approx(float(without.detach()))
    (gradient,) = torch.autograd.grad(loss - without, values)
    assert gradient.tolist() == pytest.approx([-2 * FLOOR / 3, 0.0, 0.0])


PRIOR = torch.randn(len(STATES), 4, generator=torch.manual_seed(7)).double()


def actions_of(table: dict[State, Tensor], whole: Whole, is_sampled: int | None) -> Actions:
    """A string action by action; of one of them the divergence is taken for unknown."""
    prior = policy(PRIOR)
    tokens, end = whole
    taken = [*tokens, *([] if end is None else [end])]
    log_q, divergence, sampled, cost = [], [], [], []
    for t, action in enumerate(taken):
        q, p = table[tokens[:t]], prior[tokens[:t]]
        possible = torch.isfinite(p)
        log_q.append(q[action])
        gap = (q[action] - p[action]).detach()
        kl = (q[possible].exp() * (q[possible] - p[possible])).sum()
        divergence.append(torch.zeros_like(kl) if t == is_sampled else kl)
        sampled.append(gap if t == is_sampled else torch.zeros_like(gap))
        cost.append(gap)
    return Actions(*map(torch.stack, (log_q, divergence, sampled, cost)))


def moments(
    loss: Callable[[Sequence[int]], Tensor], leaf: Tensor, count: int = 2
) -> tuple[Tensor, float]:
    """Mean of the gradient over all batches of draws, and the sum of its variances."""
    chances = all_log_q(leaf).detach().exp()
    mean, square = torch.zeros_like(leaf), 0.0
    for batch in itertools.product(range(len(WHOLES)), repeat=count):
        (gradient,) = torch.autograd.grad(loss(batch), leaf, retain_graph=True)
        chance = float(chances[list(batch)].prod())
        mean, square = mean + chance * gradient, square + chance * float((gradient**2).sum())
    return mean, square - float((mean**2).sum())


@pytest.mark.parametrize("is_sampled", [None, 0, 1])
def test_an_exact_divergence_leaves_the_gradient_unbiased_and_less_noisy(
    is_sampled: int | None,
) -> None:
    rests = torch.stack(list(REWARD.values()))
    leaf = (0.7 * torch.randn(len(STATES), 4, generator=torch.manual_seed(3)).double()).detach()
    leaf.requires_grad_()
    own = all_log_q(leaf)
    rewards = rests + all_log_q(PRIOR)
    (truth,) = torch.autograd.grad((own.exp() * (own - rewards)).sum(), leaf, retain_graph=True)
    table = policy(leaf)
    actions = [actions_of(table, w, is_sampled) for w in WHOLES]

    def exact(pair: Sequence[int]) -> Tensor:
        return rao_blackwell([actions[k] for k in pair], rests[list(pair)])

    def sampled(pair: Sequence[int]) -> Tensor:
        return reverse_kl(rewards[list(pair)], own[list(pair)])

    assert float(truth.abs().max()) > 0.05
    found, variance = moments(exact, leaf)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
    _, usual = moments(sampled, leaf)
    assert variance < 0.9 * usual


def test_an_exact_divergence_by_hand() -> None:
    one = Actions(tensor(-1.0, -2.0), tensor(0.5, 0.25), tensor(0.0, 0.0), tensor(0.4, 0.1))
    other = Actions(tensor(-0.5), tensor(0.5), tensor(0.0), tensor(0.1))
    for a in (one, other):
        a.log_q.requires_grad_()
        a.divergence.requires_grad_()
    loss = rao_blackwell([one, other, one], tensor(-3.0, -1.0, -math.inf))
    # Of the possible ones, (0.5 + 3 + 0.1 + 1) / 2.
    assert float(loss.detach()) == pytest.approx(2.3)
    loss.backward()
    # The possible ones cost 3.5 and 1.1, each the other's level, and their mean, 2.3, is the
    # impossible one's. Beside the first, draws count 0.25 + 3 − 1.1, 1 − 1.1 and 0.25 − 0.5 before
    # its first action, and so on; each has the mean of the other two taken off: 2.325 and 2.2 in
    # the first, −2.25 in the other, −0.075 and −0.2 in the impossible one, which is the first
    # again, has the floor at each, and half of it is the baseline of the possible ones.
    assert one.log_q.grad is not None and other.log_q.grad is not None
    assert one.log_q.grad.tolist() == pytest.approx([(2.25 + FLOOR / 2) / 3, (2.0 + FLOOR / 2) / 3])
    assert other.log_q.grad.tolist() == pytest.approx([(-2.25 - FLOOR / 2) / 3])
    assert one.divergence.grad is not None
    assert one.divergence.grad.tolist() == pytest.approx([2 / 3, 2 / 3])


@pytest.mark.parametrize(("count", "is_sampled"), [(2, None), (2, 0), (2, 1), (3, None)])
def test_an_exact_divergence_beside_impossible_draws(count: int, is_sampled: int | None) -> None:
    is_possible = torch.tensor([len(tokens) != 1 for tokens, _ in WHOLES])
    rests = torch.stack(list(REWARD.values())).masked_fill(~is_possible, -math.inf)
    leaf = (0.7 * torch.randn(len(STATES), 4, generator=torch.manual_seed(3)).double()).detach()
    leaf.requires_grad_()
    own = all_log_q(leaf)
    assert 0.1 < float(own.exp()[~is_possible].sum().detach()) < 0.6
    rewards = rests + all_log_q(PRIOR)
    table = policy(leaf)
    actions = [actions_of(table, w, is_sampled) for w in WHOLES]
    found, _ = moments(
        lambda b: rao_blackwell([actions[k] for k in b], rests[list(b)]), leaf, count
    )
    usual, _ = moments(lambda b: reverse_kl(rewards[list(b)], own[list(b)]), leaf, count)
    torch.testing.assert_close(found, usual, rtol=1e-6, atol=1e-8)


def test_at_the_posterior_reverse_kl_rests_and_reward_does_not() -> None:
    logits = posterior_logits(REWARD)
    # Every advantage is 0 there: the gradient of any batch is, not its mean alone.
    rewards, own = drawn(logits.clone().requires_grad_(), 6, 0)
    evidence = torch.stack(list(REWARD.values())).logsumexp(0)
    value = reverse_kl(rewards, own)
    assert float(value.detach()) == pytest.approx(-float(evidence))
    (gradient,) = torch.autograd.grad(value, own)
    assert float(gradient.abs().max()) < 1e-12
    assert float(true_gradient(logits, 0.0).abs().max()) > 0.05


def entropy_after(loss: Callable[..., Tensor], steps: int = 400) -> float:
    logits = torch.zeros(len(STATES), 4, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for step in range(steps):
        optimiser.zero_grad()
        loss(*drawn(logits, 64, step)).backward()
        optimiser.step()
    own = all_log_q(logits).detach()
    return float(-(own.exp() * own).sum())


def test_reward_alone_collapses_and_reverse_kl_does_not() -> None:
    target = posterior(REWARD)
    truth = float(-(target.exp() * target).sum())
    assert entropy_after(reward) < 0.5 * truth
    assert entropy_after(reverse_kl) == pytest.approx(truth, rel=0.1)


def test_waking_and_likelihood_rest_at_what_they_learn_from() -> None:
    target = posterior(REWARD).exp()
    leaf = posterior_logits(REWARD).requires_grad_()
    own = all_log_q(leaf)
    (gradient,) = torch.autograd.grad((target * own).sum(), leaf)
    assert float(gradient.abs().max()) < 1e-9  # of the mean of `likelihood` over the posterior
    # With every string drawn once from a flat proposal, waking weights are the posterior's.
    rewards = torch.stack(list(REWARD.values()))
    flat = torch.zeros(len(WHOLES), dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(wake(rewards, flat), flat)
    torch.testing.assert_close(found, -target)


def test_forward_kl_rests_where_each_observation_has_its_posterior() -> None:
    # Two observations, simulated in proportion to their evidence; latents from the joint density.
    others = {w: r - 0.7 * len(w[0]) for w, r in REWARD.items()}
    joints = [torch.stack(list(rewards.values())) for rewards in (REWARD, others)]
    total = torch.stack(joints).logsumexp((0, 1))
    logits = [posterior_logits(rewards) for rewards in (REWARD, others)]

    def slope(shift: float) -> list[Tensor]:
        leaves = [(x + shift * torch.arange(4)).requires_grad_() for x in logits]
        loss = sum(
            (
                torch.exp(j - total) * torch.stack([likelihood(q[None]) for q in all_log_q(leaf)])
            ).sum()
            for j, leaf in zip(joints, leaves, strict=True)
        )
        return list(torch.autograd.grad(loss, leaves))  # type: ignore[arg-type]

    assert all(float(g.abs().max()) < 1e-9 for g in slope(0.0))
    assert all(float(g.abs().max()) > 1e-3 for g in slope(0.1))


def test_baselines_by_hand() -> None:
    log_q = tensor(-1.0, -2.0, -3.0).requires_grad_()
    rewards = tensor(0.0, 1.0, -math.inf)
    # Costs −1 and −3, whose mean is the value; the other's cost is each one's baseline; the
    # impossible one has the floor, of which each of the two has half for its baseline.
    assert float(reverse_kl(rewards, log_q).detach()) == pytest.approx(-2.0)
    half = FLOOR / 2
    (gradient,) = torch.autograd.grad(reverse_kl(rewards, log_q), log_q)
    assert gradient.tolist() == pytest.approx([(2.0 - half) / 3, (-2.0 - half) / 3, FLOOR / 3])
    (gradient,) = torch.autograd.grad(reward(rewards, log_q), log_q)
    assert gradient.tolist() == pytest.approx([(1.0 - half) / 3, (-1.0 - half) / 3, FLOOR / 3])
    # Weights e^1 and e^3 over their sum, and 0.
    share = 1.0 / (1.0 + math.exp(2.0))
    (gradient,) = torch.autograd.grad(wake(rewards, log_q), log_q)
    assert gradient.tolist() == pytest.approx([-share, share - 1.0, 0.0])
    assert float(likelihood(log_q).detach()) == pytest.approx(2.0)
    assert float(wake(tensor(-math.inf), log_q[:1]).detach()) == 0.0


def test_detailed_balance_by_hand() -> None:
    one = Trajectory(
        log_q=tensor(-1.0, -2.0),
        ends=torch.tensor([1, 2]),
        log_q_end=tensor(-0.5, -0.25),
        log_reward=tensor(-3.0, -4.0),
    )
    residuals = [-1.125 - 1.0 + 2.5, -2.5 - 2.0 + 3.75]
    want = sum(r**2 for r in residuals) / 2
    assert float(detailed_balance([one])) == pytest.approx(want)


# -- by hand -------------------------------------------------------------------------------------


def test_vargrad_by_hand() -> None:
    # log R − log q is 1 and 3, so log Z is 2 and both residuals are 1.
    log_q = tensor(-1.0, -2.0).requires_grad_()
    loss = vargrad(tensor(0.0, 1.0), log_q)
    assert float(loss.detach()) == pytest.approx(1.0)
    loss.backward()
    # d/d log q of the mean of (2 − log R + log q)², log Z held.
    assert log_q.grad is not None
    assert log_q.grad.tolist() == pytest.approx([1.0, -1.0])


def test_trajectory_balance_by_hand() -> None:
    log_z = tensor(0.5)[0].requires_grad_()
    loss = trajectory_balance(tensor(0.0, 1.0), tensor(-1.0, -2.0), log_z)
    assert float(loss.detach()) == pytest.approx(((0.5 - 1.0) ** 2 + (0.5 - 3.0) ** 2) / 2)
    loss.backward()
    assert log_z.grad is not None
    assert float(log_z.grad) == pytest.approx((0.5 - 1.0) + (0.5 - 3.0))


def test_subtb_by_hand() -> None:
    # One string of two tokens, end points after 1 and 2 tokens.
    one = Trajectory(
        log_q=tensor(-1.0, -2.0),
        ends=torch.tensor([1, 2]),
        log_q_end=tensor(-0.5, -0.25),
        log_reward=tensor(-3.0, -4.0),
    )
    # u = −2.5 and −3.75; log R − log q of the two strings: −1.5 and −0.75, so log Z = −1.125.
    log_z, u1, u2 = -1.125, -2.5, -3.75
    residuals = [(log_z - 1.0 - u1, 1), (log_z - 3.0 - u2, 2), (u1 - 2.0 - u2, 1)]
    for lam in (1.0, 0.5):
        want = sum(lam**n * r**2 for r, n in residuals) / sum(lam**n for _, n in residuals)
        assert float(subtb([one], lam)) == pytest.approx(want)


def test_the_gradient_of_subtb_by_hand() -> None:
    log_q = tensor(-1.0, -2.0).requires_grad_()
    log_q_end = tensor(-0.5, -0.25).requires_grad_()
    one = Trajectory(log_q, torch.tensor([1, 2]), log_q_end, tensor(-3.0, -4.0))
    subtb([one], 0.5).backward()
    # As above, with log Z held: residuals 0.375 and −0.375 from the root, −0.75 between the two,
    # with weights 0.5, 0.25 and 0.5 over 1.25. The first token is in the first two.
    first, second, between = (2 * w * r for w, r in ((0.4, 0.375), (0.2, -0.375), (0.4, -0.75)))
    assert log_q.grad is not None and log_q_end.grad is not None
    assert log_q.grad.tolist() == pytest.approx([first + second, second + between])
    assert log_q_end.grad.tolist() == pytest.approx([first - between, second + between])


def test_an_impossible_end_has_the_weight_of_a_pair_without_distance() -> None:
    one = Trajectory(
        log_q=tensor(-1.0, -2.0),
        ends=torch.tensor([1, 2]),
        log_q_end=tensor(-0.5, -0.25),
        log_reward=tensor(-3.0, -math.inf),
    )
    # From the root to the first end point: −1 − 1 + 2.5.
    expected = (0.5 * 0.5**2 + FLOOR**2) / 1.5
    assert float(subtb([one], 0.5, tensor(-1.0)[0])) == pytest.approx(expected)


@pytest.mark.parametrize("lam", [0.1, 10.0])
@pytest.mark.parametrize("is_possible", [True, False])
def test_subtb_of_a_long_string_stays_a_number(lam: float, is_possible: bool) -> None:
    """In float32 λ^50 is 0 or infinite."""
    last = 1.5 if is_possible else -math.inf
    log_q = torch.full((50,), -0.01).requires_grad_()
    path = Trajectory(
        log_q, torch.tensor([49, 50]), torch.zeros(2), torch.tensor([-math.inf, last])
    )
    loss = subtb([path], lam, torch.tensor(0.0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert log_q.grad is not None and bool(torch.isfinite(log_q.grad).all())
    if is_possible:
        assert float(loss.detach()) == pytest.approx((0.0 - 0.5 - 1.5) ** 2, rel=1e-5)
        two = Trajectory(log_q, path.ends, torch.zeros(2), torch.tensor([1.0, 1.5]))
        # Pairs: root and 49, root and 50, 49 and 50, of which one or two neighbours count.
        squares = [(-0.49 - 1.0) ** 2, (-0.5 - 1.5) ** 2, (1.0 - 0.01 - 1.5) ** 2]
        weights = [lam**k for k in (49, 50, 1)]
        expected = sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights)
        found = float(subtb([two], lam, torch.tensor(0.0)).detach())
        assert found == pytest.approx(expected, rel=1e-4)
    else:
        assert float(loss.detach()) == pytest.approx(FLOOR**2)


@pytest.mark.parametrize("lam", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("is_possible", [True, False])
@pytest.mark.parametrize("least", [0, 1])
def test_many_end_points_are_balanced_as_few_are(
    monkeypatch: pytest.MonkeyPatch, lam: float, is_possible: bool, least: int
) -> None:
    """In blocks of 3, whose borders 11 end points (the root among them) do not meet."""
    shape = torch.Generator().manual_seed(7)
    numbers = [torch.randn(size, generator=shape, dtype=torch.float64) for size in (13, 10, 10)]
    log_q, log_q_end, log_reward = (x.requires_grad_() for x in numbers)
    # The first is the empty string's, at the root itself, where that may end.
    ends = torch.tensor([0 if least == 0 else 2, 3, 4, 5, 6, 8, 9, 11, 12, 13])
    possible = torch.ones(10, dtype=torch.bool)
    possible[4] = False
    possible[-1] = is_possible

    def found() -> tuple[float, list[Tensor]]:
        reward = log_reward.where(possible, -math.inf)
        trajectory = Trajectory(log_q, ends, log_q_end, reward)
        loss = subtb([trajectory], lam, torch.tensor(0.3, dtype=torch.float64))
        return float(loss.detach()), list(torch.autograd.grad(loss, (log_q, log_q_end, log_reward)))

    at_once, expected = found()
    monkeypatch.setattr(objectives, "MOST_AT_ONCE", 1)
    monkeypatch.setattr(objectives, "BLOCK", 3)
    in_blocks, slopes = found()
    assert in_blocks == pytest.approx(at_once, rel=1e-12)
    for mine, theirs in zip(slopes, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)
        assert mine.abs().max() > 0.01


def test_pairs_of_many_end_points_are_not_kept() -> None:
    count = 3000
    log_q = torch.full((count,), -0.1, requires_grad=True)
    saved = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal saved
        saved += x.numel()
        return x

    still = torch.zeros(count)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        subtb([Trajectory(log_q, torch.arange(1, count + 1), still, still)])
    assert saved < 50 * count


@pytest.mark.parametrize("loss", [subtb, detailed_balance])
def test_each_trajectory_may_have_its_own_log_z(loss: Callable[..., Tensor]) -> None:
    one = Trajectory(
        log_q=tensor(-1.0, -2.0),
        ends=torch.tensor([1, 2]),
        log_q_end=tensor(-0.5, -0.25),
        log_reward=tensor(-3.0, -4.0),
    )
    log_z = tensor(0.5, -2.0).requires_grad_()
    apart = [loss([one], log_z=z) for z in tensor(0.5, -2.0)]
    found = loss([one, one], log_z=log_z)
    assert float(found.detach()) == pytest.approx(float(apart[0] + apart[1]) / 2)
    assert float(apart[0]) != pytest.approx(float(apart[1]))
    (gradient,) = torch.autograd.grad(found, log_z)
    assert bool((gradient.abs() > 0.1).all())


def test_without_inner_end_points_subtb_is_trajectory_balance() -> None:
    log_q, log_reward = tensor(-1.0, -2.0), tensor(0.0, 1.0)
    paths = [
        Trajectory(q[None], torch.tensor([1]), tensor(0.0), r[None])
        for q, r in zip(log_q, log_reward, strict=True)
    ]
    assert float(subtb(paths)) == pytest.approx(float(vargrad(log_reward, log_q)))


@pytest.mark.parametrize("loss", ["vargrad", "balance", "subtb"])
def test_impossible_trajectories_push_down_only(loss: str) -> None:
    log_q = tensor(-1.0, -2.0).requires_grad_()
    rewards = tensor(-math.inf, -2.0)
    if loss == "vargrad":
        value = vargrad(rewards, log_q)
    elif loss == "balance":
        value = trajectory_balance(rewards, log_q, tensor(0.0)[0])
    else:
        paths = [
            Trajectory(log_q[k : k + 1], torch.tensor([1]), tensor(0.0), rewards[k : k + 1])
            for k in range(2)
        ]
        value = subtb(paths)
    assert math.isfinite(float(value.detach()))
    value.backward()
    assert log_q.grad is not None
    # The possible one is balanced (log R − log q = 0 = log Z); the other goes down by FLOOR.
    assert log_q.grad.tolist() == pytest.approx([FLOOR, 0.0])


def test_a_batch_of_impossible_trajectories_is_finite() -> None:
    log_q = tensor(-1.0, -2.0).requires_grad_()
    vargrad(tensor(-math.inf, -math.inf), log_q).backward()
    assert log_q.grad is not None
    assert log_q.grad.tolist() == pytest.approx([FLOOR, FLOOR])
