"""What flows into what: edges, kinds, and whether a program is its templates."""

from __future__ import annotations

import functools
import gc
import itertools
import re
import warnings
from typing import Any

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import langppl as lp
from langppl.program import StaticMismatchWarning, discovery, scheduler
from langppl.program.execution import Execution
from langppl.testing import tiny_lm

LM = tiny_lm("ab. 1", seed=1)


def short(prompt: Any, tokens: int = 3, **rules: Any) -> lp.LMString:
    return lp.LMString(LM, prompt, max_tokens=tokens, **rules)


def goes_on(prompt: str) -> lp.LMString:
    return lp.LMString(LM, prompt)


def edges(model: Any, *args: Any) -> set[tuple[str, str]]:
    return set(lp.compile(model, *args).graph.edges)


# -- prompts that are templates ------------------------------------------------------------------


def by_fstring(x: str, y: str) -> str:
    return f"{x} b {y!s}"


def by_plus(x: str, y: str) -> str:
    return "a" + x + " " + y


def by_radd_of_text(x: str, y: str) -> str:
    return x + y


def by_format(x: str, y: str) -> str:
    return "{} a {last}".format(x, last=y)  # noqa: UP032


def by_join(x: str, y: str) -> str:
    return " ".join(["a", x, y])


def by_percent(x: str, y: str) -> str:
    return "%s a %s" % (x, y)  # noqa: UP031


def by_percent_of_mapping(x: str, y: str) -> str:
    return "%(x)s a %(y)s" % {"x": x, "y": y}  # noqa: UP031


TEMPLATES = [
    by_fstring, by_plus, by_radd_of_text, by_format, by_join, by_percent, by_percent_of_mapping,
]  # fmt: skip


@pytest.mark.parametrize("combine", TEMPLATES)
def test_edges_through_templates(combine: Any) -> None:
    def model() -> None:
        x = lp.sample("x", short("a"))
        y = lp.sample("y", short("b"))
        lp.sample("unrelated", short("ab"))
        lp.sample("both", goes_on(combine(x, y)), obs=" a")
        lp.sample("first", goes_on(f"{x}"), obs=" b")

    program = lp.compile(model)

    assert set(program.graph.edges) == {("x", "both"), ("y", "both"), ("x", "first")}
    assert list(program.graph.nodes) == ["x", "y", "unrelated", "both", "first"]
    assert program.is_static


def test_edges_through_a_list_comprehension_over_earlier_latents() -> None:
    def model() -> None:
        facts: list[str] = []
        for i in range(3):
            facts.append(lp.sample(f"fact_{i}", short("".join(f"- {f}" for f in facts) + "a")))
        lp.sample("seen", goes_on("\n".join([f"{f}!" for f in facts[:2]])), obs=" a")

    program = lp.compile(model)

    assert set(program.graph.edges) == {
        ("fact_0", "fact_1"),
        ("fact_0", "fact_2"),
        ("fact_1", "fact_2"),
        ("fact_0", "seen"),
        ("fact_1", "seen"),
    }
    assert program.is_static


def test_a_latent_in_a_chat_prompt_and_in_an_option_and_in_an_observation() -> None:
    def model() -> None:
        x = lp.sample("x", short("a"))
        y = lp.sample("y", short("b"))
        z = lp.sample("z", short("ab"))
        lp.sample("option", lp.LMChoice(LM, "a", [f"{x} a", f"{x} b"]))
        lp.sample("observation", goes_on("a"), obs=f"{y}")
        lp.sample("chat", goes_on([{"role": "user", "content": f"a {z}"}]), obs="a")

    program = lp.compile(model)

    assert set(program.graph.edges) == {("x", "option"), ("y", "observation"), ("z", "chat")}
    assert program.is_static


# -- programs that look inside -------------------------------------------------------------------


def test_edges_through_int() -> None:
    def model() -> None:
        z = lp.sample("z", short("a", 2, allow="1"))
        w = lp.sample("w", short("a"))
        lp.sample("seen", goes_on("ab" * (int(z) % 5) + "a"), obs=" b")
        lp.sample("other", goes_on(f"{w}"), obs=" b")

    program = lp.compile(model)

    assert set(program.graph.edges) == {("z", "seen"), ("w", "other")}
    assert not program.is_static


def test_edges_through_in() -> None:
    def model() -> None:
        z = lp.sample("z", short("a"))
        w = lp.sample("w", short("b"))
        prompt = "a" if "ab" in z else "b"
        lp.sample("seen", goes_on(prompt), obs=" b")
        lp.sample("other", goes_on(w + "a"), obs=" b")

    program = lp.compile(model)

    assert set(program.graph.edges) == {("z", "seen"), ("w", "other")}
    assert not program.is_static


def test_edges_through_a_comparison_of_latents() -> None:
    def model() -> None:
        x = lp.sample("x", short("a"))
        y = lp.sample("y", short("b"))
        lp.factor("same", 1.0 if x == y else 0.0)
        z = lp.sample("z", short("a" if x < y else "b"))
        lp.sample("seen", goes_on(f"{z}"), obs="a")

    found = {("x", "same"), ("y", "same"), ("x", "z"), ("y", "z"), ("z", "seen")}
    assert edges(model) == found


