"""`Text`: a string that remembers the tokens it was drawn as.

A language model is a distribution over token sequences, and several sequences may spell the same
text. A drawn value therefore carries its token ids and the fingerprint of its tokenizer, so that
it is scored by the tokens it was drawn as. To a program it is a plain `str`: every operation on
it (slicing, `+`, f-strings) gives ordinary text again, whose tokens are the canonical ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langppl.lm.texts import plain_text

_OF_TENSORS = ("ndim", "shape", "dim", "detach", "new_zeros")
_INSTEAD = (
    ": a text is no tensor. In the place of pyro.deterministic write lp.deterministic, of "
    "Predictive posterior.predict; an AutoGuide is given the model without its strings, "
    "poutine.block(model, hide=[...])"
)


class Text(str):
    """A `str` with the token ids that it was drawn as.

    Equality and hashing are those of the text alone. Copying, pickling and `copy.deepcopy` keep
    the ids.

    Args:
        text: the text itself.
        ids: the token ids it was drawn as, or None for the canonical ones.
        tokenizer: fingerprint of the tokenizer that the ids belong to (`LM.fingerprint`).
    """

    __slots__ = ("ids", "tokenizer")

    ids: tuple[int, ...] | None
    tokenizer: str | None

    def __new__(
        cls, text: str, ids: Sequence[int] | None = None, tokenizer: str | None = None
    ) -> Text:
        """Makes the string; `str` is immutable, so the ids are attached here."""
        self = super().__new__(cls, plain_text(text))
        self.ids = None if ids is None else tuple(int(i) for i in ids)
        self.tokenizer = tokenizer
        return self

    if not TYPE_CHECKING:  # else every attribute would be one

        def __getattr__(self, name: str) -> Any:
            """Says what to write where Pyro takes a text for a tensor."""
            more = _INSTEAD if name in _OF_TENSORS else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{more}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Keeps the ids through copies and between processes."""
        return (Text, (plain_text(self), self.ids, self.tokenizer))

    def __deepcopy__(self, memo: dict[int, Any]) -> Text:
        """Immutable, so a copy is the value itself."""
        return self
