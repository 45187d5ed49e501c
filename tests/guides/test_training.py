"""The training loop: what a step takes, from where, when it is held to others and when it ends."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from test_checkpoints import cut_off
from torch.utils.data import Dataset

import langppl as lp
from langppl.guides import drawing, gflownet, training
from langppl.guides.averaging import Mean
from langppl.guides.context import context_ids
from langppl.guides.heads import HEADS_FILE
from langppl.guides.losses import loss_of
from langppl.guides.objectives import FLOOR
from langppl.guides.observations import WHOLE, Observation, Turn
from langppl.guides.replay import ReplayBuffer
from langppl.guides.settings import Settings
from langppl.guides.training import Trainer
from langppl.guides.trajectories import (
    Batch,
    Draw,
    actions_of,
    from_records,
    log_q,
    make_draws,
    policy_scores,
    site_trajectory,
    to_record,
)
from langppl.guides.validation import Validation, of_gaps
from langppl.guides.workers import Workers
from langppl.lm import LM
from langppl.lm.requests import ScoreReply, perform
from langppl.lm.scoring import PathLogProbs
from langppl.lm.seeds import generator
from langppl.program.execution import Execution, given
from langppl.testing import check_guide, enumerate_strings, tiny_lm

ENDINGS = ("aab.", "...")


def make_lm(seed: int = 1) -> LM:
    return tiny_lm("ab.", seed=seed, merged=["ab", "b."], sharpness=0.25)


def story(lm: LM, ending: str = "aab.") -> None:
    middle = lp.sample("middle", lp.LMString(lm, "ab", stop=".", max_tokens=3))
    lp.sample("ending", lp.LMString(lm, f"ab{middle}"), obs=ending)


def beginning(lm: LM, ending: str = "aab.") -> None:
    first = lp.sample("first", lp.LMString(lm, "b", stop=".", max_tokens=2))
    lp.sample("ending", lp.LMString(lm, f"b{first}"), obs=ending)


def chain(lm: LM) -> None:
    one = lp.sample("one", lp.LMString(lm, "a", max_tokens=2))
    two = lp.sample("two", lp.LMString(lm, f"b{one}", stop=".", max_tokens=2))
    lp.sample("seen", lp.LMString(lm, f"{one}{two}"), obs="bb")


def rows_of(lm: LM, endings: Sequence[str] = ENDINGS) -> list[tuple[Any, ...]]:
    return [(lm, ending) for ending in endings]


def weights_of(guide: lp.GFlowNetGuide) -> dict[str, torch.Tensor]:
    """The adapter's weights and the heads', copied."""
    named = guide.lm.model.named_parameters()
    found = {n.replace(guide.adapter, ""): p for n, p in named if f".{guide.adapter}." in n}
    found |= dict(guide.heads.named_parameters())
    return {n: p.detach().clone() for n, p in found.items()}


def equal(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def divergences(program: lp.Program, guide: lp.GFlowNetGuide) -> tuple[float, float]:
    """KL(q‖p) and KL(p‖q) over all token sequences of the one latent."""
    truth = lp.infer(program, method="exact", progress=False)
    log_p = np.asarray(truth.log_weights) - truth.log_evidence
    (name,) = program.latents
    fn = program.sites[name].fn
    context = context_ids(program, name, fn, Execution(), guide.context, guide.lm)
    requests = [fn.request(s[name], prompt=context, adapter=guide.adapter) for s in truth.samples]
    replies = perform([r for r in requests if r is not None])
    own = np.array([r.log_prob for r in replies if isinstance(r, ScoreReply)])
    gap = own - log_p
    return float((np.exp(own) * gap).sum()), float(-(np.exp(log_p) * gap).sum())


def all_divergences(
    guide: lp.GFlowNetGuide, endings: Sequence[str] = ENDINGS
) -> np.ndarray[Any, Any]:
    """Shape [observations, 2]."""
    return np.array([divergences(lp.compile(story, *r), guide) for r in rows_of(guide.lm, endings)])


DEFAULTS = {
    name: p.default
    for name, p in inspect.signature(lp.GFlowNetGuide.fit).parameters.items()
    if name in {f.name for f in fields(Settings)}
}


def trainer_of(
    guide: lp.GFlowNetGuide,
    model: Any,
    rows: Sequence[tuple[Any, ...]],
    weights: np.ndarray[Any, Any] | None = None,
    **changes: Any,
) -> Trainer:
    plain = {"schedule": lp.RewardSchedule(start=1.0), "objective": "vargrad", "clip": math.inf}
    settings = Settings(**{**DEFAULTS, "observations": 1, **plain, **changes})
    data = [Observation(model, row, ReplayBuffer(settings.replay_size)) for row in rows]
    return Trainer(guide, data, weights, settings, Workers(), [])


# -- what is asked for -----------------------------------------------------------------------------


def test_every_setting_reaches_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    def trainer(guide: Any, rows: Any, weights: Any, settings: Settings, *rest: Any) -> Trainer:
        raise Reached(settings)

    monkeypatch.setattr(gflownet, "Trainer", trainer)
    asked = dict(
        **{"steps": 7, "batch": 9, "observations": 2, "objective": "tb"},
        **{"learning_rate": 0.01, "head_rate": 3.0, "betas": (0.5, 0.6), "warmup": 4, "clip": 2.0},
        **{"lam": 0.7, "schedule": lp.RewardSchedule(start=0.3), "tempered_share": 0.11},
        **{"sampling_temperature": (1.1, 1.3), "replay_share": 0.12, "replay_size": 13},
        **{"replay_distance": 0.14, "draw_ahead": 3, "every": 5, "given_share": 0.15},
        **{"simulated_share": 0.16, "lengths": {"ending": 6}, "validate_every": 8},
        **{"validation_samples": 10, "patience": 11, "keep_best": False, "average": 0.17},
        **{"accumulate": 12, "checkpoint_every": 14},
    )
    assert asked.keys() == {f.name for f in fields(Settings)}
    assert all(asked[name] != DEFAULTS[name] for name in asked)
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2)
    with pytest.raises(Reached) as reached:
        guide.fit(story, rows_of(lm), validation=rows_of(lm), **asked)
    (settings,) = reached.value.args
    assert {name: getattr(settings, name) for name in asked} == asked


@pytest.mark.parametrize("head_rate", [0.5, 20.0])
def test_the_heads_learn_at_a_rate_of_their_own(head_rate: float) -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2)
    trainer = trainer_of(guide, story, rows_of(lm), objective="tb", head_rate=head_rate, steps=1)
    trainer.step(0)
    rates = {bool(g.get("head")): g["lr"] for g in trainer.optimiser.param_groups}
    assert rates[True] == pytest.approx(head_rate * rates[False])


# -- which rows a step takes ---------------------------------------------------------------------


def row_of(trainer: Trainer, slot: int, step: int) -> int:
    """The row that a slot takes, from nothing but the seed and the step."""
    pool, seed = trainer.pools[slot], trainer.guide.seed
    if trainer.weights is not None:
        rng = generator((seed, "observation", step))
        order = rng.permutation(len(trainer.weights))
        edges = trainer.weights[order].cumsum() / trainer.weights.sum()
        point = (rng.random() + slot) / len(trainer.pools)
        chosen = int(np.searchsorted(edges, point, side="right"))
        return int(order[min(chosen, len(order) - 1)])
    if len(pool) == 1:
        return pool[0]
    turn, at = divmod(step, len(pool))
    return int(generator((seed, "order", turn, slot)).permutation(pool)[at])


@pytest.mark.parametrize("rows", [11, 4, 12])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_rows_are_taken_by_the_seed_and_the_step_alone(
    rows: int, is_weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, seed=5)
    weights = np.arange(1.0, rows + 1.0) if is_weighted else None
    trainer = trainer_of(guide, story, [(lm,)] * rows, weights, observations=4)
    made = Counter[Any]()

    def noting(key: tuple[int | str, ...]) -> np.random.Generator:
        made[key] += 1
        return generator(key)

    monkeypatch.setattr(training, "generator", noting)
    steps = range(3, 20)  # a training that is gone on with does not begin at a turn's beginning
    taken = [[trainer.pick(slot, step) for slot in range(4)] for step in steps]
    assert taken == [[row_of(trainer, slot, step) for slot in range(4)] for step in steps]
    assert set(made.values()) <= {1}
    # An order for each step, or for each slot and turn.
    turns = {(j, t // len(p)) for j, p in enumerate(trainer.pools) for t in steps if len(p) > 1}
    assert len(made) == (len(steps) if is_weighted else len(turns))
    # Whatever was asked for before.
    assert [trainer.pick(2, 5), trainer.pick(1, 19), trainer.pick(2, 5)] == [
        row_of(trainer, 2, 5),
        row_of(trainer, 1, 19),
        row_of(trainer, 2, 5),
    ]


# -- several observations ------------------------------------------------------------------------


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in trainer.all_named().items()}
    return {n: g.clone() for n, g in found.items() if g is not None}


@pytest.mark.parametrize(
    ("objective", "share"),
    [("auto", 0.0), ("vargrad", 0.0), ("tb", 0.0), ("reverse_kl", 0.0), ("rao_blackwell", 0.25)],
)
def test_a_step_descends_the_mean_of_its_observations_losses(
    objective: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, seed=1)
    options: dict[str, Any] = {"batch": 8, "objective": objective, "simulated_share": share}
    both = trainer_of(guide, story, rows_of(lm), observations=2, **options)
    kept: list[list[Turn]] = []
    plain = both.drawing.turns
    monkeypatch.setattr(both.drawing, "turns", lambda *a: kept.append(plain(*a)) or kept[-1])
    monkeypatch.setattr(both.optimiser, "step", lambda: None)
    figures = both.step(0)
    found = gradients(both)
    ((one, two),) = kept
    pairs = round(8 * share)
    assert [(len(t.own), len(t.simulated)) for t in (one, two)] == [(8 - pairs, pairs)] * 2

    singles, losses = [], []
    for turn in (one, two):
        alone = trainer_of(guide, story, [rows_of(lm)[0]], **options)
        alone.optimiser.zero_grad()
        (reported,) = alone._descend([turn], 0, 1.0)
        losses.append(reported["loss"])
        singles.append(gradients(alone))
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert singles[0].keys() == found.keys()
    size = max(float(g.abs().max()) for g in found.values())
    for n, g in found.items():
        mean = (singles[0][n] + singles[1][n]) / 2
        torch.testing.assert_close(g, mean, atol=1e-5 * size, rtol=1e-3)
    assert any(not torch.allclose(singles[0][n], singles[1][n], rtol=0.1) for n in found)


def test_accumulated_gradients_are_the_same() -> None:
    found = []
    for accumulate in (1, 2, 3):
        lm = make_lm()
        guide = lp.GFlowNetGuide(lm, rank=2, seed=1)
        guide.fit(
            story,
            rows_of(lm, ("aab.", "...", "bb.")),
            steps=3,
            batch=6,
            observations=3,
            accumulate=accumulate,
            progress=False,
        )
        found.append(weights_of(guide))
    untrained = weights_of(lp.GFlowNetGuide(make_lm(), rank=2, seed=1))
    for other in found[1:]:
        for n, p in found[0].items():
            torch.testing.assert_close(other[n], p, atol=1e-5, rtol=1e-3)
    assert max(float((found[0][n] - p).abs().max()) for n, p in untrained.items()) > 1e-4


@pytest.mark.parametrize("objective", ["tb", "subtb"])
def test_heads_begin_alike_however_a_step_is_spread(objective: str) -> None:
    losses, centres, biases = [], [], []
    for accumulate in (1, 2, 4):
        lm = make_lm()
        guide = lp.GFlowNetGuide(lm, rank=2, objective=objective, seed=1)
        model = story if objective == "tb" else ending_of_two
        rows = rows_of(lm, ("aab.", "...", "bb.", "a"))
        options: dict[str, Any] = {"observations": 4, "accumulate": accumulate, "batch": 6}
        guide.fit(model, rows, steps=3, replay_share=0.0, progress=False, **options)
        losses.append(guide.history["loss"])
        centres.append(guide.heads.centre)
        last: Any = guide.heads.made["flow"][-1]  # type: ignore[index]
        biases.append(float(last.bias.detach()))
    for k in (1, 2):
        assert losses[k] == pytest.approx(losses[0], rel=1e-3)
        torch.testing.assert_close(centres[k], centres[0], atol=1e-5, rtol=1e-4)
        assert biases[k] == pytest.approx(biases[0], rel=1e-3)


def ending_of_two(lm: LM, ending: str) -> None:
    one = lp.sample("one", lp.LMString(lm, "a", max_tokens=2))
    two = lp.sample("two", lp.LMString(lm, f"b{one}", stop=".", max_tokens=2))
    lp.sample("seen", lp.LMString(lm, f"{one}{two}"), obs=ending)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_step_of_one_row_shows_heads_how_rows_differ(count: int) -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, objective="tb", seed=1)
    endings = ["".join(e) for e in itertools.product("ab.", repeat=3)][:count]
    options: dict[str, Any] = {"observations": 1, "batch": 4, "progress": False}
    guide.fit(story, rows_of(lm, endings), steps=1, **options)
    assert bool(guide.heads.is_centred)
    assert bool((guide.heads.spread != 1.0).all()) == (count > 1)


def test_four_observations_are_taken_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[set[str]] = []
    plain = drawing.Drawing.turns

    def turns(self: Any, chosen: Any, number: int) -> Any:
        taken.append({o.args[1] for _, o in chosen})
        return plain(self, chosen, number)

    monkeypatch.setattr(drawing.Drawing, "turns", turns)
    lm = make_lm()
    for count, expected in ((6, 4), (3, 3)):
        taken.clear()
        rows = rows_of(lm, ("aab.", "...", "bb.", "a.", "b.", "."))[:count]
        lp.GFlowNetGuide(lm, rank=2).fit(story, rows, steps=2, batch=2, progress=False)
        assert [len(t) for t in taken] == [expected] * 2


def test_every_observation_of_a_slot_is_taken_once_a_round() -> None:
    lm = make_lm()
    trainer = trainer_of(
        lp.GFlowNetGuide(lm, rank=2, seed=4), story, rows_of(lm) * 4, observations=2
    )
    orders = set()
    for slot, pool in enumerate(({0, 2, 4, 6}, {1, 3, 5, 7})):
        picked = [trainer.pick(slot, step) for step in range(40)]
        rounds = [tuple(picked[k : k + 4]) for k in range(0, 40, 4)]
        assert all(set(r) == pool for r in rounds)
        assert len(set(rounds)) > 3
        orders |= {tuple(k // 2 for k in r) for r in rounds[:3]}
    assert len(orders) > 3
    again = trainer_of(lp.GFlowNetGuide(lm, rank=2, seed=4), story, rows_of(lm) * 4, observations=2)
    assert [again.pick(0, step) for step in range(8)] == [
        trainer.pick(0, step) for step in range(8)
    ]


def test_weights_say_how_often_a_program_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, seed=0)
    seen: list[np.ndarray[Any, Any]] = []
    plain = Trainer.__init__

    def kept(self: Any, guide: Any, observations: Any, weights: Any, *rest: Any) -> None:
        seen.append(weights)
        plain(self, guide, observations, weights, *rest)

    monkeypatch.setattr(Trainer, "__init__", kept)
    pairs = [(story, rows_of(lm)), (beginning, rows_of(lm, ("a.",)))]
    guide.fit(pairs, weights=[1.0, 3.0], observations=1, steps=1, batch=2, progress=False)
    assert seen[0].tolist() == [0.5, 0.5, 3.0]
    trainer = trainer_of(guide, story, rows_of(lm) + rows_of(lm)[:1], weights=seen[0])
    steps = 4000
    counts = Counter(trainer.pick(0, step) for step in range(steps))
    for k, share in enumerate((0.125, 0.125, 0.75)):
        error = math.sqrt(share * (1.0 - share) / steps)
        assert abs(counts[k] / steps - share) < 4 * error


class Endings(Dataset[tuple[Any, ...]]):
    """Without `__iter__`, and without an end to `__getitem__`."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 2

    def __getitem__(self, at: int) -> tuple[Any, ...]:
        self.asked.append(at)
        return self.lm, ENDINGS[at % 2]


