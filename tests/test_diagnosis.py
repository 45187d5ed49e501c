"""What `Posterior.diagnose` says of good posteriors and bad ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from langppl import LMString, infer, sample
from langppl.chains import Chains, chain_notes
from langppl.diagnostics import InferenceWarning
from langppl.posterior import Posterior
from langppl.testing import tiny_lm

INF = math.inf
LM = tiny_lm("ab.", seed=5)


def story(seen: str) -> None:
    z = sample("z", LMString(LM, "ab", max_tokens=2))
    sample("seen", LMString(LM, f"a{z}"), obs=seen)


def of_weights(log_weights: Any, **options: Any) -> Posterior:
    return Posterior([{"z": str(i)} for i in range(len(log_weights))], log_weights, **options)


def test_a_good_posterior() -> None:
    posterior = infer(story, "ab", num_samples=400, progress=False)
    found = posterior.diagnose()
    assert found.ok and found.problems == ()
    assert found.ess == posterior.ess
    assert found.log_evidence == posterior.log_evidence
    assert found.log_evidence_error == posterior.log_evidence_error
    assert found.reliable
    text = str(found)
    for word in ("ESS", "Pareto k", "carry 90%", "log evidence", "impossible draws", "speaks"):
        assert word in text


def test_what_carries_the_weight() -> None:
    # Weights 5, 3, 1.5 and 0.5 of ten: the first three make 95 %, the first two 80 %.
    found = of_weights([*np.log([5.0, 0.5, 3.0, 1.5]), -INF]).diagnose()
    assert (found.distinct, found.heavy) == (4, 3)
    assert found.impossible_share == pytest.approx(0.2)
    # Exactly 90 % is enough, and equal samples are one.
    same = Posterior([{"z": "a"}, {"z": "a"}, {"z": "b"}], np.log([0.45, 0.45, 0.1])).diagnose()
    assert (same.distinct, same.heavy) == (2, 1)
    numbers = [{"x": torch.tensor(0.1)}, {"x": torch.tensor(0.1)}, {"x": torch.tensor(0.100001)}]
    assert Posterior(numbers, [0.0] * 3).diagnose().distinct == 2


def test_few_effective_samples() -> None:
    found = of_weights([0.0] + [-12.0] * 255).diagnose()
    assert not found.ok
    assert found.problems[0].startswith("ESS 1.0 of 256: most samples do not explain the obs")
    assert "guide='gflownet'" in found.problems[0]
    assert of_weights([0.0] * 4).diagnose().problems[0] == "ESS 4.0 of 4: draw more (num_samples)."


def test_a_heavy_tail() -> None:
    tail = np.random.default_rng(0).pareto(0.8, size=2000) + 1.0
    found = of_weights(np.log(tail)).diagnose()
    assert found.pareto_k > found.pareto_k_threshold and not found.reliable
    assert any("cannot be trusted" in p for p in found.problems)


def test_no_sample_has_weight() -> None:
    with pytest.warns(InferenceWarning):
        posterior = of_weights([-INF] * 30, failed_sites={"seen": 30})
    found = posterior.diagnose()
    assert (found.ess, found.distinct, found.heavy) == (0.0, 0, 0)
    assert found.impossible_share == 1.0 and found.log_evidence == -INF
    (problem,) = found.problems
    assert "No sample explains the observations: all 30" in problem and "'seen'" in problem
    assert "nan" not in str(found)
    good = infer(story, "ab", num_samples=100, progress=False)
    (beside,) = posterior.diagnose(good).agreements
    assert beside.agrees is None and "nothing to compare" in str(posterior.diagnose(good))


def test_mostly_impossible_draws() -> None:
    found = of_weights([0.0] * 40 + [-INF] * 60, failed_sites={"z": 60}).diagnose()
    assert any("60% of the draws are impossible, most at site 'z'" in p for p in found.problems)


def test_a_method_without_evidence() -> None:
    posterior = of_weights([0.0] * 100, log_evidence=math.nan, method="mh")
    found = posterior.diagnose()
    assert found.log_evidence is None and found.log_evidence_error is None
    assert found.ok
    assert "not estimated" in str(found)
    posterior.log_evidence = None  # type: ignore[assignment]
    posterior.log_evidence_error = None  # type: ignore[assignment]
    assert posterior.diagnose(posterior) == posterior.diagnose(posterior)
    few, known = (Posterior([{"z": "a"}, {"z": "b"}] * 50, [0.0] * 100) for _ in range(2))
    few.log_evidence = math.nan
    (beside,) = few.diagnose(known).agreements
    assert beside.evidence_difference is None and beside.agrees is True
    unknown = of_weights([0.0] * 100, log_evidence=-3.0).diagnose()
    assert unknown.log_evidence == -3.0 and unknown.log_evidence_error is None
    assert "error is not known" in str(unknown)


def test_chains_are_judged_as_chains() -> None:
    settings = {"method": "mh", "chains": 4, "progress": False}
    few = infer(story, "ab", num_samples=40, **settings).diagnose()
    assert few.chains is not None and few.problems == tuple(
        f"{note[0].upper()}{note[1:]}." for note in chain_notes(few.chains)
    )
    assert few.problems and "Pareto" not in str(few) and "4 chains of 10" in str(few)
    moves = (2, 50, 0, 1, {"site": 100}, {"site": 0.5})
    apart = Chains(*moves, r_hat={"log joint": 1.8}, ess_of={"log joint": 3.0})
    posterior = Posterior(
        [{"z": "a"}, {"z": "b"}] * 50, [0.0] * 100, method="mh", chains=apart, log_evidence=math.nan
    )
    (problem,) = posterior.diagnose().problems
    assert problem.startswith("The chains do not agree yet (R-hat of log joint")
    still = Chains(*moves, r_hat={}, ess_of={})
    unmoved = Posterior([{"z": "a"}] * 100, [0.0] * 100, method="mh", chains=still)
    (problem,) = unmoved.diagnose().problems
    assert "ever varies" in problem


def test_exact_and_sampled_posteriors_agree() -> None:
    exact = infer(story, "ab", method="exact", progress=False)
    found = exact.diagnose(
        infer(story, "ab", num_samples=300, progress=False),
        infer(story, "ab", num_samples=300, seed=1, guide="prompted", progress=False),
    )
    assert found.ok, str(found)
    assert math.isinf(found.ess) and "all points are listed" in str(found)
    assert [a.other for a in found.agreements] == ["importance, prior", "importance, prompted"]
    for beside in found.agreements:
        assert beside.site == "z" and beside.agrees
        assert beside.evidence_deviations is not None and abs(beside.evidence_deviations) <= 3.0


def test_values_that_were_not_compared_do_not_agree() -> None:
    one = Posterior([{"z": f"a{i}"} for i in range(40)], [0.0] * 40)
    other = Posterior([{"z": f"b{i}"} for i in range(40)], [0.0] * 40)
    (beside,) = one.diagnose(other).agreements
    assert beside.total_variation == pytest.approx(1.0)
    assert beside.noise is not None and beside.noise > 0.5
    assert str(beside).endswith("too few samples to tell); the evidences agree")
    coins = Posterior([{"z": "a"}, {"z": "b"}] * 50, [0.0] * 100)
    (itself,) = coins.diagnose(coins).agreements
    assert str(itself).endswith("they agree") and "is let pass" in str(itself)


def test_posteriors_of_other_observations_disagree() -> None:
    one, other = (infer(story, s, num_samples=300, progress=False) for s in ("ab", "bb.."))
    found = one.diagnose(other)
    (beside,) = found.agreements
    assert beside.agrees is False
    assert beside.evidence_difference == pytest.approx(one.log_evidence - other.log_evidence)
    assert any(
        p.startswith("Beside importance, prior: log evidence differs") for p in found.problems
    )
    with pytest.raises(ValueError, match="no latent in common"):
        one.diagnose(Posterior([{"y": "a"}], [0.0]))


def test_evidences_differ_in_units_of_both_errors() -> None:
    one = of_weights([0.0, 0.0], log_evidence=-1.0, log_evidence_error=0.3)
    other = of_weights([0.0, 0.0], log_evidence=-2.0, log_evidence_error=0.4)
    (beside,) = one.diagnose(other).agreements
    # Independent errors: √(0.3² + 0.4²) = 0.5.
    assert beside.evidence_deviations == pytest.approx(2.0, abs=1e-3)


def test_the_distance_and_its_noise() -> None:
    one = Posterior([{"z": "a"}, {"z": "b"}] * 50, [0.0] * 100)
    other = Posterior([{"z": "a"}] * 70 + [{"z": "c"}] * 30, [0.0] * 100)
    (beside,) = one.diagnose(other).agreements
    # |0.5 − 0.7|, |0.5 − 0| and |0 − 0.3|, halved.
    assert beside.total_variation == pytest.approx(0.5)
    shares = np.array([0.6, 0.25, 0.15])
    noise = np.sqrt(2 / math.pi * shares * (1 - shares) * (2 / 100)).sum() / 2
    assert beside.noise == pytest.approx(noise)
    # Samples of one distribution are about so far apart.
    rng = np.random.default_rng(0)
    draws = [
        Posterior([{"z": str(v)} for v in rng.integers(20, size=200)], [0.0] * 200)
        for _ in range(40)
    ]
    pairs = [a.diagnose(b).agreements[0] for a, b in zip(draws[::2], draws[1::2], strict=True)]
    distances = np.array([p.total_variation for p in pairs])
    assert distances.mean() == pytest.approx(np.mean([p.noise for p in pairs]), rel=0.1)
    assert all(p.agrees for p in pairs)


def test_continuous_numbers_are_compared_over_bins() -> None:
    rng = np.random.default_rng(1)

    def normal(mean: float) -> Posterior:
        return Posterior([{"x": float(v)} for v in rng.normal(mean, size=400)], [0.0] * 400)

    (same,) = normal(0.0).diagnose(normal(0.0)).agreements
    (other,) = normal(0.0).diagnose(normal(1.0)).agreements
    assert same.agrees and same.total_variation is not None and same.total_variation < 0.15
    # Between Normal(0, 1) and Normal(1, 1) it is 0.38.
    assert other.agrees is False and other.total_variation == pytest.approx(0.38, abs=0.06)


def test_numbers_that_do_not_overlap_are_as_far_apart_as_can_be() -> None:
    one, other = (
        Posterior([{"x": first + 0.01 * i} for i in range(30)], [0.0] * 30) for first in (0.0, 5.0)
    )
    # Bins are of both, whichever of the two is named first: at most one has numbers of both.
    for pair in ((one, other), (other, one)):
        (beside,) = pair[0].diagnose(pair[1]).agreements
        assert beside.total_variation == pytest.approx(1.0, abs=0.1)


def test_too_few_samples_to_compare() -> None:
    one, other = (Posterior([{"z": f"{name}{i}"} for i in range(30)], [0.0] * 30) for name in "ab")
    (beside,) = one.diagnose(other).agreements
    assert beside.total_variation == pytest.approx(1.0)
    assert beside.noise is not None and beside.noise > 0.5 and beside.agrees is True
    assert "too few samples to tell" in " ".join(str(one.diagnose(other)).split())
    heavy = of_weights([0.0, *[-9.0] * 99])
    assert heavy.diagnose(of_weights([0.0] * 100)).agreements[0].trusted is False
    assert "standard errors, not to be trusted" in " ".join(str(heavy.diagnose(heavy)).split())
