"""The subjectivity task's model, what its guide reads, and its predictions, on a tiny LM."""

from __future__ import annotations

import importlib
import itertools
import string
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from examples_of import load

import langppl as lp
from langppl.guides import ContextInfo, PriorGuide
from langppl.testing import tiny_lm

subjectivity: ModuleType = load("subjectivity")


@pytest.fixture(scope="module")
def lm() -> lp.LM:
    return tiny_lm(f"{string.ascii_lowercase}CSTRI ,:.\n", window=512, seed=3)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in ("benchmarks", "benchmarks/tasks"):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / folder))
    return importlib.import_module("subjectivity")


def test_labels_and_rationales_follow_the_model(lm: lp.LM) -> None:
    model = subjectivity.make_classifier(lm, lm)
    (program,) = subjectivity.programs(model, [("a boy runs .", " objective")])
    assert program.latents == ("rationale",) and program.is_static
    z = " a b"
    text = f"{subjectivity.INTRO}Sentence: a boy runs .\nThis is"
    rationale = lp.LMString(lm, text, stop=".", ban="\n", max_tokens=subjectivity.MAX_TOKENS)
    label = lp.LMChoice(lm, f"{text}{z}\nThis sentence is", subjectivity.LABELS)
    expected = float(rationale.log_prob(z)) + 4 * float(label.log_prob(" objective"))
    assert float(program.log_joint({"rationale": z})) == pytest.approx(expected, abs=1e-4)


def test_what_a_guide_reads_never_shows_the_label(lm: lp.LM) -> None:
    read = []

    def context(info: ContextInfo) -> str:
        assert info.observations
        read.append(subjectivity.without_label(info))
        return str(read[-1])

    guide = lp.GFlowNetGuide(lm, context=context)
    model = subjectivity.make_classifier(lm, lm)
    for label in subjectivity.LABELS:
        (program,) = subjectivity.programs(model, [("a boy runs .", label)])
        guide.log_q(program, [{"rationale": " a b"}])
    text = f"{subjectivity.INTRO}Sentence: a boy runs .\nThis is"
    assert set(read) == {text}


def test_a_prediction_is_the_mean_over_rationales(lm: lp.LM) -> None:
    model = subjectivity.make_classifier(lm, lm)
    sentences = ["a boy runs .", "a dull film ."]
    found, rationales = subjectivity.predict(model, sentences, draws=3, seed=4)
    assert found.shape == (2,) and [len(z) for z in rationales] == [3, 3]
    for p, sentence, own in zip(found, sentences, rationales, strict=True):
        text = f"{subjectivity.INTRO}Sentence: {sentence}\nThis is"
        each = [
            lp.LMChoice(lm, f"{text}{z}\nThis sentence is", subjectivity.LABELS).log_probs()[1]
            for z in own
        ]
        assert p == pytest.approx(np.exp(each).mean(), abs=1e-5)
    # Drawn as the posterior of a label would be, it would depend on the one that is asked for.
    again, _ = subjectivity.predict(model, sentences, PriorGuide(), draws=3, seed=4)
    np.testing.assert_allclose(again, found, atol=1e-6)


def test_a_direct_model_reads_its_shots(lm: lp.LM) -> None:
    shots = [("a boy .", " objective")]
    model = subjectivity.make_direct(lm, shots)
    found, rationales = subjectivity.predict(model, ["a dull film ."], draws=7)
    text = (
        f"{subjectivity.INTRO}Sentence: a boy .\nThis sentence is objective.\n\n"
        "Sentence: a dull film .\nThis sentence is"
    )
    expected = lp.LMChoice(lm, text, subjectivity.LABELS).log_probs()[1]
    assert found.tolist() == pytest.approx([np.exp(expected)], abs=1e-5)
    assert rationales == [[""]]