def test_data_may_be_a_torch_dataset() -> None:
    options: dict[str, Any] = {"steps": 2, "batch": 4, "progress": False}
    lm, other = make_lm(), make_lm()
    data = Endings(lm)
    one = lp.GFlowNetGuide(lm, rank=2).fit(story, data, **options)
    two = lp.GFlowNetGuide(other, rank=2).fit(story, rows_of(other), **options)
    assert sorted(data.asked) == [0, 1]
    assert one.history == two.history and equal(weights_of(one), weights_of(two))


def test_two_programs_share_a_guide() -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=4, seed=0)
    programs = [lp.compile(story, lm, "..."), lp.compile(beginning, lm, "aab.")]
    before = np.array([divergences(p, guide) for p in programs])
    guide.fit(
        [(story, [(lm, "...")]), (beginning, [(lm, "aab.")])],
        steps=40,
        batch=16,
        learning_rate=3e-3,
        progress=False,
    )
    after = np.array([divergences(p, guide) for p in programs])
    assert guide.learned == {"middle", "first"}
    assert (after[:, 1] < 0.4 * before[:, 1]).all(), (before, after)


def test_what_pairs_refuse() -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2)
    pair = (story, rows_of(lm))
    with pytest.raises(TypeError, match="has its data already; give none"):
        guide.fit([pair], rows_of(lm))
    with pytest.raises(ValueError, match=r"at least one \(model, data\) pair"):
        guide.fit([])
    with pytest.raises(TypeError, match=r"each program must be a \(model, data\) pair or a Prog"):
        guide.fit([story])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="a compiled Program has its arguments already"):
        guide.fit(lp.compile(story, lm), rows_of(lm))
    with pytest.raises(ValueError, match="there are 1 programs, and 2 weights"):
        guide.fit([pair], weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="weights must be above 0"):
        guide.fit([pair], weights=[0.0])


