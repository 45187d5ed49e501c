"""What tools' arguments are told apart by."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch

import langppl as lp
from langppl.program.keys import hashable, shortened, size_of
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)


@dataclasses.dataclass
class Hidden:
    shown: int
    text: str = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Frozen:
    number: float
    note: object = dataclasses.field(compare=False)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, content: Any) -> None:
        self.content = content

    def __repr__(self) -> str:
        return "Unhashable()"


class Slotted:
    __slots__ = ("content",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, content: Any) -> None:
        self.content = content

    def __repr__(self) -> str:
        return "Slotted()"


class Inner:
    def __init__(self, content: Any) -> None:
        self.content = content


class Named(dict[str, int]):
    name = ""


def named(name: str) -> Named:
    found = Named(a=1)
    found.name = name
    return found


def frame(last: int) -> pd.DataFrame:
    return pd.DataFrame({"n": [*range(99), last, *range(99)], "s": ["a"] * 199})


UNEQUAL: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "frames": (lambda: frame(1), lambda: frame(2)),
    "series": (lambda: frame(1)["n"], lambda: frame(2)["n"]),
    "dataclasses": (lambda: Hidden(1, "a"), lambda: Hidden(1, "b")),
    "frozen": (lambda: Frozen(0.0, 1), lambda: Frozen(-0.0, 1)),
    "objects": (lambda: Unhashable("a"), lambda: Unhashable("b")),
    "slots": (lambda: Slotted("a"), lambda: Slotted("b")),
    "objects in objects": (lambda: Unhashable(Inner([1])), lambda: Unhashable(Inner([2]))),
    "functions in objects": (
        lambda: Unhashable(lambda t: t + "a"),
        lambda: Unhashable(lambda t: t + "b"),
    ),
    "sets": (lambda: {1, (2, 0.0)}, lambda: {1, (2, -0.0)}),
    "sets of ones": (lambda: {1}, lambda: {True}),
    "deques": (lambda: deque([1, 2]), lambda: deque([1, 3])),
    "attributes": (lambda: named("a"), lambda: named("b")),
    "types of tensors": (lambda: torch.ones(2), lambda: torch.ones(2, dtype=torch.float64)),
    "bits of tensors": (lambda: torch.tensor(0.0), lambda: torch.tensor(-0.0)),
    "shapes": (lambda: torch.ones(2, 0), lambda: torch.ones(0, 2)),
    "zeros": (lambda: 0.0, lambda: -0.0),
    "zeros in lists": (lambda: [1, 0.0], lambda: [1, -0.0]),
    "numpy numbers": (lambda: np.float32(0.0), lambda: np.float32(-0.0)),
    "object arrays": (
        lambda: np.array([1, "a"], dtype=object),
        lambda: np.array([1, "b"], dtype=object),
    ),
    "masks": (
        lambda: np.ma.array([1, 2], mask=[False, True]),
        lambda: np.ma.array([1, 2], mask=[False, False]),
    ),
}


@pytest.mark.parametrize("kind", UNEQUAL)
def test_content_tells(kind: str) -> None:
    one, other = UNEQUAL[kind]
    calls: list[Any] = []

    def model() -> None:
        z = lp.sample("z", lp.LMChoice(LM, "a", ["a", "b"]))
        lp.call("tool", calls.append, (one if z == "a" else other)())

    program = lp.compile(model)
    program.log_joint([{"z": "a"}, {"z": "b"}, {"z": "a"}])
    assert len(calls) == 2
    assert hash(hashable(one())) == hash(hashable(one()))


@pytest.mark.parametrize("made", [math.nan, torch.tensor([1.0, math.nan]), [np.float64("nan")]])
def test_nan_equals_itself(made: Any) -> None:
    again = torch.tensor([1.0, math.nan]) if isinstance(made, torch.Tensor) else type(made)
    if not isinstance(again, torch.Tensor):
        again = float("nan") if again is float else [np.float64("nan")]
    assert hashable(made) == hashable(again)


def test_what_cannot_be_known_equals_itself_alone() -> None:
    one, two = (Unhashable(threading.Lock()) for _ in range(2))
    assert hashable(one) == hashable(one) != hashable(two)
    large, copy = (Unhashable([[i] for i in range(30_000)]) for _ in range(2))
    assert hashable(large) == hashable(large) != hashable(copy)
    meta = torch.empty(2, device="meta")
    assert hashable(meta) == hashable(meta) != hashable(torch.empty(2, device="meta"))


def test_what_holds_itself_has_a_key() -> None:
    knot: list[Any] = [1]
    knot.append(knot)
    holder = Unhashable(None)
    holder.content = holder
    assert hashable(knot) == hashable(knot)
    assert hashable(holder) == hashable(holder)


@pytest.mark.parametrize(
    "tool", [lambda z: (c for c in z), lambda z: iter([z]), lambda z: map(len, z)]
)
def test_a_tool_that_returns_an_iterator_is_refused(tool: Callable[[str], Any]) -> None:
    def model() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        lp.factor("f", -float(len(list(lp.call("parts", tool, z)))))

    with pytest.raises(
        TypeError, match=r"call 'parts': the tool .*lambda.* read only once.*a list"
    ):
        lp.infer(model, num_samples=2, progress=False)


def test_a_dataclass_that_compares_by_hand_is_compared_so() -> None:
    @dataclasses.dataclass
    class Named:
        x: str
        cache: int

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Named) and self.x == other.x

        def __hash__(self) -> int:
            return hash(self.x)

    assert hashable(Named("a", 1)) == hashable(Named("a", 2))
    assert hashable(Named("a", 1)) != hashable(Named("b", 1))


@pytest.mark.parametrize("shape", [[1], [1, 1], [0], [2, 1]])
def test_numbers_that_were_expanded_have_a_content(shape: list[int]) -> None:
    def made() -> torch.Tensor:
        return torch.tensor(0.5).expand(shape)

    assert hashable(made()) == hashable(made()) == hashable(made().clone())

    def model() -> None:
        z = lp.sample("z", lp.LMChoice(LM, "a", ["a", "b"]))
        lp.sample("x", dist.Normal(float(len(z)), 1.0).expand([1]).to_event(1))

    assert lp.compile(model).latents == ("z", "x")


@pytest.mark.parametrize(
    ("value", "other"),
    [
        ("a" * 100, "a" * 101),
        (["a" * 100, 1], ["a" * 100, 2]),
        (("a" * 100, LM), ("a" * 99, LM)),
        (list(range(100)), list(range(101))),
        (torch.zeros(100), torch.ones(100)),
        ({"k": "a" * 100}, {"k": "b" * 100}),
        ("a", ["a"]),
        (1, True),
        (object(), object()),
    ],
)
def test_shortened_keys_tell_the_same_apart(value: Any, other: Any) -> None:
    first, again, second = (shortened(hashable(v)) for v in (value, value, other))
    assert first == again and hash(first) == hash(again)
    assert first != second
    assert size_of(first) < 1000


def test_sizes_are_those_of_what_values_hold() -> None:
    assert 1000 <= size_of("a" * 1000) < 1100
    assert 8000 <= size_of(torch.zeros(1000, dtype=torch.float64)) < 8300
    assert 8000 <= size_of(np.zeros(1000)) < 8300 and 8000 <= size_of(np.zeros(2000)[::2]) < 8300
    text = "a" * 1000
    assert size_of([text, text]) < 1300 and 2000 < size_of({"k": text, "l": [text + "b"]}) < 3000
    own: list[Any] = []
    own.append(own)
    assert size_of(own) < 200
