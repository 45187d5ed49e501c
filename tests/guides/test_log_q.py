"""`log_q`: with which probability a guide draws latents that it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from langppl import GFlowNetGuide, LMChoice, LMString, PriorGuide, PromptedGuide, compile, sample
from langppl.guides import Guide
from langppl.guides.base import log_q_together
from langppl.program import Program
from langppl.program.execution import Chooser
from langppl.testing import check_guide, check_log_q, tiny_lm

LM = tiny_lm("ab.0123456789", seed=1, merged=["ab", "b."])
OTHER = tiny_lm("ab.", seed=2)
RULES: dict[str, Any] = {"stop": ".", "max_tokens": 2, "allow": ["a", "b", "."]}


def story(truncate: Any = "keep") -> None:
    kind = sample("kind", LMChoice(LM, "a", ["a", "b"]))
    text = sample("text", LMString(LM, f"b{kind}", truncate=truncate, **RULES))
    sample("end", LMString(LM, f"{kind}{text}"), obs="ab")


def numbers() -> None:
    p = sample("p", dist.Beta(2.0, 3.0))
    text = sample("text", LMString(LM, "a" if p < 0.5 else "b", **RULES))
    rate = sample("rate", dist.Gamma(2.0, 1.0))
    seen = sample("seen", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    coin = sample("coin", dist.Categorical(logits=torch.tensor([0.0, 1.0, 2.0])))
    sample("x", dist.Normal(p * rate + seen.sum() + coin, 1.0), obs=1.0)
    sample("end", LMString(LM, f"a{text}"), obs="b")


def branch() -> None:
    first = sample("first", LMString(LM, "ab", max_tokens=2, allow=["a", "b"]))
    if "a" in first:
        second = sample("second", LMString(OTHER, "a", max_tokens=2))
        sample("end", LMString(LM, f"{first}{second}"), obs="b")
    else:
        sample("end", LMString(LM, f"{first}a"), obs="b")


def draws(program: Program, n: int) -> list[dict[str, Any]]:
    return program.simulate(n, lengths={"end": 1})


def taught(model: Callable[..., None], **options: Any) -> GFlowNetGuide:
    guide = GFlowNetGuide(LM, seed=1, **options)
    return guide.fit(model, steps=3, batch=8, learning_rate=1e-2, progress=False)


def propose(*args: Any) -> None:
    p = pyro.sample("p", dist.Beta(5.0, 2.0))
    pyro.sample("rate", dist.Gamma(2.0, 1.0 + p))


GUIDES: dict[str, Callable[[Callable[..., None]], Guide]] = {
    "prior": lambda _: PriorGuide(),
    "prompted": lambda _: PromptedGuide(),
    "gflownet": taught,
    "defensive": lambda model: taught(model, defensive=0.3),
    "prior numbers": lambda model: taught(model, numeric="prior"),
    "Pyro guide": lambda model: taught(model, numeric=propose),
}


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("model", [numbers, branch])
def test_it_is_what_the_draws_record(model: Callable[..., None], name: str) -> None:
    check_log_q(GUIDES[name](model), model, samples=30)


@pytest.mark.parametrize("truncate", ["keep", "reject"])
def test_a_defensive_share_counts(truncate: str) -> None:
    guide = taught(story, defensive=0.25)
    check_guide(guide, story, truncate, samples=200)
    program = compile(story)
    rows = draws(program, 20)
    mixed = guide.log_q(program, rows)
    guide.defensive = 0.0
    alone = guide.log_q(program, rows)
    assert np.abs(mixed - alone).max() > 0.01
    # Each of the two latents keeps at least a quarter of its prior.
    assert (mixed >= PriorGuide().log_q(program, rows) + 2 * math.log(0.25) - 1e-5).all()


def test_the_prior_agrees_with_the_program() -> None:
    program = compile(numbers)
    rows = draws(program, 10)
    executions = program.executions(rows)
    expected = [sum(e.sites[n].log_prob or 0.0 for n in program.latents) for e in executions]
    assert PriorGuide().log_q(program, rows) == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_drawn_has_none() -> None:
    program = compile(numbers)
    (row,) = draws(program, 1)
    for guide in (PriorGuide(), PromptedGuide(), taught(numbers), taught(numbers, defensive=0.5)):
        for site, value in (("text", "0"), ("p", 1.5), ("rate", -1.0), ("coin", 7.0)):
            assert guide.log_q(program, [{**row, site: value}])[0] == -math.inf, (guide.name, site)
        assert np.isfinite(guide.log_q(program, [row])).all()


def test_several_programs_at_once() -> None:
    programs = [compile(story, t) for t in ("keep", "reject")]
    rows = draws(programs[0], 2)
    guide = PromptedGuide()
    found = log_q_together(guide, list(zip(programs, rows, strict=True)))
    assert found == pytest.approx(guide.log_q(programs[0], rows), abs=1e-5)


class Own(Guide):
    """A guide of a user's."""

    name = "own"

    def chooser(self, program: Program, key: Any) -> Chooser:
        return PriorGuide().chooser(program, key)


class WithLogQ(Own):
    def log_q(self, program: Program, rows: Any) -> np.ndarray:
        return PriorGuide().log_q(program, rows)


class Wrong(Own):
    def log_q(self, program: Program, rows: Any) -> np.ndarray:
        return PriorGuide().log_q(program, rows) + 0.1


def test_a_guide_of_ones_own() -> None:
    program = compile(story)
    rows = draws(program, 2)
    with pytest.raises(NotImplementedError, match=r"'own' \(Own\) .* implement its `given`"):
        Own().log_q(program, rows)
    check_guide(Own(), program, samples=50)
    check_guide(WithLogQ(), program, samples=50)
    assert (log_q_together(WithLogQ(), [(program, r) for r in rows]) < 0).all()
    for check in (check_guide, check_log_q):
        with pytest.raises(AssertionError, match="but the guide drew it with"):
            check(Wrong(), program, samples=50)


def test_bad_input() -> None:
    program = compile(story)
    (row,) = draws(program, 1)
    single: Any = row
    with pytest.raises(TypeError, match="list of mappings"):
        PriorGuide().log_q(program, single)
    with pytest.raises(ValueError, match="latent site 'text' has no value"):
        PriorGuide().log_q(program, [{"kind": "a"}])

    def guide(*args: Any) -> None:
        pyro.sample("p", dist.Beta(pyro.sample("hidden", dist.Gamma(1.0, 1.0)), 1.0))

    hiding = taught(numbers, numeric=guide)
    other = compile(numbers)
    with pytest.raises(ValueError, match="draws 'hidden', which the given latents"):
        hiding.log_q(other, draws(other, 1))


def test_nan_never_passes() -> None:
    class Broken(PriorGuide):
        def given(self, program: Program, values: Mapping[str, Any]) -> Chooser:
            honest = super().given(program, values)

            def choose(name: str, fn: Any, execution: Any) -> Any:
                choice = honest(name, fn, execution)
                return type(choice)(choice.value, math.nan)

            return choose

    program = compile(story)
    with pytest.raises(ValueError, match="'kind' is nan"):
        Broken().log_q(program, draws(program, 1))