# -- validation ----------------------------------------------------------------------------------


def test_figures_of_gaps_by_hand() -> None:
    never = -math.inf
    found = of_gaps(np.array([-1.0, -3.0, never, never]), np.array([-1.0, -2.0, -6.0, never]))
    # The mean of −1 and −3, and half of the draws are possible.
    assert found.elbo == pytest.approx(-2.0 + math.log(0.5))
    assert found.variance == pytest.approx(((-1 + 3) ** 2 + (-2 + 3) ** 2 + (-6 + 3) ** 2) / 2)
    weights = [math.exp(-1.0), math.exp(-3.0)]
    assert found.ess == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / 4)
    assert found.impossible == 0.5
    none = of_gaps(np.array([never]), np.array([never]))
    assert none.elbo == never and math.isnan(none.variance) and none.impossible == 1.0
    mean = Validation.mean([found, Validation(-1.0, math.nan, 0.5, 0.0)])
    assert mean.elbo == pytest.approx((found.elbo - 1.0) / 2)
    assert mean.variance == pytest.approx(found.variance)
    assert mean.impossible == 0.25


def test_validation_comes_every_so_many_steps() -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, context=lambda info: info.prompt)
    guide.fit(
        story,
        rows_of(lm)[:1],
        steps=5,
        batch=4,
        learning_rate=1e-12,
        validation=rows_of(lm)[1:],
        validate_every=2,
        validation_samples=400,
        progress=False,
    )
    for name in ("val_elbo", "val_variance", "val_ess", "val_impossible"):
        assert [math.isnan(v) for v in guide.history[name]] == [True, False, True, False, False]
    # An untrained guide with the site's own prompt is the prior.
    program = lp.compile(story, *rows_of(lm)[1])
    exact = lp.infer(program, method="exact", progress=False)
    chance = np.exp([r["middle"] for r in _site_terms(exact)])
    terms = np.array([r["ending"] for r in _site_terms(exact)])
    elbo = float((chance * terms).sum())
    error = math.sqrt(float((chance * (terms - elbo) ** 2).sum()) / 400)
    assert abs(guide.history["val_elbo"][1] - elbo) < 4 * error and error < 0.2
    assert guide.history["val_elbo"][1] == pytest.approx(guide.history["val_elbo"][3], abs=1e-3)
    assert guide.history["val_impossible"][1] == 0.0


def _site_terms(posterior: lp.Posterior) -> list[dict[str, float]]:
    logs = posterior.site_log_probs
    return [{k: float(v[i]) for k, v in logs.items()} for i in range(len(posterior.samples))]


def scripted(monkeypatch: pytest.MonkeyPatch, elbos: Sequence[float]) -> list[Any]:
    """Lets validation say these ELBOs; the weights at each."""
    seen: list[Any] = []

    def validate(trainer: Trainer, *rest: Any) -> list[Validation]:
        seen.append(weights_of(trainer.guide))
        return [Validation(elbos[len(seen) - 1], 1.0, 0.5, 0.0)]

    monkeypatch.setattr(training, "validate", validate)
    return seen


def validated(**options: Any) -> lp.GFlowNetGuide:
    """A guide of four steps with a validation after each."""
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, objective="tb")
    rows = rows_of(lm)
    guide.fit(
        story,
        rows,
        steps=4,
        batch=4,
        validation=rows,
        validate_every=1,
        progress=False,
        **options,
    )
    return guide


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_guide_ends_with_the_best_weights(
    keep_best: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scripted(monkeypatch, [-5.0, -3.0, -3.0, -4.0])
    guide = validated(keep_best=keep_best)
    assert guide.history["val_elbo"] == [-5.0, -3.0, -3.0, -4.0]
    assert not equal(seen[1], seen[3])
    assert equal(weights_of(guide), seen[1 if keep_best else 3])


@pytest.mark.parametrize(("average", "first"), [(0.5, 2), (1.0, 0), (0.1, None)])
def test_the_guide_ends_with_the_mean_of_its_last_weights(
    average: float, first: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scripted(monkeypatch, [-5.0, -3.0, -3.0, -4.0])
    guide = validated(average=average)
    # A tenth of four steps is none of them: then the best weights count.
    own = seen[1:2] if first is None else seen[first:]
    for name, found in weights_of(guide).items():
        expected = torch.stack([weights[name] for weights in own]).mean(0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_a_mean_is_of_the_steps_that_a_weight_was_there() -> None:
    mean = Mean()
    mean.add({"a": torch.tensor(1.0)})
    mean.add({"a": torch.tensor(3.0), "b": torch.tensor(4.0)})
    mean.add({"a": torch.tensor(8.0), "b": torch.tensor(5.0)})
    assert mean.weights == {"a": torch.tensor(4.0), "b": torch.tensor(4.5)}
    assert mean.counts == {"a": 3, "b": 2}


def test_patience_ends_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scripted(monkeypatch, [-5.0, -6.0, -4.0, -4.5, -4.5, -1.0])
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2)
    guide.fit(
        story,
        rows_of(lm),
        steps=20,
        batch=4,
        validation=rows_of(lm),
        validate_every=2,
        patience=2,
        progress=False,
    )
    # The third validation is better, the two after it are not: ten steps.
    assert guide.history["step"] == [float(k) for k in range(10)]
    assert len(seen) == 5 and equal(weights_of(guide), seen[2])


def test_a_resumed_training_knows_its_best_and_its_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(folder: Path, fails_at: int | None) -> lp.GFlowNetGuide:
        guide = lp.GFlowNetGuide(make_lm(), rank=2, objective="tb", seed=2)
        with cut_off(monkeypatch, fails_at):
            rows = rows_of(guide.lm, ("aab.", "...", "b."))
            guide.fit(
                story,
                rows,
                steps=9,
                batch=4,
                observations=2,
                validation=rows[:1],
                validate_every=1,
                validation_samples=2,
                patience=4,
                checkpoint=folder,
                checkpoint_every=2,
                progress=False,
            )
        return guide

    whole = fit(tmp_path / "whole", None)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "cut", 3)
    resumed = fit(tmp_path / "cut", None)
    assert resumed.history == whole.history
    assert equal(weights_of(resumed), weights_of(whole))
    assert resumed.learned == whole.learned == {"middle"}


# -- what is learned from ------------------------------------------------------------------------


def test_forward_kl_learns_from_simulated_pairs() -> None:
    lm = make_lm()
    endings = ("aab", "..")
    guide = lp.GFlowNetGuide(lm, rank=8, seed=0)
    before = all_divergences(guide, endings)
    guide.fit(
        story,
        rows_of(lm, endings),
        objective="forward_kl",
        steps=60,
        batch=24,
        learning_rate=3e-3,
        progress=False,
    )
    after = all_divergences(guide, endings)
    assert (after[:, 1] < 0.7 * before[:, 1]).all(), (before, after)
    assert all(math.isnan(v) for v in guide.history["elbo"])
    assert np.mean(guide.history["loss"][-10:]) < np.mean(guide.history["loss"][:3])


def test_simulated_pairs_are_a_share_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    losses: list[float] = []
    plain = Trainer._descend

    def descend(self: Trainer, turns: Sequence[Turn], number: int, power: float) -> Any:
        seen.extend((len(t.own), len(t.simulated)) for t in turns)
        (found,) = plain(self, turns, number, power)
        (turn,) = turns
        with torch.no_grad():
            draws = [*turn.own, *turn.simulated]
            scores = policy_scores(draws, self.lm, self.guide.adapter)
            logs = [log_q(d, f, None) for d, f in zip(draws, scores, strict=True)]
            heads = self.guide.heads
            own = loss_of(turn, scores[:9], logs[:9], self.settings, heads, power, None)
            mean = torch.stack([q.sum() for q in logs[9:]]).mean()
        losses.append(found["loss"] - float(own - 3 / 12 * mean))
        return [found]

    monkeypatch.setattr(Trainer, "_descend", descend)
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2)
    guide.fit(
        story,
        rows_of(lm)[:1],
        steps=3,
        batch=12,
        simulated_share=0.25,
        replay_share=0.0,
        progress=False,
    )
    assert seen == [(9, 3)] * 3
    assert losses == pytest.approx([0.0] * 3, abs=1e-3)


