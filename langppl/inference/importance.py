"""Importance sampling: weights p(latents, observations) / q(latents)."""

from __future__ import annotations

import math
import time
from functools import partial

from langppl.diagnostics import InferenceWarning
from langppl.guides.base import Guide
from langppl.inference.failures import failures
from langppl.inference.pairing import paired, part_of_sites
from langppl.inference.sites import site_log_probs
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.program.execution import Execution, score
from langppl.progress import bar
from langppl.warn import warn

BATCH = 256
"""Executions that are run at once."""


def importance(
    program: Program, guide: Guide, num_samples: int, seed: int, progress: bool
) -> Posterior:
    """Draws latents from a guide and weights them.

    Args:
        program: the program.
        guide: proposes the latents.
        num_samples: how many.
        seed: equal seeds give equal draws, whatever the batches.
        progress: whether to show a bar.

    Returns:
        The weighted samples; of a program of several independent parts, equally weighted ones,
        each part resampled on its own (`langppl.inference.pairing`). Interrupted (Ctrl-C), those
        that were finished, with a warning.
    """
    started = time.monotonic()
    guide.check(program)
    part_of = part_of_sites(program)
    # An impossible part says nothing of the others.
    end = score if part_of is None else partial(score, whole=True)
    executions: list[Execution] = []
    try:
        with bar(f"sampling from {guide.name}", num_samples, progress) as advance:
            for first in range(0, num_samples, BATCH):
                rows = range(first, min(first + BATCH, num_samples))
                choosers = [guide.chooser(program, (seed, "infer", i)) for i in rows]
                executions += program.run(choosers, end)
                advance(len(rows))
    except KeyboardInterrupt:
        if not executions:
            raise
        warn(
            f"interrupted: the posterior is of the first {len(executions)} samples of "
            f"{num_samples}",
            InferenceWarning,
        )
    if part_of is not None:
        found = paired(program, guide, executions, part_of, seed)
        if found is not None:
            found.elapsed = time.monotonic() - started
            return found
    return as_posterior(program, guide, executions, time.monotonic() - started)


def log_weight(execution: Execution) -> float:
    """Log weight (nats) of a scored execution; −inf if it is impossible."""
    total = 0.0
    for site in execution.sites.values():
        if site.log_prob == -math.inf:
            return -math.inf
        total += (site.log_prob or 0.0) - (site.log_q or 0.0)
    return total


def as_posterior(
    program: Program, guide: Guide, executions: list[Execution], elapsed: float
) -> Posterior:
    """Scored executions as a posterior."""
    failed, notes = failures(program, executions)
    return Posterior(
        [e.latents for e in executions],
        [log_weight(e) for e in executions],
        method="importance",
        guide=guide.name,
        guide_object=guide,
        sites=program.latents,
        returns=[e.returned for e in executions],
        computed=[e.computed for e in executions],
        log_joint=[e.log_joint for e in executions],
        log_q=[e.log_q for e in executions],
        site_log_probs=site_log_probs(executions),
        elapsed=elapsed,
        failed_sites=failed,
        notes=(*notes, *guide.remarks),
    )
