"""Raw draws from guides of any kind, of one program and of many rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import langppl as lp
from langppl.lm.seeds import row_seed
from langppl.testing import tiny_lm

LM = tiny_lm("ab.")
ROWS = [("a", "b"), ("b", "ab"), ("ab", "a")]


def story(beginning: str, ending: str = "b") -> str:
    middle = lp.sample("middle", lp.LMString(LM, beginning, max_tokens=3))
    letters = lp.deterministic("letters", len(middle))
    lp.sample("ending", lp.LMString(LM, f"{beginning}{middle}", max_tokens=3), obs=ending)
    return f"{beginning}{middle}{letters}"


def guides() -> list[lp.Guide]:
    trained = lp.GFlowNetGuide(LM, rank=2, seed=1)
    trained.fit(story, ROWS, steps=2, batch=4, progress=False)
    return [
        lp.PriorGuide(),
        lp.PromptedGuide(),
        lp.MixtureGuide([lp.PriorGuide(), trained]),
        trained,
    ]


@pytest.mark.filterwarnings("ignore::langppl.JoinWarning")
def test_rows_are_drawn_as_each_is_alone() -> None:
    for guide in guides():
        alone = [guide.sample(story, *r, n=4, seed=row_seed(5, k)) for k, r in enumerate(ROWS)]
        for data in (ROWS, [dict(zip(("beginning", "ending"), r, strict=True)) for r in ROWS]):
            assert guide.sample_many(story, data, n=4, seed=5, progress=False) == alone
        programs = [lp.compile(story, *r) for r in ROWS]
        assert guide.sample_many(programs, n=4, seed=5, progress=False) == alone
        assert guide.sample_many(story, ROWS, n=4, seed=6, progress=False) != alone


@pytest.mark.filterwarnings("ignore::langppl.JoinWarning")
def test_batches_change_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lp.PriorGuide().sample_many(story, ROWS, n=5, progress=False)
    monkeypatch.setattr("langppl.guides.base._TOGETHER", 4)
    assert lp.PriorGuide().sample_many(story, ROWS, n=5, progress=False) == expected


@pytest.mark.filterwarnings("ignore::langppl.JoinWarning")
def test_a_draw_has_latents_computed_values_and_what_was_returned() -> None:
    for draw in lp.PriorGuide().sample(story, "a", ending="b", n=20):
        assert set(draw) == {"middle", "letters", "_RETURN"}
        assert draw["letters"] == len(draw["middle"])
        assert draw["_RETURN"] == f"a{draw['middle']}{draw['letters']}"


@pytest.mark.filterwarnings("ignore::langppl.JoinWarning")
def test_draws_follow_the_guide() -> None:
    """The prior's draws of one token against their probabilities: chi-square, 3 classes."""

    def model() -> None:
        lp.sample("z", lp.LMString(LM, "a", max_tokens=1))

    n = 3000
    counts = Counter(str(d["z"]) for d in lp.PriorGuide().sample(model, n=n, seed=3))
    law = lp.infer(model, method="exact", progress=False).probabilities("z")
    statistic = sum((counts[str(t)] - n * p) ** 2 / (n * p) for t, p in law.items())
    assert set(counts) == {str(t) for t in law} and len(counts) == 3
    assert statistic < 13.8  # the 0.999 quantile of chi-square with 2 degrees of freedom


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be"),
        ({"n": 1.5}, "n must be"),
        ({"beginning": "a", "endng": "b"}, r"'endng' is no argument of the model.*'ending'\?"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    error = TypeError if "endng" in arguments else ValueError
    with pytest.raises(error, match=message):
        lp.PriorGuide().sample(story, **arguments)


def test_a_program_has_its_arguments() -> None:
    with pytest.raises(TypeError, match="has its arguments already"):
        lp.PriorGuide().sample(lp.compile(story, "a"), "a")


@pytest.mark.filterwarnings("ignore::langppl.JoinWarning")
@pytest.mark.parametrize("method", ["importance", "smc"])
def test_an_untrained_guide_says_so(method: str) -> None:
    guide = lp.GFlowNetGuide(LM, rank=2)
    options: dict[str, Any] = {"guide": guide, "method": method, "num_samples": 8}
    assert "the guide is untrained" in str(lp.infer(story, "a", progress=False, **options))
    guide.fit(story, ROWS, steps=1, batch=4, progress=False)
    assert "untrained" not in str(lp.infer(story, "a", progress=False, **options))
