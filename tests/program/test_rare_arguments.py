"""What models do with strings and numbers that few models do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions.transforms import AffineTransform

import langppl as lp
from langppl.inference.particles import Crowd
from langppl.inference.twists import make_twist, weigh_at_rest
from langppl.program.execution import Choice, score
from langppl.testing import tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore::langppl.JoinWarning")

LM = tiny_lm("ab.", merged=["ab", "b.", "..", ".a"])
WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "importance": {"num_samples": 400},
    "smc": {"num_samples": 400},
}


def string(prompt: str, **rules: Any) -> lp.LMString:
    return lp.LMString(LM, prompt, **rules)


# -- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hidden", ["a", ""])
def test_an_impossible_string_that_is_masked_counts_nothing(way: str, hidden: str) -> None:
    """The usual way with missing data: a mask, and some value in its place."""

    def model(x: str) -> None:
        z = lp.sample("z", string("a", max_tokens=1))
        with pyro.poutine.mask(mask=False):
            lp.sample("x", string(f"a{z}", max_tokens=3), obs=x)
        lp.sample("y", string(f"a{z}"), obs="ab")

    def without() -> None:
        z = lp.sample("z", string("a", max_tokens=1))
        lp.sample("y", string(f"a{z}"), obs="ab")

    expected = lp.infer(without, method="exact", progress=False).log_evidence
    found = lp.infer(model, hidden, method=way, progress=False, **WAYS[way])
    # 400 draws; the weights' relative spread is below 1, so its error is below 0.05.
    assert found.log_evidence == pytest.approx(expected, abs=1e-9 if way == "exact" else 0.15)
    joint = [
        float(lp.compile(f, *a).log_joint({"z": "b"})) for f, *a in ((model, hidden), (without,))
    ]
    assert joint[0] == pytest.approx(joint[1], abs=1e-5)


def test_a_cut_string_that_is_masked_keeps_the_other_sites() -> None:
    def model() -> None:
        with pyro.poutine.mask(mask=False):
            z = lp.sample("z", string("a", max_tokens=2, truncate="reject"))
        lp.sample("y", string(f"b{z}"), obs="ab")

    program = lp.compile(model)
    alone = string("bbb")
    assert program.sites["z"].fn.why_impossible("bb") is not None
    expected = float(alone.log_prob("ab"))
    assert float(program.log_joint({"z": "bb"})) == pytest.approx(expected, abs=1e-5)


EVEN = tiny_lm("a.", seed=2, sharpness=0.2)


def cut_under(handler: Callable[[], Any]) -> Callable[[], None]:
    def model() -> None:
        k = lp.sample("k", dist.Bernoulli(torch.tensor(0.5)))
        with handler():
            # Cut, those of k = 0 are whole while others still grow.
            rules: dict[str, Any] = {"stop": ".", "truncate": "reject"}
            lp.sample("z", lp.LMString(EVEN, "a", max_tokens=2 + int(k), **rules))

    return model


MASKED = cut_under(lambda: pyro.poutine.mask(mask=False))
SHORT, LONG = ["a", "a.", "aa"], ["a", "a.", "aa", "aa.", "aaa"]


def share_of_the_cut(found: lp.Posterior) -> float:
    weights = zip(found.samples, found.weights, strict=True)
    return sum(float(w) for s, w in weights if float(s["k"]) == 0.0 and s["z"] == "aa")


def test_exact_inference_lists_cut_strings_that_are_masked() -> None:
    found = lp.infer(MASKED, method="exact", progress=False)
    assert sorted((float(s["k"]), str(s["z"])) for s in found.samples) == sorted(
        [(0.0, z) for z in SHORT] + [(1.0, z) for z in LONG]
    )
    assert share_of_the_cut(found) == pytest.approx(1 / 8, abs=1e-9)
    assert found.log_evidence == pytest.approx(math.log(4.0), abs=1e-6)
    scaled = cut_under(lambda: pyro.poutine.scale(scale=0.5))
    listed = [str(s["z"]) for s in lp.infer(scaled, method="exact", progress=False).samples]
    assert sorted(listed) == sorted(SHORT[:-1] + LONG[:-1])


@pytest.mark.parametrize("guide", ["prior", "prompted"])
@pytest.mark.parametrize("twist", [None, "lookahead"])
def test_a_masked_string_that_is_cut_lives_on_among_particles(guide: str, twist: Any) -> None:
    # Potentials and lookahead stop the particles at each token.
    def model() -> None:
        MASKED()
        lp.potential("p", lambda text: 0.0, "")

    found = lp.infer(
        model if twist is None else MASKED,
        method="smc",
        guide=guide,
        twist=twist,
        every=1,
        ess_threshold=1.0,
        num_samples=300,
        progress=False,
    )
    # The proposal is within a factor of 3 of an even one: the error of 300 is below 0.035.
    assert share_of_the_cut(found) == pytest.approx(1 / 8, abs=0.1)
    assert found.log_evidence == pytest.approx(math.log(4.0), abs=0.3)


def test_what_grows_counts_as_the_whole_does() -> None:
    program = lp.compile(MASKED)
    crowd = Crowd(program, lp.PriorGuide(), 20, 0)
    crowd.begin()
    crowd.decide(0)
    crowd.finish()
    crowd.decide(1)
    crowd.grow(1, 0, None)
    make_twist(lambda name, text: 0.0, program, crowd.guide).weigh(crowd)
    growing = [p.ratio for p in crowd.particles]
    crowd.finish()
    weigh_at_rest(crowd)
    assert growing == pytest.approx([p.ratio for p in crowd.particles], abs=1e-5)
    assert any(len(p.known["z"].value) == 2 + p.known["k"].value for p in crowd.particles)  # cut


# -- distributions by their content -------------------------------------------------------------

MADE: dict[str, Callable[[float], Any]] = {
    "normal": lambda k: dist.Normal(k, 1.0),
    "transformed": lambda k: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [AffineTransform(k, 1.0)]
    ),
    "mixture": lambda k: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([k, k]), 1.0)
    ),
    "masked mixture": lambda k: dist.MaskedMixture(
        torch.tensor(True), dist.Normal(0.0, 1.0), dist.Normal(k, 1.0)
    ),
    "empirical": lambda k: dist.Empirical(
        torch.tensor([5.0, 0.0]), torch.tensor([k, 1.0]).log_softmax(0)
    ),
    "user's": lambda k: Shifted(k),
}


class Shifted(dist.TorchDistribution):
    """A user's own, that says nothing of its parameters."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - as torch has it
    support = dist.constraints.real

    def __init__(self, by: float) -> None:
        self.by = by
        super().__init__(validate_args=False)

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        return torch.tensor(self.by) + torch.randn(sample_shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return dist.Normal(self.by, 1.0).log_prob(value)


@pytest.mark.parametrize("kind", MADE)
def test_what_any_distribution_is_made_of_is_seen(kind: str) -> None:
    def model() -> None:
        z = lp.sample("z", string("a", max_tokens=2))
        k = 5.0 if re.search("b", z) else 0.0  # which leaves no mark
        lp.sample("n", MADE[kind](k), obs=torch.tensor(5.0))

    program = lp.compile(model)
    assert not program.is_static
    assert list(program.graph.edges) == [("z", "n")]
    given = [{"z": "a"}, {"z": "b"}]
    found = program.log_joint(given)
    for row, total in zip(given, found, strict=True):
        own = MADE[kind](5.0 if "b" in row["z"] else 0.0).log_prob(torch.tensor(5.0))
        expected = string("a", max_tokens=2).log_prob(row["z"]) + own
        assert float(total) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("kind", MADE)
def test_equal_distributions_are_equal(kind: str) -> None:
    def model() -> None:
        z = lp.sample("z", string("a", max_tokens=2))
        lp.sample("n", MADE[kind](1.0), obs=torch.tensor(5.0))
        lp.sample("y", string(f"b{z}"), obs="a")

    program = lp.compile(model)
    assert program.is_static
    assert list(program.graph.edges) == [("z", "y")]


# -- templates ----------------------------------------------------------------------------------


def test_a_text_that_is_put_together_from_a_latent_is_tokenised_anew() -> None:
    a, b = (LM.vocabulary.exact[c] for c in (b"a", b"b"))
    letters = lp.Text("ab", (a, b), LM.fingerprint)

    def joint(model: Callable[[], Any]) -> tuple[float, float]:
        program = lp.compile(model)
        assert program.is_static
        (ran,) = program.run([lambda name, fn, execution: Choice(letters)])
        return score(ran).log_joint, float(program.log_joint({"z": letters}))

    def whole() -> None:
        z = lp.sample("z", string("a", max_tokens=4))
        lp.sample("y", string("b"), obs=z)

    def plain() -> None:
        z = lp.sample("z", string("a", max_tokens=4))
        lp.sample("y", string("b"), obs=f"{z}")

    ran, filled = joint(whole)
    again, anew = joint(plain)
    assert ran == pytest.approx(filled, abs=1e-5)
    assert again == pytest.approx(anew, abs=1e-5)
    assert abs(ran - again) > 0.1


def test_a_prompt_that_keeps_its_last_characters_is_no_template() -> None:
    def model() -> None:
        z = lp.sample("z", string("a", max_tokens=60))
        lp.sample("y", string(f"a {z}"[-45:]), obs="ab")

    program = lp.compile(model)
    assert not program.is_static
    long = "ab" * 25
    expected = string("a", max_tokens=60).log_prob(long) + string(f"a {long}"[-45:]).log_prob("ab")
    found = program.log_joint([{"z": "a"}, {"z": long}])
    assert float(found[1]) == pytest.approx(float(expected), abs=1e-4)


def test_a_predicate_may_be_written_inside_of_a_model() -> None:
    def model(banned: str) -> None:
        letters = set("ab") - {banned}
        lp.sample("z", string("a", max_tokens=1, allow=lambda t: set(t) <= letters))

    bound = len(LM._rules)
    posterior = lp.infer(model, "b", num_samples=50, progress=False)
    assert {sample["z"] for sample in posterior} == {"a"}
    assert len(LM._rules) <= bound + 2  # one for all executions, and its greedy one
    assert {s["z"] for s in lp.infer(model, "a", num_samples=50, progress=False)} <= {"b"}


def test_a_row_with_a_value_missing_has_a_structure_of_its_own() -> None:
    def model(x: str | None) -> None:
        z = lp.sample("z", string("a", max_tokens=2))
        if "b" in z:
            lp.factor("f", -1.0)
        lp.sample("w", string(f"a{z}", max_tokens=2), obs=x)

    missing = lp.compile(model, None)
    assert (missing.latents, missing.observed) == (("z", "w"), ())
    for there in (lp.compile(model, "ab", like=missing), lp.compile(model, "ab")):
        assert (there.latents, there.observed) == (("z",), ("w",))
        assert there.graph.nodes["w"]["kind"] == there.sites["w"].kind == "observed"


# -- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_number_outside_of_the_support_is_impossible(way: str) -> None:
    def model() -> None:
        z = lp.sample("z", string("a", max_tokens=3, min_tokens=0))
        lp.sample("n", dist.Binomial(torch.tensor(float(len(z))), 0.5), obs=torch.tensor(3.0))

    exact = 0.0
    strings = string("a", max_tokens=3, min_tokens=0)
    for sample in lp.infer(model, method="exact", progress=False).samples:
        length = len(sample["z"])
        if length >= 3:
            exact += (
                math.exp(float(strings.log_prob(sample["z"]))) * math.comb(length, 3) / 2**length
            )
    found = lp.infer(model, method=way, progress=False, **WAYS[way])
    # The weights' relative spread is about 1.5, so that of a mean of 400 is 0.075.
    tolerance = 1e-5 if way == "exact" else 0.25
    assert found.log_evidence == pytest.approx(math.log(exact), abs=tolerance)


def test_a_number_that_no_execution_allows_is_named() -> None:
    def model() -> None:
        lp.sample("z", string("a", max_tokens=2))
        lp.sample("n", dist.Uniform(0.0, 1.0), obs=torch.tensor(3.5))

    with pytest.warns(lp.InferenceWarning, match="'n'"):
        assert lp.infer(model, progress=False).log_evidence == -math.inf


def test_a_number_that_is_none_names_its_site() -> None:
    def model() -> None:
        lp.sample("z", string("a", max_tokens=2))
        lp.sample("n", dist.Uniform(0.0, 1.0), obs=torch.tensor(math.nan))

    with pytest.raises(ValueError, match="'n'"):
        lp.infer(model, progress=False)


def test_a_value_of_what_is_no_latent() -> None:
    def model() -> None:
        z = lp.sample("z", string("a", max_tokens=2))
        lp.sample("y", string(f"{z}"), obs="a")

    program = lp.compile(model)
    with pytest.raises(ValueError, match=r"site 'y' is observed; .*program\.observing\(\{'y'"):
        program.log_joint({"z": "a", "y": "b"})
    with pytest.raises(ValueError, match=r"'typo' is no latent site of the program; .* z"):
        program.log_joint([{"z": "a"}, {"z": "a", "typo": "b"}])


def test_draws_and_samples_are_rows_for_log_joint() -> None:
    def model(computes: bool) -> str:
        z = lp.sample("z", string("a", max_tokens=2))
        if computes:
            lp.deterministic("letters", len(z))
        lp.sample("y", string(f"{z}"), obs="a")
        return f"{z}!"

    for computes in (False, True):
        program = lp.compile(model, computes)
        draws = lp.PriorGuide().sample(program, n=5)
        expected = program.log_joint([{"z": draw["z"]} for draw in draws])
        assert torch.equal(program.log_joint(draws), expected)
        posterior = lp.infer(program, num_samples=5, progress=False)
        assert program.log_joint(list(posterior)).shape == (5,)


def test_two_low_temperatures() -> None:
    text, log_q = string("a", max_tokens=3, temperature=1e-25).draw((1,), temperature=1e-25)
    assert (str(text), log_q) == (
        str(string("a", max_tokens=3, temperature=1e-25).draw((2,))[0]),
        0.0,
    )


def test_a_hidden_string_has_no_tempered_factor() -> None:
    def model() -> None:
        with pyro.poutine.block(hide=["hidden"]):
            lp.sample("hidden", lp.Tempered(string("a", max_tokens=2), 0.5), obs="a")
        lp.sample("z", lp.Tempered(string("a", max_tokens=2), 0.5))

    assert list(lp.compile(model).sites) == ["z", "z/tempered"]


# -- distributions that change while they are used ------------------------------------------------


class Layered(dist.TorchDistribution):
    """A user's own with a layer that is made anew each time, and with what it finds out late."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - as torch has it
    support = dist.constraints.real

    def __init__(self, loc: float) -> None:
        self.loc, self.act, self.norm = loc, torch.nn.Softplus(), None
        super().__init__(validate_args=False)

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        return torch.tensor(self.loc) + torch.randn(sample_shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        self.norm = self.act(torch.tensor(self.loc))
        return dist.Normal(self.loc, self.norm).log_prob(value)


FLOWS: dict[str, Any] = {
    "spline": lambda: dist.transforms.conditional_spline(1, 1, [4]),
    "planar": lambda: dist.transforms.conditional_planar(1, 1, [4]),
}


@pytest.mark.parametrize("observed", [None, torch.tensor(0.3)])
def test_a_distribution_that_notes_what_it_found_out(observed: Any) -> None:
    def model() -> None:
        n = lp.sample("n", Layered(1.0), obs=observed)
        lp.sample("z", string("a" if float(n) > 0 else "b", max_tokens=2))

    assert "z" in lp.compile(model).latents


@pytest.mark.parametrize("kind", FLOWS)
def test_flows_of_pyro_remember_their_last_use(kind: str) -> None:
    torch.manual_seed(0)
    flow = FLOWS[kind]()

    def model() -> None:
        base = dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1)
        made = dist.ConditionalTransformedDistribution(base, [flow]).condition(torch.ones(1))
        lp.sample("n", made)
        lp.sample("z", string("a", max_tokens=2))

    assert lp.compile(model).latents == ("n", "z")


def test_a_distribution_that_is_told_not_to_look_at_values() -> None:
    """Soft labels, as of pixels between 0 and 1."""
    labels = torch.tensor([0.2, 0.9, 0.5])

    def model() -> None:
        z = lp.sample("z", dist.Normal(0.0, 1.0))
        fn = dist.Bernoulli(logits=z * torch.ones(3), validate_args=False).to_event(1)
        lp.sample("x", fn, obs=labels)

    found = lp.compile(model).log_joint({"z": 0.5})
    logits = torch.tensor(0.5)
    expected = (labels * logits - torch.log1p(logits.exp())).sum()
    expected = expected + dist.Normal(0.0, 1.0).log_prob(logits)
    assert float(found) == pytest.approx(float(expected), abs=1e-5)


KNOWN: dict[str, bool] = {}
CALLS = 0


def remembers(text: str) -> bool:
    if text not in KNOWN:
        KNOWN[text] = text in ("a", "b", ".")
    return KNOWN[text]


def counts(text: str) -> bool:
    global CALLS
    CALLS += 1
    return text in ("a", "b", ".")


@pytest.mark.parametrize("allow", [remembers, counts])
@pytest.mark.parametrize("is_static", [True, False])
def test_a_filter_that_remembers(allow: Any, is_static: bool) -> None:
    def model() -> None:
        z = lp.sample("z", string("a", max_tokens=2, allow=allow))
        if is_static:
            lp.sample("y", string(f"b{z}"), obs="a")
        else:
            lp.factor("f", float(len(z)))

    KNOWN.clear()
    program = lp.compile(model)
    program.log_joint([{"z": "a"}, {"z": "ab"}])
    assert program.is_static == is_static
