"""Other observations in the same program, programs that make their own, and programs together."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from functools import partial
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import langppl as lp
from langppl.program import run_together
from langppl.program.execution import Chooser, Execution, draw_prior, given, score, score_all
from langppl.program.program import StaticMismatchWarning
from langppl.program.scheduler import run
from langppl.testing import _check_draws, enumerate_strings, tiny_lm

LM = tiny_lm("ab.", seed=1, merged=["ab"])
OTHER = tiny_lm("ab.", seed=2)


def short(prompt: str = "a", tokens: int = 2, **rules: Any) -> lp.LMString:
    return lp.LMString(LM, prompt, max_tokens=tokens, **rules)


def goes_on(prompt: str) -> lp.LMString:
    return lp.LMString(LM, prompt)


# -- observing -----------------------------------------------------------------------------------


def static(beginning: str, ending: str) -> None:
    z = lp.sample("z", short(beginning))
    lp.sample("y", goes_on(f"{z}b"), obs=ending)


def dynamic(beginning: str, ending: str) -> None:
    z = lp.sample("z", short(beginning))
    lp.sample("y", goes_on("a" if len(z) > 1 else "b"), obs=ending)


ROWS = [{"z": z} for z in ("a", "bb", "b.", ".")]


@pytest.mark.parametrize("model", [static, dynamic])
def test_other_observations_take_the_place_of_the_first(model: Any) -> None:
    program = lp.compile(model, "b", "ab")
    before = program.log_joint(ROWS)
    other = program.observing({"y": "ba"})

    expected = lp.compile(model, "b", "ba").log_joint(ROWS)
    torch.testing.assert_close(other.log_joint(ROWS), expected, rtol=0, atol=1e-5)
    assert float((expected - before).abs().max()) > 0.1
    torch.testing.assert_close(program.log_joint(ROWS), before, rtol=0, atol=1e-5)
    assert other.is_static == program.is_static == (model is static)
    assert (program.sites["y"].value, other.sites["y"].value) == ("ab", "ba")
    assert (other.args, other.shown_args) == (("b", "ab"), ("b", "ba"))
    assert program.shown_args == ("b", "ab")
    (ran,) = other.run([given(ROWS[0])])
    assert ran.sites["y"].value == "ba"
    again = other.observing({"y": "."})
    assert again.shown_args == ("b", ".") and again.sites["y"].value == "."


def test_the_structure_is_not_searched_again() -> None:
    ran: list[None] = []

    def model() -> None:
        ran.append(None)
        static("a", "ab")

    program = lp.compile(model)
    ran.clear()
    other = program.observing({"y": "a"})
    assert len(ran) == 1  # once, for its templates
    assert other.graph.nodes == program.graph.nodes and other.graph.edges == program.graph.edges
    assert (other.latents, other.observed) == (("z",), ("y",))


def test_an_observation_that_goes_on_into_a_prompt_is_renewed_there() -> None:
    def model(first: str) -> None:
        z = lp.sample("z", lp.LMString(LM, "b", max_tokens=2))
        y = lp.sample("y", lp.LMString(LM, f"a{z}"), obs=first)
        lp.sample("x", lp.LMString(LM, f"{z}{y}"), obs="ab")

    program = lp.compile(model, "aaa")
    other = program.observing({"y": ".a."})
    (shown,) = [t.fn.prompt for t in other.templates or () if t.name == "x"]
    assert str(shown).endswith(".a.") and "aaa" not in str(shown)
    afresh = lp.compile(model, ".a.")
    assert float(other.log_joint({"z": "ab"})) == float(afresh.log_joint({"z": "ab"}))
    assert other.is_static


def test_an_observation_that_decides_what_is_connected_is_looked_at() -> None:
    def model(y: str) -> None:
        one = lp.sample("one", lp.LMString(LM, "a", max_tokens=1, allow=["a", "b"]))
        two = lp.sample("two", lp.LMString(LM, "b", max_tokens=1, allow=["a", "b"]))
        y = lp.sample("y", lp.LMString(LM, "ab"), obs=y)
        lp.sample("v", lp.LMString(LM, f"{one}", temperature=0.3), obs="a")
        both = lp.LMString(LM, f"{one}{two}" if y == "a" else f"{two}", temperature=0.3)
        lp.sample("w", both, obs="bb")
        if y == "a":
            lp.sample("three", lp.LMString(LM, f"{two}", max_tokens=1))

    program = lp.compile(model, "b")
    assert program.graph.independent() == [{"one"}, {"two"}]
    other, afresh = program.observing({"y": "a"}), lp.compile(model, "a")
    assert other.is_static and other.latents == afresh.latents == ("one", "two", "three")
    assert set(other.graph.edges) == set(afresh.graph.edges)
    assert not any({"one"} == group for group in other.graph.independent())
    truth = lp.infer(afresh, method="exact", progress=False)
    found = lp.infer(other, num_samples=500, progress=False)
    assert found.log_evidence == pytest.approx(truth.log_evidence, abs=4 * found.log_evidence_error)


def test_what_no_template_shows_is_run_for_every_row() -> None:
    def model() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=4))
        # The engine of `re` reads a string without a method of its being called.
        lp.sample("y", lp.LMString(LM, "a" if re.search("b{3}", z) else "."), obs="ab")

    texts = ("a.", "b.", "bbb", "ab", "ba", "aa", "bab", "aab", "aba", "abb", "baa", "bb", "bba")
    program = lp.compile(model)
    with pytest.warns(StaticMismatchWarning, match="'z': 'bbb'"):
        together = program.log_joint([{"z": z} for z in texts])
    for z, found in zip(texts, together.tolist(), strict=True):
        alone = float(program.log_joint({"z": z}))
        assert found == pytest.approx(alone, abs=1e-5), z


@pytest.mark.parametrize("how", [float, np.float64, np.array, torch.tensor])
def test_a_number_is_observed_in_the_precision_of_its_distribution(how: Any) -> None:
    fn = dist.Normal(torch.tensor(0.1, dtype=torch.float64), 1e-9)
    value = torch.tensor(0.1, dtype=torch.float64) if how is torch.tensor else how(0.1)
    by_hand = -math.log(1e-9) - 0.5 * math.log(2.0 * math.pi)

    def evidence(model: Any, *args: Any) -> float:
        found = lp.infer(model, *args, method="exact", progress=False).log_evidence
        assert found is not None
        return found

    def seen(x: Any) -> None:
        lp.sample("x", fn, obs=x)

    def free() -> None:
        lp.sample("x", fn)

    assert evidence(seen, value) == pytest.approx(by_hand, abs=1e-9)
    assert evidence(lp.condition(free, {"x": value})) == pytest.approx(by_hand, abs=1e-9)
    assert float(lp.compile(free).log_joint({"x": value})) == pytest.approx(by_hand, abs=1e-9)


def test_two_sites_of_one_value_leave_the_argument_as_it_is() -> None:
    def model(one: str, two: str) -> None:
        z = lp.sample("z", lp.LMString(LM, "b", max_tokens=2))
        lp.sample("x", lp.LMString(LM, f"a{z}"), obs=one)
        lp.sample("y", lp.LMString(LM, f"b{z}"), obs=two)

    program = lp.compile(model, "a", "a")
    assert program.observing({"x": "b", "y": "."}).shown_args == ("a", "a")
    assert program.observing({"x": "b"}).shown_args == ("a", "a")


def test_numbers_may_be_observed_too() -> None:
    def model(n: torch.Tensor, m: float) -> None:
        p = lp.sample("p", dist.Beta(2.0, 3.0))
        lp.sample("n", dist.Normal(p, 0.5), obs=n)
        lp.sample("m", dist.Normal(p, 0.5), obs=torch.tensor(m))

    program = lp.compile(model, torch.tensor(0.25), 0.5)
    other = program.observing({"n": 1.5})
    row = {"p": 0.25}
    by_hand = (
        dist.Beta(2.0, 3.0).log_prob(torch.tensor(0.25))
        + dist.Normal(0.25, 0.5).log_prob(torch.tensor([1.5, 0.5])).sum()
    )
    assert float(other.log_joint(row)) == pytest.approx(float(by_hand), abs=1e-5)
    assert [float(a) for a in other.shown_args] == [1.5, 0.5]
    both = other.observing({"m": torch.tensor(-1.0)})
    assert [float(both.sites[n].value) for n in ("n", "m")] == [1.5, -1.0]
    assert [float(a) for a in both.shown_args] == [1.5, -1.0]


def test_only_observations_can_be_replaced() -> None:
    def model() -> None:
        z = lp.sample("z", short())
        lp.call("size", len, z)
        lp.factor("bonus", -1.0)
        lp.sample("y", goes_on(z), obs="a")

    program = lp.compile(model)
    for name, kind in (("z", "latent"), ("size", "deterministic"), ("bonus", "factor")):
        with pytest.raises(ValueError, match=f"site '{name}' is {kind}, not observed"):
            program.observing({name: "a", "y": "b"})


def test_a_site_that_no_first_run_met_can_be_observed() -> None:
    def model() -> None:
        z = lp.sample("z", short())
        for i in range(len(z)):
            lp.sample(f"y_{i}", goes_on("b"), obs="a")

    (ran,) = lp.compile(model).observing({"y_3": "b"}).run([given({"z": "abab"})])
    assert [ran.sites[f"y_{i}"].value for i in range(4)] == ["a", "a", "a", "b"]


def test_an_observation_that_goes_on_into_the_program() -> None:
    def model(first: str) -> None:
        z = lp.sample("z", short())
        y = lp.sample("y", goes_on(z), obs=first)
        lp.sample("then", goes_on(f"{z}{y}"), obs="b")

    expected = lp.compile(model, ".").log_joint(ROWS)
    found = lp.compile(model, "a").observing({"y": "."}).log_joint(ROWS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# -- programs that make their own data -----------------------------------------------------------


def simulated(program: lp.Program, n: int, **options: Any) -> list[tuple[dict[str, Any], Any]]:
    return run([partial(program.simulated, ("test", i), **options) for i in range(n)])


def law_of(program: lp.Program, length: int) -> dict[tuple[Any, Any], float]:
    """Log p of each latent and each observation of so many tokens, given that it has as many."""
    fn = program.sites["z"].fn
    tokens = [LM.vocabulary.exact[t.encode()] for t in ("a", "b", ".", "ab")]
    endings = list(itertools.product(tokens, repeat=length))
    law = {}
    for z, is_rejected in enumerate_strings(fn):
        for ids in endings:
            text = lp.Text("".join(LM.vocabulary.text(t) for t in ids), ids, LM.fingerprint)
            if not is_rejected:
                row = {"z": z}
                law[z.ids, ids] = float(program.observing({"y": text}).log_joint(row))
    total = math.log(math.fsum(map(math.exp, law.values())))
    assert -2.0 < total < -0.05, "some draws end early, so the condition matters"
    return {k: v - total for k, v in law.items()}


def rejecting(beginning: str, ending: str) -> None:
    z = lp.sample("z", short(beginning, stop=".", truncate="reject"))
    lp.sample("y", goes_on(f"{z}b"), obs=ending)


@pytest.mark.parametrize("model", [static, dynamic, rejecting])
def test_pairs_follow_the_model(model: Any) -> None:
    """Seeds are fixed; a right law fails `_check_draws`, at 5 deviations, once in a million."""
    program = lp.compile(model, "b", "..")
    law = law_of(program, 2)
    pairs = simulated(program, 1500)
    drawn = [(latents["z"].ids, other.sites["y"].value.ids) for latents, other in pairs]
    _check_draws(law, [(key, law.get(key, 0.0)) for key in drawn], dict.fromkeys(law, ""))
    assert len(set(drawn)) > 15
    for latents, other in pairs[:3]:
        assert list(latents) == ["z"]
        assert other.shown_args == ("b", str(other.sites["y"].value))


def test_unlike_simulate_it_draws_rejected_strings_anew() -> None:
    program = lp.compile(rejecting, "b", ".")
    pairs = simulated(program, 40)
    drawn = {latents["z"] for latents, _ in pairs}
    assert all(z.endswith(".") or len(z.ids) < 2 for z in drawn) and len(drawn) > 3
    assert bool(torch.isfinite(torch.stack([o.log_joint(z) for z, o in pairs])).all())
    with pytest.raises(ValueError, match="rejects unfinished strings"):
        program.simulate(1, lengths={"y": 1})


def test_open_strings_are_as_long_as_what_is_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = lp.compile(static, "b", "ab.a")  # three tokens
    assert {len(o.sites["y"].value.ids) for _, o in simulated(program, 8)} == {3}
    lengths = {len(o.sites["y"].value.ids) for _, o in simulated(program, 8, lengths={"y": 2})}
    assert lengths == {2}
    monkeypatch.setattr("langppl.program.program.MOST_ATTEMPTS", 4)
    with pytest.raises(ValueError, match=r"4 draws .* open string 'y' ended before its 200 tokens"):
        simulated(program, 1, lengths={"y": 200})

    def rejecting() -> None:
        rules = {"stop": ".", "max_tokens": 2, "truncate": "reject", "temperature": 0.05}
        z = lp.sample("z", lp.LMString(OTHER, "a", **rules))
        lp.sample("y", lp.LMString(OTHER, f"a{z}", max_tokens=1), obs="a")

    with pytest.raises(ValueError, match=r"nothing: the string 'z' was rejected .*more max_tokens"):
        simulated(lp.compile(rejecting), 1)


def test_equal_keys_give_equal_pairs() -> None:
    program = lp.compile(static, "b", "ab")

    def shown(n: int) -> list[tuple[Any, Any]]:
        return [(z["z"].ids, o.sites["y"].value.ids) for z, o in simulated(program, n)]

    assert shown(3) == shown(12)[:3] and len(set(shown(12))) > 3


def test_numbers_and_closed_strings_are_simulated() -> None:
    def model() -> None:
        p = lp.sample("p", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        lp.sample("n", dist.Normal(p[0], 0.001), obs=torch.tensor(100.0))
        lp.sample("y", short("a"), obs="ab")

    pairs = simulated(lp.compile(model), 12)
    assert all(abs(float(z["p"][0] - o.sites["n"].value)) < 0.01 for z, o in pairs)
    assert len({str(o.sites["y"].value) for _, o in pairs}) > 1


def with_factor() -> None:
    lp.sample("z", short())
    lp.factor("bonus", -1.0)


def with_tempered() -> None:
    lp.sample("z", lp.Tempered(short(), 0.5))


@pytest.mark.parametrize(("model", "site"), [(with_factor, "bonus"), (with_tempered, "z/tempered")])
def test_a_factor_makes_no_data(model: Any, site: str) -> None:
    with pytest.raises(ValueError, match=f"site '{site}' is a factor, so the program is not a"):
        simulated(lp.compile(model), 1)


# -- several programs ----------------------------------------------------------------------------


def prior(seed: int) -> Chooser:
    return lambda name, fn, execution: draw_prior(fn, (seed, name))


def shown(execution: Execution) -> list[tuple[str, str, float | None]]:
    return [
        (s.name, str(s.value), None if s.log_prob is None else round(s.log_prob, 4))
        for s in execution.sites.values()
    ]


def test_programs_together_are_as_programs_apart() -> None:
    def longer() -> None:
        for i in range(3):
            z = lp.sample(f"z_{i}", lp.LMString(OTHER, "a" * (i + 1), max_tokens=3))
            size = lp.call(f"size_{i}", len, z)
            lp.sample(f"n_{i}", dist.Normal(float(size), 1.0), obs=torch.tensor(2.0))

    one, two = lp.compile(static, "b", "ab"), lp.compile(longer)
    mixed = [(program, prior(i)) for i in range(4) for program in (one, two)]
    together = run_together(mixed, score)
    assert [shown(e) for e in together] == [
        shown(e) for i in range(4) for p in (one, two) for e in p.run([prior(i)], score)
    ]
    assert [next(iter(e.sites)) for e in together] == ["z", "z_0"] * 4
    assert all(s.log_prob is not None for e in together for s in e.sites.values())


def test_each_program_keeps_its_own_tool_calls() -> None:
    calls: list[str] = []

    def tool(who: str) -> str:
        calls.append(who)
        return who

    def model(who: str) -> str:
        lp.sample("z", short())
        return lp.call("tool", tool, who)

    programs = [lp.compile(model, who) for who in ("one", "two", "one")]
    calls.clear()
    executions = run_together([(p, prior(i)) for i in range(5) for p in programs])
    assert [e.returned for e in executions] == ["one", "two", "one"] * 5
    assert calls == []


@pytest.mark.parametrize("observations", [{}, {"y": "ba"}])
def test_executions_of_a_dynamic_program_are_its_runs(observations: dict[str, str]) -> None:
    program = lp.compile(dynamic, "b", "ab").observing(observations)
    assert not program.is_static
    ran = program.run([given(row) for row in ROWS])
    score_all(ran)
    assert [shown(e) for e in program.executions(ROWS)] == [shown(e) for e in ran]
    assert len({e.sites["y"].fn.prompt for e in ran}) == 2


def test_a_misspelt_site_of_a_dynamic_program_is_named() -> None:
    def model(ending: str) -> None:
        z = lp.sample("middle", short())
        if len(z) > 1:
            lp.sample("more", short())
        lp.sample("ending", goes_on(z), obs=ending)

    program = lp.compile(model, "a")
    message = "names the site '{}', and no run of the model has met it.*did you mean '{}'"
    with pytest.warns(UserWarning, match="observing " + message.format("endng", "ending")):
        program.observing({"endng": "b"})
    row = {"middle": ".", "midle": "."}
    with pytest.warns(UserWarning, match="log_joint " + message.format("midle", "middle")):
        found = program.log_joint(row)
    with pytest.warns(UserWarning, match="condition " + message.format("mor", "more")):
        lp.compile(lp.condition(model, {"mor": "a"}), "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", lp.JoinWarning)
        # A site that some runs meet alone is no misspelling.
        assert program.log_joint({"middle": ".", "more": "b"}) == found
        program.observing({"ending": "b"})


def test_a_pair_of_a_dynamic_program_is_no_misspelling() -> None:
    def model() -> None:
        k = int(lp.sample("k", dist.Uniform(0.0, 1e6)))
        lp.sample(f"y_{k}", short("b"), obs="a")

    program = lp.compile(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((latents, pair),) = run([partial(program.simulated, (0, 1))])
    assert f"y_{int(latents['k'])}" not in program.sites
    assert list(pair._observations) == [f"y_{int(latents['k'])}"]


def with_number(ending: str, number: float = 0.5) -> None:
    z = lp.sample("z", short("a"))
    lp.sample("n", dist.Normal(0.0, 1.0), obs=number)
    lp.sample("y", goes_on(f"{z}b"), obs=ending)


def late() -> None:
    z = lp.sample("z", short("a"))
    if z == "bb":
        lp.sample("late", goes_on("a"), obs="b")


@pytest.mark.parametrize("value", [3, 0.5, None, torch.tensor(1.0), ["ab"], b"ab"])
def test_a_string_site_observes_strings_alone(value: Any) -> None:
    program = lp.compile(with_number, "ab")
    with pytest.raises(TypeError, match=r"site 'y' is a string site, (but its value|and its obs)"):
        program.observing({"y": value})
    for model in (static, dynamic):
        with pytest.raises(TypeError, match="site 'y' is a string site"):
            lp.compile(model, "b", "ab").observing({"y": value})
    # Of a site that no run has met, a run tells.
    program = lp.compile(late)
    program.sites.pop("late", None)
    with pytest.warns(UserWarning, match="no run of the model has met it"):
        other = program.observing({"late": value})
    with pytest.raises(TypeError, match="site 'late' is a string site"):
        other.log_joint({"z": "bb"})


def test_a_numeric_site_observes_no_string() -> None:
    program = lp.compile(with_number, "ab")
    with pytest.raises(TypeError, match=r"site 'n' is no string site .*'ab'"):
        program.observing({"n": "ab"})
    found = program.observing({"n": 2}).log_joint({"z": "a"}) - program.log_joint({"z": "a"})
    assert float(found) == pytest.approx((0.25 - 4.0) / 2)
