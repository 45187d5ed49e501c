"""Executions share a batch and nothing else."""

from __future__ import annotations

import contextlib
import gc
import io
import sys
import traceback
import warnings
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine
import pytest
import torch
from greenlet import greenlet
from pyro.poutine import runtime

import langppl as lp
from langppl.lm import requests
from langppl.lm.requests import DrawRequest, ScoreRequest
from langppl.program import scheduler
from langppl.program.execution import Execution
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)


def short(prompt: str = "a", tokens: int = 3) -> lp.LMString:
    return lp.LMString(LM, prompt, max_tokens=tokens)


def ask(prompt: str = "a", value: str = "ab") -> float:
    """Waits once for the LM."""
    return float(short(prompt).log_prob(value))


def ambient() -> tuple[Any, ...]:
    return (
        list(runtime._PYRO_STACK),
        list(runtime._DIM_ALLOCATOR._stack),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_rng_state().tolist(),
    )


# -- results and batches -------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_tasks() -> None:
    def task(k: int) -> tuple[int, float]:
        for _ in range(k % 3):
            ask()
        return k, ask("a" * (k + 1))

    found = scheduler.run([lambda k=k: task(k) for k in range(5)])

    assert [k for k, _ in found] == [0, 1, 2, 3, 4]
    alone = [ask("a" * (k + 1)) for k in range(5)]
    np.testing.assert_allclose([v for _, v in found], alone, atol=1e-5)


def test_no_tasks() -> None:
    assert scheduler.run([]) == []


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[type]]:
    served: list[list[type]] = []

    def serve(wanted: Sequence[requests.Request]) -> list[requests.Reply]:
        served.append([type(r) for r in wanted])
        return requests.serve(wanted)

    monkeypatch.setattr(scheduler, "serve", serve)
    return served


def test_whole_runs_are_served_together(batches: list[list[type]]) -> None:
    def whole(k: int) -> list[float]:
        first = scheduler.run([ask] * (1 + k % 2))
        return [*first, ask("b"), *scheduler.run([lambda: ask("a" * (k + 1))] * 2)]

    alone = [whole(k) for k in range(3)]
    batches.clear()
    found = scheduler.run_whole([lambda k=k: whole(k) for k in range(3)])
    # The first runs, what is asked for between the runs, and the second runs.
    assert [len(b) for b in batches] == [4, 3, 6]
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    # What is inside is not whole any more afterwards.
    assert not scheduler._is_inside_whole.get()


def test_an_error_in_a_run_inside_closes_all_of_them() -> None:
    before, closed = ambient(), []

    def waiting() -> float:
        try:
            return ask()
        except BaseException as error:
            closed.append(type(error).__name__)
            raise

    def failing() -> float:
        ask()
        ask()
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        scheduler.run_whole(
            [lambda: scheduler.run([failing]), lambda: [ask(), *scheduler.run([waiting] * 2)]]
        )
    assert closed == ["GreenletExit"] * 2
    assert ambient() == before


def test_requests_of_all_executions_are_served_together(batches: list[list[type]]) -> None:
    def model() -> None:
        x = lp.sample("x", short())
        y = lp.sample("y", short(x + "a"))
        lp.sample("seen", lp.LMString(LM, y + "b"), obs="a")

    program = lp.compile(model)
    batches.clear()

    lp.infer(program, num_samples=7)

    # All x, then all y, then the observations; what the prior drew is not scored again.
    assert batches == [[DrawRequest] * 7, [DrawRequest] * 7, [ScoreRequest] * 7]


def test_executions_of_different_lengths_leave_the_batch(batches: list[list[type]]) -> None:
    def task(k: int) -> None:
        for _ in range(k):
            ask()

    scheduler.run([lambda k=k: task(k) for k in (3, 1, 2)])

    assert [len(b) for b in batches] == [3, 2, 1]


