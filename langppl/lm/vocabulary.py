"""What each token of a tokenizer stands for, in bytes.

Tokens of byte-level and byte-fallback tokenizers need not be whole characters, so everything
that concerns text (stops, bans, UTF-8) is decided on bytes read from the vocabulary itself;
decoding a single id would replace a fragment by U+FFFD.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

REPLACEMENT = "\ufffd"


def utf8_fragment(data: bytes) -> bytes | None:
    """The unfinished character at the end of `data`.

    Args:
        data: bytes that start at a character boundary.

    Returns:
        `b""` if `data` is whole UTF-8, its unfinished last character (1 to 3 bytes) if it can
        still become so, None if no continuation makes it valid.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return None
    fragment: bytes = decoder.getstate()[0]
    # Python's incremental decoder waits for the third byte before it refuses a surrogate.
    if len(fragment) >= 2 and fragment[0] == 0xED and fragment[1] >= 0xA0:
        return None
    return fragment


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in plain}
    shifted = (b for b in range(256) if b not in set(plain))
    alphabet.update({chr(256 + n): b for n, b in enumerate(shifted)})
    return alphabet


_BYTE_LEVEL = _byte_level_alphabet()


def decoder_types(decoder: dict[str, Any] | None) -> set[str]:
    """The types of a tokenizer's decoder and of those that it is made of."""
    if not decoder:
        return set()
    inner = [decoder_types(d) for d in decoder.get("decoders", [])]
    return {decoder["type"]}.union(*inner)


def _token_bytes(token: str, decoders: set[str]) -> bytes:
    if "ByteLevel" in decoders:
        if all(c in _BYTE_LEVEL for c in token):
            return bytes(_BYTE_LEVEL[c] for c in token)
        return token.encode("utf-8")
    if decoders & {"ByteFallback", "Metaspace", "Replace"}:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode("utf-8")
    return token.encode("utf-8")


def _added_bytes(
    backend: Any, ids: Mapping[int, str], added: Mapping[int, str], decoders: set[str]
) -> dict[int, bytes]:
    """The bytes of added tokens, which go through the decoder (and may through the normalizer).

    Args:
        backend: the tokenizer of tokenizers'.
        ids: the tokens by id.
        added: the contents of added tokens by id.
        decoders: the types of its decoder.
    """
    # Between two others, as spaces at the beginning of a text may be taken away.
    letters = (i for i, t in ids.items() if i not in added and t.isascii() and t.isalnum())
    letter = next((i for i in letters if backend.decode([i, i]) == 2 * ids[i]), None)
    found = {}
    for i, content in added.items():
        found[i] = _token_bytes(content, decoders)
        if letter is None or not decoders:
            continue
        shown = backend.decode([letter, i, letter], skip_special_tokens=False)
        ends = ids[letter]
        # Bytes that are no characters are lost in what is shown.
        if shown.startswith(ends) and shown.endswith(ends) and REPLACEMENT not in shown:
            found[i] = shown[len(ends) : len(shown) - len(ends)].encode("utf-8")
    return found


class Vocabulary:
    """The tokens of an LM as bytes, and what is special among them.

    Args:
        tokenizer: a transformers fast tokenizer.
        size: width of the model's logits; ids that the tokenizer does not know are special.
        end_ids: the ids that end a text.

    Attributes:
        size: width of the logits.
        end_ids: sorted ids that end a text; the end of a text has the sum of their probabilities.
        special: bool array [size]; special tokens, unknown ids and end tokens.
        bytes: the bytes of every ordinary token, `b""` for special ones.
        fingerprint: names this tokenizer; equal for equal vocabularies.
    """

    def __init__(self, tokenizer: Any, size: int, end_ids: Iterable[int]) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer (one with a tokenizer.json); "
                "langppl reads the bytes of each token from it"
            )
        # Later dumps may hold padding or truncation set by a call; the model part does not move.
        dump = json.loads(backend.to_str())
        decoders = decoder_types(dump.get("decoder"))
        ids = {i: token for token, i in tokenizer.get_vocab().items() if i < size}
        added = {i: t for i, t in tokenizer.added_tokens_decoder.items() if i < size}

        self.size = size
        self.end_ids = tuple(sorted(set(end_ids)))
        self.special = np.ones(size, dtype=bool)
        self.bytes: list[bytes] = [b""] * size
        plain = {i: t.content for i, t in added.items() if not t.special}
        of_added = _added_bytes(backend, ids, plain, decoders)
        for i, token in ids.items():
            if i in added:
                self.bytes[i] = of_added.get(i, b"")
            else:
                self.bytes[i] = _token_bytes(token, decoders)
            self.special[i] = not self.bytes[i]
        for i in self.end_ids:
            self.special[i], self.bytes[i] = True, b""

        # Tokens by the continuation bytes they begin with, and the fragment they leave.
        self.heads: list[bytes] = [b""] * size
        self.leaves: list[bytes | None] = [None] * size
        for i in np.flatnonzero(~self.special):
            data = self.bytes[i]
            cut = 0
            while cut < len(data) and 0x80 <= data[cut] < 0xC0:
                cut += 1
            self.heads[i] = data[:cut]
            self.leaves[i] = utf8_fragment(data[cut:]) if cut <= 3 else None

        self.sorted_ids = sorted(
            (int(i) for i in np.flatnonzero(~self.special)), key=lambda i: self.bytes[i]
        )
        self.sorted_bytes = [self.bytes[i] for i in self.sorted_ids]
        self.exact: dict[bytes, int] = {}
        for i in reversed(range(size)):
            if not self.special[i]:
                self.exact[self.bytes[i]] = i

        model = {k: v for k, v in dump.get("model", {}).items() if k in ("merges", "type")}
        named = [sorted(ids.items()), sorted(int(i) for i in np.flatnonzero(self.special)), model]
        self.fingerprint = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes that a sequence of ordinary tokens spells."""
        return b"".join(self.bytes[i] for i in ids)

    def text(self, token: int) -> str:
        """A token's text, with U+FFFD for bytes that are not whole characters."""
        return self.bytes[token].decode("utf-8", errors="replace")

    @cached_property
    def longest(self) -> int:
        """Most bytes of an ordinary token."""
        return max(map(len, self.sorted_bytes), default=0)

    @cached_property
    def _mirrored(self) -> list[tuple[bytes, int]]:
        """The ordinary tokens by their bytes from the last one on."""
        return sorted((self.bytes[i][::-1], i) for i in self.sorted_ids)

    def ending_with(self, suffix: bytes) -> Iterator[int]:
        """The ordinary tokens whose bytes end with `suffix`."""
        mirrored = suffix[::-1]
        for at in range(bisect_left(self._mirrored, (mirrored, -1)), len(self._mirrored)):
            data, token = self._mirrored[at]
            if not data.startswith(mirrored):
                return
            yield token

    def starting_with(self, prefix: bytes) -> list[int]:
        """The ordinary tokens whose bytes begin with `prefix`."""
        low = bisect_left(self.sorted_bytes, prefix)
        high = low
        while high < len(self.sorted_bytes) and self.sorted_bytes[high].startswith(prefix):
            high += 1
        return self.sorted_ids[low:high]
