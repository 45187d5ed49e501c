"""How a training's target moves to the posterior."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from langppl.lm.counts import as_number, as_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RewardSchedule:
    """How much of the reward counts during training.

    The target is p(latents)·(the rest of the joint)^power: at power 0 the prior, at 1 the
    posterior, above 1 sharper than it. Below 1 helps where evidence is rare: it comes in by and by.
    Above 1 helps an amortized guide whose context already shows it the evidence: what it does with
    it is not unlearned while its distance from the prior shrinks, which is the easier part.

    Attributes:
        start: power at the first step, at least 0.
        until: share of the steps after which it is `end`, between 0 and 1.
        end: power from there on, at least 0; at another than 1 the guide does not become the
            posterior but a sharper one (above 1), nearer to what the evidence asks for than the
            prior would have it, or a flatter one.

    Raises:
        ValueError: for a value out of range.
    """

    start: float = 0.5
    until: float = 0.3
    end: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "until", as_share("until", self.until))
        for name in ("start", "end"):
            value = as_number(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")

    def __str__(self) -> str:
        """The schedule in words, on one line."""
        if self.start == self.end:
            return f"reward power {self.end:g} throughout"
        first = f"reward power {self.start:g} at the first step"
        if self.until == 0.0:
            return f"{first}, then {self.end:g}"
        way = "rising" if self.start < self.end else "falling"
        return f"{first}, {way} to {self.end:g} after {100.0 * self.until:g} % of the steps"

    @property
    def is_plain(self) -> bool:
        """Whether the reward is never tempered."""
        return self.start == self.end == 1.0

    def power(self, step: int, steps: int) -> float:
        """The power at a step, counted from 0."""
        done = step / max(self.until * steps, 1.0)
        return self.end if done >= 1.0 else self.start + (self.end - self.start) * done

    def powers(self, steps: int) -> list[float]:
        """The power at each step of a training.

        Args:
            steps: how many steps it has, at least 1.

        Returns:
            As many powers.

        Raises:
            ValueError: if there is no step.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return [self.power(step, steps) for step in range(steps)]

    def plot(self, steps: int, ax: Axes | None = None) -> Figure:
        """Draws the power at each step: see `langppl.plots.plot_schedule`."""
        plots = importlib.import_module("langppl.plots")
        figure: Figure = plots.plot_schedule(self, steps, ax)
        return figure
