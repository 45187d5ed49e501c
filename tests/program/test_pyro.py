"""Pyro's own tools on langppl models."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pyro.infer
import pyro.poutine as poutine
import pytest
import torch
from pyro.poutine import runtime

import langppl as lp
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)


def short(prompt: str = "a", tokens: int = 3) -> lp.LMString:
    return lp.LMString(LM, prompt, max_tokens=tokens)


def goes_on(prompt: str) -> lp.LMString:
    return lp.LMString(LM, prompt)


def model(ending: str) -> str:
    p = lp.sample("p", dist.Beta(2.0, 3.0))
    x = lp.sample("x", short("a"))
    mood = lp.sample("mood", lp.LMChoice(LM, x, ["a", "b"]))
    y = lp.sample("y", lp.Tempered(short(f"{mood}b"), 0.5))
    lp.call("size", len, y)
    lp.factor("bonus", -p)
    lp.sample("ending", goes_on(x + y), obs=ending)
    return x + y


PROGRAM = lp.compile(model, "a.")
LATENTS = ("p", "x", "mood", "y")


def traced(fn: Any, *args: Any) -> Any:
    with poutine.trace() as tracer:
        fn(*args)
    return tracer.trace


def latents_of(trace: Any) -> dict[str, Any]:
    return {name: trace.nodes[name]["value"] for name in LATENTS}


@pytest.mark.parametrize("seed", range(5))
def test_trace(seed: int) -> None:
    torch.manual_seed(seed)
    trace = traced(model, "a.")

    assert [n for n, d in trace.nodes.items() if d["type"] == "sample"] == [
        "p", "x", "mood", "y", "y/tempered", "size", "bonus", "ending",
    ]  # fmt: skip
    assert isinstance(trace.nodes["x"]["value"], lp.Text)
    assert trace.nodes["ending"]["is_observed"]
    expected = float(PROGRAM.log_joint(latents_of(trace)))
    assert math.isfinite(expected)
    assert float(trace.log_prob_sum()) == pytest.approx(expected, abs=1e-4)


def test_get_trace() -> None:
    trace = poutine.trace(model).get_trace("a.")

    assert trace.nodes["_RETURN"]["value"] == trace.nodes["x"]["value"] + trace.nodes["y"]["value"]
    assert float(trace.log_prob_sum()) == pytest.approx(
        float(PROGRAM.log_joint(latents_of(trace))), abs=1e-4
    )


def test_log_probs_site_by_site() -> None:
    trace = traced(poutine.condition(model, data=dict(GIVEN)), "a.")
    trace.compute_log_prob()

    expected = {
        "p": dist.Beta(2.0, 3.0).log_prob(torch.tensor(0.25)),
        "x": short("a").log_prob("ab"),
        "mood": lp.LMChoice(LM, "ab", ["a", "b"]).log_prob("b"),
        "y": short("bb").log_prob("ba"),
        "y/tempered": short("bb").log_prob("ba"),
        "size": torch.tensor(0.0),
        "bonus": torch.tensor(-0.25),
        "ending": goes_on("abba").log_prob("a."),
    }
    found = {n: float(trace.nodes[n]["log_prob_sum"]) for n in expected}
    assert found == pytest.approx({n: float(v) for n, v in expected.items()}, abs=1e-4)


GIVEN = {"p": torch.tensor(0.25), "x": "ab", "mood": "b", "y": "ba"}


def test_replay() -> None:
    torch.manual_seed(0)
    first = traced(model, "a.")
    torch.manual_seed(1)
    again = traced(poutine.replay(model, trace=first), "a.")

    assert latents_of(again) == latents_of(first)
    assert again.nodes["x"]["value"].ids == first.nodes["x"]["value"].ids
    assert float(again.log_prob_sum()) == pytest.approx(float(first.log_prob_sum()), abs=1e-5)


def test_replay_runs_no_tool() -> None:
    calls: list[str] = []

    def with_tool() -> int:
        z = lp.sample("z", short())
        return lp.call("tool", lambda text: calls.append(text) or len(calls), z)

    with poutine.trace() as tracer:
        returned = with_tool()
    with poutine.replay(trace=tracer.trace):
        assert with_tool() == returned
    assert len(calls) == 1


def test_condition() -> None:
    trace = traced(poutine.condition(model, data=dict(GIVEN)), "a.")

    assert latents_of(trace) == GIVEN
    assert all(trace.nodes[n]["is_observed"] for n in LATENTS)
    assert float(trace.log_prob_sum()) == pytest.approx(float(PROGRAM.log_joint(GIVEN)), abs=1e-4)


def test_pyros_condition_within_langppl() -> None:
    conditioned = lp.compile(poutine.condition(model, data={"x": "ab"}), "a.")

    assert conditioned.latents == ("p", "mood", "y")
    assert "x" in conditioned.observed
    rest = {k: v for k, v in GIVEN.items() if k != "x"}
    assert float(conditioned.log_joint(rest)) == pytest.approx(
        float(PROGRAM.log_joint(GIVEN)), abs=1e-4
    )


def test_block() -> None:
    hidden = poutine.block(poutine.condition(model, data=dict(GIVEN)), hide=["x", "bonus"])
    trace = traced(hidden, "a.")

    assert "x" not in trace.nodes and "bonus" not in trace.nodes
    expected = float(PROGRAM.log_joint(GIVEN) - short("a").log_prob("ab")) + 0.25
    assert float(trace.log_prob_sum()) == pytest.approx(expected, abs=1e-4)


def test_scale() -> None:
    trace = traced(poutine.scale(poutine.condition(model, data=dict(GIVEN)), scale=0.5), "a.")

    expected = 0.5 * float(PROGRAM.log_joint(GIVEN))
    assert float(trace.log_prob_sum()) == pytest.approx(expected, abs=1e-4)
    scaled = lp.compile(poutine.scale(model, scale=0.5), "a.")
    assert float(scaled.log_joint(GIVEN)) == pytest.approx(expected, abs=1e-4)


def test_mask() -> None:
    def masked() -> None:
        x = lp.sample("x", short("a"))
        with poutine.mask(mask=False):
            lp.sample("ignored", goes_on(x), obs="b")

    trace = traced(poutine.condition(masked, data={"x": "ab"}))

    expected = float(short("a").log_prob("ab"))
    assert float(trace.log_prob_sum()) == pytest.approx(expected, abs=1e-4)
    assert float(lp.compile(masked).log_joint({"x": "ab"})) == pytest.approx(expected, abs=1e-4)


def test_infer_config_and_handlers_of_the_users_own() -> None:
    seen: list[str] = []

    class Watch(poutine.messenger.Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            seen.append(msg["name"])

    with Watch(), poutine.trace():
        model("a.")

    assert seen == ["p", "x", "mood", "y", "y/tempered", "size", "bonus", "ending"]


# -- Pyro's inference ----------------------------------------------------------------------------


def small(ending: str) -> str:
    x = lp.sample("x", short("a", 2))
    lp.sample("ending", goes_on(x + "b"), obs=ending)
    return x


def test_importance_agrees_with_exact_inference() -> None:
    torch.manual_seed(0)
    # Without a guide Pyro proposes from the model with its observations kept apart.
    importance = pyro.infer.Importance(small, guide=None, num_samples=600).run("a")
    truth = lp.infer(small, "a", method="exact")

    weights = torch.stack([torch.as_tensor(w) for w in importance.log_weights])
    estimate = weights.logsumexp(0) - math.log(len(weights))
    relative = weights.sub(weights.max()).exp()
    error = float(relative.std() / relative.mean()) / math.sqrt(len(weights))
    assert error < 0.1
    assert float(estimate) == pytest.approx(truth.log_evidence, abs=4 * error)
    for trace, weight in zip(importance.exec_traces[:20], weights, strict=False):
        x = trace.nodes["x"]["value"]
        assert float(weight) == pytest.approx(float(goes_on(x + "b").log_prob("a")), abs=1e-4)


def test_importance_with_a_guide() -> None:
    def guide(ending: str) -> None:
        lp.sample("x", short("b", 2))

    torch.manual_seed(0)
    importance = pyro.infer.Importance(small, guide=guide, num_samples=5).run("a")

    program = lp.compile(small, "a")
    for trace, weight in zip(importance.exec_traces, importance.log_weights, strict=True):
        x = trace.nodes["x"]["value"]
        expected = program.log_joint({"x": x}) - short("b", 2).log_prob(x)
        assert float(weight) == pytest.approx(float(expected), abs=1e-4)


def test_empirical_marginal_refuses_strings() -> None:
    """Documented: Pyro's EmpiricalMarginal stacks tensors, so it takes numeric sites only."""
    torch.manual_seed(0)
    importance = pyro.infer.Importance(model, guide=None, num_samples=5).run("a.")

    with pytest.raises(TypeError, match=r"expected Tensor as element 0 .*, but got Text"):
        pyro.infer.EmpiricalMarginal(importance, sites="x")
    assert 0 < float(pyro.infer.EmpiricalMarginal(importance, sites="p").mean) < 1


# -- after an exception --------------------------------------------------------------------------


class ModelError(Exception):
    pass


def broken() -> None:
    x = lp.sample("x", short("a"))
    with poutine.scale(scale=0.5), torch.no_grad():
        lp.sample("y", short(x + "b"))
        raise ModelError("after y")


@pytest.mark.parametrize("grad", [True, False])
def test_after_an_exception_nothing_of_pyros_or_torchs_is_left(grad: bool) -> None:
    assert runtime._PYRO_STACK == []
    with torch.set_grad_enabled(grad):
        with pytest.raises(ModelError, match="after y"):
            lp.infer(broken, num_samples=3)
        assert torch.is_grad_enabled() is grad
        assert runtime._PYRO_STACK == []
        assert runtime._DIM_ALLOCATOR._stack == []

        with pytest.raises(ModelError, match="after y"):
            traced(broken)
        assert torch.is_grad_enabled() is grad
        assert runtime._PYRO_STACK == []
