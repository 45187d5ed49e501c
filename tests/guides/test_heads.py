"""Proposals for numbers: heads on the policy's state, a Pyro guide, or the prior."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.integrate import quad

import langppl as lp
from langppl.guides.heads import HEADS_FILE, Heads, head_of
from langppl.guides.observations import Observation
from langppl.guides.policy import Policy
from langppl.guides.replay import ReplayBuffer
from langppl.guides.settings import Settings
from langppl.guides.training import Trainer
from langppl.guides.workers import Workers
from langppl.lm.requests import StateReply, StateRequest, perform
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)
WIDTH = 32


def made(fn: Any, seed: int = 0) -> Heads:
    heads = Heads(WIDTH, seed)
    found = head_of(fn)
    assert found is not None
    assert heads.ensure(*found) and not heads.ensure(*found)
    return heads


def state(seed: int = 0) -> torch.Tensor:
    return 3.0 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def shake(heads: Heads, size: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(heads.named_parameters()):
            p.add_(size * torch.randn(p.shape, generator=generator))


# -- one head ------------------------------------------------------------------------------------

THREE = torch.tensor([0.5, 1.0, 4.0])
PRIORS: dict[str, Callable[[], Any]] = {
    "beta": lambda: dist.Beta(2.0, 3.0),
    "beta of three": lambda: dist.Beta(THREE, 2.0).to_event(1),
    "gamma": lambda: dist.Gamma(2.0, 0.5),
    "gamma of three": lambda: dist.Gamma(THREE, THREE.flip(0)).to_event(1),
    "normal": lambda: dist.Normal(-1.0, 2.0),
    "normal of three": lambda: dist.Normal(THREE, THREE).to_event(1),
    "normal of three, a batch": lambda: dist.Normal(THREE, 1.0),
    "normal of two by three": lambda: dist.Normal(THREE.expand(2, 3), 1.0).to_event(1),
    "categorical": lambda: dist.Categorical(torch.tensor([0.1, 0.2, 0.3, 0.4])),
    "categorical of three": lambda: dist.Categorical(
        torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.7, 0.3]])
    ).to_event(1),
}


@pytest.mark.parametrize("name", PRIORS)
def test_untrained_a_head_proposes_the_prior(name: str) -> None:
    fn = PRIORS[name]()
    heads = made(fn)
    proposal = heads.proposal(fn, state())
    assert (proposal.batch_shape, proposal.event_shape) == (fn.batch_shape, fn.event_shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        values = [fn.sample() for _ in range(5)]
    for value in values:
        torch.testing.assert_close(proposal.log_prob(value), fn.log_prob(value))
    shake(heads, 0.3)
    other = heads.proposal(fn, state())
    with torch.no_grad():
        assert all(float((other.log_prob(v) - fn.log_prob(v)).abs().max()) > 1e-3 for v in values)
        elsewhere = heads.proposal(fn, state(1))
        gap = elsewhere.log_prob(values[0]) - other.log_prob(values[0])
    assert float(gap.abs().max()) > 1e-3


def test_what_the_numbers_of_a_head_mean() -> None:
    def proposal(fn: Any, numbers: list[float]) -> Any:
        heads = made(fn)
        (module,) = heads.made.values()
        with torch.no_grad():
            module[-1].bias.copy_(torch.tensor(numbers))
            return heads.proposal(fn, state())

    def factor(number: float) -> float:
        return math.exp(6.0 * math.tanh(number / 6.0))

    beta = proposal(dist.Beta(2.0, 3.0), [0.5, -1.0])
    assert float(beta.concentration1) == pytest.approx(2.0 * factor(0.5))
    assert float(beta.concentration0) == pytest.approx(3.0 * factor(-1.0))
    gamma = proposal(dist.Gamma(2.0, 4.0), [100.0, -100.0])
    assert float(gamma.concentration) == pytest.approx(2.0 * math.exp(6.0))
    assert float(gamma.rate) == pytest.approx(4.0 * math.exp(-6.0))
    normal = proposal(dist.Normal(1.0, 2.0), [1.5, -1.0])
    assert float(normal.loc) == pytest.approx(1.0 + 2.0 * 1.5)
    assert float(normal.scale) == pytest.approx(2.0 * factor(-1.0))
    two = proposal(dist.Normal(torch.tensor([0.0, 5.0]), 1.0).to_event(1), [1.0, 0.0, 2.0, 0.0])
    assert two.base_dist.loc.tolist() == pytest.approx([1.0, 7.0])
    category = proposal(dist.Categorical(torch.tensor([0.25, 0.75])), [math.log(6.0), 0.0])
    assert category.probs.tolist() == pytest.approx([2.0 / 3.0, 1.0 / 3.0])


DOUBLE: dict[str, Callable[[], Any]] = {
    "beta": lambda: dist.Beta(torch.tensor(2.0, dtype=torch.float64), 3.0),
    "gamma": lambda: dist.Gamma(torch.tensor(2.0), torch.tensor(3.0, dtype=torch.float64)),
    "normal": lambda: dist.Normal(torch.tensor(1e6, dtype=torch.float64), 0.02),
    "categorical": lambda: dist.Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64)),
}


@pytest.mark.parametrize("name", DOUBLE)
def test_a_proposal_is_as_fine_as_its_site(name: str) -> None:
    fn = DOUBLE[name]()
    heads = made(fn)
    shake(heads, 0.1)
    with torch.no_grad():
        proposal = heads.proposal(fn, state())
    kinds = {getattr(proposal, parameter).dtype for parameter in fn.arg_constraints}
    assert kinds == {torch.float64}
    if name == "normal":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            values = proposal.sample((1000,))
        # Float32 has one number in 0.0625 there, three times the spread.
        assert len(set(values.tolist())) == 1000
        gap = float(proposal.loc) - 1e6
        numbers = heads.numbers("normal-1", state())
        assert gap == pytest.approx(0.02 * float(numbers[0].detach()), rel=1e-3)


def test_heads_are_named_by_family_and_size() -> None:
    assert head_of(dist.Beta(1.0, 1.0)) == ("beta-1", 2)
    assert head_of(dist.Normal(torch.zeros(3), 1.0).to_event(1)) == ("normal-3", 6)
    assert head_of(dist.Gamma(torch.ones(2, 3), 1.0).to_event(2)) == ("gamma-6", 12)
    assert head_of(dist.Categorical(torch.ones(3, 4)).to_event(1)) == ("categorical-3x4", 12)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Dirichlet(torch.ones(3)),
        dist.LogNormal(0.0, 1.0),
        dist.Poisson(2.0),
        dist.Bernoulli(0.5),
        dist.Beta(1.0, 1.0).mask(False),
        lp.LMString(LM, "a", max_tokens=2),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_other_families_have_no_head(fn: Any) -> None:
    assert head_of(fn) is None


def test_the_seed_decides_the_first_weights() -> None:
    fn = dist.Beta(1.0, 1.0)
    one, two, other = (list(made(fn, seed).parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


# -- a guide with numbers ------------------------------------------------------------------------

MEAN, SPREAD = 0.9, 0.2
DRAWS = 600


def rated(seen: torch.Tensor) -> None:
    p = lp.sample("p", dist.Beta(2.0, 3.0))
    lp.sample("seen", dist.Normal(p, SPREAD), obs=seen)


def rated_in_words(seen: torch.Tensor) -> None:
    word = lp.sample("word", lp.LMString(LM, "b", max_tokens=1))
    p = lp.sample("p", dist.Beta(2.0, 3.0))
    lp.sample("seen", dist.Normal(p, SPREAD), obs=seen)
    lp.sample("then", lp.LMString(LM, f"{word}"), obs="a")


def log_evidence() -> float:
    """∫ Beta(p; 2, 3)·Normal(0.9; p, 0.2) dp."""

    def density(p: float) -> float:
        scaled = (MEAN - p) / SPREAD
        normal = math.exp(-0.5 * scaled**2) / (SPREAD * math.sqrt(2.0 * math.pi))
        return 12.0 * p * (1.0 - p) ** 2 * normal

    return math.log(quad(density, 0.0, 1.0)[0])


def program(model: Any = rated) -> lp.Program:
    return lp.compile(model, torch.tensor(MEAN))


def guide_of(
    numeric: Any = "head", moved: tuple[float, float] | None = None, **options: Any
) -> lp.GFlowNetGuide:
    """A guide whose head, if it is moved, multiplies the prior's shapes by about e^moved."""
    guide = lp.GFlowNetGuide(LM, rank=2, numeric=numeric, seed=1, **options)
    if moved is not None:
        guide.heads.ensure("beta-1", 2)
        shake(guide.heads, 0.02)
        last: Any = guide.heads.made["beta-1"][-1]  # type: ignore[index]
        with torch.no_grad():
            last.bias.add_(torch.tensor(moved))
    return guide


