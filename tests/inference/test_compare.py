"""Guides and methods side by side."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest

from langppl import (
    GFlowNetGuide,
    LMString,
    PromptedGuide,
    call,
    compare,
    compile,
    factor,
    infer,
    sample,
)
from langppl.guides import Guide, PriorGuide
from langppl.inference import Comparison
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.program.execution import Chooser
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=2)
OTHER = tiny_lm("ab.", seed=4)
TIMES = ("guide", "name", "seconds")


def story(ending: str) -> None:
    middle = sample("middle", LMString(LM, "ab", stop=".", max_tokens=2))
    sample("ending", LMString(LM, f"ab{middle}"), obs=ending)


def two_lms() -> None:
    middle = sample("middle", LMString(LM, "ab", stop=".", max_tokens=2))
    sample("ending", LMString(OTHER, f"ab{middle}"), obs="ba")


class Broken(Guide):
    """Draws two values, and breaks."""

    name = "broken"

    def chooser(self, program: Program, key: Any) -> Chooser:
        raise RuntimeError("the guide is broken")


def test_rows_are_the_posteriors_own_figures() -> None:
    found = compare(
        story, "ba", guides=["prior", PromptedGuide(), "prior"], num_samples=32, progress=False
    )
    assert list(found.posteriors) == ["prior", "prompted", "prior 2"]
    prior, prompted, again = found.rows()
    alone = infer(story, "ba", guide="prompted", num_samples=32, progress=False)
    # `alone` meets scores that are remembered, in batches of another size: equal up to rounding.
    close = functools.partial(pytest.approx, rel=1e-5)
    assert prompted["log_evidence"] == close(alone.log_evidence)
    assert prompted["error"] == close(alone.log_evidence_error)
    assert prompted["elbo"] == close(alone.elbo)
    assert prompted["ess"] == close(alone.ess)
    assert prompted["sd"] == close(np.std(alone.log_weights, ddof=1))
    assert prompted["distinct"] == len({str(s["middle"]) for s in alone.samples})
    likeliest = list(alone.probabilities("middle").items())[:3]
    assert [v for v, _ in prompted["likeliest"]["middle"]] == [v for v, _ in likeliest]
    assert [p for _, p in prompted["likeliest"]["middle"]] == close([p for _, p in likeliest])
    # The second run of a row costs as many tokens: it does not live off the first one's scores.
    assert {k: v for k, v in prior.items() if k not in TIMES} == {
        k: v for k, v in again.items() if k not in TIMES
    }
    assert prior["tokens_drawn"] > 0 and prior["tokens_scored"] > 0


def test_numbers_that_print_alike_are_distinct_and_impossible_samples_are_not() -> None:
    def narrow() -> None:
        x = sample("x", dist.Normal(5.0, 1e-6))
        factor("half", 0.0 if x > 5.0 else -math.inf)

    found = compare(narrow, guides=["prior"], num_samples=64, progress=False)
    posterior = found.posteriors["prior"]
    (row,) = found.rows()
    values = {float(s["x"]) for s in posterior.samples}
    assert len({f"{v:.4f}" for v in values}) == 1 and 0.0 < row["impossible"] < 1.0
    assert row["distinct"] == len({v for v in values if v > 5.0}) > 2
    assert row["distinct"] == posterior.diagnose().distinct


def test_each_row_pays_for_what_its_tools_ask() -> None:
    asked: list[str] = []

    def judge(text: str) -> float:
        asked.append(text)
        return float(LMString(LM, f"b{text}", max_tokens=3).log_prob("ab"))

    def judged(ending: str) -> None:
        middle = sample("middle", LMString(LM, "ab", stop=".", max_tokens=2))
        factor("judged", call("judge", judge, middle))
        sample("ending", LMString(LM, f"ab{middle}"), obs=ending)

    options: dict[str, Any] = {"num_samples": 32, "progress": False}
    program = compile(judged, "ba")
    known = len(asked)
    first, second, alone = compare(program, guides=["prior"] * 3, **options).rows()
    for row in (second, alone):
        assert {k: v for k, v in row.items() if k not in TIMES} == {
            k: v for k, v in first.items() if k not in TIMES
        }
    each = asked[known:]
    assert len(each) % 3 == 0 and len(each) == 3 * len(set(each)) > 0
    # What was known before is known to all rows: they ask no tool again.
    asked.clear()
    infer(program, **options)
    compare(program, guides=["prior"] * 2, **options)
    assert asked == []


def test_a_tool_that_is_not_pure_is_evaluated_by_one_row_alone() -> None:
    asked: list[str] = []

    def send(text: str) -> float:
        asked.append(text)
        return 0.25 * len(text)

    def told(ending: str) -> None:
        middle = sample("middle", LMString(LM, "ab", stop=".", max_tokens=2))
        factor("sent", call("send it", send, middle, pure=False))
        sample("ending", LMString(LM, f"ab{middle}"), obs=ending)

    found = compare(told, "ba", guides=["prior"] * 2, num_samples=32, progress=False)
    assert not found.errors
    first, second = found.rows()
    assert second["log_evidence"] == pytest.approx(first["log_evidence"], rel=1e-5)
    assert len(asked) == len(set(asked)) > 0


def test_the_table_names_every_guide() -> None:
    text = str(compare(story, "ba", guides=["prior", "prompted"], num_samples=8, progress=False))
    for word in ("guide", "prior", "prompted", "log evidence", "ELBO", "ESS", "impossible"):
        assert word in text


def test_no_guides_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one guide"):
        compare(story, "ba", guides=[])


# -- methods and rows -----------------------------------------------------------------------------


def test_every_method_goes_with_every_guide_and_exact_stands_once() -> None:
    found = compare(
        story,
        "ba",
        methods=["exact", "importance", "smc", "mh"],
        guides=["prior", "prompted"],
        num_samples=400,
        progress=False,
    )
    assert list(found.posteriors) == [
        "exact",
        "importance prior",
        "importance prompted",
        "smc prior",
        "smc prompted",
        "mh prior",
        "mh prompted",
    ]
    truth = infer(story, "ba", method="exact", progress=False)
    assert found.reference == "exact"
    assert found.posteriors["exact"].log_evidence == pytest.approx(truth.log_evidence, rel=1e-5)
    agreements = found.agreements()
    assert list(agreements) == list(found.posteriors)[1:]
    # Each row against the enumerated posterior: within 3 standard errors and twice the noise.
    assert all(a.agrees for a in agreements.values())
    assert agreements["mh prior"].evidence_difference is None
    rows = {r["name"]: r for r in found.rows()}
    assert rows["exact"]["guide"] is None and rows["exact"]["sd"] is None
    assert rows["smc prior"]["sd"] is None and rows["smc prior"]["elbo"] is None
    assert rows["mh prior"]["log_evidence"] is None and rows["mh prior"]["pareto_k"] is None
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    assert "importance prior beside exact: log evidence differs by" in text
    assert "they agree" in text and "nan" not in text
    for name in found.posteriors:
        assert name in text


def test_rows_take_their_own_options_and_names() -> None:
    rows: dict[str, Any] = {
        "ahead": ("smc", "prior", {"twist": "lookahead", "every": 1, "ess_threshold": 1.0}),
        "many": {"guide": PriorGuide(), "num_samples": 64, "seed": 3},
        "plain": ("importance", "prior"),
    }
    found = compare(story, "ba", rows=rows, num_samples=16, progress=False)
    assert list(found.posteriors) == list(rows)
    ahead = infer(
        story,
        "ba",
        method="smc",
        twist="lookahead",
        every=1,
        ess_threshold=1.0,
        num_samples=16,
        progress=False,
    )
    assert found.posteriors["ahead"].log_evidence == pytest.approx(ahead.log_evidence, rel=1e-5)
    many = infer(story, "ba", num_samples=64, seed=3, progress=False)
    assert found.posteriors["many"].log_evidence == pytest.approx(many.log_evidence, rel=1e-5)
    listed = compare(story, "ba", rows=[*rows.values(), rows["ahead"]], progress=False)
    title = "smc prior twist=lookahead every=1 ess_threshold=1.0"
    assert list(listed.posteriors) == [
        title,
        "importance prior num_samples=64 seed=3",
        "importance prior",
        f"{title} 2",
    ]


def test_a_row_that_fails_leaves_the_others() -> None:
    found = compare(
        story,
        "ba",
        rows=[
            ("exact", None, {"limit": 2}),
            ("importance", "prior"),
            ("importance", Broken()),
            ("mh", Broken()),
        ],
        num_samples=16,
        progress=False,
    )
    assert list(found.posteriors) == ["importance prior"]
    assert list(found.errors) == ["exact limit=2", "importance broken", "mh broken"]
    assert all(e.__traceback__ is None for e in found.errors.values())
    rows = found.rows()
    assert [r["name"] for r in rows] == [
        "exact limit=2",
        "importance prior",
        "importance broken",
        "mh broken",
    ]
    assert rows[2]["failure"] == "RuntimeError: the guide is broken"
    assert rows[2]["method"] == "importance" and rows[2]["guide"] == "broken"
    assert rows[1]["failure"] is None and rows[0]["log_evidence"] is None
    text = " ".join(str(found).split())
    assert "importance broken failed: RuntimeError: the guide is broken" in text
    assert "the limit of exact inference is 2 executions" in text
    assert "mh broken failed: RuntimeError: the guide is broken" in text
    alone = compare(story, "ba", rows=[("importance", Broken())], progress=False)
    assert not alone.posteriors and "Every row failed." in str(alone)


def test_a_guide_by_name_is_trained_once_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []
    fit = GFlowNetGuide.fit

    def short(self: GFlowNetGuide, *args: Any, **options: Any) -> GFlowNetGuide:
        fits.append(self)
        return fit(self, *args, **{**options, "steps": 2, "batch": 4})

    monkeypatch.setattr(GFlowNetGuide, "fit", short)
    found = compare(
        story,
        "ba",
        methods=["importance", "smc"],
        guides=["gflownet"],
        num_samples=8,
        progress=False,
    )
    assert len(fits) == 1
    assert found.training["gflownet"].tokens.total > 0
    assert "gflownet was trained first, which the rows leave out" in str(found)
    assert json.loads(found.to_json())["training"]["gflownet"]["seconds"] > 0


def test_a_guide_that_cannot_be_trained_fails_its_rows_alone() -> None:
    def coin() -> None:
        p = sample("p", dist.Beta(1.0, 1.0))
        sample("x", dist.Bernoulli(p), obs=1.0)

    found = compare(coin, guides=["prior", "gflownet"], num_samples=64, progress=False)
    assert list(found.posteriors) == ["prior"]
    assert "needs a latent string" in str(found.errors["gflownet"])
    text = str(found)
    assert "mean " in text and "(64 values)" in text  # no number among so many is likely


def test_tokens_of_all_lms_are_counted() -> None:
    program = compile(two_lms)
    before = LM.tally.copy(), OTHER.tally.copy()
    found = compare(program, guides=["prior"], num_samples=8, progress=False)
    counted = [lm.tally - b for lm, b in zip((LM, OTHER), before, strict=True)]
    assert all(c.total > 0 for c in counted)
    assert found.costs["prior"].tokens == counted[0] + counted[1]
    assert counted[0].scored == 0 and counted[1].drawn == 0


def test_impossible_observations_have_no_reference() -> None:
    def never() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=1))
        sample("y", LMString(LM, f"ab{z}", max_tokens=1), obs="abb")

    with pytest.warns(UserWarning, match="no sample explains"):
        found = compare(never, guides=["prior"], num_samples=4, progress=False)
    assert found.reference is None and found.agreements() == {}
    (row,) = found.rows()
    assert row["likeliest"] == {"z": []} and row["log_evidence"] == -math.inf
    assert "No row has a possible sample." in str(found)
    assert json.loads(found.to_json())["rows"][0]["log_evidence"] == "-inf"


def test_without_exact_the_best_known_evidence_is_the_reference() -> None:
    found = compare(
        story,
        "ba",
        rows={
            "few": ("importance", "prior", {"num_samples": 64}),
            "many": ("importance", "prior", {"num_samples": 1024}),
            "chain": ("mh", "prior"),
        },
        num_samples=32,
        progress=False,
    )
    assert found.reference == "many"
    assert list(found.agreements()) == ["few", "chain"]


def test_an_error_that_cannot_be_trusted_does_not_make_a_reference() -> None:
    samples = [{"z": str(k % 3)} for k in range(100)]
    heavy = np.array([0.0, *[-9.0] * 99])
    doubtful, plain = (
        Posterior(samples, weights, log_evidence=-1.0, log_evidence_error=error)
        for weights, error in ((heavy, 0.01), (np.zeros(100), 0.1))
    )
    assert not doubtful.reliable and plain.reliable
    assert Comparison({"doubtful": doubtful, "plain": plain}).reference == "plain"


def test_pandas_and_json() -> None:
    found = compare(
        story,
        "ba",
        rows=[("exact", None), ("importance", "prior"), ("exact", None, {"limit": 1})],
        num_samples=32,
        progress=False,
    )
    frame = found.to_pandas()
    assert list(frame["name"]) == ["exact", "importance prior", "exact limit=1"]
    top = next(iter(found.posteriors["exact"].probabilities("middle")))
    assert frame["likeliest middle"][0] == top and "likeliest" not in frame.columns
    assert frame["log_evidence"][1] == found.posteriors["importance prior"].log_evidence
    content = json.loads(found.to_json())
    assert content["reference"] == "exact"
    assert content["rows"][0]["ess"] == "inf" and content["rows"][0]["error"] == 0.0
    assert content["rows"][0]["likeliest"]["middle"][0][0] == top
    assert set(content["agreements"]) == {"importance prior"}
    assert "the limit of exact" in content["rows"][2]["failure"]


def test_posteriors_of_ones_own_have_a_table_too() -> None:
    found = Comparison({"mine": infer(story, "ba", num_samples=16, progress=False)})
    assert "mine" in str(found) and found.rows()[0]["tokens_drawn"] is None


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"methods": ["vi"]}, ValueError, "unknown method 'vi'"),
    ({"methods": []}, ValueError, "at least one method"),
    ({"methods": "smc"}, TypeError, r"methods must be a list, got 'smc'"),
    ({"guides": "prior"}, TypeError, "guides must be a list"),
    ({"guides": [3]}, TypeError, "a guide is a name, a Guide or a function, got 3"),
    ({"rows": []}, ValueError, "at least one row"),
    ({"rows": [("smc", "prior")], "guides": ["prior"]}, ValueError, "not both"),
    ({"rows": ["smc"]}, TypeError, r"a row is \(method, guide\)"),
    ({"rows": "smc"}, TypeError, "rows are a list"),
    ({"rows": [("smc", None)]}, ValueError, "method 'smc' takes a guide, but a row has None"),
    ({"rows": [("smc", "prio")]}, ValueError, "unknown guide 'prio'"),
    ({"rows": {"x": ("smc", "prior", 3)}}, TypeError, "the options of row 'x' are a mapping"),
    (
        {"rows": [("importance", "prior", {"twist": "flow"})]},
        ValueError,
        "'twist' in a row is no option of method 'importance'",
    ),
    (
        {"rows": [("smc", "prior", {"twst": "flow"})]},
        ValueError,
        "'twst' in a row is no option of infer; options are: num_samples, seed, twist",
    ),
    ({"num_samples": 0}, ValueError, "num_samples must be an integer of at least 1"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_what_makes_no_sense_is_said_before_anything_runs(
    options: dict[str, Any], kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("it ran")

    monkeypatch.setattr("langppl.inference.comparing.infer", never)
    run: Callable[[], Any] = lambda: compare(story, "ba", progress=False, **options)  # noqa: E731
    with pytest.raises(kind, match=message):
        run()
