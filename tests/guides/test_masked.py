"""`MaskedGuide`, and the other guides on strings with a grammar, against lists of all they draw."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

import langppl as lp
from langppl.diagnostics import InferenceWarning
from langppl.testing import check_guide, tiny_lm

LM = tiny_lm("ab.", seed=3, merged=["ab", "b."])
FORM = lp.regex(r"a(b|ab)*\.?")


def conditioned(form: lp.Grammar = FORM, **options: Any) -> Any:
    rules: dict[str, Any] = {"max_tokens": 3, **options}

    def model(ending: str = "b") -> None:
        z = lp.sample("z", lp.LMString(LM, "a", **rules))
        lp.factor("form", lp.log_matches(z, form))
        lp.sample("ending", lp.LMString(LM, f"a{z}"), obs=ending)

    return model


def masked(ending: str = "b") -> None:
    z = lp.sample("z", lp.LMString(LM, "a", max_tokens=3, grammar=FORM))
    lp.sample("ending", lp.LMString(LM, f"a{z}"), obs=ending)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"truncate": "reject"},
        {"stop": "."},
        # Of a fixed length: all strings are cut, and some belong.
        {"min_tokens": 3, "form": lp.regex("a(b|ab)*")},
        {"temperature": 1.7, "min_tokens": 0},
        {"grammar": FORM},
    ],
    ids=str,
)
def test_masked_guide_knows_its_probabilities(options: dict[str, Any]) -> None:
    form = options.get("form", FORM)
    check_guide(lp.MaskedGuide({"z": form}), conditioned(**options), samples=300)


def test_a_masked_draw_that_comes_to_a_dead_end_weighs_nothing() -> None:
    # After "a." a string of three tokens cannot go on, and may not end.
    model = conditioned(min_tokens=3)
    exact = lp.infer(model, method="exact")
    drawn = lp.infer(model, guide=lp.MaskedGuide({"z": FORM}), num_samples=1000, progress=False)
    weights = np.exp(np.asarray(drawn.log_weights))
    assert (weights == 0.0).mean() > 0.3
    error = weights.std(ddof=1) / math.sqrt(len(weights))
    assert abs(weights.mean() - math.exp(exact.log_evidence)) < 4 * error


@pytest.mark.parametrize(
    "guide", [lp.PriorGuide(), lp.PromptedGuide(), lp.GFlowNetGuide(LM)], ids=lambda g: g.name
)
def test_all_guides_walk_the_grammar(guide: lp.Guide) -> None:
    check_guide(guide, masked, samples=300)


def test_a_trained_guide_keeps_to_the_grammar() -> None:
    guide = lp.GFlowNetGuide(LM, seed=0)
    guide.fit(masked, data=[("b",)], steps=30, batch=16, progress=False)
    exact = lp.infer(masked, method="exact")
    found = lp.infer(masked, guide=guide, num_samples=400, progress=False)
    assert found.log_evidence == pytest.approx(exact.log_evidence, abs=0.15)
    whole = [s["z"] for s, w in zip(found.samples, found.log_weights, strict=True) if w > -math.inf]
    assert whole and all(re.fullmatch(FORM.source, z) for z in whole)


def test_draws_are_more_often_possible_than_the_priors() -> None:
    model = conditioned()
    guided = lp.infer(model, guide=lp.MaskedGuide({"z": FORM}), num_samples=300, progress=False)
    prior = lp.infer(model, num_samples=300, progress=False)
    assert guided.ess > 1.5 * prior.ess


def test_other_sites_are_drawn_from_the_prior() -> None:
    def model() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        lp.factor("form", lp.log_matches(z, FORM))
        lp.sample("y", lp.LMString(LM, f"a{z}", max_tokens=1))

    check_guide(lp.MaskedGuide({"z": FORM}), model, samples=300)


# -- programs ----------------------------------------------------------------------------------


def test_a_static_program_stays_static_with_a_grammar() -> None:
    program = lp.compile(masked)
    assert program.is_static
    assert ("z", "ending") in program.graph.edges
    fn = program.sites["z"].fn
    assert FORM in [fn.rules.grammar, *fn.fields()]
    assert fn.with_prompt("b").rules.grammar == FORM
    values = [{"z": "ab"}, {"z": "ba"}]
    found = program.log_joint(values)
    assert found[0] == pytest.approx(
        float(fn.log_prob("ab")) + float(lp.LMString(LM, "aab").log_prob("b")), abs=1e-4
    )
    assert found[1] == -math.inf


def test_a_factor_of_a_latents_form_depends_on_it() -> None:
    program = lp.compile(conditioned())
    assert not program.is_static
    assert ("z", "form") in program.graph.edges


def test_a_grammar_may_depend_on_a_latent() -> None:
    def model() -> None:
        x = lp.sample("x", lp.LMChoice(LM, "a", ["a", "b"]))
        lp.sample("z", lp.LMString(LM, "a", max_tokens=3, grammar=lp.regex(f"{x}+")))

    program = lp.compile(model)
    assert not program.is_static
    assert ("x", "z") in program.graph.edges
    exact = lp.infer(program, method="exact")
    assert exact.probabilities("z").keys() == {"a", "aa", "b", "bb"}


def test_a_program_with_a_grammar_is_not_simulated_as_data() -> None:
    with pytest.raises(ValueError, match=r"'z' rejects unfinished strings.*it has a grammar"):
        lp.compile(masked).simulate(1, seed=0)


def test_exact_inference_counts_only_as_far_as_its_limit() -> None:
    def model() -> None:
        lp.sample("z", lp.LMString(LM, "a", max_tokens=60, grammar=lp.regex("[ab]*")))

    with pytest.raises(ValueError, match=r"'z' alone has more than 500 strings, or texts that"):
        lp.infer(model, method="exact", limit=500)


# -- errors ------------------------------------------------------------------------------------


def test_sites_that_cannot_be_masked() -> None:
    def model(value: torch.Tensor) -> None:
        lp.sample("x", lp.LMChoice(LM, "a", ["a", "b"]))
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=3))
        lp.sample("end", lp.LMString(LM, f"a{z}"), obs="b")

    for site, message in [
        ("y", "'y', and no run has met it; latents are: x, z"),
        ("x", "'x', which is no LMString"),
        ("end", "'end', which is observed"),
    ]:
        with pytest.raises(ValueError, match=message):
            lp.infer(model, torch.tensor(0.0), guide=lp.MaskedGuide({site: FORM}))
    with pytest.raises(ValueError, match=r"site 'z': no string of the grammar regex\('c'\)"):
        lp.infer(model, torch.tensor(0.0), guide=lp.MaskedGuide({"z": lp.regex("c")}))
    with pytest.raises(TypeError, match="for site 'z' got 'a'"):
        lp.MaskedGuide({"z": "a"})  # type: ignore[dict-item]


def test_a_site_with_another_grammar() -> None:
    guide = lp.MaskedGuide({"z": lp.regex("a*")})
    with pytest.raises(ValueError, match=r"'z' has the grammar .* of its own, and MaskedGuide"):
        lp.infer(masked, guide=guide)


def test_a_dynamic_program_may_meet_the_site_later() -> None:
    with pytest.warns(InferenceWarning, match="'later', and no run has met it"):
        lp.infer(conditioned(), guide=lp.MaskedGuide({"later": FORM}), num_samples=100)


def test_an_open_string_cannot_be_proposed() -> None:
    def model() -> None:
        lp.sample("z", lp.LMString(LM, "a"))

    with pytest.raises(ValueError, match="an open string cannot be sampled"):
        lp.infer(model, guide=lp.MaskedGuide({"z": FORM}))