def check_evidence(guide: lp.GFlowNetGuide, most: float = 0.1) -> lp.Posterior:
    found = lp.infer(program(), guide=guide, num_samples=DRAWS, seed=2, progress=False)
    assert found.log_evidence_error < most
    assert abs(found.log_evidence - log_evidence()) < 4 * found.log_evidence_error
    return found


def test_an_untrained_guide_draws_numbers_from_the_prior() -> None:
    found = lp.infer(program(), guide=guide_of(), num_samples=20, seed=2, progress=False)
    plain = lp.infer(program(), guide="prior", num_samples=20, seed=2, progress=False)
    assert [float(s["p"]) for s in found.samples] == pytest.approx(
        [float(s["p"]) for s in plain.samples]
    )


def test_a_perturbed_head_gives_the_exact_evidence() -> None:
    found = check_evidence(guide_of(moved=(0.5, -0.5)))
    # The prior's mean is 0.4, and that of 600 draws from it has an error of 0.2 / √600.
    assert float(np.mean([float(s["p"]) for s in found.samples])) > 0.4 + 10 * 0.0082


def log_q_of(guide: lp.GFlowNetGuide, policy: Policy, value: torch.Tensor) -> float:
    (reply,) = perform([StateRequest(LM, policy.contexts["p"], guide.adapter)])
    assert isinstance(reply, StateReply)
    fn = dist.Beta(2.0, 3.0)
    with torch.no_grad():
        made = guide.heads.proposal(fn, torch.from_numpy(reply.state))
        return float(made.log_prob(value))


