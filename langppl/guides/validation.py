"""How well a guide does on observations that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from langppl.diagnostics import effective_sample_size
from langppl.guides.policy import Policy
from langppl.guides.trajectories import log_q, policy_scores
from langppl.program import Program

if TYPE_CHECKING:
    from langppl.guides.training import Trainer

CHUNK = 256
"""Draws that are in memory at once."""


@dataclass(frozen=True)
class Validation:
    """Figures of one observation, or their means over several.

    Attributes:
        elbo: mean log weight of the possible draws plus the log of their share, nats: a lower
            bound on the log evidence; −inf if none is possible.
        variance: of log R − log q over possible draws from a tempered policy, nats²: 0 for the
            posterior itself, whatever the draws.
        ess: effective sample size of the weighted draws, a share of their number.
        impossible: share of the draws.
    """

    elbo: float
    variance: float
    ess: float
    impossible: float

    @classmethod
    def mean(cls, several: Sequence[Validation]) -> Validation:
        """Means over observations; a variance that is not known is left out."""
        known = [v.variance for v in several if not math.isnan(v.variance)]
        return cls(
            float(np.mean([v.elbo for v in several])),
            float(np.mean(known)) if known else math.nan,
            float(np.mean([v.ess for v in several])),
            float(np.mean([v.impossible for v in several])),
        )

    def figures(self) -> dict[str, float]:
        """As training reports them."""
        return {
            "val_elbo": self.elbo,
            "val_variance": self.variance,
            "val_ess": self.ess,
            "val_impossible": self.impossible,
        }


def of_gaps(plain: NDArray[Any], tempered: NDArray[Any]) -> Validation:
    """The figures from log R − log q of one observation's draws.

    Args:
        plain: of draws from the guide, shape [n], nats; −inf marks an impossible one.
        tempered: of draws from the tempered policy, shape [m].
    """
    possible = plain[np.isfinite(plain)]
    share = len(possible) / len(plain)
    hot = tempered[np.isfinite(tempered)]
    return Validation(
        elbo=float(possible.mean() + math.log(share)) if share else -math.inf,
        variance=float(hot.var(ddof=1)) if len(hot) > 1 else math.nan,
        ess=effective_sample_size(plain) / len(plain),
        impossible=1.0 - share,
    )


def validate(
    trainer: Trainer, programs: Mapping[int, Program], samples: int, temperature: float
) -> list[Validation]:
    """Figures of each program.

    Args:
        trainer: what knows the guide.
        programs: by the observation's number, on which the random numbers depend.
        samples: draws of the guide for each, and as many of the tempered policy.
        temperature: of the tempered policy.
    """
    found = []
    together = max(1, CHUNK // (2 * samples))
    numbered = list(programs.items())
    for first in range(0, len(numbered), together):
        own = numbered[first : first + together]
        policies = [
            [
                Policy(
                    trainer.drawing.proposer,
                    p,
                    (trainer.guide.seed, "validate", k, i),
                    1.0 if i < samples else temperature,
                )
                for i in range(2 * samples)
            ]
            for k, p in own
        ]
        draws = trainer.drawing.rewards([p for _, p in own], policies, prefixes=False)
        with torch.no_grad():
            scores = policy_scores(
                [d for ds in draws for d in ds], trainer.lm, trainer.guide.adapter
            )
        flat = iter(scores)
        for ds in draws:
            gaps = []
            for d in ds:
                with torch.no_grad():
                    own_q = float(log_q(d, next(flat), trainer.guide.heads).sum())
                gaps.append(d.log_reward - own_q)
            values = np.array(gaps, dtype=np.float64)
            found.append(of_gaps(values[:samples], values[samples:]))
    return found
