"""Simulation-based calibration passes what is right and finds what is not."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chisquare

from langppl import (
    GFlowNetGuide,
    LMChoice,
    LMString,
    RewardSchedule,
    calibrate,
    call,
    compile,
    deterministic,
    factor,
    sample,
)
from langppl.diagnostics import InferenceWarning
from langppl.guides import Guide, PriorGuide
from langppl.guides.policy import Policy
from langppl.inference import Calibration, calibration
from langppl.inference.calibration import LIKELIHOOD
from langppl.lm.seeds import generator
from langppl.plots import plot_calibration
from langppl.program import Program
from langppl.program.execution import Choice, Chooser, Execution
from langppl.testing import tiny_lm

LETTERS = "abcd."
LM = tiny_lm(LETTERS, seed=1, sharpness=0.05, hidden_size=32)
SIMULATIONS = 300
LEVEL = 0.01


def story(seen: str) -> None:
    z = sample("z", LMString(LM, "a", stop=".", max_tokens=2, allow=list("abc.")))
    sample("seen", LMString(LM, f"a{z}", temperature=0.2), obs=seen)


PROGRAM = compile(story, "b")


@functools.cache
def trained() -> GFlowNetGuide:
    """Trained on all five observations, to a mean KL(p‖q) of 0.012 nats; the prior's is 0.19."""
    guide = GFlowNetGuide(
        LM, rank=16, alpha=64, context=lambda info: info.args[0], objective="vargrad", seed=0
    )
    return guide.fit(
        story,
        [(letter,) for letter in LETTERS],
        steps=80,
        observations=5,
        learning_rate=6e-3,
        schedule=RewardSchedule(start=1.0),
        progress=False,
    )


class Overconfident(Guide):
    """The trained guide at half its temperature."""

    name = "overconfident"

    def chooser(self, program: Program, key: Any) -> Chooser:
        return Policy(trained().proposer, program, key, temperature=0.5)


GUIDES = {"prior": PriorGuide, "trained": trained, "overconfident": Overconfident}
OPTIONS: dict[str, dict[str, Any]] = {
    "importance": {"num_samples": 40},
    "smc": {"num_samples": 32},
    "mh": {"num_samples": 8, "chains": 8, "warmup": 7},
}


@functools.cache
def found(method: str, guide: str = "prior") -> Calibration:
    return calibrate(
        PROGRAM,
        guide=GUIDES[guide](),
        method=method,
        simulations=SIMULATIONS,
        draws=7,
        progress=False,
        **OPTIONS.get(method, {}),
    )


@pytest.mark.parametrize("method", ["importance", "smc", "mh", "exact"])
def test_right_methods_pass(method: str) -> None:
    calibration = found(method)
    assert calibration.simulations == SIMULATIONS
    assert list(calibration.ranks) == ["z: tokens", "z: log p", LIKELIHOOD]
    assert calibration.passes(LEVEL), str(calibration)
    assert "as uniform as" in str(calibration)
    assert calibration.guide == ("enumeration" if method == "exact" else "prior")


def test_the_raw_draws_of_a_trained_guide_pass() -> None:
    assert found("raw", "trained").passes(LEVEL), str(found("raw", "trained"))


@pytest.mark.parametrize("guide", ["prior", "overconfident"])
def test_wrong_draws_fail(guide: str) -> None:
    calibration = found("raw", guide)
    assert not calibration.passes(LEVEL), str(calibration)
    failed = {t.name for t in calibration.tests if t.adjusted <= LEVEL}
    assert LIKELIHOOD in failed
    if guide == "prior":
        # Averaged over data, the posterior is the prior: only what looks at the data can tell them.
        assert failed == {LIKELIHOOD}
    worst = min(calibration.tests, key=lambda t: t.p_value)
    assert "Not calibrated" in str(calibration) and repr(worst.name) in str(calibration)
    assert calibration.median_ess is None


def branching(seen: str) -> None:
    first = sample("first", LMString(LM, "a", max_tokens=2))
    if "a" in first:
        first += sample("second", LMString(LM, f"b{first}", stop=".", max_tokens=3))
    sample("seen", LMString(LM, first, temperature=0.5), obs=seen)


