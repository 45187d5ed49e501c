"""What `em` was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from langppl.inference.settings import METHODS
from langppl.lm.counts import as_count, as_number

WEIGHTS = ("importance", "guide")


@dataclass(frozen=True)
class Settings:
    """What `em` was asked for; see there."""

    rounds: int
    method: str
    num_samples: int
    weights: str
    resample: int | None
    steps: int
    observations: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float

    def __post_init__(self) -> None:
        counts = {k: getattr(self, k) for k in ("rounds", "num_samples", "steps", "observations")}
        if self.resample is not None:
            counts["resample"] = self.resample
        for name, value in counts.items():
            object.__setattr__(self, name, as_count(name, value, 1))
        for name in ("learning_rate", "weight_decay", "clip"):
            object.__setattr__(self, name, as_number(name, getattr(self, name)))
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; methods are: {', '.join(METHODS)}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"unknown weights {self.weights!r}; they are: {', '.join(WEIGHTS)}")
        if self.weights == "guide" and self.method != "importance":
            raise ValueError(
                f'weights="guide" takes the guide\'s own draws, and method={self.method!r} has '
                'others; use method="importance"'
            )
        if not self.learning_rate > 0.0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not self.clip > 0.0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        if not self.weight_decay >= 0.0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
