"""What log weights say about the samples that carry them.

An importance sampler returns n draws z_i with weights w_i = p(z_i, observations) / q(z_i). Their
mean estimates the evidence without bias, and their spread says how far to believe it. The functions
here are pure: log weights in nats go in, a number comes out, computed in float64. A log weight of
−inf is an impossible draw: it counts as a draw of weight zero, never as a missing value.

References:
    A. Kong (1992). A note on importance sampling using standardized weights. Chicago TR 348.
    A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024). Pareto smoothed importance
    sampling. JMLR 25(72).

Example:
    >>> weights = [math.log(1.0), math.log(3.0)]
    >>> round(effective_sample_size(weights), 6)        # (1 + 3)² / (1² + 3²)
    1.6
    >>> normalized_weights(weights)
    array([0.25, 0.75])
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "InferenceWarning",
    "as_log_weights",
    "by_ancestor",
    "effective_sample_size",
    "log_evidence",
    "log_evidence_error",
    "normalized_weights",
    "pareto_k",
    "pareto_k_threshold",
]

Array: TypeAlias = npt.NDArray[np.float64]
LogWeights: TypeAlias = torch.Tensor | npt.NDArray[Any] | Sequence[float]

# Scores come from a float32 softmax, so weights that should be equal differ by about this much.
_TIE_NATS = 1e-6
# arviz fits no Pareto tail to fewer draws than this.
_MIN_TAIL = 5


class InferenceWarning(UserWarning):
    """An inference ended, but what it found is not to be used as it is."""


def as_log_weights(log_weights: LogWeights) -> Array:
    """Checks log weights and copies them into float64.

    Args:
        log_weights: shape [n] with n ≥ 1, nats; −inf marks an impossible sample.

    Returns:
        A new array of shape [n].

    Raises:
        ValueError: if the shape is not [n], there is no weight at all, or a weight is NaN or +inf
            (the message names the indices).
    """
    if isinstance(log_weights, torch.Tensor):
        log_weights = log_weights.detach().cpu().double().numpy()
    array = np.array(log_weights, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"log_weights must have shape [n], got {array.shape}")
    if array.size == 0:
        raise ValueError("log_weights is empty: at least one sample is needed")
    for bad, name in ((np.isnan(array), "NaN"), (array == np.inf, "+inf")):
        if bad.any():
            raise ValueError(f"log_weights is {name} at {_indices(bad)}")
    return array


def effective_sample_size(log_weights: LogWeights) -> float:
    """How many equally weighted samples the weighted ones are worth.

    ESS = (Σw)² / Σw², unchanged by a constant factor on the weights (Kong 1992).

    Args:
        log_weights: shape [n], nats, unnormalised; −inf marks an impossible sample.

    Returns:
        Between 1 and n; 0.0 if no sample has weight.

    Raises:
        ValueError: if `log_weights` is not one-dimensional, is empty, or holds NaN or +inf.
    """
    weights, _ = _scaled(as_log_weights(log_weights))
    if not weights.any():
        return 0.0
    ess = float(weights.sum() ** 2 / (weights**2).sum())
    return min(max(ess, 1.0), float(weights.size))


def log_evidence(log_weights: LogWeights) -> tuple[float, float]:
    """The log of the mean weight, and its standard error.

    The mean weight estimates the evidence without bias; its logarithm is biased downwards, by
    about half of the squared error. The error is the delta method's,
    sd(w) / (mean(w) √n) with the n − 1 form of sd: trust it only where `pareto_k` allows.

    Args:
        log_weights: shape [n], nats, unnormalised; −inf marks an impossible sample.

    Returns:
        The log evidence and its standard error, both in nats. (−inf, inf) if no sample has weight;
        the error of a single sample is inf.

    Raises:
        ValueError: if `log_weights` is not one-dimensional, is empty, or holds NaN or +inf.
    """
    weights, largest = _scaled(as_log_weights(log_weights))
    if not weights.any():
        return -math.inf, math.inf
    mean = float(weights.mean())
    evidence = largest + math.log(mean)
    if weights.size == 1:
        return evidence, math.inf
    return evidence, float(weights.std(ddof=1)) / (mean * math.sqrt(weights.size))


def by_ancestor(log_weights: LogWeights, ancestors: Sequence[int]) -> Array:
    """The weights of families: of each first particle, what its descendants weigh together.

    Copies of one particle are no independent samples, whatever they grew into since, so the
    effective number of samples after resampling is that of the families.

    Args:
        log_weights: shape [n], nats.
        ancestors: shape [n], the first particle that each descends from, of 0 to n − 1.

    Returns:
        Shape [n], nats; −inf for particles without descendants of weight.
    """
    array = as_log_weights(log_weights)
    families = np.full(array.size, -np.inf)
    np.logaddexp.at(families, np.asarray(ancestors), array)
    return families


def log_evidence_error(log_weights: LogWeights, ancestors: Sequence[int]) -> float:
    """Standard error of SMC's log evidence, from one run.

    The square root of (n ΣW² − 1) / (n − 1), W the normalised weights of families: the delta
    method, with families for samples. Lee and Whiteley (2018), *Variance estimation in the particle
    filter* (arXiv 1509.00394), show that families carry the variance of the whole run; their
    further factor, for the noise of multinomial resampling, is left out, as under the other schemes
    it makes the estimate of a small variance negative. So this errs on the large side, and with few
    families left it says little.

    Args:
        log_weights: shape [n], nats.
        ancestors: see `by_ancestor`.

    Returns:
        Nats; inf if no particle has weight, or there is but one.
    """
    return log_evidence(by_ancestor(log_weights, ancestors))[1]


def normalized_weights(log_weights: LogWeights) -> Array:
    """The weights, scaled to sum to one.

    Args:
        log_weights: shape [n], nats, unnormalised; −inf marks an impossible sample.

    Returns:
        Shape [n], float64.

    Raises:
        ValueError: if no sample has weight, or `log_weights` is not one-dimensional, is empty, or
            holds NaN or +inf.
    """
    weights, _ = _scaled(as_log_weights(log_weights))
    if not weights.any():
        raise ValueError("every log weight is -inf: there is nothing to normalise")
    normalized: Array = weights / weights.sum()
    return normalized


def pareto_k(log_weights: LogWeights) -> float:
    """The shape of the weights' upper tail: how heavy it is.

    A generalised Pareto distribution is fitted to the largest min(n/5, 3√n) weights (arviz's
    `psislw`). About 1/k moments of the weights exist: above 0.5 their variance is infinite, above
    1 their mean is. Impossible samples are draws of weight zero and count in n.

    The fit sees only the samples drawn: a mode that the proposal never visits leaves no trace.

    Args:
        log_weights: shape [n], nats, unnormalised; −inf marks an impossible sample.

    Returns:
        The estimate of k. −inf if the largest weights are all equal (within 1e-6 nats), as for an
        exact proposal: a bounded tail. NaN where there are fewer than 5 weights to fit: n ≤ 20, or
        no more than 4 weights stand above the rest, or none is positive.

    Raises:
        ValueError: if `log_weights` is not one-dimensional, is empty, or holds NaN or +inf.
    """
    array = as_log_weights(log_weights)
    tail = math.ceil(min(array.size / 5.0, 3.0 * math.sqrt(array.size)))
    largest = array.max()
    if tail < _MIN_TAIL or largest == -np.inf:
        return math.nan
    if largest - np.sort(array)[-tail - 1] <= _TIE_NATS:
        return -math.inf
    with np.errstate(all="ignore"):
        _, k = _arviz().psislw(array)
    return float(k) if np.isfinite(k) else math.nan


def pareto_k_threshold(n: int) -> float:
    """The Pareto k up to which n weights, and the error of their mean, can be trusted.

    min(0.7, 1 − 1/log₁₀ n), after Vehtari et al. (2024), section 3.2.4.

    Args:
        n: number of samples, impossible ones included.

    Returns:
        At most 0.7 (from n = 2,155 on), 0 at n = 10; −inf for a single sample.

    Raises:
        ValueError: if `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return min(0.7, 1.0 - 1.0 / math.log10(n)) if n > 1 else -math.inf


def _scaled(array: Array) -> tuple[Array, float]:
    """Weights divided by the largest one, and the log of that one; zeros if none is positive."""
    largest = float(array.max())
    if largest == -math.inf:
        return np.zeros_like(array), largest
    weights: Array = np.exp(array - largest)
    return weights, largest


def _indices(mask: npt.NDArray[np.bool_], limit: int = 10) -> str:
    """Names the true entries of a mask, the first few of them where there are many."""
    found = np.flatnonzero(mask)
    names = ", ".join(str(i) for i in found[:limit])
    more = f" and {found.size - limit} more" if found.size > limit else ""
    return f"{'index' if found.size == 1 else 'indices'} {names}{more} of {mask.size}"


@functools.cache
def _arviz() -> Any:
    """arviz, imported when first needed: it takes as long to import as torch.

    On import it announces its next version once a day and writes the date into the user's cache
    folder: the announcement is not for our users, and the folder need not be writable.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return importlib.import_module("arviz")
        except OSError:
            before = os.environ.get("XDG_CACHE_HOME")
            with tempfile.TemporaryDirectory() as folder:
                os.environ["XDG_CACHE_HOME"] = folder
                try:
                    return importlib.import_module("arviz")
                finally:
                    if before is None:
                        del os.environ["XDG_CACHE_HOME"]
                    else:
                        os.environ["XDG_CACHE_HOME"] = before
