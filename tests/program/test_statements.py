"""`sample`, `factor`, `call`, `deterministic`, `condition` and `do`."""

from __future__ import annotations

import functools
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine
import pytest
import torch

import langppl as lp
from langppl.lm import requests
from langppl.program import calls, scheduler
from langppl.program.execution import run_many
from langppl.program.keys import size_of
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)


def short(prompt: str = "a", tokens: int = 3, **rules: Any) -> lp.LMString:
    return lp.LMString(LM, prompt, max_tokens=tokens, **rules)


def goes_on(prompt: str) -> lp.LMString:
    return lp.LMString(LM, prompt)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts of all that is asked of the LM."""
    prompts: list[str] = []
    serve = requests.serve

    def noted(wanted: Sequence[requests.Request]) -> list[requests.Reply]:
        prompts.extend(LM.tokenizer.decode(r.prompt) for r in wanted)
        return serve(wanted)

    monkeypatch.setattr(requests, "serve", noted)
    monkeypatch.setattr(scheduler, "serve", noted)
    return prompts


# -- sample --------------------------------------------------------------------------------------


def test_a_drawn_string_is_a_text_with_its_tokens() -> None:
    pyro.set_rng_seed(0)
    value = lp.sample("x", short())

    assert isinstance(value, lp.Text)
    assert value.tokenizer == LM.fingerprint
    assert value.ids is not None
    assert LM.vocabulary.join(value.ids).decode() == value


@pytest.mark.parametrize("write", ["f{}".format, "f%s".__mod__, lambda z: "f" + str(z)])
@pytest.mark.parametrize("temper", [False, True])
def test_a_forgotten_sample_is_no_prompt(write: Callable[[Any], str], temper: bool) -> None:
    plain = lp.LMString(LM, "a", max_tokens=2)
    z = lp.Tempered(plain, 0.5) if temper else plain
    assert str(z) == repr(z)

    def model() -> None:
        lp.sample("y", lp.LMString(LM, write(z)), obs="b")

    with pytest.raises(TypeError, match=r"is a distribution.*draw it with lp.sample\(name, ...\)"):
        lp.compile(model)
    with pytest.raises(TypeError, match="is a distribution"):
        f"{z}"


def test_an_observed_string_is_returned_as_it_is() -> None:
    given = "ab"

    with pyro.poutine.trace():
        assert lp.sample("x", short(), obs=given) is given


def test_a_number_may_be_observed_at_a_numeric_site() -> None:
    with pyro.poutine.trace():
        value = lp.sample("x", dist.Normal(0.0, 1.0), obs=2.5)

    assert isinstance(value, torch.Tensor)
    assert float(value) == 2.5


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_sites_name_is_a_string(name: Any) -> None:
    with pytest.raises(TypeError, match=r"site's name must be a non-empty string, got"):
        lp.sample(name, short())


@pytest.mark.parametrize("flip", [1, True, 1.0, np.int64(1), np.bool_(True), torch.tensor(1.0)])
def test_integers_and_bools_may_be_observed_at_a_numeric_site(flip: Any) -> None:
    def model() -> None:
        p = lp.sample("p", dist.Beta(2.0, 1.0))
        lp.sample("flip", dist.Bernoulli(p), obs=flip)

    # Beta(2, 1) has the density 2p.
    found = lp.compile(model).log_joint({"p": 0.25})
    assert float(found) == pytest.approx(math.log(2 * 0.25 * 0.25), abs=1e-6)


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda v: np.array(v, dtype=int)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays_and_lists_may_be_observed_at_a_numeric_site(kind: Any, dtype: torch.dtype) -> None:
    def model(seen: Any) -> None:
        m = lp.sample("m", dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1))
        lp.sample("seen", dist.Normal(m, 2.0).to_event(1), obs=seen)

    values = [1, -3] if kind not in (list, tuple, np.array) else [0.1, -3.0]
    program = lp.compile(model, kind(values))
    expected = lp.compile(model, torch.tensor(values, dtype=dtype))
    row, tensor = kind([0.5, 1.5]), torch.tensor(kind([0.5, 1.5]), dtype=dtype)
    assert program.sites["seen"].value.dtype == dtype
    assert program.log_joint({"m": row}) == expected.log_joint({"m": tensor})
    assert program.observing({"seen": torch.zeros(2, dtype=dtype)}).shown_args[0].tolist() == [0, 0]


@pytest.mark.parametrize("value", [["a", "b"], [[1.0], [1.0, 2.0]], {"a": 1.0}, np.array(["a"])])
def test_what_is_no_array_of_numbers_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="give a number, a tensor or an array"):
        lp.sample("x", dist.Normal(0.0, 1.0), obs=value)


def test_a_sequential_plate_holds_string_sites() -> None:
    def model() -> None:
        for i in pyro.plate("rows", 3):
            lp.sample(f"x_{i}", short())

    assert lp.compile(model).latents == ("x_0", "x_1", "x_2")


def test_a_vectorised_plate_of_numbers_beside_strings() -> None:
    def model() -> None:
        z = lp.sample("z", short())
        with pyro.plate("rows", 3):
            lp.sample("n", dist.Normal(0.0, 1.0), obs=torch.tensor([0.0, 1.0, 2.0]))
        lp.sample("seen", goes_on(z), obs="a")

    expected = (
        short().log_prob("ab")
        + dist.Normal(0.0, 1.0).log_prob(torch.tensor([0.0, 1.0, 2.0])).sum()
        + goes_on("ab").log_prob("a")
    )

    assert float(lp.compile(model).log_joint({"z": "ab"})) == pytest.approx(
        float(expected), abs=1e-4
    )


# -- factor --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight", [-0.5, torch.tensor(-0.5), torch.tensor([-0.5]), np.float64(-0.5)]
)
def test_factor_adds_its_log_weight(weight: Any) -> None:
    def model() -> None:
        lp.sample("z", short())
        lp.factor("bonus", weight)

    expected = float(short().log_prob("ab")) - 0.5

    assert float(lp.compile(model).log_joint({"z": "ab"})) == pytest.approx(expected, abs=1e-4)


def test_a_factor_of_minus_infinity_makes_an_execution_impossible() -> None:
    def model() -> None:
        z = lp.sample("z", lp.LMChoice(LM, "a", ["a", "b"]))
        if z == "a":
            lp.factor("never", -math.inf)

    posterior = lp.infer(model, num_samples=64)

    assert posterior.probabilities("z") == {"b": pytest.approx(1.0)}
    assert posterior.failed_sites == {"never": sum(s["z"] == "a" for s in posterior.samples)}


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_factor_refuses_what_is_no_log_weight(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"factor 'bonus' is {weight}"):
        lp.factor("bonus", weight)


@pytest.mark.parametrize("truth", [True, False, np.bool_(True), torch.tensor(False)])
def test_a_factor_is_no_condition(truth: Any) -> None:
    with pytest.raises(TypeError, match=r"factor 'bonus' must be a log weight.*else -math.inf"):
        lp.factor("bonus", truth)
    with pytest.raises(TypeError, match=r"potential 'bonus' must be a log weight"):
        lp.potential("bonus", lambda _: truth, "a")


def test_factor_refuses_several_numbers() -> None:
    with pytest.raises(ValueError, match=r"factor 'bonus' must be one number, got shape \(2,\)"):
        lp.factor("bonus", torch.zeros(2))


# -- call ----------------------------------------------------------------------------------------


def test_call_returns_what_the_tool_returns() -> None:
    assert lp.call("tool", lambda a, b: [a, b, None], 1, "x") == [1, "x", None]
    assert lp.call("nothing", lambda: None) is None


def test_a_call_is_remembered_by_name_and_arguments_within_one_inference() -> None:
    calls: list[tuple[str, str]] = []

    def tool(tag: str, text: str) -> int:
        calls.append((tag, str(text)))
        return len(text)

    def model() -> None:
        z = lp.sample("z", lp.LMChoice(LM, "a", ["a", "bb"]))
        n = lp.call("first", tool, "one", z)
        m = lp.call("second", tool, "two", z)
        assert n == m == len(z)
        lp.sample("seen", goes_on("a" * n), obs="b")

    lp.infer(model, num_samples=50)
    assert sorted(calls) == [("one", "a"), ("one", "bb"), ("two", "a"), ("two", "bb")]

    lp.infer(model, num_samples=50)
    assert len(calls) == 8, "another inference evaluates anew"


def test_two_sites_with_equal_arguments_are_two_calls() -> None:
    calls: list[str] = []

    def tool(text: str) -> str:
        calls.append(text)
        return text

    def model() -> None:
        lp.sample("z", short())
        lp.call("first", tool, "x")
        lp.call("second", tool, "x")

    lp.infer(model, num_samples=5)

    assert calls == ["x", "x"]


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.5), ("1", 1), ([1, 2], (1, 2)), ({"a": 1}, {"a": 2}), (torch.tensor(1), 1), (True, 1)],
)
def test_unequal_arguments_are_unequal_calls(one: Any, other: Any) -> None:
    calls: list[Any] = []

    def tool(value: Any) -> int:
        calls.append(value)
        return len(calls)

    def model() -> None:
        z = lp.sample("z", lp.LMChoice(LM, "a", ["a", "b"]))
        lp.call("tool", tool, one if z == "a" else other)

    program = lp.compile(model)
    program.log_joint([{"z": "a"}, {"z": "b"}, {"z": "a"}])

    assert len(calls) == 2


def test_unhashable_arguments_are_compared_by_content() -> None:
    calls: list[Any] = []

    def model() -> None:
        lp.sample("z", short())
        lp.call("tool", calls.append, {"k": [1, {2, 3}], "t": torch.ones(2)})

    lp.infer(model, num_samples=5)

    assert len(calls) == 1


class Counter:
    def __init__(self, text: str) -> None:
        self.text = text

    def size(self) -> int:
        return len(self.text)


TOOLS: dict[str, Callable[[str], int]] = {
    "plain": lambda z: lp.call("size", len, z),
    "lambda": lambda z: lp.call("size", lambda: len(z)),
    "nested": lambda z: lp.call("size", lambda: (lambda: len(z))()),
    "default": lambda z: lp.call("size", lambda text=z: len(text)),
    "by name": lambda z: lp.call("size", lambda *, text: len(text), text=z),
    "partial": lambda z: lp.call("size", functools.partial(len, z)),
    "partial of a lambda": lambda z: lp.call("size", functools.partial(lambda: len(z))),
    "method": lambda z: lp.call("size", Counter(z).size),
    "list": lambda z: lp.call("size", lambda texts=[z]: len(texts[0])),
    "callable": lambda z: lp.call("size", z.__len__),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_tool_is_bound_to_counts(tool: str) -> None:
    def model() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        size = TOOLS[tool](z)
        assert size == len(z)
        lp.factor("f", 3.0 * size)

    def expected() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        lp.factor("f", 3.0 * len(z))

    for method in ("exact", "importance"):
        found = lp.infer(model, method=method, num_samples=40, progress=False)
        right = lp.infer(expected, method=method, num_samples=40, progress=False)
        assert found.log_evidence == pytest.approx(right.log_evidence, abs=1e-6)
        assert found.probabilities("z") == pytest.approx(right.probabilities("z"), abs=1e-6)


def test_a_tool_that_a_model_defines_anew_is_the_same_tool() -> None:
    calls: list[str] = []

    def model() -> None:
        suffix = "!"

        def shout(text: str) -> str:
            calls.append(text)
            return text + suffix

        z = lp.sample("z", lp.LMChoice(LM, "a", ["a", "b"]))
        assert lp.call("tool", shout, z) == f"{z}!"

    lp.infer(model, num_samples=50, progress=False)
    assert sorted(calls) == ["a", "b"]


def test_a_tool_may_call_itself() -> None:
    def model() -> None:
        def down(n: int) -> int:
            return 0 if n == 0 else 1 + down(n - 1)

        z = lp.sample("z", short())
        assert lp.call("tool", down, len(z)) == len(z)

    lp.infer(model, num_samples=5, progress=False)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, set])
def test_an_execution_may_change_what_a_tool_returned(kind: Callable[[Any], Any]) -> None:
    def model() -> float:
        z = lp.sample("z", short())
        found = lp.call("tool", lambda text: kind([1.0, 2.0]), z)
        if isinstance(found, set):
            found.add(len(found))
        elif isinstance(found, list):
            found.append(3.0)
        else:
            found += 1.0
        return float(sum(found))

    assert len(set(lp.infer(model, num_samples=20, progress=False).returns)) == 1


def test_an_impure_tool_is_evaluated_once_for_each_arguments() -> None:
    paid: list[str] = []

    def pay(text: str) -> str:
        paid.append(str(text))
        return text + "b"

    def model() -> None:
        z = lp.sample("z", lp.LMChoice(LM, "a", ["a", "b"]))
        bill = lp.call("bill", pay, z, pure=False)
        lp.sample("seen", goes_on(bill), obs="a")

    lp.infer(model, num_samples=40)
    assert sorted(paid) == ["a", "b"]

    with pytest.raises(
        RuntimeError,
        match=r"call 'bill' was evaluated with .*'[ab]'.* before, and pure=False forbids",
    ):
        lp.infer(model, num_samples=40)
    assert sorted(paid) == ["a", "b"]


def counting(seen: list[str], padding: str = "") -> Callable[[], None]:
    def tool(text: str) -> str:
        seen.append(str(text))
        return f"{text}{padding}"

    def model() -> None:
        lp.call("tool", tool, lp.sample("z", lp.LMString(LM, "a", max_tokens=3)))
        lp.call("once", len, "fixed")

    return model


@pytest.mark.parametrize(
    ("name", "most", "padding"), [("MOST_CALLS", 10, ""), ("MOST_BYTES", 25_000, "b" * 1500)]
)
def test_the_latest_results_of_tools_are_kept(
    monkeypatch: pytest.MonkeyPatch, name: str, most: int, padding: str
) -> None:
    monkeypatch.setattr(calls, name, most)
    seen: list[str] = []
    program = lp.compile(counting(seen, padding))
    for seed in range(6):
        before = len(seen)
        posterior = lp.infer(program, num_samples=64, seed=seed, progress=False)
        # Within an inference nothing is forgotten, however much it is.
        assert len(set(seen[before:])) == len(seen[before:])
        assert len({s["z"] for s in posterior.samples}) > 10
        kept = calls.remembered(program.memo)
        assert len(kept) == 10 if name == "MOST_CALLS" else 5 < len(kept) < 17
        assert any(key[0] == "once" for key in kept)
    before = len(seen)
    last = [str(own.result) for own in kept.values() if isinstance(own.result, str)][-1]
    program.log_joint({"z": last.removesuffix(padding)})
    assert len(seen) == before


def test_results_of_impure_tools_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MOST_CALLS", 0)
    seen: list[str] = []

    def model() -> None:
        z = lp.sample("z", lp.LMChoice(LM, "a", ["a", "b", "."]))
        lp.call("impure", lambda text: seen.append(text), z, pure=False)

    program = lp.compile(model)
    for seed in range(3):
        lp.infer(program, num_samples=40, seed=seed, progress=False)
    assert sorted(seen) == [".", "a", "b"]


def test_of_impure_calls_digests_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_impure", OrderedDict())
    monkeypatch.setattr(calls, "MOST_IMPURE", 4)
    numbers = tuple(range(1000))

    def ask(k: int) -> None:
        lp.call("impure", lambda *_: 0, "long " * 5000, numbers, k, pure=False)

    for k in range(6):
        ask(k)
    assert len(calls._impure) == 4
    assert max(size_of(key) for key in calls._impure) < 2000
    for k in (5, 2):
        with pytest.raises(RuntimeError, match="forbids a second time"):
            ask(k)


def test_an_error_in_a_tool_reaches_the_user() -> None:
    def model() -> None:
        z = lp.sample("z", short())
        lp.call("tool", lambda text: 1 // 0, z)

    with pytest.raises(ZeroDivisionError):
        lp.infer(model, num_samples=5)


# -- deterministic -------------------------------------------------------------------------------


def test_deterministic_records_text_and_numbers_without_a_density() -> None:
    def model() -> tuple[str, int]:
        z = lp.sample("z", short())
        note = lp.deterministic("note", f"<{z}>")
        size = lp.deterministic("size", len(z))
        return note, size

    program = lp.compile(model)
    posterior = lp.infer(program, num_samples=5)

    assert program.latents == ("z",)
    assert float(program.log_joint({"z": "ab"})) == pytest.approx(
        float(short().log_prob("ab")), abs=1e-4
    )
    assert posterior.returns == [(f"<{s['z']}>", len(s["z"])) for s in posterior.samples]


def test_deterministic_in_pyros_trace() -> None:
    def model() -> None:
        z = lp.sample("z", short(), obs="ab")
        assert lp.deterministic("note", z + "!") == "ab!"

    with pyro.poutine.trace() as tracer:
        model()

    node = tracer.trace.nodes["note"]
    assert node["value"].value == "ab!"
    assert float(node["fn"].log_prob(node["value"])) == 0.0


# -- condition and do ----------------------------------------------------------------------------


def chain() -> str:
    x = lp.sample("x", short("a"))
    y = lp.sample("y", short(x + "b"))
    lp.sample("seen", goes_on(x + y), obs="a")
    return y


def test_condition_observes_a_string_latent() -> None:
    program = lp.compile(lp.condition(chain, {"x": "ab"}))

    assert program.latents == ("y",)
    assert program.observed == ("x", "seen")
    expected = (
        short("a").log_prob("ab") + short("abb").log_prob("b.") + goes_on("abb.").log_prob("a")
    )
    assert float(program.log_joint({"y": "b."})) == pytest.approx(float(expected), abs=1e-4)


def test_condition_keeps_a_texts_tokens() -> None:
    lm = tiny_lm("ab", seed=2, merged=["ab"])

    def model() -> None:
        lp.sample("z", lp.LMString(lm, "a", max_tokens=3))

    split = lp.Text("ab", [3, 4], lm.fingerprint)
    found = [float(lp.compile(lp.condition(model, {"z": z})).log_joint({})) for z in (split, "ab")]

    truth = lp.LMString(lm, "a", max_tokens=3)
    assert found == pytest.approx([float(truth.log_prob(z)) for z in (split, "ab")], abs=1e-4)
    assert found[0] != pytest.approx(found[1], abs=0.01)


def test_condition_on_a_number() -> None:
    def model() -> None:
        p = lp.sample("p", dist.Beta(2.0, 2.0))
        lp.sample("flip", dist.Bernoulli(p), obs=1)

    found = lp.compile(lp.condition(model, {"p": 0.25})).log_joint({})

    expected = dist.Beta(2.0, 2.0).log_prob(torch.tensor(0.25)) + math.log(0.25)
    assert float(found) == pytest.approx(float(expected), abs=1e-6)


def test_do_removes_the_site(asked: list[str]) -> None:
    program = lp.compile(lp.do(chain, {"x": "b"}))

    assert program.latents == ("y",)
    assert program.observed == ("seen",)
    assert "x" not in program.graph
    asked.clear()
    found = float(program.log_joint({"y": "a."}))

    expected = short("bb").log_prob("a.") + goes_on("ba.").log_prob("a")
    asked_for = set(asked[: len(asked) - 2])
    assert found == pytest.approx(float(expected), abs=1e-4)
    assert asked_for == {"bb", "ba."}, "no LM call for x"


def test_do_and_condition_differ_by_the_sites_own_density() -> None:
    done = lp.infer(lp.do(chain, {"x": "ab"}), method="exact").log_evidence
    conditioned = lp.infer(lp.condition(chain, {"x": "ab"}), method="exact").log_evidence

    assert conditioned - done == pytest.approx(float(short("a").log_prob("ab")), abs=1e-4)


def test_do_on_an_observed_site_takes_the_observation_away() -> None:
    program = lp.compile(lp.do(chain, {"seen": "bb"}))

    assert program.observed == ()
    expected = short("a").log_prob("a") + short("ab").log_prob("b")
    assert float(program.log_joint({"x": "a", "y": "b"})) == pytest.approx(
        float(expected), abs=1e-4
    )


def test_do_on_a_tempered_site_takes_its_factor_too() -> None:
    def model() -> None:
        z = lp.sample("z", lp.Tempered(short("a"), 0.5))
        lp.sample("seen", goes_on(z), obs="a")

    program = lp.compile(lp.do(model, {"z": "ab"}))

    assert list(program.graph.nodes) == ["seen"]
    assert float(program.log_joint({})) == pytest.approx(
        float(goes_on("ab").log_prob("a")), abs=1e-4
    )


def test_do_and_condition_keep_the_models_name_and_arguments() -> None:
    def greet(name: str, *, greeting: str = "a") -> str:
        """Greets."""
        return lp.sample("z", short(greeting + name))

    for change in (lp.do, lp.condition):
        changed = change(greet, {"z": "b"})
        assert changed.__name__ == "greet" and changed.__doc__ == "Greets."
        assert changed("b", greeting="b") == "b"


def test_do_on_a_call_gives_the_program_that_very_value() -> None:
    def model() -> object:
        lp.sample("z", short("a"))
        return lp.call("tool", lambda: 1 // 0)

    assert lp.infer(lp.do(model, {"tool": 3}), num_samples=2).returns == [3, 3]


def test_do_within_condition() -> None:
    program = lp.compile(lp.condition(lp.do(chain, {"x": "b"}), {"y": "a"}))

    assert program.latents == () and program.observed == ("y", "seen")
    expected = short("bb").log_prob("a") + goes_on("ba").log_prob("a")
    assert float(program.log_joint({})) == pytest.approx(float(expected), abs=1e-4)


def test_conditioning_a_string_site_on_a_number_is_an_error() -> None:
    for change in (lp.condition, lp.do):
        with pytest.raises(TypeError, match=r"site 'x' is a string site, but its value is .*3"):
            lp.infer(change(chain, {"x": 3}), num_samples=2)


# -- latents of some executions only -------------------------------------------------------------


def test_a_latent_that_exists_in_some_executions_only() -> None:
    def model() -> None:
        mood = lp.sample("mood", lp.LMChoice(LM, "a", ["a", "b"]))
        if mood == "a":
            detail = lp.sample("detail", short("a", 2))
            lp.sample("seen", goes_on("a" + detail), obs="b")
        else:
            lp.sample("seen", goes_on("b"), obs="b")

    program = lp.compile(model)
    assert program.latents == ("mood", "detail")
    truth = lp.infer(program, method="exact")
    sampled = lp.infer(program, num_samples=4000)

    without = lp.LMChoice(LM, "a", ["a", "b"]).log_prob("b") + goes_on("b").log_prob("b")
    assert truth.probabilities("detail")[lp.ABSENT] == pytest.approx(
        math.exp(float(without) - truth.log_evidence), abs=1e-5
    )
    assert sampled.log_evidence == pytest.approx(
        truth.log_evidence, abs=4 * sampled.log_evidence_error
    )
    for sample in sampled.samples:
        assert ("detail" in sample) == (sample["mood"] == "a")


# -- Tempered ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tempered_is_a_site_and_a_factor(temperature: float) -> None:
    def model() -> None:
        lp.sample("z", lp.Tempered(short("a"), temperature))

    program = lp.compile(model)
    log_prob = float(short("a").log_prob("ab"))

    assert float(program.log_joint({"z": "ab"})) == pytest.approx(log_prob / temperature, abs=1e-4)
    with pyro.poutine.trace() as tracer, pyro.poutine.condition(data={"z": "ab"}):
        model()
    nodes = tracer.trace.nodes
    assert list(nodes) == ["z", "z/tempered"]
    tracer.trace.compute_log_prob()
    assert float(nodes["z"]["log_prob_sum"]) == pytest.approx(log_prob, abs=1e-4)
    assert float(nodes["z/tempered"]["log_prob_sum"]) == pytest.approx(
        (1 / temperature - 1) * log_prob, abs=1e-4
    )


def test_tempered_weights_are_the_factor_alone() -> None:
    def model() -> None:
        lp.sample("z", lp.Tempered(short("a"), 0.5))

    posterior = lp.infer(model, num_samples=20)

    expected = [float(short("a").log_prob(s["z"])) for s in posterior.samples]
    np.testing.assert_allclose(posterior.log_weights, expected, atol=1e-4)


def test_an_observed_tempered_site() -> None:
    def model() -> None:
        lp.sample("z", lp.Tempered(short("a"), 0.5), obs="ab")
        lp.sample("other", short("b"))

    expected = 2 * short("a").log_prob("ab") + short("b").log_prob("a")
    assert float(lp.compile(model).log_joint({"other": "a"})) == pytest.approx(
        float(expected), abs=1e-4
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_an_impossible_string_stays_impossible_when_tempered(temperature: float) -> None:
    def model() -> None:
        lp.sample("z", lp.Tempered(short("a", 2), temperature))

    assert float(lp.compile(model).log_joint({"z": "abab"})) == -math.inf


# -- seeds ---------------------------------------------------------------------------------------


def mixed() -> None:
    x = lp.sample("x", short("a"))
    n = lp.sample("n", dist.Normal(0.0, 1.0))
    mood = lp.sample("mood", lp.LMChoice(LM, x + "b", ["a", "b"]))
    y = lp.sample("y", short("a" * (1 + int(abs(n) * 3)) + mood))
    lp.sample("seen", goes_on(x + y), obs="a")


@pytest.mark.parametrize("guide", ["prior", "prompted"])
def test_draws_depend_on_the_seed_and_not_on_the_batch(guide: str) -> None:
    few = lp.infer(mixed, guide=guide, num_samples=8, seed=3)
    many = lp.infer(mixed, guide=guide, num_samples=20, seed=3)

    assert [list(s.items()) for s in few.samples] == [list(s.items()) for s in many.samples[:8]]
    np.testing.assert_allclose(few.log_weights, many.log_weights[:8], atol=1e-4)


def test_more_than_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from langppl.inference import importance

    whole = lp.infer(mixed, num_samples=10, seed=3)
    monkeypatch.setattr(importance, "BATCH", 4)
    parts = lp.infer(mixed, num_samples=10, seed=3)

    assert whole.samples == parts.samples
    np.testing.assert_allclose(whole.log_weights, parts.log_weights, atol=1e-4)


def test_other_seeds_give_other_draws() -> None:
    one = lp.infer(mixed, num_samples=8, seed=3)
    other = lp.infer(mixed, num_samples=8, seed=4)

    assert [s["n"] for s in one.samples] != [s["n"] for s in other.samples]
    assert [s["x"] for s in one.samples] != [s["x"] for s in other.samples]


def test_infer_neither_reads_nor_moves_torchs_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = lp.infer(mixed, num_samples=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert lp.infer(mixed, num_samples=4).samples == one.samples


def judged(pure: bool) -> tuple[Callable[[], None], list[str], Any]:
    lm = tiny_lm("ab.", sharpness=0.3)
    view = lm.trainable("v", rank=2)
    ran: list[str] = []

    def judge(z: str) -> float:
        ran.append(z)
        return float(lp.LMChoice(view, z, ["a", "b"]).log_prob("a"))

    def model() -> None:
        z = lp.sample("z", lp.LMChoice(lm, "a", ["a", "b"]))
        lp.factor("f", lp.call("judge", judge, f"{z}.{pure}.", pure=pure))

    return model, ran, view


@pytest.mark.parametrize("pure", [True, False])
def test_a_tool_that_asks_an_lm_is_evaluated_once_for_all_executions(pure: bool) -> None:
    model, ran, view = judged(pure)
    program = lp.compile(model)
    before = lp.infer(program, num_samples=40, seed=1, progress=False).log_evidence
    assert sorted(ran) == [f"a.{pure}.", f"b.{pure}."]
    with torch.no_grad():
        for p in view.named_parameters.values():
            p.copy_(0.5 * torch.randn(p.shape, generator=torch.manual_seed(1)))
    after = lp.infer(program, num_samples=40, seed=1, progress=False).log_evidence
    assert len(ran) == (4 if pure else 2)  # one that is not pure keeps its result
    assert (after == before) is not pure


def test_others_take_over_from_a_tool_that_fails() -> None:
    lm = tiny_lm("ab.", sharpness=0.3)
    ran: list[int] = []

    def judge(z: str) -> float:
        ran.append(len(ran))
        found = float(lp.LMChoice(lm, z, ["a", "b"]).log_prob("a"))
        if len(ran) == 1:
            raise RuntimeError("unlucky")
        return found

    memo: dict[Any, Any] = {}

    def task() -> float | None:
        try:
            return lp.call("judge", judge, "b.a")
        except RuntimeError:
            return None

    found = run_many([task] * 4, memo)
    assert found[0] is None and len(ran) == 2 and len(set(found[1:])) == 1


def test_a_tool_that_infers_with_itself_inside_does_not_wait_for_itself() -> None:
    lm = tiny_lm("ab.", sharpness=0.3)

    def judge(depth: int) -> float:
        if depth == 0:
            return float(lp.LMChoice(lm, "b", ["a", "b"]).log_prob("a"))

        def inner() -> None:
            lp.sample("x", lp.LMChoice(lm, "a", ["a", "b"]))
            lp.factor("g", lp.call("judge", judge, depth - 1))

        return float(lp.infer(inner, method="exact", progress=False).log_evidence or 0.0)

    def model() -> None:
        lp.sample("z", lp.LMChoice(lm, "a", ["a", "b"]))
        lp.factor("f", lp.call("judge", judge, 2))

    expected = float(lp.LMChoice(lm, "b", ["a", "b"]).log_prob("a"))
    assert lp.infer(model, method="exact").log_evidence == pytest.approx(expected)


def computed() -> str:
    z = lp.sample("z", lp.LMChoice(LM, "a", ["a", "b"]))
    return lp.deterministic("d", z + "!")


def test_the_value_of_a_deterministic_site_can_be_pickled() -> None:
    fn = lp.compile(computed).sites["d"].fn
    assert "!" in str(pickle.loads(pickle.dumps(fn))().value)


def test_a_tool_has_no_sites() -> None:
    def tool() -> str:
        return str(lp.sample("inner", lp.LMString(LM, "a", max_tokens=2)))

    def model() -> None:
        lp.call("tool", tool)
        lp.sample("z", lp.LMString(LM, "a", max_tokens=2))

    for run in (model, lambda: lp.infer(model, num_samples=2, progress=False)):
        with pytest.raises(ValueError, match="a tool has no sites: 'inner' is met inside the tool"):
            run()


def test_a_tool_may_infer_a_model_that_has_sites() -> None:
    def inner() -> None:
        lp.sample("inner", lp.LMString(LM, "a", max_tokens=2))

    def tool() -> float:
        found = lp.infer(inner, method="exact", progress=False).log_evidence
        assert found is not None
        return found

    def model() -> None:
        lp.factor("f", lp.call("tool", tool))
        lp.sample("z", lp.LMString(LM, "a", max_tokens=2))

    found = lp.infer(model, method="exact", progress=False).log_evidence
    assert found == pytest.approx(0.0, abs=1e-5)
