"""What a guide reads before a latent."""

from __future__ import annotations

import contextlib
from typing import Any

import pyro.distributions as dist
import pytest

from langppl import LMString, Text, compile, sample
from langppl.guides.context import (
    ContextInfo,
    context_ids,
    context_info,
    default_context,
    observations_first,
)
from langppl.program import Program
from langppl.program.execution import Execution, given, run_many, run_once
from langppl.testing import tiny_lm

LM = tiny_lm("abcdeo ._\n:")


def at(program: Program, site: str, **values: str) -> tuple[Any, Execution]:
    """A latent's distribution and the execution so far, when a guide is asked for it."""
    found: list[tuple[Any, Execution]] = []

    class Stop(Exception):
        pass

    def choose(name: str, fn: Any, execution: Execution) -> Any:
        if name == site:
            found.append((fn, execution))
            raise Stop
        return given({k: Text(v) for k, v in values.items()})(name, fn, execution)

    def task() -> None:
        with contextlib.suppress(Stop):
            run_once(program.model, program.args, choose)

    run_many([task], program.memo)
    return found[0]


def text(program: Program, site: str, **values: str) -> Any:
    fn, execution = at(program, site, **values)
    return default_context(context_info(program, site, fn, execution))


def infilling(beginning: str, ending: str) -> None:
    middle = sample("middle", LMString(LM, beginning, max_tokens=3))
    sample("ending", LMString(LM, f"{beginning}{middle}"), obs=ending)


def chain() -> None:
    one = sample("one", LMString(LM, "a", max_tokens=2))
    two = sample("two", LMString(LM, f"b{one}", max_tokens=2))
    sample("seen", LMString(LM, f"{one} {two}"), obs=" c")
    sample("apart", LMString(LM, "d"), obs="e")


def test_observations_first_shows_them_without_their_prompts() -> None:
    program = compile(infilling, "ab.", " de")
    fn, execution = at(program, "middle")
    assert observations_first(context_info(program, "middle", fn, execution)) == "de\n\nab."
    info = ContextInfo("z", "b", (("a ___", " c"), ("", "n = 2")), {}, (), (("m", "1"),))
    assert observations_first(info) == "c\nn = 2\nm = 1\n\nb"
    chat = [{"role": "user", "content": "go on"}]
    shown = observations_first(ContextInfo("z", chat, (("a ___", " c"),), {}, ()))
    assert shown == [{"role": "user", "content": "c\n\ngo on"}]
    assert observations_first(ContextInfo("z", "b", (), {}, ())) == "b"


def test_infilling_shows_the_ending_after_a_blank() -> None:
    assert text(compile(infilling, "ab.", " de"), "middle") == "ab. ___ de\n\nab."


def test_a_chain_shows_what_is_drawn_and_leaves_the_rest_blank() -> None:
    program = compile(chain)
    assert text(program, "one") == " ___  ___ c\n\na"
    assert text(program, "two", one="e") == "e  ___ c\n\nbe"


def test_without_observations_it_is_the_site_s_own_prompt() -> None:
    def model() -> None:
        sample("z", LMString(LM, "ab", max_tokens=2))
        sample("apart", LMString(LM, "d"), obs="e")

    assert text(compile(model), "z") == "ab"


def test_an_observed_number_is_shown() -> None:
    def model() -> None:
        z = sample("z", LMString(LM, "ab", max_tokens=2))
        sample("n", dist.Normal(float(len(z)), 1.0), obs=2.5)

    program = compile(model)
    fn, execution = at(program, "z")
    info = context_info(program, "z", fn, execution)
    # The length of a marker is not that of a value, so the program is not static; the number and
    # its name are the same in every run.
    assert info.observations in ((("", "n = 2.5"),), ())
    assert info.prompt == "ab"


SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "ab"}
SHOWN = {"role": "user", "content": "a ___ b"}
BEFORE = {"role": "user", "content": "a ___ b\n\nab"}
ASSISTANT = {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        ([USER], [BEFORE]),
        ([SYSTEM, USER], [SYSTEM, BEFORE]),
        ([USER, ASSISTANT, USER], [BEFORE, ASSISTANT, USER]),
        ([ASSISTANT], [SHOWN, ASSISTANT]),
        ([SYSTEM], [SYSTEM, SHOWN]),
    ],
)
def test_a_chat_shows_the_observations_in_the_users_first_message(
    chat: list[dict[str, str]], expected: list[dict[str, str]]
) -> None:
    """Templates may know no system's message, and none takes two."""
    info = ContextInfo("z", chat, (("a ___", " b"),), {}, ())
    assert default_context(info) == expected


def test_a_function_of_the_user_s() -> None:
    program = compile(infilling, "ab.", " de")
    fn, execution = at(program, "middle")
    seen: list[ContextInfo] = []

    def context(info: ContextInfo) -> str:
        seen.append(info)
        return f"{info.args[1]}:{info.prompt}"

    found = context_ids(program, "middle", fn, execution, context, LM)
    assert found == LM.encode_prompt(" de:ab.")
    (info,) = seen
    assert (info.site, info.prompt, info.args) == ("middle", "ab.", ("ab.", " de"))
    assert info.observations == (("ab. ___", " de"),)
    assert info.values == {}


def test_observations_have_their_sites_names() -> None:
    program = compile(chain)
    info = context_info(program, "two", *at(program, "two", one="ab"))
    assert info.observed == {"seen": " c"}
    program = compile(infilling, "ab", " a")
    info = context_info(program, "middle", *at(program, "middle"))
    assert info.observed == {"ending": " a"}