@pytest.mark.parametrize("defensive", [0.0, 0.3])
def test_a_guide_knows_with_which_density_it_proposes(defensive: float) -> None:
    guide = guide_of(moved=(1.0, -1.0), defensive=defensive)
    own = program(rated_in_words)
    policies = [guide.chooser(own, ("known", i)) for i in range(8)]
    for policy, execution in zip(policies, own.run(policies), strict=True):
        assert isinstance(policy, Policy)
        assert list(policy.contexts) == ["word", "p"]
        site = execution.sites["p"]
        expected = log_q_of(guide, policy, site.value)
        prior = float(dist.Beta(2.0, 3.0).log_prob(site.value))
        assert abs(expected - prior) > 1e-2
        if defensive:
            expected = float(np.logaddexp(math.log(0.7) + expected, math.log(0.3) + prior))
        assert site.log_q == pytest.approx(expected, abs=1e-4)


def test_the_defence_bounds_the_weights_of_numbers() -> None:
    highest = dist.Normal(0.0, SPREAD).log_prob(torch.tensor(0.0))
    bound = float(highest) - math.log(0.3)
    narrow = (1.5, 1.5)
    bad = guide_of(moved=narrow)
    found = lp.infer(program(), guide=bad, num_samples=DRAWS, seed=2, progress=False)
    assert found.log_weights.max() > bound
    safe = check_evidence(guide_of(moved=narrow, defensive=0.3), most=0.15)
    assert safe.log_weights.max() <= bound + 1e-4


