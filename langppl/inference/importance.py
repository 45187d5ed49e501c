"""Importance sampling: weights p(latents, observations) / q(latents)."""

from __future__ import annotations

import time
from functools import partial

from langppl.diagnostics import InferenceWarning
from langppl.guides.base import Guide
from langppl.inference.failures import failures
from langppl.inference.pairing import paired, part_of_sites
from langppl.inference.sites import kept_of, log_weight
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


def as_posterior(
    program: Program, guide: Guide, executions: list[Execution], elapsed: float
) -> Posterior:
    """Scored executions as a posterior."""
    failed, notes = failures(program, executions)
    return Posterior(
        log_weights=[log_weight(e) for e in executions],
        method="importance",
        log_q=[e.log_q for e in executions],
        elapsed=elapsed,
        failed_sites=failed,
        notes=(*notes, *guide.remarks),
        **kept_of(program, guide, executions),
    )