def test_edges_through_a_regular_expression() -> None:
    def model() -> None:
        z = lp.sample("z", short("a"))
        w = lp.sample("w", short("b"))
        found = re.search(r"\d+", z)
        lp.sample("seen", goes_on("a" if found else "b"), obs=" b")
        lp.sample("other", goes_on(w + "a"), obs=" b")

    program = lp.compile(model)

    assert set(program.graph.edges) == {("z", "seen"), ("w", "other")}
    assert not program.is_static


def test_a_branch_that_changes_which_sites_exist() -> None:
    def model() -> str:
        mood = lp.sample("mood", lp.LMChoice(LM, "a", ["a", "b."]))
        if mood == "a":
            detail = lp.sample("detail", short("a"))
            lp.sample("seen", goes_on(detail), obs=" a")
        else:
            lp.sample("seen", goes_on("b"), obs=" a")
        return mood

    program = lp.compile(model)

    assert set(program.graph.edges) == {("mood", "detail"), ("mood", "seen"), ("detail", "seen")}
    assert program.latents == ("mood", "detail")
    assert program.observed == ("seen",)
    assert not program.is_static


def test_edges_through_a_call_with_a_string_result() -> None:
    def model() -> None:
        z = lp.sample("z", short("a"))
        w = lp.sample("w", short("b"))
        upper = lp.call("tool", lambda s: s[::-1], z)
        lp.sample("seen", goes_on(f"a{upper}"), obs=" b")
        lp.sample("other", goes_on(f"{w}"), obs=" b")

    program = lp.compile(model)

    assert set(program.graph.edges) == {("z", "tool"), ("tool", "seen"), ("w", "other")}
    assert program.graph.nodes["tool"] == {"kind": "deterministic", "family": "call"}
    assert not program.is_static


def test_edges_through_a_call_with_a_numeric_result() -> None:
    calls: list[str] = []

    def count(text: str) -> int:
        calls.append(text)
        return text.count("a")

    def model() -> None:
        z = lp.sample("z", short("a"))
        n = lp.call("tool", count, z)
        lp.sample("seen", goes_on("a" if n > 0 else "b"), obs=" b")

    program = lp.compile(model)

    assert set(program.graph.edges) == {("z", "tool"), ("tool", "seen")}
    # A tool is a function of what the LM really writes; it never sees a made-up string.
    assert calls
    assert all(set(c) <= set("ab. 1") for c in calls)
    assert len(calls) == len(set(calls))


def test_edges_of_tempered_sites() -> None:
    def model() -> None:
        x = lp.sample("x", short("a"))
        z = lp.sample("z", lp.Tempered(short(f"{x}b"), 0.5))
        lp.sample("seen", goes_on(f"{z}"), obs=" a")

    program = lp.compile(model)

    assert set(program.graph.edges) == {
        ("x", "z"),
        ("x", "z/tempered"),
        ("z", "z/tempered"),
        ("z", "seen"),
    }
    assert program.graph.nodes["z"] == {"kind": "latent", "family": "LMString"}
    assert program.graph.nodes["z/tempered"] == {"kind": "factor", "family": "factor"}
    assert program.is_static


def test_edges_of_numeric_latents() -> None:
    def model() -> None:
        p = lp.sample("p", dist.Beta(1.0, 1.0))
        q = lp.sample("q", dist.Normal(p, 1.0))
        lp.sample("n", dist.Normal(q, 1.0), obs=0.5)
        lp.sample("seen", goes_on("a" * (1 + int(4 * p))), obs=" b")

    program = lp.compile(model)

    assert set(program.graph.edges) == {("p", "q"), ("q", "n"), ("p", "seen")}
    assert dict(program.graph.nodes(data="family")) == {
        "p": "Beta",
        "q": "Normal",
        "n": "Normal",
        "seen": "LMString",
    }
    assert not program.is_static


# -- node attributes and output ------------------------------------------------------------------


def story(beginning: str, ending: str) -> None:
    mood = lp.sample("mood", lp.LMChoice(LM, "a", ["a", "b"]))
    middle = lp.sample("middle", short(f"{beginning} {mood}"))
    lp.factor("bonus", torch.tensor(-0.5))
    lp.sample("ending", goes_on(f"{beginning}{middle}"), obs=ending)


def test_node_attributes() -> None:
    program = lp.compile(story, "a", " b")

    assert isinstance(program.graph, nx.DiGraph)
    assert dict(program.graph.nodes(data=True)) == {
        "mood": {"kind": "latent", "family": "LMChoice"},
        "middle": {"kind": "latent", "family": "LMString"},
        "bonus": {"kind": "factor", "family": "factor"},
        "ending": {"kind": "observed", "family": "LMString"},
    }
    assert program.latents == ("mood", "middle")
    assert program.observed == ("ending",)


def test_deterministic_is_a_node_of_its_own() -> None:
    def model() -> None:
        z = lp.sample("z", short("a"))
        note = lp.deterministic("note", f"{z} b")
        lp.sample("seen", goes_on(note), obs="a")

    graph = lp.compile(model).graph

    assert graph.nodes["note"] == {"kind": "deterministic", "family": "deterministic"}
    assert ("z", "note") in graph.edges
    # What flows through the note is seen at the site that reads it.
    assert nx.has_path(graph, "z", "seen")