def test_numbers_may_be_drawn_from_the_prior() -> None:
    guide = guide_of("prior")
    own = program(rated_in_words)
    policy = guide.chooser(own, ("prior",))
    (execution,) = own.run([policy])
    assert isinstance(policy, Policy) and set(policy.contexts) == {"word"}
    site = execution.sites["p"]
    assert site.log_q == pytest.approx(float(dist.Beta(2.0, 3.0).log_prob(site.value)), abs=1e-5)
    guide.fit(own, steps=2, batch=4, progress=False)
    assert guide.heads.specification == {} and guide.learned == {"word"}
    with pytest.raises(ValueError, match="covers"):
        guide_of("prior").fit(program(), steps=2, batch=4, progress=False)


def test_a_head_learns_a_posterior_of_its_family() -> None:
    """Four successes: the posterior is Beta(6, 3), which the head can say."""

    def coin() -> None:
        p = lp.sample("p", dist.Beta(2.0, 3.0))
        for i in range(4):
            lp.sample(f"y_{i}", dist.Bernoulli(p), obs=torch.tensor(1.0))

    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    truth = log_beta(6.0, 3.0) - log_beta(2.0, 3.0)
    guide = lp.GFlowNetGuide(LM, rank=2, seed=1)
    before = lp.infer(coin, guide=guide, num_samples=400, seed=2, progress=False)
    # Untrained: E[log p⁴] under Beta(2, 3) is 4·(ψ(2) − ψ(5)) = −4·(1/2 + 1/3 + 1/4); sd 2.8.
    assert before.elbo_possible == pytest.approx(-4.0 * 13.0 / 12.0, abs=4 * 2.8 / 400**0.5)
    guide.fit(coin, steps=60, batch=16, progress=False)
    after = lp.infer(coin, guide=guide, num_samples=400, seed=2, progress=False)
    assert guide.heads.specification == {"beta-1": 2}
    assert truth - after.elbo_possible < 0.05 * (truth - before.elbo_possible)
    assert float(np.mean([float(s["p"]) for s in after.samples])) == pytest.approx(6 / 9, abs=0.04)


def test_a_guide_of_fine_numbers_gives_the_exact_evidence() -> None:
    """Of a float64 site whose spread is less than the step of float32 there."""
    mean, spread = torch.tensor(1e6, dtype=torch.float64), 0.02

    def model() -> None:
        x = lp.sample("x", dist.Normal(mean, spread))
        lp.sample("y", dist.Normal(x, spread), obs=mean + spread)

    truth = float(dist.Normal(mean, spread * 2**0.5).log_prob(mean + spread))
    guide = lp.GFlowNetGuide(LM, rank=2, seed=1)
    guide.fit(model, steps=3, batch=4, learning_rate=1e-2, progress=False)
    found = lp.infer(model, guide=guide, num_samples=DRAWS, seed=2, progress=False)
    assert found.log_evidence_error < 0.05
    assert abs(found.log_evidence - truth) < 4 * found.log_evidence_error


# -- a Pyro guide --------------------------------------------------------------------------------

CALLS: list[tuple[Any, ...]] = []


def proposing(*args: Any) -> None:
    CALLS.append(args)
    shift = pyro.sample("shift", dist.Bernoulli(0.5))
    pyro.sample("p", dist.Beta(4.0 + shift, 2.0))


