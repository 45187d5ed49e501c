"""Guides side by side."""

from __future__ import annotations

import numpy as np
import pytest

from langppl import LMString, PromptedGuide, compare, infer, sample
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=2)


def story(ending: str) -> None:
    middle = sample("middle", LMString(LM, "ab", stop=".", max_tokens=2))
    sample("ending", LMString(LM, f"ab{middle}"), obs=ending)


def test_rows_are_the_posteriors_own_figures() -> None:
    found = compare(
        story, "ba", guides=["prior", PromptedGuide(), "prior"], num_samples=32, progress=False
    )
    assert list(found.posteriors) == ["prior", "prompted", "prior 2"]
    prior, prompted, again = found.rows()
    alone = infer(story, "ba", guide="prompted", num_samples=32, progress=False)
    assert prompted["log_evidence"] == alone.log_evidence
    assert prompted["error"] == alone.log_evidence_error
    assert prompted["elbo"] == alone.elbo
    assert prompted["ess"] == alone.ess
    assert prompted["sd"] == pytest.approx(np.std(alone.log_weights, ddof=1))
    assert prompted["distinct"] == len({str(s["middle"]) for s in alone.samples})
    assert {k: v for k, v in prior.items() if k not in ("guide", "seconds")} == {
        k: v for k, v in again.items() if k not in ("guide", "seconds")
    }


def test_the_table_names_every_guide() -> None:
    text = str(compare(story, "ba", guides=["prior", "prompted"], num_samples=8, progress=False))
    for word in ("guide", "prior", "prompted", "log evidence", "ELBO", "ESS", "impossible"):
        assert word in text


def test_no_guides_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one guide"):
        compare(story, "ba", guides=[])
