"""Training on programs whose executions need not meet a latent of the guide's."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch

import langppl as lp
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)


def maybe(share: float = 0.5, cost: float = 2.0) -> None:
    """A string in a share of the executions; those without one have a log weight of −cost."""
    k = lp.sample("k", dist.Bernoulli(share))
    if k:
        lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
    else:
        lp.factor("without", -cost)


def guide_of(seed: int = 1, **options: Any) -> lp.GFlowNetGuide:
    """Untrained it draws from the prior, which is the posterior of the string."""
    return lp.GFlowNetGuide(LM, rank=2, seed=seed, context=lambda info: info.prompt, **options)


@pytest.mark.parametrize(
    "objective", ["auto", "subtb", "tb", "reverse_kl", "rao_blackwell", "rws", "forward_kl"]
)
def test_executions_without_a_latent_are_left_out(objective: str) -> None:
    model = lp.compile(maybe, 0.5, 0.0) if objective == "forward_kl" else lp.compile(maybe)
    if objective == "forward_kl":

        def plain() -> None:
            if lp.sample("k", dist.Bernoulli(0.5)):
                lp.sample("z", lp.LMString(LM, "a", max_tokens=2))

        model = lp.compile(plain)
    guide = guide_of(objective=objective).fit(model, steps=3, batch=8, progress=False)
    assert guide.history.rows == 3 and guide.learned == {"z"}
    assert all(map(math.isfinite, guide.history["loss"]))


def test_they_count_in_the_bound_as_what_they_are() -> None:
    options: dict[str, Any] = {"objective": "vargrad", "learning_rate": 1e-12, "progress": False}
    options |= {"tempered_share": 0.0, "replay_share": 0.0, "schedule": lp.RewardSchedule(1.0)}
    guide = guide_of()
    guide.fit(
        maybe,
        [(0.5,)],
        steps=4,
        batch=8,
        validation=[(0.5,)],
        validate_every=2,
        validation_samples=16,
        **options,
    )
    # Log R − log q is 0 with a string and −2 without one, at no residual between strings.
    assert guide.history["loss"] == pytest.approx([0.0] * 4, abs=1e-8)
    without = [-4.0 * elbo for elbo in guide.history["elbo"]]
    assert without == pytest.approx([round(n) for n in without], abs=1e-4)
    assert min(without) > 0.0 and max(without) < 8.0
    (checked,) = {-8.0 * v for v in guide.history["val_elbo"] if not math.isnan(v)}
    assert checked == pytest.approx(round(checked), abs=1e-4) and 0.0 < checked < 16.0


def test_a_step_without_a_latent_changes_nothing() -> None:
    guide = guide_of()
    guide.fit(maybe, [(0.5,)], steps=12, batch=2, objective="reverse_kl", progress=False)
    figures = zip(*(guide.history[f] for f in ("elbo", "loss", "grad")), strict=True)
    empty = [row for row in figures if row[0] == -2.0]
    assert 0 < len(empty) < 8 and set(empty) == {(-2.0, 0.0, 0.0)}


def test_a_program_that_is_known_to_have_none_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"step 0, no execution meets .* covers: .* are k, and it"):
        guide_of().fit(lambda: lp.sample("k", dist.Poisson(0.5)), steps=1, progress=False)


def test_only_the_first_draws_of_a_program_are_asked_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = lp.compile(maybe)
    # As a program whose latent `compile` did not meet.
    monkeypatch.setattr(lp.Program, "latents", ("k",))
    guide = guide_of(seed=2).fit(own, steps=12, batch=2, objective="reverse_kl", progress=False)
    assert guide.history["elbo"].count(-2.0) > 0


def test_given_latents_without_one_are_left_out() -> None:
    rows = [{"k": torch.tensor(0.0)}, {"k": torch.tensor(1.0), "z": "a"}]
    for objective in ("mle", "vargrad"):
        guide = guide_of()
        guide.fit(maybe, [()], given=rows, objective=objective, steps=2, batch=4, progress=False)
        assert guide.history.rows == 2
    guide = guide_of().fit(maybe, [()], given=rows[:1], steps=1, batch=8, progress=False)
    assert guide.history.rows == 1
    with pytest.raises(ValueError, match="none of the 1 given draws has a latent that this guide"):
        guide_of(objective="mle").fit(maybe, [()], given=rows[:1], steps=1, progress=False)