def test_a_static_program_is_scored_in_one_batch(
    batches: list[list[type]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def model() -> None:
        x = lp.sample("x", short())
        lp.sample("seen", lp.LMString(LM, x + "b"), obs="a")

    program = lp.compile(model)
    assert program.is_static
    batches.clear()
    directly: list[int] = []
    serve = requests.serve

    def counted(wanted: Sequence[requests.Request]) -> list[requests.Reply]:
        directly.append(len(wanted))
        return serve(wanted)

    monkeypatch.setattr(requests, "serve", counted)
    program.log_joint([{"x": "a"}, {"x": "b"}, {"x": "ab"}])

    # From the templates, with no execution waiting; the row check asks the LM for nothing.
    assert batches == []
    assert directly == [6]


# -- errors --------------------------------------------------------------------------------------


class ModelError(Exception):
    pass


def deep_inside_the_model(z: str) -> None:
    raise ModelError(f"no good: {len(z)}")


def failing_model() -> None:
    z = lp.sample("z", short())
    deep_inside_the_model(z)


def test_an_error_reaches_the_user_once_with_the_models_own_frames() -> None:
    with pytest.raises(ModelError, match="no good") as caught:
        scheduler.run([failing_model, failing_model, lambda: ask()])

    assert type(caught.value) is ModelError
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    functions = [f.name for f in traceback.extract_tb(caught.value.__traceback__)]
    assert functions.count("failing_model") == 1
    assert functions[-1] == "deep_inside_the_model"
    assert "".join(traceback.format_exception(caught.value)).count("ModelError: no good") == 1


def test_an_error_in_infer_has_the_models_own_frames() -> None:
    ran = 0

    def model() -> None:
        nonlocal ran
        lp.sample("z", short())
        ran += 1
        if ran > 60:
            deep_inside_the_model("abc")

    before = ambient()
    program = lp.compile(model)
    assert ran <= 60
    with pytest.raises(ModelError, match="no good: 3") as caught:
        lp.infer(program, num_samples=200)

    functions = [f.name for f in traceback.extract_tb(caught.value.__traceback__)]
    assert functions[-2:] == ["model", "deep_inside_the_model"]
    assert ambient() == before


def test_only_the_first_error_is_raised_and_the_others_do_not_go_on() -> None:
    went_on: list[int] = []

    def task(k: int) -> None:
        ask()
        went_on.append(k)
        if k == 1:
            raise ModelError("one")
        ask()

    with pytest.raises(ModelError, match="one"):
        scheduler.run([lambda k=k: task(k) for k in range(4)])

    assert went_on == [0, 1]


def test_finally_blocks_of_the_other_executions_run() -> None:
    closed: list[tuple[int, int, bool]] = []

    def task(k: int) -> None:
        with pyro.poutine.block(), torch.no_grad():
            try:
                ask()
                if k == 2:
                    raise ModelError("two")
                ask()
            finally:
                # Each is closed with its own ambient state in place.
                closed.append((k, len(runtime._PYRO_STACK), torch.is_grad_enabled()))

    with pytest.raises(ModelError, match="two"):
        scheduler.run([lambda k=k: task(k) for k in range(4)])

    assert sorted(closed) == [(0, 1, False), (1, 1, False), (2, 1, False), (3, 1, False)]
    assert runtime._PYRO_STACK == [] and torch.is_grad_enabled()


def test_an_error_in_the_lm_closes_every_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []

    def serve(_: Any) -> Any:
        raise RuntimeError("out of memory")

    def task(k: int) -> None:
        try:
            ask()
        finally:
            closed.append(k)

    monkeypatch.setattr(scheduler, "serve", serve)
    before = ambient()

    with pytest.raises(RuntimeError, match="out of memory"):
        scheduler.run([lambda k=k: task(k) for k in range(3)])

    assert sorted(closed) == [0, 1, 2]
    assert ambient() == before


def test_an_interrupt_closes_every_execution() -> None:
    closed: list[int] = []

    def task(k: int) -> None:
        try:
            ask()
            raise KeyboardInterrupt
        finally:
            closed.append(k)

    before = ambient()
    with pytest.raises(KeyboardInterrupt):
        scheduler.run([lambda k=k: task(k) for k in range(3)])

    assert sorted(closed) == [0, 1, 2]
    assert ambient() == before


@pytest.mark.parametrize("comes", ["before", "after"])
def test_an_interrupt_of_a_switch_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, comes: str
) -> None:
    install = scheduler._Ambient.install
    done, stops_at = 0, -1

    def interrupted(self: Any) -> None:
        nonlocal done
        done += 1
        if done == stops_at and comes == "before":
            raise KeyboardInterrupt
        install(self)
        if done == stops_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(scheduler._Ambient, "install", interrupted)
    closed: list[int] = []

    def task(k: int) -> None:
        try:
            uses_everything()
        finally:
            closed.append(k)

    handler = pyro.poutine.block()
    with handler:
        before = ambient()
        scheduler.run([lambda k=k: task(k) for k in range(2)])
        switches = done
        for stops_at in range(1, switches + 1):
            closed.clear()
            done = 0
            with pytest.raises(KeyboardInterrupt):
                scheduler.run([lambda k=k: task(k) for k in range(2)])
            assert ambient() == before, stops_at
            # The first interrupts come before the executions have begun.
            assert sorted(closed) == [0, 1][: stops_at // 2], stops_at
    assert pyro.sample("free", dist.Delta(torch.tensor(1.0))) == 1.0


def test_a_failing_close_leaves_no_other_execution_open() -> None:
    closed: list[int] = []

    def task(k: int) -> None:
        try:
            ask()
            raise RuntimeError("out of memory")
        finally:
            closed.append(k)
            if k == 1:
                raise ModelError

    before = ambient()
    with pytest.raises(ModelError):
        scheduler.run([lambda k=k: task(k) for k in range(3)])

    assert sorted(closed) == [0, 1, 2]
    assert ambient() == before


# -- ambient state -------------------------------------------------------------------------------


def uses_everything() -> None:
    with torch.no_grad(), pyro.poutine.trace(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in pyro.plate("plate", 2):
            torch.rand(3)
            ask()
        with pyro.plate("vectorised", 3):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0))
            ask()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_pyros_and_torchs_state_is_what_it_was(grad: bool, fails: bool) -> None:
    def last() -> None:
        ask()
        ask()
        if fails:
            raise ModelError

    torch.manual_seed(3)
    handler = pyro.poutine.block()
    with handler, torch.set_grad_enabled(grad):
        before = ambient()
        assert before[0] == [handler]
        if fails:
            with pytest.raises(ModelError):
                scheduler.run([uses_everything, uses_everything, last])
        else:
            scheduler.run([uses_everything, uses_everything, last])
        assert ambient() == before


def test_executions_start_on_an_empty_stack() -> None:
    found: list[int] = []
    with pyro.poutine.block():
        scheduler.run([lambda: found.append(len(runtime._PYRO_STACK))])

    assert found == [0]


def test_no_grad_around_a_waiting_request_does_not_leak() -> None:
    seen: dict[str, list[bool]] = {"inside": [], "outside": []}

    def inside() -> None:
        with torch.no_grad():
            for _ in range(3):
                ask()
                seen["inside"].append(torch.is_grad_enabled())

    def outside() -> None:
        for _ in range(3):
            seen["outside"].append(torch.is_grad_enabled())
            ask()

    scheduler.run([inside, outside, inside])

    assert seen == {"inside": [False] * 6, "outside": [True] * 3}
    assert torch.is_grad_enabled()


def test_handlers_around_a_waiting_request_do_not_leak() -> None:
    def with_handler() -> float:
        with pyro.poutine.condition(data={"x": torch.tensor(5.0)}):
            ask()
            return float(pyro.sample("x", dist.Normal(0.0, 0.001)))

    def without() -> float:
        ask()
        return float(pyro.sample("x", dist.Normal(0.0, 0.001)))

    found = scheduler.run([with_handler, without, with_handler])

    assert found[0] == found[2] == 5.0
    assert abs(found[1]) < 1.0


def test_vectorised_plates_around_a_waiting_request_do_not_leak() -> None:
    def task() -> tuple[int, ...]:
        with pyro.plate("rows", 3):
            ask()
            return tuple(pyro.sample("x", dist.Normal(0.0, 1.0)).shape)

    # On a shared allocator the second would be told that the dimension is taken.
    assert scheduler.run([task, task]) == [(3,), (3,)]


def test_context_variables_are_each_executions_own() -> None:
    who: ContextVar[str] = ContextVar("who", default="nobody")
    who.set("outside")

    def task(name: str) -> list[str]:
        found = [who.get()]
        who.set(name)
        ask()
        return [*found, who.get()]

    assert scheduler.run([lambda: task("first"), lambda: task("second")]) == [
        ["outside", "first"],
        ["outside", "second"],
    ]
    assert who.get() == "outside"


def test_random_numbers_of_one_execution_do_not_depend_on_the_others() -> None:
    def task(between: int) -> list[float]:
        found = torch.rand(2).tolist()
        for _ in range(between):
            ask()
        return [*found, *torch.rand(2).tolist()]

    torch.manual_seed(5)
    alone = scheduler.run([lambda: task(1)])[0]
    torch.manual_seed(5)
    together = scheduler.run([lambda: task(2), lambda: task(1), lambda: task(0)])

    assert together[1] == alone


# -- nothing is left behind ----------------------------------------------------------------------


class Big:
    pass


def alive_of(kind: type) -> int:
    gc.collect()
    # By type(): isinstance() asks lazy objects of other libraries for their class.
    return sum(issubclass(type(o), kind) for o in gc.get_objects())


@pytest.mark.parametrize("fails", [True, False])
def test_executions_are_collected(fails: bool) -> None:
    alive: list[weakref.ref[Big]] = []

    def task(k: int) -> None:
        big = Big()
        alive.append(weakref.ref(big))
        with pyro.poutine.trace():
            ask()
            if fails and k == 1:
                raise ModelError
            ask()
        assert big is not None

    before = alive_of(greenlet)
    with contextlib.suppress(ModelError):
        scheduler.run([lambda k=k: task(k) for k in range(4)])

    assert alive_of(greenlet) == before
    assert len(alive) == 4
    assert [ref() for ref in alive] == [None] * 4


def test_executions_of_a_program_are_collected() -> None:
    def model() -> None:
        lp.sample("x", short())
        lp.sample("seen", short("b"), obs="a")

    before = alive_of(Execution), alive_of(greenlet)
    posterior = lp.infer(model, num_samples=16)

    assert (alive_of(Execution), alive_of(greenlet)) == before
    assert posterior.num_samples == 16


# -- inference within a model --------------------------------------------------------------------


def test_infer_within_a_model() -> None:
    def inner(prompt: str) -> None:
        y = lp.sample("y", short(prompt, 2))
        lp.sample("seen", lp.LMString(LM, y + "a"), obs="b")

    def evidence(prompt: str) -> float:
        return lp.infer(inner, prompt, method="exact").log_evidence

    def outer() -> float:
        x = lp.sample("x", lp.LMChoice(LM, "a", ["a", "b"]))
        lp.factor("nested", evidence(str(x)))
        return evidence(str(x))

    posterior = lp.infer(outer, num_samples=12, method="importance")

    for sample, weight, returned in zip(
        posterior.samples, posterior.log_weights, posterior.returns or [], strict=True
    ):
        assert weight == pytest.approx(evidence(sample["x"]), abs=1e-4)
        assert returned == pytest.approx(evidence(sample["x"]), abs=1e-4)
    assert {str(s["x"]) for s in posterior.samples} == {"a", "b"}
    assert runtime._PYRO_STACK == []


def test_an_error_in_an_inner_inference_reaches_the_user() -> None:
    def outer() -> None:
        lp.sample("x", lp.LMChoice(LM, "a", ["a", "b"]))
        lp.infer(lambda: None, num_samples=3)

    with pytest.raises(ValueError, match="the model returned without meeting a site"):
        lp.infer(outer, num_samples=3)
    assert runtime._PYRO_STACK == []


# -- what else is ambient ------------------------------------------------------------------------


def python_ambient() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        warnings.filters,
        list(warnings.filters),
        warnings.showwarning,
        sys.stdout,
        sys.stderr,
    )


