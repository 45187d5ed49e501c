"""SMC against exact answers: unbiased under everything that may change, and noticed if it is not.

The cells are a part of benchmarks/truth.py, which runs all of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from mixed import LM, everything

from langppl import (
    GFlowNetGuide,
    LMString,
    MaskedGuide,
    call,
    compile,
    factor,
    infer,
    log_matches,
    potential,
    regex,
    sample,
)
from langppl.diagnostics import InferenceWarning, by_ancestor, log_evidence_error
from langppl.guides import PriorGuide, PromptedGuide
from langppl.inference import smc as engine
from langppl.inference.particles import Crowd, Particle
from langppl.inference.resampling import SCHEMES, resample
from langppl.inference.twists import Lookahead
from langppl.lm.seeds import generator
from langppl.posterior import Posterior
from langppl.program.execution import Execution
from langppl.testing import tiny_lm

RUNS = 80


CELLS = [
    ("infilling", "prior", "none", "systematic"),
    ("infilling", "prompted", "lookahead", "residual"),
    ("infilling", "prior", "lookahead, whole", "systematic"),
    ("infilling", "gflownet", "flow", "stratified"),
    ("at_the_end", "prior", "lookahead", "multinomial"),
    ("at_the_end", "prompted", "none", "systematic"),
    ("branch", "prior", "user", "multinomial"),
    ("branch", "gflownet", "lookahead", "systematic"),
    ("steered", "prior", "none", "stratified"),
    ("steered", "prompted", "user", "residual"),
]


@pytest.mark.parametrize("names", CELLS, ids="-".join)
def test_the_evidence_is_unbiased(truth: ModuleType, names: tuple[str, ...]) -> None:
    cell = truth.Cell(*names)
    program = compile(truth.PROGRAMS[cell.program])
    log_z = infer(program, method="exact", progress=False).log_evidence
    found = truth.ratios(cell, truth.GUIDES[cell.guide](program), program, log_z, RUNS)
    assert truth.verdict(found, len(CELLS))["unbiased"], truth.verdict(found, len(CELLS))


def _without_reset(crowd: Any, scheme: str, threshold: float, rng: Any) -> bool:
    """Resamples, and lets particles keep their weights."""
    weights = np.exp([p.log_weight for p in crowd.particles])
    if not weights.any():
        return False
    chosen = [crowd.particles[k] for k in resample(weights / weights.sum(), scheme, rng)]
    crowd.particles = [p.copy(p.offset) for p in chosen]
    return True


def _without_resampling(crowd: Any, scheme: str, threshold: float, rng: Any) -> bool:
    """Resets the weights of particles that stay as they are."""
    log_weights = np.array([p.log_weight for p in crowd.particles])
    if not (log_weights > -np.inf).all():
        return False
    mean = float(np.logaddexp.reduce(log_weights) - math.log(len(log_weights)))
    crowd.particles = [p.copy(mean - p.ratio) for p in crowd.particles]
    return True


@pytest.mark.parametrize("wrong", [_without_reset, _without_resampling])
def test_a_wrong_resampling_is_noticed(
    truth: ModuleType, wrong: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "resample_crowd", wrong)
    cell = truth.Cell("infilling", "prior", "lookahead, whole", "systematic")
    program = compile(truth.PROGRAMS[cell.program])
    log_z = infer(program, method="exact", progress=False).log_evidence
    found = truth.ratios(cell, PriorGuide(), program, log_z, RUNS)
    assert not truth.verdict(found, len(CELLS))["unbiased"], truth.verdict(found, len(CELLS))


def test_a_factor_that_is_left_out_is_noticed(truth: ModuleType) -> None:
    def without() -> None:
        middle = sample("middle", LMString(truth.LM, "ab", stop=".", max_tokens=3))
        sample("ending", LMString(truth.LM, f"ab{middle}"), obs="ab")

    cell = truth.Cell("infilling", "prior", "lookahead, whole", "systematic")
    right = infer(compile(truth.infilling), method="exact", progress=False).log_evidence
    found = truth.ratios(cell, PriorGuide(), compile(without), right, RUNS)
    assert not truth.verdict(found, len(CELLS))["unbiased"]


@pytest.mark.parametrize("twist", [None, "lookahead"])
def test_probabilities_agree_with_the_exact_ones(twist: str | None) -> None:
    program = compile(everything)
    exact = infer(program, method="exact", progress=False)
    runs = [
        infer(program, method="smc", twist=twist, num_samples=80, every=1, seed=s, progress=False)
        for s in range(6)
    ]
    ratios = np.exp([r.log_evidence - exact.log_evidence for r in runs])
    assert abs(ratios.mean() - 1.0) <= 3.5 * ratios.std(ddof=1) / math.sqrt(len(runs))
    for site in program.latents:
        for value, p in exact.probabilities(site).items():
            found = [r.probabilities(site).get(value, 0.0) for r in runs]
            error = np.std(found, ddof=1) / math.sqrt(len(runs))
            # Student's t of 5 degrees of freedom at 1e-4, and what the estimator is biased by.
            assert abs(np.mean(found) - p) <= 9.7 * error + 0.02, (site, value, p, found)


def test_lookahead_tells_the_unfinished_apart_by_a_power_and_leaves_them_their_share() -> None:
    log_weights = np.log([8.0, 4.0, 2.0])
    ahead = [
        Particle({}, Execution(), i, offset=1.0, ratio=w - 1.0) for i, w in enumerate(log_weights)
    ]
    # Their weights without lookahead are 2, 1 and 2.
    Lookahead(0.5).temper(list(zip(ahead, np.log([4.0, 4.0, 1.0]), strict=True)))
    # 2·4^½, 1·4^½ and 2·1^½ are 4, 2 and 2, and share 14 as these share 8.
    np.testing.assert_allclose(np.exp([p.log_weight for p in ahead]), [7.0, 3.5, 3.5])


def test_a_power_of_lookahead_is_between_none_and_the_whole(
    monkeypatch: pytest.MonkeyPatch, truth: ModuleType
) -> None:
    """What its particles weigh at each look, which resampling would level out."""

    def weights(**options: Any) -> list[tuple[list[bool], np.ndarray]]:
        looks = []

        def look(crowd: Crowd, *args: Any) -> bool:
            if any(p.growing for p in crowd.particles):
                unfinished = [
                    p.growing is not None and not p.growing.is_ended for p in crowd.particles
                ]
                looks.append((unfinished, np.exp([p.log_weight for p in crowd.particles])))
            return False

        monkeypatch.setattr(engine, "resample_crowd", look)
        program = compile(truth.infilling)
        infer(program, method="smc", num_samples=24, every=1, progress=False, **options)
        return looks

    ways = [weights(twist="lookahead", twist_power=power) for power in (0.0, 0.4, 1.0)]
    assert len(ways[0]) >= 2
    for (going, none), (_, some), (_, whole) in zip(*ways, strict=True):
        ended = ~np.array(going)
        np.testing.assert_allclose(some[ended], whole[ended])
        np.testing.assert_allclose(none[ended], whole[ended])
        spreads = [np.std(w[going]) / np.mean(w[going]) for w in (none, some, whole)]
        assert spreads[0] == pytest.approx(0.0, abs=1e-6) and spreads[0] < spreads[1] < spreads[2]
        for other in (none, some):
            assert other[going].sum() == pytest.approx(whole[going].sum())


def test_equal_seeds_give_equal_particles_and_others_do_not(truth: ModuleType) -> None:
    def run(seed: int) -> Posterior:
        options: dict[str, Any] = {"twist": "lookahead", "every": 1, "ess_threshold": 1.0}
        return infer(
            truth.steered, method="smc", num_samples=12, seed=seed, progress=False, **options
        )

    one, same, other = run(3), run(3), run(4)
    assert one.samples == same.samples
    np.testing.assert_array_equal(one.log_weights, same.log_weights)
    assert one.samples != other.samples


def test_never_resampled_it_is_importance_sampling() -> None:
    def story() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=3))
        sample("y", LMString(LM, f"ab{z}"), obs="ab")

    program = compile(story)
    for guide in (PriorGuide(), PromptedGuide(), GFlowNetGuide(LM)):
        found = infer(
            program, method="smc", guide=guide, num_samples=30, ess_threshold=0.0, progress=False
        )
        assert found.resampled == 0 and found.ancestors == list(range(30))
        assert found.log_q is not None
        expected = program.log_joint(found.samples).numpy() - found.log_q
        np.testing.assert_allclose(found.log_weights, expected, atol=2e-4)
        plain = Posterior(found.samples, found.log_weights)
        assert found.ess == pytest.approx(plain.ess)
        assert found.log_evidence_error == pytest.approx(plain.log_evidence_error)


def test_a_string_that_ends_early_waits_for_the_others() -> None:
    """Evidence that early strings alone have met is no reason to resample them away."""

    def loop() -> None:
        text = ""
        for turn in range(3):
            text += sample(f"word_{turn}", LMString(LM, f"a{text}", max_tokens=1))
            if text.endswith("b"):
                break
        factor("evidence", -50.0)

    found = infer(loop, method="smc", num_samples=40, ess_threshold=1.0, seed=1, progress=False)
    lengths = [len(s) for s in found.samples]
    assert found.resampled == 0  # all have the same weight by then
    assert min(lengths) == 1 and max(lengths) == 3
    assert found.log_evidence == pytest.approx(-50.0, abs=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_copies_in_proportion(scheme: str) -> None:
    rng = np.random.default_rng(0)
    weights = np.array([0.0, 0.5, 0.05, 0.2, 0.25, 0.0])
    counts = np.array(
        [np.bincount(resample(weights, scheme, rng), minlength=6) for _ in range(20_000)]
    )
    assert (counts.sum(1) == 6).all()
    error = counts.std(0) / math.sqrt(len(counts))
    assert (abs(counts.mean(0) - 6 * weights) <= 4.5 * error + 1e-12).all()
    if scheme != "multinomial":  # of 3 expected copies there are always 3, or nearly
        assert set(counts[:, 1]) <= ({3} if scheme != "stratified" else {2, 3, 4})


def test_resampling_by_hand() -> None:
    weights = np.array([0.5, 0.25, 0.25])
    for scheme, points in (("systematic", 1), ("stratified", 3)):
        rng, again = generator(("hand",)), generator(("hand",))
        at = (np.arange(3) + again.random(points)) / 3
        expected = [int(np.flatnonzero(x < np.array([0.5, 0.75, 1.0]))[0]) for x in at]
        assert resample(weights, scheme, rng).tolist() == expected
    with pytest.raises(ValueError, match="unknown scheme"):
        resample(weights, "other", generator(()))
    with pytest.raises(ValueError, match="sum to one"):
        resample(2 * weights, "systematic", generator(()))


def test_descendants_of_one_count_as_one() -> None:
    log_weights = np.log([1.0, 3.0, 2.0, 2.0])
    families = by_ancestor(log_weights, [0, 0, 2, 2])
    np.testing.assert_allclose(np.exp(families), [4.0, 0.0, 4.0, 0.0])
    posterior = Posterior(
        [{"z": "a"}] * 4, log_weights, method="smc", ancestors=[0, 0, 2, 2], resampled=1
    )
    assert posterior.ess == pytest.approx(2.0)
    # 1 − 4/3 · (1 − ½) = 1/3
    assert posterior.log_evidence_error == pytest.approx(math.sqrt(1 / 3))
    assert posterior.elbo is None and posterior.elbo_possible is None
    assert "descend from 2 of 4" in str(posterior)
    assert log_evidence_error([0.0], [0]) == math.inf
    assert log_evidence_error([-math.inf] * 3, [0, 1, 2]) == math.inf


def test_saved_it_keeps_its_ancestors(tmp_path: Path) -> None:
    def story() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=3))
        sample("y", LMString(LM, f"ab{z}"), obs="ab")

    found = infer(story, method="smc", twist="lookahead", num_samples=8, every=1, progress=False)
    found.save(tmp_path / "posterior.json")
    again = Posterior.load(tmp_path / "posterior.json")
    assert (again.ancestors, again.resampled, again.ess) == (
        found.ancestors,
        found.resampled,
        found.ess,
    )


def test_a_potential_is_a_factor_of_the_whole_text() -> None:
    def steered(every_part: bool) -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=3))
        if every_part:
            potential("few", lambda text: -0.8 * text.count("b"), z)
        else:
            factor("few", -0.8 * z.count("b"))

    one, other = (
        infer(lambda: steered(True), method="exact", progress=False),
        infer(lambda: steered(False), method="exact", progress=False),
    )
    assert one.log_evidence == pytest.approx(other.log_evidence, abs=1e-6)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="potential 'p'"):
            potential("p", lambda text, bad=bad: bad, "x")  # type: ignore[misc]


def unbiased(program: Any, guide: Any, runs: int = 40, **options: Any) -> tuple[float, float]:
    """Mean of Ẑ/Z and its standard error."""
    exact = infer(program, method="exact", progress=False).log_evidence
    assert exact is not None
    found = []
    for run in range(runs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InferenceWarning)
            evidence = infer(
                program,
                guide=guide,
                method="smc",
                every=1,
                ess_threshold=0.95,
                seed=run,
                progress=False,
                **options,
            ).log_evidence
        assert evidence is not None
        found.append(math.exp(evidence - exact))
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(runs))


def test_strings_under_a_grammar_grow_as_particles() -> None:
    """As another prior, whose dead ends and cuts are dead particles."""

    def masked() -> None:
        z = sample("z", LMString(LM, "a", max_tokens=4, grammar=regex("(ab|b)+a?")))
        sample("y", LMString(LM, f"b{z}"), obs="ab")

    program = compile(masked)
    for guide in (PriorGuide(), PromptedGuide()):
        mean, error = unbiased(program, guide, num_samples=30, twist="lookahead")
        assert abs(mean - 1.0) <= 3.5 * error + 1e-5 and error < 0.2


def test_a_masked_proposal_is_weighed_token_by_token() -> None:
    """Where the grammar is a condition, the mass of the masks is in the weights."""
    form = regex("(ab|b)+a?")

    def conditioned() -> None:
        z = sample("z", LMString(LM, "a", max_tokens=3))
        factor("form", log_matches(z, form))
        sample("y", LMString(LM, f"b{z}"), obs="ab")

    program = compile(conditioned)
    guide = MaskedGuide({"z": form})
    mean, error = unbiased(program, guide, num_samples=30)
    assert abs(mean - 1.0) <= 3.5 * error + 1e-5 and error < 0.2
    options: dict[str, Any] = {"method": "smc", "every": 1, "ess_threshold": 1.0}
    found = infer(program, guide=guide, num_samples=50, progress=False, **options)
    # All have the same masks before the first token; by the second their mass differs.
    assert found.resampled == 1


def test_all_particles_dead_is_told_and_no_crash() -> None:
    def never() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=2))
        factor("never", -math.inf)
        sample("more", LMString(LM, z, max_tokens=2))

    with pytest.warns(InferenceWarning, match="'never'"):
        found = infer(never, method="smc", num_samples=6, progress=False)
    assert found.log_evidence == -math.inf and found.ess == 0.0


def test_models_that_break_on_unfinished_text_are_passed_over() -> None:
    def strict() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=3, min_tokens=2))
        factor("place", -0.1 * ("." + z + ".").index(".", 1))
        assert len(z) >= 2
        sample("y", LMString(LM, f"ab{z}"), obs="ab")

    program = compile(strict)
    exact = infer(program, method="exact", progress=False)
    found = [
        infer(
            program,
            method="smc",
            twist="lookahead",
            every=1,
            num_samples=60,
            seed=s,
            progress=False,
        ).log_evidence
        for s in range(30)
    ]
    ratios = np.exp(np.array(found) - exact.log_evidence)
    assert abs(ratios.mean() - 1.0) <= 3.5 * ratios.std(ddof=1) / math.sqrt(30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resampling": "other"}, "unknown resampling 'other'"),
        ({"twist": "other"}, "unknown twist 'other'"),
        ({"ess_threshold": 1.5}, "between 0 and 1"),
        ({"every": 0}, "at least 1"),
        ({"twist": "flow"}, "one latent string.*learned flows"),
        ({"twist_power": 0.5}, 'twist_power is of twist="lookahead", and the twist is None'),
        ({"twist": "lookahead", "twist_power": 1.5}, "between 0 and 1, got 1.5"),
        ({"twist": "lookahead", "twist_power": math.nan}, "between 0 and 1, got nan"),
        ({"twist": lambda site, text: math.nan}, "site 'first': the twist of"),
    ],
)
def test_bad_options_are_told(truth: ModuleType, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infer(truth.branch, method="smc", num_samples=4, progress=False, **{"every": 1, **options})
    with pytest.raises(TypeError, match="a twist is"):
        infer(truth.branch, method="smc", twist=3, num_samples=4, progress=False)  # type: ignore[arg-type]


def after_a_tool(tool: bool, steered: bool) -> Callable[[], None]:
    def model() -> None:
        prompt = call("tool", str.lower, "AB") if tool else "ab"
        z = sample("z", LMString(LM, prompt, stop=".", max_tokens=8))
        if steered:
            potential("few", lambda text: -2.0 * text.count("b"), z)
        else:
            sample("seen", LMString(LM, f"{prompt}{z}"), obs="bba")

    return model


@pytest.mark.parametrize("steered", [False, True])
def test_a_tool_before_a_string_does_not_blind_what_looks_ahead(steered: bool) -> None:
    options: dict[str, Any] = {"every": 1, "ess_threshold": 1.0, "num_samples": 16}
    if not steered:
        options |= {"twist": "lookahead", "twist_power": 1.0}
    found = [
        infer(after_a_tool(tool, steered), method="smc", seed=1, progress=False, **options)
        for tool in (False, True)
    ]
    assert found[0].resampled == found[1].resampled > 1
    assert [str(s["z"]) for s in found[0].samples] == [str(s["z"]) for s in found[1].samples]
    np.testing.assert_allclose(found[0].log_weights, found[1].log_weights, atol=1e-5)


@pytest.mark.parametrize("every", [3, 100])
def test_a_context_that_leaves_no_room_is_the_same_error(every: int) -> None:
    lm = tiny_lm("ab.", seed=1)
    lm.window = 12
    guide = GFlowNetGuide(lm, rank=2, context=lambda info: "abababab")

    def model() -> None:
        z = sample("z", LMString(lm, "a", stop="..."))
        sample("seen", LMString(lm, f"{z}", max_tokens=1), obs="a")

    for options in ({}, {"method": "smc", "every": every, "ess_threshold": 0.0}):
        with pytest.raises(ValueError, match=r"'z': the string did not end within the 4 tokens"):
            infer(model, guide=guide, num_samples=200, progress=False, **options)  # type: ignore[arg-type]
