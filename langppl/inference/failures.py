"""Why executions are impossible, for the user to read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from langppl.program import Program
from langppl.program.execution import Execution
from langppl.values import plain

MOST_LATENT_NOTES = 3
MOST_NOTES = 5


def failures(
    program: Program, executions: Sequence[Execution]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The sites at which executions fail and, if all of them do, the rules that are broken.

    Args:
        program: the program.
        executions: scored executions of it.

    Returns:
        Site → number of executions whose log-probability there is −inf; and sentences that name
        the site, its value and the rule, none if some execution is possible.
    """
    failed: Counter[str] = Counter()
    for execution in executions:
        failed.update(s.name for s in execution.sites.values() if s.log_prob == -math.inf)
    notes: dict[str, None] = {}
    if all(any(s.log_prob == -math.inf for s in e.sites.values()) for e in executions):
        for execution in executions:
            if len(notes) >= MOST_NOTES:
                break
            for name, reason in program.why_impossible(execution).items():
                site = execution.sites[name]
                if site.kind == "observed" or len(notes) < MOST_LATENT_NOTES:
                    notes[f"site {name!r}: {plain(site.value)!r} is impossible: {reason}"] = None
        errors = [e.error for e in executions if e.error is not None]
        if errors:
            more = f", and errors in {len(errors) - 1} others" if len(errors) > 1 else ""
            note = f"impossible already, an execution then raised {errors[0]}{more}"
            return dict(failed), (*tuple(notes)[: MOST_NOTES - 1], note)
    return dict(failed), tuple(notes)[:MOST_NOTES]
