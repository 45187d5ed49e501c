"""The rules of a string: which tokens may come next, and what ends it.

`StringRules` is what a user states (stops, lengths, bans); `BoundRules` is the same for one
tokenizer, as a small automaton over tokens. Sampling, scoring, the prior and every guide walk
this one automaton, so they cannot disagree about what a string is.

An *action* is either a token that goes on or an *ending action*. Ending actions are the end of
the text (any of the LM's end tokens; their probabilities add up) and, for each text that a stop
can leave, all the tokens that agree up to and including the stop, whatever they would go on with.
What is not legal is masked and the rest renormalised, so in every state the probabilities of the
actions sum to one.

    >>> rules = StringRules(stop=(".",), max_tokens=20)
    >>> bound = rules.bind(lm.vocabulary)            # doctest: +SKIP
    >>> state = bound.start(limit=20)                # doctest: +SKIP
    >>> bound.step(state).legal.sum()                # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch

from langppl.lm.vocabulary import Vocabulary, utf8_fragment

TokenFilter = tuple[str, ...] | Callable[[str], bool]
EndingKind = Literal["end", "stop", "cut", "open"]

_NEVER = 99  # more tokens than any UTF-8 fragment needs


def _positive_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _as_filter(name: str, value: object) -> TokenFilter | None:
    if value is None or callable(value):
        return value
    strings = (value,) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]
    if not strings or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(
            f"{name} must be non-empty strings or a predicate on a token's text, got {value!r}"
        )
    return strings


@dataclass(frozen=True)
class StringRules:
    """What a string may be, whatever the tokenizer.

    Attributes:
        max_tokens: most actions of a string, its ending action included; None for no limit of
            its own.
        min_tokens: tokens before the ending action; ending actions are masked until then.
        stop: texts that end a string; the value is cut right after the one that ends first.
        truncate: what becomes of a string that is unfinished after `max_tokens`: `"keep"` cuts it
            with no further factor, `"reject"` gives it weight zero.
        temperature: divides the logits.
        allow: the only tokens, as a predicate on a token's text or as strings of which a token's
            text must be put together.
        ban: tokens to leave out, as a predicate or as strings that a token's text must not
            contain. A token is judged whole, also where a stop would cut it.
    """

    max_tokens: int | None = None
    min_tokens: int = 1
    stop: tuple[str, ...] = ()
    truncate: Literal["keep", "reject"] = "keep"
    temperature: float = 1.0
    allow: TokenFilter | None = None
    ban: TokenFilter | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without a tokenizer."""
        stop: object = self.stop
        if stop is None:
            stop = ()
        stops = (stop,) if isinstance(stop, str) else tuple(stop)  # type: ignore[arg-type]
        if not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"a stop must be a non-empty string, got {self.stop!r}")
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "allow", _as_filter("allow", self.allow))
        object.__setattr__(self, "ban", _as_filter("ban", self.ban))
        _positive_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            _positive_int("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise ValueError(
                    f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}: "
                    "no string satisfies both"
                )
        if self.truncate not in ("keep", "reject"):
            raise ValueError(f'truncate must be "keep" or "reject", got {self.truncate!r}')
        if self.truncate == "reject":
            if self.is_open:
                raise ValueError(
                    'truncate="reject" needs max_tokens or a stop: an open string never ends'
                )
            if self.min_tokens == self.max_tokens:
                raise ValueError(
                    f"min_tokens=max_tokens={self.max_tokens} leaves no room for an ending "
                    'action, so truncate="reject" rejects every string; use truncate="keep" '
                    "for strings of a fixed length"
                )
        if not (isinstance(self.temperature, int | float) and self.temperature > 0):
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}")
        if not math.isfinite(self.temperature):
            raise ValueError(f"temperature must be finite, got {self.temperature!r}")

    @property
    def is_open(self) -> bool:
        """Whether the string is the event "the text goes on like this"."""
        return self.max_tokens is None and not self.stop

    def bind(self, vocabulary: Vocabulary) -> BoundRules:
        """These rules as an automaton over the tokens of one vocabulary."""
        return BoundRules(self, vocabulary)