def test_show_prints_one_line_for_each_site(capsys: pytest.CaptureFixture[str]) -> None:
    lp.compile(story, "a", " b").graph.show()

    assert capsys.readouterr().out.splitlines() == [
        "mood    latent         LMChoice",
        "middle  latent         LMString  <- mood",
        "bonus   factor         factor",
        "ending  observed       LMString  <- middle",
    ]


def test_to_dot() -> None:
    assert lp.compile(story, "a", " b").graph.to_dot().splitlines() == [
        "digraph program {",
        r'  "mood" [label="mood\nLMChoice" shape="ellipse"];',
        r'  "middle" [label="middle\nLMString" shape="ellipse"];',
        r'  "bonus" [label="bonus\nfactor" shape="box"];',
        r'  "ending" [label="ending\nLMString" shape="ellipse" style="filled"];',
        '  "mood" -> "middle";',
        '  "middle" -> "ending";',
        "}",
    ]


def test_to_dot_escapes_quotes_and_backslashes() -> None:
    def model() -> None:
        lp.sample('say "a"', short("a"))
        lp.sample("b\\", short("a"))

    dot = lp.compile(model).graph.to_dot()
    assert '"say \\"a\\"" [label="say \\"a\\"\\nLMString"' in dot
    assert '"b\\\\" [label="b\\\\\\nLMString"' in dot


# -- static and dynamic --------------------------------------------------------------------------


def looks_at_length(z: str) -> str:
    return "a" * (1 + len(z))


def looks_with_split(z: str) -> str:
    return (z.split(".")[0] or "a") + "b"


def looks_at_a_character(z: str) -> str:
    return z[:1] + "b"


def looks_by_comparing(z: str) -> str:
    return "a" if z == "ab" else "b"


def looks_with_a_dict(z: str) -> str:
    return {"a": "b"}.get(z, "a")


def looks_by_iterating(z: str) -> str:
    return "a" + "".join(reversed(list(z)))


def looks_with_lower(z: str) -> str:
    return "a" + z.upper()


def looks_with_padding(z: str) -> str:
    return f"{z:>4}"


def looks_with_repr(z: str) -> str:
    return f"a{z!r}"


@pytest.mark.parametrize(
    "look",
    [
        looks_at_length,
        looks_with_split,
        looks_at_a_character,
        looks_by_comparing,
        looks_with_a_dict,
        looks_by_iterating,
        looks_with_lower,
        looks_with_padding,
        looks_with_repr,
    ],
)
def test_dynamic_programs_are_not_taken_for_static(look: Any) -> None:
    def model() -> None:
        z = lp.sample("z", short("a"))
        lp.sample("seen", goes_on(look(z)), obs=" b")

    program = lp.compile(model)

    assert not program.is_static
    assert set(program.graph.edges) == {("z", "seen")}


def test_a_static_program_says_so() -> None:
    assert "static" in repr(lp.compile(story, "a", " b"))
    assert repr(lp.compile(story, "a", " b")).startswith("Program(story, latents=('mood', 'mid")


# -- the compiled log joint is the run one -------------------------------------------------------


def many_ways(beginning: str, ending: str) -> None:
    x = lp.sample("x", short(beginning))
    mood = lp.sample("mood", lp.LMChoice(LM, "a" + x, ["a", "b. b"]))
    y = lp.sample("y", lp.Tempered(short("%s b%s" % (x, mood), stop="."), 2.0))  # noqa: UP031
    z = lp.sample("z", short(" ".join([x, y]), truncate="reject", stop="b", min_tokens=0))
    lp.factor("bonus", -0.25)
    lp.sample("early", lp.LMString(LM, f"{mood}", max_tokens=4), obs=f"{x}")
    lp.sample("ending", goes_on("{0} {1}{0}".format(x, z)), obs=ending)  # noqa: UP032


COMPILED = lp.compile(many_ways, "a", " ab")
RUN = lp.compile(many_ways, "a", " ab")
RUN._is_static = False

values = st.text(alphabet="ab. 1", max_size=5)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"x": values, "mood": st.sampled_from(["a", "b. b"]), "y": values, "z": values}
        ),
        min_size=1,
        max_size=3,
    )
)
def test_compiled_log_joint_equals_the_run_one(rows: list[dict[str, str]]) -> None:
    assert COMPILED.is_static

    compiled, run = COMPILED.log_joint(rows), RUN.log_joint(rows)

    assert COMPILED.is_static and not RUN.is_static
    assert compiled.shape == (len(rows),)
    assert torch.equal(compiled == -torch.inf, run == -torch.inf)
    torch.testing.assert_close(compiled, run, rtol=0, atol=1e-4)


def test_random_values_are_not_all_impossible() -> None:
    """The test above compares numbers, not only infinities."""
    found = RUN.log_joint([{"x": x, "mood": "a", "y": "b.", "z": "ab"} for x in ("a", "b ", "ab")])

    assert torch.isfinite(found).all()
    assert len(set(found.tolist())) == 3


