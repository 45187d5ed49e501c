"""What a posterior keeps of its executions, site by site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from langppl.guides.base import Guide
from langppl.program import Program
from langppl.program.execution import Execution


def log_weight(execution: Execution) -> float:
    """Log weight (nats) of a scored execution; −inf if it is impossible."""
    total = 0.0
    for site in execution.sites.values():
        if site.log_prob == -math.inf:
            return -math.inf
        total += (site.log_prob or 0.0) - (site.log_q or 0.0)
    return total


def kept_of(program: Program, guide: Guide, executions: Sequence[Execution]) -> dict[str, Any]:
    """The arguments of `Posterior` that executions have under every method.

    Args:
        program: the program.
        guide: what proposed the latents.
        executions: scored executions of the program.
    """
    return {
        "samples": [e.latents for e in executions],
        "guide": guide.name,
        "guide_object": guide,
        "sites": program.latents,
        "returns": [e.returned for e in executions],
        "computed": [e.computed for e in executions],
        "log_joint": [e.log_joint for e in executions],
        "site_log_probs": site_log_probs(executions),
    }


def site_log_probs(executions: Sequence[Execution]) -> dict[str, list[float]]:
    """Log-probabilities at each random site.

    Args:
        executions: scored executions of one program.

    Returns:
        Site → one number for each execution, nats; NaN where it did not reach the site.
    """
    names = dict.fromkeys(
        s.name for e in executions for s in e.sites.values() if s.log_prob is not None
    )
    found: dict[str, list[float]] = {name: [] for name in names}
    for execution in executions:
        for name, row in found.items():
            site = execution.sites.get(name)
            row.append(math.nan if site is None or site.log_prob is None else site.log_prob)
    return found
