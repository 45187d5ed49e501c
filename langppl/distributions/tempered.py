"""`Tempered`: a string's distribution raised to a power, over whole sequences."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch

from langppl.distributions.base import StringDistribution, Undrawn
from langppl.distributions.lmstring import LMString
from langppl.distributions.text import Text
from langppl.lm.rules import check_temperature


class Tempered(Undrawn, dist.Distribution):
    """The unnormalised p(z)^(1/T) over whole strings.

    `langppl.sample`, and Pyro's own in a program, runs it as the site itself, drawn from p, and a
    `factor` of (1/T − 1)·log p(z), so any handler sees both. Below T = 1 it sharpens towards the
    likeliest *strings*, which dividing logits token by token does not do. It has no normaliser:
    where the prompt depends on a latent, the missing one reweights that latent.

    Args:
        base: an `LMString` or an `LMChoice`.
        temperature: T, above 0; above 1 an `LMString` needs `max_tokens`, or the sum over all
            strings need not be finite. At `math.inf` all strings that the rules allow count
            alike: a uniform distribution, over token sequences.

    Raises:
        ValueError: for a temperature that is not above 0, or above 1 without `max_tokens`.
        TypeError: for another kind of base.
    """

    def __init__(self, base: StringDistribution, temperature: float) -> None:
        if not isinstance(base, StringDistribution):
            raise TypeError(f"Tempered takes an LMString or an LMChoice, got {base!r}")
        check_temperature(temperature)
        if isinstance(base, LMString):
            if base.is_open:
                raise ValueError("an open string cannot be tempered: it has no whole")
            if temperature > 1 and base.rules.max_tokens is None:
                raise ValueError(
                    f"temperature={temperature} is above 1 and the string has no max_tokens: the "
                    "sum over all strings need not be finite"
                )
        self.base = base
        self.temperature = float(temperature)

    def __call__(self, *args: Any, **kwargs: Any) -> Text:
        """Samples the base: a tempered string itself can only be weighted."""
        return self.sample()

    def sample(self, *args: Any, **kwargs: Any) -> Text:
        """Samples the base: a tempered string itself can only be weighted."""
        return self.base.sample()

    def log_prob(  # type: ignore[override]
        self, value: str, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Unnormalised log-density log p(value)/T, scalar, float64, nats."""
        log_prob = self.base.log_prob(value)
        return log_prob if torch.isneginf(log_prob) else log_prob / self.temperature

    def __repr__(self) -> str:
        """The base and the temperature."""
        return f"Tempered({self.base!r}, {self.temperature:g})"


class TemperedFactor(dist.Distribution):
    """The factor power·log p(value), power = 1/T − 1, that makes a site tempered."""

    def __init__(self, base: StringDistribution, power: float, value: str) -> None:
        self.base = base
        self.power = power
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A factor has no value."""
        return self.sample()

    def sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A factor has no value."""
        return torch.empty(0)

    def log_prob(  # type: ignore[override]
        self, value: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The factor's log weight, scalar, float64, nats."""
        log_prob = self.base.log_prob(self.value)
        # An impossible string stays impossible, whatever the sign of the power.
        return log_prob if torch.isneginf(log_prob) else self.power * log_prob
