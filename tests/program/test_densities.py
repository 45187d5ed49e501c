"""Numbers whose own `log_prob` is not the density with which they are drawn."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions.transforms import AffineTransform

import langppl as lp
from langppl.guides.trajectories import Batch, make_draws
from langppl.program.densities import drawing, log_density
from langppl.program.execution import Choice, given, score
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=2)
WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "importance": {"num_samples": 400},
    "smc": {"num_samples": 400},
    "mh": {"num_samples": 400, "chains": 40, "warmup": 15},
}

TWO = torch.tensor([0.0, 3.0])
HALF = torch.tensor([True, False])
NORMAL = dist.Normal(TWO, 1.0)
SHIFTED = [AffineTransform(1.0, 2.0)]
EVEN = dist.Categorical(torch.ones(2))

HIDING: dict[str, tuple[Any, Any]] = {
    "mask": (NORMAL.mask(False), NORMAL),
    "mask of some": (NORMAL.mask(HALF), NORMAL),
    "event of a mask": (NORMAL.mask(HALF).to_event(1), NORMAL.to_event(1)),
    "mask of an event": (NORMAL.to_event(1).mask(False), NORMAL.to_event(1)),
    "mask of a mask": (NORMAL.mask(HALF).mask(False), NORMAL),
    "expanded": (
        dist.ExpandedDistribution(dist.Normal(0.0, 1.0).mask(False), torch.Size([2])),
        dist.ExpandedDistribution(dist.Normal(0.0, 1.0), torch.Size([2])),
    ),
    "transformed": (
        dist.TransformedDistribution(NORMAL.mask(HALF), SHIFTED),
        dist.TransformedDistribution(NORMAL, SHIFTED),
    ),
    "mixture": (
        dist.MixtureSameFamily(EVEN, NORMAL.mask(HALF)),
        dist.MixtureSameFamily(EVEN, NORMAL),
    ),
    "masked mixture": (
        dist.MaskedMixture(HALF, NORMAL, NORMAL.mask(False)),
        dist.MaskedMixture(HALF, NORMAL, NORMAL),
    ),
    "delta": (dist.Delta(TWO, log_density=2.0), dist.Delta(TWO)),
    "event of a delta": (dist.Delta(TWO, log_density=TWO).to_event(1), dist.Delta(TWO, 0.0, 1)),
}


@pytest.mark.parametrize("kind", HIDING)
def test_it_is_that_of_what_draws(kind: str) -> None:
    fn, plain = HIDING[kind]
    pyro.set_rng_seed(0)
    value = fn.sample()
    before = fn.log_prob(value)
    expected = float(plain.log_prob(value).sum())
    assert log_density(fn, value) == pytest.approx(expected, abs=1e-5)
    assert abs(float(before.sum()) - expected) > 1e-3
    assert torch.equal(fn.log_prob(value), before)  # it is a copy that was changed
    assert drawing(plain) is plain


def string() -> lp.LMString:
    return lp.LMString(LM, "ab", max_tokens=1)


def masked() -> None:
    lp.sample("k", dist.Bernoulli(torch.tensor(0.1)).mask(False))


def masked_and_string() -> None:
    masked()
    lp.sample("z", string())


def weighted() -> None:
    k = lp.sample("k", dist.Bernoulli(torch.tensor(0.5)))
    lp.sample("d", dist.Delta(k, log_density=2.0 * k))


@pytest.mark.parametrize("way", WAYS)
def test_a_masked_number_counts_as_exact_inference_counts_it(way: str) -> None:
    found = lp.infer(masked, method=way, progress=False, **WAYS[way])
    # Weights are 10 and 1.1, with mean 2 and spread 2.7: of 400, the error of the log mean is 0.07,
    # and of the share 0.04. Chains leave either value once in ten steps: worth 80, error 0.06.
    assert found.probabilities("k").get(1.0) == pytest.approx(0.5, abs=0.2)
    if found.log_evidence is not None:
        assert found.log_evidence == pytest.approx(math.log(2.0), abs=0.25)


@pytest.mark.parametrize("way", ["importance", "smc"])
def test_the_density_of_a_delta_counts(way: str) -> None:
    found = lp.infer(weighted, method=way, progress=False, **WAYS[way])
    one = math.exp(2.0) / (1.0 + math.exp(2.0))
    # Of 400 weights of 1 and e², the share's error is 0.01, and the log mean's 0.04.
    assert found.probabilities("k").get(1.0) == pytest.approx(one, abs=0.05)
    expected = math.log(0.5 + 0.5 * math.exp(2.0))
    assert found.log_evidence == pytest.approx(expected, abs=0.15)


def propose() -> None:
    pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)).mask(False))


@pytest.mark.parametrize(
    ("guide", "one"),
    [
        (lambda: lp.PriorGuide(), 0.1),
        (lambda: lp.GFlowNetGuide(LM), 0.1),
        (lambda: lp.GFlowNetGuide(LM, numeric=propose), 0.3),
    ],
    ids=["prior", "gflownet", "Pyro guide"],
)
def test_guides_know_it(guide: Callable[[], lp.guides.Guide], one: float) -> None:
    own, program = guide(), lp.compile(masked_and_string)
    rows = [{"k": 1.0, "z": "a"}, {"k": 0.0, "z": "a"}]
    first, second = own.log_q(program, rows)
    assert first - second == pytest.approx(math.log(one / (1.0 - one)), abs=1e-5)
    found = lp.infer(program, guide=own, num_samples=8, progress=False)
    again = own.log_q(program, found.samples)
    assert found.log_q == pytest.approx(again, abs=1e-4)


def test_a_share_of_the_prior_counts_by_what_draws() -> None:
    def model() -> None:
        lp.sample("n", dist.Normal(0.0, 1.0).mask(False))
        lp.sample("p", dist.Normal(0.0, 1.0))
        lp.sample("z", string())

    program = lp.compile(model)
    guide = lp.GFlowNetGuide(LM, defensive=0.5)
    found = lp.infer(program, guide=guide, num_samples=8, progress=False)
    assert found.log_q == pytest.approx(guide.log_q(program, found.samples), abs=1e-4)
    # Untrained, the guide is the prior.
    rows = [{"n": n, "p": p, "z": "a"} for n, p in ((0.0, 0.0), (1.0, 0.0), (0.0, 2.0))]
    first, second, third = guide.log_q(program, rows)
    assert (first - second, first - third) == pytest.approx((0.5, 2.0), abs=1e-5)


def test_a_given_number_that_no_guide_covers_counts_as_drawn_from_the_prior() -> None:
    program = lp.compile(masked_and_string)
    (execution,) = program.run([given({"k": torch.tensor(1.0), "z": "a"})], score)
    batch = Batch(program, [execution], [{"z": (0,)}])
    ((draw,),) = make_draws([batch])
    # The model's term is 0 under the mask; what proposes it is of the prior's side.
    own = execution.sites["z"].log_prob
    assert own is not None
    assert draw.log_prior == pytest.approx(own - math.log(0.1), abs=1e-5)
    assert draw.log_rest == 0.0


# -- draws without a density --------------------------------------------------------------------

EXTREME: dict[str, Callable[[], Any]] = {
    # 15% of the draws are below the smallest float32 and come out as 0, some above the largest.
    "outside of the support": lambda: dist.LogNormal(0.0, 100.0),
    # 41% of the draws are above the largest float32.
    "inside": lambda: dist.Pareto(torch.tensor(1.0), torch.tensor(0.01)),
    "masked": lambda: dist.LogNormal(0.0, 100.0).mask(False),
}


def extreme(kind: str) -> Callable[[], None]:
    def model() -> None:
        lp.sample("s", EXTREME[kind]())
        lp.sample("z", string())

    return model


@pytest.mark.parametrize("kind", EXTREME)
def test_a_draw_without_a_density_is_impossible_and_told(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langppl.warn._said", OrderedDict())  # it is said once for each line
    with pytest.warns(UserWarning, match=r"site 's': .* drew .* no density .*torch.float64"):
        found = lp.infer(extreme(kind), num_samples=64, progress=False)
    values = torch.tensor([float(sample["s"]) for sample in found.samples])
    is_lost = (values == 0.0) | values.isinf()
    assert 0 < int(is_lost.sum()) < 64
    assert torch.equal(torch.tensor(found.log_weights) == -math.inf, is_lost)
    assert found.failed_sites == {"s": int(is_lost.sum())}


def far(x: float) -> None:
    lp.sample("s", EXTREME["inside"]())
    lp.sample("n", dist.Normal(0.0, 1.0), obs=x)


@pytest.mark.filterwarnings("ignore:site 's'.* no density")
@pytest.mark.parametrize("method", ["importance", "smc"])
def test_such_draws_die_under_every_method(method: Any) -> None:
    # P(s > 3.4e38) = exp(-0.01 log 3.4e38) = 0.412; of 300, the error of the log of 0.588 is 0.05.
    expected = math.log(0.588) + float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)))
    found = lp.infer(far, 1.0, method=method, num_samples=300, progress=False)
    assert found.log_evidence == pytest.approx(expected, abs=0.2)
    # The exact sample that one particle keeps to has a density.
    bounds = lp.evidence_bounds(
        far, 1.0, method=method, num_samples=8, num_observations=6, progress=False
    )
    assert math.isfinite(bounds.upper) and 0.2 < bounds.impossible < 0.6


def test_particles_refuse_a_draw_that_the_guide_cannot_make() -> None:
    class Wrong(lp.PriorGuide):
        def chooser(self, program: Any, key: Any) -> Any:
            return lambda name, fn, execution: Choice(torch.tensor(0.5), -math.inf)

    def model() -> None:
        lp.sample("s", dist.Uniform(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'s': the guide 'prior' drew .* cannot \(log q is"):
        lp.infer(model, guide=Wrong(), method="smc", num_samples=4, progress=False)


def test_in_float64_they_are_not_lost() -> None:
    def model() -> None:
        lp.sample("s", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 100.0))
        lp.sample("z", string())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lp.infer(model, num_samples=64, progress=False)
    assert found.log_evidence == pytest.approx(0.0, abs=1e-6)


def test_a_number_that_is_none_names_its_site() -> None:
    class Broken(dist.Normal):
        def sample(self, sample_shape: Any = ()) -> torch.Tensor:
            return torch.tensor(math.nan)

        rsample = sample

    def model() -> None:
        lp.sample("n", Broken(0.0, 1.0))
        lp.sample("z", string())

    with pytest.raises(ValueError, match=r"(?s)site 'n': .*nan"):
        lp.infer(model, num_samples=4, progress=False)
