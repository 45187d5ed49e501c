"""Programs that are compiled like another one of the same model."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import langppl as lp
from langppl.lm.seeds import row_seed
from langppl.program import scheduler
from langppl.program.discovery import discover
from langppl.program.forms import Forms
from langppl.testing import tiny_lm

LM = tiny_lm("ab. 1", seed=1)
VALUES = ["a", "b", "ab", "b.", " 1", "."]


def short(prompt: Any, tokens: int = 2) -> lp.LMString:
    return lp.LMString(LM, prompt, max_tokens=tokens)


def goes_on(prompt: str) -> lp.LMString:
    return lp.LMString(LM, prompt)


class Counted:
    """A model that counts its runs."""

    def __init__(self, model: Callable[..., None]) -> None:
        self.model, self.runs = model, 0

    def __call__(self, *args: Any) -> None:
        self.runs += 1
        self.model(*args)


def story(beginning: str, ending: str | None) -> None:
    z = lp.sample("z", short(beginning))
    lp.sample("y", goes_on(f"{beginning}{z}"), obs=ending)


def latents_of(program: lp.Program, value: str) -> dict[str, str]:
    return dict.fromkeys(program.latents, value)


def assert_right(program: lp.Program) -> None:
    """What the templates say of some values is what runs say."""
    rows = [latents_of(program, v) for v in VALUES]
    filled = [e.log_joint for e in program.executions(rows)]
    ran = [e.log_joint for e in program._ran(rows)]
    assert filled == pytest.approx(ran, abs=1e-6)


# -- rows that are alike ---------------------------------------------------------------------------


def test_a_static_row_takes_few_runs() -> None:
    model = Counted(story)
    first = lp.compile(model, "a", " b")
    in_full, model.runs = model.runs, 0
    other = lp.compile(model, "b.", " a", like=first)
    # With placeholders, the long value, all values in one, the two arguments, and one of the rest.
    assert model.runs == 6 < in_full
    assert other.is_static and other.sites["y"].value == " a"
    assert other.sites["z"].fn.prompt == "b."
    assert_right(other)


def test_a_row_like_another_has_templates_of_its_own() -> None:
    first = lp.compile(story, "a", " b")
    for row in (("b", " a"), ("ab ab", "."), ("1", " b")):
        like, fresh = lp.compile(story, *row, like=first), lp.compile(story, *row)
        assert like.is_static and set(like.graph.edges) == {("z", "y")}
        values = [{"z": v} for v in VALUES]
        torch.testing.assert_close(like.log_joint(values), fresh.log_joint(values))
        assert_right(like)


def test_every_option_is_tried_in_every_row() -> None:
    def model(beginning: str, options: list[str]) -> None:
        z = lp.sample("z", lp.LMChoice(LM, beginning, options))
        lp.sample("y", goes_on("a" if tells(z, options[-1][::-1]) else f"{z}b"), obs=" a")

    ends = ["aab", "aba", "bab", "bba", "abb", "bbb", "baa"]
    first = lp.compile(model, "a", [f"{e}." for e in ends] + [".a1"])
    assert first.is_static
    other = [f"{e}." for e in ends] + [".a."]
    assert not lp.compile(model, "a", other, like=first).is_static


# -- rows that are not -----------------------------------------------------------------------------


def test_rows_of_other_sites_have_their_own() -> None:
    model = Counted(lambda *texts: [story_at(k, t) for k, t in enumerate(texts)])

    def story_at(k: int, text: str) -> None:
        z = lp.sample(f"z{k}", short(text))
        lp.sample(f"y{k}", goes_on(f"{z}"), obs=" a")

    first = lp.compile(model, "a", "b")
    in_full, model.runs = model.runs, 0
    longer = lp.compile(model, "a", "b", ".", like=first)
    assert model.runs > in_full  # another form is compared in full, with one argument more
    assert longer.latents == ("z0", "z1", "z2") and longer.observed == ("y0", "y1", "y2")
    assert set(longer.graph.edges) == {("z0", "y0"), ("z1", "y1"), ("z2", "y2")}
    assert_right(longer)
    model.runs = 0
    assert_right(lp.compile(model, "b", "a", "a", like=first))
    assert model.runs < in_full + 3 * len(VALUES)
    assert lp.compile(model, "a", like=first).latents == ("z0",)


def test_a_row_without_an_observation_has_its_own_kinds() -> None:
    first = lp.compile(story, "a", " b")
    other = lp.compile(story, "a", None, like=first)
    assert other.is_static and other.observed == () and other.latents == ("z", "y")


def tells(z: Any, text: str) -> bool:
    """Whether a latent is a text, in a way that no placeholder notices."""
    return f"{z}".strip() == text


@pytest.mark.parametrize("flags", [(False, True), (0, 1), ("lax", "strict"), (None, "strict")])
def test_a_latent_that_is_looked_into_in_one_row_only(flags: tuple[Any, Any]) -> None:
    def model(beginning: str, flag: Any) -> None:
        z = lp.sample("z", short(beginning))
        is_strict = flag == "strict" if isinstance(flag, str) else bool(flag)
        lp.sample("y", goes_on("a" if is_strict and tells(z, "b.") else f"{z}b"), obs=" a")

    first = lp.compile(model, "a", flags[0])
    assert first.is_static
    assert lp.compile(model, "b", flags[0], like=first).is_static
    other = lp.compile(model, "b", flags[1], like=first)
    assert not other.is_static
    assert set(other.graph.edges) == {("z", "y")}
    rows = [{"z": v} for v in VALUES]
    fresh = lp.compile(model, "b", flags[1]).log_joint(rows)
    torch.testing.assert_close(other.log_joint(rows), fresh)
    assert [e.log_joint for e in other.executions(rows)] == pytest.approx(fresh.tolist())


def test_a_latent_that_is_compared_with_an_argument() -> None:
    def model(beginning: str, answer: str) -> None:
        z = lp.sample("z", short(beginning))
        lp.sample("y", goes_on("a" if tells(z, answer) else f"{z}b"), obs=" a")

    # What latents are compared with has spaces around it, so no value but their own is equal.
    first = lp.compile(model, "a", " . ")
    assert first.is_static
    assert not lp.compile(model, "a", "b", like=first).is_static
    assert not lp.compile(model, "a", "b").is_static


def test_a_row_that_is_known_to_differ_from_its_templates_is_searched() -> None:
    def model(beginning: str, answer: str) -> None:
        z = lp.sample("z", short(beginning))
        if tells(z, answer):
            lp.sample("more", short(f"{z}"))
        lp.sample("y", goes_on(f"{z}b"), obs=" a")

    first = lp.compile(model, "a", " . ")
    other = lp.compile(model, "a", "yes", like=first)
    assert not other.is_static and "more" in other.latents


def test_objects_among_the_arguments_are_compared_in_full() -> None:
    class Row:
        def __init__(self, text: str) -> None:
            self.text = text

    model = Counted(lambda row: story(row.text, " a"))
    first = lp.compile(model, Row("a"))
    in_full, model.runs = model.runs, 0
    assert_right(other := lp.compile(model, Row("b"), like=first))
    assert other.is_static and model.runs >= in_full


def test_other_observations_are_no_form_that_was_compared() -> None:
    model = Counted(story)
    first = lp.compile(model, "a", " b")
    in_full, model.runs = model.runs, 0
    lp.compile(model, "b", " a", like=first.observing({"y": " ab"}))
    assert model.runs > in_full  # and once for what is observed


def test_a_program_that_has_become_dynamic_makes_no_static_ones() -> None:
    def model(beginning: str, ending: str) -> None:
        z = lp.sample("z", short(beginning))
        lp.sample("y", goes_on("a" if tells(z, "b" * 50) else f"{z}b"), obs=ending)

    first = lp.compile(model, "a", " a")
    with pytest.warns(lp.StaticMismatchWarning):
        first.log_joint({"z": "b" * 50})
    assert not lp.compile(model, "b", " a", like=first).is_static


def test_a_program_that_was_a_likeness_can_be_pickled() -> None:
    first = lp.compile(story, "a", " b")
    other = lp.compile(story, "b", " b", like=first)
    forms = pickle.loads(pickle.dumps(other._forms))
    assert isinstance(forms, Forms)
    assert forms.has(("ab", "."), lp.compile(story, "ab", ".").templates or ())


# -- dynamic programs ------------------------------------------------------------------------------


def test_a_dependence_that_shows_and_is_not_in_the_likeness_is_searched_for() -> None:
    def model(goes_in: bool) -> None:
        z = lp.sample("z", short("a"))
        w = lp.sample("w", short(f"{z}" if goes_in else "b"))
        lp.sample("y", goes_on("b" if w.startswith("a") else "a"), obs=" a")

    first = lp.compile(model, False)
    assert not first.is_static and ("z", "w") not in first.graph.edges
    assert ("z", "w") in lp.compile(model, True, like=first).graph.edges


# -- the rows of data ------------------------------------------------------------------------------


def with_tool(beginning: str, ending: str) -> None:
    z = lp.sample("z", short(beginning))
    n = lp.call("tool", len, z)
    lp.sample("y", goes_on(f"{beginning}{n}"), obs=ending)


ROWS = [("a", " b"), ("b", " a"), ("ab", " ."), ("b.", " b"), ("aa", " a")]


def asked_by(monkeypatch: pytest.MonkeyPatch, do: Callable[[], Any]) -> int:
    """How many requests the LM got."""
    count = 0
    serve = scheduler.serve

    def counting(requests: Any) -> Any:
        nonlocal count
        count += len(requests)
        return serve(requests)

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "serve", counting)
        do()
    return count


def test_infer_many_compiles_rows_like_the_first() -> None:
    model = Counted(story)
    lp.compile(model, *ROWS[0])
    in_full, model.runs = model.runs, 0
    found = lp.infer_many(model, ROWS, num_samples=2, progress=False)
    # 6 runs to compile a row, and the two samples of each with their checks.
    assert model.runs <= in_full + 4 * 6 + 5 * 4
    for k, (posterior, row) in enumerate(zip(found, ROWS, strict=True)):
        alone = lp.infer(story, *row, num_samples=2, seed=row_seed(0, k), progress=False)
        assert posterior.log_evidence == pytest.approx(alone.log_evidence, abs=1e-6)
        assert posterior.samples == alone.samples


def test_infer_many_weighs_a_row_that_looks_inside_as_it_is() -> None:
    def model(beginning: str, is_strict: bool) -> None:
        z = lp.sample("z", short(beginning, 1))
        lp.sample("y", goes_on("a" if is_strict and tells(z, "b") else f"{z}b"), obs=" a")

    rows = [("a", False), ("b", False), ("b", True), ("a", True)]
    found = lp.infer_many(model, rows, method="exact", progress=False)
    alone = [lp.infer(model, *r, method="exact", progress=False).log_evidence for r in rows]
    assert [p.log_evidence for p in found] == pytest.approx(alone, abs=1e-6)
    assert abs(alone[1] - alone[2]) > 1e-3


def test_infer_many_takes_no_structure_from_another_model() -> None:
    found = lp.infer_many(
        [(story, ROWS[:2]), lp.compile(with_tool, *ROWS[0]), (with_tool, ROWS[:2])],
        num_samples=2,
        progress=False,
    )
    rows = [*ROWS[:2], ROWS[0], *ROWS[:2]]
    for k, (posterior, row) in enumerate(zip(found, rows, strict=True)):
        model = story if k < 2 else with_tool
        alone = lp.infer(model, *row, num_samples=2, seed=row_seed(0, k), progress=False)
        assert posterior.log_evidence == pytest.approx(alone.log_evidence, abs=1e-6)


def test_the_lm_is_asked_for_the_structure_of_the_first_row_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = asked_by(monkeypatch, lambda: lp.compile(with_tool, *ROWS[0]))
    assert alone > 8
    samples = asked_by(
        monkeypatch,
        lambda: lp.infer_many([lp.compile(with_tool, *ROWS[0])] * 5, num_samples=1, progress=False),
    )
    together = asked_by(
        monkeypatch, lambda: lp.infer_many(with_tool, ROWS, num_samples=1, progress=False)
    )
    assert together <= samples + alone


def searched_by(monkeypatch: pytest.MonkeyPatch, do: Callable[[], Any]) -> list[Any]:
    """The arguments of the programs whose structure was searched for."""
    found = []

    def noting(model: Any, args: Any, *more: Any) -> Any:
        found.append(args)
        return discover(model, args, *more)

    with monkeypatch.context() as patch:
        patch.setattr("langppl.program.program.discover", noting)
        do()
    return found


def test_fit_compiles_rows_like_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = lp.GFlowNetGuide(LM, seed=3)

    def fit() -> None:
        guide.fit(
            with_tool, ROWS, steps=3, batch=2, observations=2, validation=ROWS[:2], progress=False
        )

    # The first of the data and the first of what is held out.
    assert searched_by(monkeypatch, fit) == [ROWS[0], ROWS[0]]


def test_em_compiles_rows_like_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    view = LM.trainable("likeness")

    def model(beginning: str, ending: str) -> None:
        with_tool(beginning, ending)
        lp.sample("label", lp.LMChoice(view, beginning, [" a", " b"]), obs=" a")

    def em() -> None:
        lp.em(
            model, ROWS, "prior", rounds=1, num_samples=2, steps=1, validation=ROWS[1:],
            progress=False,
        )  # fmt: skip

    assert searched_by(monkeypatch, em) == [ROWS[0], ROWS[1]]
