"""What a tokenizer does besides putting tokens together, found out when an LM is made.

Everything here takes a text for what its tokens spell one after another. A tokenizer whose decoder
adds spaces, or takes marks out, cannot be read like that; one that ends every text with a token of
its own can, without that token.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from langppl.lm.vocabulary import Vocabulary

_PUT_TOGETHER_OTHERWISE = {"WordPiece", "BPEDecoder", "CTC"}
_MARKS = ("continuing_subword_prefix", "end_of_word_suffix")
_LINES, _LENGTH = 8, 4
_REMEDY = (
    "langppl takes a text for what its tokens spell one after another, so take an LM with a "
    "byte-level or byte-fallback tokenizer"
)


def check_spelling(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Raises ValueError unless a text is what its tokens spell one after another.

    Args:
        tokenizer: a transformers fast tokenizer.
        vocabulary: its tokens as bytes.
    """
    from langppl.lm.vocabulary import decoder_types

    backend = tokenizer.backend_tokenizer
    dump = json.loads(backend.to_str())
    found = sorted(decoder_types(dump.get("decoder")) & _PUT_TOGETHER_OTHERWISE)
    if found:
        raise ValueError(f"the tokenizer's decoder is {found[0]}; {_REMEDY}")
    marks = [m for m in _MARKS if dump.get("model", {}).get(m)]
    if marks:
        mark = dump["model"][marks[0]]
        raise ValueError(f"the tokenizer marks tokens by {mark!r} ({marks[0]}); {_REMEDY}")
    whole = _whole_tokens(tokenizer, vocabulary)
    if not whole:
        return
    if dump.get("decoder") is None:
        _check_spaces(backend, vocabulary, whole)
        return
    lines = [
        [whole[(line + k * (len(whole) // _LENGTH + 1)) % len(whole)] for k in range(_LENGTH)]
        for line in range(_LINES)
    ]
    lines += [[whole[0], i, whole[-1]] for i in _whole_tokens(tokenizer, vocabulary, added=True)]
    for ids in lines:
        spelled = vocabulary.join(ids).decode()
        decoded = backend.decode(ids, skip_special_tokens=False)
        # Where every text is given a space to begin with, the decoder takes one away.
        if decoded not in (spelled, spelled.removeprefix(" ")):
            raise ValueError(
                f"the tokenizer's decoder makes {decoded!r} of tokens that spell {spelled!r}; "
                f"{_REMEDY}"
            )


def _whole_tokens(tokenizer: Any, vocabulary: Vocabulary, added: bool = False) -> list[int]:
    """Ordinary tokens of whole characters, some from all over the vocabulary.

    Args:
        tokenizer: a transformers tokenizer.
        vocabulary: its tokens as bytes.
        added: those that were added to it, instead of the others.
    """
    known = tokenizer.added_tokens_decoder
    ordinary = np.flatnonzero(~vocabulary.special)
    if added:
        ordinary = np.array([i for i in ordinary.tolist() if i in known], dtype=int)
    found = []
    for i in ordinary[:: max(1, len(ordinary) // 256)].tolist():
        text = vocabulary.text(i)
        if (i in known) == added and text.isprintable() and "\ufffd" not in text:
            found.append(i)
    return found


def _check_spaces(backend: Any, vocabulary: Vocabulary, whole: list[int]) -> None:
    """Raises ValueError if spaces between words are in no token.

    Without a decoder tokens are shown with spaces between them, which says nothing of the text.
    """
    word = next((t for i in whole if (t := vocabulary.text(i)).isalnum()), None)
    if word is None:
        return
    ids = backend.encode(f"{word} {word}", add_special_tokens=False).ids
    if any(i >= vocabulary.size or vocabulary.special[i] for i in ids):
        return
    spelled = vocabulary.join(ids).decode("utf-8", errors="replace")
    if spelled == word + word:
        raise ValueError(
            f"the tokenizer's tokens of {word + ' ' + word!r} spell {spelled!r}: the spaces "
            f"between words are in none of them; {_REMEDY}"
        )


def appended(tokenizer: Any, vocabulary: Vocabulary) -> tuple[int, ...]:
    """The ids that a tokenizer puts after every text that it is given.

    Args:
        tokenizer: a transformers tokenizer.
        vocabulary: its tokens as bytes.
    """
    whole = _whole_tokens(tokenizer, vocabulary)
    if not whole:
        return ()
    text = vocabulary.text(whole[len(whole) // 2])
    plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    given = tokenizer(text, split_special_tokens=True)["input_ids"]
    for first in range(len(given) - len(plain) + 1):
        if plain and given[first : first + len(plain)] == plain:
            return tuple(given[first + len(plain) :])
    return ()
