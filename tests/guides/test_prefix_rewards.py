"""Rewards of prefixes: those of the program, of every k-th prefix, all from one pass of the LM."""

from typing import Any

import numpy as np
import pytest

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
