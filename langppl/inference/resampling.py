"""Resampling: particles are chosen anew, each as often as its weight says.

Under every scheme the expected number of copies of particle i is n·W_i, which is all that an
unbiased evidence takes; they differ in how much the numbers vary around it.

References:
    Douc, Cappé, Moulines 2005, *Comparison of resampling schemes for particle filtering*
    (arXiv cs/0507025).
    Liu and Chen 1998, *Sequential Monte Carlo methods for dynamic systems*: residual resampling.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ancestors = npt.NDArray[np.int64]

SCHEMES = ("multinomial", "stratified", "systematic", "residual")


def resample(weights: Array, scheme: str, rng: np.random.Generator) -> Ancestors:
    """For each new particle, the old one that it is a copy of.

    Args:
        weights: shape [n], normalised.
        scheme: one of `SCHEMES`.
        rng: random numbers.

    Returns:
        Shape [n], ascending.

    Raises:
        ValueError: for an unknown scheme, or weights that do not sum to one.
    """
    n = len(weights)
    if not abs(float(weights.sum()) - 1.0) <= 1e-6:
        raise ValueError(f"weights must sum to one, got {float(weights.sum())}")
    if scheme == "residual":
        sure = np.floor(n * weights).astype(np.int64)
        rest = n - int(sure.sum())
        chosen = np.repeat(np.arange(n), sure)
        if rest:
            left = n * weights - sure
            chosen = np.concatenate([chosen, _at(left / left.sum(), rng.random(rest))])
        return np.sort(chosen)
    if scheme == "multinomial":
        points = rng.random(n)
    elif scheme == "stratified":
        points = (np.arange(n) + rng.random(n)) / n
    elif scheme == "systematic":
        points = (np.arange(n) + rng.random()) / n
    else:
        raise ValueError(f"unknown scheme {scheme!r}; schemes are: {', '.join(SCHEMES)}")
    return np.sort(_at(weights, points))


def _at(weights: Array, points: Array) -> Ancestors:
    """The particle whose piece of the unit interval each point lies in."""
    edges = weights.cumsum()
    # Rounding must not lead to a particle of no weight behind the last one that has some.
    found = np.searchsorted(edges, points * edges[-1], side="right")
    chosen: Ancestors = np.minimum(found, np.flatnonzero(weights)[-1])
    return chosen
