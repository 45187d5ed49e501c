"""Names of arguments that other libraries have, and misspelt ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import langppl as lp
from langppl.testing import tiny_lm

LM = tiny_lm("ab.")


def story(beginning: str, ending: str = "b") -> None:
    middle = lp.sample("middle", lp.LMString(LM, beginning, max_tokens=2))
    lp.sample("ending", lp.LMString(LM, f"{beginning}{middle}"), obs=ending)


ROWS = [("a", "b")]
CASES: list[tuple[Callable[[], object], str]] = [
    (
        lambda: lp.LMString(LM, "a", max_new_tokens=5),  # type: ignore[call-arg]
        r"LMString has no argument 'max_new_tokens'; did you mean 'max_tokens'\?",
    ),
    (
        lambda: lp.LMString(LM, "a", stop_strings="."),  # type: ignore[call-arg]
        r"no argument 'stop_strings'; did you mean 'stop'\?",
    ),
    (
        lambda: lp.LMString(LM, "a", top_p=0.9),  # type: ignore[call-arg]
        r"no argument 'top_p': nucleus sampling is no fixed law of strings here; use temperature",
    ),
    (
        lambda: lp.LMString(LM, "a", colour=1),  # type: ignore[call-arg]
        r"^LMString has no argument 'colour'$",
    ),
    (
        lambda: lp.GFlowNetGuide(LM).fit(story, ROWS, lr=1e-3),  # type: ignore[call-arg]
        r"GFlowNetGuide.fit has no argument 'lr'; did you mean 'learning_rate'\?",
    ),
    (
        lambda: lp.GFlowNetGuide(LM).fit(story, ROWS, epochs=3),  # type: ignore[call-arg]
        r"no argument 'epochs'; did you mean 'steps'\?",
    ),
    (
        lambda: lp.GFlowNetGuide(LM).fit(story, "a", "b"),  # type: ignore[misc]
        r"fit takes data by place, a sequence of rows.*write \[\('a', 'b'\)\]",
    ),
    (lambda: lp.infer_many(story, "a", "b"), r"infer_many takes .*write \[\('a', 'b'\)\]"),  # type: ignore[misc]
    (
        lambda: lp.infer_many(story, ROWS, samples=3),
        r"no option 'samples'; it has none; nor has infer_many .*; did you mean 'num_samples'\?",
    ),
    (
        lambda: lp.calibrate(story, "a", method="smc", evry=3),
        r"'evry' is no argument of the model.* did you mean 'every'\?",
    ),
    (
        lambda: lp.infer(story, "a", "b", n=3),
        r"'n' is no argument of the model.* did you mean 'num_samples'\?",
    ),
]


@pytest.mark.parametrize(("call", "says"), CASES)
def test_a_name_of_another_library_gives_a_hint(call: Callable[[], object], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        call()


def test_em_names_its_own_arguments() -> None:
    view = tiny_lm("ab.").trainable("v", rank=2)

    def model(ending: str) -> None:
        lp.sample("ending", lp.LMString(view, "a", max_tokens=2), obs=ending)

    with pytest.raises(TypeError, match=r"'lr'; it has none; nor has em .* mean 'learning_rate'\?"):
        lp.em(model, [("b",)], rounds=1, lr=1e-3)
