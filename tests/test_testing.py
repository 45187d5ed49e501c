"""The contracts hold for langppl's own parts, and broken ones are found out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import langppl.testing as contracts
from langppl import GFlowNetGuide, LMChoice, LMString, PromptedGuide, Tempered, sample
from langppl.distributions import Text
from langppl.distributions.base import Pending
from langppl.guides import PriorGuide
from langppl.program.execution import Choice, Chooser
from langppl.testing import check_distribution, check_guide, tiny_lm

LM = tiny_lm("ab.", seed=1, merged=["ab", "b."], split=["é"])
RULES: dict[str, dict[str, Any]] = {
    "end": {"max_tokens": 3},
    "stop": {"max_tokens": 3, "stop": "."},
    "min": {"max_tokens": 3, "min_tokens": 2, "stop": ["b.", "aa"]},
    "reject": {"max_tokens": 3, "stop": ".", "truncate": "reject"},
    "ban, temperature": {"max_tokens": 3, "ban": ["a"], "temperature": 0.7},
}


@pytest.mark.parametrize("name", RULES)
def test_strings_keep_the_contract(name: str) -> None:
    check_distribution(LMString(LM, "ab", **RULES[name]), samples=500)


def test_choices_keep_the_contract() -> None:
    check_distribution(LMChoice(LM, "a", ["a", "bé", "."]), samples=500)


def test_what_cannot_be_listed_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 5 strings"):
        check_distribution(LMString(LM, "a", max_tokens=4), most=5)
    with pytest.raises(ValueError, match="open string"):
        check_distribution(LMString(LM, "a"))
    with pytest.raises(TypeError, match="only an LMString or an LMChoice"):
        check_distribution(Tempered(LMString(LM, "a", max_tokens=2), 0.5))  # type: ignore[arg-type]


class TooLikely(LMString):
    """log_prob is 0.1 nats too high."""

    def pending(self, value: str, **how: Any) -> Pending:
        honest = super().pending(value, **how)
        return Pending(honest.requests, lambda replies: honest.finish(replies) + 0.1)


class Boastful(LMString):
    """Draws are recorded as likelier than they are."""

    def draw(self, key: Any, **how: Any) -> tuple[Text, float]:
        value, log_q = super().draw(key, **how)
        return value, log_q + 0.1


class TooHot(LMString):
    """Draws at another temperature, and records what they should have been."""

    def draw(self, key: Any, **how: Any) -> tuple[Text, float]:
        value, _ = super().draw(key, **{**how, "temperature": 3.0})
        return value, float(self.log_prob(value))


class Wild(LMString):
    """Draws what its rules forbid."""

    def draw(self, key: Any, **how: Any) -> tuple[Text, float]:
        return Text("aaaaaaaa", LM.encode_text("aaaaaaaa"), LM.fingerprint), -1.0


class Fragile(LMString):
    """Takes what is impossible for possible."""

    def log_prob(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return super().log_prob("a")


class Silent(LMString):
    """Does not say why something is impossible."""

    def why_impossible(self, value: object) -> str | None:
        return None


class Forgiving(LMString):
    """Gives an unfinished string the weight that it rejects."""

    def pending(self, value: str, **how: Any) -> Pending:
        request = self.request(value, **how)
        assert request is not None
        return Pending((request,), lambda replies: replies[0].log_prob)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (TooLikely, "sum to 1.105"),
        (Boastful, "was drawn with log-probability"),
        (TooHot, "not as frequent"),
        (Wild, "rules do not allow"),
        (Fragile, "is impossible, but its log_prob is -"),
        (Silent, "why_impossible gives no rule"),
    ],
)
def test_broken_strings_fail(broken: type[LMString], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_distribution(broken(LM, "ab", max_tokens=2, stop="."), samples=500)


def test_rejected_strings_must_be_impossible() -> None:
    dist = Forgiving(LM, "ab", max_tokens=2, stop=".", truncate="reject")
    with pytest.raises(AssertionError, match="unfinished and rejected, but its log_prob is"):
        check_distribution(dist, samples=10)


def test_a_broken_choice_fails() -> None:
    class Unnormalised(LMChoice):
        @staticmethod
        def _normalised(replies: Any) -> np.ndarray:
            return np.array([r.log_prob for r in replies])

    with pytest.raises(AssertionError, match="sum to 0"):
        check_distribution(Unnormalised(LM, "a", ["aa", "b"]))


# -- guides --------------------------------------------------------------------------------------


def story(truncate: Any = "keep") -> None:
    kind = sample("kind", LMChoice(LM, "a", ["a", "b"]))
    text = sample("text", LMString(LM, f"b{kind}", stop=".", max_tokens=2, truncate=truncate))
    sample("end", LMString(LM, f"{kind}{text}"), obs="ab")


@pytest.mark.parametrize("truncate", ["keep", "reject"])
@pytest.mark.parametrize("guide", [PriorGuide(), PromptedGuide()], ids=lambda g: g.name)
def test_guides_keep_the_contract(guide: Any, truncate: str) -> None:
    check_guide(guide, story, truncate, samples=300)


def test_a_trained_guide_keeps_the_contract() -> None:
    guide = GFlowNetGuide(LM, seed=1)
    guide.fit(story, steps=3, batch=8, learning_rate=1e-2, progress=False)
    check_guide(guide, story, samples=300)


class Changed(PriorGuide):
    """The prior, with its choices changed."""

    def change(self, name: str, fn: Any, choice: Choice, key: Any) -> Choice:
        raise NotImplementedError

    def chooser(self, program: Any, key: Any) -> Chooser:
        honest = super().chooser(program, key)

        def choose(name: str, fn: Any, execution: Any) -> Choice:
            return self.change(name, fn, honest(name, fn, execution), key)

        return choose


class Unnormalised(Changed):
    def change(self, name: str, fn: Any, choice: Choice, key: Any) -> Choice:
        return Choice(choice.value, (choice.log_q or 0.0) - 0.05)


class Forgetful(Changed):
    """Right about the values it is asked about, wrong about its own draws."""

    def change(self, name: str, fn: Any, choice: Choice, key: Any) -> Choice:
        shift = 0.0 if hasattr(fn, "forced") else 0.3
        return Choice(choice.value, (choice.log_q or 0.0) + shift)


class Sticky(Changed):
    """Draws the first of the choices always, and says that it does not."""

    def change(self, name: str, fn: Any, choice: Choice, key: Any) -> Choice:
        if name != "kind" or hasattr(fn, "forced"):
            return choice
        return Choice(fn.text(0), float(fn.log_probs()[0]))


class Narrow(Changed):
    """Never proposes the second choice, and says so: importance weights miss a part."""

    def change(self, name: str, fn: Any, choice: Choice, key: Any) -> Choice:
        if name != "kind":
            return choice
        if not hasattr(fn, "forced"):
            return Choice(fn.text(0), 0.0)
        return Choice(choice.value, 0.0 if choice.value == "a" else -np.inf)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Unnormalised, "sums to 0.90"),
        (Forgetful, "log-probability .* recorded"),
        (Sticky, "not as frequent"),
        (Narrow, "never proposes"),
    ],
)
def test_broken_guides_fail(broken: type[Changed], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_guide(broken(), story, samples=300)


def test_the_evidence_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = contracts.log_weight
    calls = iter(range(10**6))
    listed = 2 * len(list(contracts.enumerate_strings(LMString(LM, "ba", stop=".", max_tokens=2))))
    monkeypatch.setattr(
        contracts, "log_weight", lambda e: honest(e) + (1.0 if next(calls) >= listed else 0.0)
    )
    with pytest.raises(AssertionError, match="standard errors"):
        check_guide(PriorGuide(), story, samples=300)


def test_a_numeric_latent_cannot_be_listed() -> None:
    import pyro.distributions as dist

    def model() -> None:
        sample("p", dist.Beta(1.0, 1.0))
        sample("x", LMString(LM, "a"), obs="b")

    with pytest.raises(TypeError, match="only an LMString or an LMChoice"):
        check_guide(PriorGuide(), model)


def test_too_many_executions() -> None:
    with pytest.raises(ValueError, match="more than 5"):
        check_guide(PriorGuide(), story, most=5)