@pytest.mark.parametrize(
    ("simulated", "replay", "expected"),
    [(0.0, 0.25, (8, 6)), (0.5, 0.5, (4, 2)), (0.5, 0.9, (4, 2)), (0.0, 0.95, (8, 2))],
)
def test_replay_leaves_two_new_draws(
    simulated: float, replay: float, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    plain = drawing.Drawing.turns

    def turns(self: Any, chosen: Any, number: int) -> list[Turn]:
        found = plain(self, chosen, number)
        seen.extend((len(t.own), t.fresh) for t in found)
        return found

    monkeypatch.setattr(drawing.Drawing, "turns", turns)
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2)
    guide.fit(
        story,
        rows_of(lm)[:1],
        steps=5,
        batch=8,
        objective="vargrad",
        simulated_share=simulated,
        replay_share=replay,
        replay_distance=0.0,
        progress=False,
    )
    assert seen[0] == (expected[0], expected[0]) and seen[-1] == expected
    assert not any(map(math.isnan, guide.history["elbo"]))


def test_a_row_with_two_slots_of_a_step_has_draws_for_both() -> None:
    lm = make_lm()
    program = lp.compile(story, lm)
    trainer = trainer_of(lp.GFlowNetGuide(lm, rank=2), program, [()], batch=4, draw_ahead=2)
    (row,) = trainer.observations
    row.buffer.capacity = 0
    for number, slots in enumerate([(0,), (0, 1), (0, 1), (0, 1)]):
        turns = trainer.drawing.turns([(slot, row) for slot in slots], number)
        assert [len(t.own) for t in turns] == [4] * len(slots)
        assert len({id(d) for t in turns for d in t.own}) == 4 * len(slots)


def test_each_observation_learns_from_its_own_given_latents() -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=8, objective="mle", seed=1)
    before = all_divergences(guide)
    truths = [lp.infer(story, *r, method="exact", progress=False) for r in rows_of(lm)]
    latents = [t.resample(n, seed=1) for t, n in zip(truths, (96, 64), strict=True)]
    guide.fit(
        story, rows_of(lm), given=latents, steps=50, batch=32, learning_rate=3e-3, progress=False
    )
    after = all_divergences(guide)
    assert (after[:, 1] < 0.4 * before[:, 1]).all(), (before, after)
    with pytest.raises(ValueError, match="data has 2, and given has 3"):
        guide.fit(story, rows_of(lm), given=[*latents, latents[0]])


