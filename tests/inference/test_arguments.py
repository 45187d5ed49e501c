"""Models' arguments by name, and the arguments of `infer` for a guide that it trains."""

from __future__ import annotations

import pytest

import langppl as lp
from langppl.testing import tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore::langppl.JoinWarning")

LM = tiny_lm("ab.")


def story(beginning: str, ending: str = "b", *, extra: str = "") -> None:
    middle = lp.sample("middle", lp.LMString(LM, f"{beginning}{extra}", max_tokens=3))
    lp.sample("ending", lp.LMString(LM, f"{beginning}{middle}", max_tokens=3), obs=ending)


def plain(beginning: str, ending: str = "b") -> None:
    story(beginning, ending)


def test_by_name_and_by_place_are_the_same() -> None:
    expected = lp.infer(plain, "a", "ab", num_samples=20, progress=False)
    ways = [
        lp.infer(plain, beginning="a", ending="ab", num_samples=20, progress=False),
        lp.infer(plain, "a", ending="ab", num_samples=20, progress=False),
        lp.infer(lp.compile(plain, ending="ab", beginning="a"), num_samples=20, progress=False),
    ]
    for found in ways:
        assert found.samples == expected.samples
        assert found.log_evidence == expected.log_evidence
    by_default = lp.infer(plain, beginning="a", num_samples=20, progress=False)
    assert (
        by_default.log_evidence
        == lp.infer(plain, "a", "b", num_samples=20, progress=False).log_evidence
    )


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            {"num_sample": 3},
            r"'num_sample' is no argument .*, and no option here; .* 'num_samples'\?",
        ),
        ({"begining": "a"}, r"'begining' is no argument .* did you mean 'beginning'\?"),
        ({"ending": "a"}, "'ending' does not fit the model's arguments .* missing"),
        ({"beginning": "a", "extra": "b"}, "takes 'extra' by keyword alone"),
    ],
)
def test_names_that_do_not_fit(named: dict[str, str], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        lp.infer(story, progress=False, **named)


def test_a_program_takes_no_arguments() -> None:
    with pytest.raises(TypeError, match="has its arguments already; give none, got ending"):
        lp.infer(lp.compile(plain, "a"), ending="b", progress=False)


def test_the_guide_that_is_trained_is_told_how() -> None:
    found = lp.infer(
        plain, "a", guide="gflownet", fit={"steps": 3, "batch": 4}, num_samples=8, progress=False
    )
    assert found.guide_object.history.rows == 3
    with pytest.raises(ValueError, match=r'fit is of guide="gflownet", and the guide is \'prior\''):
        lp.infer(plain, "a", fit={"steps": 3}, progress=False)


def test_a_training_that_cannot_be_is_told_at_once() -> None:
    asked = {"guide": "gflownet", "num_samples": 8, "progress": False}
    with pytest.raises(TypeError, match=r"fit has 'step', which is no .*; did you mean 'steps'\?"):
        lp.infer(plain, "a", fit={"step": 3}, **asked)
    with pytest.raises(TypeError, match="fit has 'data'"):
        lp.infer(plain, "a", fit={"data": [("a",)]}, **asked)


def test_checks_take_names_too() -> None:
    few = {"num_samples": 8, "seed": 3, "progress": False}
    by_place = lp.evidence_bounds(plain, "a", "ab", num_observations=4, **few)
    by_name = lp.evidence_bounds(plain, ending="ab", beginning="a", num_observations=4, **few)
    assert by_name.lower == by_place.lower
    smc = {"method": "smc", "every": 1, "num_observations": 4, **few}
    with pytest.raises(TypeError, match=r"'evry' is no argument .* did you mean 'every'\?"):
        lp.evidence_bounds(plain, beginning="a", evry=2, **smc)
    assert (
        lp.evidence_bounds(plain, beginning="a", ending="ab", **smc).lower
        == lp.evidence_bounds(plain, "a", "ab", **smc).lower
    )

    checked = {"simulations": 6, "draws": 3, **few}
    assert (
        lp.calibrate(plain, "a", ending="ab", **checked).ranks
        == lp.calibrate(plain, "a", "ab", **checked).ranks
    )
    with pytest.raises(TypeError, match=r"'chans' is no argument .* did you mean 'chains'\?"):
        lp.calibrate(plain, beginning="a", chans=2, method="mh", **checked)


def test_a_comparison_takes_names_and_a_training() -> None:
    found = lp.compare(
        plain,
        beginning="a",
        guides=["prior", "gflownet"],
        fit={"steps": 3, "batch": 4},
        num_samples=8,
        progress=False,
    )
    assert not found.errors
    expected = lp.infer(plain, "a", num_samples=8, progress=False)
    assert found.posteriors["prior"].log_evidence == pytest.approx(expected.log_evidence, abs=1e-5)
    assert found.posteriors["gflownet"].guide_object.history.rows == 3
    with pytest.raises(ValueError, match="fit is of guide=\"gflownet\", and the guide is 'prior'"):
        lp.compare(plain, "a", guides=["prior"], fit={"steps": 3}, progress=False)
    with pytest.raises(TypeError, match=r"'fits' is no argument .* did you mean 'fit'"):
        lp.compare(plain, beginning="a", fits={}, progress=False)