class State(NamedTuple):
    """Where a string stands: all that its legal actions depend on."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    """Tokens so far."""
    remaining: int | None
    """Actions left, None for no limit."""
    tail: bytes
    """The longest end of the text that begins a stop."""
    fragment: bytes
    """The unfinished UTF-8 character at the end of the text."""


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
    """

    legal: torch.Tensor
    kept: dict[int, bytes]
    groups: dict[bytes, torch.Tensor]
    end_ids: torch.Tensor
    canonical: torch.Tensor
    canonical_token: int | None
    is_dead: bool
    _moved: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def legal_on(self, device: torch.device) -> torch.Tensor:
        """`legal` on a device, kept there."""
        if device not in self._moved:
            self._moved[device] = self.legal.to(device)
        return self._moved[device]


@dataclass(frozen=True)
class Path:
    """A string as the actions that made it.

    Attributes:
        tokens: the tokens that go on.
        steps: the legal actions before each of them, and before the ending action; one longer
            than `tokens` unless the ending is forced (`"cut"`, `"open"`).
        ending: `"end"` (end of the text), `"stop"`, `"cut"` (at `max_tokens`, probability one) or
            `"open"` (no ending at all).
        ending_ids: ids of the ending action, empty for `"cut"` and `"open"`.
        rejected: whether the string was cut where the rules reject that.
    """

    tokens: tuple[int, ...]
    steps: tuple[Step, ...]
    ending: EndingKind
    ending_ids: torch.Tensor
    rejected: bool = False

    @property
    def reason(self) -> str | None:
        """Why the string has weight zero, or None if it may have weight."""
        if self.rejected:
            return f'it is unfinished after {len(self.tokens)} tokens, and truncate="reject"'
        return None


@dataclass(frozen=True)
class Violation:
    """Why the rules could not have produced a value."""

    reason: str


