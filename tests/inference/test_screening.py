"""Screening: tokens that must not follow are drawn anew, and the weights are right."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mixed import LM
from test_conditional import ratios as held_ratios
from test_conditional import z_score
from test_potentials import check_unbiased, few, hard, ratios, run, short, two_strings

import langppl as lp
from langppl import Guidance, LMString, PromptedGuide, factor, infer, potential, regex, sample
from langppl.guides import PriorGuide
from langppl.inference.particles import Crowd
from langppl.inference.screening import rejecting, rejecting_beside
from langppl.lm.growing import Draft
from langppl.lm.requests import Candidates, DrawReply, perform
from langppl.program import compile
from langppl.testing import tiny_lm

MASSES = np.array([0.4, 0.25, 0.2, 0.1, 0.05])


class Scripted:
    """Random numbers that are given beforehand; `missing` says that one more was asked for."""

    def __init__(self, numbers: tuple[float, ...]) -> None:
        self.numbers = list(numbers)
        self.missing = False

    def random(self) -> float:
        if not self.numbers:
            self.missing = True
            return 0.0
        return self.numbers.pop(0)


def orders() -> Iterator[tuple[tuple[int, ...], float]]:
    """Every order in which all actions can be drawn without replacement, and its probability."""
    for order in itertools.permutations(range(len(MASSES))):
        chance, left = 1.0, 1.0
        for k in order:
            chance *= MASSES[k] / left
            left -= MASSES[k]
        yield order, chance


def lined_up(order: tuple[int, ...], most: int) -> Candidates:
    masses = MASSES[list(order)][: most + 2]
    rest = MASSES[list(order)][most + 2 :].sum()
    left = np.append(masses, rest)[::-1].cumsum()[::-1]
    return Candidates(np.log(masses), left, lambda k: DrawReply((order[k],), "", 0.0))


def outcomes(good: set[int], most: int) -> Iterator[tuple[float, int, float]]:
    """All ways to draw: probability, the action that is taken and Ẑ."""
    for order, chance in orders():
        pending: list[tuple[tuple[float, ...], float]] = [((), 1.0)]
        while pending:
            script, own = pending.pop()
            rng = Scripted(script)
            candidates = lined_up(order, most)
            draws = rejecting(candidates, most, rng)  # type: ignore[arg-type]
            seen: list[int] = []
            taken: int | None = None
            result = None
            try:
                at = next(draws)
                while not rng.missing:
                    seen.append(order[at])
                    if taken is None and order[at] in good:
                        taken = order[at]
                    at = draws.send(order[at] in good)
            except StopIteration as end:
                result = end.value
            if rng.missing:
                # The token that was taken is in the urn, with all that was not drawn.
                assert taken is not None
                unseen = MASSES[[k for k in range(len(MASSES)) if k not in seen]].sum()
                again = MASSES[taken] / (MASSES[taken] + unseen)
                pending.append(((*script, 0.0), own * again))
                if unseen > 1e-12:
                    pending.append(((*script, 1.0 - 1e-12), own * (1.0 - again)))
                continue
            assert result is not None
            yield chance * own, order[result[0]], math.exp(result[1])


@pytest.mark.parametrize("most", [1, 2, 3, 8])
@pytest.mark.parametrize("good", [{0}, {4}, {1, 3}, {0, 2, 4}, {0, 1, 2, 3, 4}, set()])
def test_the_estimate_is_unbiased_by_enumeration(good: set[int], most: int) -> None:
    total = 0.0
    mean = np.zeros(len(MASSES))
    for chance, taken, estimate in outcomes(good, most):
        total += chance
        mean[taken] += chance * estimate * (taken in good)
    assert total == pytest.approx(1.0, abs=1e-12)
    expected = [mass * (k in good) for k, mass in enumerate(MASSES)]
    assert mean == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("most", [1, 2, 3, 8])
@pytest.mark.parametrize("good", [{4}, {1, 3}, {0, 2, 4}])
def test_a_held_particle_rejects_by_the_law_that_weights_leave(good: set[int], most: int) -> None:
    """By enumeration: Ẑ, weighed by itself among those that are alive, has the held one's law."""
    free: Counter[float] = Counter()
    for chance, taken, estimate in outcomes(good, most):
        free[round(estimate, 9)] += chance * estimate * (taken in good)
    held: Counter[float] = Counter()
    for order, chance in orders():
        draws = rejecting_beside(lined_up(order, most), most)
        try:
            at = next(draws)
            while True:
                at = draws.send(order[at] in good)
        except StopIteration as end:
            held[round(math.exp(end.value[1]), 9)] += chance * MASSES[list(good)].sum()
    assert free.keys() - {0.0} == held.keys()
    for estimate, chance in held.items():
        assert free[estimate] == pytest.approx(chance, abs=1e-12)


