"""Independent parts of a program, each as its own draws show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from langppl import diagnostics
from langppl.diagnostics import Array


@dataclass(frozen=True)
class Part:
    """What is known of one of a program's independent parts.

    Attributes:
        sites: its latents.
        log_evidence: estimate of its share of the log evidence, nats.
        log_evidence_error: standard error of that, nats.
        ess: effective sample size of its weights.
        pareto_k: shape of their tail; NaN where it cannot be estimated.
        elbo: mean log weight of the possible draws, nats.
        impossible_share: share of its draws that are impossible.
    """

    sites: tuple[str, ...]
    log_evidence: float
    log_evidence_error: float
    ess: float
    pareto_k: float
    elbo: float
    impossible_share: float

    @classmethod
    def of(cls, sites: Sequence[str], log_weights: Array) -> Part:
        """A part by its latents and the log weights of its draws, nats; some are finite."""
        evidence, error = diagnostics.log_evidence(log_weights)
        possible = log_weights[log_weights > -np.inf]
        return cls(
            tuple(sites),
            evidence,
            error,
            diagnostics.effective_sample_size(log_weights),
            diagnostics.pareto_k(log_weights),
            float(possible.mean()),
            1.0 - len(possible) / len(log_weights),
        )

    def to_json(self) -> dict[str, Any]:
        """What strict JSON can hold of it, which is all."""
        found = asdict(self)
        return {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in found.items()
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Part:
        """The inverse of `to_json`."""
        numbers = {k: float(v) for k, v in content.items() if k != "sites"}
        return cls(tuple(content["sites"]), **numbers)
