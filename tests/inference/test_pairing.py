"""Independent parts of a program: weighted and resampled each on its own, then paired."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import langppl as lp
from langppl.inference import pairing
from langppl.testing import tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore::langppl.JoinWarning")

LM = tiny_lm("ab.", sharpness=0.3)
ENDINGS = ("ab", "bb", "aab", "ba")


def string(prompt: str, **rules: Any) -> lp.LMString:
    return lp.LMString(LM, prompt, **{"max_tokens": 3, **rules})


def story(endings: tuple[str, ...] = ENDINGS) -> list[str]:
    """Nothing connects one pair of sites with another."""
    middles = []
    for k, ending in enumerate(endings):
        middles.append(lp.sample(f"z{k}", string("ab"[k % 2])))
        lp.sample(f"y{k}", string(f"{middles[-1]}"), obs=ending)
    return middles


def alone(k: int) -> Callable[[], None]:
    def model() -> None:
        z = lp.sample("z", string("ab"[k % 2]))
        lp.sample("y", string(f"{z}"), obs=ENDINGS[k])

    return model


def exact_parts() -> list[lp.Posterior]:
    return [lp.infer(alone(k), method="exact", progress=False) for k in range(len(ENDINGS))]


def infer(model: Any, *args: Any, **options: Any) -> lp.Posterior:
    return lp.infer(model, *args, progress=False, **options)


GUIDES: dict[str, Callable[[], Any]] = {
    "prior": lambda: "prior",
    "prompted": lambda: "prompted",
    "mixture": lambda: lp.MixtureGuide(["prior", "prompted"]),
}


@pytest.mark.parametrize("guide", GUIDES)
def test_the_evidence_is_unbiased(guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = sum(p.log_evidence for p in exact_parts())
    runs, n = 60, 16
    program, made = lp.compile(story), GUIDES[guide]()
    found = [infer(program, guide=made, num_samples=n, seed=s) for s in range(runs)]
    assert all(len(p.parts) == 4 for p in found)
    ratios = np.exp([p.log_evidence - exact for p in found])
    error = ratios.std(ddof=1) / math.sqrt(runs)
    assert error < 0.2
    assert abs(ratios.mean() - 1.0) < 3.5 * error
    # The same draws with all their weights multiplied first: the estimate varies more.
    monkeypatch.setattr("langppl.inference.importance.part_of_sites", lambda program: None)
    joint = [infer(program, guide=made, num_samples=n, seed=s) for s in range(runs)]
    assert ratios.std() < 0.8 * np.exp([p.log_evidence - exact for p in joint]).std()


def test_each_part_follows_its_own_posterior() -> None:
    n = 2000
    posterior = infer(story, num_samples=n, seed=1)
    for k, exact in enumerate(exact_parts()):
        law, found = exact.probabilities("z"), posterior.probabilities(f"z{k}")
        ess = posterior.parts[k].ess
        distance = 0.5 * sum(abs(found.get(z, 0.0) - p) for z, p in law.items())
        # The mean of half a sum of |errors|, each of which is below sqrt(p / ess).
        bound = 0.5 * sum(math.sqrt(p / ess) for p in law.values())
        assert distance < 1.5 * bound < 0.25
        part = posterior.parts[k]
        assert part.sites == (f"z{k}",)
        assert abs(part.log_evidence - exact.log_evidence) < 4 * part.log_evidence_error
    assert abs(posterior.log_evidence - sum(p.log_evidence for p in exact_parts())) < (
        4 * posterior.log_evidence_error
    )


def test_the_errors_of_independent_parts_add_in_squares() -> None:
    posterior = infer(story, num_samples=30)
    errors = [part.log_evidence_error for part in posterior.parts]
    assert len(errors) == 4 and min(errors) > 0.0
    assert posterior.log_evidence_error == pytest.approx(math.hypot(*errors))


def test_parts_are_paired_independently() -> None:
    posterior = infer(story, num_samples=2000, seed=2)
    likeliest = {z: posterior.mode(z) for z in ("z0", "z1")}
    one, two = (np.array([s[z] == text for s in posterior]) for z, text in likeliest.items())
    # Of independent events the correlation of n pairs has a standard error of 1/sqrt(n).
    assert abs(np.corrcoef(one, two)[0, 1]) < 4 / math.sqrt(2000)


def test_what_belongs_to_a_sample_is_put_together_anew() -> None:
    program = lp.compile(story)
    posterior = infer(program, num_samples=40, seed=3)
    assert posterior.returns == [[s[f"z{k}"] for k in range(4)] for s in posterior.samples]
    joints = program.log_joint(posterior.samples).numpy()
    assert posterior.log_joint == pytest.approx(joints, abs=1e-4)
    log_q = posterior.guide_object.log_q(program, posterior.samples)
    assert posterior.log_q == pytest.approx(log_q, abs=1e-4)
    assert np.ptp(posterior.log_weights) == 0.0
    assert posterior.elbo == pytest.approx(sum(float(np.mean(p.elbo)) for p in posterior.parts))
    assert posterior.ess == min(p.ess for p in posterior.parts)


def test_equal_seeds_give_equal_results() -> None:
    one, two, other = (infer(story, num_samples=30, seed=s) for s in (5, 5, 6))
    assert (one.samples, one.log_evidence) == (two.samples, two.log_evidence)
    assert one.samples != other.samples


def test_an_impossible_draw_of_one_part_leaves_the_others() -> None:
    def model() -> None:
        z = lp.sample("z", string("a", truncate="reject", max_tokens=2))
        lp.sample("y", string(f"{z}"), obs="ab")
        w = lp.sample("w", string("b"))
        lp.sample("v", string(f"{w}"), obs="ba")

    def single(which: str) -> float:
        def own() -> None:
            if which == "z":
                z = lp.sample("z", string("a", truncate="reject", max_tokens=2))
                lp.sample("y", string(f"{z}"), obs="ab")
            else:
                w = lp.sample("w", string("b"))
                lp.sample("v", string(f"{w}"), obs="ba")

        return float(infer(own, method="exact").log_evidence)

    posterior = infer(model, num_samples=1500, seed=1)
    first, second = posterior.parts
    assert first.impossible_share > 0.2 and second.impossible_share == 0.0
    assert posterior.impossible_share == pytest.approx(first.impossible_share)
    assert posterior.elbo == -math.inf and math.isfinite(posterior.elbo_possible)
    for part, expected in ((first, single("z")), (second, single("w"))):
        assert abs(part.log_evidence - expected) < 4 * part.log_evidence_error
    rules = lp.compile(model).sites["z"].fn
    assert all(rules.why_impossible(z) is None for z in set(posterior["z"]))


def test_a_factor_without_latents_counts() -> None:
    def model() -> None:
        story(ENDINGS[:2])
        lp.sample("constant", string("a"), obs="ab")
        lp.factor("f", -1.5)

    constant = float(string("a").log_prob("ab")) - 1.5
    expected = infer(story, ENDINGS[:2], num_samples=50, seed=4)
    found = infer(model, num_samples=50, seed=4)
    assert found.log_evidence == pytest.approx(expected.log_evidence + constant, abs=1e-4)
    assert found.samples == expected.samples
    assert found.elbo == pytest.approx(expected.elbo + constant, abs=1e-4)


def test_where_there_is_nothing_to_gain_weights_stay() -> None:
    def idle() -> None:
        z = lp.sample("z", string("a"))
        lp.sample("y", string(f"{z}"), obs="ab")
        lp.sample("idle", string("b"))

    def connected() -> None:
        z = lp.sample("z", string("a"))
        w = lp.sample("w", string("b"))
        lp.sample("y", string(f"{z}{w}"), obs="ab")
        lp.sample("x", string(f"{z}"), obs="b")

    def dynamic() -> None:
        z = lp.sample("z", string("a"))
        lp.sample("y", string(f"{z}"), obs="ab")
        w = lp.sample("w", string("b"))
        lp.factor("f", float("a" in w))

    for model in (idle, connected, dynamic):
        posterior = infer(model, num_samples=30)
        assert posterior.parts == ()
        assert np.ptp(posterior.log_weights) > 0.1
    assert pairing.part_of_sites(lp.compile(story)) == {
        **{f"z{k}": k for k in range(4)},
        **{f"y{k}": k for k in range(4)},
    }


def test_all_draws_of_a_part_impossible() -> None:
    def model() -> None:
        story(ENDINGS[:2])
        z = lp.sample("z", string("a"))
        lp.sample("never", string(f"{z}", min_tokens=2, max_tokens=2), obs="a")

    with pytest.warns(lp.InferenceWarning, match="never"):
        assert infer(model, num_samples=20).log_evidence == -math.inf


def test_files_keep_the_parts(tmp_path: Any) -> None:
    posterior = infer(story, num_samples=30, seed=7)
    posterior.save(tmp_path / "p.json")
    loaded = lp.Posterior.load(tmp_path / "p.json")
    assert str(loaded.parts) == str(posterior.parts)
    assert (loaded.ess, loaded.elbo) == (posterior.ess, posterior.elbo)
    assert "4 independent parts" in str(loaded) and str(loaded) == str(posterior)


def test_a_dependence_that_no_placeholder_notices() -> None:
    """`re` looks into a string without a trace, and no made-up value shows what it finds."""

    def model(looks: bool = False) -> None:
        a = lp.sample("a", string("a", max_tokens=2))
        b = lp.sample("b", string("b", max_tokens=2))
        if looks:
            lp.factor("looked", 0.0 * len(a))
        lp.sample("ya", string(f"{a}", max_tokens=2), obs="ab")
        p = "a" if re.fullmatch(r"\.a+", a) else "b"
        lp.sample("yb", string(f"{p}{b}", max_tokens=2), obs="b")

    exact = infer(model, True, method="exact")
    program = lp.compile(model)
    assert program.is_static and len(program.graph.independent()) == 2
    with pytest.warns(lp.StaticMismatchWarning, match="'yb'"):
        found = infer(program, num_samples=1500, seed=1)
    assert not found.parts and not program.is_static
    assert abs(found.log_evidence - exact.log_evidence) < 4 * found.log_evidence_error
    law = exact.probabilities("a")
    for text, p in found.probabilities("a").items():
        assert abs(p - law[text]) < 4 * math.sqrt(law[text] / found.ess) + 1e-3


def test_tables_and_plots_know_that_the_samples_are_equally_weighted() -> None:
    found = lp.compare(story, guides=["prior"], methods=["importance"], progress=False)
    assert found.rows()[0]["sd"] is None
    (posterior,) = found.posteriors.values()
    assert posterior.parts
    with pytest.raises(ValueError, match="are equally weighted"):
        lp.plots.plot_log_weights({"prior": posterior})


def test_an_untrained_guide_in_a_mixture() -> None:
    guide = lp.MixtureGuide(["prior", lp.GFlowNetGuide(LM, rank=2)])
    assert "the guide is untrained" in str(infer(story, guide=guide, num_samples=8))
