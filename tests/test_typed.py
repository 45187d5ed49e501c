"""A user's programs as a type checker sees them: they run here, and `make lint` has mypy read them.

`assert_type` does nothing in a run; to mypy it is a claim, as is each `type: ignore` that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from typing_extensions import assert_type

import langppl as lp
from langppl.guides import Choice, Chooser, Execution, Key, draw_prior, raw_log_prob

LM = lp.testing.tiny_lm()


def test_a_site_has_the_type_of_what_is_drawn() -> None:
    def model(ending: str | None = None) -> str:
        string = lp.LMString(LM, "a", max_tokens=2)
        assert_type(lp.sample("string", string), lp.Text)
        assert_type(lp.sample("choice", lp.LMChoice(LM, "a", ["a", "b"]), obs="b"), lp.Text)
        assert_type(lp.sample("tempered", lp.Tempered(string, 0.5)), lp.Text)
        assert_type(lp.sample("beta", dist.Beta(1.0, 1.0)), torch.Tensor)
        assert_type(lp.sample("index", dist.Categorical(torch.ones(2))), torch.Tensor)
        assert_type(lp.sample("vector", dist.Dirichlet(torch.ones(2)), obs=None), torch.Tensor)
        base: dist.Distribution = string  # what is drawn from it may be of either kind
        drawn: str = lp.sample("base", base)
        lp.sample("ending", lp.LMString(LM, f"a{drawn}"), obs=ending)
        return drawn

    assert lp.compile(model, "b").observed == ("choice", "ending")


def test_numbers_of_all_kinds_are_observed_and_weigh() -> None:
    def model() -> None:
        normal = dist.Normal(0.0, 1.0)
        lp.sample("int", normal, obs=1)
        lp.sample("numpy's float", normal, obs=np.float32(1.0))
        lp.sample("numpy's integer", dist.Categorical(torch.ones(3)), obs=np.int64(1))
        lp.sample("numpy's truth", dist.Bernoulli(0.5), obs=np.bool_(True))
        vector = dist.Dirichlet(torch.ones(2))
        lp.sample("array", vector, obs=np.array([0.5, 0.5]))
        lp.sample("list", vector, obs=[0.5, 0.5])
        lp.sample("tuple", vector, obs=(np.float32(0.5), 0.5))
        lp.factor("numpy", np.float32(-1.0))
        lp.factor("of integers", np.int64(-1))
        lp.factor("condition", -math.inf if np.pi < 3 else 0)
        lp.potential("potential", lambda t: np.float32(len(t)), "a", prefix=lambda t: np.int64(-1))

    assert lp.compile(model).log_joint({}).isfinite()

    def grown() -> None:
        lp.sample("z", lp.LMString(LM, "a", max_tokens=2))

    for method in ("importance", "mh"):  # names come from anywhere
        lp.infer(grown, method=method, num_samples=2)
    for twist in (lambda site, text: np.float32(0.0), lambda site, text: torch.tensor(0.0)):
        lp.infer(grown, method="smc", num_samples=2, twist=twist)


def test_what_is_no_distribution_is_refused() -> None:
    with pytest.raises(TypeError, match="needs a distribution"):
        lp.sample("site", "a string")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="torch's own"):
        lp.sample("site", torch.distributions.Laplace(0.0, 1.0))  # type: ignore[call-overload]


def test_a_changed_model_has_the_types_of_the_model() -> None:
    def model(beginning: str, n: int = 2) -> str:
        return lp.sample("z", lp.LMString(LM, beginning, max_tokens=n))

    def text() -> str:
        return lp.condition(model, {"z": "ab"})("a", n=3) + lp.do(model, {"z": "b"})("a")

    assert lp.infer(text, num_samples=1).returns == ["abb"]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        lp.condition(model, {"z": "ab"})()  # type: ignore[call-arg]


def test_a_float_type_may_be_named(tmp_path: Path) -> None:
    lm = lp.testing.tiny_lm()
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    loaded = lp.LM(tmp_path, dtype="bfloat16", device="cpu", progress=False)
    assert next(loaded.model.parameters()).dtype == torch.bfloat16


class Message(TypedDict):
    role: str
    content: str


def test_messages_may_be_typed_dicts_and_have_fields_of_any_form() -> None:
    messages: list[Message] = [{"role": "user", "content": "Hello"}]
    prompt: lp.Prompt = messages
    more: lp.Prompt = [{"role": "user", "content": "Hello", "tool_calls": [1]}]
    assert [lp.LMString(LM, p).prompt for p in (prompt, more)] == [prompt, more]


def test_several_programs_and_callbacks_of_either_kind_of_mapping() -> None:
    def one(ending: str) -> None:
        lp.sample(
            "ending", lp.LMString(LM, lp.sample("z", lp.LMChoice(LM, "a", ["a", "b"]))), ending
        )

    def other(ending: str, n: int) -> None:
        lp.sample(
            "ending", lp.LMString(LM, lp.sample("z", lp.LMChoice(LM, "b", ["a", "b"]))), ending
        )

    def keep(figures: dict[str, float]) -> None:
        figures["seen"] = 1.0

    def end(figures: Mapping[str, float]) -> bool:
        return figures["step"] >= 0

    guide = lp.GFlowNetGuide(LM, rank=1)
    pairs = [(one, [("a",)]), (other, [("b", 2)])]
    for callback in (keep, end):
        guide.fit(pairs, steps=1, batch=2, progress=False, callback=callback)
    programs = [lp.compile(one, "a"), lp.compile(other, "b", 2)]
    assert_type(guide.fit(programs, steps=1, batch=2, progress=False), lp.GFlowNetGuide)


class Cooler(lp.Guide):
    """Draws "z" at a lower temperature."""

    def law(self, program: lp.Program, name: str, fn: Any, execution: Execution) -> lp.LMString:
        return lp.LMString(LM, fn.prompt, max_tokens=2, temperature=0.8)

    def chooser(self, program: lp.Program, key: Key) -> Chooser:
        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            if name != "z":
                return draw_prior(fn, (*key, name))
            value, log_q = self.law(program, name, fn, execution).draw((*key, name))
            return Choice(value, log_q)

        return choose

    def given(self, program: lp.Program, values: Mapping[str, Any]) -> Chooser:
        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            law = self.law(program, name, fn, execution) if name == "z" else fn
            return Choice(values[name], raw_log_prob(law, values[name]))

        return choose


def test_a_guide_of_ones_own_is_typed() -> None:
    def model(ending: str) -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        lp.sample("choice", lp.LMChoice(LM, f"a{z}", ["a", "b"]))
        lp.sample("ending", lp.LMString(LM, f"a{z}"), obs=ending)

    lp.testing.check_log_q(Cooler(), model, "b", samples=4)
    assert_type(list(lp.compile(model, "b").graph.predecessors("ending")), list[str])