def test_the_temperature_is_drawn_from_a_range(monkeypatch: pytest.MonkeyPatch) -> None:
    temperatures: list[float] = []
    plain = drawing.Policy

    def policy(*args: Any, **options: Any) -> Any:
        made = plain(*args, **options)
        temperatures.append(made.temperature)
        return made

    monkeypatch.setattr(drawing, "Policy", policy)
    lm = make_lm()
    options: dict[str, Any] = {
        "steps": 5,
        "batch": 40,
        "tempered_share": 0.5,
        "replay_share": 0.0,
        "progress": False,
    }
    guide = lp.GFlowNetGuide(lm, rank=2)
    guide.fit(story, rows_of(lm)[:1], sampling_temperature=(0.5, 2.0), **options)
    hot = [t for t in temperatures if t != 1.0]
    assert len(hot) == 100 and len(temperatures) == 200 and len(set(hot)) == 100
    assert min(hot) >= 0.5 and max(hot) <= 2.0
    # log₂ of them is uniform on [−1, 1]: mean 0, sd 1/√3.
    logs = np.log2(hot)
    assert abs(logs.mean()) < 4 * 3**-0.5 / 10 and logs.std() == pytest.approx(3**-0.5, abs=0.12)
    temperatures.clear()
    guide.fit(story, rows_of(lm)[:1], sampling_temperature=1.5, **options)
    assert Counter(temperatures) == {1.0: 100, 1.5: 100}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_temperature": (2.0, 1.0)}, "sampling_temperature must be above 0, or a range"),
        ({"sampling_temperature": 0.0}, "sampling_temperature must be above 0"),
        ({"simulated_share": 1.0}, "simulated_share must be at least 0 and below 1, got 1.0"),
        ({"patience": 0}, "patience must be an integer of at least 1, got 0"),
        ({"average": 1.5}, "average must be between 0 and 1, got 1.5"),
        ({"accumulate": 0}, "accumulate must be an integer of at least 1, got 0"),
        ({"observations": 0}, "observations must be an integer of at least 1, got 0"),
        ({"validate_every": 0}, "validate_every must be an integer of at least 1, got 0"),
        ({"validation": []}, "data is empty"),
        ({"objective": "best"}, "unknown objective 'best'; objectives are: auto, subtb, db"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a number, got '1e-3'"),
        ({"tempered_share": "a"}, "tempered_share must be a number, got 'a'"),
        ({"clip": None}, "clip must be a number, got None"),
        ({"average": True}, "average must be a number, got True"),
        ({"replay_distance": "a"}, "replay_distance must be a number, got 'a'"),
        ({"betas": 0.9}, "betas must be two numbers, got 0.9"),
        ({"betas": (0.9, "b")}, r"betas must be two numbers, got \(0.9, 'b'\)"),
        ({"betas": [0.9, 0.99, 0.999]}, "betas must be two numbers, got .0.9, 0.99, 0.999."),
        ({"sampling_temperature": "hot"}, r"must be a number, or two \(low, high\), got 'hot'"),
        ({"sampling_temperature": [1.0]}, r"must be a number, or two \(low, high\), got .1.0."),
        ({"sampling_temperature": [2.0, 1.0]}, "above 0, or a range .*, got .2.0, 1.0."),
        ({"lengths": {"ending": 2.5}}, r"lengths\['ending'\] must be an integer of at least 1"),
        *(
            (
                {"batch": 4, "simulated_share": 0.75, "objective": objective},
                f"leaves 1 of the guide's own draws, and objective='{objective}' needs at least 2",
            )
            for objective in ("tb", "reverse_kl", "rao_blackwell", "rws")
        ),
        (
            {
                "batch": 2,
                "simulated_share": 0.75,
                "objective": "mle",
                "given": [[{"middle": "a"}]] * 2,
            },
            "leaves 0 of given draws, and objective='mle' needs at least 1",
        ),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    lm = make_lm()
    with pytest.raises(ValueError, match=message):
        lp.GFlowNetGuide(lm, rank=2).fit(story, rows_of(lm), **options)


def test_numbers_of_other_types_are_taken_as_from_a_file(tmp_path: Path) -> None:
    def trained(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
        lm = make_lm()
        guide = lp.GFlowNetGuide(lm, rank=2)
        plain = {"steps": 2, "batch": 4, "checkpoint": folder, "progress": False}
        return weights_of(guide.fit(story, rows_of(lm), **plain, **options))

    own: dict[str, Any] = {"sampling_temperature": (1.0, 2.0), "betas": (0.5, 0.75), "clip": 1.0}
    found = trained(tmp_path / "plain", learning_rate=0.25, lengths={"ending": 2}, **own)
    read = json.loads(json.dumps(own))
    read |= {"learning_rate": np.float32(0.25), "lengths": {"ending": np.int64(2)}, "clip": 1}
    assert equal(found, trained(tmp_path / "read", **read))
    assert equal(found, trained(tmp_path / "arrays", **{**read, "betas": np.array([0.5, 0.75])}))


def test_weights_that_are_no_numbers() -> None:
    lm = make_lm()
    pairs = [(story, rows_of(lm)), (beginning, rows_of(lm))]
    with pytest.raises(ValueError, match="each of weights must be a number, got 'a'"):
        lp.GFlowNetGuide(lm, rank=2).fit(pairs, weights=[1.0, "a"], observations=1)


def test_lengths_of_what_is_no_open_string() -> None:
    lm = make_lm()

    def trained(model: Any, data: Any, lengths: Any) -> lp.GFlowNetGuide:
        guide = lp.GFlowNetGuide(lm, rank=2, objective="forward_kl")
        return guide.fit(model, data, lengths=lengths, steps=1, batch=2, progress=False)

    said = r"lengths name 'nope', which is no open string; these are: 'ending'"
    with pytest.raises(ValueError, match=said):
        trained(story, rows_of(lm), {"nope": 9})
    with pytest.raises(ValueError, match="lengths name 'middle', which is no open string"):
        trained(story, rows_of(lm), {"middle": 2})
    with pytest.raises(TypeError, match="lengths must be a mapping from the names of open"):
        trained(story, rows_of(lm), 9)
    # Of several programs one may have it, and of several rows one may have more turns.
    both = [(story, rows_of(lm)), (turns_of, [(lm, 1), (lm, 2)])]
    with pytest.raises(ValueError, match=r"lengths name 'said_0', which .*: 'ending', 'heard_0'"):
        trained(both, None, {"said_0": 1})
    trained(both, None, {"ending": 2, "heard_1": 1})
    with pytest.raises(ValueError, match="lengths name 'heard_1'"):
        trained(turns_of, [(lm, 1)], {"heard_1": 1})


# -- which latents a guide knows -----------------------------------------------------------------


def turns_of(lm: LM, count: int) -> None:
    for i in range(count):
        said = lp.sample(f"said_{i}", lp.LMString(lm, "a" * (i + 1), max_tokens=1))
        lp.sample(f"heard_{i}", lp.LMString(lm, f"{said}"), obs="b")


def test_a_training_that_fails_at_once_leaves_an_untrained_guide() -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, objective="subtb")
    options: dict[str, Any] = {"steps": 1, "batch": 4, "progress": False}
    with pytest.raises(ValueError, match="none of the 1 given draws follows"):
        guide.fit(chain, [(lm,)], given=[{"one": "aaaaa", "two": "a"}], **options)
    assert (guide.learned, guide.flows) == (set(), set()) and guide.remarks
    guide.check(lp.compile(story, lm))
    guide.fit(chain, [(lm,)], **options)
    assert guide.learned == guide.flows == {"one", "two"} and not guide.remarks


def test_a_guide_refuses_latents_that_it_was_not_trained_on(tmp_path: Path) -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2)
    lp.infer(chain, lm, guide=guide, num_samples=2, progress=False)  # untrained, it takes any
    guide.fit(story, rows_of(lm), steps=1, batch=2, progress=False)
    guide.save(tmp_path)
    assert json.loads((tmp_path / "guide.json").read_text())["sites"] == ["middle"]
    message = "trained on the latents middle and knows nothing of one, two; train it"
    for one in (guide, lp.GFlowNetGuide.load(tmp_path, lm)):
        with pytest.raises(ValueError, match=message):
            lp.infer(chain, lm, guide=one, num_samples=2, progress=False)
        with pytest.raises(ValueError, match=message):
            one.sample(chain, lm)
        lp.infer(story, lm, "b.", guide=one, num_samples=2, progress=False)
    guide.fit(chain, [(lm,)], steps=1, batch=2, progress=False)
    assert guide.learned == {"middle", "one", "two"}
    lp.infer(chain, lm, guide=guide, num_samples=2, progress=False)


def test_the_turns_of_a_loop_are_one_latent_to_a_guide() -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2)
    guide.fit(turns_of, [(lm, 2)], steps=1, batch=2, progress=False)
    assert guide.learned == {"said_#"}
    found = lp.infer(turns_of, lm, 12, guide=guide, num_samples=2, progress=False)
    assert len(found.samples[0]) == 12


def test_a_guide_of_the_first_version_is_read(tmp_path: Path) -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, numeric="prior", objective="vargrad", defensive=0.1)
    guide.fit(story, rows_of(lm), steps=2, batch=4, progress=False)
    guide.save(tmp_path)
    old = {
        "format": "langppl-guide",
        "version": 1,
        "base_model": lm.name,
        "base_fingerprint": lm.weights_fingerprint,
        "objective": "vargrad",
        "default_context": True,
        "defensive": 0.1,
        "seed": 0,
        "steps": 2,
        "versions": {"langppl": "0.1"},
    }
    (tmp_path / "guide.json").write_text(json.dumps(old))
    assert not (tmp_path / HEADS_FILE).exists()
    loaded = lp.GFlowNetGuide.load(tmp_path, lm)
    assert (loaded.numeric, loaded.learned, loaded.heads.specification) == ("prior", set(), {})
    assert (loaded.objective, loaded.defensive) == ("vargrad", 0.1)
    draws = [g.sample(story, lm, n=6) for g in (guide, loaded)]
    assert [str(d) for d in draws[0]] == [str(d) for d in draws[1]]
    (tmp_path / "guide.json").write_text(json.dumps({**old, "version": 4}))
    with pytest.raises(ValueError, match=r"guide.json is of version 4 .*reads up to version 3"):
        lp.GFlowNetGuide.load(tmp_path, lm)


def test_a_loaded_guide_goes_on_where_it_was(tmp_path: Path) -> None:
    lm, other = make_lm(), make_lm()
    options: dict[str, Any] = {"steps": 3, "batch": 4, "progress": False}
    guide = lp.GFlowNetGuide(lm, rank=2, seed=5).fit(story, rows_of(lm), **options)
    guide.fit(story, rows_of(lm), steps=1, batch=4, progress=False, objective="forward_kl")
    guide.history["val_elbo"] = [-math.inf, math.nan, 0.5, math.inf]  # strict JSON has no such
    guide.save(tmp_path)
    json.loads((tmp_path / "guide.json").read_text(), parse_constant=pytest.fail)
    loaded = lp.GFlowNetGuide.load(tmp_path, other)
    assert loaded.history == guide.history  # NaN where a figure was not reported
    assert "4 steps on" in repr(loaded)
    lm.memo.clear()  # scores that are not computed anew move the last bits of others
    # Adam begins anew for both, and the random numbers go on.
    guide.fit(story, rows_of(lm), **options)
    loaded.fit(story, rows_of(other), **options)
    assert guide.history["step"] == loaded.history["step"] == [0, 1, 2, 3, 4, 5, 6]
    assert guide.history["loss"] == loaded.history["loss"]
    assert equal(weights_of(guide), weights_of(loaded))


def own_context(info: Any) -> str:
    return str(info.prompt)


def test_the_context_of_a_saved_guide(tmp_path: Path) -> None:
    from langppl.guides.context import observations_first

    lm = make_lm()
    for k, context in enumerate((None, observations_first, own_context)):
        lp.GFlowNetGuide(lm, rank=2, context=context).save(tmp_path / str(k))
    assert lp.GFlowNetGuide.load(tmp_path / "1", lm).context is observations_first
    with pytest.raises(ValueError, match=r"of its own, .*:own_context; give it to load"):
        lp.GFlowNetGuide.load(tmp_path / "2", lm)
    same = lp.GFlowNetGuide.load(tmp_path / "2", lm, context=own_context)
    assert same.context is own_context
    for k in ("0", "1"):
        with pytest.warns(UserWarning, match=r"trained with the context .*, and reads .*:own_con"):
            lp.GFlowNetGuide.load(tmp_path / k, lm, context=own_context)


