"""Where a text stands in a grammar, by llguidance: which tokens may come next, may it end here.

llguidance (github.com/guidance-ai/llguidance) walks a grammar byte by byte and finds the tokens
that keep to it. Two things are arranged so that its masks are exact: where a grammar leaves one
text only, llguidance would allow just the tokens that it takes for canonical, so this is switched
off (`EXACT`), and its tokenizer is made from the vocabulary's own bytes with one more token for
each byte, by which a matcher can go to any text, also one that ends inside a token.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from langppl.lm.vocabulary import Vocabulary

EXACT = '\n%llguidance {"no_forcing": true}\n'
"""The line that keeps llguidance from allowing canonical tokens only."""


class _Tokens:
    """A vocabulary as llguidance asks for it: the tokens, then the single bytes, then an end."""

    def __init__(self, tokens: Sequence[bytes], special: Iterable[int]) -> None:
        self.first_byte = len(tokens)
        self.eos_token_id = len(tokens) + 256
        self.bos_token_id = None
        named = [data or f"<special{k}>".encode() for k, data in enumerate(tokens)]
        self.tokens = [*named, *(bytes([b]) for b in range(256)), b"<end>"]
        self.special_token_ids = [*special, self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        return [self.first_byte + b for b in text]


class Tokenizer:
    """The tokens that a matcher allows or not.

    Args:
        tokens: the bytes of each; `b""` for special ones, which are never allowed.

    Attributes:
        size: how many there are.
    """

    def __init__(self, tokens: Sequence[bytes] = ()) -> None:
        self.size = len(tokens)
        special = [k for k, data in enumerate(tokens) if not data]
        wrapped = TokenizerWrapper(_Tokens(tokens, special))
        self.made = LLTokenizer(wrapped, slices=LLTokenizer.json_slices())

    def encode(self, text: bytes) -> list[int]:
        """A text as single bytes."""
        return [self.size + b for b in text]


_made: weakref.WeakKeyDictionary[Vocabulary, Tokenizer] = weakref.WeakKeyDictionary()


def tokenizer_of(vocabulary: Vocabulary) -> Tokenizer:
    """A vocabulary's tokens, made once (0.4 s for 49,152 tokens)."""
    if vocabulary not in _made:
        _made[vocabulary] = Tokenizer(vocabulary.bytes)
    return _made[vocabulary]


@cache
def bytes_only() -> Tokenizer:
    """No tokens but the bytes: for what a text is, whatever the LM."""
    return Tokenizer()


_turn = threading.RLock()


def walking() -> AbstractContextManager[bool]:
    """A block for one thread at a time: what goes from text to text is one for all of them."""
    return _turn


def _mend_fork() -> None:
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mend_fork)

KEPT_BYTES = 16 * 2**20
"""Most bytes, about, of the places in texts that a grammar's matcher keeps."""
_PLACE_BYTES, _PER_BYTE = 8 * 1024, 24
_NEAR = 32


class Matcher:
    """A grammar at any text.

    Strings are drawn side by side, so each text is asked about between those of others. To go back
    from one to another would take each text from its first difference, byte by byte: where some
    of the latest texts led to is kept, and the next goes on from a copy.

    Args:
        lark: the grammar as llguidance takes it.
        name: what it is called in errors.
        tokenizer: the tokens.

    Raises:
        ValueError: if llguidance gives up on the grammar, then or with any text.
    """

    def __init__(self, lark: str, name: str, tokenizer: Tokenizer) -> None:
        self._name, self._tokenizer = name, tokenizer
        # It would write what went wrong to stderr; `_check` raises it.
        self._first = LLMatcher(tokenizer.made, lark, log_level=0)
        self._check(self._first)
        self._places: OrderedDict[bytes, LLMatcher] = OrderedDict()
        self._bytes = 0

    def _check(self, place: LLMatcher) -> None:
        """A matcher that fails allows nothing from then on, which must not pass for an answer."""
        if place.is_error():
            raise ValueError(f"llguidance gave up on {self._name}: {place.get_error()}")

    def _go(self, text: bytes) -> LLMatcher | None:
        """A matcher at a text, for one use; None if no text of the grammar begins with it."""
        place = self._places.pop(text, None)
        if place is not None:
            self._bytes -= _bytes(text)
            return place
        near = (text[:-k] for k in range(1, min(_NEAR, len(text)) + 1))
        base = next((own for own in near if own in self._places), None)
        if base is None:
            base = next(reversed(self._places), b"")
        place = self._places.get(base, self._first).deep_copy()
        shared = _shared(base, text)
        if back := len(base) - shared:
            place.rollback(back)
        taken = place.try_consume_tokens(self._tokenizer.encode(text[shared:]))
        self._check(place)
        return place if shared + taken == len(text) else None

    def _keep(self, text: bytes, place: LLMatcher) -> None:
        """Keeps a matcher that has not failed."""
        self._check(place)
        self._places[text] = place
        self._bytes += _bytes(text)
        while self._bytes > KEPT_BYTES and len(self._places) > 1:
            oldest, _ = self._places.popitem(last=False)
            self._bytes -= _bytes(oldest)

    def begins(self, text: bytes) -> bool:
        """Whether some text of the grammar begins with `text`."""
        with walking():
            place = self._go(text)
            if place is not None:
                self._keep(text, place)
        return place is not None

    def accepts(self, text: bytes) -> bool:
        """Whether `text` is a text of the grammar."""
        with walking():
            place = self._go(text)
            if place is None:
                return False
            found = place.is_accepting()
            self._keep(text, place)
        return found

    def legal(self, text: bytes) -> NDArray[Any]:
        """The tokens that keep to the grammar after `text`: bool [tokens]."""
        with walking():
            place = self._go(text)
            if place is None:
                return np.zeros(self._tokenizer.size, dtype=bool)
            mask = np.frombuffer(place.compute_bitmask(), dtype=np.uint8)
            self._keep(text, place)
        return np.unpackbits(mask, count=self._tokenizer.size, bitorder="little").view(bool)


def _bytes(text: bytes) -> int:
    """Bytes of a matcher at a text, about."""
    return _PLACE_BYTES + _PER_BYTE * len(text)


def _shared(first: bytes, second: bytes) -> int:
    """How many first bytes two texts have in common."""
    low, high = 0, min(len(first), len(second))
    # By halves, as slices are compared many times faster than single bytes.
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