def test_a_pyro_guide_proposes_the_numbers() -> None:
    guide = guide_of(proposing)
    own = program(rated_in_words)
    CALLS.clear()
    before = torch.get_rng_state()
    policies = [guide.chooser(own, ("pyro", i)) for i in range(6)]
    executions = own.run(policies)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(args) for args in CALLS] == [1] * 6
    assert all(float(args[0]) == pytest.approx(MEAN) for args in CALLS)
    for policy, execution in zip(policies, executions, strict=True):
        assert isinstance(policy, Policy) and set(policy.contexts) == {"word"}
        assert list(execution.sites) == ["word", "p", "seen", "then"]
        site = execution.sites["p"]
        known = [float(dist.Beta(a, 2.0).log_prob(site.value)) for a in (4.0, 5.0)]
        assert site.log_q is not None
        assert min(abs(site.log_q - k) for k in known) < 1e-5
    assert len({float(e.sites["p"].value) for e in executions}) == 6


def test_a_pyro_guide_gives_the_exact_evidence() -> None:
    found = check_evidence(guide_of(proposing))
    prior = lp.infer(program(), num_samples=DRAWS, seed=2, progress=False)
    assert found.log_weights.std() < 0.7 * prior.log_weights.std()


def test_what_a_pyro_guide_leaves_out_is_drawn_from_the_prior() -> None:
    guide = guide_of(lambda *args: None)
    own = program()
    (execution,) = own.run([guide.chooser(own, ("none",))])
    site = execution.sites["p"]
    assert site.log_q == pytest.approx(float(dist.Beta(2.0, 3.0).log_prob(site.value)), abs=1e-5)


def far(*args: Any) -> None:
    pyro.sample("x", dist.Normal(3.0, 1.0))


def beside(is_apart: bool) -> None:
    x = lp.sample("x", dist.Normal(0.0, 1.0))
    z = lp.sample("z", lp.LMString(LM, "a", max_tokens=1))
    w = lp.sample("w", lp.LMString(LM, "b", max_tokens=1))
    shift = 0.0 if is_apart else float(len(z + w))
    lp.sample("seen", dist.Normal(x + shift, 2.0), obs=torch.tensor(1.0))


def trainer_of(guide: lp.GFlowNetGuide, own: lp.Program) -> Trainer:
    fields = {f.name for f in dataclasses.fields(Settings)}
    asked = inspect.signature(lp.GFlowNetGuide.fit).parameters
    plain = {n: p.default for n, p in asked.items() if n in fields}
    settings = {**plain, "observations": 1, "objective": "vargrad"}
    settings["schedule"] = lp.RewardSchedule()
    row = Observation(own, (), ReplayBuffer(0))
    return Trainer(guide, [row], None, Settings(**settings), Workers(), [])


@pytest.mark.parametrize("is_apart", [False, True])
def test_given_numbers_are_held_to_what_proposes_them(is_apart: bool) -> None:
    guide = guide_of(far)
    own = lp.compile(beside, is_apart)
    drawing = trainer_of(guide, own).drawing
    policies = [Policy(guide.proposer, own, ("own", i)) for i in range(4)]
    (drawn,) = drawing.rewards([own], [policies])
    row = Observation(own, (), ReplayBuffer(0), [dict(d.latents) for d in drawn])
    drawing._score_given(row)
    assert row.given is not None
    for one, two in zip(drawn, row.given, strict=True):
        x = one.latents["x"]
        ratio = float(dist.Normal(0.0, 1.0).log_prob(x) - dist.Normal(3.0, 1.0).log_prob(x))
        strings = sum(p.site.log_prob or 0.0 for p in one.parts)
        shift = 0.0 if is_apart else float(len(one.latents["z"] + one.latents["w"]))
        seen = float(dist.Normal(x + shift, 2.0).log_prob(torch.tensor(1.0)))
        for draw in (one, two):
            assert draw.log_prior == pytest.approx(strings + ratio, abs=1e-4)
            assert draw.log_rest == pytest.approx(seen, abs=1e-4)
            # Apart from the strings, numbers are noise to their balance.
            left = (strings, 0.0) if is_apart else (strings + ratio, seen)
            assert draw.stages[-1] == pytest.approx(left, abs=1e-4)
            assert [p.parts for p in draw.pieces] == ([[0], [1]] if is_apart else [])


