"""The calculator is right and safe, and the sums' model runs, on a tiny LM."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
from examples_of import load
from hypothesis import given, settings
from hypothesis import strategies as st

import langppl as lp
from langppl.guides import PriorGuide
from langppl.testing import tiny_lm

ALPHABET = "0123456789+-=:;\n"

arithmetic: ModuleType = load("arithmetic")


@given(st.lists(st.integers(0, 10**9 - 1), min_size=1, max_size=8), st.data())
def test_the_calculator_is_right(numbers: list[int], data: st.DataObject) -> None:
    signs = data.draw(st.lists(st.sampled_from([1, -1]), min_size=len(numbers)))
    text = "".join(f"{'+' if s > 0 else '-'}{n}" for s, n in zip(signs, numbers, strict=False))
    expected = sum(s * n for s, n in zip(signs, numbers, strict=False))
    assert arithmetic.calculate(f"{text.removeprefix('+')}=") == expected


@given(st.text(alphabet="0123456789+-*/=;() _.e\n٣²", max_size=12))
def test_the_calculator_takes_sums_alone(text: str) -> None:
    numbers = text.removesuffix("=").removeprefix("-").replace("-", "+").split("+")
    is_sum = text.endswith("=") and all(n.isascii() and n.isdigit() for n in numbers)
    if is_sum and max(map(len, numbers)) < 10:
        assert isinstance(arithmetic.calculate(text), int)
        return
    with pytest.raises(ValueError, match="the calculator takes a sum"):
        arithmetic.calculate(text)


@pytest.mark.parametrize(
    "text", ["", "=", "-=", "1+=", "1==", "1+1", "+1=", "__import__('os')=", "9**9**9=", "1" * 10]
)
def test_what_the_calculator_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="the calculator takes a sum"):
        arithmetic.calculate(text)


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_the_worked_steps_of_a_sum_come_to_its_answer(seed: int) -> None:
    for problem in arithmetic.make_sums((3, 4, 5), 6, seed):
        total = ""
        *steps, end = problem.steps.values()
        for step in steps:
            total = str(arithmetic.calculate(f"{total}{step}"))
        assert (int(total), end) == (problem.answer, ";")


def test_the_model_runs_and_weighs_the_answer() -> None:
    solver = arithmetic.Solver(tiny_lm(ALPHABET))
    problems = arithmetic.make_sums((3, 4), 4, seed=0)
    programs = solver.programs(problems)
    assert all(p.graph is programs[0].graph for p in programs)
    for problem, program in zip(problems, programs, strict=True):
        worked = float(program.log_joint(problem.steps))
        wrong = {**problem.steps, "step 0": "0+0=" if problem.question[0] != "0" else "1+1="}
        free = lp.compile(solver.model, problem.question, like=programs[0])
        assert worked == pytest.approx(float(free.log_joint(problem.steps)))
        total = ""
        for step in list(wrong.values())[:-1]:
            total = str(arithmetic.calculate(f"{total}{step}"))
        prior = float(free.log_joint(wrong))
        expected = prior if int(total) == problem.answer else -math.inf
        assert float(program.log_joint(wrong)) == pytest.approx(expected)
        assert math.isfinite(worked)


def test_a_guide_imitates_and_is_refined() -> None:
    lm = tiny_lm(ALPHABET)
    solver = arithmetic.Solver(lm)
    problems = arithmetic.make_sums((3,), 4, seed=1)
    guide = lp.GFlowNetGuide(lm, context=arithmetic.without_shots, rank=4)
    arithmetic.imitate(guide, solver, problems, 30, learning_rate=2e-2, progress=False)
    assert guide.history["loss"][-1] < guide.history["loss"][0] - 2.0
    arithmetic.refine(guide, solver, problems, 2, progress=False)
    drawn = solver.draw(guide, problems[:2], 3, seed=0)
    assert [len(d) for d in drawn] == [3, 3]
    assert drawn[0][0].startswith(f"{problems[0].question}:")
    before = solver.draw(PriorGuide(), problems[:1], 2, seed=0)
    found = arithmetic.figures(problems[:1], before)
    assert 0.0 <= found["one"] <= 1.0 <= found["distinct"] <= 2.0


def test_what_was_imitated_is_the_prior(tmp_path: Path) -> None:
    lm = tiny_lm(ALPHABET)
    problems = arithmetic.make_sums((3, 4), 6, seed=2)
    guide = lp.GFlowNetGuide(lm, context=arithmetic.without_shots, rank=4)
    arithmetic.imitate(
        guide, arithmetic.Solver(lm), problems, 5, learning_rate=2e-2, progress=False
    )
    guide.save(tmp_path)
    solver = arithmetic.learned(lm, tmp_path)
    for problem, program in zip(problems, solver.programs(problems), strict=True):
        (log_q,) = guide.log_q(program, [problem.steps])
        assert float(program.log_joint(problem.steps)) == pytest.approx(float(log_q), abs=1e-4)
        (before,) = arithmetic.Solver(lm).programs([problem])
        assert abs(float(before.log_joint(problem.steps)) - float(log_q)) > 0.1
    arithmetic.refine(guide, solver, problems, 2, progress=False)
    after = float(solver.programs(problems[:1])[0].log_joint(problems[0].steps))
    (program,) = solver.programs(problems[:1])
    assert after != pytest.approx(float(guide.log_q(program, [problems[0].steps])[0]), abs=1e-6)


def test_what_a_guide_reads_never_shows_the_answer() -> None:
    solver = arithmetic.Solver(tiny_lm(ALPHABET))
    read = []

    def context(info: lp.guides.ContextInfo) -> str:
        read.append(arithmetic.without_shots(info))
        return read[-1]

    problem = arithmetic.Sum("4+5-2", 7)
    (program,) = solver.programs([problem])
    guide = lp.GFlowNetGuide(solver.lm, context=context)
    guide.log_q(program, [problem.steps])
    assert read == ["4+5-2:", "4+5-2:4+5=9", "4+5-2:4+5=9-2=7"]
    labelled = {**problem.steps, "step 0": "0+0=", "step 1": "+0="}
    read.clear()
    guide.log_q(program, [labelled])
    assert "7" not in "".join(read)


def test_figures_of_a_vote() -> None:
    problems = [arithmetic.Sum("1+2-3", 0)]
    drawn = [["1+2-3:1+2=3-3=0;", "1+2-3:0-0=0;", "1+2-3:1+2=3;", "1+2-3:1+2=3-3=0"]]
    assert arithmetic.figures(problems, drawn) == {
        "one": 0.5,
        "vote": 1.0,
        "distinct": 4.0,
        "right distinct": 2.0,
    }
