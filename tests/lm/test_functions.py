"""Functions by their content."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from langppl.lm.functions import content_of, is_users_class, module_of
from langppl.lm.reads import look

LETTERS = {"a", "b"}


def helper(text: str) -> bool:
    return text in LETTERS


def made(letters: Any, strict: bool = True) -> dict[str, Callable[..., Any]]:
    def inner(text: str) -> bool:
        return text in letters

    return {
        "closure": lambda t: t in letters,
        "default": lambda t, own=letters: t in own,
        "keyword": lambda t, *, own=letters: t in own,
        "nested": lambda t: strict and inner(t),
        "partial": functools.partial(lambda own, t: t in own, letters),
        "builtin": letters.__contains__,
        "inside": lambda t: any((lambda c: c in letters)(c) for c in t),
    }


@pytest.mark.parametrize("kind", made("ab"))
@pytest.mark.parametrize("kept", [set, tuple, frozenset, list])
def test_what_does_the_same_is_equal(kind: str, kept: Callable[[str], Any]) -> None:
    one, two, other = (content_of(made(kept(t))[kind]) for t in ("ab", "ab", "ac"))
    assert one == two and hash(one) == hash(two)
    assert one != other


def test_code_tells() -> None:
    assert content_of(lambda t: "a" in t) != content_of(lambda t: "b" in t)
    assert content_of(made("ab")["nested"]) != content_of(made("ab", strict=False)["nested"])


def test_globals_are_looked_up_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def filters() -> list[Callable[[str], bool]]:
        return [lambda t: t in LETTERS, lambda t: helper(t)]

    before = [content_of(f) for f in filters()]
    assert [content_of(f) for f in filters()] == before
    monkeypatch.setitem(globals(), "LETTERS", {"a"})
    after = [content_of(f) for f in filters()]
    assert after[0] != before[0]
    monkeypatch.setitem(globals(), "helper", lambda text: False)
    assert content_of(filters()[1]) != before[1]


def test_objects_count_as_themselves_and_circles_end() -> None:
    one, two = object(), object()
    assert content_of(one) == content_of(one) != content_of(two)

    def loop(n: int) -> int:
        return loop(n - 1) if n else 0

    assert content_of(loop) == content_of(loop)
    knot: list[Any] = []
    knot.append(knot)
    assert content_of(knot) == content_of(knot)


def test_a_class_whose_module_is_a_descriptor() -> None:
    class Function:
        """As Cython 3.1 makes them."""

        def __call__(self, text: str) -> bool:
            return text in LETTERS

    assert module_of(Function) == __name__ and is_users_class(Function)
    setattr(Function, "__module__", property(lambda self: "library"))  # noqa: B010
    assert module_of(Function) == "" and not is_users_class(Function)
    compiled = Function()
    assert look(lambda t: compiled(t)).content is None
