"""What Markov chains say of themselves: how often they move, and whether they agree.

A chain's samples are equally weighted, but each depends on the one before. R-hat compares the
spread within (halves of) chains with that between them, and the ESS says how many independent
samples they are worth. Both are arviz's, for real-valued summaries of the samples.

References:
    A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P.-C. Bürkner (2021). Rank-normalization,
    folding, and localization: an improved R-hat for assessing convergence of MCMC. Bayesian
    Analysis 16(2).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from langppl.diagnostics import Array, _arviz

__all__ = ["Chains", "agreement", "chain_notes"]

R_HAT = 1.01
"""Up to here chains agree (Vehtari et al. 2021)."""

ESS = 400
"""From here on R-hat and the ESS itself can be believed (Vehtari et al. 2021)."""

LOW_ACCEPTANCE = 0.05
"""Below this share of accepted moves a chain hardly moves."""

_LEAST_DRAWS = 4  # arviz judges no shorter chains


@dataclass(frozen=True)
class Chains:
    """Chains behind a posterior, whose samples are theirs one chain after the other.

    Attributes:
        number: how many.
        draws: samples of each.
        warmup: steps of each that were left out before the first sample.
        thin: steps from one sample to the next.
        moves: kind of move → how many were tried after the warm-up, in all chains.
        acceptance: kind of move → share of them that were accepted.
        r_hat: summary → rank-normalised split R-hat; inf if no chain moves but they differ, NaN
            if they are too short to judge. Summaries that never vary are left out.
        ess_of: summary → effective sample size (arviz's bulk ESS), NaN as above.
    """

    number: int
    draws: int
    warmup: int
    thin: int
    moves: dict[str, int]
    acceptance: dict[str, float]
    r_hat: dict[str, float]
    ess_of: dict[str, float]

    @property
    def ess(self) -> float:
        """The smallest ESS; NaN if it is not known."""
        return math.nan if self.least is None else self.ess_of[self.least]

    @property
    def least(self) -> str | None:
        """The summary with the smallest ESS, None if nothing varies."""
        return min(self.ess_of, key=lambda k: _low(self.ess_of[k]), default=None)

    @property
    def worst(self) -> str | None:
        """The summary with the largest R-hat, None if nothing varies."""
        return max(self.r_hat, key=lambda k: _high(self.r_hat[k]), default=None)

    @property
    def agree(self) -> bool:
        """Whether they are long enough to be judged, and agree: R-hat ≤ 1.01 and ESS ≥ 400."""
        return self.worst is not None and self.r_hat[self.worst] <= R_HAT and self.ess >= ESS

    def lines(self) -> list[str]:
        """What a table says of them."""
        moved = ", ".join(f"{rate:.1%} of {kind} moves" for kind, rate in self.acceptance.items())
        lines = [f"{self.number} chains of {self.draws} samples; accepted: {moved or 'nothing'}"]
        if self.least is None or self.worst is None:
            return ["ESS and R-hat unknown: no summary of the samples ever varies", *lines]
        ess, r_hat = self.ess_of[self.least], self.r_hat[self.worst]
        if math.isnan(ess) or math.isnan(r_hat):
            return [f"ESS and R-hat unknown: fewer than {_LEAST_DRAWS} samples a chain", *lines]
        first = (
            f"ESS {ess:.1f} of {self.number * self.draws} samples (of {self.least}), "
            f"R-hat {r_hat:.3f} (of {self.worst})"
        )
        return [first, *lines]

    def to_json(self) -> dict[str, object]:
        """The fields, infinite numbers as text."""
        content = dataclasses.asdict(self)
        for name in ("r_hat", "ess_of"):
            content[name] = {k: v if math.isfinite(v) else str(v) for k, v in content[name].items()}
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> Chains:
        """The inverse of `to_json`."""
        fields = dict(content)
        for name in ("r_hat", "ess_of"):
            table = fields[name]
            assert isinstance(table, dict)
            fields[name] = {k: float(v) for k, v in table.items()}
        return cls(**fields)  # type: ignore[arg-type]


def _low(number: float) -> float:
    return -math.inf if math.isnan(number) else number


def _high(number: float) -> float:
    return math.inf if math.isnan(number) else number


def agreement(series: Mapping[str, Array]) -> tuple[dict[str, float], dict[str, float]]:
    """R-hat and ESS of real-valued summaries.

    Args:
        series: summary → shape [chains, draws].

    Returns:
        Summary → R-hat, and summary → ESS; see `Chains`.

    Raises:
        ValueError: if a summary is not finite.
    """
    r_hat: dict[str, float] = {}
    ess: dict[str, float] = {}
    for name, values in series.items():
        if not np.isfinite(values).all():
            raise ValueError(f"the summary {name!r} of the chains is not finite")
        if np.ptp(values) == 0.0:
            continue
        if values.shape[1] < _LEAST_DRAWS:
            r_hat[name] = ess[name] = math.nan
        elif not np.ptp(values, axis=1).any():
            r_hat[name], ess[name] = math.inf, float(len(np.unique(values)))
        else:
            r_hat[name], ess[name] = _judged(values)
    return r_hat, ess


def _judged(values: Array) -> tuple[float, float]:
    if len(values) == 1:  # a single chain is compared with itself, half by half
        half = values.shape[1] // 2
        halves = np.stack([values[0, :half], values[0, -half:]])
    else:
        halves = values
    if halves.shape[1] < _LEAST_DRAWS:
        return math.nan, math.nan
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        r_hat, ess = float(_arviz().rhat(halves)), float(_arviz().ess(values))
    return r_hat, min(ess, float(values.size)) if ess > 0.0 else math.nan


def chain_notes(chains: Chains) -> list[str]:
    """In words, what is wrong with chains and what to do; empty if nothing is."""
    notes = []
    for kind, rate in chains.acceptance.items():
        if rate < LOW_ACCEPTANCE:
            other = "smaller" if kind == "tail" else "larger"
            notes.append(
                f"only {rate:.1%} of the {kind} moves were accepted, so these hardly move the "
                'chains: use a guide that reads the observations ("prompted", "gflownet"), a '
                f"{other} tail_share, or draw more samples"
            )
    worst = chains.worst
    if worst is not None and chains.r_hat[worst] > R_HAT:
        notes.append(
            f"the chains do not agree yet (R-hat of {worst} is above {R_HAT}), so the "
            "probabilities cannot be trusted: draw more samples, with a longer warm-up"
        )
    elif not chains.agree and worst is not None:
        notes.append(
            f"the chains are worth fewer than {ESS} independent samples, too few to tell whether "
            "they agree: draw more"
        )
    return notes
