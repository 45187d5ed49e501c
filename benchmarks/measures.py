"""How near texts are to a reference, and how much they differ from each other."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

ORDER = 4


def words(text: str) -> list[str]:
    """Words of a sentence without its end mark, as the paper's script takes them."""
    return text.strip().rstrip(".!?").split()


def _grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def gleu(text: str, reference: str) -> float:
    """Sentence GLEU: the smaller of precision and recall of all n-grams, n from 1 to 4.

    Wu et al. 2016, *Google's neural machine translation system* (arXiv 1609.08144), section 4.3.

    Returns:
        Between 0 and 1; 0 where either side has no words.
    """
    own, true = words(text), words(reference)
    matches = most = 0
    for n in range(1, ORDER + 1):
        found, wanted = _grams(own, n), _grams(true, n)
        matches += (found & wanted).total()
        most += max(found.total(), wanted.total())
    return matches / most if most else 0.0


@functools.cache
def _bleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise SystemExit("BLEU needs sacrebleu: pip install 'langppl[tasks]'") from error
    # It would advise `effective_order` at every sentence; the paper's figures are without.
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    return BLEU(
        tokenize="none",
        smooth_method="floor",
        smooth_value=0.1,
        max_ngram_order=ORDER,
        effective_order=False,
    )


def bleu(text: str, reference: str) -> float:
    """Sentence BLEU-4 (sacrebleu); an order without a match counts as 0.1 matches.

    Returns:
        Between 0 and 1; 0 where no word is common.
    """
    own, true = " ".join(words(text)), " ".join(words(reference))
    return float(_bleu().sentence_score(own, [true]).score) / 100.0


def distinct_share(texts: Sequence[str]) -> float:
    """Different texts over all."""
    return len({str(t) for t in texts}) / len(texts)


def distinct_grams(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words over all n-grams (Li et al. 2016, arXiv 1510.03055).

    Returns:
        Between 0 and 1; NaN where no text has n words.
    """
    found: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        found += _grams(words(text), n)
    return len(found) / found.total() if found else float("nan")


def mean_distance(vectors: np.ndarray) -> float:
    """Mean of 1 − cosine over the pairs of unit vectors; unbiased whatever their number.

    Args:
        vectors: shape [n, width].

    Returns:
        Between 0 and 2; NaN for fewer than two.
    """
    n = len(vectors)
    if n < 2:
        return float("nan")
    whole = vectors.sum(0)
    norms = float(np.sum(vectors * vectors))
    return float(1.0 - (whole @ whole - norms) / (n * (n - 1)))
