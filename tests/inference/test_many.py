"""Inference over a data set: each row gets what it would get alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import langppl as lp
from langppl.diagnostics import InferenceWarning
from langppl.inference import many
from langppl.lm.seeds import row_seed
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)
ROWS = [("a", "ab"), ("ab", "b"), ("b", "."), ("ba", "ab"), ("bb", "aa")]


def story(prompt: str, seen: str = "ab") -> str:
    z = lp.sample("z", lp.LMString(LM, prompt, stop=".", max_tokens=4))
    if len(z) > 2:
        lp.sample("w", lp.LMString(LM, f"{prompt}{z}", max_tokens=1))
    lp.sample("seen", lp.LMString(LM, f"{prompt}{z}"), obs=seen)
    return str(z)


@pytest.fixture(scope="module")
def guide() -> lp.GFlowNetGuide:
    found = lp.GFlowNetGuide(LM, rank=2)
    return found.fit(story, ROWS, steps=6, batch=8, learning_rate=1e-2, progress=False)


def settings(name: str, guide: lp.GFlowNetGuide) -> dict[str, Any]:
    return {
        "prior": {},
        "prompted": {"guide": "prompted"},
        "guide": {"guide": guide},
        "smc": {"method": "smc", "every": 1, "twist": "lookahead", "rejuvenation": 1},
        "mh": {"method": "mh", "guide": guide, "chains": 4, "warmup": 3},
        "exact": {"method": "exact"},
    }[name]


@pytest.mark.parametrize("together", [1, 16, 1000])
@pytest.mark.parametrize("name", ["prior", "prompted", "guide", "smc", "mh", "exact"])
def test_rows_get_what_they_would_get_alone(
    guide: lp.GFlowNetGuide, monkeypatch: pytest.MonkeyPatch, name: str, together: int
) -> None:
    monkeypatch.setattr(many, "BATCH", together)
    own: dict[str, Any] = {"num_samples": 12, "progress": False, **settings(name, guide)}
    found = lp.infer_many(story, ROWS, seed=3, **own)
    alone = [lp.infer(story, *r, seed=row_seed(3, k), **own) for k, r in enumerate(ROWS)]
    for one, other in zip(found, alone, strict=True):
        assert one.samples == other.samples and one.returns == other.returns
        np.testing.assert_allclose(one.log_weights, other.log_weights, rtol=0, atol=2e-5)
        assert (one.method, one.guide) == (other.method, other.guide)


def test_rows_are_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run = many.run_whole

    def counted(tasks: list[Any]) -> list[Any]:
        sizes.append(len(tasks))
        return run(tasks)

    monkeypatch.setattr(many, "run_whole", counted)
    lp.infer_many(story, ROWS * 3, num_samples=64, progress=False)
    assert sizes == [4, 4, 4, 3]


class Endings:
    """As the data sets of torch and Hugging Face: a length and rows by number."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, k: int) -> dict[str, str]:
        if k >= len(ROWS):
            raise IndexError(k)
        return {"seen": ROWS[k][1], "prompt": ROWS[k][0]}


def test_rows_may_be_mappings() -> None:
    wanted = lp.infer_many(story, ROWS, num_samples=8, progress=False)
    for data in (Endings(), list(Endings())):
        found = lp.infer_many(story, data, num_samples=8, progress=False)
        assert [p.samples for p in found] == [p.samples for p in wanted]
        assert [list(p.log_weights) for p in found] == [list(p.log_weights) for p in wanted]
    programs = [lp.compile(story, *r) for r in ROWS]
    found = lp.infer_many(programs, num_samples=8, progress=False)
    assert [p.samples for p in found] == [p.samples for p in wanted]
    mixed = lp.infer_many(
        [programs[0], (story, list(Endings())[1:])], num_samples=8, progress=False
    )
    assert [p.samples for p in mixed] == [p.samples for p in wanted]


def test_rows_may_be_a_table_or_any_iterable() -> None:
    pd = pytest.importorskip("pandas")
    # Of a table that was filtered or sorted, the labels are no places.
    table = pd.DataFrame(ROWS, columns=["prompt", "seen"], index=[3, 1, 0, 2, 7])
    wanted = lp.infer_many(story, ROWS, num_samples=4, progress=False)
    kinds = {
        "table": table,
        "itertuples": table.itertuples(index=False),
        "map": map(tuple, table.to_numpy().tolist()),
        "generator": (row for row in ROWS),
        "series": pd.Series(ROWS, index=table.index),
    }
    for kind, data in kinds.items():
        found = lp.infer_many(story, data, num_samples=4, progress=False)
        assert [p.samples for p in found] == [p.samples for p in wanted], kind
    for data in (3, set(ROWS)):
        with pytest.raises(TypeError, match="data must be a sequence"):
            lp.infer_many(story, data)


