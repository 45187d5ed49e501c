"""Which tokens are legal, and which end a string, under its stops and filters.

A step depends on how much of a stop the text ends with, on the character that it ends inside of, on
whether it may end, and on how few actions are left. Whatever else tells strings apart, lengths
among it, chooses among a layout's steps and makes none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from langppl.lm.filters import let_through
from langppl.lm.vocabulary import Vocabulary, utf8_fragment

if TYPE_CHECKING:
    from langppl.lm.rules import StringRules

_NO_TEXT = b"\xff"  # in no stop, which is UTF-8

NEVER = 99
"""More tokens than any UTF-8 fragment needs."""

Kind = tuple[bool, int, bytes, bytes]
"""Whether the text may end, how few actions are left, and its `State.tail` and `State.fragment`."""


@dataclass(frozen=True, eq=False)
class Step:
    """The legal actions of a state.

    Attributes:
        legal: bool tensor [vocabulary]; end tokens included where the text may end.
        kept: for each legal token that completes a stop, the bytes up to and including the stop.
        groups: for each such text, the ids that make it one ending action.
        end_ids: the end tokens, empty where the text may not end.
        canonical: ids of the canonical ending action, empty where no string can end: the first
            stop that one token can complete, else the end of the text.
        canonical_token: the id that stands for it in a value, or None for the end of the text.
        is_dead: whether nothing is legal.
        name: under a grammar, a digest of all of this: such steps are made anew when they were
            forgotten. None for a step that lives as long as its rules.
    """

    legal: torch.Tensor
    kept: dict[int, bytes]
    groups: dict[bytes, torch.Tensor]
    end_ids: torch.Tensor
    canonical: torch.Tensor
    canonical_token: int | None
    is_dead: bool
    name: bytes | None = None
    _moved: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def legal_array(self) -> NDArray[Any]:
        """`legal` in NumPy, which gives single items many times faster."""
        return self.legal.numpy()

    def legal_on(self, device: torch.device) -> torch.Tensor:
        """`legal` on a device, kept there."""
        if device not in self._moved:
            self._moved[device] = self.legal.to(device)
        return self._moved[device]


_Groups = dict[bytes, tuple[NDArray[Any], dict[bytes, NDArray[Any]]]]
_grouped: weakref.WeakKeyDictionary[Vocabulary, _Groups] = weakref.WeakKeyDictionary()


def _by_head(vocabulary: Vocabulary) -> _Groups:
    """Tokens by the continuation bytes they begin with, made once.

    For each head: the tokens that are nothing else, and the others by the fragment they leave.
    """
    if vocabulary not in _grouped:
        found: dict[bytes, tuple[list[int], dict[bytes, list[int]]]] = {}
        for i, data in enumerate(vocabulary.bytes):
            head, leaves = vocabulary.heads[i], vocabulary.leaves[i]
            if leaves is None:
                continue
            bare, others = found.setdefault(head, ([], {}))
            if len(head) == len(data):
                bare.append(i)
            else:
                others.setdefault(leaves, []).append(i)
        _grouped[vocabulary] = {
            head: (_ids(bare), {leaves: _ids(own) for leaves, own in others.items()})
            for head, (bare, others) in found.items()
        }
    return _grouped[vocabulary]


def _ids(tokens: list[int]) -> NDArray[Any]:
    return np.array(tokens, dtype=np.int32)


class Layout:
    """What the legal actions of all rules with the same stops and filters have in common.

    The other rules say which of its steps a state has. Rules that differ in lengths, truncation or
    temperature share it, for such may come from data: each has its own, and none is worth a layout.

    Args:
        stops: the stops.
        vocabulary: the tokens.
        allowed: those that the filters let through, bool [vocabulary].

    Raises:
        ValueError: if a stop can never be produced.
    """

    def __init__(
        self, stops: tuple[bytes, ...], vocabulary: Vocabulary, allowed: NDArray[Any]
    ) -> None:
        self.stops, self.vocabulary, self.allowed = stops, vocabulary, allowed
        self._steps: dict[Kind, Step] = {}
        self._cost: dict[bytes, int] = {b"": 0}
        self._check_stops()

    def _check_stops(self) -> None:
        if not self.stops:
            return
        tokens = {self.vocabulary.bytes[i] for i in np.flatnonzero(self.allowed)}
        within = _NO_TEXT.join(tokens)
        for stop in self.stops:
            if stop not in within and not _can_spell(stop, tokens, self.vocabulary, self.allowed):
                raise ValueError(
                    f"stop={stop.decode()!r} can never be produced: the tokens that would "
                    "spell it are banned, not allowed, or not in this LM's vocabulary"
                )

    def step(self, kind: Kind) -> Step:
        """The legal actions of a state."""
        if kind not in self._steps:
            self._steps[kind] = self._make_step(*kind)
        return self._steps[kind]

    @cached_property
    def _by_head(self) -> _Groups:
        """Allowed tokens by the continuation bytes they begin with."""

        def own(ids: NDArray[Any]) -> NDArray[Any]:
            kept: NDArray[Any] = ids[self.allowed[ids]]
            return kept

        found: _Groups = {}
        for head, (bare, others) in _by_head(self.vocabulary).items():
            left = {leaves: kept for leaves, ids in others.items() if len(kept := own(ids))}
            if len(kept := own(bare)) or left:
                found[head] = (kept, left)
        return found

    def _followers(self, fragment: bytes) -> dict[bytes, NDArray[Any]]:
        """Tokens that may follow a fragment, by the fragment they leave."""
        if not fragment:
            return self._by_head[b""][1] if b"" in self._by_head else {}
        found: dict[bytes, list[NDArray[Any]]] = {}
        for head, (bare, others) in self._by_head.items():
            joined = utf8_fragment(fragment + head) if head else None
            if joined is None:
                continue
            if len(bare):
                found.setdefault(joined, []).append(bare)
            if joined == b"":
                for leaves, ids in others.items():
                    found.setdefault(leaves, []).append(ids)
        return {leaves: np.concatenate(ids) for leaves, ids in found.items()}

    def tokens_to_finish(self, fragment: bytes) -> int:
        """Fewest tokens that finish an unfinished character; 99 if none do."""
        fragment = _short(fragment)
        if fragment not in self._cost:
            edges: dict[bytes, set[bytes]] = {}
            pending = [fragment]
            while pending:
                at = pending.pop()
                if at in self._cost or at in edges:
                    continue
                edges[at] = {_short(left) for left in self._followers(at)}
                if b"" not in edges[at]:
                    pending.extend(edges[at])
            cost = {at: NEVER for at in edges}
            for _ in edges:
                for at, lefts in edges.items():
                    known = [cost.get(left, self._cost.get(left, NEVER)) for left in lefts]
                    cost[at] = min([cost[at], *(1 + c for c in known)])
            self._cost.update({at: min(c, NEVER) for at, c in cost.items()})
        return self._cost[fragment]

    def completions(self, tail: bytes) -> dict[int, bytes]:
        """Allowed tokens that complete a stop after `tail`, with the bytes that are kept."""
        found: dict[int, bytes] = {}
        for token in self._candidates(tail):
            data = self.vocabulary.bytes[token]
            text = tail + data
            ends = [
                at + len(stop)
                for stop in self.stops
                if (at := text.find(stop, max(len(tail) - len(stop) + 1, 0))) >= 0
            ]
            if ends:
                found[token] = data[: min(ends) - len(tail)]
        return found

    def _candidates(self, tail: bytes) -> set[int]:
        candidates = set(self._containing_stop)
        for stop in self.stops:
            for k in range(1, len(stop)):
                if tail.endswith(stop[:k]):
                    candidates.update(
                        i for i in self.vocabulary.starting_with(stop[k:]) if self.allowed[i]
                    )
        return candidates

    @cached_property
    def _containing_stop(self) -> list[int]:
        data, allowed = self.vocabulary.bytes, np.flatnonzero(self.allowed)
        within = _NO_TEXT.join(data[i] for i in allowed)
        # Of many stops few are in any token, and each search through all takes milliseconds.
        stops = [stop for stop in self.stops if stop in within]
        return [int(i) for i in allowed if any(stop in data[i] for stop in stops)]

    def _make_step(self, may_end: bool, remaining: int, tail: bytes, fragment: bytes) -> Step:
        vocabulary = self.vocabulary
        legal = np.zeros(vocabulary.size, dtype=bool)
        for left, ids in self._followers(fragment).items():
            if self.tokens_to_finish(left) <= remaining - 1:
                legal[ids] = True
        completing = self.completions(tail)
        legal[list(completing)] = False
        whole = {k for k in completing.values() if utf8_fragment(fragment + k) == b""}
        kept = {token: k for token, k in completing.items() if may_end and k in whole}
        groups: dict[bytes, list[int]] = {}
        legal[list(kept)] = True
        for token in sorted(kept):
            groups.setdefault(kept[token], []).append(token)
        ends = vocabulary.end_ids if may_end and not fragment else ()
        legal[list(ends)] = True

        as_tensors = {text: torch.tensor(ids) for text, ids in groups.items()}
        end_ids = torch.tensor(ends, dtype=torch.long)
        return self.step_of(legal, kept, as_tensors, end_ids, tail)

    def step_of(
        self,
        legal: NDArray[Any],
        kept: dict[int, bytes],
        groups: dict[bytes, torch.Tensor],
        end_ids: torch.Tensor,
        tail: bytes,
        name: bytes | None = None,
    ) -> Step:
        """A step with its canonical ending action; see `Step`."""
        canonical, token_of = end_ids, None
        for stop in self.stops:
            endings = [stop[k:] for k in range(len(stop)) if k == 0 or tail.endswith(stop[:k])]
            text = next((text for text in endings if text in groups), None)
            if text is not None:
                canonical = groups[text]
                token_of = self.representative(text, canonical.tolist())
                break
        return Step(
            legal=torch.from_numpy(legal),
            kept=kept,
            groups=groups,
            end_ids=end_ids,
            canonical=canonical,
            canonical_token=token_of,
            is_dead=not legal.any(),
            name=name,
        )

    def representative(self, kept: bytes, ids: Iterable[int]) -> int:
        """The token that stands for an ending action in a value: the exact one if there is one."""
        exact = self.vocabulary.exact.get(kept)
        members = list(ids)
        return exact if exact in members else min(members)


_layouts: weakref.WeakKeyDictionary[Vocabulary, weakref.WeakValueDictionary[Any, Layout]] = (
    weakref.WeakKeyDictionary()
)


def layout_of(rules: StringRules, vocabulary: Vocabulary) -> Layout:
    """The layout of rules over a vocabulary; of equal ones there is one as long as it is in use.

    Raises:
        ValueError: see `Layout` and `langppl.lm.filters.let_through`.
    """
    known = _layouts.setdefault(vocabulary, weakref.WeakValueDictionary())
    key = (rules.stop, rules.filters)
    found = known.get(key)
    if found is not None and not callable(rules.allow) and not callable(rules.ban):
        return found
    allowed = ~vocabulary.special & let_through(rules, vocabulary)
    # What a predicate reads may have changed, though it is the same.
    if found is None or not np.array_equal(found.allowed, allowed):
        stops = tuple(s.encode("utf-8") for s in rules.stop)
        found = known[key] = Layout(stops, vocabulary, allowed)
    return found


def _can_spell(
    stop: bytes, tokens: set[bytes], vocabulary: Vocabulary, allowed: NDArray[Any]
) -> bool:
    """Whether several tokens in a row spell `stop`, which may begin and end inside of one.

    Args:
        stop: the stop.
        tokens: the bytes of the allowed tokens.
        vocabulary: all tokens.
        allowed: which of them are allowed, bool [vocabulary].
    """
    size, longest = len(stop), vocabulary.longest
    # No part of the stop that is longer than every token is looked for.
    reached = [
        k <= longest and any(allowed[i] for i in vocabulary.ending_with(stop[:k]))
        for k in range(1, size)
    ]
    for k in range(1, size):
        if reached[k - 1]:
            begun = vocabulary.starting_with(stop[k:]) if size - k <= longest else ()
            if any(allowed[i] for i in begun):
                return True
            for m in range(k + 1, min(size, k + longest + 1)):
                reached[m - 1] = reached[m - 1] or stop[k:m] in tokens
    return False


def _short(fragment: bytes) -> bytes:
    """A shorter fragment that the same bytes finish, so that there are some dozens in all.

    Beyond the second byte of a character any continuation bytes may follow, as many as are missing.
    """
    if len(fragment) < 2:
        return fragment
    missing = (3 if fragment[0] < 0xF0 else 4) - len(fragment)
    return b"\xc3" if missing == 1 else b"\xe1"
