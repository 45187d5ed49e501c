"""Data drawn from a program itself, whose latents are then exact posterior samples.

Of latents and data that are drawn together, the latents are one draw from the posterior given the
data. So whatever claims to know a posterior can be held to the truth where the truth cannot be
computed (Grosse et al. 2015, arXiv 1511.02543; Talts et al. 2018, arXiv 1804.06788).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from langppl.guides.base import Guide, Key
from langppl.inference.importance import BATCH
from langppl.posterior import Posterior
from langppl.program import Program, run_together
from langppl.program.execution import Execution, given, score
from langppl.program.lengths import check_lengths
from langppl.program.scheduler import run

Pair = tuple[dict[str, Any], Program]
"""Latent → value, and the program that observes the data drawn with them."""


def simulate_pairs(
    program: Program, n: int, key: Key, lengths: Mapping[str, int] | None = None
) -> list[Pair]:
    """Latents and data drawn from a program.

    Args:
        program: the program.
        n: how many.
        key: what the random numbers depend on.
        lengths: tokens of each open string; those that are not named are as long as what the
            program observes.

    Raises:
        ValueError: if the program observes nothing or cannot be simulated, or a length is given
            for something else than an open string.
    """
    if not program.observed and any(s.kind == "factor" for s in program.sites.values()):
        raise ValueError(
            "the program is conditioned by factors, which cannot be simulated; give it an observed "
            "site (lp.sample(..., obs=...))"
        )
    if not program.observed:
        raise ValueError(
            "the program observes nothing, so its posterior is its prior; give it an observed "
            "site (lp.sample(..., obs=...))"
        )
    check_lengths([program], lengths)
    pairs: list[Pair] = []
    for first in range(0, n, BATCH):
        numbers = range(first, min(first + BATCH, n))
        # Of other keys than the draws: with equal ones the prior would draw the exact sample.
        tasks = [partial(program.simulated, (*key, "simulate", k), lengths) for k in numbers]
        pairs += run(tasks)
    return pairs


def score_truths(pairs: Sequence[Pair]) -> list[Execution]:
    """The scored executions of the latents that data were simulated with.

    Raises:
        ValueError: if one is impossible, as the model is then no function of its sites; or if they
            do not all observe the same sites.
    """
    truths: list[Execution] = []
    for first in range(0, len(pairs), BATCH):
        chunk = pairs[first : first + BATCH]
        truths += run_together([(p, given(latents)) for latents, p in chunk], score)
    for (_, program), truth in zip(pairs, truths, strict=True):
        if truth.log_joint == -math.inf:
            where = program.why_impossible(truth)
            raise ValueError(
                f"latents {_shown(truth.latents)} were simulated from the program, but are "
                f"impossible under it: {where or 'their log joint is -inf'}"
            )
    check_same_observed(truths[0], truths)
    return truths


def draw_together(
    programs: Sequence[Program], guide: Guide, n: int, key: Key, advance: Callable[[int], Any]
) -> Iterator[list[Execution]]:
    """Scored draws for each of several programs, in batches over all of them.

    Args:
        programs: the programs.
        guide: proposes the latents.
        n: draws for each.
        key: what the random numbers depend on.
        advance: is told how many draws were made.

    Yields:
        The draws of one program after the other.
    """
    done: list[Execution] = []
    for first in range(0, len(programs) * n, BATCH):
        numbers = range(first, min(first + BATCH, len(programs) * n))
        pairs = []
        for k, i in (divmod(number, n) for number in numbers):
            pairs.append((programs[k], guide.chooser(programs[k], (*key, "draw", k, i))))
        done += run_together(pairs, score)
        advance(len(pairs))
        while len(done) >= n:
            yield done[:n]
            done = done[n:]


def check_same_observed(truth: Execution, executions: Sequence[Execution]) -> None:
    """Raises ValueError unless all executions observe what the simulated one did.

    Where a latent decides whether a site is observed at all, the data that were simulated do not
    determine a posterior of the program.
    """
    for execution in executions:
        _check_same(truth, _observed(execution), execution.latents)


def check_same_observed_by(truth: Execution, posterior: Posterior) -> None:
    """Raises ValueError unless all samples of weight observe what the simulated execution did.

    Others may have been given up before they met all that they observe.
    """
    expected = _observed(truth)
    # What a tool returned is scored too, and like all that is certain it conditions nothing.
    met = {
        name: ~np.isnan(column) & ((name in expected) | (column != 0.0))
        for name, column in posterior.site_log_probs.items()
    }
    for i in np.flatnonzero(posterior.log_weights > -np.inf):
        latents = posterior.samples[i]
        observed = {name for name, is_met in met.items() if is_met[i] and name not in latents}
        _check_same(truth, observed, latents)


def _check_same(truth: Execution, observed: set[str], latents: Mapping[str, Any]) -> None:
    moved = _observed(truth) ^ observed
    if moved:
        raise ValueError(
            f"site {min(moved)!r} is observed in some executions and not in others (with "
            f"latents {_shown(truth.latents)} and {_shown(latents)}), so data that are simulated "
            "do not belong to one posterior; observe the same sites whatever the latents are"
        )


def _observed(execution: Execution) -> set[str]:
    """The sites that condition an execution; a simulated one has no factor among them."""
    return {s.name for s in execution.sites.values() if s.kind in ("observed", "factor")}


def _shown(latents: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in latents.items()}
