"""What a training was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

from langppl.guides import objectives
from langppl.guides.schedules import RewardSchedule
from langppl.lm.counts import as_count, as_number, as_pair, as_part, as_share
from langppl.program.lengths import as_lengths

_Objective = Literal[
    "auto",
    "subtb",
    "db",
    "vargrad",
    "tb",
    "forward_kl",
    "reverse_kl",
    "rao_blackwell",
    "reward",
    "rws",
    "mle",
]
OBJECTIVES: tuple[str, ...] = get_args(_Objective)
Objective: TypeAlias = _Objective | str
"""The names, for editors to offer; any `str`, for whoever goes over several, or reads one."""
BALANCE = ("auto", "subtb", "db", "vargrad", "tb")
ON_POLICY = ("reverse_kl", "rao_blackwell", "reward", "rws")
OF_WHOLE_DRAWS = {
    "reverse_kl": objectives.reverse_kl,
    "reward": objectives.reward,
    "rws": objectives.wake,
}
"""Those of ON_POLICY that need nothing but log R and log q."""

LEAST_NEW = 2
"""New draws of an observation in a step: log Z and the baselines are of these, not of replay."""

_COUNTS = {
    "steps": 1,
    "batch": 2,
    "observations": 1,
    "warmup": 0,
    "replay_size": 0,
    "draw_ahead": 1,
    "every": 1,
    "validate_every": 1,
    "validation_samples": 1,
    "accumulate": 1,
    "checkpoint_every": 1,
}
"""Settings that are numbers of things, and the least of each."""

_NUMBERS = (
    "learning_rate",
    "head_rate",
    "lam",
    "clip",
    "given_share",
)
_PARTS = ("tempered_share", "replay_share", "replay_distance", "simulated_share")


def check_objective(objective: str) -> None:
    """Raises ValueError for an objective that is not known."""
    if objective not in OBJECTIVES:
        raise ValueError(
            f"unknown objective {objective!r}; objectives are: {', '.join(OBJECTIVES)}"
        )


def as_temperature(value: Any) -> float | tuple[float, float]:
    """A sampling temperature, or the range of one, as they are given.

    Raises:
        ValueError: if it is neither a number nor two.
    """
    name = "sampling_temperature"
    if isinstance(value, Real):
        return as_number(name, value)
    return as_pair(name, value, "a number, or two (low, high)")


@dataclass(frozen=True)
class Settings:
    """What `GFlowNetGuide.fit` was asked for; see there."""

    steps: int
    batch: int
    observations: int
    objective: str
    learning_rate: float
    head_rate: float
    betas: tuple[float, float]
    warmup: int
    clip: float
    lam: float
    schedule: RewardSchedule
    tempered_share: float
    sampling_temperature: float | tuple[float, float]
    replay_share: float
    replay_size: int
    replay_distance: float
    draw_ahead: int
    every: int
    given_share: float
    simulated_share: float
    lengths: Mapping[str, int] | None
    validate_every: int
    validation_samples: int
    patience: int | None
    keep_best: bool
    average: float
    accumulate: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            self._put(name, as_count(name, getattr(self, name), least))
        for name in _NUMBERS:
            self._put(name, as_number(name, getattr(self, name)))
        for name in _PARTS:
            self._put(name, as_part(name, getattr(self, name)))
        self._put("average", as_share("average", self.average))
        if self.lengths is not None:
            self._put("lengths", as_lengths(self.lengths))
        for name in ("learning_rate", "head_rate", "lam"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value!r}")
        if not self.clip > 0.0:
            raise ValueError(f"clip must be above 0 (math.inf for none), got {self.clip!r}")
        if not 0.0 < self.given_share <= 1.0:
            raise ValueError(f"given_share must be above 0 and at most 1, got {self.given_share}")
        own = self.batch - round(self.batch * self.simulated_share)
        # Maximum likelihood compares no draws with each other.
        least = {"mle": 1, "forward_kl": 0}.get(self.objective, LEAST_NEW)
        if own < least:
            kind = "given" if self.objective == "mle" else "the guide's own"
            raise ValueError(
                f"simulated_share={self.simulated_share} of batch={self.batch} leaves {own} of "
                f"{kind} draws, and objective={self.objective!r} needs at least {least}; take a "
                "smaller share or a larger batch"
            )
        low, high = self.temperatures
        if not 0.0 < low <= high < math.inf:
            raise ValueError(
                "sampling_temperature must be above 0, or a range (low, high) of such numbers, "
                f"got {self.sampling_temperature}"
            )
        if self.patience is not None:
            self._put("patience", as_count("patience", self.patience, 1))

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def as_used(self) -> Settings:
        """With what the objective leaves no choice of."""
        if self.objective in ON_POLICY:
            return replace(self, tempered_share=0.0, replay_share=0.0, draw_ahead=1)
        if self.objective in ("mle", "forward_kl"):
            return replace(self, replay_share=0.0, given_share=1.0)
        return self

    def is_averaged(self, step: int) -> bool:
        """Whether the weights after a step, counted from 0, are among the last ones."""
        return step >= self.steps - round(self.average * self.steps)

    @property
    def temperatures(self) -> tuple[float, float]:
        """The range of the sampling temperature."""
        found = self.sampling_temperature
        return found if isinstance(found, tuple) else (found, found)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))