def test_drawn_values_are_scored_by_their_own_tokens_in_both_forms() -> None:
    lm = tiny_lm("ab", seed=2, merged=["ab"])

    def model() -> None:
        z = lp.sample("z", lp.LMString(lm, "a", max_tokens=3))
        lp.sample("again", lp.LMString(lm, "b", max_tokens=3), obs=z)

    program = lp.compile(model)
    assert program.is_static
    spelled = lp.Text("ab", [3, 4], lm.fingerprint)
    merged = lp.Text("ab", [5], lm.fingerprint)

    compiled = program.log_joint([{"z": spelled}, {"z": merged}, {"z": "ab"}])
    program._is_static = False
    run = program.log_joint([{"z": spelled}, {"z": merged}, {"z": "ab"}])

    torch.testing.assert_close(compiled, run, rtol=0, atol=1e-4)
    assert abs(float(compiled[0] - compiled[1])) > 0.01
    assert float(compiled[1]) == pytest.approx(float(compiled[2]), abs=1e-4)


# -- what looks static and is not ----------------------------------------------------------------
# The rare values stand outside of the models: compile tries the strings that a model mentions.


def rare_by_regex(z: str) -> bool:
    return re.fullmatch("a1[b]", z) is not None


def rare_by_plain_copy(z: str) -> bool:
    return str.__eq__(str.__str__(z), chr(98) + "a1")


@pytest.mark.parametrize(("is_rare", "rare"), [(rare_by_regex, "a1b"), (rare_by_plain_copy, "ba1")])
def test_the_row_check_catches_what_placeholders_do_not(is_rare: Any, rare: str) -> None:
    def model() -> None:
        z = lp.sample("z", short("a"))
        prompt = "b" * 9 if is_rare(z) else "a"
        lp.sample("seen", goes_on(prompt), obs=" b")

    program = lp.compile(model)
    assert program.is_static, "the test needs a program that compile takes for static"
    lp_z = short("a").log_prob(rare)
    truth = lp_z + goes_on("b" * 9).log_prob(" b")
    wrong = lp_z + goes_on("a").log_prob(" b")
    assert abs(float(truth - wrong)) > 0.1

    with warnings.catch_warnings():
        warnings.simplefilter("error", StaticMismatchWarning)
        program.log_joint({"z": "ab"})
    with pytest.warns(StaticMismatchWarning, match=rf"'z': '{rare}'.*differs at 'seen'"):
        found = program.log_joint({"z": rare})

    torch.testing.assert_close(found, truth, rtol=0, atol=1e-4)
    assert not program.is_static
    # Said once; from now on the program is run.
    torch.testing.assert_close(program.log_joint({"z": rare}), truth, rtol=0, atol=1e-4)


def test_the_row_check_catches_a_site_that_appears() -> None:
    def model() -> None:
        z = lp.sample("z", short("a"))
        if rare_by_regex(z):
            lp.sample("extra", goes_on("a"), obs="b")

    program = lp.compile(model)
    assert program.is_static

    with pytest.warns(StaticMismatchWarning, match="differs at 'extra'"):
        found = program.log_joint({"z": "a1b"})

    truth = short("a").log_prob("a1b") + goes_on("a").log_prob("b")
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-4)


def test_the_first_rows_are_all_checked_and_then_another_of_each_batch() -> None:
    def model() -> None:
        z = lp.sample("z", short("a"))
        lp.sample("seen", goes_on("b" if rare_by_regex(z) else "a"), obs=" b")

    plain = [{"z": z} for z in ("a", "b", "ab", "ba", ".", "a.", "b.", " a")]
    for others in range(8):
        program = lp.compile(model)
        with pytest.warns(StaticMismatchWarning, match="differs at 'seen'"):
            program.log_joint([*plain[:others], {"z": "a1b"}, *plain[others:7]])

    program = lp.compile(model)
    assert program.is_static
    for first in (0, 3):
        program.log_joint(plain[first:])
    rows = [{"z": "ab"}, {"z": "a1b"}]
    with pytest.warns(StaticMismatchWarning, match="differs at 'seen'"):
        for _ in range(2):
            program.log_joint(rows)


KEYS = ("zz", "a1b")


def is_key(text: str) -> bool:
    return any(re.fullmatch(key, text) for key in KEYS)


def by_constant(text: str) -> bool:
    return re.fullmatch("a1b", text) is not None


def passes_on(text: str) -> bool:
    return by_constant(text)


def told(is_rare: Any) -> None:
    z = lp.sample("z", short("a"))
    lp.sample("seen", goes_on("b" if is_rare(z) else "a"), obs=" b")


def decorated(fn: Any) -> Any:
    @functools.wraps(fn)
    def inner() -> None:
        fn()

    return inner


def named() -> None:
    told(passes_on)


class Told:
    def __init__(self, key: str = "") -> None:
        self.key = key

    def __call__(self) -> None:
        told(lambda z: re.fullmatch(self.key or "a1b", z))

    def method(self) -> None:
        self()


class Keyed(Told):
    rare = "a1b"

    def __call__(self) -> None:
        told(lambda z: re.fullmatch(self.rare, z))


HIDING: dict[str, Any] = {
    "function": named,
    "global": lambda: told(is_key),
    "partial": functools.partial(told, passes_on),
    "string in a partial": functools.partial(
        lambda key: told(lambda z: re.fullmatch(key, z)), "a1b"
    ),
    "decorated": decorated(decorated(named)),
    "cached": functools.wraps(named)(functools.partial(decorated(named))),
    "closure": (lambda key: lambda: told(lambda z: re.fullmatch(key, z)))("a1b"),
    "default": lambda key="a1b": told(lambda z: re.fullmatch(key, z)),
    "object": Told(),
    "attribute": Told("a1b"),
    "method": Told().method,
    "class attribute": Keyed(),
    "conditioned": lp.condition(named, {"other": "a"}),
}


