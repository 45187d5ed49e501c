"""A model that catches everything does not catch what stops its executions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

import langppl as lp
from langppl.program.execution import Choice, Execution, Pause, run_once
from langppl.testing import tiny_lm

LM = tiny_lm("ab. ", merged=["ab", "b.", ".."], split=["é"])


def plain() -> None:
    z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
    lp.sample("y", lp.LMString(LM, f"a{z}"), obs="ab")


def goes_on() -> None:
    try:
        z: str = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
    except:  # noqa: E722
        z = "b"
    lp.sample("y", lp.LMString(LM, f"a{z}"), obs="ab")


def raises() -> None:
    try:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
    except BaseException as error:
        raise ValueError("no z") from error
    lp.sample("y", lp.LMString(LM, f"a{z}"), obs="ab")


def leaves() -> None:
    with contextlib.suppress(BaseException):
        plain()


MODELS = [goes_on, raises, leaves]


@pytest.mark.parametrize("model", MODELS)
def test_the_evidence_is_that_of_the_model_without_the_handler(model: Callable[[], None]) -> None:
    expected = lp.infer(plain, method="exact", progress=False).log_evidence
    assert expected == pytest.approx(-1.6444, abs=1e-3)
    found = lp.infer(model, method="exact", progress=False)
    assert found.log_evidence == pytest.approx(expected, abs=1e-4)

    options = {"method": "smc", "num_samples": 30, "seed": 1, "progress": False}
    one, two = (lp.infer(m, **options) for m in (plain, model))
    assert [s["z"] for s in one.samples] == [s["z"] for s in two.samples]
    assert one.log_evidence == pytest.approx(two.log_evidence, abs=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_it_has_stopped_where_it_was_stopped_first(model: Callable[[], None]) -> None:
    def pause(name: str, fn: Any, execution: Execution) -> Choice:
        try:
            raise KeyError(name)
        except KeyError:
            raise Pause(name, fn) from None

    execution = run_once(model, (), pause)
    assert execution.pause is not None and execution.pause.name == "z"
    assert execution.pause.__traceback__ is execution.pause.__context__ is None
    assert not execution.sites and execution.error is execution.returned is None


def test_a_tool_is_found_though_the_model_catches_what_stops_the_search() -> None:
    asked: list[str] = []

    def tool(text: str) -> str:
        asked.append(text)
        return text.upper()

    def model() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        try:
            found = lp.call("tool", tool, z)
        except:  # noqa: E722
            found = "b"
        lp.factor("f", -float(len(found)))

    program = lp.compile(model)
    assert set(program.graph.edges) >= {("z", "tool"), ("tool", "f")}
    # Run with draws alone: none is a value that was made up.
    assert asked and all(len(LM.encode_text(text)) <= 2 for text in asked)


def test_an_interruption_is_none_of_these() -> None:
    def model() -> None:
        try:
            lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        except:  # noqa: E722
            raise KeyboardInterrupt from None

    def pause(name: str, fn: Any, execution: Execution) -> Choice:
        raise Pause(name, fn)

    with pytest.raises(KeyboardInterrupt):
        run_once(model, (), pause)
