"""The flow that a guide learned over the sites of a program, as a twist of particles."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from langppl import GFlowNetGuide, LMString, RewardSchedule, compile, factor, infer, sample
from langppl.guides import Guide, PriorGuide
from langppl.inference.particles import Crowd
from langppl.inference.smc import run_crowd
from langppl.program import Program
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=5, merged=["ab", "b."])


def late() -> None:
    """All strings first, then the evidence: of the first, of both, and of what both say."""
    first = sample("first", LMString(LM, "ab", max_tokens=2))
    second = sample("second", LMString(LM, f"a{first}", max_tokens=2))
    sample("of first", LMString(LM, f"b{first}"), obs="ab.")
    sample("of both", LMString(LM, f"{first}a{second}"), obs="bb")


def taught(program: Program, steps: int = 25, learning_rate: float = 3e-3) -> GFlowNetGuide:
    guide = GFlowNetGuide(LM, seed=0, objective="subtb")
    guide.fit(
        program,
        steps=steps,
        batch=16,
        learning_rate=learning_rate,
        schedule=RewardSchedule(start=1.0),
        progress=False,
    )
    return guide


def ratios(program: Program, guide: Guide, runs: int, **options: object) -> np.ndarray:
    """Ẑ/Z of some runs."""
    log_z = infer(program, method="exact", progress=False).log_evidence
    settings = {"num_samples": 12, "ess_threshold": 0.9, "every": 1, "twist": "flow", **options}
    found = [
        infer(program, guide=guide, method="smc", seed=s, progress=False, **settings).log_evidence  # type: ignore[arg-type]
        for s in range(runs)
    ]
    return np.exp(np.array(found) - log_z)


def is_unbiased(found: np.ndarray) -> bool:
    return abs(found.mean() - 1.0) <= 3.3 * found.std(ddof=1) / math.sqrt(len(found)) + 1e-5


@pytest.mark.parametrize("name", ["late", "branch", "steered"])
def test_the_evidence_is_unbiased(truth: ModuleType, name: str) -> None:
    if name == "late":
        program = compile(late)
        guide = taught(program)
    else:
        program = compile(truth.PROGRAMS[name])
        guide = GFlowNetGuide(truth.LM, seed=0, objective="db")
        guide.fit(program, steps=10, batch=8, learning_rate=3e-3, progress=False)
    assert is_unbiased(ratios(program, guide, 40))
    # However wrong the flow is.
    with torch.no_grad():
        for p in guide.heads.parameters():
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    assert is_unbiased(ratios(program, guide, 40, rejuvenation=1))


def test_a_learned_flow_tells_promising_particles_apart() -> None:
    program = compile(late)
    guide = taught(program, steps=160, learning_rate=1e-2)
    with_flow, without = ratios(program, guide, 60), ratios(program, guide, 60, twist=None)
    assert is_unbiased(with_flow) and is_unbiased(without)
    assert with_flow.std() < without.std()
    seen: list[tuple[float, float]] = []
    exact = infer(program, method="exact", progress=False)
    of_first = [str(s["first"]) for s in exact.samples]

    class Noting(Crowd):
        def to_come(self) -> dict[int, tuple[float, float | None]]:
            found = super().to_come()
            for p in self.particles:
                if "first" in p.known and id(p) in found:
                    factors, flow = found[id(p)]
                    assert flow is not None
                    first = str(p.known["first"].value)
                    share = sum(
                        w for w, f in zip(exact.weights, of_first, strict=True) if f == first
                    )
                    log_p = p.execution.sites["first"].log_prob
                    assert log_p is not None and exact.log_evidence is not None
                    truth = math.log(share) + exact.log_evidence - log_p
                    seen.append((factors + flow, truth))
            return found

    crowd = Noting(program, guide, 40, 0)
    run_crowd(crowd, twist="flow", ess_threshold=0.0)
    found, expected = np.array(seen).T
    # What is to come after the first string, beside the sum over all that may.
    assert len(seen) == 40 and expected.std() > 0.5
    assert np.corrcoef(found, expected)[0, 1] > 0.7


def test_what_is_known_ahead_counts() -> None:
    program = compile(late)
    assert program.is_static
    crowd = Crowd(program, PriorGuide(), 8, 0)
    run_crowd(crowd, ess_threshold=0.0)
    for particle in crowd.particles:
        values = particle.execution.latents
        ahead = Crowd(program, PriorGuide(), 1, 0)
        ahead.begin()
        partial = ahead.particles[0].execution
        partial.sites["first"] = particle.execution.sites["first"]
        found = ahead._known_ahead(partial)
        assert list(found.sites) == ["of first"]
        assert found.sites["of first"].fn.prompt == f"b{values['first']}"


def test_it_needs_a_guide_that_learned_one(tmp_path: Path) -> None:
    program = compile(late)
    with pytest.raises(ValueError, match=r"learned flows .* guide 'prior' has not"):
        ratios(program, PriorGuide(), 1)
    other = GFlowNetGuide(LM, seed=0, objective="tb")  # whose flow is of the root alone
    other.fit(program, steps=1, batch=4, progress=False)
    assert other.flows == set()
    with pytest.raises(ValueError, match="guide 'gflownet' has not"):
        ratios(program, other, 1)
    guide = taught(program, steps=2)
    assert guide.flows == {"first", "second"}
    guide.save(tmp_path / "guide")
    again = GFlowNetGuide.load(tmp_path / "guide", LM)
    assert again.flows == guide.flows
    np.testing.assert_allclose(ratios(program, again, 2), ratios(program, guide, 2), rtol=1e-5)


def test_a_factor_of_no_latent_counts_once() -> None:
    def constant() -> None:
        first = sample("first", LMString(LM, "ab", max_tokens=1))
        sample("second", LMString(LM, f"a{first}", max_tokens=1))
        factor("constant", -1.5)

    program = compile(constant)
    found = ratios(program, taught(program, steps=5), 20)
    assert is_unbiased(found)
