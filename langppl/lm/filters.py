"""Which tokens `allow` and `ban` let through, and whether they still let the same through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from langppl.lm.nested import opened
from langppl.lm.reads import CHEAP, Look, look
from langppl.lm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from langppl.lm.rules import BoundRules, StringRules


def let_through(rules: StringRules, vocabulary: Vocabulary) -> NDArray[Any]:
    """The tokens that a string's `allow` and `ban` let through, bool [vocabulary].

    Raises:
        ValueError: if they leave no token, a ban is in no token, or a predicate raises an error.
    """
    keep = np.ones(vocabulary.size, dtype=bool)
    ordinary = [int(i) for i in np.flatnonzero(~vocabulary.special)]
    if callable(rules.allow):
        keep[ordinary] = _answers("allow", rules.allow, vocabulary, ordinary)
    elif rules.allow:
        pieces = tuple(s.encode("utf-8") for s in rules.allow)
        keep[ordinary] = [_made_of(vocabulary.bytes[i], pieces) for i in ordinary]
    if not keep[ordinary].any():
        raise ValueError(f"allow={rules.allow!r} leaves no token of this LM")
    if callable(rules.ban):
        keep[ordinary] &= ~_answers("ban", rules.ban, vocabulary, ordinary)
    elif rules.ban:
        for text in rules.ban:
            data = text.encode("utf-8")
            hit = np.array([data in vocabulary.bytes[i] for i in ordinary])
            if not hit.any():
                raise ValueError(
                    f"ban={text!r} is in no single token of this LM, and a ban acts on "
                    "tokens; ban a part of it, or condition on the whole string with factor()"
                )
            keep[ordinary] &= ~hit
    if not keep[ordinary].any():
        raise ValueError(f"ban={rules.ban!r} leaves no token of this LM")
    return keep


def _answers(
    name: str, predicate: Callable[[str], bool], vocabulary: Vocabulary, tokens: list[int]
) -> NDArray[Any]:
    found = np.zeros(len(tokens), dtype=bool)
    for at, token in enumerate(tokens):
        text = vocabulary.text(token)
        try:
            found[at] = bool(predicate(text))
        except Exception as error:
            raise ValueError(
                f"{name}={predicate!r} raised {type(error).__name__}: {error}, of the token "
                f"{text!r}; the predicate is asked about every token of the LM, and must answer "
                "True or False"
            ) from error
    return found


def _made_of(data: bytes, pieces: tuple[bytes, ...]) -> bool:
    """Whether `data` is a concatenation of `pieces`."""
    reached = [True] + [False] * len(data)
    for at in range(len(data)):
        if reached[at]:
            for piece in pieces:
                if data.startswith(piece, at):
                    reached[at + len(piece)] = True
    return reached[-1]


class Watched:
    """A string's rules over an LM's tokens, and what their predicates read when they were made.

    A predicate may read what changes: a set of the module's, an object's attributes. Its mask holds
    as long as nothing of that has; where not all of it can be seen, every token is asked about
    again, and where it is much, it is looked at again, once in each run of a scheduler.

    Attributes:
        bound: the rules.
    """

    def __init__(self, bound: BoundRules) -> None:
        self.bound = bound
        # After the mask was made: a predicate that remembers has changed what it reads by then.
        self._read = _looks(bound.rules)

    def holds(self, rules: StringRules) -> bool:
        """Whether equal rules would have the same mask now."""
        if not self._read:
            return True
        is_cheap = all(r.content is not None and r.parts <= CHEAP for r in self._read)
        looked = _looked.get()
        if not is_cheap and looked is not None and id(self) in looked:
            return True
        now = _looks(rules)
        if any(r.content is None for r in now) or now != self._read:
            vocabulary = self.bound.vocabulary
            allowed = ~vocabulary.special & let_through(rules, vocabulary)
            if not np.array_equal(allowed, self.bound.allowed):
                return False
            self._read = _looks(rules)
        if looked is not None:
            looked[id(self)] = self
        return True


def _looks(rules: StringRules) -> list[Look]:
    return [look(f) for f in (rules.allow, rules.ban) if callable(f)]


_looked: ContextVar[dict[int, Any] | None] = ContextVar("langppl_looked", default=None)


@contextlib.contextmanager
def looking_once() -> Iterator[None]:
    """Within the block, predicates that read much, or what cannot be seen, are asked once."""
    with opened(_looked):
        yield
