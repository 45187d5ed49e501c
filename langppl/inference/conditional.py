"""Conditional SMC: particles of which one keeps to given latents and never dies.

If these are an exact posterior sample, the mean weight Ẑ at the end has E[1/Ẑ] = P(Ẑ > 0) / Z, with
the probability that plain SMC with as many particles has any of weight: so log Ẑ bounds log Z from
above in expectation, as that of plain SMC does from below.

Why: take the law of plain SMC, weight it by Ẑ/Z, and choose one particle at the end by weight.
Along its lineage the mean weights and the chances to be copied multiply to its target over its
proposal, whatever was counted when and whenever was resampled, so its latents follow the posterior;
and given them, everything else follows the algorithm here, if its place among the first particles
is even and each resampling has the law of `resample_conditionally`. The mean of 1/Ẑ under that
weighted law is the mean of 1{Ẑ > 0} / Z under the plain one. This holds for every scheme, twist and
proposal, and for resampling that looks at the weights first.

References:
    Andrieu, Doucet, Holenstein 2010, *Particle Markov chain Monte Carlo methods*.
    Zhao et al. 2024, *Probabilistic inference in language models via twisted SMC*
    (arXiv 2404.17546), section 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from langppl import diagnostics
from langppl.guides.base import Guide
from langppl.inference.particles import Crowd, Held, MissedError
from langppl.inference.smc import run_crowd
from langppl.lm.seeds import generator
from langppl.program import Program


def smc_evidence(
    program: Program,
    guide: Guide,
    num_samples: int,
    seed: int,
    held: Mapping[str, Any] | None = None,
    **options: Any,
) -> float:
    """Log evidence by SMC, or by conditional SMC.

    Args:
        program: the program.
        guide: proposes the latents.
        num_samples: how many particles, the held one included.
        seed: equal seeds give equal results.
        held: latent → value, an exact posterior sample, for conditional SMC.
        **options: see `langppl.inference.smc.smc`.

    Returns:
        Nats; −inf if all particles are dead, inf if the guide cannot draw the held latents.

    Raises:
        ValueError: as `smc` does, or if the program has a latent that is not held.
        NotImplementedError: with held latents, if the guide has no `given`.
    """
    crowd = Crowd(program, guide, num_samples, seed)
    if held is not None:
        place = int(generator((seed, "smc", "held")).integers(num_samples))
        crowd.held = Held(held, place)
    try:
        run_crowd(crowd, **options)
    except MissedError:
        return math.inf
    log_weights = np.array([p.log_weight for p in crowd.particles])
    if not (log_weights > -np.inf).any():
        return -math.inf
    return float(diagnostics.log_evidence(log_weights)[0])
