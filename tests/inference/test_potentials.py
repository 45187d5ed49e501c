"""Potentials while strings grow: where they are asked, what is final, and right weights."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mixed import LM

from langppl import (
    GFlowNetGuide,
    InferenceWarning,
    LMString,
    MaskedGuide,
    Posterior,
    factor,
    infer,
    potential,
    regex,
    sample,
)
from langppl.guides import PriorGuide
from langppl.inference.conditional import smc_evidence
from langppl.program import compile
from langppl.testing import tiny_lm

Model = Callable[[], Any]


def short(text: str) -> float:
    """No run of more than one "b"."""
    return -math.inf if "bb" in text else 0.0


def sorted_only(text: str) -> float:
    """No "a" after a "b"."""
    return -math.inf if "ba" in text else 0.0


def few(text: str) -> float:
    return -1.5 * text.count("a")


def mild(text: str) -> float:
    return -0.3 * text.count("a")


def hard(**how: Any) -> Model:
    def model() -> None:
        z = sample("z", LMString(LM, "b", min_tokens=4, max_tokens=5, allow=["a", "b"]))
        potential("sorted", sorted_only, z, **how)

    return model


def two_strings() -> None:
    z = sample("z", LMString(LM, "ab", max_tokens=3, allow=["a", "b"]))
    potential("short", lambda t: short(t) + mild(t), z, prefix=short)
    y = sample("y", LMString(LM, f"b{z}", max_tokens=2, allow=["a", "b"]))
    potential("both", mild, f"{z}{y}", prefix=True)
    sample("seen", LMString(LM, f"{z}{y}."), obs="a")


def under_a_grammar() -> None:
    z = sample("z", LMString(LM, "ab", max_tokens=4, grammar=regex("[ab]{3}")))
    potential("few", few, z)
    y = sample("y", LMString(LM, f"b{z}", max_tokens=1, allow=["a", "b"]))
    sample("seen", LMString(LM, f"{z}{y}."), obs="ab")


def before_min_tokens() -> None:
    z = sample("z", LMString(LM, "ab", min_tokens=2, max_tokens=3, stop="."))
    potential("few", few, z)
    if "bb" in z:
        potential("more", lambda t: 0.5 * t.count("b"), z)
    sample("seen", LMString(LM, f"a{z}."), obs="b")


def run(model: Any, **options: Any) -> Posterior:
    given = {"method": "smc", "every": 1, "num_samples": 8, "progress": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        return infer(model, **given)


def ratios(model: Any, runs: int = 25, first: int = 0, **options: Any) -> np.ndarray:
    """Ẑ/Z of some runs."""
    program = compile(model)
    exact = infer(program, method="exact", progress=False).log_evidence
    assert exact is not None
    found = []
    for seed in range(first, first + runs):
        evidence = run(program, seed=seed, **{"ess_threshold": 0.95, **options}).log_evidence
        assert evidence is not None
        found.append(math.exp(evidence - exact))
    return np.array(found)


def check_unbiased(found: np.ndarray, within: float) -> None:
    """Also absolutely: an estimator that is broken may vary so much that its error excuses it."""
    error = float(found.std(ddof=1)) / math.sqrt(len(found))
    bound = min(3.5 * error + 1e-6, within)
    assert abs(float(found.mean()) - 1.0) < bound, (found.mean(), error)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (hard(prefix=True), {}),
        (hard(prefix=sorted_only), {"resampling": "multinomial"}),
        (hard(prefix=True), {"twist": "lookahead"}),
        (hard(prefix=True), {"twist": "flow"}),
        (hard(prefix=True), {"twist": lambda site, text: 0.3 * text.count("a")}),
        (hard(prefix=True), {"guide": "prompted"}),
        (two_strings, {}),
        (two_strings, {"twist": "lookahead", "resampling": "residual"}),
        (two_strings, {"rejuvenation": 1}),
        (under_a_grammar, {}),
        (under_a_grammar, {"twist": "lookahead"}),
        (before_min_tokens, {}),
        (before_min_tokens, {"twist": "lookahead", "rejuvenation": 1}),
    ],
)
def test_the_evidence_is_unbiased(model: Model, options: dict[str, Any]) -> None:
    is_slow = model is under_a_grammar
    found = ratios(model, first=100, num_samples=8 if is_slow else 32, **options)
    check_unbiased(found, within=0.25 if is_slow else 0.15)


def test_flows_of_several_strings_bury_the_dead() -> None:
    program = compile(two_strings)
    guide = GFlowNetGuide(LM, rank=2, objective="subtb")
    guide.fit(program, steps=2, batch=4, progress=False)
    found = ratios(two_strings, guide=guide, twist="flow", num_samples=16)
    check_unbiased(found, within=0.3)


def test_a_prefix_kills_and_the_dead_are_replaced() -> None:
    plain = run(hard(), num_samples=256, ess_threshold=1.0)
    final = run(hard(prefix=True), num_samples=256, ess_threshold=1.0)
    assert plain.resampled == 0
    assert final.resampled > 0
    dead = [np.isneginf(p.log_weights).mean() for p in (plain, final)]
    assert dead[0] > 0.8, dead
    assert dead[1] < 0.6 * dead[0], dead
    check_probabilities(hard(prefix=True), 6, num_samples=256, ess_threshold=1.0)


def check_probabilities(model: Model, runs: int, **options: Any) -> None:
    """That Ẑ times the probability of each "z" is right, in the mean over runs."""
    program = compile(model)
    truth = infer(program, method="exact", progress=False)
    assert truth.log_evidence is not None
    found = []
    for seed in range(runs):
        posterior = run(program, seed=seed, **options)
        assert posterior.log_evidence is not None
        ratio = math.exp(posterior.log_evidence - truth.log_evidence)
        found.append({z: ratio * p for z, p in posterior.probabilities("z").items()})
    for text, p in truth.probabilities("z").items():
        own = np.array([f.get(text, 0.0) for f in found])
        error = own.std(ddof=1) / math.sqrt(runs)
        assert abs(own.mean() - p) < min(4 * error + 0.01, 0.08), (text, own.mean(), p, error)


def test_it_varies_less_than_importance_sampling() -> None:
    assert ratios(hard(prefix=True), runs=40).std() < 0.8 * ratios(hard(), runs=40).std()


def test_moves_keep_to_the_posterior() -> None:
    check_probabilities(two_strings, 16, num_samples=32, rejuvenation=2)


def most_b(text: str) -> float:
    return -3.0 if "b" in text else -math.inf


def plain_and_passed_over() -> None:
    z = sample("z", LMString(LM, "ab", max_tokens=4, allow=["a", "b"]))
    potential("score", most_b, z)


def passed_over_before_evidence() -> None:
    z = sample("z", LMString(LM, "ab", max_tokens=4, allow=["a", "b"]))
    potential("score", most_b, z)
    sample("seen", LMString(LM, f"{z}."), obs="a")


def passed_over_beside_another() -> None:
    z = sample("z", LMString(LM, "ab", max_tokens=4, allow=["a", "b"]))
    potential("score", most_b, z)
    potential("mild", mild, z)


@pytest.mark.parametrize("twist", [None, "lookahead"])
@pytest.mark.parametrize(
    ("model", "most"),
    [
        (plain_and_passed_over, 0.15),
        (passed_over_before_evidence, 0.2),
        (passed_over_beside_another, 0.15),
    ],
)
def test_what_a_potential_says_nothing_of_yet_does_not_outweigh_the_rest(
    model: Model, most: float, twist: Any
) -> None:
    found = ratios(model, runs=40, num_samples=16, ess_threshold=0.5, twist=twist)
    check_unbiased(found, within=0.1)
    assert found.std() < most, found.std()


def test_other_methods_make_no_use_of_it() -> None:
    for options in ({"method": "importance", "num_samples": 64}, {"method": "exact"}):
        one, other = (
            infer(m, progress=False, **options)  # type: ignore[arg-type]
            for m in (hard(), hard(prefix=sorted_only))
        )
        assert list(one.log_weights) == list(other.log_weights)


def test_a_prefix_takes_the_place_of_the_potential() -> None:
    """And it has the text so far as it is, with no stop that is not there yet."""
    whole: set[str] = set()
    parts: set[str] = set()

    def fn(text: str) -> float:
        whole.add(str(text))
        return 0.0

    def prefix(text: str) -> float:
        if not text.endswith("."):
            parts.add(str(text))
        return -0.5 * text.count("a")

    def model() -> None:
        z = sample("z", LMString(LM, "ab", stop=".", max_tokens=5, truncate="reject"))
        potential("p", fn, z, prefix=prefix)

    program = compile(model)
    whole.clear()
    run(program, twist="lookahead", rejections=0)  # which asks of no text as if it ended there
    ended = {t for t in whole if t.endswith(".")}
    assert ended
    assert all(len(LM.encode_text(t)) >= 3 for t in whole - ended), "whole ones alone"
    assert "a" in parts


def test_where_no_string_can_end_potentials_steer_too() -> None:
    seen: set[int] = set()

    def model() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=9, grammar=regex("[ab]{8}")))
        potential("few", lambda t: seen.add(len(t)) or -3.0 * t.count("a"), z)  # type: ignore[func-returns-value]

    program = compile(model)
    seen.clear()
    posterior = run(program, ess_threshold=1.0)
    assert {1, 2, 3, 4, 5, 6, 7} & seen
    assert posterior.resampled > 1


def test_a_half_character_waits_for_its_other_half() -> None:
    lm = tiny_lm("a", seed=3, split=["é"])
    seen: list[str] = []

    def model() -> None:
        z = sample("z", LMString(lm, "a", max_tokens=4))
        potential("p", lambda t: float(seen.append(str(t)) or 0.2 * t.count("é")), z)  # type: ignore[func-returns-value]

    check_unbiased(ratios(model, runs=30), within=0.1)
    assert not any("\ufffd" in t for t in seen)


def test_a_masked_guide_is_weighed_by_a_prefix_too() -> None:
    def model() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=4))
        factor("form", 0.0 if re.fullmatch("[ab]*", z) else -math.inf)
        potential("short", short, z, prefix=True)

    found = ratios(model, guide=MaskedGuide({"z": regex("[ab]*")}), num_samples=16)
    check_unbiased(found, within=0.2)


def test_what_breaks_on_a_part_is_passed_over_and_blinds_no_other() -> None:
    def model() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=4))
        potential("breaks", lambda t: 0.0 if len(LM.encode_text(t)) > 2 else 1 / 0, z, prefix=few)
        potential("whole", lambda t: {True: 0.0}[len(t) > 3] if len(t) < 2 else -0.1 * len(t), z)
        potential("short", short, z, prefix=True)

    with pytest.raises(ZeroDivisionError):
        run(model)

    def mended() -> None:
        z = sample("z", LMString(LM, "ab", min_tokens=3, max_tokens=4))
        potential("breaks", lambda t: 0.0 if len(t) > 2 else 1 / 0, z)
        potential("short", short, z, prefix=True)

    assert run(mended, ess_threshold=1.0).resampled > 0


def digits(text: str) -> float:
    return 0.0 if re.fullmatch("[0-9]*", text) else -math.inf


@pytest.mark.parametrize("twist", [None, "lookahead"])
def test_a_prefix_kills_where_the_model_breaks_on_the_text_afterwards(twist: Any) -> None:
    lm = tiny_lm("12x", seed=4)

    def model() -> None:
        z = sample("z", LMString(lm, "1", min_tokens=2, max_tokens=4))
        potential("digits", digits, z, prefix=True)
        factor("small", -0.2 * int(z[:1]) - 0.001 * int(z))

    assert run(model, num_samples=16, ess_threshold=1.0, twist=twist).resampled > 0
    check_unbiased(ratios(model, num_samples=16, twist=twist), within=0.2)


def test_where_a_prefix_kills_all_a_note_names_it() -> None:
    def model(prefix: Any) -> None:
        z = sample("z", LMString(LM, "b", min_tokens=4, max_tokens=5, allow=["a", "b"]))
        potential("all", lambda t: -math.inf, z, prefix=prefix)

    def begins(text: str) -> float:
        return -math.inf if len(text) > 1 else 0.0

    (note,) = (n for n in run(lambda: model(begins)).notes if "'all'" in n)
    assert re.fullmatch(
        r"potential 'all': its prefix was -inf of all strings begun, e\.g\. '[ab]{2,}'", note
    )
    found = run(hard(prefix=True), num_samples=32, ess_threshold=0.0, rejections=0)
    (note,) = (n for n in found.notes if "strings begun" in n)
    assert re.search(r"'sorted': its prefix was -inf of \d+ of 32 strings", note)
    assert not [n for n in run(two_strings).notes if "strings begun" in n]


def test_a_broken_promise_is_told() -> None:
    def model() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=3))
        potential("p", lambda t: -1.0, z, prefix=lambda t: -math.inf if "b" in t else 0.0)

    for method in ("smc", "exact", "importance"):
        with pytest.raises(ValueError, match=r"potential 'p': of the whole text '.*b.*' prefix"):
            infer(model, method=method, progress=False)


def test_a_held_text_that_a_prefix_kills_is_told() -> None:
    def model() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=3))
        potential("p", lambda t: 0.0, z, prefix=lambda t: -math.inf if len(t) == 1 else 0.0)

    with pytest.raises(ValueError, match="potential 'p': prefix gives -inf of 'a', which"):
        smc_evidence(compile(model), PriorGuide(), 4, 0, held={"z": "aaa"}, every=1)


@pytest.mark.parametrize(
    ("prefix", "error", "message"),
    [
        (lambda t: math.nan, ValueError, "prefix of potential 'p' is nan"),
        (lambda t: "a" in t, TypeError, "prefix of potential 'p' must be a log weight"),
        ("b", TypeError, "potential 'p': prefix must be a function of the text so far, or True"),
    ],
)
def test_bad_prefixes_are_told(prefix: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        potential("p", lambda t: 0.0, "x", prefix=prefix)


def test_an_error_in_a_prefix_is_none_of_an_unfinished_text() -> None:
    def prefix(text: str) -> float:
        if len(text) == 1:
            raise LookupError("a mistake")
        return 0.0

    def model() -> None:
        z = sample("z", LMString(LM, "ab", min_tokens=2, max_tokens=4))
        try:
            potential("p", lambda t: 0.0, z, prefix=prefix)
        except LookupError:
            factor("caught", 0.0)

    with pytest.raises(LookupError, match="a mistake"):
        run(model)


def test_a_model_within_a_model_has_whole_strings() -> None:
    asked: list[str] = []

    def inner() -> None:
        z = sample("z", LMString(LM, "b", max_tokens=1))
        potential("p", lambda t: float(asked.append(str(t)) or 0.0), z, prefix=lambda t: -9.0)  # type: ignore[func-returns-value]

    def outer() -> None:
        z = sample("y", LMString(LM, "ab", max_tokens=3))
        potential("q", few, z)
        evidence = infer(inner, method="exact", progress=False).log_evidence
        assert evidence == pytest.approx(0.0, abs=1e-5)

    run(outer, num_samples=4)
    assert asked


def test_a_plain_potential_that_was_passed_over_is_noted() -> None:
    def model(**how: Any) -> None:
        z = sample("z", LMString(LM, "ab", min_tokens=4, max_tokens=5))
        potential("no b", lambda t: -math.inf if "b" in t else 0.0, z, **how)
        sample("y", LMString(LM, "a", max_tokens=1))

    (note,) = (n for n in run(model).notes if "no b" in n)
    assert "it did not count" in note
    assert "prefix" in note
    assert not [n for n in run(lambda: model(prefix=True)).notes if "did not count" in n]
