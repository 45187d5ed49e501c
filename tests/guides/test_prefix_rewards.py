"""Rewards of prefixes: those of the program, of every k-th prefix, all from one pass of the LM."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import langppl as lp
from langppl.guides.trajectories import Batch, make_draws, prefix_value
from langppl.lm import packed
from langppl.program.execution import given
from langppl.testing import tiny_lm

LM = tiny_lm(["a", "b", ".", " "], seed=3, merged=["ab", "b.", ".a"])
TEXTS = ["abba", "bab", "aab", "b", "", "ab.", "abbabb"]


def static() -> None:
    z = lp.sample("z", lp.LMString(LM, "b", stop=".", min_tokens=0, max_tokens=6))
    lp.sample("y", lp.LMString(LM, f"b{z}", min_tokens=0), obs="ab")


def dynamic() -> None:
    z = lp.sample("z", lp.LMString(LM, "b", stop=".", min_tokens=0, max_tokens=6))
    lp.sample("y", lp.LMString(LM, f"b{z}" if len(z) > 2 else "a", min_tokens=0), obs="ab")


def draws_of(program: lp.Program, every: int) -> Any:
    executions = program.run([given({"z": t}) for t in TEXTS])
    ids = LM.encode_prompt("b")
    contexts = [{"z": ids}] * len(TEXTS)
    (draws,) = make_draws([Batch(program, executions, contexts, prefixes=True, every=every)])
    return draws


@pytest.mark.parametrize("model", [static, dynamic])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_kth_prefix_has_the_programs_reward(model: Any, every: int) -> None:
    program = lp.compile(model)
    assert program.is_static == (model is static)
    for text, draw in zip(TEXTS, draws_of(program, every), strict=True):
        fn, value = draw.parts[0].site.fn, draw.parts[0].site.value
        path = fn.request(value).path
        positions = [t for t, _, _ in draw.ends]
        inner = [t for t in range(0, len(path.tokens), every) if len(path.steps[t].canonical)]
        assert positions == [*inner, len(path.tokens)]
        assert len(inner) >= len(path.tokens) / every - 1 if text else not inner
        cuts = [prefix_value(fn, path, t) for t in inner]
        expected = program.log_joint([{"z": c} for c in [*cuts, value]])
        np.testing.assert_allclose([p + r for _, p, r in draw.ends], expected, atol=2e-5)
        assert draw.log_reward == pytest.approx(float(expected[-1]), abs=2e-5)


def test_a_static_program_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    program = lp.compile(static)
    rows: list[int] = []
    plain = packed.run_row

    def counted(lm: Any, packing: Any, row: Any, *rest: Any) -> Any:
        rows.append(len(row.ids))
        return plain(lm, packing, row, *rest)

    monkeypatch.setattr(packed, "run_row", counted)
    LM.memo.clear()
    draws_of(program, 1)
    assert len(rows) == 1


def test_the_rewards_of_fewer_prefixes_train_all_the_same() -> None:
    guide = lp.GFlowNetGuide(LM, rank=4, seed=1)
    program = lp.compile(static)
    guide.fit(program, steps=60, batch=16, learning_rate=3e-3, every=2, progress=False)
    exact = lp.infer(program, method="exact", progress=False).log_evidence
    found = lp.infer(program, guide=guide, num_samples=512, progress=False)
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_error
    untrained = lp.infer(
        program, guide=lp.GFlowNetGuide(LM, rank=4, seed=1), num_samples=512, progress=False
    )
    assert found.log_weights.std() < 0.5 * untrained.log_weights.std()


@pytest.mark.parametrize("handler", [poutine.scale(scale=3.0), poutine.mask(mask=False)])
def test_rewards_under_pyros_scale_and_mask(handler: Any) -> None:
    def changed() -> None:
        with handler:
            z = lp.sample("z", lp.LMString(LM, "b", stop=".", max_tokens=6))
        lp.sample("y", lp.LMString(LM, f"b{z}", min_tokens=0), obs="ab")

    program = lp.compile(changed)
    rows = [{"z": t} for t in TEXTS if t]
    executions = program.run([given(row) for row in rows])
    contexts = [{"z": LM.encode_prompt("b")}] * len(rows)
    (draws,) = make_draws([Batch(program, executions, contexts, prefixes=True)])
    scored = program.executions(rows)
    plain = lp.compile(static).executions(rows)
    for d, e, p in zip(draws, scored, plain, strict=True):
        assert d.log_reward == pytest.approx(e.log_joint, abs=1e-6)
        assert abs(e.log_joint - p.log_joint) > 0.1
        fn = d.parts[0].site.fn
        path = fn.request(e.latents["z"]).path
        cuts = [prefix_value(fn, path, t) for t, _, _ in d.ends[:-1]]
        expected = program.log_joint([{"z": c} for c in cuts]) if cuts else []
        np.testing.assert_allclose([p + r for _, p, r in d.ends[:-1]], expected, atol=2e-5)


def test_exact_divergences_are_not_those_of_scaled_strings() -> None:
    def scaled() -> None:
        with poutine.scale(scale=2.0):
            z = lp.sample("z", lp.LMString(LM, "b", stop=".", max_tokens=2))
        lp.sample("y", lp.LMString(LM, f"b{z}", min_tokens=0), obs="ab")

    exact = lp.infer(scaled, method="exact")
    rows = [dict(s) for s in exact.samples]
    guide = lp.GFlowNetGuide(LM, rank=8, context=lambda i: i.prompt, objective="rao_blackwell")
    guide.fit(scaled, steps=120, batch=24, learning_rate=5e-3, progress=False)
    log_q = guide.log_q(lp.compile(scaled), rows)
    log_posterior = np.array(exact.log_joint) - exact.log_evidence
    assert float((np.exp(log_q) * (log_q - log_posterior)).sum()) < 0.06


def surprising(own: lp.LM, known: bool) -> lp.Program:
    """A program with a latent `w` that was not met when it was compiled."""
    armed = False

    def model() -> None:
        z = lp.sample("z", lp.LMString(own, "a", stop=".", max_tokens=3))
        w = "a"
        if z.count("b") == 1 and armed:
            if known:
                w = lp.sample("w", lp.LMChoice(own, "b", ["a", "b"]))
            else:
                w = "ab"[int(lp.sample("w", dist.Bernoulli(0.3)))]
        lp.sample("y", lp.LMString(own, f"a{z}{w}"), obs="ab")

    program = lp.compile(model)
    armed = True
    assert program.latents == ("z",)
    return program


@pytest.mark.parametrize("known", [True, False])
def test_a_latent_that_was_not_known_is_of_the_whole_draw_alone(known: bool) -> None:
    own = tiny_lm("ab.", seed=1, merged=["ab", "b."], sharpness=0.25)
    program = surprising(own, known)
    w = "b" if known else torch.tensor(1.0)
    rows = [{"z": "ba.", "w": w}, {"z": "ab.", "w": w}, {"z": "ababab"}, {"z": "aa."}]
    executions = program.run([given(row) for row in rows])
    ids = own.encode_prompt("a")
    names = ("z", "w") if known else ("z",)
    contexts = [{n: ids for n in names if n in row} for row in rows]
    (draws,) = make_draws([Batch(program, executions, contexts, prefixes=True)])
    expected = program.log_joint(rows)
    for draw, row, log_joint in zip(draws, rows, expected, strict=True):
        fn, value = draw.parts[0].site.fn, draw.parts[0].site.value
        path = fn.request(value).path
        # A number that the guide does not cover is drawn from the prior, and counts as such.
        less = 0.0 if known or "w" not in row else math.log(0.3)
        assert draw.log_reward == pytest.approx(float(log_joint) - less, abs=1e-5)
        assert [p.site.name for p in draw.parts] == [n for n in names if n in row]
        cuts = [str(prefix_value(fn, path, t)) for t, _, _ in draw.ends[:-1]]
        assert not any(c.count("b") == 1 for c in cuts)
        assert len(cuts) == {"ba.": 0, "ab.": 0, "ababab": 1, "aa.": 1}[value]


@pytest.mark.parametrize("objective", ["auto", "db"])
def test_a_guide_learns_latents_that_were_not_known(objective: str, tmp_path: Path) -> None:
    own = tiny_lm("ab.", seed=1, merged=["ab", "b."], sharpness=0.25)
    program = surprising(own, True)
    truth = lp.infer(program, method="exact", progress=False)
    p = truth.weights
    has = np.array(["w" in row for row in truth.samples])
    assert 0.2 < p[has].sum() < 0.8
    guide = lp.GFlowNetGuide(own, objective=objective, seed=1)

    def divergence() -> float:
        log_q = guide.log_q(program, truth.samples)
        assert np.exp(log_q).sum() == pytest.approx(1.0, abs=1e-4)
        return float(p @ (np.log(p) - log_q))

    before = divergence()
    options: dict[str, Any] = {"batch": 16, "learning_rate": 3e-3, "progress": False}
    guide.fit(program, steps=100, checkpoint=tmp_path, checkpoint_every=50, **options)
    assert divergence() < 0.05 < 0.2 < before
    resumed = lp.GFlowNetGuide(own, objective=objective, seed=1)
    resumed.fit(program, steps=100, checkpoint=tmp_path, checkpoint_every=50, **options)
    assert resumed.history == guide.history


def test_a_guide_survives_a_number_that_was_not_known() -> None:
    own = tiny_lm("ab.", seed=1, merged=["ab", "b."], sharpness=0.25)
    guide = lp.GFlowNetGuide(own, seed=1)
    guide.fit(surprising(own, False), steps=5, batch=8, progress=False)
    assert np.isfinite(guide.history["loss"]).all()


def test_a_static_program_that_is_none_after_all() -> None:
    own = tiny_lm("ab.", seed=1, merged=["ab", "b."], sharpness=0.25)
    program = surprising(own, True)
    program._is_static, program.templates = True, tuple(program.sites.values())
    guide = lp.GFlowNetGuide(own, seed=1)
    with pytest.warns(lp.StaticMismatchWarning):
        guide.fit(program, steps=8, batch=8, progress=False)
