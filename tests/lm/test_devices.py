"""An LM that is not on the CPU gives what it gives there: all tensors are moved to its device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from far import FAR, far_away
from peft import LoraConfig

import langppl as lp
from langppl.lm import kept
from langppl.lm.decoding import draw
from langppl.lm.requests import DrawRequest, ScoreRequest
from langppl.lm.rules import StringRules
from langppl.lm.scoring import score, score_with_gradients
from langppl.testing import tiny_lm

RULES = StringRules(max_tokens=8, stop=(".",), min_tokens=0)
TEXTS = [
    (prompt, text)
    for prompt in ["", "ab", "bb bb bb bb bb bb"]
    for text in ["", "ab", "abba", "ab a.", "bab b", "."]
]
ROUTES = ["blocks", "mask", "added", "padded"]


def make_lm(route: str = "blocks", budget: int = 512) -> lp.LM:
    lm = tiny_lm(["a", "b", ".", " "], seed=4, merged=["ab", "b.", ".a"])
    torch.manual_seed(0)
    lm.add_adapter("a", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert lm.packs is not None
    kind = {"in_blocks": route == "blocks", "is_added": route == "added"}
    lm.packs = None if route == "padded" else replace(lm.packs, **kind)  # type: ignore[arg-type]
    lm.node_budget = budget
    lm.memo.capacity = 0  # which asks for the weights' places in memory
    return lm


def scores(lm: lp.LM, adapter: str | None) -> list[ScoreRequest]:
    bound = lm.bind(RULES)
    return [
        ScoreRequest(
            lm, lm.encode_prompt(p), bound.parse(lm.encode_text(t), t.encode(), 8), 0.7, adapter
        )
        for p, t in TEXTS
    ]


def both_ways(lm: lp.LM, ask: Callable[[lp.LM], Any]) -> tuple[Any, Any]:
    """What is said on the CPU, and by the same LM elsewhere."""
    near = ask(lm)
    with far_away(lm.model):
        assert lm.device == FAR
        return near, ask(lm)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("budget", [512, 24])
def test_scores_and_gradients(route: str, budget: int) -> None:
    def ask(lm: lp.LM) -> Any:
        weights = [p for n, p in lm.model.named_parameters() if ".lora_" in n]
        found = score_with_gradients(scores(lm, "a"))
        loss = sum((f.total**2 for f in found), torch.zeros((), device=lm.device))
        gradients = [g.tolist() for g in torch.autograd.grad(loss, weights)]
        return [r.log_prob for r in score(scores(lm, None))], gradients

    near, far = both_ways(make_lm(route, budget), ask)
    np.testing.assert_allclose(far[0], near[0], atol=1e-5)
    size = max(np.abs(g).max() for g in near[1])
    assert size > 1.0
    for p, q in zip(far[1], near[1], strict=True):
        np.testing.assert_allclose(p, q, atol=1e-5 * size, rtol=1e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("adapter", [None, "a"])
def test_draws(route: str, adapter: str | None) -> None:
    def ask(lm: lp.LM) -> Any:
        prompts = ["ab", "b", "a b", "bb bb bb"] * 4
        return draw(
            [
                DrawRequest(lm, lm.encode_prompt(p), lm.bind(RULES), 8, (k,), 1.0, adapter)
                for k, p in enumerate(prompts)
            ]
        )

    near, far = both_ways(make_lm(route), ask)
    assert [r.ids for r in far] == [r.ids for r in near]
    assert [r.log_prob for r in far] == pytest.approx([r.log_prob for r in near], abs=1e-4)


def story(lm: lp.LM) -> None:
    p = lp.sample("p", dist.Beta(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0])).to_event(1))
    z = lp.sample("z", lp.LMString(lm, "ab ab", stop=".", max_tokens=4))
    c = lp.sample("c", lp.LMChoice(lm, f"ab{z}", ["a", "b"]))
    lp.sample("k", dist.Bernoulli(p[0]), obs=torch.tensor(1.0))
    lp.sample("y", lp.LMString(lm, f"b{z}{c}"), obs="ab")


def short(lm: lp.LM) -> None:
    z = lp.sample("z", lp.LMString(lm, "ab ab", stop=".", max_tokens=4, min_tokens=0))
    lp.sample("y", lp.LMString(lm, f"b{z}"), obs="ab")


@pytest.mark.parametrize(
    ("model", "objective"),
    [(short, "subtb"), (short, "vargrad"), (story, "vargrad"), (story, "tb"), (story, "subtb")],
)
@pytest.mark.filterwarnings("ignore:Pareto k")
def test_a_guide_is_trained_and_used(
    model: Callable[[lp.LM], None], objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "state_of", lambda lm, adapter: 0)

    def ask(lm: lp.LM) -> Any:
        options: dict[str, Any] = {"num_samples": 8, "seed": 3, "progress": False}
        before = lp.infer(model, lm, **options)
        guide.fit(model, [(lm,)], steps=2, batch=4, learning_rate=1e-2, progress=False)
        after = lp.infer(model, lm, guide=guide, **options)
        return [before.log_evidence, after.log_evidence, *guide.history["loss"]]

    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, objective=objective, seed=1)
    near = ask(lm)
    lm = make_lm()
    guide = lp.GFlowNetGuide(lm, rank=2, objective=objective, seed=1)
    with far_away(lm.model):
        far = ask(lm)
    assert far == pytest.approx(near, abs=1e-3)


def test_a_tensor_left_behind_is_found_out() -> None:
    lm = make_lm()
    weight = copy.deepcopy(lm.model.get_output_embeddings().weight)
    with far_away(lm.model), pytest.raises(RuntimeError, match="two devices"):
        lm.model.get_output_embeddings().weight + weight
