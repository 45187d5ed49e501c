"""What a guide is: it proposes values for the latents and knows their log q."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from langppl.program import Program
from langppl.program.execution import Chooser, Execution, draw_prior

Key = tuple[int | str, ...]

Scorer = Callable[[str, Any, Any, Execution], float]
"""Log-probability (nats) with which a guide proposes a value.

Takes the latent's name, its distribution, the value, and the execution before it.
"""


class Guide(ABC):
    """Proposes values for a program's latents.

    Attributes:
        name: shown in tables.
    """

    name: str = "guide"

    @abstractmethod
    def chooser(self, program: Program, key: Key) -> Chooser:
        """What decides the latents of one execution.

        Each `Choice` it makes carries `log_q`, the log-probability (nats) with which the value
        was drawn. A latent that the guide does not cover is drawn from the prior.

        Args:
            program: the program.
            key: what the random numbers of this execution depend on.
        """

    def scorer(self, program: Program, key: Key) -> Scorer:
        """What tells how likely the chooser of the same key is to propose a value.

        Metropolis–Hastings asks it for the way back, from the value proposed to the one before. A
        guide that draws random numbers to make its proposal makes it with the same ones here.

        Args:
            program: the program.
            key: the chooser's key.

        Raises:
            NotImplementedError: if the guide does not know.
        """
        raise NotImplementedError(
            f"guide {self.name!r} cannot tell with which probability it proposes a given value, "
            'which method="mh" needs for the way back; implement its scorer()'
        )

    def reads(
        self, program: Program, name: str, fn: Any, execution: Execution
    ) -> tuple[tuple[int, ...] | None, str | None]:
        """What the guide's LM reads where it goes on with a string that has begun.

        Args:
            program: the program.
            name: the latent.
            fn: its distribution.
            execution: the execution before it.

        Returns:
            The ids to read in place of the site's own prompt, and the adapter; None for the
            prompt, and for the LM itself. The default is the model's own law.
        """
        return None, None

    def check(self, program: Program) -> None:  # noqa: B027 - most guides fit every program
        """Raises ValueError if the guide does not fit a program."""


class PriorGuide(Guide):
    """Draws latents from the model itself: weights are the likelihood of what is observed."""

    name = "prior"

    def chooser(self, program: Program, key: Key) -> Chooser:
        """See `Guide.chooser`."""
        return lambda name, fn, execution: draw_prior(fn, (*key, name))

    def scorer(self, program: Program, key: Key) -> Scorer:
        """See `Guide.scorer`."""
        return lambda name, fn, value, execution: log_prior(fn, value)


def log_prior(fn: Any, value: Any) -> float:
    """Log-probability (nats) of a value under a site's own distribution."""
    return float(fn.log_prob(value).sum())
