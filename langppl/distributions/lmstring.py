"""`LMString`: a distribution over strings, normalised under stated rules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from langppl.distributions import sites
from langppl.distributions.base import Key, Pending, StringDistribution
from langppl.distributions.text import Text
from langppl.keywords import named
from langppl.lm.grammars import Grammar
from langppl.lm.model import LM
from langppl.lm.prompts import Prompt, begun_answer, check_prompt
from langppl.lm.requests import (
    DrawReply,
    DrawRequest,
    Reading,
    ScoreReply,
    ScoreRequest,
    perform,
    read_as,
)
from langppl.lm.rules import BoundRules, Path, StringRules, TokenFilter, Violation
from langppl.lm.texts import plain_text
from langppl.lm.trainable import TrainableLM, split
from langppl.lm.vocabulary import REPLACEMENT
from langppl.warn import warn


class JoinWarning(UserWarning):
    """A string is glued to its prompt without a space between two words."""


def check_ended(request: DrawRequest, reply: DrawReply) -> None:
    """Raises ValueError for a string that its context left no room to end in."""
    if request.length is not None and not (reply.is_ended or reply.is_dead):
        raise ValueError(
            f"{sites.where()}the string did not end within the {request.length} tokens that "
            f"{request.lm!r} can read after a context of {len(request.prompt)}; give its LMString "
            "max_tokens"
        )


class LMString(StringDistribution):
    """Strings that an LM writes after a prompt.

    A string ends with the LM's end token or with a stop; the probabilities of all token sequences
    that the rules allow sum to one (minus what `truncate="reject"` or a grammar rejects). Without
    `stop`, `max_tokens` and `grammar` it is *open*: the event "the text goes on like this", which
    can be observed but not sampled.

    Args:
        lm: the LM, or a trainable view of one.
        prompt: the text before the string, or a chat as a list of role/content messages. The
            string is the assistant's answer to a chat, or goes on from an assistant's message at
            its end. It is tokenised apart from the prompt.
        max_tokens: most tokens of the string, a stop included. With a stop and no `max_tokens`,
            the context window is the limit.
        min_tokens: tokens before the string may end.
        stop: text that ends the string, or several; the value includes it.
        truncate: `"keep"` cuts a string that is unfinished at `max_tokens`, with no further
            factor; `"reject"` gives it weight zero: the program is conditioned on finishing.
        temperature: divides the logits at each token, above 0.
        allow: the only tokens: a predicate on a token's text, or strings of which a token's text
            must be put together (`allow="0123456789"` as a list of characters: digits only).
        ban: tokens to leave out: a predicate, or strings that a token's text must not contain.
        grammar: what the whole text, a stop included, must belong to (`regex`, `json_schema`,
            `lark`, `one_of`). It masks tokens, whatever their spelling of a text, and the rest is
            renormalised at each token: another prior than the LM conditioned on the grammar, for
            which see `log_matches`. A string may end only where the grammar is complete, and one
            that is unfinished at `max_tokens` or comes to a dead end has weight zero, whatever
            `truncate` says. With a grammar and no `max_tokens`, the context window is the limit.

    Raises:
        ValueError: for rules that no string can follow.
        TypeError: for a prompt that is neither a string nor a chat, or a grammar that is none.

    Example:
        >>> name = LMString(lm, "My name is", stop=[".", ","], max_tokens=8)
        >>> float(name.log_prob(" Ada.")) < 0.0  # nats
        True
    """

    @named
    def __init__(
        self,
        lm: LM | TrainableLM,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        min_tokens: int = 1,
        stop: str | Sequence[str] | None = None,
        truncate: Literal["keep", "reject"] = "keep",
        temperature: float = 1.0,
        allow: TokenFilter | Sequence[str] | str | None = None,
        ban: TokenFilter | Sequence[str] | str | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        if grammar is not None and truncate == "keep":
            truncate = "reject"  # what is cut is no whole text of the grammar
        rules = StringRules(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=stop,  # type: ignore[arg-type]
            truncate=truncate,
            temperature=temperature,
            allow=allow,  # type: ignore[arg-type]
            ban=ban,  # type: ignore[arg-type]
            grammar=grammar,
        )
        base, adapter = split(lm)
        self._setup(base, adapter, check_prompt(prompt), rules)
        if grammar is not None:
            if rules.min_tokens and "" in grammar.texts:
                raise ValueError(
                    f"{sites.where()}{grammar.shown} has the empty text, and min_tokens="
                    f"{rules.min_tokens} leaves it out; give min_tokens=0, or leave that text out"
                )
            base.bind(rules)  # an impossible constraint is an error here

    def _setup(self, lm: LM, adapter: str | None, prompt: Prompt, rules: StringRules) -> None:
        self.lm = lm
        self.adapter = adapter
        self.prompt = prompt
        self.rules = rules

    def with_prompt(self, prompt: Prompt) -> LMString:
        """The same rules after another prompt."""
        other = LMString.__new__(LMString)
        other._setup(self.lm, self.adapter, check_prompt(prompt), self.rules)
        return other

    def with_rules(self, rules: StringRules) -> LMString:
        """The same prompt under other rules."""
        other = copy.copy(self)
        other.rules = rules
        return other

    @property
    def bound(self) -> BoundRules:
        """The rules over the LM's tokens."""
        try:
            return self.lm.bind(self.rules)
        except ValueError as error:
            if not sites.where():
                raise
            raise ValueError(f"{sites.where()}{error}") from error

    @property
    def is_open(self) -> bool:
        """Whether this is the event "the text goes on like this"."""
        return self.rules.is_open

    def fields(self) -> tuple[Any, ...]:
        """See `StringDistribution.fields`."""
        return (id(self.lm), self.adapter, self.prompt, self.rules)

    def prompt_ids(self) -> tuple[int, ...]:
        """See `StringDistribution.prompt_ids`."""
        ids = self.lm.encode_prompt(self.prompt)
        self._check_fits(len(ids), self.rules.max_tokens or 1)
        return ids

    def _check_fits(self, prompt: int, string: int) -> None:
        window = self.lm.window
        if window is not None and prompt + string > window:
            raise ValueError(
                f"{sites.where()}the prompt has {prompt} tokens and the string needs up to "
                f"{string} more, but {self.lm!r} reads at most {window}; shorten the prompt"
                + (" or max_tokens" if self.rules.max_tokens is not None else "")
            )

    def limit(self, prompt_length: int) -> int | None:
        """Most actions of the string after a prompt of some length; None if open."""
        return self.bound.limit(prompt_length, self.lm.window)

    # -- drawing ------------------------------------------------------------------------------

    def draw(
        self,
        key: Key,
        *,
        prompt: Reading | None = None,
        adapter: str | None = None,
        temperature: float = 1.0,
    ) -> tuple[Text, float]:
        """See `StringDistribution.draw`.

        Raises:
            ValueError: if the string is open.
        """
        return self.draw_on((), key, prompt=prompt, adapter=adapter, temperature=temperature)

    def draw_on(
        self,
        begun: tuple[int, ...],
        key: Key,
        *,
        prompt: Reading | None = None,
        adapter: str | None = None,
        temperature: float = 1.0,
    ) -> tuple[Text, float]:
        """Draws the rest of a string that has begun.

        Args:
            begun: the ids that are there already, none of them an ending action.
            key: what the random numbers depend on; with the key of a whole string and its first
                ids, the rest is that of the whole string.
            prompt: what to read in place of the distribution's own prompt (a guide's context).
            adapter: adapter on the LM in place of the distribution's own.
            temperature: divides the logits, on top of the distribution's own.

        Returns:
            The whole string, and the log-probability (nats) of what was drawn.

        Raises:
            ValueError: if the string is open, or what it has begun with breaks its rules.
        """
        if self.is_open:
            raise ValueError(
                f"{sites.where()}an open string cannot be sampled: it has no end. Give its "
                "LMString max_tokens or a stop, observe it, or simulate it or predict it at "
                "a given length (program.simulate or posterior.predict, with lengths={...})"
            )
        own = self.prompt_ids()
        # A guide's context may be longer than the prompt, but the string's limit is the model's.
        limit = self.limit(len(own))
        if limit is None:
            raise ValueError(
                f"{sites.where()}the string has no max_tokens and {self.lm!r} states no context "
                "window; give its LMString max_tokens"
            )
        read, beside, longest = read_as(prompt, own, self.adapter)
        if prompt is not None:
            self._check_fits(longest, self.rules.max_tokens or 1)
        # A context that is longer than the prompt leaves less room than the string may need.
        window = self.lm.window
        room = None if window is None or longest + limit <= window else window - longest
        under = self.adapter if adapter is None else adapter
        request = DrawRequest(
            self.lm, read, self.bound, limit, key, temperature, under, room, begun, beside
        )
        (reply,) = perform([request])
        assert isinstance(reply, DrawReply)
        check_ended(request, reply)
        return self.text_of(reply), reply.log_prob

    def text_of(self, reply: DrawReply) -> Text:
        """What was drawn, as a value."""
        return Text(reply.text, reply.ids, self.lm.fingerprint)

    def draw_open(self, key: Key, length: int) -> tuple[Text, float] | None:
        """Draws the first tokens of an open string.

        Args:
            key: what the random numbers depend on.
            length: tokens to draw.

        Returns:
            The text and its log-probability (nats); None if the LM ended the text before, or the
            tokens end inside a UTF-8 character.
        """
        # An ending action is legal, as in the unbounded string, so that the draws that did not end
        # follow the open string's own law given its length.
        own = self.prompt_ids()
        self._check_fits(len(own), length)
        request = DrawRequest(
            self.lm, own, self.bound, None, key, adapter=self.adapter, length=length
        )
        (reply,) = perform([request])
        assert isinstance(reply, DrawReply)
        if len(reply.ids) < length or reply.text.endswith(REPLACEMENT):
            return None
        return self.text_of(reply), reply.log_prob

    # -- scoring ------------------------------------------------------------------------------

    def tokens_of(self, value: str) -> tuple[int, ...]:
        """The ids by which a value is scored: its own under this tokenizer, else the canonical."""
        if (
            isinstance(value, Text)
            and value.ids is not None
            and value.tokenizer == self.lm.fingerprint
        ):
            return value.ids
        return self.lm.encode_text(value)

    def parse(self, value: object, prompt_length: int | None = None) -> Path | Violation:
        """The actions that produce a value, or the rule that it breaks.

        Args:
            value: the string.
            prompt_length: tokens of the prompt, where known.
        """
        if not isinstance(value, str):
            return Violation(f"it is a {type(value).__name__}, not a string")
        try:
            data = value.encode("utf-8")
        except UnicodeEncodeError:
            return Violation("it is not valid Unicode (a lone surrogate)")
        if prompt_length is None:
            prompt_length = len(self.prompt_ids())
        ids, limit = self.tokens_of(value), self.limit(prompt_length)
        found = self.bound.parse(ids, data, limit)
        if isinstance(found, Violation) and self._runs_past(value, ids, data):
            return self.bound.parse(self.lm.encode_text(plain_text(value)), data, limit)
        return found

    def is_read_anew(self, value: Text) -> bool:
        """Whether this site spells a drawn string by other tokens than those it was drawn in.

        So it is where the last of them goes on after a stop that this site has not.
        """
        data, ids = value.encode("utf-8"), self.tokens_of(value)
        found = self.bound.parse(ids, data, self.limit(len(self.prompt_ids())))
        return isinstance(found, Violation) and self._runs_past(value, ids, data)

    def _runs_past(self, value: str, ids: tuple[int, ...], data: bytes) -> bool:
        """Whether the last token goes on after a text, as past a stop that others' rules have."""
        vocabulary = self.lm.vocabulary
        if not (isinstance(value, Text) and value.ids is ids and ids):
            return False
        if any(not 0 <= i < vocabulary.size or vocabulary.special[i] for i in ids):
            return False
        whole, before = vocabulary.join(ids), vocabulary.join(ids[:-1])
        return whole.startswith(data) and len(before) < len(data) < len(whole)

    def why_impossible(self, value: object) -> str | None:
        """See `StringDistribution.why_impossible`."""
        return self.parse(value).reason

    def pending(
        self, value: str, *, prompt: Reading | None = None, adapter: str | None = None
    ) -> Pending:
        """See `StringDistribution.pending`."""
        request = self.request(value, prompt=prompt, adapter=adapter)
        if request is None or request.path.rejected:
            return Pending((), lambda _: -np.inf)

        def finish(replies: Sequence[Any]) -> float:
            (reply,) = replies
            assert isinstance(reply, ScoreReply)
            return reply.log_prob

        return Pending((request,), finish)

    def request(
        self, value: str, *, prompt: Reading | None = None, adapter: str | None = None
    ) -> ScoreRequest | None:
        """What to ask the LM for a value, None if the rules could not have produced it.

        A string that was cut and is rejected still has a request: a guide that drew it knows with
        which probability.
        """
        own = self.prompt_ids()
        self._check_join(value)
        path = self.parse(value, len(own))
        if isinstance(path, Violation):
            return None
        read, beside, longest = read_as(prompt, own, self.adapter)
        self._check_fits(longest, len(path.tokens))
        under = self.adapter if adapter is None else adapter
        return ScoreRequest(self.lm, read, path, self.rules.temperature, under, beside)

    def _check_join(self, value: object) -> None:
        """Warns once a site if plain text is glued to the last word of the prompt."""
        if isinstance(value, Text) or not isinstance(value, str) or not value:
            return
        before = begun_answer(self.prompt)
        if before is None:
            return
        last, first = before[-1:], value[:1]
        glued = (last.isalnum() and first.isalnum()) or (last in ".!?" and first.isalpha())
        if last and glued:
            warn(
                f"{sites.where()}the string {value[:20]!r} begins right after "
                f"{before[-20:]!r}, so its first word is glued to the prompt's last; LMs "
                f"expect the space with the word: {' ' + value[:20]!r}",
                JoinWarning,
                once=("join", sites.current()),
            )