def test_guide_and_classifier_learn_their_labels() -> None:
    lm = tiny_lm(f"{string.ascii_lowercase}CSTRI ,:.\n", window=512, seed=3)
    view = lm.trainable("classifier", rank=4)
    model = subjectivity.make_classifier(lm, view)
    data = [("a boy .", " objective"), ("dull .", " subjective")]
    guide = lp.GFlowNetGuide(lm, context=subjectivity.without_label, rank=4)
    fit = subjectivity.settings(steps=2, observations=2, batch=4)
    options = {"num_samples": 8, "steps": 10, "learning_rate": 1e-2, "progress": False}
    result = lp.em(model, data, guide, rounds=3, fit=fit, **options)
    assert result.history["log_evidence"][-1] > result.history["log_evidence"][0] + 0.3
    sentences, labels = zip(*data, strict=True)
    p, _ = subjectivity.predict(model, sentences, guide, draws=4)
    assert subjectivity.accuracy(p, labels) == 1.0


def test_accuracy() -> None:
    labels = [" objective", " subjective", " objective", " subjective"]
    assert subjectivity.accuracy(np.array([0.2, 0.7, 0.9, 0.6]), labels) == 0.75


def test_no_sentence_is_both_known_and_unseen() -> None:
    known, unseen = dict(subjectivity.KNOWN), dict(subjectivity.UNSEEN)
    assert not known.keys() & unseen.keys()
    for data in (known, unseen):
        labels = list(data.values())
        assert {labels.count(label) for label in subjectivity.LABELS} == {len(labels) // 2}


def rows(bench: ModuleType, counts: dict[tuple[str, str], int]) -> list[dict]:
    return [
        {
            "text": f"{split} {label} {k}",
            "label_text": label,
            "split": split,
            "few_shot": [2] if split == "train" and k < 1 else [],
        }
        for (split, label), count in counts.items()
        for k in range(count)
    ]


COUNTS = {
    ("train", "objective"): 20,
    ("train", "subjective"): 20,
    ("test", "objective"): 6,
    ("test", "subjective"): 6,
}


def test_labelled_sets_are_those_of_the_paper_or_drawn(bench: ModuleType) -> None:
    every = rows(bench, COUNTS)
    own = bench.labelled(every, 2, 0)
    assert own == [
        ("train objective 0", " objective"),
        ("train subjective 0", " subjective"),
    ]
    drawn = [bench.labelled(every, 10, seed) for seed in (0, 1, 1, 2)]
    assert drawn[1] == drawn[2] and drawn[0] != drawn[1] != drawn[3]
    assert all(len({*d}) == 10 and all(t.startswith("train") for t, _ in d) for d in drawn)
    with pytest.raises(SystemExit, match="the train split has 40 rows"):
        bench.labelled(every, 41, 0)
    with pytest.raises(SystemExit, match="labels are"):
        bench.as_labelled([{"text": "a", "label_text": "both"}])


def test_test_rows_are_balanced_and_the_same_for_all(bench: ModuleType) -> None:
    every = rows(bench, COUNTS)
    few, more = bench.tested(every, 4), bench.tested(every, 8)
    assert more[:4] == few and len({*more}) == 8
    assert [label for _, label in few] == [" objective", " subjective"] * 2
    assert all(t.startswith("test") for t, _ in more)


def test_shots_have_both_labels_alike(bench: ModuleType) -> None:
    known = [(f"o{k}", " objective") for k in range(7)] + [
        (f"s{k}", " subjective") for k in range(3)
    ]
    shots = bench.balanced(known, 10, seed=0)
    labels = [label for _, label in shots]
    assert len(shots) == 6 and labels.count(" objective") == 3
    assert all(a != b for a, b in itertools.pairwise(labels))
    assert len(bench.balanced(known, 4, seed=0)) == 4
    firsts = {bench.balanced(known, 10, seed)[0][1] for seed in range(10)}
    assert firsts == {" objective", " subjective"}
    assert bench.balanced([], 10, seed=0) == []


def test_figures_show_what_went_most_wrong(bench: ModuleType) -> None:
    test = [(f"s{k}", " subjective" if k % 2 else " objective") for k in range(8)]
    p = [0.1, 0.9, 0.2, 0.8, 0.95, 0.7, 0.3, 0.45]
    found = bench.figures(test, p, [[f" z{k}", f" z{k}"] for k in range(8)])
    assert found["accuracy"] == 0.75
    assert [s["sentence"] for s in found["shown"]] == ["s0", "s1", "s2", "s3", "s4", "s7"]
    assert found["shown"][4]["p(label)"] == pytest.approx(0.05)
    assert found["shown"][4]["rationales"] == [" z4"]
