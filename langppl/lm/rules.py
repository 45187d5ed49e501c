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
    >>> bound = rules.bind(lm.vocabulary)
    >>> state = bound.start(limit=20)
    >>> int(bound.step(state).legal.sum()) < lm.vocabulary.size
    True

With a grammar a token must also keep the text to it, and an ending action must complete it: the
masks are intersected. The state then holds the text, and steps are remembered by it.
"""

from __future__ import annotations

import hashlib
import math
import numbers
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from langppl.lm.counts import as_count, unwrapped
from langppl.lm.functions import content_of
from langppl.lm.grammars import Grammar
from langppl.lm.layouts import NEVER, Kind, Layout, Step, layout_of
from langppl.lm.matcher import tokenizer_of, walking
from langppl.lm.texts import plain_text
from langppl.lm.vocabulary import Vocabulary, utf8_fragment

__all__ = [
    "COLDEST",
    "BoundRules",
    "Path",
    "State",
    "Step",
    "StringRules",
    "TokenFilter",
    "Violation",
    "check_temperature",
]

TokenFilter = tuple[str, ...] | Callable[[str], bool]
EndingKind = Literal["end", "stop", "cut", "dead", "open"]

COLDEST = 1e-30
"""Least temperature: logits over less are no numbers in float32."""

STOP_BYTES = 1000
"""Longest stop: each of its beginnings is a state of its own, with its own legal actions."""

STEP_BYTES = 64 * 2**20
"""Most bytes, about, of the steps that a string's rules remember under a grammar."""

_STATE_BYTES = 1024
_MOST_TRIED, _MOST_FOLLOWERS = 256, 64


def _as_filter(name: str, value: object) -> TokenFilter | None:
    if value is None or callable(value):
        return value
    is_list = isinstance(value, Iterable) and not isinstance(value, str)
    given = tuple(value) if is_list else (value,)  # type: ignore[arg-type]
    strings = tuple(plain_text(s) for s in given if isinstance(s, str) and s)
    if not strings or len(strings) < len(given):
        raise ValueError(
            f"{name} must be non-empty strings or a predicate on a token's text, got {value!r}"
        )
    return strings


def _as_stops(value: object) -> tuple[str, ...]:
    given = () if value is None else value
    stops = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"a stop must be a non-empty string, got {value!r}")
    texts = tuple(map(plain_text, stops))
    for text in texts:
        if (size := len(text.encode("utf-8", "surrogatepass"))) > STOP_BYTES:
            raise ValueError(
                f"a stop has at most {STOP_BYTES} bytes, and {text[:20]!r}… has {size}; give "
                "the beginning of it, if that is enough to end a string"
            )
    return texts


