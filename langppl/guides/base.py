"""What a guide is: it proposes values for the latents and knows their log q."""

from __future__ import annotations

from abc import ABC, abstractmethod

from langppl.program import Program
from langppl.program.execution import Chooser, draw_prior

Key = tuple[int | str, ...]


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

    def check(self, program: Program) -> None:  # noqa: B027 - most guides fit every program
        """Raises ValueError if the guide does not fit a program."""


class PriorGuide(Guide):
    """Draws latents from the model itself: weights are the likelihood of what is observed."""

    name = "prior"

    def chooser(self, program: Program, key: Key) -> Chooser:
        """See `Guide.chooser`."""
        return lambda name, fn, execution: draw_prior(fn, (*key, name))
