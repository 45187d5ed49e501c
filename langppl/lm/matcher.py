"""Where a text stands in a grammar, by llguidance: which tokens may come next, may it end here.

llguidance (github.com/guidance-ai/llguidance) walks a grammar byte by byte and finds the tokens
that keep to it. Two things are arranged so that its masks are exact: where a grammar leaves one
text only, llguidance would allow just the tokens that it takes for canonical, so this is switched
off (`EXACT`), and its tokenizer is made from the vocabulary's own bytes with one more token for
each byte, by which a matcher can go to any text, also one that ends inside a token.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

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


class Matcher:
    """A grammar at any text: one matcher that goes back and forth between texts.

    Args:
        lark: the grammar as llguidance takes it.
        name: what it is called in errors.
        tokenizer: the tokens.
    """

    def __init__(self, lark: str, name: str, tokenizer: Tokenizer) -> None:
        self._lark, self._name, self._tokenizer = lark, name, tokenizer
        self._restart()

    def _restart(self) -> None:
        # It would write what went wrong to stderr; `_check` raises it.
        self._at = LLMatcher(self._tokenizer.made, self._lark, log_level=0)
        self._text = b""
        self._check()

    def _check(self) -> None:
        """A matcher that fails allows nothing from then on, which must not pass for an answer."""
        if self._at.is_error():
            message = self._at.get_error()
            self._at, self._text = LLMatcher(self._tokenizer.made, self._lark, log_level=0), b""
            raise ValueError(f"llguidance gave up on {self._name}: {message}")

    def begins(self, text: bytes) -> bool:
        """Whether some text of the grammar begins with `text`."""
        shared = _shared(self._text, text)
        if back := len(self._text) - shared:
            self._at.rollback(back)
        taken = self._at.try_consume_tokens(self._tokenizer.encode(text[shared:]))
        self._text = text[: shared + taken]
        self._check()
        return len(self._text) == len(text)

    def accepts(self, text: bytes) -> bool:
        """Whether `text` is a text of the grammar."""
        found = self.begins(text) and self._at.is_accepting()
        self._check()
        return found

    def legal(self, text: bytes) -> np.ndarray:
        """The tokens that keep to the grammar after `text`: bool [tokens]."""
        if not self.begins(text):
            return np.zeros(self._tokenizer.size, dtype=bool)
        mask = np.frombuffer(self._at.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(mask, count=self._tokenizer.size, bitorder="little").view(bool)


def _shared(first: bytes, second: bytes) -> int:
    """How many first bytes two texts have in common."""
    if second.startswith(first):
        return len(first)
    differ = (k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, len(second))