@pytest.mark.parametrize("objective", ["vargrad", "subtb"])
def test_given_numbers_leave_independent_strings_alone(objective: str) -> None:
    """Nothing is observed of the string, and the untrained guide is its prior."""

    def model() -> None:
        lp.sample("x", dist.Normal(0.0, 1.0))
        lp.sample("z", lp.LMString(LM, "a", max_tokens=1))

    guide = guide_of(far, context=lambda info: info.prompt)
    options: dict[str, Any] = {"batch": 8, "given_share": 0.25, "progress": False}
    options |= {"learning_rate": 1e-12, "objective": objective}
    guide.fit(model, given=[{"z": "a", "x": 0.0}] * 6, steps=3, **options)
    # The flow of `subtb` begins at log Z, which is 0.
    assert guide.history["loss"] == pytest.approx([0.0] * 3, abs=1e-8)


def test_given_numbers_that_nothing_proposes_are_left_out() -> None:
    def model() -> None:
        x = lp.sample("x", dist.Normal(0.0, 1.0))
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=1))
        lp.sample("seen", dist.Normal(x + len(z), 1.0), obs=torch.tensor(1.0))

    guide = guide_of(lambda: pyro.sample("x", dist.Uniform(0.0, 1.0)))
    own = lp.compile(model)
    row = Observation(own, (), ReplayBuffer(0), [{"x": x, "z": "a"} for x in (0.5, 2.0)])
    with pytest.warns(lp.InferenceWarning, match="numbers outside of 0 to 1"):
        trainer_of(guide, own).drawing._score_given(row)
    assert row.given is not None
    assert [float(d.latents["x"]) for d in row.given] == [0.5]


def test_numeric_is_a_name_or_a_function() -> None:
    with pytest.raises(ValueError, match='numeric must be "head", "prior" or a Pyro guide, got 3'):
        lp.GFlowNetGuide(LM, numeric=3)  # type: ignore[arg-type]


# -- keeping -------------------------------------------------------------------------------------


def test_saved_and_loaded_heads_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    guide = guide_of()
    guide.fit(program(), steps=3, batch=4, objective="tb", progress=False)
    assert guide.heads.specification == {"beta-1": 2, "flow": 1}
    guide.save(tmp_path)
    loaded = lp.GFlowNetGuide.load(tmp_path, LM)
    assert loaded.heads.specification == guide.heads.specification
    one, two = guide.heads.state_dict(), loaded.heads.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    draws = [lp.infer(program(), guide=g, num_samples=9, progress=False) for g in (guide, loaded)]
    assert draws[0].log_q is not None and draws[1].log_q is not None
    np.testing.assert_array_equal(draws[0].log_q, draws[1].log_q)


def test_a_guide_without_heads_leaves_no_file(tmp_path: Path) -> None:
    guide_of(moved=(1.0, 0.0)).save(tmp_path)
    assert (tmp_path / HEADS_FILE).is_file()
    guide_of().save(tmp_path)
    assert not (tmp_path / HEADS_FILE).exists()
    assert lp.GFlowNetGuide.load(tmp_path, LM).heads.specification == {}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def nan(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.full_like(tensors[name], math.nan)}, path)


def other_shape(path: Path) -> None:
    save_file({k: (v[:1] if v.ndim else v).contiguous() for k, v in load_file(path).items()}, path)


