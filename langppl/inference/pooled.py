"""`pool_bounds`: what the bounds of several guides say together.

The evidence is the program's, so every guide's draws bear on it. With Ẑ_g the estimate of guide g
from K_g particles, all for the same data, and N = Σ K_g,

    E[log Σ_g K_g/N Ẑ_g]  ≤  log p(x)  ≤  E[log (K_h/N Ẑ_h* + Σ_{g≠h} K_g/N Ẑ_g)],

where h is drawn with probability K_h/N and Ẑ_h* has the exact sample among its particles. The
first is Jensen's inequality. For the second, let q be the density of all particles of all guides,
q_g* that of guide g's with the exact sample in the place of one; q_g* / q_g = Ẑ_g / p(x). Then the
particles have density Σ_h K_h/N q_h* Π_{g≠h} q_g = q Ẑ / p(x), and E[log Ẑ − log p(x)] is the KL
divergence of that density from q. Here the mean over h is taken, not a draw.

A guide that is much better than the others has sharper bounds alone. So each side is the best of
the single guides' bounds and the pool's, and which one that is for half of the observations is
decided on the other half: a choice by the same noise that it is judged by would break the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from langppl.diagnostics import Array
from langppl.inference.bounds import EvidenceBounds, figures

__all__ = ["pool_bounds"]


def pool_bounds(bounds: Sequence[EvidenceBounds]) -> list[EvidenceBounds]:
    """The bounds of several guides, with the sharpest bracket of the evidence that they give.

    Both divergences of each guide are as sharp as the bounds of the evidence; a guide that is far
    from the posterior needs the others for that.

    Args:
        bounds: of one program and one seed, so of the same simulated observations, with
            `method="importance"` or `"smc"`.

    Returns:
        For each guide its own ELBO, EUBO and shares with the common bounds; `num_samples` is
        still its own.

    Raises:
        ValueError: for no bounds, other methods, other observations, or bounds that are not
            independent: of one guide with the same method and options, whatever their
            `num_samples`, or already pooled.
        TypeError: for what is no list of bounds.

    Example:
        >>> guides = ("prior", "prompted")
        >>> few = {"num_samples": 4, "num_observations": 4}
        >>> found = [evidence_bounds(story, *pair, guide=g, **few) for g in guides]
        >>> [own.guide for own in pool_bounds(found)]
        ['prior', 'prompted']
    """
    is_list = isinstance(bounds, Sequence) and not isinstance(bounds, str)
    if not is_list or not all(isinstance(b, EvidenceBounds) for b in bounds):
        raise TypeError(
            f"pool_bounds takes a list of what evidence_bounds returns, got {bounds!r}; write "
            "pool_bounds([one, other])"
        )
    if not bounds:
        raise ValueError("pool_bounds needs the bounds of at least one guide")
    first = bounds[0]
    for b in bounds:
        if b.method not in ("importance", "smc"):
            raise ValueError(
                f"the bounds of guide {b.guide!r} are of method {b.method!r}; those that can be "
                'pooled are "importance" and "smc"'
            )
        if not _same(b, first):
            raise ValueError(
                f"the bounds of guides {first.guide!r} and {b.guide!r} are of other observations; "
                "give evidence_bounds the same program, num_observations, seed and lengths"
            )
    for k, b in enumerate(bounds):
        for other in bounds[:k]:
            if _share_draws(b, other):
                raise ValueError(
                    f"the bounds of guides {other.guide!r} and {b.guide!r} are of the same draws, "
                    "or of some that begin alike, and the pool's upper bound needs independent "
                    "ones; give each guide once, and guides that nothing tells apart (see "
                    "Guide.identity) a `name` each"
                )
    low, high = _sharpest(bounds)
    streams = tuple(dict.fromkeys(s for b in bounds for s in b.streams))
    found = []
    for b in bounds:
        own = {name: np.array(b.observations[name]) for name in ("elbo", "eubo", "log_joint")}
        found.append(replace(b, **figures(low, high, **own), streams=streams))
    return found


def _same(one: EvidenceBounds, other: EvidenceBounds) -> bool:
    a, b = (np.array(x.observations["log_joint"]) for x in (one, other))
    # Scores of the same string may differ in the last digits from batch to batch.
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=0.0, atol=1e-2))


def _share_draws(one: EvidenceBounds, other: EvidenceBounds) -> bool:
    if one.streams and other.streams:
        return not set(one.streams).isdisjoint(other.streams)
    # Of bounds that do not say where they are from, equal figures alone can tell.
    return one.num_samples == other.num_samples and np.array_equal(
        one.observations["lower"], other.observations["lower"]
    )


def _sharpest(bounds: Sequence[EvidenceBounds]) -> tuple[Array, Array]:
    """The common lower and upper bound of each observation, shape [n]."""
    pool_low, pool_high = _pooled(bounds)
    lows = np.array([*(b.observations["lower"] for b in bounds), pool_low])
    highs = np.array([*(b.observations["upper"] for b in bounds), pool_high])
    low, high = pool_low.copy(), pool_high.copy()
    if len(low) < 2:
        return low, high
    even, odd = slice(0, None, 2), slice(1, None, 2)
    for half, other in ((even, odd), (odd, even)):
        low[half] = lows[int(lows[:, other].mean(1).argmax()), half]
        high[half] = highs[int(highs[:, other].mean(1).argmin()), half]
    return low, high


def _pooled(bounds: Sequence[EvidenceBounds]) -> tuple[Array, Array]:
    """The bounds of each observation by all particles, shape [n]."""
    count = np.array([b.num_samples for b in bounds], dtype=float)
    log_share = np.log(count / count.sum())[:, None]
    low = np.array([b.observations["lower"] for b in bounds]) + log_share
    high = np.array([b.observations["upper"] for b in bounds]) + log_share
    rows = []
    for h in range(len(bounds)):
        together = low.copy()
        together[h] = high[h]
        rows.append(np.logaddexp.reduce(together, axis=0))
    return np.logaddexp.reduce(low, axis=0), np.exp(log_share[:, 0]) @ np.array(rows)
