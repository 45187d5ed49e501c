"""Strings of other classes are read by their content, whatever they print."""

from __future__ import annotations

import enum
import json
import math

import pytest

import langppl as lp
from langppl.program.keys import hashable
from langppl.records import encode
from langppl.testing import tiny_lm
from langppl.values import plain

pytestmark = pytest.mark.filterwarnings("ignore::langppl.distributions.JoinWarning")

LM = tiny_lm("abcSE.:AB")


class SE(str, enum.Enum):
    A = "a"
    B = "b"


TEXTS = {"enum": [SE.A, SE.B], "plain": ["a", "b"]}


def log_prob(prompt, value="b.", **rules):
    return float(lp.LMString(LM, prompt, **{"max_tokens": 3, **rules}).log_prob(value))


def test_the_members_of_an_enum_are_a_choice_among_their_values():
    own, expected = lp.LMChoice(LM, "c", list(SE)), lp.LMChoice(LM, "c", ["a", "b"])
    assert str(SE.A) == "SE.A"
    assert float(own.log_prob(SE.A)) == float(expected.log_prob("a"))
    assert float(own.log_prob("b")) == float(expected.log_prob(SE.B))
    assert {type(o) for o in own.options} == {str}
    assert own.draw((1,))[0] == expected.draw((1,))[0]


def test_prompts_are_read_by_content():
    assert log_prob(SE.A) == log_prob("a") != log_prob("SE.A")
    assert LM.encode_prompt(SE.A) == LM.encode_prompt("a")
    chat = [{"role": SE.A, "content": SE.B}]
    (message,) = lp.LMString(LM, chat, max_tokens=3).prompt
    assert {type(v) for v in message.values()} == {str}
    assert lp.LMString(LM, SE.A, max_tokens=3).with_prompt(SE.B).prompt == "b"


def test_rules_are_read_by_content():
    for name in ("stop", "ban", "allow"):
        for given in (SE.B, [SE.B]):
            rules = lp.LMString(LM, "a", max_tokens=3, **{name: given}).rules
            assert getattr(rules, name) == ("b",)
            assert type(getattr(rules, name)[0]) is str
    assert log_prob("c", "a", grammar=lp.one_of(list(SE))) > -math.inf
    assert lp.one_of(list(SE)).texts == ("a", "b")
    assert lp.regex(SE.A) == lp.regex("a")


def model(a, b, seen):
    z = lp.sample("z", lp.LMChoice(LM, a, [a, b]))
    lp.sample("w", lp.LMString(LM, b + z, max_tokens=2, stop=b))
    lp.sample("x", lp.LMChoice(LM, "c" + z, [a, b]), obs=seen)
    return lp.deterministic("d", a)


@pytest.mark.parametrize("method", ["importance", "smc", "mh", "exact"])
@pytest.mark.parametrize("guide", ["prior", "prompted"])
def test_every_method_takes_them(method, guide):
    options = {"seed": 3} if method == "exact" else {"seed": 3, "num_samples": 8}
    if method != "exact":
        options["guide"] = guide

    def infer(texts):
        return lp.infer(model, *texts, texts[0], method=method, progress=False, **options)

    own, expected = infer(TEXTS["enum"]), infer(TEXTS["plain"])
    for name in ("z", "w", "d"):
        assert dict(own.probabilities(name)) == dict(expected.probabilities(name))
    if method != "mh":
        assert own.log_evidence == expected.log_evidence


def test_given_values_are_read_by_content():
    def observed(a):
        return lp.sample("x", lp.LMChoice(LM, "c", ["a", "b"]), obs=a)

    program = lp.compile(observed, SE.A)
    assert type(program.sites["x"].value) is str
    other = program.observing({"x": SE.B})
    assert type(other.sites["x"].value) is str
    assert other.shown_args == ("b",)
    conditioned = lp.condition(
        lambda: lp.sample("x", lp.LMChoice(LM, "c", ["a", "b"])), {"x": SE.A}
    )
    assert str(lp.compile(conditioned).sites["x"].value) == "a"
    joint = lp.compile(model, "a", "b", "a").log_joint
    assert float(joint({"z": SE.A, "w": SE.B})) == float(joint({"z": "a", "w": "b"}))


def test_contexts_are_read_by_content():
    own, expected = (
        lp.infer(
            *(model, "a", "b", "a"),
            guide=lp.PromptedGuide(lambda info, text=text: text),
            num_samples=4,
            progress=False,
        )
        for text in (SE.A, "a")
    )
    assert own.log_evidence == expected.log_evidence


def test_values_are_kept_by_content():
    assert plain(SE.A) == "a"
    assert type(plain(SE.A)) is str
    assert json.dumps(encode({SE.A: SE.B})) == '{"dict": {"a": "b"}}'
    assert str(lp.Text(SE.A)) == "a"


def test_a_tool_that_prints_its_argument_tells_an_enum_from_its_value():
    assert hashable(SE.A) != hashable("a")
    assert hashable(lp.Text("a")) == hashable("a")
