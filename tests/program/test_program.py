"""`Program`: its log joint by hand, and its simulations."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chisquare

import langppl as lp
from langppl.guides import PriorGuide
from langppl.testing import enumerate_strings, tiny_lm

LM = tiny_lm("ab.", seed=1)


def short(prompt: str = "a", tokens: int = 3, **rules: Any) -> lp.LMString:
    return lp.LMString(LM, prompt, max_tokens=tokens, **rules)


def goes_on(prompt: str) -> lp.LMString:
    return lp.LMString(LM, prompt)


# -- log joint -----------------------------------------------------------------------------------


def everything(ending: str) -> str:
    p = lp.sample("p", dist.Beta(2.0, 3.0))
    x = lp.sample("x", short("a", stop="."))
    mood = lp.sample("mood", lp.LMChoice(LM, x, ["a", "b"]))
    y = lp.sample("y", lp.Tempered(short(f"{mood}b"), 0.5))
    size = lp.call("size", len, y)
    lp.factor("bonus", -float(size))
    lp.sample("n", dist.Normal(p, 0.5), obs=torch.tensor(0.3))
    lp.sample("ending", goes_on(x + y), obs=ending)
    return x + y


def test_log_joint_is_the_sum_of_the_sites() -> None:
    values = {"p": torch.tensor(0.25), "x": "ab.", "mood": "b", "y": "ba"}
    by_hand = (
        dist.Beta(2.0, 3.0).log_prob(torch.tensor(0.25))
        + short("a", stop=".").log_prob("ab.")
        + lp.LMChoice(LM, "ab.", ["a", "b"]).log_prob("b")
        + 2 * short("bb").log_prob("ba")
        - 2.0
        + dist.Normal(0.25, 0.5).log_prob(torch.tensor(0.3))
        + goes_on("ab.ba").log_prob("a.")
    )

    found = lp.compile(everything, "a.").log_joint(values)

    assert found.dtype == torch.float64 and found.shape == ()
    assert float(found) == pytest.approx(float(by_hand), abs=1e-4)


def test_log_joint_by_the_forward_pass_alone() -> None:
    """Against a plain log-softmax: no rules object, no scoring door."""

    def model() -> None:
        x = lp.sample("x", lp.LMString(LM, "a", max_tokens=2, min_tokens=2))
        lp.sample("seen", goes_on(x), obs="ba")

    a, b, _, end = (LM.tokenizer.convert_tokens_to_ids(t) for t in ("a", "b", ".", "</s>"))

    def log_softmax(prompt: list[int], legal: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = LM.model(torch.tensor([prompt])).logits[0, -1]
        kept = torch.full_like(logits, -math.inf)
        kept[legal] = logits[legal]
        return kept.log_softmax(0)

    tokens = [3, 4, 5]
    expected = (
        log_softmax([a], tokens)[b]
        + log_softmax([a, b], tokens)[a]
        + log_softmax([b, a], tokens)[b]  # min_tokens is 1: no string is empty
        + log_softmax([b, a, b], [*tokens, end])[a]
    )

    found = lp.compile(model).log_joint({"x": "ba"})
    assert float(found) == pytest.approx(float(expected), abs=1e-4)


def test_several_assignments() -> None:
    program = lp.compile(everything, "a.")
    rows = [{"p": 0.1 * k, "x": x, "mood": "a", "y": "b"} for k, x in enumerate(["a.", "b."], 1)]

    found = program.log_joint(rows)

    assert found.shape == (2,)
    assert found.tolist() == pytest.approx([float(program.log_joint(r)) for r in rows], abs=1e-4)
    assert program.log_joint([]).shape == (0,)


def test_a_value_that_breaks_a_rule_has_no_density() -> None:
    program = lp.compile(everything, "a.")

    # No text goes on after its stop.
    assert float(program.log_joint({"p": 0.5, "x": ".a", "mood": "a", "y": "b"})) == -math.inf
    assert float(program.log_joint({"p": 0.5, "x": "a.", "mood": "c", "y": "b"})) == -math.inf


@pytest.mark.parametrize("static", [True, False])
def test_a_missing_value_is_an_error(static: bool) -> None:
    def model() -> None:
        x = lp.sample("x", short())
        lp.sample("y", short(x))

    program = lp.compile(model)
    assert program.is_static
    program._is_static = static

    with pytest.raises(ValueError, match="latent site 'y' has no value"):
        program.log_joint({"x": "a"})
    with pytest.raises(ValueError, match="latent site 'x' has no value"):
        program.log_joint([{"x": "a", "y": "a"}, {"y": "a"}])


def test_a_value_of_the_wrong_type_is_an_error() -> None:
    def model() -> None:
        lp.sample("x", short())

    program = lp.compile(model)
    for static in (True, False):
        program._is_static = static
        with pytest.raises(TypeError, match=r"site 'x' is a string site, but its value is 3"):
            program.log_joint({"x": 3})


def test_scale_and_mask_weigh_a_site() -> None:
    def model() -> None:
        x = lp.sample("x", short())
        with pyro.poutine.scale(scale=0.5):
            lp.sample("half", goes_on(x), obs="a")
        with pyro.poutine.mask(mask=False):
            lp.sample("none", goes_on(x), obs="b")

    program = lp.compile(model)
    expected = float(short().log_prob("ab") + 0.5 * goes_on("ab").log_prob("a"))

    for static in (True, False):
        program._is_static = static
        assert float(program.log_joint({"x": "ab"})) == pytest.approx(expected, abs=1e-4)


def test_a_scaled_latent_is_weighted_by_what_its_proposal_leaves() -> None:
    def model() -> None:
        with pyro.poutine.scale(scale=3.0):
            lp.sample("x", short())

    posterior = lp.infer(model, num_samples=6)

    expected = [2 * float(short().log_prob(s["x"])) for s in posterior.samples]
    np.testing.assert_allclose(posterior.log_weights, expected, atol=1e-4)


# -- models without latents ----------------------------------------------------------------------


def test_a_model_without_latents() -> None:
    def model() -> str:
        lp.sample("seen", goes_on("a"), obs="ab")
        return "done"

    program = lp.compile(model)
    expected = float(goes_on("a").log_prob("ab"))

    assert program.latents == () and program.observed == ("seen",)
    assert program.is_static
    assert float(program.log_joint({})) == pytest.approx(expected, abs=1e-4)
    for method in ("importance", "exact"):
        posterior = lp.infer(model, method=method, num_samples=3)
        assert posterior.log_evidence == pytest.approx(expected, abs=1e-4)
        assert posterior.sites == ()
    assert lp.infer(model, guide="prompted", num_samples=3).returns == ["done"] * 3


def test_a_model_is_a_function() -> None:
    with pytest.raises(TypeError, match="a model is a function, got 'story'"):
        lp.compile("story")  # type: ignore[arg-type]


# -- simulate ------------------------------------------------------------------------------------


def simulated(n: int, length: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    def model() -> None:
        x = lp.sample("x", short("a", 2))
        n = lp.sample("n", dist.Normal(0.0, 1.0), obs=torch.tensor(100.0))
        lp.sample("closed", short(x + "b", 2), obs="ab")
        lp.sample("ending", goes_on(f"{x}a" if float(n) != 100.0 else "b"), obs="a")

    return lp.compile(model).simulate(n, seed=seed, lengths={"ending": length})


def test_simulate_draws_latents_and_data() -> None:
    draws = simulated(20, length=2)

    assert [list(d) for d in draws] == [["x", "n", "closed", "ending"]] * 20
    assert all(abs(float(d["n"])) < 10 for d in draws)
    assert all(len(d["ending"].ids) == 2 for d in draws)
    assert len({str(d["closed"]) for d in draws}) > 1
    assert len({float(d["n"]) for d in draws}) == 20


def test_simulated_values_are_what_the_program_goes_on_with() -> None:
    read: list[str] = []

    def model() -> None:
        x = lp.sample("x", lp.LMChoice(LM, "a", ["a", "b"]), obs="a")
        read.append(str(x))
        lp.sample("y", short(x, 2))

    program = lp.compile(model)
    read.clear()
    draws = program.simulate(20)

    assert read == [d["x"] for d in draws]
    assert set(read) == {"a", "b"}


def test_equal_seeds_give_equal_simulations() -> None:
    def shown(draws: list[dict[str, Any]]) -> list[dict[str, str]]:
        return [{k: str(v) for k, v in d.items()} for d in draws]

    assert shown(simulated(4, seed=1)) == shown(simulated(9, seed=1))[:4]
    assert shown(simulated(9, seed=1)) != shown(simulated(9, seed=2))


def agree(counts: Counter[Any], law: dict[Any, float]) -> bool:
    """Whether counts are draws from a law, by χ² at 0.001; rare cells go together."""
    n, total = sum(counts.values()), math.fsum(law.values())
    often = [k for k, p in law.items() if n * p / total >= 5]
    cells = [(counts[k], n * law[k] / total) for k in often]
    rest = n - sum(c for c, _ in cells), n - math.fsum(e for _, e in cells)
    if len(often) < len(law):
        cells.append(rest)
    return bool(chisquare(*zip(*cells, strict=True)).pvalue > 1e-3)


def test_simulated_open_strings_follow_the_open_law() -> None:
    """p(x, two tokens that go on), normalised over all that do not end early."""

    def model() -> None:
        x = lp.sample("x", lp.LMChoice(LM, "a", ["a", "b"]))
        lp.sample("ending", goes_on(x), obs="a")

    n = 3000
    draws = lp.compile(model).simulate(n, seed=5, lengths={"ending": 2})
    counts = Counter((str(d["x"]), str(d["ending"])) for d in draws)

    choice = lp.LMChoice(LM, "a", ["a", "b"])
    two = [p + q for p in "ab." for q in "ab."]
    law = {
        (x, text): math.exp(float(choice.log_prob(x) + goes_on(x).log_prob(text)))
        for x in ("a", "b")
        for text in two
    }
    total = sum(law.values())
    assert 0.05 < total < 0.98, "some texts end early, so the condition matters"
    assert set(counts) <= set(law)
    assert agree(counts, law)


def test_simulated_closed_strings_follow_their_own_law() -> None:
    def model() -> None:
        lp.sample("x", short("a", 2), obs="a")

    n = 3000
    counts = Counter(d["x"].ids for d in lp.compile(model).simulate(n, seed=1))
    law = {
        text.ids: math.exp(float(short("a", 2).log_prob(text)))
        for text, _ in enumerate_strings(short("a", 2))
    }
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-5)
    assert agree(counts, law)


def test_an_open_string_is_as_long_as_what_is_observed() -> None:
    def model() -> None:
        x = lp.sample("x", short())
        lp.sample("ending", goes_on(x), obs="ab")

    program = lp.compile(model)
    draws = program.simulate(20)
    assert {len(d["ending"].ids) for d in draws} == {2}
    assert draws == program.simulate(20, lengths={"ending": 2})
    # So its draws are what a guide may be asked about.
    assert np.isfinite(PriorGuide().log_q(program, draws)).all()


def test_an_open_string_that_no_run_has_met_needs_a_length() -> None:
    def model() -> None:
        x = lp.sample("x", short())
        lp.sample(f"ending {x}", goes_on(x), obs="a")

    with pytest.raises(
        ValueError, match=r"'ending .*' is an open string.*lengths=\{'ending .*: 10"
    ):
        lp.compile(model).simulate(30)


def test_a_length_of_what_is_no_open_string() -> None:
    def plain() -> None:
        x = lp.sample("x", short())
        lp.sample("ending", goes_on(x), obs="a")

    program = lp.compile(plain)
    for name in ("endng", "x"):
        said = f"lengths name '{name}', which is no open string; these are: 'ending'"
        with pytest.raises(ValueError, match=said):
            program.simulate(1, lengths={"ending": 2, name: 3})

    def latent() -> None:
        lp.sample("x", goes_on("a"))

    assert len(lp.compile(latent).simulate(1, lengths={"x": 2})[0]["x"].ids) == 2

    def looks_inside() -> None:
        x = lp.sample("x", short())
        if x.startswith("a"):
            lp.sample("more", short())
        lp.sample("ending", goes_on(x), obs="a")

    # Where the sites depend on the latents, another run may meet it.
    program = lp.compile(looks_inside)
    with pytest.warns(UserWarning, match="lengths name 'endng', .* as far as runs") as said_once:
        program.simulate(1, lengths={"endng": 2})
    assert said_once[0].filename == __file__
    with pytest.raises(ValueError, match="lengths name 'more', which is no open string"):
        program.simulate(1, lengths={"more": 2})


def test_a_length_that_the_lm_does_not_reach() -> None:
    def model() -> None:
        lp.sample("ending", goes_on("a"), obs="a")

    with pytest.raises(ValueError, match=r"before its length \{'ending': 200\}; ask for shorter"):
        lp.compile(model).simulate(1, lengths={"ending": 200})


def with_factor() -> None:
    lp.sample("x", short())
    lp.factor("bonus", -1.0)


def with_tempered() -> None:
    lp.sample("x", lp.Tempered(short(), 0.5))


def with_reject() -> None:
    lp.sample("x", short(stop=".", truncate="reject"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (with_factor, "site 'bonus' is a factor, so the program is not a process that generates"),
        (with_tempered, "site 'x/tempered' is a factor, so the program is not a process"),
        (with_reject, r"site 'x' rejects unfinished strings.*use truncate=\"keep\""),
    ],
)
def test_what_is_no_process_cannot_be_simulated(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.compile(model).simulate(1)


@pytest.mark.parametrize("n", [0, -1])
def test_simulate_needs_a_draw(n: int) -> None:
    with pytest.raises(ValueError, match=f"n must be at least 1, got {n}"):
        lp.compile(with_factor).simulate(n)
