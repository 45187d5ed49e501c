"""Training where memory runs out: smaller passes, the same result, and one warning."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch

import langppl as lp
from langppl.guides import drawing, training, validation
from langppl.guides.drawing import Drawing
from langppl.lm import LM
from langppl.testing import tiny_lm

CUDA = torch.OutOfMemoryError("CUDA out of memory")
CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")


def make_lm() -> LM:
    return tiny_lm("ab.", seed=1, merged=["ab", "b."], sharpness=0.25)


def story(lm: LM, ending: str, other: LM | None = None) -> None:
    middle = lp.sample("middle", lp.LMString(lm, "ab", stop=".", max_tokens=3))
    lp.sample("ending", lp.LMString(other or lm, f"ab{middle}", max_tokens=4), obs=ending)


def fit(lm: LM, **changes: Any) -> lp.GFlowNetGuide:
    """Two observations, each with given, simulated, replayed and own draws, two steps' at once."""
    given = [{"middle": z} for z in ("a.", "b.", "aa.")]
    options: dict[str, Any] = {
        "steps": 4,
        "batch": 8,
        "draw_ahead": 2,
        "given": [given, given[:2]],
        "given_share": 0.25,
        "simulated_share": 0.25,
        "validation": [(lm, "bb.")],
        "validate_every": 2,
        "validation_samples": 4,
        "progress": False,
    }
    guide = lp.GFlowNetGuide(lm, rank=4, seed=1)
    return guide.fit(story, [(lm, "aab."), (lm, "...")], **{**options, **changes})


def weights_of(guide: lp.GFlowNetGuide) -> list[torch.Tensor]:
    return [p.detach() for n, p in guide.lm.model.named_parameters() if guide.adapter in n]


class Scarce:
    """Lets a function run out of memory, once it is done, while a budget is above a number."""

    def __init__(self, patch: pytest.MonkeyPatch, where: ModuleType, name: str) -> None:
        self.patch, self.where, self.name = patch, where, name

    def trained(
        self, budget: str, most: int, error: RuntimeError = CUDA
    ) -> tuple[lp.GFlowNetGuide, list[list[Any]]]:
        """The guide, and the draws of each step."""
        lm = make_lm()
        taken: list[list[Any]] = []
        plain, turns = getattr(self.where, self.name), Drawing.turns

        def scarce(*args: Any, **options: Any) -> Any:
            found = plain(*args, **options)
            if getattr(lm, budget) > most:
                raise error
            return found

        def noted(self: Drawing, *args: Any) -> Any:
            found = turns(self, *args)
            taken.append([d.key for t in found for d in (*t.own, *t.simulated)])
            return found

        with self.patch.context() as patched:
            patched.setattr(self.where, self.name, scarce)
            patched.setattr(Drawing, "turns", noted)
            return fit(lm), taken


@pytest.mark.parametrize(
    ("where", "name", "budget", "error"),
    [
        (training, "policy_scores", "node_budget", CUDA),
        (training, "policy_scores", "gradient_node_budget", CPU),
        (drawing, "run_together", "token_budget", CUDA),  # strings that are drawn, and given ones
        (drawing, "make_draws", "node_budget", CPU),  # their rewards
        (drawing, "run", "token_budget", CUDA),  # what is simulated, when all others are drawn
        (validation, "policy_scores", "node_budget", CUDA),
    ],
)
def test_out_of_memory_it_goes_on_in_smaller_passes(
    where: ModuleType,
    name: str,
    budget: str,
    error: RuntimeError,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scarce = Scarce(monkeypatch, where, name)
    expected, draws = scarce.trained(budget, 10**6)
    with pytest.warns(UserWarning, match="out of memory: training goes on") as said:
        found, own = scarce.trained(budget, 64, error)
    # However often they were halved it is said once, and they stay as they are.
    assert len(said) == 1 and said[0].filename == __file__
    was = getattr(expected.lm, budget)
    assert f"LM('tiny-1').{budget} = 64 (it was {was})" in str(said[0].message)
    assert getattr(found.lm, budget) == 64
    # Given draws, and those that wait, are neither lost nor taken twice.
    assert own == draws and len(own) == 4
    for p, q in zip(weights_of(expected), weights_of(found), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    for figure in ("loss", "elbo", "val_elbo"):
        assert found.history[figure] == pytest.approx(
            expected.history[figure], abs=1e-3, nan_ok=True
        )


@pytest.mark.parametrize(
    ("where", "name", "what"),
    [
        (training, "policy_scores", "a gradient"),
        (drawing, "make_draws", "drawing"),
        (validation, "policy_scores", "validation"),
    ],
)
def test_the_smallest_passes_that_are_too_large_are_an_error(
    where: ModuleType, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = rf"out of memory in {what}, in the smallest passes too .*node_budget = 16.* CUDA out"
    with pytest.raises(torch.OutOfMemoryError, match=said):
        Scarce(monkeypatch, where, name).trained("node_budget", 2)


def test_other_errors_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    scarce = Scarce(monkeypatch, drawing, "make_draws")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        scarce.trained("node_budget", 2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_an_lm_of_the_model_s_own_is_given_less_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, other = make_lm(), make_lm()
    plain = drawing.make_draws

    def scarce(batches: Any) -> Any:
        if other.node_budget > 64:
            raise CUDA
        return plain(batches)

    monkeypatch.setattr(drawing, "make_draws", scarce)
    guide = lp.GFlowNetGuide(lm, rank=4, seed=1)
    with pytest.warns(UserWarning, match="out of memory"):
        guide.fit(story, [(lm, "aab.", other)], steps=1, batch=4, progress=False)
    assert (lm.node_budget, other.node_budget, lm.gradient_node_budget) == (64, 64, 1024)


def test_padded_passes_are_bounded_by_the_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    lm.packs = None
    plain = training.policy_scores

    def scarce(*args: Any) -> Any:
        if lm.token_budget > 64:
            raise CUDA
        return plain(*args)

    monkeypatch.setattr(training, "policy_scores", scarce)
    with pytest.warns(UserWarning, match="out of memory"):
        fit(lm)
    assert (lm.token_budget, lm.node_budget) == (64, 1024)


def test_gradients_of_a_pass_that_was_broken_off_are_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trained(failures: int) -> lp.GFlowNetGuide:
        calls = 0
        plain = training._figures

        def figures(*args: Any) -> Any:  # after the backward pass
            nonlocal calls
            calls += 1
            if 2 <= calls < 2 + failures:
                raise CUDA
            return plain(*args)

        with monkeypatch.context() as patched:
            patched.setattr(training, "_figures", figures)
            return fit(make_lm(), steps=1, accumulate=2, validation=None, clip=float("inf"))

    expected = trained(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = trained(2)
    assert found.history["grad"] == pytest.approx(expected.history["grad"], rel=1e-4)