def test_executions_have_their_own_float_type_filters_and_output() -> None:
    def with_dtype() -> list[Any]:
        torch.set_default_dtype(torch.float64)
        found = [torch.ones(1).dtype]
        ask()
        return [*found, torch.ones(1).dtype]

    def with_filters() -> list[Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.warn("one", stacklevel=1)
            ask()
            warnings.warn("two", stacklevel=1)
        return [str(w.message) for w in caught]

    def with_output() -> list[Any]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            print("one")
            ask()
            print("two")
            print("three", file=sys.stderr)
        return [out.getvalue(), err.getvalue()]

    def plain() -> list[Any]:
        seen = [python_ambient()]
        ask()
        ask()
        warnings.simplefilter("ignore")
        return [*seen, python_ambient()]

    before = python_ambient()
    found = scheduler.run([with_dtype, with_filters, with_output, plain])
    assert found[0] == [torch.float64] * 2
    assert found[1] == ["one", "two"]
    assert found[2] == ["one\ntwo\n", "three\n"]
    assert found[3][0] == before and found[3][1][2][1:] == before[2]
    assert python_ambient() == before


def test_they_are_what_they_were_after_an_inference_that_was_paused() -> None:
    def model() -> None:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.set_default_dtype(torch.float64)
            z = lp.sample("z", short())
            lp.sample("y", short(f"a{z}"), obs="ab")

    before = python_ambient()
    for method in ("importance", "smc"):
        lp.infer(model, method=method, num_samples=4, progress=False)
        assert python_ambient() == before


def test_inference_mode_within_a_model_is_an_error_that_names_the_site() -> None:
    def model() -> None:
        with torch.inference_mode():
            z = lp.sample("z", short())
        lp.sample("y", short(f"a{z}"), obs="ab")

    with pytest.raises(RuntimeError, match=r"site 'z': .*do not wrap lp.sample in torch.inference"):
        lp.infer(model, num_samples=2, progress=False)
    assert not torch.is_inference_mode_enabled()

    def outside() -> None:
        z = lp.sample("z", short())
        with torch.inference_mode():
            torch.ones(2).sum()
        lp.sample("y", short(f"a{z}"), obs="ab")

    with torch.inference_mode():
        assert len(lp.infer(outside, num_samples=2, progress=False).samples) == 2
