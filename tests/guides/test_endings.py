"""Where a training is called, and how it ends: without gradients, by a callback, by Ctrl-C."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch

import langppl as lp
from langppl.guides import training
from langppl.testing import tiny_lm

OPTIONS: dict[str, Any] = {"steps": 6, "batch": 8, "progress": False}


def fitted(**options: Any) -> lp.GFlowNetGuide:
    lm = tiny_lm("ab.", seed=2)

    def single(end: str) -> None:
        z = lp.sample("z", lp.LMString(lm, "a", max_tokens=2))
        lp.sample("end", lp.LMString(lm, f"a{z}", max_tokens=3), obs=end)

    guide = lp.GFlowNetGuide(lm, rank=2, seed=1)
    return guide.fit(single, data=[("b.",)], **{**OPTIONS, **options})


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("objective", ["subtb", "tb"])
def test_a_training_where_gradients_are_off_is_a_training(
    switched_off: Any, objective: str
) -> None:
    expected = fitted(objective=objective)
    with switched_off():
        found = fitted(objective=objective)
    assert found.history == expected.history and min(found.history["grad"]) > 0
    assert found.identity() == expected.identity()


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_em_where_gradients_are_off(switched_off: Any) -> None:
    def run() -> float:
        lm = tiny_lm("ab.", seed=2)
        view = lm.trainable("view", rank=2)

        def model(end: str) -> None:
            z = lp.sample("z", lp.LMString(lm, "a", max_tokens=2))
            lp.sample("end", lp.LMString(view, f"a{z}", max_tokens=3), obs=end)

        found = lp.em(
            model, [("b.",), ("bb",)], "prior", rounds=2, steps=3, num_samples=8, progress=False
        )
        return float(found.history["log_evidence"][-1])

    expected = run()
    with switched_off():
        assert run() == expected


def test_a_training_that_the_callback_ends_is_validated() -> None:
    told: list[Any] = []

    def stop(figures: Any) -> bool:
        told.append(figures)
        return bool(figures["step"] == 3)

    guide = fitted(validation=[("bb",)], validate_every=2, callback=stop)
    assert guide.history.rows == 4 == len(told)
    known = [v == v for v in guide.history["val_elbo"]]
    assert known == [False, True, False, True]

    def stop_sooner(figures: Any) -> bool:
        return bool(figures["step"] == 2)

    guide = fitted(validation=[("bb",)], validate_every=2, callback=stop_sooner)
    assert [v == v for v in guide.history["val_elbo"]] == [False, True, True]


def test_an_interrupt_in_a_validation_leaves_the_step_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, calls = training.validate, []

    def validate(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(training, "validate", validate)
    with pytest.warns(UserWarning, match="after 4 of 6 steps; the guide has the weights that were"):
        guide = fitted(validation=[("bb",)], validate_every=2)
    assert guide.was_interrupted and guide.history.rows == 4
    assert [v == v for v in guide.history["val_elbo"]] == [False, True, False, False]
    with pytest.warns(UserWarning, match="keeps what it has learned"):
        calls[:] = [1]
        fitted(validation=[("bb",)], validate_every=2, keep_best=False)


@pytest.mark.parametrize(
    "objective", ["subtb", "db", "vargrad", "reverse_kl", "rao_blackwell", "reward", "rws"]
)
@pytest.mark.parametrize("constant", [1e7, -1e9])
def test_a_constant_factor_changes_no_gradient(objective: str, constant: float) -> None:
    def run(value: float) -> lp.GFlowNetGuide:
        lm = tiny_lm("ab.", seed=2)

        def model() -> None:
            z = lp.sample("z", lp.LMString(lm, "a", max_tokens=2))
            lp.sample("end", lp.LMString(lm, f"a{z}", max_tokens=3), obs="b.")
            pyro.factor("constant", torch.tensor(value, dtype=torch.float64))

        guide = lp.GFlowNetGuide(lm, rank=2, seed=1)
        return guide.fit(
            model,
            objective=objective,
            schedule=lp.RewardSchedule(start=1.0),
            **{**OPTIONS, "steps": 3},
        )

    expected, found = run(0.0).history, run(constant).history
    # In float64 a reward of 1e9 still has seven digits after the point.
    assert found["grad"] == pytest.approx(expected["grad"], rel=1e-2)
    assert found["elbo"] == pytest.approx([constant + v for v in expected["elbo"]], rel=1e-9)
    if objective in ("subtb", "db", "vargrad"):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2, abs=1e-4)


def test_given_draws_keep_their_log_z_beside_a_large_constant() -> None:
    def run(value: float) -> list[float]:
        lm = tiny_lm("ab.", seed=2)

        def model() -> None:
            z = lp.sample("z", lp.LMString(lm, "a", max_tokens=2))
            lp.sample("end", lp.LMString(lm, f"a{z}", max_tokens=3), obs="b.")
            pyro.factor("constant", torch.tensor(value, dtype=torch.float64))

        given = lp.infer(model, num_samples=16, seed=3, progress=False)
        guide = lp.GFlowNetGuide(lm, rank=2, seed=1)
        options = {**OPTIONS, "steps": 3, "schedule": lp.RewardSchedule(start=1.0)}
        return guide.fit(model, objective="vargrad", given=given.samples, **options).history["grad"]

    assert run(1e7) == pytest.approx(run(0.0), rel=1e-2)


def test_a_row_is_amended() -> None:
    history = lp.History()
    with pytest.raises(ValueError, match="no row"):
        history.amend({"loss": 1.0})
    history.add({"step": 0})
    history.add({"step": 1})
    history.amend({"val_elbo": -2.0, "step": 5})
    assert history["step"] == [0.0, 5.0] and history["val_elbo"][1] == -2.0
    assert history["val_elbo"][0] != history["val_elbo"][0]
