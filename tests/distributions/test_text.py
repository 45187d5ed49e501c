from __future__ import annotations

import copy
import pickle

import pytest

from langppl.distributions import Text


def test_ids_stay_through_copies() -> None:
    text = Text("ab", [3, 4], "tok")
    for other in (copy.copy(text), copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert (other, other.ids, other.tokenizer) == ("ab", (3, 4), "tok")
    (kept,) = copy.deepcopy([text])
    assert kept.ids == (3, 4)


@pytest.mark.parametrize("plain", [Text("ab", [3])[:], Text("a", [3]) + "b", f"{Text('ab', [3])}"])
def test_operations_give_plain_text(plain: str) -> None:
    assert plain == "ab" and not isinstance(plain, Text)


def test_equality_is_of_the_text() -> None:
    assert Text("ab", [3, 4]) == Text("ab", [5]) == "ab"
    assert len({Text("ab", [3, 4]), Text("ab", [5]), "ab"}) == 1