@pytest.mark.parametrize("kind", HIDING)
@pytest.mark.filterwarnings("ignore:condition names the site")
def test_a_rare_value_is_found_in_all_that_a_model_is_made_of(kind: str) -> None:
    program = lp.compile(HIDING[kind])
    assert not program.is_static
    assert set(program.graph.edges) == {("z", "seen")}


def test_a_rare_value_that_the_model_mentions_is_found_by_compile() -> None:
    def model() -> None:
        z = lp.sample("z", short("a"))
        lp.sample("seen", goes_on("b" if re.fullmatch("a1b", z) else "a"), obs=" b")

    program = lp.compile(model)

    assert not program.is_static
    assert set(program.graph.edges) == {("z", "seen")}


# -- tools and other arguments -------------------------------------------------------------------


def turns(beginning: str, ending: str | None = None) -> str:
    text = beginning
    for turn in range(3):
        z = lp.sample(f"z{turn}", short(text, 2, stop=".", truncate="keep"))
        if z.endswith("."):
            break
        text += lp.call(f"tool{turn}", len, z) * "a"
    if ending is not None:
        lp.sample("ending", goes_on(text), obs=ending)
    return text


def test_a_made_up_value_that_leads_past_the_tools_does_not_hide_them() -> None:
    def model() -> None:
        z = lp.sample("z", short("a", 2))
        if z != "b":
            y = lp.sample("y", short(f"a{lp.call('tool', len, z)}"))
            lp.factor("end", -float(len(y)))

    program = lp.compile(model)
    assert program.latents == ("z", "y")
    assert {("z", "tool"), ("tool", "y"), ("y", "end")} <= set(program.graph.edges)


def test_structure_is_taken_over_for_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    first = lp.compile(turns, "a", "b")
    fresh = lp.compile(turns, "ab", " b")
    asked = []
    monkeypatch.setattr(scheduler, "serve", lambda requests: asked.extend(requests) or [])
    other = lp.compile(turns, "ab", " b", like=first)
    monkeypatch.undo()
    assert not asked
    assert set(other.graph.edges) == set(first.graph.edges) == set(fresh.graph.edges)
    assert other.args == ("ab", " b") and other.sites["ending"].value == " b"
    assert other.sites["z0"].fn.prompt == "ab"
    rows = [{"z0": "b."}, {"z0": "a", "z1": "b."}]
    torch.testing.assert_close(other.log_joint(rows), fresh.log_joint(rows))


def test_structure_is_searched_for_where_it_is_another() -> None:
    first = lp.compile(turns, "a")
    other = lp.compile(turns, "a", "b", like=first)
    assert other.observed == ("ending",)


def test_like_is_of_the_same_model() -> None:
    with pytest.raises(ValueError, match="a program of the same model"):
        lp.compile(story, "a", " b", like=lp.compile(turns, "a"))


# -- what depends on what ------------------------------------------------------------------------


def pairs_apart() -> None:
    for i in range(2):
        z = lp.sample(f"z_{i}", short("a"))
        lp.sample(f"y_{i}", goes_on(f"{z}b"), obs=" a")


def joined_by_an_observation() -> None:
    a, b = lp.sample("a", short("a")), lp.sample("b", short("b"))
    lp.sample("apart", goes_on(f"{a}"), obs=" a")
    lp.sample("seen", goes_on(f"{a} {b}"), obs=" a")


def joined_by_a_factor() -> None:
    a, b = lp.sample("a", short("a")), lp.sample("b", short("b"))
    lp.factor("fits", 0.0 if len(a) == len(b) else -1.0)


def chained() -> None:
    a = lp.sample("a", short("a"))
    b = lp.sample("b", short(f"{a}b"))
    lp.sample("seen", goes_on(f"{b}"), obs=" a")


def shown_together() -> None:
    a, b = lp.sample("a", short("a")), lp.sample("b", short("b"))
    lp.sample("seen", goes_on(f"{b}"), obs=" a")
    lp.deterministic("both", f"{a}{b}")


def shown_together_by_what_is_shown() -> None:
    a, b = lp.sample("a", short("a")), lp.sample("b", short("b"))
    both = lp.deterministic("both", f"{a}{b}")
    lp.call("shown", str, both)


def computed_together() -> None:
    a, b = lp.sample("a", short("a")), lp.sample("b", short("b"))
    size = lp.call("size", lambda x, y: len(x) + len(y), a, b)
    lp.sample("seen", dist.Normal(float(size), 1.0), obs=torch.tensor(2.0))


def computed_of_no_latent() -> None:
    fact = lp.call("fact", str.upper, " ")
    a, b = lp.sample("a", short(f"a{fact}")), lp.sample("b", short(f"b{fact}"))
    lp.sample("seen a", goes_on(f"{a}{fact}"), obs=" a")
    lp.sample("seen b", goes_on(f"{b}{fact}"), obs=" a")


def joined_by_what_is_observed() -> None:
    a = lp.sample("a", short("a"))
    seen = lp.sample("seen", goes_on(f"{a}"), obs=" a")
    b = lp.sample("b", short(f"b{seen}"))
    lp.sample("then", goes_on(f"{b}"), obs=" a")


