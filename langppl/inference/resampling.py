"""Resampling: particles are chosen anew, each as often as its weight says.

Under every scheme the expected number of copies of particle i is n·W_i, which is all that an
unbiased evidence takes; they differ in how much the numbers vary around it.

References:
    Douc, Cappé, Moulines 2005, *Comparison of resampling schemes for particle filtering*
    (arXiv cs/0507025).
    Liu and Chen 1998, *Sequential Monte Carlo methods for dynamic systems*: residual resampling.
    Chopin and Singh 2015, *On particle Gibbs sampling* (arXiv 1304.1887): conditional resampling.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ancestors = npt.NDArray[np.int64]

_Scheme = Literal["multinomial", "stratified", "systematic", "residual"]
SCHEMES: tuple[str, ...] = get_args(_Scheme)
Scheme: TypeAlias = _Scheme | str


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


def resample_conditionally(
    weights: Array, scheme: str, held: int, rng: np.random.Generator
) -> tuple[Ancestors, int]:
    """Chooses particles anew, given that one of the new ones is a copy of a certain old one.

    If A is what `resample` returns, the result (a, j) has the probability P(A = a) / (n·W_held)
    where a[j] = held, and 0 elsewhere. This is the law of the ancestors given one lineage, as
    conditional SMC takes it: it sums to one because held has n·W_held copies on average.

    Args:
        weights: shape [n], normalised.
        scheme: one of `SCHEMES`.
        held: the old particle, which has weight, be it too little for a number.
        rng: random numbers.

    Returns:
        Shape [n], ascending: the old particle of each new one; and the new one that is held on.

    Raises:
        ValueError: for an unknown scheme.
    """
    n = len(weights)
    if scheme == "residual":
        sure = np.floor(n * weights).astype(np.int64)
        if sure.sum() == n and not sure[held]:
            # Its weight was rounded to 0, and that of another one to so many copies.
            sure[np.argmax(weights)] -= 1
        rest = n - int(sure.sum())
        chosen = np.repeat(np.arange(n), sure)
        if rest:
            left = n * weights - sure
            drawn = _at(left / left.sum(), rng.random(rest))
            # The copy is one of the sure ones, or else one of those that are drawn.
            if not rng.random() * n * weights[held] < sure[held]:
                drawn[0] = held
            chosen = np.concatenate([chosen, drawn])
    else:
        # One of the points lies in the held particle's piece, evenly; the others follow from it.
        point = float(weights[:held].sum() + weights[held] * rng.random())
        if scheme == "multinomial":
            points = rng.random(n)
            own = 0
        elif scheme in ("stratified", "systematic"):
            own = min(int(n * point), n - 1)
            shift = n * point - own
            points = (np.arange(n) + (rng.random(n) if scheme == "stratified" else shift)) / n
        else:
            raise ValueError(f"unknown scheme {scheme!r}; schemes are: {', '.join(SCHEMES)}")
        chosen = _at(weights, points)
        chosen[own] = held
    chosen = np.sort(chosen)
    # Its copies are alike, so any of them may be the one.
    return chosen, int(rng.choice(np.flatnonzero(chosen == held)))


def _at(weights: Array, points: Array) -> Ancestors:
    """The particle whose piece of the unit interval each point lies in."""
    edges = weights.cumsum()
    # Rounding must not lead to a particle of no weight behind the last one that has some.
    found = np.searchsorted(edges, points * edges[-1], side="right")
    chosen: Ancestors = np.minimum(found, np.flatnonzero(weights)[-1])
    return chosen