@pytest.mark.parametrize(
    ("model", "rejections", "options"),
    [
        (hard(prefix=True), 0, {"guide": "prompted", "every": 3}),
        (hard(prefix=True), 1, {"guide": "prompted", "every": 3}),
        (hard(prefix=True), 2, {"twist": "flow", "resampling": "residual"}),
        (two_strings, 1, {"twist": "lookahead", "rejuvenation": 1, "num_samples": 16}),
    ],
)
def test_the_evidence_is_unbiased(model: Any, rejections: int, options: dict[str, Any]) -> None:
    found = ratios(model, first=900, rejections=rejections, **{"num_samples": 32, **options})
    check_unbiased(found, within=0.2)


@pytest.mark.parametrize(("model", "rejections"), [(hard(prefix=True), 1), (two_strings, 32)])
def test_conditional_smc_is_unbiased(model: Any, rejections: int) -> None:
    found = held_ratios(compile(model), PriorGuide(), rejections=rejections, num_samples=8)
    assert abs(z_score(found)) < 3.3, (found.mean(), found.std())
    assert abs(found.mean() - 1.0) < 0.15


def test_nobody_dies_where_a_token_may_follow_everywhere() -> None:
    def model() -> None:
        z = sample("z", LMString(LM, "ab", min_tokens=4, max_tokens=5, allow=["a", "b"]))
        potential("short", short, z, prefix=True)

    dead = {
        k: np.isneginf(run(model, num_samples=64, rejections=k, ess_threshold=0.0).log_weights)
        for k in (0, 32)
    }
    # The share of the prior's draws that may live is the evidence.
    share = 1.0 - math.exp(infer(model, method="exact", progress=False).log_evidence or 0.0)
    assert abs(dead[0].mean() - share) < 4 * math.sqrt(share * (1.0 - share) / 64)
    assert share > 0.3
    assert not dead[32].any()


def test_a_string_does_not_end_where_its_whole_has_no_weight() -> None:
    """Also by a factor, and by a potential's `fn` where its prefix has nothing against it."""

    def long_enough(text: str) -> float:
        return 0.0 if len(text) >= 3 else -math.inf

    def model() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=5))
        potential("long", long_enough, z, prefix=lambda text: 0.0)
        factor("even", 0.0 if len(z) % 2 == 0 else -math.inf)

    found = run(model, num_samples=64, ess_threshold=0.0)
    assert np.isneginf(found.log_weights).mean() < 0.2
    assert all(len(z) % 2 == 0 and len(z) >= 3 for z in found.probabilities("z"))
    check_unbiased(ratios(model, runs=40, num_samples=16), within=0.1)


def test_without_a_prefix_nothing_is_screened() -> None:
    def model() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=4))
        potential("few", few, z)

    one, other = (run(model, rejections=k) for k in (0, 32))
    assert list(one.log_weights) == list(other.log_weights)
    assert one.log_q is not None
    assert other.log_q is not None
    assert run(hard(prefix=True)).log_q is None
    assert run(hard(prefix=True), rejections=0).log_q is not None


def test_no_tool_is_called_for_what_is_not_drawn() -> None:
    asked: list[str] = []

    def tool(text: str) -> str:
        asked.append(text)
        return text

    def model() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=3, allow=["a", "b"]))
        potential("short", short, z, prefix=True)
        lp.call("tool", tool, z)

    program = compile(model)
    asked.clear()
    found = run(program, num_samples=4, ess_threshold=0.0)
    assert set(asked) <= {str(z) for z in found["z"]}