class BoundRules:
    """`StringRules` over the tokens of one vocabulary.

    Args:
        rules: the rules.
        vocabulary: the tokens.

    Raises:
        ValueError: if a ban or an allowed string matches no token, or a stop can never be
            produced.
    """

    def __init__(self, rules: StringRules, vocabulary: Vocabulary) -> None:
        self.rules = rules
        self.vocabulary = vocabulary
        self.stops = tuple(s.encode("utf-8") for s in rules.stop)
        self.allowed = ~vocabulary.special & self._filtered()
        self._steps: dict[tuple[bool, int, bytes, bytes], Step] = {}
        self._cost: dict[bytes, int] = {b"": 0}
        self._check_stops()

    # -- which tokens exist at all ---------------------------------------------------------

    def _filtered(self) -> np.ndarray:
        vocabulary, rules = self.vocabulary, self.rules
        keep = np.ones(vocabulary.size, dtype=bool)
        ordinary = [int(i) for i in np.flatnonzero(~vocabulary.special)]
        if callable(rules.allow):
            keep[ordinary] = [bool(rules.allow(vocabulary.text(i))) for i in ordinary]
        elif rules.allow:
            pieces = tuple(s.encode("utf-8") for s in rules.allow)
            keep[ordinary] = [_made_of(vocabulary.bytes[i], pieces) for i in ordinary]
        if not keep[ordinary].any():
            raise ValueError(f"allow={rules.allow!r} leaves no token of this LM")
        if callable(rules.ban):
            keep[ordinary] &= [not rules.ban(vocabulary.text(i)) for i in ordinary]
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

    def _check_stops(self) -> None:
        data = {self.vocabulary.bytes[i] for i in np.flatnonzero(self.allowed)}
        for stop in self.stops:
            if not _can_spell(stop, data):
                raise ValueError(
                    f"stop={stop.decode()!r} can never be produced: the tokens that would "
                    "spell it are banned, not allowed, or not in this LM's vocabulary"
                )

    # -- walking ----------------------------------------------------------------------------

    def limit(self, prompt_length: int, window: int | None) -> int | None:
        """Most actions after a prompt, in tokens; None for an open string."""
        if self.rules.max_tokens is not None:
            return self.rules.max_tokens
        if self.rules.is_open or window is None:
            return None
        return max(window - prompt_length, 1)

    def start(self, limit: int | None) -> State:
        """The state before the first token."""
        return State(0, limit, b"", b"")

    def step(self, state: State) -> Step:
        """The legal actions of a state with at least one action left."""
        remaining = _NEVER if state.remaining is None else min(state.remaining, 8)
        key = (state.count >= self.rules.min_tokens, remaining, state.tail, state.fragment)
        if key not in self._steps:
            self._steps[key] = self._make_step(*key)
        return self._steps[key]

    def advance(self, state: State, token: int) -> State:
        """The state after a legal token that does not end the string."""
        text = state.tail + self.vocabulary.bytes[token]
        tail = b""
        for stop in self.stops:
            for k in range(min(len(stop) - 1, len(text)), len(tail), -1):
                if text.endswith(stop[:k]):
                    tail = stop[:k]
                    break
        remaining = None if state.remaining is None else state.remaining - 1
        return State(state.count + 1, remaining, tail, self._leaves(state.fragment, token))

    def _leaves(self, fragment: bytes, token: int) -> bytes:
        head = self.vocabulary.heads[token]
        if len(head) == len(self.vocabulary.bytes[token]):
            left = utf8_fragment(fragment + head)
        else:
            left = self.vocabulary.leaves[token]
        assert left is not None
        return left

    # -- legal actions ----------------------------------------------------------------------

    @cached_property
    def _by_head(self) -> dict[bytes, tuple[list[int], dict[bytes, list[int]]]]:
        """Allowed tokens by the continuation bytes they begin with.

        For each head: the tokens that are nothing else, and the others by the fragment they leave.
        """
        groups: dict[bytes, tuple[list[int], dict[bytes, list[int]]]] = {}
        for i in np.flatnonzero(self.allowed):
            head, leaves = self.vocabulary.heads[i], self.vocabulary.leaves[i]
            if leaves is None:
                continue
            bare, others = groups.setdefault(head, ([], {}))
            if len(head) == len(self.vocabulary.bytes[i]):
                bare.append(int(i))
            else:
                others.setdefault(leaves, []).append(int(i))
        return groups

    def _followers(self, fragment: bytes) -> dict[bytes, list[int]]:
        """Tokens that may follow a fragment, by the fragment they leave."""
        if not fragment:
            return self._by_head.get(b"", ([], {}))[1]
        found: dict[bytes, list[int]] = {}
        for head, (bare, others) in self._by_head.items():
            joined = utf8_fragment(fragment + head) if head else None
            if joined is None:
                continue
            if bare:
                found.setdefault(joined, []).extend(bare)
            if joined == b"":
                for leaves, ids in others.items():
                    found.setdefault(leaves, []).extend(ids)
        return found

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
            cost = {at: _NEVER for at in edges}
            for _ in edges:
                for at, lefts in edges.items():
                    known = [cost.get(left, self._cost.get(left, _NEVER)) for left in lefts]
                    cost[at] = min([cost[at], *(1 + c for c in known)])
            self._cost.update({at: min(c, _NEVER) for at, c in cost.items()})
        return self._cost[fragment]

    def _completions(self, tail: bytes) -> dict[int, bytes]:
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
        data = self.vocabulary.bytes
        return [
            int(i)
            for i in np.flatnonzero(self.allowed)
            if any(stop in data[i] for stop in self.stops)
        ]

    def _make_step(self, may_end: bool, remaining: int, tail: bytes, fragment: bytes) -> Step:
        vocabulary = self.vocabulary
        legal = np.zeros(vocabulary.size, dtype=bool)
        for left, ids in self._followers(fragment).items():
            if self.tokens_to_finish(left) <= remaining - 1:
                legal[ids] = True
        completing = self._completions(tail)
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
        canonical, token_of = torch.tensor(ends, dtype=torch.long), None
        for stop in self.stops:
            endings = [stop[k:] for k in range(len(stop)) if k == 0 or tail.endswith(stop[:k])]
            text = next((text for text in endings if text in as_tensors), None)
            if text is not None:
                canonical, token_of = as_tensors[text], self.representative(text, groups[text])
                break
        return Step(
            legal=torch.from_numpy(legal),
            kept=kept,
            groups=as_tensors,
            end_ids=torch.tensor(ends, dtype=torch.long),
            canonical=canonical,
            canonical_token=token_of,
            is_dead=not legal.any(),
        )

    def representative(self, kept: bytes, ids: Iterable[int]) -> int:
        """The token that stands for an ending action in a value: the exact one if there is one."""
        exact = self.vocabulary.exact.get(kept)
        members = list(ids)
        return exact if exact in members else min(members)

    # -- values -----------------------------------------------------------------------------

    def parse(self, ids: Iterable[int], text: bytes, limit: int | None) -> Path | Violation:
        """The actions that produce a value, or the rule that it breaks.

        Args:
            ids: the value's tokens; the last one may run on past a stop.
            text: the value's text; must be what the tokens spell, cut after the stop.
            limit: most actions (see `limit`).
        """
        ids = tuple(ids)
        state = self.start(limit)
        steps: list[Step] = []
        size, special = self.vocabulary.size, self.vocabulary.special
        for at, token in enumerate(ids):
            if not 0 <= token < size or special[token]:
                return Violation(f"token {token} at position {at} is a special token of the LM")
            if state.remaining == 0:
                return Violation(
                    f"it has {len(ids)} tokens and max_tokens is {limit}"
                    if self.rules.max_tokens is not None
                    else f"its {len(ids)} tokens do not fit the context window: {limit} are left"
                )
            step = self.step(state)
            steps.append(step)
            if not step.legal[token]:
                return Violation(self._why_illegal(token, at, state))
            if token in step.kept:
                if at != len(ids) - 1:
                    return Violation(
                        f"it goes on after the stop completed by {self.vocabulary.text(token)!r} "
                        f"at token {at}"
                    )
                spelled = self.vocabulary.join(ids[:-1]) + step.kept[token]
                if spelled != text:
                    return Violation(f"its tokens spell {spelled.decode(errors='replace')!r}")
                return Path(ids[:-1], tuple(steps), "stop", step.groups[step.kept[token]])
            state = self.advance(state, token)
        if self.vocabulary.join(ids) != text:
            spelled = self.vocabulary.join(ids)
            return Violation(f"its tokens spell {spelled.decode(errors='replace')!r}")
        none = torch.tensor([], dtype=torch.long)
        if self.rules.is_open:
            return Path(ids, tuple(steps), "open", none)
        if state.remaining == 0:
            return Path(ids, tuple(steps), "cut", none, self.rules.truncate == "reject")
        step = self.step(state)
        steps.append(step)
        if not len(step.end_ids):
            if state.fragment:
                return Violation("it ends inside a UTF-8 character")
            return Violation(
                f"it has {len(ids)} tokens before its end and min_tokens is {self.rules.min_tokens}"
            )
        return Path(ids, tuple(steps), "end", step.end_ids)

    def _why_illegal(self, token: int, at: int, state: State) -> str:
        shown = f"token {self.vocabulary.text(token)!r} at position {at}"
        if not self.allowed[token]:
            return f"{shown} is banned or not allowed"
        if token in self._completions(state.tail):
            return (
                f"{shown} completes a stop after {state.count} tokens and min_tokens is "
                f"{self.rules.min_tokens}"
            )
        return f"{shown} leaves bytes that are not valid UTF-8 in the tokens that remain"