def check_temperature(value: object) -> None:
    """Raises ValueError unless a temperature is a number above 0 by which logits can be divided."""
    value = unwrapped(value)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not float(value) > 0:  # type: ignore[arg-type]
        raise ValueError(f"temperature must be above 0, got {value!r}")
    if float(value) < COLDEST:  # type: ignore[arg-type]
        raise ValueError(f"temperature must be at least {COLDEST}, got {value!r}")


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
        grammar: what the whole text, a stop included, must belong to, as far as it goes: with
            `truncate="keep"`, which only proposals have, what is cut need not be whole.
        filters: what `allow` and `ban` do, by which rules are compared.
    """

    max_tokens: int | None = None
    min_tokens: int = 1
    stop: tuple[str, ...] = ()
    truncate: Literal["keep", "reject"] = "keep"
    temperature: float = 1.0
    allow: TokenFilter | None = field(default=None, compare=False)
    ban: TokenFilter | None = field(default=None, compare=False)
    grammar: Grammar | None = None
    filters: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        """Checks what can be checked without a tokenizer."""
        put = partial(object.__setattr__, self)
        put("stop", _as_stops(self.stop))
        put("allow", _as_filter("allow", self.allow))
        put("ban", _as_filter("ban", self.ban))
        # A predicate that is written inside of a model is another object in every execution.
        put("filters", (content_of(self.allow), content_of(self.ban)))
        put("min_tokens", as_count("min_tokens", self.min_tokens, 0))
        if self.max_tokens is not None:
            put("max_tokens", as_count("max_tokens", self.max_tokens, 1))
            if self.min_tokens > self.max_tokens:
                raise ValueError(
                    f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}: "
                    "no string satisfies both"
                )
        if self.truncate not in ("keep", "reject"):
            raise ValueError(f'truncate must be "keep" or "reject", got {self.truncate!r}')
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise TypeError(
                "grammar must be made by lp.regex, lp.json_schema, lp.lark or lp.one_of, got "
                f"{self.grammar!r}"
            )
        if self.truncate == "reject":
            self._check_can_end()
        check_temperature(self.temperature)
        put("temperature", unwrapped(self.temperature))
        if not math.isfinite(self.temperature):
            raise ValueError(f"temperature must be finite, got {self.temperature!r}")

    def _check_can_end(self) -> None:
        """Raises ValueError for rules under which every string is rejected."""
        if self.is_open:
            raise ValueError(
                'truncate="reject" needs max_tokens or a stop: an open string never ends'
            )
        if self.min_tokens == self.max_tokens and self.grammar is not None:
            raise ValueError(
                f"min_tokens=max_tokens={self.max_tokens} leaves no room for an ending "
                "action, and with a grammar an unfinished string is rejected; raise max_tokens"
            )
        if self.min_tokens == self.max_tokens:
            raise ValueError(
                f"min_tokens=max_tokens={self.max_tokens} leaves no room for an ending "
                'action, so truncate="reject" rejects every string; use truncate="keep" '
                "for strings of a fixed length"
            )

    @property
    def is_open(self) -> bool:
        """Whether the string is the event "the text goes on like this"."""
        return self.max_tokens is None and not self.stop and self.grammar is None

    @property
    def without_grammar(self) -> StringRules:
        """The same rules for any text."""
        return replace(self, grammar=None, truncate="keep")

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
    text: bytes = b""
    """The whole text under a grammar, else empty."""


@dataclass(frozen=True)
class Path:
    """A string as the actions that made it.

    Attributes:
        tokens: the tokens that go on.
        steps: the legal actions before each of them, and before the ending action; one longer
            than `tokens` unless the ending is forced (`"cut"`, `"dead"`, `"open"`).
        ending: `"end"` (end of the text), `"stop"`, `"cut"` (at `max_tokens`, probability one),
            `"dead"` (no action is legal) or `"open"` (no ending at all).
        ending_ids: ids of the ending action, empty where it is forced.
        reason: why the string has weight zero though it can be drawn: it was cut where the rules
            reject that, or came to a dead end. None if it may have weight.
    """

    tokens: tuple[int, ...]
    steps: tuple[Step, ...]
    ending: EndingKind
    ending_ids: torch.Tensor
    reason: str | None = None

    @property
    def rejected(self) -> bool:
        """Whether the string has weight zero though it can be drawn."""
        return self.reason is not None


@dataclass(frozen=True)
class Violation:
    """Why the rules could not have produced a value."""

    reason: str


class _Masks:
    """What of a layout's actions a grammar allows, by state: the latest only.

    States in which the same is legal share one step.

    Attributes:
        matcher: walks the grammar.
        recent: the steps by state, whose text is the last of it.
        texts: bytes of those texts.
        by_name: the steps that are in use anywhere.
    """

    def __init__(self, layout: Layout, grammar: Grammar) -> None:
        self.matcher = grammar.matcher(tokenizer_of(layout.vocabulary))
        self.recent: OrderedDict[tuple[bool, int, bytes, bytes, bytes], Step] = OrderedDict()
        self.texts = 0
        self.by_name: weakref.WeakValueDictionary[bytes, Step] = weakref.WeakValueDictionary()
        self._size = layout.vocabulary.size

    @property
    def bytes(self) -> int:
        """Bytes that the steps take, about, with their states."""
        return len(self.by_name) * self._size + len(self.recent) * _STATE_BYTES + self.texts


_masks: weakref.WeakKeyDictionary[Layout, weakref.WeakValueDictionary[Grammar, _Masks]] = (
    weakref.WeakKeyDictionary()
)


def _masks_of(layout: Layout, grammar: Grammar) -> _Masks:
    known = _masks.setdefault(layout, weakref.WeakValueDictionary())
    found = known.get(grammar)
    if found is None:
        found = known[grammar] = _Masks(layout, grammar)
    return found


class BoundRules:
    """`StringRules` over the tokens of one vocabulary.

    Args:
        rules: the rules.
        vocabulary: the tokens.
        free: of rules with a grammar, `rules.without_grammar` over the same vocabulary, if it is
            made already.

    Raises:
        ValueError: if a ban or an allowed string matches no token, a predicate raises an error, a
            stop can never be produced, or no string of the grammar is found to fit the other
            rules.
    """

    def __init__(
        self, rules: StringRules, vocabulary: Vocabulary, free: BoundRules | None = None
    ) -> None:
        self.rules = rules
        self.vocabulary = vocabulary
        if rules.grammar is None:
            self.layout = layout_of(rules, vocabulary)
        else:
            self._free = free or rules.without_grammar.bind(vocabulary)
            self.layout = self._free.layout
            masks = self._masks = _masks_of(self.layout, rules.grammar)
            self._matcher, self._recent, self._by_name = masks.matcher, masks.recent, masks.by_name
        self.stops, self.allowed = self.layout.stops, self.layout.allowed
        if rules.grammar is not None:
            self._check_possible(rules.grammar)

    def _check_possible(self, grammar: Grammar) -> None:
        """Raises ValueError if a short search shows that no string can be finished."""
        pending = [self.start(self.rules.max_tokens)]
        tried: set[tuple[bytes, int | None]] = set()
        while pending:
            state = pending.pop()
            if (state.text, state.remaining) in tried:
                continue
            tried.add((state.text, state.remaining))
            if state.remaining == 0:
                if self.rules.truncate == "keep" and self._matcher.accepts(state.text):
                    return
                continue
            step = self.step(state)
            if step.groups or len(step.end_ids):
                return
            tokens = step.legal.nonzero()[:, 0].tolist()
            if len(tokens) > _MOST_FOLLOWERS or len(tried) >= _MOST_TRIED:
                return
            # The longest are tried first.
            tokens.sort(key=lambda t: len(self.vocabulary.bytes[t]))
            pending += [self.advance(state, token) for token in tokens]
        first = "; no first token is legal" if len(tried) == 1 else ""
        raise ValueError(
            f"no string of the grammar {grammar.shown} fits the other rules (max_tokens="
            f"{self.rules.max_tokens}, which counts the ending action, min_tokens="
            f"{self.rules.min_tokens}, stops, bans, what is allowed) in this LM's tokens{first}"
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
        if self.rules.grammar is None:
            return self.layout.step(self._kind(state))
        with walking():
            return self._step_in_grammar(state)

    def _step_in_grammar(self, state: State) -> Step:
        key = (*self._kind(state), state.text)
        step = self._recent.get(key)
        if step is not None:
            self._recent.move_to_end(key)
            return step
        step = self._recent[key] = self._masked_step(self._free.step(state), state)
        self._masks.texts += len(state.text)
        # Not as many as it takes: steps that paths hold count too, and go when those do.
        for _ in range(2):
            if self._masks.bytes > STEP_BYTES and len(self._recent) > 1:
                (*_, text), _ = self._recent.popitem(last=False)
                self._masks.texts -= len(text)
        return step

    def _kind(self, state: State) -> Kind:
        """All that the legal actions depend on, but for a grammar."""
        remaining = NEVER if state.remaining is None else min(state.remaining, 8)
        return (state.count >= self.rules.min_tokens, remaining, state.tail, state.fragment)

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
        whole = b""
        if self.rules.grammar is not None:
            whole = state.text + self.vocabulary.bytes[token]
        return State(state.count + 1, remaining, tail, self._leaves(state.fragment, token), whole)

    def _leaves(self, fragment: bytes, token: int) -> bytes:
        head = self.vocabulary.heads[token]
        if len(head) == len(self.vocabulary.bytes[token]):
            left = utf8_fragment(fragment + head)
        else:
            left = self.vocabulary.leaves[token]
        assert left is not None
        return left

    # -- legal actions ----------------------------------------------------------------------

    def _masked_step(self, free: Step, state: State) -> Step:
        """What of a step's actions the grammar allows after the state's text."""
        legal: NDArray[Any] = free.legal.numpy() & self._matcher.legal(state.text)
        legal[list(free.kept)] = False
        # An ending action is judged by the text that it leaves, not by what its tokens go on with.
        groups = {
            kept: ids
            for kept, ids in free.groups.items()
            if self._matcher.accepts(state.text + kept)
        }
        for ids in groups.values():
            legal[ids.numpy()] = True
        end_ids = free.end_ids
        if len(end_ids) and not self._matcher.accepts(state.text):
            end_ids = end_ids[:0]
        legal[end_ids.numpy()] = True
        digest = hashlib.blake2b(np.packbits(legal).tobytes(), digest_size=16)
        # Legal actions that are equal may still be other endings: those of stops.
        endings = [(kept, ids.tolist()) for kept, ids in groups.items()]
        digest.update(repr((endings, self.stops, state.tail)).encode())
        name = digest.digest()
        step = self._by_name.get(name)
        if step is None:
            kept = {token: k for token, k in free.kept.items() if k in groups}
            step = self.layout.step_of(legal, kept, groups, end_ids, state.tail, name)
            self._by_name[name] = step
        return step

    def representative(self, kept: bytes, ids: Iterable[int]) -> int:
        """The token that stands for an ending action in a value: the exact one if there is one."""
        return self.layout.representative(kept, ids)

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
            if not step.legal_array[token]:
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
        spelled = self.vocabulary.join(ids)
        shown = spelled.decode(errors="replace")
        none = torch.tensor([], dtype=torch.long)
        last = None if self.rules.is_open or state.remaining == 0 else self.step(state)
        # A dead end may lie inside a character, which the text then shows as U+FFFD.
        if last is not None and last.is_dead and shown.encode() == text:
            return Path(ids, tuple(steps), "dead", none, self._why_dead(len(ids)))
        if spelled != text:
            return Violation(f"its tokens spell {shown!r}")
        if self.rules.is_open:
            return Path(ids, tuple(steps), "open", none)
        if last is None:
            return Path(ids, tuple(steps), "cut", none, self._why_cut(len(ids)))
        steps.append(last)
        if not len(last.end_ids):
            return Violation(self._why_no_end(state))
        return Path(ids, tuple(steps), "end", last.end_ids)

    def _why_cut(self, length: int) -> str | None:
        if self.rules.truncate == "keep":
            return None
        if self.rules.grammar is not None:
            return (
                f"it is unfinished after {length} tokens (max_tokens counts the ending action), "
                f"and with the grammar {self.rules.grammar.shown} such strings are rejected"
            )
        return f'it is unfinished after {length} tokens, and truncate="reject"'

    def _why_dead(self, length: int) -> str:
        grammar = self.rules.grammar
        what = "" if grammar is None else f" keeps to the grammar {grammar.shown} and"
        return f"after its {length} tokens no action{what} is legal under the other rules"

    def _why_no_end(self, state: State) -> str:
        if state.fragment:
            return "it ends inside a UTF-8 character"
        if state.count < self.rules.min_tokens:
            return (
                f"it has {state.count} tokens before its end and min_tokens is "
                f"{self.rules.min_tokens}"
            )
        assert self.rules.grammar is not None
        return f"it is not a whole text of the grammar {self.rules.grammar.shown}"

    def begun(self, ids: Iterable[int], limit: int | None) -> Path | None:
        """The actions of a string that goes on after some tokens, as an open path.

        Args:
            ids: its first tokens.
            limit: most actions (see `limit`).

        Returns:
            A path with the legal actions after the last token too, where an action is left; None
            if no string of these rules begins with the tokens and goes on.
        """
        ids = tuple(ids)
        state = self.start(limit)
        steps: list[Step] = []
        for token in ids:
            if state.remaining == 0:
                return None
            step = self.step(state)
            steps.append(step)
            if not 0 <= token < self.vocabulary.size or not step.legal[token]:
                return None
            if token in step.kept or token in self.vocabulary.end_ids:
                return None
            state = self.advance(state, token)
        if state.remaining != 0:
            steps.append(self.step(state))
        return Path(ids, tuple(steps), "open", torch.tensor([], dtype=torch.long))

    def _why_illegal(self, token: int, at: int, state: State) -> str:
        shown = f"token {self.vocabulary.text(token)!r} at position {at}"
        if not self.allowed[token]:
            return f"{shown} is banned or not allowed"
        if token in self.layout.completions(state.tail) and state.count < self.rules.min_tokens:
            return (
                f"{shown} completes a stop after {state.count} tokens and min_tokens is "
                f"{self.rules.min_tokens}"
            )
        grammar = self.rules.grammar
        if grammar is not None and self._free.step(state).legal[token]:
            return f"{shown} breaks the grammar {grammar.shown}"
        return f"{shown} leaves bytes that are not valid UTF-8 in the tokens that remain"
