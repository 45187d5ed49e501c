"""Metropolis–Hastings against enumerated posteriors, by both moves and under four guides."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chi2

import langppl.inference.mh as driver
from langppl import (
    GFlowNetGuide,
    LMChoice,
    LMString,
    MixtureGuide,
    compare,
    compile,
    infer,
    sample,
)
from langppl.chains import Chains, agreement, chain_notes
from langppl.diagnostics import InferenceWarning
from langppl.distributions import Text
from langppl.guides import Guide, PriorGuide
from langppl.inference.comparison import Comparison
from langppl.inference.kernels import _log_prob_before, move
from langppl.plots import plot_log_weights
from langppl.posterior import ABSENT, Posterior
from langppl.program import Program
from langppl.program.execution import Chooser, Site, given, score
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=5, merged=["ab", "b."])


# Observations are warm, so that chains forget their start within their warm-up.


def plain() -> None:
    one = sample("one", LMString(LM, "a", max_tokens=2))
    two = sample("two", LMString(LM, f"b{one}", stop=".", max_tokens=2))
    sample("seen", LMString(LM, f"{one}{two}", temperature=3.0), obs="bb")


def branch() -> None:
    """A latent decides whether another one exists."""
    first = sample("first", LMString(LM, "ab", max_tokens=2))
    if "a" in first:
        second = sample("second", LMString(LM, f"a{first}", stop=".", max_tokens=2))
        sample("seen", LMString(LM, f"{first}{second}", temperature=3.0), obs="b")
    else:
        sample("seen", LMString(LM, f"{first}a", temperature=3.0), obs="b")


def lengths() -> None:
    """Strings of zero to four tokens, which end in all ways there are."""
    text = sample("text", LMString(LM, "ab", stop=".", max_tokens=4, min_tokens=0, temperature=2.0))
    sample("seen", LMString(LM, f"ab{text}", temperature=3.0), obs="ab")


PROGRAMS: dict[str, Callable[[], None]] = {f.__name__: f for f in (plain, branch, lengths)}


def key_of(latents: dict[str, Any]) -> tuple[Any, ...]:
    return tuple((name, value.ids) for name, value in latents.items())


def least_ess(found: Posterior) -> float:
    """The smallest ESS, also of the likeliest values: a length may forget what a token does not."""
    assert found.chains is not None
    series = {}
    for site in found.sites:
        for value in list(found.probabilities(site))[:6]:
            flags = np.array([s.get(site, ABSENT) == value for s in found.samples], dtype=float)
            series[f"{site}={value}"] = flags.reshape(found.chains.number, -1)
    return min(found.ess, *agreement(series)[1].values())


def chi_square(program: Program, found: Posterior) -> float:
    """p of the samples, thinned by their autocorrelation time, under the exact posterior."""
    assert found.chains is not None
    every = math.ceil(found.num_samples / least_ess(found))
    draws = found.chains.draws
    thinned = [s for i, s in enumerate(found.samples) if (i % draws) % every == every - 1]
    assert len(thinned) >= 140, "with so few samples the test says nothing"
    return p_of(infer(program, method="exact", progress=False), thinned)


def p_of(exact: Posterior, samples: Sequence[dict[str, Any]]) -> float:
    """p of chi-square, rare cells merged."""
    table = {key_of(s): float(w) for s, w in zip(exact.samples, exact.weights, strict=True)}
    counts = Counter(key_of(s) for s in samples)
    assert set(counts) <= set(table)
    cells: list[tuple[float, float]] = []
    expected = seen = 0.0
    for key, p in sorted(table.items(), key=lambda item: item[1]):
        expected, seen = expected + p * len(samples), seen + counts[key]
        if expected >= 5.0:
            cells.append((expected, seen))
            expected = seen = 0.0
    cells[-1] = (cells[-1][0] + expected, cells[-1][1] + seen)
    assert len(cells) > 8
    statistic = sum((s - e) ** 2 / e for e, s in cells)
    return float(chi2.sf(statistic, len(cells) - 1))


def run(program: Program, seed: int = 1, **options: Any) -> Posterior:
    settings = {"num_samples": 2800, "chains": 70, "warmup": 25, **options}
    return infer(program, method="mh", seed=seed, progress=False, **settings)


@pytest.mark.parametrize("tail_share", [0.0, 1.0], ids=["site", "tail"])
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_samples_follow_the_enumerated_posterior(name: str, tail_share: float) -> None:
    program = compile(PROGRAMS[name])
    found = run(program, tail_share=tail_share)
    assert found.chains is not None
    assert list(found.chains.moves.items()) == [("tail" if tail_share else "site", 2800)]
    assert chi_square(program, found) > 0.01


def trained(program: Program) -> Guide:
    guide = GFlowNetGuide(LM, seed=0, defensive=0.2)
    return guide.fit(program, steps=6, batch=8, learning_rate=3e-3, progress=False)


def mixture(program: Program) -> Guide:
    return MixtureGuide([trained(program), "prior"], [0.7, 0.3])


@pytest.mark.parametrize("guide", ["prompted", "gflownet", "mixture"])
def test_guides_as_proposals_leave_the_posterior_as_it_is(guide: str) -> None:
    program = compile(branch)
    made = {"gflownet": trained, "mixture": mixture}.get(guide, lambda _: guide)(program)
    found = run(program, guide=made)
    assert found.guide == guide
    assert chi_square(program, found) > 0.01


def test_latents_of_another_lm_stay_with_the_prior() -> None:
    other = tiny_lm("ab.", seed=2)

    def two() -> None:
        first = sample("first", LMString(LM, "ab", max_tokens=2))
        second = sample("second", LMString(other, "a", stop=".", max_tokens=2))
        sample("seen", LMString(LM, f"{first}{second}", temperature=3.0), obs="b")

    program = compile(two)
    found = run(program, guide=trained(program))
    assert chi_square(program, found) > 0.01


@pytest.mark.parametrize("name", ["branch", "lengths"])
def test_a_move_of_exact_samples_leaves_exact_samples(name: str) -> None:
    """Independent chains, so that no autocorrelation clouds the test; two steps of both moves."""
    program = compile(PROGRAMS[name])
    exact = infer(program, method="exact", progress=False)
    states = program.run([given(s) for s in exact.resample(1000, seed=7)], score)
    for step in range(2):
        keys = [("exact", i, step) for i in range(len(states))]
        states = [m.execution for m in move(program, PriorGuide(), states, keys)]
    assert p_of(exact, [s.latents for s in states]) > 0.01


# -- the acceptance ratio -------------------------------------------------------------------------


RULES: dict[str, dict[str, Any]] = {
    "first": {"max_tokens": 2},
    "second": {"max_tokens": 2, "stop": "."},
}


def nats(prompt: str, text: str, **rules: Any) -> float:
    return float(LMString(LM, prompt, **rules).log_prob(text))


def prior(name: str, latents: dict[str, Any]) -> float:
    prompt = "ab" if name == "first" else f"a{latents['first']}"
    return nats(prompt, latents[name], **RULES[name])


def log_joint(latents: dict[str, Any]) -> float:
    seen = latents["first"] + latents.get("second", "a")
    return sum(prior(name, latents) for name in latents) + nats(seen, "b", temperature=3.0)


def actions(name: str, value: Any) -> int:
    """Tokens of a string, and the end of the text where that is how it ended."""
    is_stopped = name == "second" and value.endswith(".")
    return len(value.ids) + (not is_stopped and len(value.ids) < 2)


def by_hand(x: dict[str, Any], y: dict[str, Any], moved: str, kind: str) -> float:
    """The log acceptance ratio under the prior; of tails, what is kept cancels."""
    appear = [n for n in y if n == moved or n not in x]
    vanish = [n for n in x if n == moved or n not in y]
    ratio = log_joint(y) - log_joint(x) + math.log(len(x) / len(y))
    ratio += sum(prior(n, x) for n in vanish) - sum(prior(n, y) for n in appear)
    if kind == "tail":
        ratio += math.log(actions(moved, x[moved]) / actions(moved, y[moved]))
    return ratio


def test_the_acceptance_ratio_is_the_one_made_by_hand() -> None:
    program = compile(branch)
    starts = infer(program, method="exact", progress=False).resample(150, seed=2)
    states = program.run([given(s) for s in starts], score)
    moved = move(program, PriorGuide(), states, [("hand", i) for i in range(150)])
    shapes = Counter()
    for before, m in zip(starts, moved, strict=True):
        after = m.execution.latents
        if not m.accepted:
            assert after == before
            continue
        assert m.log_ratio == pytest.approx(by_hand(before, after, m.site, m.kind), abs=1e-3)
        shapes[m.kind, len(before), len(after)] += 1
        if m.kind == "tail":
            assert m.site in before and m.site in after
    ways = {(kind, n, k) for kind in ("site", "tail") for n in (1, 2) for k in (1, 2)}
    assert set(shapes) == ways, "every change of shape is tried by both moves"


def test_an_observation_that_becomes_a_latent_is_proposed_with_the_share_of_the_prior() -> None:
    def drawn() -> LMString:
        return LMString(LM, "ab", max_tokens=1, min_tokens=0)

    def model(x: Any) -> None:
        k = sample("k", dist.Bernoulli(torch.tensor(0.5)))
        sample("y", drawn(), obs=x if float(k) == 1.0 else None)

    x = Text("b", LM.encode_text("b"), LM.fingerprint)
    program = compile(model, x)
    guide = GFlowNetGuide(LM, defensive=0.5, numeric="prior", context=lambda info: "....aa")
    (state,) = program.executions([{"k": 1.0}])
    moved = move(program, guide, [state] * 40, [("defence", i) for i in range(40)], 0.0)
    same = [m for m in moved if m.execution.latents.get("y") == x and math.isfinite(m.log_ratio)]
    # Two latents for one. What was observed is as likely as what is drawn; the guide's log q stays.
    log_q = guide.log_q(program, [{"k": 0.0, "y": x}])[0] - math.log(0.5)
    assert abs(log_q - float(drawn().log_prob(x))) > 0.3
    assert same
    for m in same:
        assert m.log_ratio == pytest.approx(-math.log(2.0) - log_q, abs=1e-3)
        assert m.execution.sites["y"].log_q == pytest.approx(log_q, abs=1e-3)


def test_a_tail_keeps_what_stands_before_the_cut() -> None:
    def model() -> None:
        sample("text", LMString(LM, "ab", max_tokens=6, min_tokens=6))

    program = compile(model)
    (state,) = program.run([PriorGuide().chooser(program, ("start",))], score)
    moved = move(program, PriorGuide(), [state] * 200, [("cut", i) for i in range(200)], 1.0)
    assert all(m.accepted for m in moved), "without observations the prior is always accepted"
    ids = state.latents["text"].ids
    kept = [
        next((t for t in range(6) if m.execution.latents["text"].ids[t] != ids[t]), 6)
        for m in moved
    ]
    # Each cut is as likely as any other, and a tail that is drawn anew may begin like the old one.
    assert set(kept) == set(range(7))
    assert all(m.log_ratio == pytest.approx(0.0, abs=1e-3) for m in moved)


def test_the_scores_that_are_kept_are_those_of_a_fresh_run() -> None:
    import pyro.poutine as poutine

    from langppl import Tempered, call

    def model() -> None:
        one = sample("one", Tempered(LMString(LM, "a", max_tokens=2), 0.5))
        with poutine.scale(scale=0.5):
            two = sample("two", LMString(LM, f"b{one}", max_tokens=2))
        swapped = call("swap", lambda text: text[::-1], two)
        sample("seen", LMString(LM, f"{one}{swapped}"), obs="bb")

    found = run(compile(model), num_samples=60, chains=6, warmup=10)
    fresh = compile(model).log_joint(found.samples)
    np.testing.assert_allclose(found.log_joint, fresh.numpy(), atol=2e-4)
    assert len({key_of(s) for s in found.samples}) > 10


def test_a_score_under_another_adapter_is_not_kept() -> None:
    lm = tiny_lm("ab.", seed=3)
    view = lm.trainable("v", rank=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in view.named_parameters.values():
            p.copy_(0.35 * torch.randn(p.shape, generator=generator))

    def model() -> None:
        k = sample("k", LMChoice(lm, "a", ["a", "b"]))
        sample("y", LMChoice(view if k == "b" else lm, "a", ["a", "b"]), obs="b")

    found = run(compile(model), num_samples=40, chains=4, warmup=0)
    seen = [float(LMChoice(m, "a", ["a", "b"]).log_prob("b")) for m in (lm, view)]
    own = [float(LMChoice(lm, "a", ["a", "b"]).log_prob(k)) for k in "ab"]
    expected = [own["ab".index(k)] + seen["ab".index(k)] for k in found["k"]]
    assert abs(seen[0] - seen[1]) > 0.05 and set(found["k"]) == {"a", "b"}
    assert found.log_joint == pytest.approx(expected, abs=1e-4)


def test_a_score_of_another_spelling_is_not_kept() -> None:
    fn = LMString(LM, "a", max_tokens=2)
    a, b, ab = (LM.vocabulary.exact[text] for text in (b"a", b"b", b"ab"))
    two, one = (Text("ab", ids, LM.fingerprint) for ids in ((a, b), (ab,)))
    old = Site("z", "latent", fn, one, log_prob=-1.25)
    assert _log_prob_before(Site("z", "latent", fn, one), old) == -1.25
    assert two == one and _log_prob_before(Site("z", "latent", fn, two), old) is None


# -- what a guide says of values that it did not draw ----------------------------------------------


def several() -> None:
    p = sample("p", dist.Beta(2.0, 3.0))
    kind = sample("kind", LMChoice(LM, "a", ["a", "b."]))
    text = sample("text", LMString(LM, f"b{kind}", max_tokens=2))
    sample("seen", LMString(LM, f"{kind}{text}", temperature=0.5 + float(p)), obs="bb")


def numbers() -> None:
    import pyro

    pyro.sample("p", dist.Beta(2.0 + float(pyro.sample("inner", dist.Beta(1.0, 1.0))), 1.0))


@pytest.mark.parametrize(
    "options",
    [None, "prompted", {}, {"defensive": 0.3}, {"numeric": numbers}],
    ids=["prior", "prompted", "gflownet", "defensive", "pyro"],
)
def test_a_scorer_knows_the_log_q_of_every_draw(options: Any) -> None:
    from langppl.guides import PromptedGuide
    from langppl.inference.kernels import _before

    program = compile(several)
    guide: Guide = PriorGuide() if options is None else PromptedGuide()
    if isinstance(options, dict):
        guide = GFlowNetGuide(LM, seed=1, **options)
        guide.fit(program, steps=2, batch=4, learning_rate=1e-2, progress=False)
    keys = [("scored", i) for i in range(8)]
    for key, e in zip(
        keys, program.run([guide.chooser(program, k) for k in keys], score), strict=True
    ):
        known = guide.scorer(program, key)
        for name in ("p", "kind", "text"):
            site = e.sites[name]
            found = known(name, site.fn, site.value, _before(e, name))
            assert found == pytest.approx(site.log_q, abs=1e-4), name


def test_a_guide_that_cannot_score_says_so() -> None:
    class Own(Guide):
        name = "own"

        def chooser(self, program: Program, key: tuple[int | str, ...]) -> Chooser:
            return PriorGuide().chooser(program, key)

    with pytest.raises(NotImplementedError, match=r"guide 'own' .* does not say"):
        run(compile(plain), guide=Own())


# -- numbers and choices --------------------------------------------------------------------------


def assert_mean(found: Posterior, fn: Callable[[dict[str, Any]], float], truth: float) -> None:
    """The mean of a function of the samples is within 3.3 standard errors (p 0.001)."""
    assert found.chains is not None
    values = np.array([float(fn(s)) for s in found.samples])
    _, ess = agreement({"it": values.reshape(found.chains.number, -1)})
    error = float(values.std()) / math.sqrt(ess["it"])
    assert error < 0.03
    assert abs(float(values.mean()) - truth) <= 3.3 * error


def test_numbers_and_choices_move_too() -> None:
    def model() -> None:
        p = sample("p", dist.Beta(2.0, 3.0))
        kind = sample("kind", LMChoice(LM, "a", ["a", "b."]))
        sample("seen", LMString(LM, f"a{kind}", temperature=0.2 + float(p)), obs="b")

    grid = (np.arange(40) + 0.5) / 40  # the midpoint rule, exact to 1e-3 here
    weights = []
    for option in ("a", "b."):
        choice = math.exp(float(LMChoice(LM, "a", ["a", "b."]).log_prob(option)))
        seen = [math.exp(nats(f"a{option}", "b", temperature=0.2 + p)) for p in grid]
        weights.append(choice * grid * (1 - grid) ** 2 * np.array(seen))
    table = np.array(weights) / np.sum(weights)
    found = run(compile(model), num_samples=800, chains=40, warmup=10)
    assert_mean(found, lambda s: s["p"], float((table * grid).sum()))
    assert_mean(found, lambda s: s["kind"] == "a", float(table[0].sum()))
    assert found.chains is not None
    assert set(found.chains.ess_of) == {"the log joint", "'p'", "the option of 'kind'"}
    assert set(found.chains.moves) == {"site"}, "only an LMString has a tail"


def test_a_number_that_another_one_rules_out_is_impossible() -> None:
    def model() -> None:
        high = sample("high", dist.Uniform(0.0, 1.0))
        sample("low", dist.Uniform(0.0, high))

    found = run(compile(model), num_samples=1600, chains=40, warmup=10)
    assert all(s["low"] <= s["high"] for s in found.samples)
    assert_mean(found, lambda s: s["high"], 1 / 2)
    assert_mean(found, lambda s: s["low"], 1 / 4)


def test_a_latent_of_another_kind_under_the_same_name_is_another_latent() -> None:
    def model() -> None:
        if sample("real", dist.Bernoulli(0.3)):
            x = sample("x", dist.Normal(0.0, 1.0))
        else:
            x = sample("x", dist.Bernoulli(0.5))
        sample("seen", dist.Normal(x, 1.0), obs=1.5)

    def density(x: float, variance: float) -> float:
        return math.exp(-((1.5 - x) ** 2) / (2 * variance)) / math.sqrt(variance)

    real, flag = 0.3 * density(0.0, 2.0), 0.35 * (density(0.0, 1.0) + density(1.0, 1.0))
    found = run(compile(model), num_samples=1000, chains=40, warmup=10)
    assert_mean(found, lambda s: s["real"], real / (real + flag))
    given_real = real / (real + flag)
    mean = given_real * 0.75 + 0.35 * density(1.0, 1.0) / (real + flag)
    assert_mean(found, lambda s: s["x"], mean)


# -- chains ---------------------------------------------------------------------------------------


def test_a_chain_depends_on_its_seed_and_number_alone() -> None:
    program = compile(branch)
    four = run(program, seed=3, num_samples=40, chains=4)
    two = run(program, seed=3, num_samples=20, chains=2)
    assert [key_of(s) for s in four.samples[:20]] == [key_of(s) for s in two.samples]
    other = run(program, seed=4, num_samples=40, chains=4)
    assert [key_of(s) for s in four.samples] != [key_of(s) for s in other.samples]
    # A longer warm-up leaves more out, and thinning takes every third.
    later = run(program, seed=3, num_samples=3, chains=1, warmup=9, thin=3)
    whole = run(program, seed=3, num_samples=9, chains=1, warmup=9)
    assert [key_of(s) for s in later.samples] == [key_of(s) for s in whole.samples[2::3]]
    assert four.chains is not None and later.chains is not None
    assert (four.chains.number, four.chains.draws, four.chains.warmup) == (4, 10, 25)
    assert (later.chains.thin, sum(later.chains.moves.values())) == (3, 9)


def test_samples_are_rounded_up_to_whole_chains() -> None:
    found = run(compile(plain), num_samples=5, chains=4, warmup=None)
    assert found.num_samples == 8
    assert found.chains is not None and found.chains.warmup == 2


def test_it_begins_at_a_possible_execution() -> None:
    def model(most: int) -> None:
        one = sample("one", LMString(LM, "ab", max_tokens=3, truncate="reject"))
        sample(
            "seen", LMString(LM, "ab", max_tokens=most, ban="b" if "b" in one else None), obs="b"
        )

    found = run(compile(model, 1), num_samples=20, chains=10, warmup=0)
    assert all("b" not in s["one"] for s in found.samples)


def test_without_a_possible_execution_it_says_where_it_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def model() -> None:
        one = sample("one", LMString(LM, "ab", max_tokens=2))
        sample("ending", LMString(LM, one, max_tokens=1), obs="aaaa")

    monkeypatch.setattr(driver, "STARTS", 3)
    with pytest.raises(ValueError, match=r"2 of 2 chains found no .* in 3 draws") as caught:
        run(compile(model), num_samples=4, chains=2)
    assert "site 'ending' (in 6 draws)" in str(caught.value)
    assert "max_tokens is 1" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chains": 0}, "chains must be an integer of at least 1, got 0"),
        ({"warmup": -1}, "warmup must be an integer of at least 0, got -1"),
        ({"thin": 1.5}, "thin must be an integer of at least 1, got 1.5"),
        ({"tail_share": 2}, "tail_share must be between 0 and 1, got 2"),
    ],
)
def test_bad_settings(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(compile(plain), **options)


def test_nothing_to_move() -> None:
    def model() -> None:
        sample("seen", LMString(LM, "a"), obs="b")

    with pytest.raises(ValueError, match="no latent site, so there is nothing to move"):
        run(compile(model))


def test_interrupted_it_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    program = compile(plain)
    whole = run(program, num_samples=6, chains=2, warmup=2)
    calls: list[int] = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return move(*args)

    monkeypatch.setattr(driver, "move", interrupted)
    with pytest.warns(InferenceWarning, match="first 2 samples of each chain, of 3"):
        found = run(program, num_samples=6, chains=2, warmup=2)
    kept = [whole.samples[i] for i in (0, 1, 3, 4)]
    assert [key_of(s) for s in found.samples] == [key_of(s) for s in kept]
    calls[:] = [1, 1, 1, 1]
    with pytest.raises(KeyboardInterrupt):
        run(program, num_samples=6, chains=2, warmup=2)


# -- what the posterior says ----------------------------------------------------------------------


def test_the_posterior_of_chains(tmp_path: Any) -> None:
    found = run(compile(branch), num_samples=60, chains=6)
    assert found.log_evidence is None and found.log_evidence_error is None
    assert found.elbo is None and found.elbo_possible is None
    assert math.isnan(found.pareto_k) and not found.reliable
    assert found.chains is not None
    assert found.ess == min(found.chains.ess_of.values())
    np.testing.assert_allclose(found.weights, 1 / 60)
    text = " ".join(str(found).split())
    assert "log evidence is not estimated by method mh" in text
    assert "6 chains of 10 samples; accepted: " in text
    assert f"ESS {found.ess:.1f} of 60 samples (of the l" in text
    assert "log_evidence=None" in repr(found)
    found.save(tmp_path / "mh.json")
    loaded = Posterior.load(tmp_path / "mh.json")
    assert loaded.chains == found.chains and str(loaded) == str(found)
    with pytest.raises(ValueError, match=r"'mh' \(method mh\) are equally weighted"):
        plot_log_weights({"mh": found})
    table = str(Comparison({"mh": found}))
    assert "–" in table and "nan" not in table
    assert compare(branch, guides=["prior"], num_samples=4, progress=False).rows()


def chains(**fields: Any) -> Chains:
    plain = {"number": 4, "draws": 500, "warmup": 500, "thin": 1, "moves": {"site": 2000}}
    good = {"acceptance": {"site": 0.4}, "r_hat": {"x": 1.002}, "ess_of": {"x": 900.0}}
    return Chains(**{**plain, **good, **fields})


def test_notes_say_what_is_wrong_and_what_to_do() -> None:
    assert chain_notes(chains()) == [] and chains().agree
    (low,) = chain_notes(chains(acceptance={"site": 0.03, "tail": 0.2}))
    assert low.startswith("only 3.0% of the site moves were accepted")
    assert '"prompted", "gflownet"' in low and "a larger tail_share" in low
    (apart,) = chain_notes(chains(r_hat={"x": 1.2, "y": 1.0}))
    assert "R-hat of x is above 1.01" in apart
    (few,) = chain_notes(chains(ess_of={"x": 80.0}))
    assert "fewer than 400 independent samples" in few
    for poor in (chains(r_hat={"x": 1.2}), chains(ess_of={"x": 80.0}), chains(r_hat={}, ess_of={})):
        assert not poor.agree
    (short,) = chain_notes(chains(r_hat={"x": math.nan}, ess_of={"x": math.nan}))
    assert "too few to tell" in short


def test_agreement_is_arvizs() -> None:
    import arviz

    rng = np.random.default_rng(0)
    series = rng.normal(size=(4, 200)).cumsum(1) * 0.05 + rng.normal(size=(4, 200))
    r_hat, ess = agreement({"x": series, "constant": np.ones((4, 200))})
    assert r_hat == {"x": pytest.approx(float(arviz.rhat(series)))}
    assert ess == {"x": pytest.approx(float(arviz.ess(series)))}
    # One chain is compared with itself, half by half.
    drift = np.arange(100.0)[None] + rng.normal(size=(1, 100))
    assert agreement({"x": drift})[0]["x"] > 1.5
    # Chains that stand still at different places do not agree, whatever arviz makes of them.
    still = np.repeat(np.array([[1.0], [2.0]]), 50, axis=1)
    assert agreement({"x": still}) == ({"x": math.inf}, {"x": 2.0})
    r_hat, ess = agreement({"x": rng.normal(size=(4, 3))})
    assert math.isnan(r_hat["x"]) and math.isnan(ess["x"])
    with pytest.raises(ValueError, match="summary 'x' of the chains is not finite"):
        agreement({"x": np.array([[0.0, math.inf]])})
    assert "fewer than 4 samples a chain" in chains(r_hat={"x": math.nan}).lines()[0]
    assert "ever varies" in chains(r_hat={}, ess_of={}).lines()[0]
