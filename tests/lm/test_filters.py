"""Predicates of `allow` and `ban` that change, and what they say of errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import langppl as lp
from langppl.lm.reads import look
from langppl.program.execution import draw_prior
from langppl.testing import tiny_lm

LM = tiny_lm("ab. ", merged=["ab", "b.", ".."], split=["é"])

BANNED: Any = set()
WORDS: list[str] = []
TABLE: dict[str, bool] = {}


class Known:
    words: list[str] = []  # noqa: RUF012 - as careless users write it


def in_set(text: str) -> bool:
    return text in BANNED


def helper(text: str) -> bool:
    return any(w == text for w in WORDS)


def by_helper(text: str) -> bool:
    return helper(text)


def in_class(text: str) -> bool:
    return text in Known.words


class Ban:
    def __init__(self) -> None:
        self.own: dict[str, set[str]] = {"now": set()}

    def __call__(self, text: str) -> bool:
        return text in self.own["now"]

    def method(self, text: str) -> bool:
        return self(text)


class Slotted:
    __slots__ = ("own",)

    def __init__(self) -> None:
        self.own: tuple[str, ...] = ()

    def __call__(self, text: str) -> bool:
        return text in self.own


class Globally:
    def __call__(self, text: str) -> bool:
        return text in BANNED


def local() -> tuple[Callable[[str], bool], Callable[[], None]]:
    words = np.array([""], dtype="<U2")

    def change() -> None:
        words[0] = "a"

    return lambda t: t in words, change


def by_iterator() -> tuple[Callable[[str], bool], Callable[[], None]]:
    """What a generator keeps is not seen."""
    own: dict[str, str] = {"now": ""}

    def forever() -> Iterator[str]:
        while True:
            yield own["now"]

    words = forever()
    return lambda t: t == next(words), lambda: own.update(now="a")


BAN, SLOTTED = Ban(), Slotted()
CHANGES: dict[str, tuple[Callable[[str], bool], Callable[[], None]]] = {
    "set": (in_set, lambda: BANNED.add("a")),
    "list of a helper": (by_helper, lambda: WORDS.append("a")),
    "dict": (lambda t: t in TABLE, lambda: TABLE.update(a=True)),
    "class": (in_class, lambda: Known.words.append("a")),
    "object": (BAN, lambda: BAN.own["now"].add("a")),
    "method": (BAN.method, lambda: BAN.own["now"].add("a")),
    "slots": (SLOTTED, lambda: setattr(SLOTTED, "own", ("a",))),
    "object and global": (Globally(), lambda: BANNED.add("a")),
    "array": local(),
    "unseen": by_iterator(),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    for one in (BANNED, WORDS, TABLE, Known.words, BAN.own["now"]):
        one.clear()
    SLOTTED.own = ()


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("name", ["ban", "allow"])
@pytest.mark.parametrize("anew", [True, False])
def test_a_predicate_that_has_changed_has_another_mask(kind: str, name: str, anew: bool) -> None:
    predicate, change = CHANGES[kind]
    if kind in ("array", "unseen"):
        predicate, change = {"array": local, "unseen": by_iterator}[kind]()
    judge = predicate if name == "ban" else lambda t: not predicate(t)

    def string() -> lp.LMString:
        return lp.LMString(LM, "a", max_tokens=2, **{name: judge})

    fn = string()
    assert fn.why_impossible("a") is None and float(fn.log_prob("a")) > -np.inf
    change()
    fn = string() if anew else fn
    assert "banned or not allowed" in str(fn.why_impossible("a"))
    assert float(fn.log_prob("a")) == -np.inf


def test_so_does_a_grammar_with_one() -> None:
    fn = lp.LMString(LM, "a", max_tokens=3, grammar=lp.regex("[ab]+"), ban=in_set)
    assert fn.why_impossible("a") is None
    BANNED.add("a")
    assert "banned" in str(fn.why_impossible("a"))


ASKED: list[str] = []
MEMORY: dict[str, bool] = {}


def asked(text: str) -> bool:
    ASKED.append(text)
    return MEMORY.setdefault(text, "." in text)


def test_tokens_are_asked_about_once_while_nothing_changes() -> None:
    """Also by a predicate that keeps a memory, and a log of what it is asked."""

    def model() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2, ban=asked))
        lp.sample("y", lp.LMString(LM, f"a{z}"), obs="ab")

    ASKED.clear()
    lp.infer(model, num_samples=30, progress=False)
    assert len(ASKED) == int((~LM.vocabulary.special).sum())


def test_what_cannot_be_seen_is_asked_once_in_each_run() -> None:
    source = iter(lambda: "", None)

    def ban(text: str) -> bool:
        ASKED.append(text)
        return text == next(source)

    def model() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2, ban=ban))
        lp.sample("y", lp.LMString(LM, f"a{z}"), obs="ab")

    program = lp.compile(model)
    ASKED.clear()
    program.run([lambda n, fn, _: draw_prior(fn, (0, n))] * 9)
    assert 0 < len(ASKED) <= 2 * int((~LM.vocabulary.special).sum())


def test_a_large_set_is_looked_at_by_content() -> None:
    words = {f"word {k}" for k in range(2_000)}
    fn = lp.LMString(LM, "a", max_tokens=2, ban=lambda t: t in words)
    assert fn.why_impossible("a") is None
    words.remove("word 0")
    words.add("a")
    assert "banned" in str(fn.why_impossible("a"))


def test_libraries_are_not_looked_into() -> None:
    """`re` keeps what it has compiled, which says nothing of a predicate."""

    def ban(text: str) -> bool:
        return re.fullmatch(r"a+", text) is not None

    before = look(ban)
    re.compile("something else that is new")
    assert before.content is not None and look(ban) == before
    assert before.parts < 20


@pytest.mark.parametrize("name", ["ban", "allow"])
def test_an_error_of_a_predicate_names_the_site_the_argument_and_the_token(name: str) -> None:
    def model() -> None:
        lp.sample("z", lp.LMString(LM, "a", max_tokens=2, **{name: lambda t: 1 / (len(t) - 2)}))

    with pytest.raises(ValueError, match=r"site 'z': .*division by zero.* of the token 'ab'") as e:
        lp.infer(model, num_samples=2, progress=False)
    assert f"{name}=<function" in str(e.value) and "ZeroDivisionError" in str(e.value)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"ban": "xyz"}, "site 'z': ban='xyz' is in no single token"),
        ({"allow": lambda t: False}, "site 'z': allow=.* leaves no token"),
        ({"stop": "x"}, "site 'z': stop='x' can never be produced"),
    ],
)
def test_errors_of_rules_name_the_site(rules: dict[str, Any], says: str) -> None:
    def model() -> None:
        lp.sample("z", lp.LMString(LM, "a", max_tokens=2, **rules))

    with pytest.raises(ValueError, match=says):
        lp.infer(model, num_samples=2, progress=False)