@pytest.mark.parametrize("guide", ["prior", "prompted"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("smc", {"num_samples": 6}),
        ("smc", {"num_samples": 6, "twist": "lookahead", "every": 1, "ess_threshold": 0.9}),
        ("mh", {"num_samples": 12, "chains": 4, "warmup": 3}),
    ],
)
def test_simulations_together_are_those_one_at_a_time(
    method: str, options: dict[str, Any], guide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[list[Any], Calibration]:
        posteriors: list[Any] = []

        def note(program: Program, posterior: Any, chosen: Any) -> Any:
            posteriors.append((posterior.samples, posterior.log_weights.tolist()))
            return of_samples(program, posterior, chosen)

        monkeypatch.setattr(calibration, "_of_samples", note)
        made = calibrate(
            branching,
            "ab",
            guide=guide,
            method=method,
            simulations=11,
            draws=3,
            progress=False,
            **options,
        )
        return posteriors, made

    of_samples = calibration._of_samples
    counts: list[int] = []
    run_whole = calibration.run_whole
    monkeypatch.setattr(
        calibration, "run_whole", lambda tasks: counts.append(len(tasks)) or run_whole(tasks)
    )
    together, one = run()
    monkeypatch.setattr(calibration, "BATCH", 1)
    apart, other = run()
    assert counts == [11] + [1] * 11
    assert one.ranks == other.ranks
    for (samples, weights), (alone, expected) in zip(together, apart, strict=True):
        assert samples == alone
        np.testing.assert_allclose(weights, expected, atol=1e-4)


def test_weights_mend_an_overconfident_guide() -> None:
    calibration = calibrate(
        PROGRAM,
        guide=Overconfident(),
        simulations=100,
        num_samples=80,
        draws=7,
        progress=False,
    )
    assert calibration.passes(LEVEL), str(calibration)


def test_numbers_and_choices() -> None:
    def model() -> None:
        mean = sample("mean", dist.Normal(0.0, 1.0))
        both = sample("both", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        kind = sample("kind", LMChoice(LM, "a", ["a", "b"]))
        sample("x", dist.Normal(mean + both.sum(), 1.0), obs=0.0)
        sample("text", LMString(LM, kind), obs="a")

    right = calibrate(model, simulations=40, num_samples=25, draws=3, progress=False)
    assert list(right.ranks) == [
        "mean",
        "both[0]",
        "both[1]",
        "kind: tokens",
        "kind: log p",
        LIKELIHOOD,
    ]
    assert right.passes(LEVEL)
    wrong = calibrate(model, method="raw", simulations=40, draws=3, progress=False)
    assert not wrong.passes(LEVEL)


def test_summaries_of_ones_own() -> None:
    seen: list[dict[str, Any]] = []

    def letters(latents: dict[str, Any]) -> int:
        seen.append(latents)
        return len(latents["z"])

    calibration = calibrate(
        PROGRAM,
        method="raw",
        simulations=10,
        draws=3,
        summaries={"letters": letters, "always 1": lambda _: 1.0},
        progress=False,
    )
    assert list(calibration.ranks) == ["letters", "always 1"]
    assert set(seen[0]) == {"z"}
    # What is always equal has a random rank.
    assert len(set(calibration.ranks["always 1"])) > 1
    with pytest.raises(ValueError, match="summary 'bad' is NaN"):
        calibrate(PROGRAM, simulations=2, summaries={"bad": lambda _: math.nan}, progress=False)
    with pytest.raises(TypeError, match="summary 'z' must be one number, but is '"):
        calibrate(PROGRAM, simulations=2, summaries={"z": lambda s: str(s["z"])}, progress=False)
    with pytest.raises(ValueError, match="summaries are empty"):
        calibrate(PROGRAM, simulations=2, summaries={}, progress=False)


def test_the_test_is_chi_square_on_the_ranks() -> None:
    ranks = tuple(int(r) for r in np.random.default_rng(0).integers(0, 8, size=200))
    calibration = Calibration("prior", "exact", 200, 7, 1, {"a": ranks, "b": (0,) * 200}, None)
    first, second = calibration.tests
    counts = np.bincount(ranks, minlength=8)
    assert first.counts == tuple(counts)
    assert first.p_value == pytest.approx(chisquare(counts).pvalue)
    assert first.adjusted == pytest.approx(min(1.0, 2 * first.p_value))
    assert second.p_value < 1e-100
    assert second.words == "lean low: the draws are too high"
    # With 20 simulations, bins of at least 5: ranks 0 and 1 together, and so on.
    few = Calibration("prior", "exact", 20, 7, 1, {"a": ranks[:20]}, None).tests[0]
    assert few.expected == (5.0, 5.0, 5.0, 5.0)
    assert few.counts == tuple(np.bincount(np.array(ranks[:20]) // 2, minlength=4))


def test_bins_of_more_ranks_expect_more() -> None:
    # Ten ranks in three bins: 4, 3 and 3 of them.
    ranks = (0, 3, 3, 4, 5, 6, 6, 7, 9, 9, 2, 8, 1, 0, 4)
    (found,) = Calibration("prior", "exact", 15, 9, 1, {"a": ranks}, None).tests
    assert found.expected == pytest.approx((6.0, 4.5, 4.5))
    assert found.counts == (6, 5, 4)
    # 0²/6 + 0.5²/4.5 + 0.5²/4.5.
    assert found.statistic == pytest.approx(1.0 / 9.0)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([0] * 50 + [7] * 50, "at both ends: the draws are too narrow"),
        ([3] * 50 + [4] * 50, "in the middle: the draws are too wide"),
        ([6, 7] * 50, "lean high: the draws are too low"),
        (list(range(8)) * 12, "no lean, no bulge"),
    ],
)
def test_the_shape_is_put_into_words(ranks: list[int], words: str) -> None:
    calibration = Calibration("g", "raw", len(ranks), 7, 7, {"a": tuple(ranks)}, None)
    assert calibration.tests[0].words == words


def test_uniform_ranks_pass_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(1)
    failed = 0
    for _ in range(400):
        ranks = {name: tuple(rng.integers(0, 16, size=160)) for name in "abc"}
        failed += not Calibration("g", "raw", 160, 15, 15, ranks, None).passes(0.05)
    # Binomial(400, at most 0.05): its mean is 20 and its standard deviation 4.4.
    assert 3 <= failed <= 33


def test_it_is_reproducible_and_tabulated() -> None:
    one, two = (
        calibrate(PROGRAM, method="raw", simulations=12, draws=3, seed=4, progress=False)
        for _ in range(2)
    )
    assert one == two
    frame = one.to_pandas()
    assert list(frame.columns) == ["z: tokens", "z: log p", LIKELIHOOD]
    assert frame.shape == (12, 3)
    assert frame.to_numpy().min() >= 0 and frame.to_numpy().max() <= 3


def test_its_picture() -> None:
    figure = found("exact").plot()
    axes = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title().split(" (p = ")[0] for ax in axes] == list(found("exact").ranks)
    for ax, test in zip(axes, found("exact").tests, strict=True):
        assert [bar.get_height() for bar in ax.patches] == list(test.counts)  # type: ignore[attr-defined]
        # A calibrated method's bars end within the band.
        (band,) = ax.collections
        edges = band.get_paths()[0].vertices[:, 1]
        assert edges.min() >= 0.0 and max(test.counts) <= edges.max()
    with pytest.raises(ValueError, match="level must be between"):
        plot_calibration(found("exact"), level=0.0)


@pytest.mark.parametrize(
    ("simulations", "draws", "is_telling"),
    [(5, 15, False), (19, 15, False), (20, 15, True), (10, 1, True), (9, 1, False)],
)
def test_too_few_simulations_tell_nothing(simulations: int, draws: int, is_telling: bool) -> None:
    # Each in one bin or the other, in turns: as even as can be.
    ranks = tuple((k % 2) * draws for k in range(simulations))
    found = Calibration("prior", "raw", simulations, draws, draws, {"z": ranks}, None)
    assert found.is_telling == is_telling
    if draws == 1:
        assert ("as uniform as" in str(found)) == is_telling
    if is_telling:
        assert "too few simulations" not in str(found)
        return
    assert "too few simulations to tell" in str(found) and "as uniform as" not in str(found)
    with pytest.warns(InferenceWarning, match=f"too few simulations to tell: {simulations}, and"):
        assert found.passes()


def test_what_fails_with_few_simulations_fails() -> None:
    ranks = (0,) * 12
    found = Calibration("prior", "raw", 12, 15, 15, {"z": ranks}, None)
    assert not found.is_telling
    assert not found.passes() and "Not calibrated" in str(found)


def test_few_effective_samples_are_said() -> None:
    few = calibrate(PROGRAM, simulations=5, num_samples=4, draws=7, progress=False)
    assert "before the ranks mean anything" in str(few)


def test_unknown_effective_samples_are_said() -> None:
    """Chains of 2 samples are too short for an ESS in every simulation."""
    options: dict[str, Any] = {"simulations": 5, "chains": 4, "warmup": 2, "progress": False}
    short = calibrate(PROGRAM, method="mh", num_samples=8, draws=3, **options)
    text = " ".join(str(short).split())
    assert "before the ranks mean anything" in text and "nan" not in text
    assert "ESS is unknown in 5 of 5 simulations" in text
    assert (short.median_ess, short.unknown_ess) == (None, 5)


@pytest.mark.parametrize(
    ("unknown", "median", "words"),
    [
        (0, 50.0, None),
        (4, 50.0, None),
        (5, 50.0, "ESS is unknown in 5 of 10 simulations"),
        (4, 3.0, "median ESS is 3.0"),
    ],
)
def test_a_few_unknown_effective_samples_leave_the_others_median(
    unknown: int, median: float, words: str | None
) -> None:
    calibration = Calibration("g", "mh", 10, 7, 9, {"a": (3,) * 10}, median, unknown)
    text = " ".join(str(calibration).split())
    assert ("before the ranks mean anything" in text) == (words is not None)
    assert words is None or words in text


def test_one_simulation_that_never_varies_leaves_the_median_of_the_others() -> None:
    def model() -> None:
        z = sample("z", LMChoice(LM, "a", ["a", "b"]))
        # Of x = 0 nothing is left to doubt, and no chain moves.
        p = 1.0 if z == "a" else 0.5
        sample("x", dist.Bernoulli(p, validate_args=False), obs=0.0)

    found = calibrate(
        model, method="mh", simulations=12, num_samples=64, chains=4, draws=3, progress=False
    )
    assert found.median_ess is not None and 1.0 < found.median_ess <= 64.0
    assert 0 < found.unknown_ess < 12


METHODS = ["importance", "raw", "smc", "mh", "exact"]


@pytest.mark.parametrize("method", METHODS)
def test_a_latent_does_not_decide_what_is_observed(method: str) -> None:
    def sometimes() -> None:
        z = sample("z", LMChoice(LM, "a", ["a", "b"]))
        sample("x", LMString(LM, z), obs="a")
        if z == "a":
            sample("y", LMString(LM, z), obs="b")

    with pytest.raises(ValueError, match="'y' is observed in some executions and not in others"):
        calibrate(sometimes, method=method, simulations=8, draws=3, num_samples=32, progress=False)


@pytest.mark.parametrize("kind", ["observed", "factor"])
@pytest.mark.parametrize("method", METHODS)
def test_nor_in_a_branch_that_no_simulation_takes(method: str, kind: str) -> None:
    """Simulated once in 10^5 times, and drawn half of the time by the guide or listed."""

    class Even(PriorGuide):
        def chooser(self, program: Program, key: Any) -> Chooser:
            def choose(name: str, fn: Any, execution: Execution) -> Choice:
                value = torch.tensor(float(generator((*key, name)).integers(2)))
                return Choice(value, -math.log(2.0))

            return choose

        def given(self, program: Program, values: Mapping[str, Any]) -> Chooser:
            return lambda name, fn, execution: Choice(values[name], -math.log(2.0))

    def rarely() -> None:
        z = sample("z", dist.Bernoulli(1e-5))
        # The simulation draws x, mostly far from 0; a chain would hardly move there otherwise.
        sample("x", dist.Normal(0.0, 1.0), obs=0.0)
        if z:
            if kind == "observed":
                sample("y", dist.Normal(0.0, 1e-5), obs=0.0)
            else:
                factor("y", 12.0)

    with pytest.raises(ValueError, match="'y' is observed in some executions and not in others"):
        calibrate(
            rarely,
            method=method,
            guide="prior" if method == "exact" else Even(),
            simulations=8,
            draws=3,
            num_samples=32,
            progress=False,
        )


@pytest.mark.parametrize("method", METHODS)
def test_but_what_is_made_of_it(method: str) -> None:
    def model() -> None:
        z = sample("z", LMChoice(LM, "a", ["a", "b"]))
        if z == "a":
            z = deterministic("twice", call("join", lambda t: f"{t}{t}", z))
        else:
            sample("more", LMChoice(LM, z, ["a", "b"]))
        sample("x", LMString(LM, z, temperature=0.5), obs="a")

    found = calibrate(model, method=method, simulations=8, draws=3, num_samples=32, progress=False)
    assert all(len(ranks) == 8 for ranks in found.ranks.values())


def test_bad_input() -> None:
    def no_latents() -> None:
        sample("x", LMString(LM, "a"), obs="a")

    quick: dict[str, Any] = {"simulations": 4, "progress": False}
    with pytest.raises(ValueError, match="no latents"):
        calibrate(no_latents, **quick)
    with pytest.raises(ValueError, match="unknown method 'magic'; methods are: importance, raw"):
        calibrate(PROGRAM, method="magic", **quick)
    with pytest.raises(ValueError, match="trained for one observation"):
        calibrate(PROGRAM, guide="gflownet", **quick)
    with pytest.raises(ValueError, match="simulations must be an integer of at least 2, got 1"):
        calibrate(PROGRAM, simulations=1)
    with pytest.raises(TypeError, match="method 'raw' has no option 'chains'; it has none"):
        calibrate(PROGRAM, method="raw", chains=3, **quick)
    with pytest.raises(TypeError, match=r"arguments already; give none, got twits; did .* 'twist'"):
        calibrate(PROGRAM, method="smc", twits=None, **quick)
    with pytest.raises(ValueError, match="draws must be an integer of at least 1, got 0"):
        calibrate(PROGRAM, draws=0, **quick)
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        found("exact").passes(1.5)

    def rarely(seen: str) -> None:
        z = sample("z", LMString(LM, "a", max_tokens=2, truncate="reject"))
        sample("seen", LMString(LM, f"a{z}"), obs=seen)

    with pytest.raises(ValueError, match=r"in simulation \d, none of the 1 samples explains"):
        calibrate(rarely, "a", num_samples=1, **quick)
