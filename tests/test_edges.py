"""Corners of inference against exact answers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import langppl as lp
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)


def choice(prompt: str) -> lp.LMChoice:
    return lp.LMChoice(LM, prompt, ["a", "b"])


def evidence(model: Any, **options: Any) -> float:
    found = lp.infer(model, progress=False, **options).log_evidence
    assert found is not None
    return found


def test_numeric_latents_with_a_batch_are_listed_place_by_place() -> None:
    def batch() -> None:
        x = lp.sample("x", dist.Bernoulli(torch.tensor([0.3, 0.6])))
        lp.factor("f", math.log(0.1 + 0.5 * float(x.sum())))

    def plate() -> None:
        with pyro.plate("p", 2):
            x = lp.sample("x", dist.Bernoulli(0.3))
        lp.factor("f", 0.5 * float(x.sum()))

    assert evidence(batch, method="exact") == pytest.approx(math.log(0.1 + 0.5 * 0.9), abs=1e-6)
    expected = 2 * math.log(0.7 + 0.3 * math.exp(0.5))
    assert evidence(plate, method="exact") == pytest.approx(expected, abs=1e-6)

    def one_hot() -> None:
        x = lp.sample("x", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        lp.factor("f", float(x[2]))

    expected = math.log(0.5 + 0.5 * math.e)
    assert evidence(one_hot, method="exact") == pytest.approx(expected, abs=1e-6)

    def wide() -> None:
        lp.sample("x", dist.Bernoulli(torch.full((12,), 0.5)))

    with pytest.raises(ValueError, match="site 'x' has 2 values in each of 12 places"):
        lp.infer(wide, method="exact", limit=1000, progress=False)


def test_a_model_that_catches_exceptions_is_still_listed_and_simulated() -> None:
    def careful(end: str = "a") -> None:
        try:
            z: str = lp.sample("z", choice("a"))
        except Exception:
            z = "a"
        lp.sample("e", choice(f"b{z}"), obs=end)

    def plain(end: str = "a") -> None:
        z = lp.sample("z", choice("a"))
        lp.sample("e", choice(f"b{z}"), obs=end)

    assert evidence(careful, method="exact") == pytest.approx(evidence(plain, method="exact"))


def test_a_model_that_catches_exceptions_around_a_tool() -> None:
    def careful(end: str = "a") -> None:
        z = lp.sample("z", choice("a"))
        try:
            n = lp.call("other", lambda text: {"a": "b", "b": "a"}[text], str(z))
        except Exception:
            n = "none"
        lp.sample("e", choice(f"b{n}"), obs=end)

    def plain(end: str = "a") -> None:
        z = lp.sample("z", choice("a"))
        lp.sample("e", choice({"a": "bb", "b": "ba"}[str(z)]), obs=end)

    program = lp.compile(careful)
    assert program.graph.latents_above("e") == {"z"}
    assert evidence(careful, method="exact") == pytest.approx(evidence(plain, method="exact"))


def test_a_tool_is_asked_again_for_other_arrays() -> None:
    def counting(end: str) -> None:
        z = lp.sample("z", choice("a"))
        numbers = np.zeros(2000)
        numbers[1000] = 1.0 if z == "a" else 3.0
        total = lp.call("total", lambda a: int(a.sum()), numbers)
        lp.sample("e", lp.LMString(LM, f"{total}"[:0] + "a" * total, max_tokens=2), obs=end)

    found = lp.infer(counting, "b", method="exact", progress=False)
    prior = choice("a")
    terms = [
        float(prior.log_prob(z) + lp.LMString(LM, "a" * n, max_tokens=2).log_prob("b"))
        for z, n in (("a", 1), ("b", 3))
    ]
    assert found.log_evidence == pytest.approx(float(np.logaddexp(*terms)), abs=1e-5)


def test_a_value_whose_last_token_runs_past_its_stop_is_possible_without_the_stop() -> None:
    lm = tiny_lm("ab. ", merged=[".b", ".ba"], seed=3)
    b_first = {lm.vocabulary.text(i): i for i in range(lm.vocabulary.size)}
    ids = (b_first[".ba"], b_first[".ba"])
    ended = lp.LMString(
        lm, "a", max_tokens=3, stop="a.b", min_tokens=0, ban=lambda token: token == ".b"
    )
    value = lp.Text(".ba.b", ids, lm.fingerprint)
    assert math.isfinite(ended.log_prob(value))
    free = lp.LMString(lm, "b")
    assert free.log_prob(value) == free.log_prob(".ba.b") > -math.inf


def test_simulation_refuses_what_is_scaled_or_masked() -> None:
    def scaled(end: str) -> None:
        z = lp.sample("z", choice("a"))
        with pyro.poutine.scale(scale=4.0):
            lp.sample("x", lp.LMString(LM, f"a{z}", max_tokens=2), obs=end)

    with pytest.raises(ValueError, match="site 'x' is scaled or masked"):
        lp.compile(scaled, "ab").simulate(1)


def test_lengths_are_counts() -> None:
    def story(end: str) -> None:
        z = lp.sample("z", choice("a"))
        lp.sample("x", lp.LMString(LM, f"a{z}"), obs=end)

    program = lp.compile(story, "ab")
    for wrong in (0, -1, 2.5, True, "2"):
        with pytest.raises(ValueError, match=r"lengths\['x'\] must be an integer of at least 1"):
            program.simulate(1, lengths={"x": wrong})  # type: ignore[dict-item]


def test_prediction_from_draws_some_of_which_lack_the_latent() -> None:
    def branch() -> None:
        if lp.sample("b", choice("a")) == "a":
            lp.sample("c", choice("b"))

    found = lp.infer(branch, num_samples=32, progress=False)
    predicted = found.predict(lambda: str(lp.sample("c", choice("b"))))
    assert len(predicted) == 32 and {p["_RETURN"] for p in predicted} <= {"a", "b"}


def test_other_observations_of_a_program_that_looks_at_them() -> None:
    def story(end: str) -> None:
        z = lp.sample("z", choice("a"))
        x = lp.sample("x", choice(f"b{z}"), obs=end)
        if x == "b":
            lp.factor("f", -2.0 if z == "a" else 0.0)

    other = lp.compile(story, "a").observing({"x": "b"})
    latents = [{"z": "b"}, {"z": "a"}]
    np.testing.assert_allclose(
        other.log_joint(latents), lp.compile(story, "b").log_joint(latents), atol=1e-5
    )


def test_a_nan_observation_names_its_site() -> None:
    def number(y: float) -> None:
        m = lp.sample("m", dist.Normal(0.0, 1.0))
        lp.sample("y", dist.Normal(m, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"site 'y': the observation .* has NaN in it"):
        lp.infer(number, math.nan, progress=False)


def test_calibration_of_exact_inference() -> None:
    def story(end: str) -> None:
        z = lp.sample("z", choice("a"))
        lp.sample("x", lp.LMString(LM, f"a{z}", max_tokens=2), obs=end)

    found = lp.calibrate(
        story, "ab", method="exact", simulations=40, draws=3, seed=0, progress=False
    )
    assert found.passes(0.01)


def test_the_same_draws_are_not_pooled_twice() -> None:
    def story(end: str) -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        lp.sample("x", lp.LMString(LM, f"a{z}"), obs=end)

    options: dict[str, Any] = {"num_observations": 4, "num_samples": 3, "progress": False}
    one = lp.evidence_bounds(story, "ab", **options)
    with pytest.raises(ValueError, match="of the same draws"):
        lp.pool_bounds([one, one])
    guides = [lp.GFlowNetGuide(LM, seed=s) for s in (0, 1)]
    lp.pool_bounds([lp.evidence_bounds(story, "ab", guide=g, **options) for g in guides])


@pytest.mark.parametrize(
    ("rows", "weights", "share"), [((2, 6), (9, 1), 0.9), ((1, 15), (1, 1), 0.5)]
)
def test_weights_of_programs_are_how_often_they_are_taken(
    rows: tuple[int, int], weights: tuple[float, float], share: float
) -> None:
    from langppl.guides.training import Trainer

    trainer = object.__new__(Trainer)
    each = [[w / n] * n for w, n in zip(weights, rows, strict=True)]
    trainer.weights = np.array([*each[0], *each[1]])
    trainer.pools = [range(0), range(0)]
    trainer.guide = type("Seeded", (), {"seed": 0})()  # type: ignore[assignment]
    steps = 2000
    taken = Counter(trainer.pick(slot, step) < rows[0] for step in range(steps) for slot in (0, 1))
    # Systematic, so its error is below that of as many independent draws.
    error = math.sqrt(share * (1 - share) / (2 * steps))
    assert abs(taken[True] / (2 * steps) - share) <= 3.5 * error


@pytest.mark.parametrize(("count", "slots"), [(5, 4), (7, 4), (6, 4), (8, 4), (10, 3), (4, 4)])
def test_rows_count_equally(count: int, slots: int) -> None:
    from langppl.guides.training import Trainer

    def story(seen: str) -> None:
        z = lp.sample("z", lp.LMString(LM, "a", stop=".", max_tokens=3))
        lp.sample("x", lp.LMString(LM, f"a{z}"), obs=seen)

    trainers: list[Trainer] = []
    run = Trainer.run

    def kept(self: Trainer, *args: Any) -> None:
        trainers.append(self)
        run(self, *args)

    guide = lp.GFlowNetGuide(LM, rank=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", kept)
        data = [("ab",)] * count
        guide.fit(story, data, steps=1, observations=slots, batch=2, progress=False)
    (trainer,) = trainers
    steps = 2 * math.lcm(*(len(pool) for pool in trainer.pools))
    weight: Counter[int] = Counter()
    for step in range(steps):
        own = [trainer.pick(slot, step) for slot in range(slots)]
        assert len(set(own)) == slots
        weight.update({k: trainer.observations[k].share for k in own})  # type: ignore[dict-item]
    assert weight == pytest.approx(dict.fromkeys(range(count), steps * slots / count))
    if count % slots == 0:
        assert {o.share for o in trainer.observations} == {1.0}


def test_the_share_of_a_row_weighs_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from langppl.guides import training

    def story(seen: str) -> None:
        z = lp.sample("z", lp.LMString(LM, "a", stop=".", max_tokens=3))
        lp.sample("x", lp.LMString(LM, f"a{z}"), obs=seen)

    found = []
    for scale in (1.0, 3.0):
        plain = training.Trainer.step

        def step(self: Any, at: int, scale: float = scale, plain: Any = plain) -> Any:
            for own in self.observations:
                own.share = scale
            return plain(self, at)

        with monkeypatch.context() as patch:
            patch.setattr(training.Trainer, "step", step)
            guide = lp.GFlowNetGuide(LM, rank=2)
            guide.fit(story, [("ab",)], steps=1, batch=4, progress=False)
        found.append(guide.history["grad"][0])
    assert found[1] == pytest.approx(3.0 * found[0], rel=1e-4)


def test_an_impossible_part_leaves_the_others_their_rewards() -> None:
    from langppl.guides.base import PriorGuide
    from langppl.guides.trajectories import Batch, make_draws
    from langppl.program import run_together
    from langppl.program.execution import given

    def story(first: str, second: str) -> None:
        for k, end in enumerate((first, second)):
            rules: dict[str, Any] = {"stop": ".", "max_tokens": 3, "truncate": "reject"}
            z = lp.sample(f"z{k}", lp.LMString(LM, "a", **rules))
            lp.sample(f"x{k}", lp.LMString(LM, f"a{z}"), obs=end)

    program = lp.compile(story, "a", "b")

    def pieces(second: str) -> Any:
        values = {"z0": "a.", "z1": second}
        (execution,) = run_together([(program, given(values, PriorGuide().chooser(program, (0,))))])
        contexts = [{"z0": (0,), "z1": (0,)}]
        ((draw,),) = make_draws([Batch(program, [execution], contexts)])
        return draw.pieces

    possible, impossible = pieces("b."), pieces("bbb")
    assert len(possible) == len(impossible) == 2
    assert math.isfinite(possible[0].log_prior + possible[0].log_rest)
    assert impossible[0].log_prior == pytest.approx(possible[0].log_prior)
    assert impossible[0].log_rest == pytest.approx(possible[0].log_rest)
    assert impossible[1].log_prior + impossible[1].log_rest == -math.inf
