"""Rewards of prefixes: those of the program, of every k-th prefix, all from one pass of the LM."""

from typing import Any

import numpy as np
import pytest
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