def test_a_second_training_goes_on_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    rows = [(lm, ENDINGS[k % 2]) for k in range(8)]
    numbers: list[int] = []
    pick = Trainer.pick

    def noted(self: Any, slot: int, step: int) -> int:
        numbers.append(pick(self, slot, step))
        return numbers[-1]

    monkeypatch.setattr(Trainer, "pick", noted)
    guide = lp.GFlowNetGuide(lm, rank=2)
    for _ in range(2):
        guide.fit(story, rows, steps=4, observations=1, batch=2, progress=False)
    assert sorted(numbers) == list(range(8))


def test_a_callback_sees_each_step_and_may_end_the_training() -> None:
    lm = make_lm()
    seen: list[dict[str, float]] = []

    def told(figures: Any) -> bool:
        seen.append(figures)
        return np.bool_(len(seen) == 3)  # type: ignore[return-value]

    guide = lp.GFlowNetGuide(lm, rank=2)
    guide.fit(story, rows_of(lm), steps=9, batch=2, progress=False, callback=told)
    assert [f["step"] for f in seen] == guide.history["step"] == [0.0, 1.0, 2.0]
    assert [f["loss"] for f in seen] == guide.history["loss"]


def test_validation_is_not_learned_from() -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2)
    other = [(beginning, [(lm, "aab.")])]
    program = lp.compile(story, lm, "...")
    guide.fit([program], validation=other, steps=1, batch=2, progress=False)
    assert guide.learned == {"middle"}


def test_a_buffer_of_no_size_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    made: list[Trainer] = []
    run = Trainer.run

    def kept(self: Trainer, *args: Any) -> None:
        made.append(self)
        run(self, *args)

    monkeypatch.setattr(Trainer, "run", kept)
    for size in (0, 3):
        guide = lp.GFlowNetGuide(lm, rank=2)
        guide.fit(story, rows_of(lm), steps=3, batch=8, replay_size=size, progress=False)
    sizes = [[len(list(o.buffer.items())) for o in t.observations] for t in made]
    assert sizes[0] == [0, 0] and all(0 < n <= 3 for n in sizes[1])


def test_what_an_objective_has_no_use_for_is_still_checked() -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2)
    for name, value in (("tempered_share", -3.0), ("replay_share", 1.5), ("draw_ahead", 0)):
        with pytest.raises(ValueError, match=name):
            guide.fit(story, rows_of(lm), objective="rws", progress=False, **{name: value})


def test_given_choices_that_are_no_options_are_left_out() -> None:
    lm = make_lm()

    def mood(seen: str) -> None:
        z = lp.sample("mood", lp.LMChoice(lm, "a", ["a", "b"]))
        lp.sample("seen", lp.LMString(lm, f"{z}"), obs=seen)

    options: dict[str, Any] = {"objective": "mle", "steps": 2, "batch": 2, "progress": False}
    guide = lp.GFlowNetGuide(lm, rank=2)
    guide.fit(mood, [("a",)], given=[{"mood": "bad"}, {"mood": "b"}], **options)
    assert guide.history.rows == 2 and np.isfinite(guide.history["loss"]).all()
    with pytest.raises(ValueError, match="none of the 1 given draws follows"):
        guide.fit(mood, [("a",)], given=[{"mood": "bad"}], **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch": 8}, [1] * 6),
        ({"batch": 16}, [2] * 6),
        ({"batch": 4, "tempered_share": 0.25, "replay_share": 0.5}, [1] * 6),
        ({"batch": 4}, [0, 1, 0, 1, 0, 1]),
        ({"batch": 10, "tempered_share": 0.3, "replay_share": 0.0}, [3] * 6),
        ({"batch": 2, "tempered_share": 0.4, "replay_share": 0.0}, [0, 1, 1, 1, 1, 0]),
        ({"batch": 4, "replay_share": 0.0, "draw_ahead": 3}, [0, 1, 0, 1, 0, 1]),
        ({"batch": 4, "tempered_share": 0.0}, [0] * 6),
    ],
)
def test_tempered_draws_are_a_share_of_the_batch(
    options: dict[str, Any], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = drawing.Drawing.turns

    def turns(self: Any, chosen: Any, number: int) -> list[Turn]:
        found = plain(self, chosen, number)
        seen.extend(sum(d.is_tempered for d in t.own[: t.fresh]) for t in found)
        return found

    monkeypatch.setattr(drawing.Drawing, "turns", turns)
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, objective="vargrad")
    guide.fit(story, rows_of(lm)[:1], steps=6, replay_distance=0.0, progress=False, **options)
    assert seen == expected


@pytest.mark.parametrize("objective", ["mle", "vargrad"])
def test_given_numbers_that_have_no_density_are_left_out(objective: str) -> None:
    lm = make_lm()

    def model() -> None:
        x = lp.sample("x", dist.Beta(2.0, 2.0))
        lp.sample("z", lp.LMString(lm, "a", max_tokens=2))
        lp.sample("seen", dist.Normal(x, 1.0), obs=torch.tensor(0.5))

    options: dict[str, Any] = {"objective": objective, "steps": 2, "batch": 2, "progress": False}
    rows = [{"x": torch.tensor(x), "z": "a"} for x in (1.5, 0.5, 1.0, -1.0, 0.25)]
    guide = lp.GFlowNetGuide(lm, rank=2)
    guide.fit(model, [()], given=rows, **options)
    assert guide.history.rows == 2 and np.isfinite(guide.history["loss"]).all()
    trainer = trainer_of(guide, model, [()], objective=objective)
    (row,) = trainer.observations
    row.latents = rows
    trainer.drawing._score_given(row)
    assert row.given is not None
    assert [float(d.latents["x"]) for d in row.given] == [0.5, 0.25]
    with pytest.raises(ValueError, match="none of the 1 given draws follows"):
        guide.fit(model, [()], given=rows[:1], **options)


# -- partial rewards -----------------------------------------------------------------------------


def factored(lm: LM) -> None:
    one = lp.sample("one", lp.LMString(lm, "a", max_tokens=2))
    two = lp.sample("two", lp.LMString(lm, f"b{one}", stop=".", max_tokens=2))
    lp.sample("seen", lp.LMString(lm, f"{one}{two}"), obs="bb")
    lp.factor("short", -0.75 * len(one))


def draws_of(program: lp.Program, rows: Sequence[Mapping[str, Any]]) -> list[Draw]:
    executions = program.run([given(row) for row in rows])
    contexts = []
    for execution in executions:
        sites = [s for s in execution.sites.values() if s.kind == "latent"]
        contexts.append({s.name: s.fn.prompt_ids() for s in sites})
    (draws,) = make_draws([Batch(program, executions, contexts)])
    return draws


def test_what_is_known_after_each_latent_by_hand() -> None:
    lm = make_lm()
    program = lp.compile(factored, lm)
    (draw,) = draws_of(program, [{"one": "ab", "two": "b"}])
    one = float(lp.LMString(lm, "a", max_tokens=2).log_prob("ab"))
    two = float(lp.LMString(lm, "bab", stop=".", max_tokens=2).log_prob("b"))
    seen = float(lp.LMString(lm, "abb").log_prob("bb"))
    # The factor is met last, but is of the first latent alone.
    assert draw.stages[0] == pytest.approx((one, -1.5), abs=1e-4)
    assert draw.stages[1] == pytest.approx((one + two, -1.5 + seen), abs=1e-4)
    assert (draw.log_prior, draw.log_rest) == pytest.approx(draw.stages[1])
    assert draw.pieces == []

    found = site_trajectory(draw, torch.tensor([-0.5, -0.25]), torch.tensor([-4.0]), power=0.5)
    assert found.log_q.tolist() == [-0.5, -0.25]
    assert found.ends.tolist() == [1, 2] and found.log_q_end.tolist() == [0.0, 0.0]
    expected = [one - 0.75 - 4.0, one + two + 0.5 * (seen - 1.5)]
    assert found.log_reward.tolist() == pytest.approx(expected, abs=1e-4)


