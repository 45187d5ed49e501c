"""Handlers and modules of Pyro's that many executions share."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample

import langppl as lp
from langppl.lm.requests import perform
from langppl.program.scheduler import run
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=2)
XS = torch.tensor([0.3, 1.2, -0.5])
METHODS = {"importance": 60, "smc": 60, "mh": 60}


def text() -> lp.LMString:
    return lp.LMString(LM, "a", stop=".", max_tokens=2)


def observe(loc: torch.Tensor) -> None:
    with pyro.plate("o", 3):
        lp.sample("x", dist.Normal(loc, 1.0), obs=XS)


class Module(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.mu = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self) -> None:
        z = lp.sample("z", text())
        # Twice: within one call it is one site.
        observe(0.5 * (self.mu + self.mu) + (1.0 if "b" in z else -1.0))


def function() -> None:
    z = lp.sample("z", text())
    mu = lp.sample("mu", dist.Normal(0.0, 1.0))
    observe(mu + (1.0 if "b" in z else -1.0))


class Linear(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.line = PyroModule[torch.nn.Linear](1, 1, bias=False)
        self.line.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))

    def forward(self) -> None:
        z = lp.sample("z", text())
        observe(self.line(torch.tensor([float(len(z))])).squeeze(-1))


def line() -> None:
    z = lp.sample("z", text())
    weight = lp.sample("line.weight", dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
    observe((weight * float(len(z))).squeeze(-1).squeeze(-1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("module", "plain"), [(Module, function), (Linear, line)])
def test_a_module_is_the_function_that_it_calls(module: Any, plain: Any, method: str) -> None:
    options: Any = {"num_samples": METHODS[method], "method": method, "progress": False}
    found, expected = lp.infer(module(), **options), lp.infer(plain, **options)
    assert [dict(s) for s in found.samples] == [dict(s) for s in expected.samples]
    torch.testing.assert_close(
        torch.as_tensor(found.log_weights), torch.as_tensor(expected.log_weights)
    )


def test_the_parameters_of_a_module_leave_no_graph_behind() -> None:
    class Biased(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self) -> None:
            lp.sample("z", text())
            observe(self.bias)

    # torch warns of a number that has a gradient, and warnings are errors here.
    assert lp.infer(Biased(), num_samples=4, progress=False).log_evidence is not None


def test_a_module_within_a_module_that_runs_it() -> None:
    module = Module()

    class Outer(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self) -> tuple[torch.Tensor, list[Any], torch.Tensor]:
            before = self.inner.mu
            found = lp.infer(lambda: module(), num_samples=4, progress=False)
            return before, found.samples, self.inner.mu

    before, samples, after = Outer()()
    assert torch.equal(before, after)
    # The outer call names it after where it is.
    assert len({float(s["inner.mu"]) for s in samples}) == 4


def test_modules_with_parameters_of_their_own() -> None:
    with pyro.settings.context(module_local_params=True):
        found = lp.infer(Module(), num_samples=20, progress=False)
    expected = lp.infer(function, num_samples=20, progress=False)
    assert [dict(s) for s in found.samples] == [dict(s) for s in expected.samples]


# -- handlers --------------------------------------------------------------------------------------


def same_twice() -> None:
    a = lp.sample("p_0", dist.Normal(0.0, 1.0))
    lp.sample("z", text())
    b = lp.sample("p_1", dist.Normal(0.0, 1.0))
    lp.deterministic("same", bool(a == b))
    lp.sample("x", dist.Normal(a + b, 1.0), obs=torch.tensor(2.0))


@pytest.mark.parametrize("method", ["importance", "mh"])
def test_equalized_sites_are_equal_in_every_execution(method: Any) -> None:
    model = poutine.equalize(same_twice, ["p_.*"])
    found = lp.infer(model, num_samples=1000, method=method, progress=False)
    assert found.probabilities("same") == {True: pytest.approx(1.0)}
    if method == "importance":
        truth = float(dist.Normal(0.0, math.sqrt(5.0)).log_prob(torch.tensor(2.0)))
        assert truth == pytest.approx(-2.124, abs=1e-3)
        error = found.log_evidence_error
        assert error < 0.1 and found.log_evidence == pytest.approx(truth, abs=4 * error)


def chain() -> str:
    z = lp.sample("z", text())
    y = lp.sample("y", lp.LMString(LM, f"b{z}", stop=".", max_tokens=2))
    lp.sample("seen", lp.LMString(LM, f"a{z}{y}"), obs="ab")
    return z + y


def test_a_traced_model_has_a_trace_for_each_execution() -> None:
    traces: list[Any] = []

    def kept() -> str:
        with traced:
            returned = chain()
            traces.append(traced.trace)
        return returned

    traced = poutine.trace()
    options: Any = {"num_samples": 8, "progress": False}
    expected = lp.infer(chain, **options)
    assert lp.infer(poutine.trace(chain), **options).samples == expected.samples
    program = lp.compile(kept)
    traces.clear()
    lp.infer(program, **options)
    assert len({id(t) for t in traces}) == len(traces) == 8
    assert all({"z", "y", "seen"} == set(t.nodes) for t in traces)


class Counting(poutine.messenger.Messenger):
    """Counts the sites of a run."""

    def __enter__(self) -> Any:
        self.count = 0
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        self.count += 1


def test_a_handler_of_the_users_own_counts_the_sites_of_its_run() -> None:
    counting, counts = Counting(), []

    def model() -> None:
        with counting:
            z = lp.sample("z", text())
            # Some executions meet more sites than others.
            for k in range(len(z)):
                lp.sample(f"y_{k}", text())
            counts.append((counting.count, 1 + len(z)))

    lp.infer(model, num_samples=16, progress=False)
    assert len({n for _, n in counts}) > 1
    assert all(found == expected for found, expected in counts)


def test_what_a_handler_around_the_inference_holds_is_left_alone() -> None:
    counting, inner = Counting(), []

    def task() -> None:
        with counting:
            perform(text().pending("ab").requests)
            inner.append(counting.count)

    with counting:
        counting.count = 7
        run([task] * 3)
        assert counting.count == 7
    assert inner == [0, 0, 0]
