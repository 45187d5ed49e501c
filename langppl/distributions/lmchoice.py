"""`LMChoice`: one of several given strings, by the probabilities an LM gives them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langppl.distributions import sites
from langppl.distributions.base import Key, Pending, StringDistribution
from langppl.distributions.lmstring import LMString
from langppl.distributions.text import Text
from langppl.lm.model import LM
from langppl.lm.prompts import Prompt
from langppl.lm.requests import Reading, Reply, ScoreReply, ScoreRequest, perform, read_as
from langppl.lm.rules import Path, Violation
from langppl.lm.seeds import generator
from langppl.lm.texts import plain_text
from langppl.lm.trainable import TrainableLM
from langppl.warn import warn


class LMChoice(StringDistribution):
    """A categorical over given strings: the log-softmax of their open log-probabilities.

    Args:
        lm: the LM, or a trainable view of one.
        prompt: the text before the string, or a chat.
        options: the strings, at least one, all different. An option that begins another one has
            the other's probability in its own, and warns when it is drawn or scored.

    Raises:
        ValueError: if options are missing, equal, or cannot be written in the LM's tokens.
        TypeError: if an option is not a string.

    Example:
        >>> mood = LMChoice(lm, "The review is", [" positive", " negative"])
    """

    def __init__(self, lm: LM | TrainableLM, prompt: Prompt, options: Sequence[str]) -> None:
        if isinstance(options, str):
            raise TypeError(f"options must be a list of strings, got the string {options!r}")
        listed = tuple(options)
        if not listed:
            raise ValueError(f"{sites.where()}options are empty: a choice needs at least one")
        for option in listed:
            if not isinstance(option, str):
                raise TypeError(f"{sites.where()}an option must be a string, got {option!r}")
        seen: set[str] = set()
        for option in listed:
            if option in seen:
                raise ValueError(f"{sites.where()}the option {option!r} is given twice")
            seen.add(option)
        # A latent among the options keeps its type, by which it is known for text that was drawn.
        self.options = tuple(o if isinstance(o, Text) else plain_text(o) for o in listed)
        self._open = LMString(lm, prompt)
        self.lm, self.adapter = self._open.lm, self._open.adapter
        self.prompt = self._open.prompt

    def _warn_of_prefixes(self) -> None:
        # When an LM is asked, not before: options may be made of latents, and while a program's
        # structure is searched these have values that nobody drew.
        if self._prefixes is not None:
            short, long = self._prefixes
            warn(
                f"{sites.where()}the option {short!r} begins the option {long!r}, so its "
                "probability includes the other's; make the options end differently",
                once=("begins", sites.current() or self.options),
            )

    @functools.cached_property
    def _prefixes(self) -> tuple[str, str] | None:
        """An option that begins another one, and the other."""
        # Sorted, an option that begins another one stands right before one that it begins.
        ordered = sorted(plain_text(o) for o in self.options)
        pairs = itertools.pairwise(ordered)
        return next(((short, long) for short, long in pairs if long.startswith(short)), None)

    def with_prompt(self, prompt: Prompt, options: Sequence[str] | None = None) -> LMChoice:
        """The same choice after another prompt."""
        other = LMChoice.__new__(LMChoice)
        other.lm, other.adapter = self.lm, self.adapter
        other.options = tuple(self.options if options is None else options)
        other._open = self._open.with_prompt(prompt)
        other.prompt = other._open.prompt
        return other

    def fields(self) -> tuple[Any, ...]:
        """See `StringDistribution.fields`."""
        return (id(self.lm), self.adapter, self.prompt, self.options)

    def prompt_ids(self) -> tuple[int, ...]:
        """See `StringDistribution.prompt_ids`."""
        return self._open.prompt_ids()

    def why_impossible(self, value: object) -> str | None:
        """See `StringDistribution.why_impossible`."""
        if value in self.options:
            return None
        return f"it is none of the options {list(self.options)!r}"

    def requests(
        self, *, prompt: Reading | None = None, adapter: str | None = None
    ) -> list[ScoreRequest]:
        """One request for each option.

        Raises:
            ValueError: if an option cannot be written in the LM's tokens.
        """
        self._warn_of_prefixes()
        read, beside, longest = read_as(prompt, self.prompt_ids(), self.adapter)
        found = []
        for option in self.options:
            self._open._check_join(option)
            path = self._open.parse(plain_text(option), len(read))
            if isinstance(path, Violation):
                raise ValueError(
                    f"{sites.where()}the option {option!r} has probability zero under "
                    f"{self.lm!r}: {path.reason}"
                )
            assert isinstance(path, Path)
            self._open._check_fits(longest, len(path.tokens))
            under = self.adapter if adapter is None else adapter
            found.append(ScoreRequest(self.lm, read, path, 1.0, under, beside))
        return found

    @staticmethod
    def _normalised(replies: Sequence[Reply]) -> NDArray[Any]:
        scores = np.array([r.log_prob for r in replies if isinstance(r, ScoreReply)])
        shifted: NDArray[Any] = scores - scores.max()
        normalised: NDArray[Any] = shifted - np.log(np.exp(shifted).sum())
        return normalised

    def log_probs(
        self, *, prompt: Reading | None = None, adapter: str | None = None
    ) -> NDArray[Any]:
        """Log-probability of each option, shape [options], nats."""
        return self._normalised(perform(self.requests(prompt=prompt, adapter=adapter)))

    def draw(
        self,
        key: Key,
        *,
        prompt: Reading | None = None,
        adapter: str | None = None,
        temperature: float = 1.0,
    ) -> tuple[Text, float]:
        """See `StringDistribution.draw`; the temperature divides the log-probabilities."""
        scaled = self.log_probs(prompt=prompt, adapter=adapter) / temperature
        scaled -= scaled.max()
        scaled -= np.log(np.exp(scaled).sum())
        if np.isnan(scaled).any():
            raise ValueError(
                f"{sites.where()}the options' log-probabilities are {scaled.tolist()}; are the "
                "LM's weights finite?"
            )
        cdf = np.exp(scaled).cumsum()
        at = int(np.searchsorted(cdf[:-1], generator(key).random() * cdf[-1], side="right"))
        return self.text(at), float(scaled[at])

    def text(self, at: int) -> Text:
        """An option as a value."""
        option = plain_text(self.options[at])
        return Text(option, self.lm.encode_text(option), self.lm.fingerprint)

    def pending(
        self, value: str, *, prompt: Reading | None = None, adapter: str | None = None
    ) -> Pending:
        """See `StringDistribution.pending`."""
        if value not in self.options:
            return Pending((), lambda _: -np.inf)
        at = self.options.index(value)
        requests = self.requests(prompt=prompt, adapter=adapter)
        return Pending(requests, lambda replies: float(self._normalised(replies)[at]))