def test_an_impossible_factor_is_known_as_soon_as_it_can_be() -> None:
    lm = make_lm()

    def model() -> None:
        one = lp.sample("one", lp.LMString(lm, "a", max_tokens=2))
        lp.sample("two", lp.LMString(lm, "b", max_tokens=2))
        lp.factor("never", 0.0 if len(one) > 1 else -math.inf)

    never = -math.inf
    bad, good = draws_of(lp.compile(model), [{"one": "a", "two": "b"}, {"one": "ab", "two": "b"}])
    assert bad.stages == [(never, never)] * 2 and bad.log_reward == never
    assert all(math.isfinite(x) for stage in good.stages for x in stage)
    assert [p.log_rest for p in bad.pieces] == [never, 0.0]


def test_what_is_independent_of_all_that_the_guide_draws_is_no_reward() -> None:
    lm = make_lm()

    def model() -> None:
        chain(lm)
        x = lp.sample("x", dist.Normal(0.0, 1.0))
        lp.sample("measured", dist.Normal(x, 1.0), obs=torch.tensor(2.0))

    program = lp.compile(model)
    execution = program.run([given({"one": "ab", "two": "b", "x": torch.tensor(0.5)})])[0]
    contexts = {n: execution.sites[n].fn.prompt_ids() for n in ("one", "two")}
    ((draw,),) = make_draws([Batch(program, [execution], [contexts])])
    one = float(lp.LMString(lm, "a", max_tokens=2).log_prob("ab"))
    two = float(lp.LMString(lm, "bab", stop=".", max_tokens=2).log_prob("b"))
    seen = float(lp.LMString(lm, "abb").log_prob("bb"))
    measured = float(dist.Normal(0.5, 1.0).log_prob(torch.tensor(2.0)))
    assert draw.log_reward == pytest.approx(one + two + seen + measured, abs=1e-4)
    found = site_trajectory(draw, torch.tensor([-0.5, -0.25]), torch.tensor([-4.0]), power=0.5)
    expected = [one - 4.0, one + two + 0.5 * seen]
    assert found.log_reward.tolist() == pytest.approx(expected, abs=1e-4)


def pair(lm: LM, i: int) -> None:
    prompt, ending = (("a", "b."), ("bb", "ab"))[i]
    z = lp.sample(f"z_{i}", lp.LMString(lm, prompt, stop=".", max_tokens=2))
    lp.sample(f"y_{i}", lp.LMString(lm, f"{z}b"), obs=ending)


def both(lm: LM) -> None:
    pair(lm, 0)
    pair(lm, 1)
    lp.sample("apart", lp.LMString(lm, "a"), obs="b")


def loss_and_draws(
    guide: lp.GFlowNetGuide, model: Any, args: tuple[Any, ...], rows: Any, objective: str
) -> tuple[float, list[Draw]]:
    trainer = trainer_of(guide, model, [args], objective=objective)
    own = trainer.observations[0]
    trainer.prepare([own])
    draws = draws_of(own.program, rows)
    turn = Turn(own, draws, len(draws))
    scores = policy_scores(draws, guide.lm, guide.adapter)
    logs = [log_q(d, f, guide.heads) for d, f in zip(draws, scores, strict=True)]
    loss = loss_of(turn, scores, logs, trainer.settings, guide.heads, 0.5, None)
    return float(loss.detach()), draws


@pytest.mark.parametrize("objective", ["vargrad", "tb"])
def test_independent_latents_are_balanced_apart(objective: str) -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2)
    values = ["a", "b", "ab", "aa", "bb"]
    rows = [{"z_0": a, "z_1": b} for a, b in zip(values, values[1:] + values[:1], strict=True)]
    whole, draws = loss_and_draws(guide, both, (lm,), rows, objective)
    parts = [loss_and_draws(guide, pair, (lm, i), rows, objective) for i in range(2)]
    apart = float(lp.LMString(lm, "a").log_prob("b"))
    for k, draw in enumerate(draws):
        assert [p.parts for p in draw.pieces] == [[0], [1]]
        logs = [p.log_prior + p.log_rest for p in draw.pieces]
        assert sum(logs) == pytest.approx(draw.log_reward, abs=1e-4)
        own = [single[k].log_reward for _, single in parts]
        # What is of no latent is a constant, and goes with the first.
        assert logs == pytest.approx([own[0] + apart, own[1]], abs=1e-4)
    if objective == "vargrad":  # a constant of the reward moves log Z alone
        assert whole == pytest.approx(sum(loss for loss, _ in parts), rel=1e-4)
        assert whole > 0.1
    else:  # log Z is 0 while its head is untrained
        assert guide.heads.specification == {"flow": 1}
        totals = []
        scores = policy_scores(draws, lm, guide.adapter)
        for d, f in zip(draws, scores, strict=True):
            logs_q = log_q(d, f, None).tolist()
            rewards = [p.log_prior + 0.5 * p.log_rest for p in d.pieces]
            totals.append(sum((q - r) ** 2 for q, r in zip(logs_q, rewards, strict=True)))
        assert whole == pytest.approx(np.mean(totals), rel=1e-4)


@pytest.mark.parametrize("objective", ["subtb", "db", "tb"])
def test_flows_are_learned_over_sites(objective: str) -> None:
    lm = make_lm()
    program = lp.compile(factored, lm)
    truth = lp.infer(program, method="exact", progress=False).log_evidence
    guide = lp.GFlowNetGuide(lm, rank=8, objective=objective, seed=0)
    before = lp.infer(program, guide=guide, num_samples=256, progress=False).elbo_possible
    guide.fit(program, steps=60, batch=16, learning_rate=3e-3, progress=False)
    after = lp.infer(program, guide=guide, num_samples=256, progress=False).elbo_possible
    assert guide.heads.specification == {"flow": 1}
    assert truth - after < 0.5 * (truth - before)
    check_guide(guide, program, samples=200)


def test_an_untrained_balance_over_sites_by_hand() -> None:
    """With the prior as policy, only the log-likelihood and the flows are left."""
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, context=lambda info: info.prompt)
    rows = [{"one": "ab", "two": "b"}, {"one": "a", "two": "ab"}]
    loss, draws = loss_and_draws(guide, factored, (lm,), rows, "subtb")
    expected = []
    for draw in draws:
        # Log flows of the heads are 0 still. u of the root, after one latent and at the end,
        # less the prior, which the policy's own log q cancels.
        u = [0.0, 0.5 * draw.stages[0][1], 0.5 * draw.log_rest]
        expected.append(np.mean([(u[i] - u[j]) ** 2 for i, j in ((0, 1), (0, 2), (1, 2))]))
    assert loss == pytest.approx(np.mean(expected), rel=1e-3)


@pytest.mark.parametrize(("objective", "pieces"), [("subtb", 1), ("db", 1), ("tb", 2)])
def test_a_flow_begins_at_the_first_batch_s_log_z(
    objective: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, objective=objective)
    kept: list[Draw] = []
    plain = Trainer._descend

    def descend(self: Trainer, turns: Sequence[Turn], number: int, power: float) -> Any:
        kept.extend(turns[0].own)
        return plain(self, turns, number, power)

    monkeypatch.setattr(Trainer, "_descend", descend)
    guide.fit(both, [(lm,)], steps=1, batch=8, learning_rate=1e-12, progress=False)
    scores = policy_scores(kept, lm, guide.adapter)
    gaps = [
        d.log_reward - float(log_q(d, f, None).sum().detach())
        for d, f in zip(kept, scores, strict=True)
    ]
    last: Any = guide.heads.made["flow"][-1]  # type: ignore[index]
    assert float(last.bias.detach()) == pytest.approx(np.mean(gaps) / pieces, abs=1e-3)


def test_a_flow_is_of_the_programs_that_are_trained_on_one() -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, objective="subtb")
    options: dict[str, Any] = {"steps": 1, "batch": 4, "learning_rate": 1e-12, "progress": False}
    other = lp.compile(both, lm)
    guide.fit([lp.compile(story, lm)], validation=[other], **options)
    assert guide.heads.specification == {} and guide.flows == set()
    # The other program has evidence of another size, and no flow.
    guide.fit([lp.compile(far, lm), other], replay_share=0.0, **options)
    alone = lp.GFlowNetGuide(make_lm(), rank=2, objective="subtb")
    alone.fit([lp.compile(both, alone.lm)], replay_share=0.0, **options)
    biases = [float(g.heads.made["flow"][-1].bias.detach()) for g in (guide, alone)]  # type: ignore[index]
    # Both are means of few draws; the other program's log Z is 100 nats higher.
    assert abs(biases[0] - biases[1]) < 10.0