def numbers() -> None:
    p = lp.sample("p", dist.Beta(2.0, 2.0))
    q = lp.sample("q", dist.Beta(2.0, 2.0))
    z = lp.sample("z", short("a"))
    lp.sample("n", dist.Bernoulli(p), obs=torch.tensor(1.0))
    lp.sample("m", dist.Bernoulli(q if len(z) > 1 else 0.5), obs=torch.tensor(1.0))


@pytest.mark.parametrize(
    ("model", "groups"),
    [
        (pairs_apart, [{"z_0"}, {"z_1"}]),
        (joined_by_an_observation, [{"a", "b"}]),
        (joined_by_a_factor, [{"a", "b"}]),
        (chained, [{"a", "b"}]),
        (shown_together, [{"a"}, {"b"}]),
        (shown_together_by_what_is_shown, [{"a"}, {"b"}]),
        (computed_together, [{"a", "b"}]),
        (computed_of_no_latent, [{"a"}, {"b"}]),
        (joined_by_what_is_observed, [{"a"}, {"b"}]),
        (numbers, [{"p"}, {"q", "z"}]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_independent_groups_of_latents(model: Any, groups: list[set[str]]) -> None:
    assert lp.compile(model).graph.independent() == groups


def test_latents_above() -> None:
    def model() -> None:
        a = lp.sample("a", short("a"))
        b = lp.sample("b", short(f"{a}b"))
        c = lp.sample("c", short("b"))
        size = lp.call("size", len, b)
        lp.sample("seen", dist.Normal(float(size), 1.0), obs=torch.tensor(2.0))
        lp.factor("fits", -float(len(c)))
        lp.sample("apart", goes_on("a"), obs=" a")

    graph = lp.compile(model).graph
    assert {n: graph.latents_above(n) for n in graph} == {
        "a": set(),
        "b": {"a"},
        "c": set(),
        "size": {"a", "b"},
        "seen": {"a", "b"},
        "fits": {"c"},
        "apart": set(),
    }


def test_a_rare_number_leads_where_it_leads_under_every_seed() -> None:
    def model() -> None:
        k = lp.sample("k", dist.Bernoulli(torch.tensor(0.02)))
        n = lp.sample("n", dist.Categorical(torch.tensor([0.98, 0.02, 0.0])))
        z = lp.sample("z", short("ab" if k == 1 else "ba"))
        assert n < 2, "impossible"
        lp.sample("o", goes_on(f"{z}a" if n == 1 else f"{z}b"), obs="a")

    for seed in range(4):
        edges = lp.compile(model, seed=seed).graph.edges
        assert set(edges) == {("k", "z"), ("n", "o"), ("z", "o")}


def test_a_count_that_is_hardly_ever_small_leads_where_it_leads() -> None:
    def model() -> None:
        n = lp.sample("n", dist.Poisson(torch.tensor(9.0)))
        z = lp.sample("z", short("a"))
        lp.sample("o", goes_on(z if n == 0 else f"b{z}"), obs="a")
        lp.sample("end", goes_on("a" if n < 3 else "b"), obs="b")

    for seed in range(4):
        edges = lp.compile(model, seed=seed).graph.edges
        assert set(edges) == {("n", "o"), ("n", "end"), ("z", "o")}


@pytest.mark.parametrize("how", ["plate", "event"])
def test_each_of_many_numbers_at_one_site_leads_where_it_leads(how: str) -> None:
    def model() -> None:
        rare = torch.tensor([0.01, 0.5, 0.99, 0.02])
        if how == "plate":
            with pyro.plate("four", 4):
                on = lp.sample("on", dist.Bernoulli(rare))
        else:
            on = lp.sample("on", dist.Bernoulli(rare).to_event(1))
        for k in range(4):
            lp.sample(f"o{k}", goes_on("a" if on[k] else "b"), obs="b")

    for seed in range(3):
        edges = lp.compile(model, seed=seed).graph.edges
        assert set(edges) == {("on", f"o{k}") for k in range(4)}


@pytest.mark.parametrize("switch", ["choice", "number", "string"])
def test_what_a_latent_leads_to_in_one_branch_alone(switch: str) -> None:
    def model() -> None:
        if switch == "choice":
            is_on = lp.sample("n", lp.LMChoice(LM, "a", ["a", "b", "ab"])) == "ab"
        elif switch == "number":
            is_on = bool(lp.sample("n", dist.Bernoulli(torch.tensor(0.02))))
        else:
            is_on = "b" in lp.sample("n", short("a"))
        z = lp.sample("z", short("ab"))
        lp.sample("o", goes_on(f"{z}a" if is_on else "b"), obs="a")

    graph = lp.compile(model).graph
    assert set(graph.edges) == {("n", "o"), ("z", "o")}
    assert graph.independent() == [{"n", "z"}]


@pytest.mark.parametrize("at", ["before the first latent", "after it"])
def test_a_mistake_of_the_models_own_is_told_by_the_first_draw(at: str) -> None:
    runs = []

    def model() -> None:
        runs.append(at)
        if at == "before the first latent":
            lp.LMStrings(LM, "a")  # type: ignore[attr-defined]
        z = lp.sample("z", short("a"))
        lp.factor(f"f{z}", this_is_no_name)  # type: ignore[name-defined]  # noqa: F821

    error = AttributeError if at == "before the first latent" else NameError
    with pytest.raises(error, match=r"LMStrings|this_is_no_name"):
        lp.compile(model)
    assert len(runs) == 2  # with a placeholder, and with what is drawn


def test_a_name_that_a_latent_spells_is_no_mistake_of_the_model() -> None:
    def spelled(z: str) -> str:
        if not z.strip().isdigit() and set(z) - set("ab"):
            raise NameError(f"name {z.strip()!r} is not defined")
        return z

    def model() -> None:
        z = lp.sample("z", short("a", allow=["a", "b"]))
        lp.sample("w", goes_on(spelled(z)), obs="a")

    # Of made-up values few are names that are there.
    assert ("z", "w") in lp.compile(model).graph.edges


def test_what_is_computed_leaves_the_literals_of_a_branch_to_be_tried() -> None:
    lm = tiny_lm("ab 0123456789")

    def model() -> None:
        z = lp.sample("z", lp.LMString(lm, "a", max_tokens=4))
        n = lp.deterministic("words", len(z.split()))
        if "ate" in z:
            lp.sample("dish", lp.LMString(lm, "b", max_tokens=3))
        if n > 2:
            lp.sample("long", lp.LMString(lm, "b", max_tokens=3))
        lp.sample("o", lp.LMString(lm, f"{n}"), obs="a")

    program = lp.compile(model)
    assert set(program.latents) == {"z", "dish", "long"}
    assert set(program.graph.edges) == {
        ("z", "words"),
        ("z", "dish"),
        ("words", "long"),
        ("words", "o"),
    }


def test_a_graph_shows_as_its_text() -> None:
    graph = lp.compile(story, "a", " b").graph

    assert repr(graph) == str(graph)
    assert "LMString  &lt;- mood" in graph._repr_html_()


# -- loops without a last turn -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ends", "equals", "goes on", "stops", "number", "never"])
def test_a_loop_that_its_latents_end_is_compiled(how: str) -> None:
    runs = []

    def model() -> None:
        runs.append(how)
        text, turn = "a", 0
        while True:
            turn += 1
            if how == "number":
                if lp.sample(f"more{turn}", dist.Bernoulli(torch.tensor(0.5))) == 0:
                    break
                continue
            z = lp.sample(f"z{turn}", short(text))
            text += z
            choice = lp.LMChoice(LM, text, ["a", "b"])
            if how == "ends" and z.endswith("b"):
                break
            if how == "equals" and z[:1] == "1":
                break
            if how == "goes on" and lp.sample(f"c{turn}", choice) != "a":
                break
            if how == "stops" and lp.sample(f"c{turn}", choice) == "b":
                break
            # What no made-up value brings about: draws do.
            if how == "never" and sum(map(ord, z)) % 3 == 2 and z < "c":
                break
        lp.sample("o", goes_on(text), obs="a")

    program = lp.compile(model)
    assert len(runs) < 4000  # a few seconds at most, whatever the loop
    if how != "number":
        assert {("z1", "o")} <= set(program.graph.edges)
    assert len(program.graph) < 60
    found = lp.infer(program, num_samples=32, progress=False)
    assert found.log_evidence is not None and found.log_evidence > -50


def test_a_loop_that_a_number_ends_has_its_evidence() -> None:
    def model() -> None:
        turn = 0
        while lp.sample(f"more{turn}", dist.Bernoulli(torch.tensor(0.5))):
            turn += 1
        lp.sample("o", goes_on("a" * min(turn + 1, 3)), obs="a")

    found = lp.infer(model, num_samples=2000, seed=4, progress=False)
    own = [goes_on("a" * k).log_prob("a").exp() for k in (1, 2, 3)]
    exact = 0.5 * own[0] + 0.25 * own[1] + 0.25 * own[2]
    error = found.log_evidence_error
    assert found.log_evidence == pytest.approx(float(exact.log()), abs=4 * error)
    assert error < 0.05


class TooLong(BaseException):
    """No error, which the search for a structure would pass over."""


def test_a_loop_that_nothing_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "_MOST_SITES", 40)

    def model(turns: int | None) -> None:
        for turn in itertools.count() if turns is None else range(turns):
            lp.sample(f"z{turn}", short("a"))

    with pytest.raises(ValueError, match=r"met 40 latents in one run, 'z40' the last, and went on"):
        lp.compile(model, None)
    assert len(lp.compile(model, 40).latents) == 40


@pytest.mark.parametrize("how", ["letters", "texts", "list"])
def test_sites_that_no_number_tells_apart_are_followed_for_some_turns(how: str) -> None:
    met = 0

    def site(name: str, fn: Any) -> Any:
        nonlocal met
        met += 1
        if met > 100_000 or len(name) > 10_000:
            raise TooLong
        return lp.sample(name, fn)

    def tree(path: str) -> str:
        if site(f"leaf{path}", dist.Bernoulli(torch.tensor(0.7))):
            return site(f"word{path}", short("a"))
        return tree(f"{path}l") + tree(f"{path}r")

    def model() -> None:
        text = "a"
        if how == "letters":
            text = tree("")
        elif how == "list":
            if site("all", dist.Bernoulli(torch.tensor(0.01))):
                text = "".join(site(letter, short("a")) for letter in "abcdefghijkl")
        else:
            while "b" not in (z := site(f"after {text}", short(text))):
                text += z
        lp.sample("o", goes_on(text), obs="a")

    program = lp.compile(model)
    assert len(program.graph) < 60
    parents = set(program.graph.predecessors("o"))
    if how == "letters":
        assert {"leaf", "leafl", "leafr", "leafll", "word", "wordl", "wordr"} <= parents
    elif how == "list":
        assert parents == {"all", *"abcdefghijkl"}
    else:
        assert "after a" in parents
    found = lp.infer(program, num_samples=16, progress=False)
    assert found.log_evidence is not None and found.log_evidence > -50


def test_a_list_of_sites_that_a_rare_number_brings() -> None:
    names = [f"about {letter}" for letter in "abcdefghijklmnopqrstuvwx"]

    def model() -> None:
        text = "a"
        if lp.sample("all", dist.Bernoulli(torch.tensor(0.01))):
            text = "".join(lp.sample(name, lp.LMChoice(LM, "a", ["a", "b"])) for name in names)
        lp.sample("o", goes_on(text), obs="a")

    assert edges(model) >= {(name, "o") for name in ["all", *names]}


def test_a_list_of_choices_is_no_loop() -> None:
    names = [f"about {letter}" for letter in "abcdefghijklmnopqrstuvwx"]

    def model() -> None:
        found = [lp.sample(name, lp.LMChoice(LM, "a", ["a", "b"])) for name in names]
        lp.sample("o", goes_on("b" if "b" in found else "a"), obs="a")

    assert edges(model) == {(name, "o") for name in names}


def test_a_program_does_not_keep_the_runs_that_found_it() -> None:
    def model() -> None:
        z = lp.sample("z", short("a"))
        lp.sample("o", goes_on("a" if "b" in z else "b"), obs="a")

    def alive() -> int:
        gc.collect()
        return sum(type(o) is Execution for o in gc.get_objects())

    before = alive()
    program = lp.compile(model)
    assert alive() - before < 4 and not program.is_static


def test_a_tree_of_choices() -> None:
    def tree(path: str) -> str:
        if lp.sample(f"leaf{path}", lp.LMChoice(LM, "a", ["a", "b"])) == "a":
            return lp.sample(f"word{path}", short("a"))
        return tree(f"{path}l") + tree(f"{path}r")

    def model() -> None:
        lp.sample("o", goes_on(tree("")), obs="a")

    assert {("leaf", "o"), ("leafl", "o"), ("word", "o"), ("wordl", "o")} <= edges(model)


def test_a_loop_of_choices_that_no_number_tells_apart_comes_to_its_end() -> None:
    def model() -> None:
        path = ""
        while lp.sample(f"more{path}", lp.LMChoice(LM, "a", ["a", "b"])) == "a":
            path += "l"
        lp.sample("o", goes_on("a" if path else "b"), obs="a")

    assert ("more", "o") in edges(model)


def test_a_distribution_that_tells_no_support_and_no_shape() -> None:
    class Two(dist.Distribution):
        def sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return torch.randint(2, ())

        __call__ = sample

        def log_prob(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return torch.tensor(0.5).log()

    def model() -> None:
        lp.sample("o", goes_on("a" if lp.sample("n", Two()) else "b"), obs="a")

    assert edges(model) == {("n", "o")}


@pytest.mark.parametrize("how", ["cache", "argument"])
def test_a_cache_that_outlives_a_run_is_told(how: str) -> None:
    @functools.cache
    def cached(name: str) -> str:
        return lp.sample(name, short("a"))

    def model(known: dict[str, str]) -> None:
        if how == "cache":
            text = cached("z")
        elif "z" in known:
            text = known["z"]
        else:
            text = known["z"] = lp.sample("z", short("a"))
        lp.sample("o", goes_on(text), obs="a")

    known: dict[str, str] = {}
    with pytest.raises(ValueError, match=r"did not meet site 'z'; .* must be made anew within"):
        lp.compile(model, known)
    # What the error left there is no text.
    with pytest.raises(ValueError, match=r"'o' holds what site 'z' was .* must be made anew"):
        lp.compile(model, known)


def test_a_long_program_that_looks_at_its_end_has_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery, "_MOST_MADE_UP", 8)

    def model() -> None:
        on = [lp.sample(f"on{k}", dist.Bernoulli(torch.tensor(0.5))) for k in range(12)]
        z = lp.sample("z", short("a"))
        lp.sample("o", goes_on("a" if "b" in z or all(on) else "b"), obs="a")

    assert len(lp.compile(model).latents) == 13


def test_what_changes_a_placeholder_unseen_is_no_memory() -> None:
    def model() -> None:
        z = lp.sample("words", short("a"))
        lp.sample("o", goes_on(re.sub("w", "b", z)), obs="a")

    assert edges(model) == {("words", "o")}


def test_a_cache_within_the_model_is_no_memory() -> None:
    def model() -> None:
        @functools.cache
        def cached(name: str) -> str:
            return lp.sample(name, short("a"))

        lp.sample("o", goes_on(cached("z") + cached("z")), obs="a")

    assert edges(model) == {("z", "o")}
