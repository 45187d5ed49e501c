"""The E step: weighted draws from the posterior of each observation, and what they say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from langppl.guides.base import Guide, PriorGuide
from langppl.inference.importance import as_posterior
from langppl.inference.many import rows_at_once, run_rows
from langppl.inference.methods import infer
from langppl.lm.seeds import generator
from langppl.posterior import Posterior
from langppl.program import Program, run_together
from langppl.program.execution import score
from langppl.program.keys import hashable

Key = tuple[int | str, ...]


@dataclass(frozen=True)
class Weighted:
    """Draws of one observation's latents, and how much each counts.

    Attributes:
        rows: latent → value; no two alike, all possible.
        weights: shape [rows], summing to one; empty if no draw is possible.
    """

    rows: list[Mapping[str, Any]]
    weights: list[float]


def posteriors(
    programs: Sequence[Program],
    guide: Guide | None,
    method: str,
    num_samples: int,
    key: Key,
    advance: Callable[[int], None],
    options: Mapping[str, Any],
) -> list[Posterior]:
    """The posterior of each program, one sample for those without latents.

    Args:
        programs: the programs.
        guide: proposes the latents; None where nothing is to be proposed.
        method: as `langppl.infer` has them.
        num_samples: for each program.
        key: what the random numbers depend on.
        advance: told of programs that are done.
        options: of the method.
    """
    found: dict[int, Posterior] = {}
    is_apart = [bool(p.latents) and method != "importance" for p in programs]
    settings: dict[str, Any] = {
        "guide": "prior" if guide is None else guide,
        "method": method,
        "num_samples": num_samples,
        **options,
    }

    def made(k: int) -> Posterior:
        seed = int(generator((*key, k)).integers(2**62))
        return infer(programs[k], seed=seed, progress=False, **settings)

    for numbers in _parts(is_apart, True, rows_at_once(method, num_samples, options)):
        drawn = run_rows([partial(made, k) for k in numbers], method, num_samples)
        found.update(zip(numbers, drawn, strict=True))
        advance(len(numbers))
    for numbers in _parts(is_apart, False, rows_at_once("importance", num_samples, {})):
        found.update(_importance(programs, numbers, guide, num_samples, key))
        advance(len(numbers))
    return [found[k] for k in range(len(programs))]


def _parts(is_apart: Sequence[bool], wanted: bool, size: int) -> Iterator[list[int]]:
    numbers = [k for k, apart in enumerate(is_apart) if apart == wanted]
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]


def _importance(
    programs: Sequence[Program],
    numbers: Sequence[int],
    guide: Guide | None,
    num_samples: int,
    key: Key,
) -> dict[int, Posterior]:
    """Importance sampling of several programs in one batch, so that the LM sees full ones."""
    started = time.monotonic()
    pairs, counts = [], []
    for k in numbers:
        own = guide if guide is not None and programs[k].latents else PriorGuide()
        count = num_samples if programs[k].latents else 1
        own.check(programs[k])
        pairs += [(programs[k], own.chooser(programs[k], (*key, k, i))) for i in range(count)]
        counts.append((k, own, count))
    executions = run_together(pairs, score)
    elapsed = (time.monotonic() - started) / len(numbers)
    found, at = {}, 0
    for k, own, count in counts:
        found[k] = as_posterior(programs[k], own, executions[at : at + count], elapsed)
        at += count
    return found


def weighted(posterior: Posterior, weights: str, count: int | None, key: Key) -> Weighted:
    """The draws that a posterior's expectation is taken over.

    Args:
        posterior: the draws.
        weights: `"importance"` for the posterior's own weights, `"guide"` to count all possible
            draws alike.
        count: resample so many draws (systematically); None to keep all, weighted.
        key: what the resampling depends on.
    """
    log_weights = posterior.log_weights
    if not bool(np.isfinite(log_weights).any()):
        return Weighted([], [])
    if weights == "guide":
        possible = np.isfinite(log_weights)
        shares = possible / possible.sum()
    else:
        shares = posterior.weights
    if count is not None:
        points = (np.arange(count) + generator(key).random()) / count
        cdf = np.cumsum(shares)
        chosen = np.searchsorted(cdf[:-1], points * cdf[-1], side="right")
        shares = np.bincount(chosen, minlength=len(shares)) / count
    merged: dict[object, tuple[Mapping[str, Any], float]] = {}
    for row, share in zip(posterior.samples, shares, strict=True):
        if share > 0.0:
            same = tuple((n, hashable(v), getattr(v, "ids", None)) for n, v in row.items())
            first, sofar = merged.get(same, (row, 0.0))
            merged[same] = first, sofar + float(share)
    return Weighted([r for r, _ in merged.values()], [w for _, w in merged.values()])


def figures(found: Sequence[Posterior]) -> dict[str, float]:
    """What the draws say of the model and of the guide, as means over observations.

    Returns:
        `log_evidence`, its standard `error` and `elbo` (nats; NaN where the method has none),
        `ess` and `impossible` (shares of the draws), and `failed`: how many observations have no
        possible draw, each with evidence −inf.
    """
    n = len(found)
    evidences = [math.nan if p.log_evidence is None else p.log_evidence for p in found]
    errors = [math.nan if p.log_evidence_error is None else p.log_evidence_error for p in found]
    # A single execution without latents is no draw: its evidence has no error.
    squares = sum(e**2 for e, p in zip(errors, found, strict=True) if _is_drawn(p))
    return {
        "log_evidence": float(np.mean(evidences)),
        "error": math.sqrt(squares) / n,
        "elbo": float(np.mean([_elbo(p) for p in found])),
        "ess": float(np.mean([min(p.ess / p.num_samples, 1.0) for p in found])),
        "impossible": float(np.mean([p.impossible_share for p in found])),
        "failed": float(sum(not bool(np.isfinite(p.log_weights).any()) for p in found)),
    }


def _is_drawn(posterior: Posterior) -> bool:
    return any(posterior.samples) and posterior.method != "exact"


def _elbo(posterior: Posterior) -> float:
    """Mean log weight of the possible draws plus the log of their share, nats."""
    possible = 1.0 - posterior.impossible_share
    if possible == 0.0:
        return -math.inf
    own = posterior.elbo_possible
    return math.nan if own is None else own + math.log(possible)