def far(lm: LM) -> None:
    lp.sample("middle", lp.LMString(lm, "ab", stop=".", max_tokens=3))
    lp.factor("far", 100.0)


def rarely_three(lm: LM) -> None:
    """Two independent pieces, and rarely a latent that `compile` does not meet."""
    both(lm)
    if lp.sample("x", dist.Cauchy(0.0, 1.0)) > 1e6:
        lp.sample("third", lp.LMString(lm, "a", max_tokens=1))


def test_the_whole_and_its_first_piece_have_their_own_log_z() -> None:
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, numeric="prior")
    near, far = torch.tensor(0.0), torch.tensor(2e6)
    plain = [{"z_0": a, "z_1": b, "x": near} for a, b in (("a", "b"), ("ab", "a"), ("b", "bb"))]
    rare = {"z_0": "a", "z_1": "b", "x": far, "third": "b"}
    for objective in ("vargrad", "tb"):
        trainer = trainer_of(guide, rarely_three, [(lm,)] * 2, objective=objective)
        for observation in trainer.observations:
            trainer.prepare([observation])
            assert "third" not in observation.program.latents
        if objective == "tb":
            guide.heads.start_flow(-3.0)

        def loss(at: int, rows: Any, trainer: Trainer = trainer) -> tuple[float, list[float]]:
            own = trainer.observations[at]
            executions = own.program.run([given(row) for row in rows])
            contexts = [
                {
                    s.name: s.fn.prompt_ids()
                    for s in e.sites.values()
                    if s.kind == "latent" and s.is_string
                }
                for e in executions
            ]
            (draws,) = make_draws([Batch(own.program, executions, contexts)])
            for d in draws:
                d.is_given = True
            scores = policy_scores(draws, lm, guide.adapter)
            logs = [log_q(d, f, guide.heads) for d, f in zip(draws, scores, strict=True)]
            turn = Turn(own, draws, len(draws))
            found = loss_of(turn, scores, logs, trainer.settings, guide.heads, 1.0, None)
            gaps = [
                d.log_reward - float(q.detach().sum()) for d, q in zip(draws, logs, strict=True)
            ]
            return float(found.detach()), gaps

        mixed, gaps = loss(0, [rare, *plain[1:]])
        if objective == "vargrad":
            assert mixed == pytest.approx(np.var(gaps), rel=1e-3)
        else:  # −3 at the first latent of either piece
            assert mixed == pytest.approx(np.mean((np.array(gaps) + 6.0) ** 2), rel=1e-3)
        assert loss(0, plain)[0] == pytest.approx(loss(1, plain)[0], rel=1e-4)


# -- what a loss is made of ------------------------------------------------------------------------


def test_divergences_are_from_the_prior_of_the_string_s_own_lm() -> None:
    lm = make_lm()
    view = lm.trainable("v", rank=2)
    guide = lp.GFlowNetGuide(lm, rank=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in lm.model.named_parameters():
            if f".{guide.adapter}." in name or f".{view.adapter}." in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    # Strings of one token are one action each.
    fns = {"one": lp.LMString(view, "a", max_tokens=1), "two": lp.LMString(lm, "b", max_tokens=1)}

    def model() -> None:
        for name, fn in fns.items():
            lp.sample(name, fn)

    draws = draws_of(lp.compile(model), [{"one": "b", "two": "a"}])
    scores = policy_scores(draws, lm, guide.adapter, with_states=True)
    logs = [log_q(d, f, None) for d, f in zip(draws, scores, strict=True)]
    (found,) = actions_of(draws, scores, logs, lm)
    expected = []
    for fn in fns.values():
        texts = [text for text, _ in enumerate_strings(fn)]
        requests = [fn.request(text, adapter=guide.adapter) for text in texts]
        replies = perform([r for r in requests if r is not None])
        own = np.array([r.log_prob for r in replies if isinstance(r, ScoreReply)])
        assert np.exp(own).sum() == pytest.approx(1.0, abs=1e-5)
        prior = np.array([float(fn.log_prob(text)) for text in texts])
        expected.append(float((np.exp(own) * (own - prior)).sum()))
    assert min(expected) > 0.01
    assert found.divergence.tolist() == pytest.approx(expected, abs=1e-4)


def unmet() -> None:
    raise AssertionError("the program need not be known")


@pytest.mark.parametrize(
    ("draw_ahead", "fresh", "has_baseline"),
    [(1, 3, True), (1, 2, False), (2, 3, False)],
    ids=["own", "replayed", "of an older policy"],
)
def test_the_floor_has_a_baseline_among_the_policys_own_draws(
    draw_ahead: int, fresh: int, has_baseline: bool
) -> None:
    guide = lp.GFlowNetGuide(make_lm(), rank=2)
    trainer = trainer_of(guide, unmet, [()], draw_ahead=draw_ahead)
    draws = [Draw(k, [], 0.0, r) for k, r in enumerate((0.0, 2.0, -math.inf))]
    logs = [torch.tensor([-1.0], requires_grad=True) for _ in draws]
    turn = Turn(trainer.observations[0], draws, fresh)
    loss_of(turn, [], logs, trainer.settings, guide.heads, 1.0, None).backward()
    # Log R − log q is 1 and 3, so log Z is 2; the possible ones have half of the floor less.
    less = FLOOR / 2 if has_baseline else 0.0
    expected = [2 * r / 3 for r in (1.0 - less, -1.0 - less, FLOOR)]
    assert [float(q.grad) for q in logs if q.grad is not None] == pytest.approx(expected)


def test_log_z_is_not_estimated_from_replayed_draws() -> None:
    guide = lp.GFlowNetGuide(make_lm(), rank=2)
    trainer = trainer_of(guide, unmet, [()], objective="subtb")
    # Of strings of one token: log R − log q is 1 and 5.
    draws = [Draw(k, [], 0.0, r, ends=[(1, 0.0, r)]) for k, r in enumerate((0.0, 4.0))]
    zero, log_q_of = torch.tensor(0.0), torch.tensor([-1.0])
    scores = [[[PathLogProbs(log_q_of, zero, torch.zeros(2))]] for _ in draws]
    for fresh, log_z in ((1, 1.0), (2, 3.0)):
        turn = Turn(trainer.observations[0], draws, fresh)
        options = (trainer.settings, guide.heads, 1.0, None)
        loss = loss_of(turn, scores, [log_q_of, log_q_of], *options)
        assert float(loss) == pytest.approx(((log_z - 1.0) ** 2 + (log_z - 5.0) ** 2) / 2)


def test_given_draws_are_held_to_the_first_estimate_at_each_power() -> None:
    def estimate(own: Observation, gaps: Sequence[float], power: float, offset: float) -> float:
        gap = torch.tensor(gaps)
        return float(own.estimate(WHOLE, gap, gap, power, True, offset))

    own = Observation(unmet, (), ReplayBuffer(1))
    assert estimate(own, (1.0, 3.0), 0.5, 0.0) == 2.0
    assert estimate(own, (7.0, 9.0), 0.5, 0.0) == 2.0
    assert estimate(own, (4.0, 6.0), 1.0, 0.0) == 5.0
    # What was taken off the rewards is no part of the estimate.
    far_off = Observation(unmet, (), ReplayBuffer(1))
    assert estimate(far_off, (1.0, 3.0), 1.0, 1e4) == 2.0
    assert estimate(far_off, (7.0, 9.0), 1.0, 1e4) == 2.0
    assert estimate(far_off, (7.0, 9.0), 1.0, 9990.0) == 12.0


def test_a_record_says_where_a_draw_is_from() -> None:
    lm = make_lm()
    program = lp.compile(chain, lm)
    draws = draws_of(program, [{"one": "a", "two": "b"}] * 3)
    draws[1].is_given = draws[2].is_tempered = True
    records = json.loads(json.dumps([to_record(d) for d in draws]))
    again = from_records(program, records)
    marks = [(d.is_given, d.is_tempered) for d in again]
    assert marks == [(False, False), (True, False), (False, True)]
