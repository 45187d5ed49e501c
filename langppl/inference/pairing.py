"""Parts of a program that are independent: each is weighted and resampled on its own.

Given the observations, latents that nothing connects are independent (`ProgramGraph.independent`),
so the evidence is a product, and a draw of one part may stand beside any draw of another. A weight
of the whole is the product of the parts' weights: with many parts all but a few draws lose theirs,
though each part by itself has plenty of good ones. So each part's draws are resampled by the part's
own weights, and what comes out is put together anew.

Only for static programs, whose graph is known: a dependence that an experiment did not show would
make the result wrong. Each draw, and each of those put together anew, is held to the templates; one
that differs shows that the program is none, and then whole draws are weighted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from langppl.diagnostics import Array, normalized_weights
from langppl.guides.base import Guide
from langppl.inference.failures import failures
from langppl.inference.resampling import resample
from langppl.inference.sites import kept_of, log_weight
from langppl.lm.seeds import generator
from langppl.parts import Part
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.program.execution import Choice, Execution, draw_prior, given

_EVEN = 1e-9
"""Nats by which weights may differ and still count as equal."""
_TOGETHER = 256


def part_of_sites(program: Program) -> dict[str, int] | None:
    """The number of the independent part that each site is of; −1 for none.

    Returns:
        None if there are not two parts that are known to be independent.
    """
    if not program.is_static:
        return None
    groups = program.graph.independent()
    if len(groups) < 2:
        return None
    number = {name: k for k, group in enumerate(groups) for name in group}
    above = program.graph.latents_above
    return {
        name: next((number[n] for n in (name, *above(name)) if n in number), -1)
        for name in program.graph.nodes
    }


def paired(
    program: Program,
    guide: Guide,
    executions: Sequence[Execution],
    part_of: dict[str, int],
    seed: int,
) -> Posterior | None:
    """The posterior of a program of independent parts.

    Args:
        program: the program.
        guide: what proposed the latents.
        executions: of the program, every site scored.
        part_of: site → number of its part.
        seed: of the resampling.

    Returns:
        Equally weighted samples; None where there is nothing to gain: fewer than two parts have
        weights that differ, or a part has none that is above zero.
    """
    if any(e.error is not None for e in executions):
        return None
    if not all(program.agrees(e) for e in executions):
        return None
    weights = _log_weights(executions, part_of)
    if any(not (w > -np.inf).any() for w in weights.values()):
        return None
    if sum(k >= 0 and float(np.ptp(w)) > _EVEN for k, w in weights.items()) < 2:
        return None
    n = len(executions)
    rows: dict[int, Any] = {-1: np.arange(n)}
    parts = []
    for k in range(max(part_of.values()) + 1):
        rng = generator((seed, "pairing", k))
        chosen = resample(normalized_weights(weights[k]), "systematic", rng)
        # Neighbours are copies of one draw: mixed, each meets different draws of other parts.
        rows[k] = rng.permutation(chosen)
        latents = [s for s in program.latents if part_of[s] == k]
        parts.append(Part.of(latents, weights[k]))
    order = list(executions[0].sites)
    put_together = [
        Execution({s: executions[rows[part_of[s]][i]].sites[s] for s in order}) for i in range(n)
    ]

    def otherwise(name: str, fn: Any, execution: Execution) -> Choice:
        return draw_prior(fn, (seed, "pairing", name))  # a latent that no draw has met

    ran: list[Execution] = []
    for first in range(0, n, _TOGETHER):
        some = put_together[first : first + _TOGETHER]
        ran += program.run([given(e.latents, otherwise) for e in some])
    if not all(program.agrees(e) for e in ran):
        return None
    whole = [Execution(e.sites, r.returned) for e, r in zip(put_together, ran, strict=True)]
    rest = float(weights[-1][0]) if -1 in weights else 0.0
    evidence = math.fsum(p.log_evidence for p in parts) + rest
    return Posterior(
        log_weights=np.full(n, evidence),
        log_evidence=evidence,
        log_evidence_error=math.sqrt(math.fsum(p.log_evidence_error**2 for p in parts)),
        method="importance",
        log_q=[e.log_q for e in whole],
        failed_sites=failures(program, executions)[0],
        notes=guide.remarks,
        parts=parts,
        **kept_of(program, guide, whole),
    )


def _log_weights(executions: Sequence[Execution], part_of: dict[str, int]) -> dict[int, Array]:
    """Of each part, the log weights (nats) of its draws."""
    found = {}
    for k in set(part_of.values()):
        own = [Execution({n: s for n, s in e.sites.items() if part_of[n] == k}) for e in executions]
        found[k] = np.array([log_weight(e) for e in own])
    return found