def test_a_mapping_fills_defaults_only_before_what_it_gives() -> None:
    from langppl.program.arguments import arguments_of_rows

    def model(a: str, b: int = 2, c: int = 3) -> None: ...

    rows = [{"a": "x"}, {"c": 5, "a": "y"}, {"b": 7, "a": "z"}]
    assert arguments_of_rows(model, rows) == [("x",), ("y", 2, 5), ("z", 7)]


def by_keyword(a: str, *, b: str) -> None: ...


@pytest.mark.parametrize(
    ("model", "row", "says"),
    [
        (
            story,
            {"prompt": "a", "label": 1},
            r"'prompt', 'label' does .*: 'label' is no argument of the model; take the columns it "
            r"has, e.g. data.select_columns\(\['prompt'\]\)",
        ),
        (story, {"seen": "a"}, r"fit the model\(.*: it lacks 'prompt'$"),
        (story, {"promt": "a"}, r"it lacks 'prompt'; 'promt' is no .*; did you mean 'prompt'\?$"),
        (story, "ab", r"must be a tuple of the model's arguments, or a mapping"),
        (by_keyword, {"a": "a", "b": "b"}, r"takes 'b' by keyword alone"),
    ],
)
def test_what_does_not_fit_the_model(model: Any, row: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        lp.infer_many(model, [row])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"guide": "gflownet"}, ValueError, "trained for one observation"),
        ({"every": 2}, TypeError, "method 'importance' has no option 'every'"),
        ({"method": "smc", "every": 0}, ValueError, "every must be an integer of at least 1"),
        ({"method": "exact", "guide": "prompted"}, ValueError, "takes no guide"),
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"method": "best"}, ValueError, "unknown method"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        lp.infer_many(story, ROWS, **options)


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Ctrl-C in the pass of the LM whose number is the list's last."""
    passes: list[int] = [0, -1]
    forward = type(LM).logits_of

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes[0] += 1
        if passes[0] == passes[1]:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(LM), "logits_of", counted)
    yield passes


# A method says so too, of the row that was cut off.
@pytest.mark.filterwarnings("ignore:interrupted. the posterior is of the first")
@pytest.mark.parametrize(("together", "num_samples"), [(16, 8), (4, 8)])
def test_interrupted_it_returns_whole_rows(
    interrupts: list[int], monkeypatch: pytest.MonkeyPatch, together: int, num_samples: int
) -> None:
    from langppl.inference import importance

    monkeypatch.setattr(many, "BATCH", together)
    monkeypatch.setattr(importance, "BATCH", 4)
    options: dict[str, Any] = {"num_samples": num_samples, "progress": False}
    LM.memo.clear()
    wanted = lp.infer_many(story, ROWS, **options)
    passes = interrupts[0]
    assert passes > 20
    whole = []
    for at in range(2, passes, 4):
        LM.memo.clear()
        interrupts[:] = [0, at]
        try:
            with pytest.warns(InferenceWarning, match=f"rows of {len(ROWS)}"):
                found = lp.infer_many(story, ROWS, **options)
        except KeyboardInterrupt:
            assert not whole
            continue
        whole.append(len(found))
        assert [p.samples for p in found] == [p.samples for p in wanted[: len(found)]]
    assert whole == sorted(whole) and len(set(whole)) > 1


class Listed(Sequence[Any]):
    """A list that is none, as configurations have them."""

    def __init__(self, *entries: Any) -> None:
        self.entries = entries

    def __getitem__(self, at: Any) -> Any:
        return self.entries[at]

    def __len__(self) -> int:
        return len(self.entries)


def test_a_row_may_be_any_sequence() -> None:
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame(ROWS[:2], columns=["prompt", "seen"])
    options: dict[str, Any] = {"num_samples": 4, "progress": False}
    expected = [p.samples for p in lp.infer_many(story, ROWS[:2], **options)]
    for rows in (
        Listed(*(Listed(*row) for row in ROWS[:2])),
        np.array(ROWS[:2]),
        [pd.Series(row) for row in ROWS[:2]],
        [row for _, row in table.iterrows()],
        [row for _, row in table[["seen", "prompt"]].iterrows()],
    ):
        assert [p.samples for p in lp.infer_many(story, rows, **options)] == expected


def test_a_missing_entry_of_a_series_is_latent() -> None:
    from langppl.program.arguments import arguments_of_rows

    pd = pytest.importorskip("pandas")
    rows = [pd.Series(["a", missing]) for missing in (float("nan"), None, pd.NA)]
    assert arguments_of_rows(story, rows) == [("a", None)] * 3


def test_texts_that_are_missing_in_a_table_are_latent() -> None:
    from langppl.program.arguments import rows_in

    pd = pytest.importorskip("pandas")
    for missing in (float("nan"), pd.NA, None):
        table = pd.DataFrame({"text": ["a", missing], "number": [1.0, float("nan")]})
        first, second = rows_in(table)
        assert first == {"text": "a", "number": 1.0}
        assert second["text"] is None
        assert math.isnan(second["number"])
        if missing is not None:
            with pytest.raises(TypeError, match="a missing value"):
                lp.compile(story, "a", missing)