def fewer(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


@pytest.mark.parametrize("damage", [cut, emptied, nan, other_shape, fewer])
def test_a_damaged_file_of_heads_is_an_error(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    guide_of(moved=(1.0, 0.0)).save(tmp_path)
    damage(tmp_path / HEADS_FILE)
    # Old ones have no digest, by which the damage would be found first.
    record = json.loads((tmp_path / "guide.json").read_text())
    (tmp_path / "guide.json").write_text(json.dumps({**record, "sha256": None}))
    with pytest.raises(ValueError, match=f"{HEADS_FILE} is corrupt"):
        lp.GFlowNetGuide.load(tmp_path, LM)


def test_a_missing_file_of_heads_is_an_error(tmp_path: Path) -> None:
    guide_of(moved=(1.0, 0.0)).save(tmp_path)
    (tmp_path / HEADS_FILE).unlink()
    with pytest.raises(ValueError, match=f"no whole guide folder: {HEADS_FILE} is missing"):
        lp.GFlowNetGuide.load(tmp_path, LM)


def test_a_pyro_guide_is_given_to_load_again(tmp_path: Path) -> None:
    guide_of(proposing).save(tmp_path)
    assert json.loads((tmp_path / "guide.json").read_text())["numeric"] == "pyro"
    with pytest.raises(ValueError, match="was made with a Pyro guide for numbers; give it to load"):
        lp.GFlowNetGuide.load(tmp_path, LM)
    assert lp.GFlowNetGuide.load(tmp_path, LM, numeric=proposing).numeric is proposing


def test_heads_see_how_states_differ() -> None:
    heads = Heads(4, seed=0)
    heads.ensure("flow", 1)
    states = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.1, 3.9], [1.0, 2.1, 2.9, 4.0]])
    before = heads.state_dict()["centre"].clone()
    heads.centre_on(states[:1].repeat(3, 1))  # all the same: nothing to scale by
    assert torch.equal(heads.centre, before) and bool(heads.is_centred)
    heads.centre_on(states)
    normed = torch.nn.functional.layer_norm(states, (4,))
    spread = normed.std(0, correction=0)
    torch.testing.assert_close(heads.centre, normed.mean(0))
    torch.testing.assert_close(heads.spread, spread.clamp_min(0.1 * float(spread.mean())))
    with torch.no_grad():
        for p in heads.parameters():
            torch.nn.init.normal_(p)
        module = heads.made["flow"]
        expected = module((normed - heads.centre) / heads.spread)
        torch.testing.assert_close(heads.numbers("flow", states), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_guide_with_heads_is_a_plain_peft_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    lm = tiny_lm(["a", "b", "."], seed=1)

    def model(ending: str) -> None:
        p = lp.sample("p", dist.Beta(2.0, 1.0))
        lp.factor("high", p.log())
        z = lp.sample("z", lp.LMString(lm, "a", stop=".", max_tokens=2))
        lp.sample("y", lp.LMString(lm, f"a{z}"), obs=ending)

    guide = lp.GFlowNetGuide(lm, objective="tb", seed=0)
    guide.fit(model, [("a",), ("b",)], steps=3, batch=4, learning_rate=1e-2, progress=False)
    guide.save(tmp_path)
    ids = torch.tensor([[3, 4, 5, 3]])
    with torch.no_grad(), lm.adapter(guide.adapter):
        expected = lm.model(input_ids=ids).logits
    plain = tiny_lm(["a", "b", "."], seed=1).model
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        found = PeftModel.from_pretrained(plain, str(tmp_path))(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)
    assert not torch.allclose(before, expected, atol=1e-4)
    record = json.loads((tmp_path / "guide.json").read_text())
    assert record["sites"] == ["p", "z"] and record["heads"] == {"beta-1": 2, "flow": 1}
    assert record["context"] == "langppl.guides.context:default_context"


def test_tensorboard_is_asked_for_by_name_if_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    lm = tiny_lm(["a", "b", "."], seed=1)

    def model() -> None:
        lp.sample("z", lp.LMString(lm, "a", max_tokens=2))

    with pytest.raises(ImportError, match=r"pip install 'langppl\[tensorboard\]'"):
        lp.GFlowNetGuide(lm).fit(model, [()], tensorboard=tmp_path, progress=False)