def _can_spell(stop: bytes, tokens: set[bytes]) -> bool:
    """Whether some sequence of tokens contains `stop`, which may begin and end inside of one."""
    if any(stop in token for token in tokens):
        return True
    size = len(stop)
    reached = [any(token.endswith(stop[:k]) for token in tokens) for k in range(1, size)]
    for k in range(1, size):
        if reached[k - 1]:
            if any(token.startswith(stop[k:]) for token in tokens):
                return True
            for m in range(k + 1, size):
                reached[m - 1] = reached[m - 1] or stop[k:m] in tokens
    return False


def _made_of(data: bytes, pieces: tuple[bytes, ...]) -> bool:
    """Whether `data` is a concatenation of `pieces`."""
    reached = [True] + [False] * len(data)
    for at in range(len(data)):
        if reached[at]:
            for piece in pieces:
                if data.startswith(piece, at):
                    reached[at + len(piece)] = True
    return reached[-1]


def _short(fragment: bytes) -> bytes:
    """A shorter fragment that the same bytes finish, so that there are some dozens in all.

    Beyond the second byte of a character any continuation bytes may follow, as many as are missing.
    """
    if len(fragment) < 2:
        return fragment
    missing = (3 if fragment[0] < 0xF0 else 4) - len(fragment)
    return b"\xc3" if missing == 1 else b"\xe1"
