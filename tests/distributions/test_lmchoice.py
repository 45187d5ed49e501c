from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import langppl as lp
from langppl.distributions import LMChoice, LMString, sites
from langppl.testing import tiny_lm

TINY = tiny_lm("ab. ")


def test_log_softmax_of_open_log_probs() -> None:
    options = [" a", " ba", " bb."]
    choice, open_string = LMChoice(TINY, "ab", options), LMString(TINY, "ab")
    scores = np.array([float(open_string.log_prob(o)) for o in options])
    expected = scores - np.log(np.exp(scores).sum())
    found = [float(choice.log_prob(o)) for o in options]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.exp(found).sum() == pytest.approx(1, abs=1e-9)
    assert float(choice.log_prob(" x")) == -np.inf
    assert "none of the options" in (choice.why_impossible(" x") or "")
    draws = [choice.draw(("c", k)) for k in range(300)]
    assert {str(d) for d, _ in draws} <= set(options)
    for value, log_prob in draws[:20]:
        assert log_prob == pytest.approx(float(choice.log_prob(value)), abs=1e-5)
    share = np.mean([d == options[0] for d, _ in draws])
    assert abs(share - np.exp(found[0])) < 4 * 0.5 / np.sqrt(300)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ([], ValueError, "site 's': options are empty"),
        (["a", "a"], ValueError, "site 's': the option 'a' is given twice"),
        (["a", 3], TypeError, "site 's': an option must be a string, got 3"),
        ("ab", TypeError, "options must be a list of strings"),
    ],
)
def test_bad_options(options: Any, kind: type[Exception], message: str) -> None:
    with sites.naming("s"), pytest.raises(kind, match=message):
        LMChoice(TINY, "a ", options)


def test_an_option_that_begins_another_warns() -> None:
    with pytest.warns(UserWarning, match="the option 'a' begins the option 'ab'"):
        LMChoice(TINY, " ", ["ab", "b", "a"]).log_probs()
    # The nearest neighbour in the sort is not the one that it begins with.
    with pytest.warns(UserWarning, match="the option 'a' begins the option 'a.'"):
        LMChoice(TINY, " ", ["a", "a.", "ab"]).log_probs()


def test_options_that_nobody_drew_do_not_warn_and_a_site_warns_once() -> None:
    def model() -> None:
        a = lp.sample("a", lp.LMString(TINY, "a", max_tokens=2))
        b = lp.sample("b", lp.LMString(TINY, "b", max_tokens=2))
        if len(a) < 9:  # looks inside, so that its structure is found with made-up values
            lp.sample("c", LMChoice(TINY, "a", [f"{a}", f"{b}aaaaab"]))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = lp.compile(model)
        assert not [w for w in caught if "begins the option" in str(w.message)]
        lp.infer(program, num_samples=64, progress=False)
        lp.infer(program, num_samples=64, progress=False, seed=1)
    found = [(w.lineno, str(w.message)) for w in caught if "begins the option" in str(w.message)]
    assert len(found) == 1, found


def test_a_choice_outside_of_sites_warns_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            LMChoice(TINY, " ", ["b", "ba", "aa"]).log_probs()
    found = [str(w.message) for w in caught if "begins the option" in str(w.message)]
    assert len(found) == 1, found


@pytest.mark.parametrize("option", ["xyz", "\ud800"])
def test_an_option_that_cannot_be_written(option: str) -> None:
    with pytest.raises(ValueError, match="has probability zero"):
        LMChoice(TINY, " ", ["a", option]).log_prob("a")