def test_what_breaks_on_a_whole_text_is_an_error_where_it_is_drawn() -> None:
    def model(never: str) -> None:
        z = sample("z", LMString(LM, "ab", min_tokens=2, max_tokens=3, allow=["a", "b"]))
        potential("short", short, z, prefix=True)
        if never in z:
            raise LookupError("a mistake")

    with pytest.raises(LookupError, match="a mistake"):
        run(lambda: model("a"))
    assert run(lambda: model("bb")).num_samples == 8


def test_an_error_in_a_prefix_is_told() -> None:
    def prefix(text: str) -> float:
        if len(text) == 2:
            raise LookupError("a mistake")
        return 0.0

    def model() -> None:
        z = sample("z", LMString(LM, "ab", min_tokens=3, max_tokens=4))
        potential("p", lambda t: 0.0, z, prefix=prefix)

    with pytest.raises(LookupError, match="a mistake"):
        run(model)


def test_of_many_tokens_the_likely_one_is_first() -> None:
    """A time that is rounded to 0 would put a token first whatever its share."""
    shares = torch.full((50_000,), 1e-12)
    shares[7] = 1.0
    step = SimpleNamespace(groups={}, end_ids=torch.tensor([], dtype=torch.long))
    draft = SimpleNamespace(
        uniforms=np.random.default_rng(0), request=SimpleNamespace(candidates=3), candidates=None
    )
    others = 0
    for _ in range(2000):
        Draft.line_up(draft, shares, step)  # type: ignore[arg-type]
        found = draft.candidates
        assert len(found) == 3
        others += bool(found.log_probs[0] < -1.0)
    assert others == 0  # 1e-4 are expected of them all


@pytest.mark.parametrize("way", ["plain", "guided", "grammar", "stop", "long"])
def test_candidates_have_the_law_of_draws(way: str) -> None:
    lm = tiny_lm("ab.", seed=5, merged=["ab", "b.", "a."])
    fn = LMString(lm, "ab", max_tokens=100 if way == "long" else 4, min_tokens=0)
    if way == "grammar":
        fn = LMString(lm, "ab", max_tokens=4, grammar=regex("[ab]{0,3}"))
    if way == "stop":
        fn = LMString(lm, "ab", max_tokens=4, stop=".")

    def context(info: Any) -> str:
        return "b" if info.observations else "a"

    def model() -> None:
        z = sample("z", fn)
        sample("seen", LMString(lm, z), obs="a")

    guided = PromptedGuide(context=context, guidance=Guidance(0.5))
    crowd = Crowd(compile(model), guided if way == "guided" else PriorGuide(), 1, 0)
    crowd.begin()
    crowd.decide(0)
    growing = crowd.particles[0].growing
    assert growing is not None
    begun = lm.encode_text("a")
    asked = replace(growing.request, begun=begun, length=len(begun) + 1, candidates=4)
    requests = [replace(asked, key=(k,)) for k in range(400)]
    replies = perform(requests)
    exact: dict[Any, float] = {}
    first: Counter[Any] = Counter()
    for reply in replies:
        assert isinstance(reply, DrawReply)
        found = reply.candidates
        assert found is not None
        assert found.left[0] == pytest.approx(1.0)
        after = [found.take(k) for k in range(len(found))]
        names = [(r.ids, r.text, r.is_ended) for r in after]
        assert len(set(names)) == len(names)
        for k, (name, r) in enumerate(zip(names, after, strict=True)):
            assert r.log_prob == pytest.approx(found.log_probs[k])
            assert found.left[k] - found.left[k + 1] == pytest.approx(math.exp(r.log_prob))
            known = exact.setdefault(name, math.exp(r.log_prob))
            assert known == pytest.approx(math.exp(r.log_prob), abs=1e-5)
        first[names[0]] += 1
    assert sum(exact.values()) == pytest.approx(1.0, abs=1e-4)
    for name, p in exact.items():
        error = math.sqrt(p * (1 - p) / len(replies))
        assert abs(first[name] / len(replies) - p) < 4 * error + 1e-3, name


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1, "rejections must be an integer of at least 0, got -1"), (1.5, "rejections must be")],
)
def test_bad_rejections_are_told(value: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        run(two_strings, rejections=value)
    with pytest.raises(ValueError, match="takes no rejections"):
        infer(two_strings, method="importance", rejections=4, progress=False)
