"""What every distribution over strings offers to Pyro and to the rest of langppl."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro.poutine.runtime import _PYRO_STACK

from langppl.distributions import sites
from langppl.distributions.text import Text
from langppl.lm.model import LM
from langppl.lm.prompts import Prompt
from langppl.lm.requests import Reading, Reply, Request, perform

Key = tuple[int | str, ...]


@dataclass(frozen=True)
class Pending:
    """A log-probability that waits for the LM.

    Attributes:
        requests: what must be scored.
        finish: turns the replies into nats.
    """

    requests: Sequence[Request]
    finish: Callable[[Sequence[Reply]], float]


class Undrawn:
    """What is no text before it is drawn, so that it cannot get into a prompt by mistake."""

    def __format__(self, spec: str) -> str:
        """Refuses: in an f-string a distribution is a forgotten `sample`."""
        raise TypeError(self._forgotten())

    def __str__(self) -> str:
        """The repr; within a run of a model it refuses as `__format__` does."""
        if _PYRO_STACK:
            raise TypeError(self._forgotten())
        return repr(self)

    def _forgotten(self) -> str:
        return (
            f"{sites.where()}{self!r} is a distribution, and text is made of what is drawn from "
            "it: draw it with lp.sample(name, ...); to show it, write repr(...), or {...!r}"
        )


_NO_SHAPE = (
    "strings have no shape and are drawn one by one: give each a site of its own, in a sequential "
    "plate (for i in pyro.plate(...)). What of Pyro's takes tensors alone, such as an AutoGuide, "
    "is given the model without its strings, poutine.block(model, hide=[...])"
)
_INSTEAD = {
    "mask": "a mask goes around the site: with pyro.poutine.mask(mask=...): lp.sample(...)",
    **dict.fromkeys(
        ("expand", "expand_by", "to_event", "shape", "batch_shape", "event_shape", "event_dim"),
        _NO_SHAPE,
    ),
}


class StringDistribution(Undrawn, dist.Distribution):
    """A distribution over strings under an LM.

    To Pyro it is a distribution like any other: call it to sample, `log_prob` to score. Both ask
    the LM through `langppl.lm.perform`.

    Attributes:
        lm: the LM; of a trainable view, the LM that it is a view of.
        adapter: name of the adapter on the LM under which it is the model's own, as of a trainable
            view; None for the LM itself.
        prompt: the text before the string, or a chat.
    """

    lm: LM
    prompt: Prompt
    adapter: str | None = None

    @abstractmethod
    def draw(
        self,
        key: Key,
        *,
        prompt: Reading | None = None,
        adapter: str | None = None,
        temperature: float = 1.0,
    ) -> tuple[Text, float]:
        """Draws a string.

        Args:
            key: what the random numbers depend on.
            prompt: what to read in place of the distribution's own prompt (a guide's context).
            adapter: adapter on the LM in place of the distribution's own (a guide's).
            temperature: divides the logits, on top of the distribution's own.

        Returns:
            The string, and the log-probability (nats) with which it was drawn.
        """

    @abstractmethod
    def pending(
        self, value: str, *, prompt: Reading | None = None, adapter: str | None = None
    ) -> Pending:
        """What must be asked of the LM for the log-probability of a value.

        Args:
            value: the string; a `Text` of this LM is scored by its tokens.
            prompt: what to read in place of the distribution's own prompt.
            adapter: adapter on the LM in place of the distribution's own.
        """

    @abstractmethod
    def why_impossible(self, value: object) -> str | None:
        """The rule that a value breaks, or None if the rules could have produced it."""

    @abstractmethod
    def prompt_ids(self) -> tuple[int, ...]:
        """Token ids of the prompt.

        Raises:
            ValueError: if the prompt and the string do not fit the context window.
        """

    @abstractmethod
    def fields(self) -> tuple[Any, ...]:
        """All that tells this distribution from another of its type, prompts as text."""

    if not TYPE_CHECKING:  # else every attribute would be one

        def __getattr__(self, name: str) -> Any:
            """Says what stands in the place of what Pyro's distributions of tensors have."""
            more = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{more}")

    def __call__(self, *args: Any, **kwargs: Any) -> Text:
        """Samples; the random numbers come from torch's generator."""
        return self.sample()

    def sample(self, sample_shape: Sequence[int] = ()) -> Text:
        """Samples a string; the random numbers come from torch's generator.

        Raises:
            ValueError: for a sample shape: strings are drawn one by one.
        """
        if tuple(sample_shape):
            raise ValueError("strings are drawn one by one: sample() takes no sample shape")
        seed = int(torch.randint(2**62, ()))
        return self.draw(("torch", seed))[0]

    def log_prob(  # type: ignore[override]
        self, value: str, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Log-probability of a string.

        Args:
            value: the string; −inf if the rules could not have produced it.
            *args: not used; Pyro's signature has them.
            **kwargs: not used.

        Returns:
            Scalar, float64, nats.

        Raises:
            TypeError: for what is no string, such as a list of them.
        """
        if not isinstance(value, str):
            raise TypeError(
                f"{sites.where()}log_prob of a distribution over strings takes one str, got "
                f"{value!r} ({type(value).__name__}); for several at once: log_prob_many"
            )
        return self.log_prob_many([value])[0]

    def log_prob_many(self, values: Sequence[str]) -> torch.Tensor:
        """Log-probabilities of several strings, in one batch of the LM.

        Args:
            values: the strings.

        Returns:
            Shape [n], float64, nats; see `log_prob`.

        Raises:
            TypeError: for a single string, or for what is none.
        """
        if isinstance(values, str):
            raise TypeError(
                f"{sites.where()}log_prob_many takes several strings, got one, {values!r}"
            )
        for value in values:
            if not isinstance(value, str):
                raise TypeError(
                    f"{sites.where()}log_prob_many takes strings, got {value!r} "
                    f"({type(value).__name__})"
                )
        wanted = [self.pending(value) for value in values]
        replies = iter(perform([r for pending in wanted for r in pending.requests]))
        totals = [p.finish(tuple(islice(replies, len(p.requests)))) for p in wanted]
        return torch.tensor(totals, dtype=torch.float64)

    def __repr__(self) -> str:
        """The type and its prompt, shortened."""
        prompt = self.prompt if isinstance(self.prompt, str) else "chat"
        shown = prompt if len(prompt) <= 40 else "…" + prompt[-39:]
        view = "" if self.adapter is None else "+" + self.adapter.removeprefix("trainable-")
        return f"{type(self).__name__}({self.lm.name}{view}, {shown!r})"
