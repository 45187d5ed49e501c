"""What a posterior keeps of its executions, site by site."""

from __future__ import annotations

import math
from collections.abc import Sequence

from langppl.program.execution import Execution


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
