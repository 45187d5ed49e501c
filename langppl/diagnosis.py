"""`Posterior.diagnose`: what a posterior is worth, in words, and what to do about it.

The figures are those of `langppl.diagnostics`; this module judges them and compares posteriors of
one program with one another. They all see only the samples that were drawn: a part of the
posterior that a guide never visits leaves no trace, which is why `langppl.evidence_bounds` and
`langppl.calibrate` exist.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from langppl import diagnostics
from langppl.chains import Chains, chain_notes
from langppl.program.keys import hashable
from langppl.tables import Report
from langppl.values import is_number

if TYPE_CHECKING:
    from langppl.posterior import Posterior

__all__ = ["Agreement", "Diagnosis", "diagnose"]

_FEW = 10.0
"""Effective samples below which a posterior says little."""
_SMALL_SHARE = 0.05
_LARGE_ERROR = 0.5
"""Standard error of the log evidence (nats) above which it is worth a word."""
_HEAVY = 0.9
_DEVIATIONS = 3.0
_BINS = 10
_NOISY = 0.5
"""Noise above which a distance says nothing."""
_BETTER = (
    "train a guide (guide='gflownet'), draw more (num_samples), or use another method "
    "(method='smc')"
)


@dataclass(frozen=True)
class Agreement:
    """How two posteriors of one program compare.

    Attributes:
        other: method and guide of the other one.
        evidence_difference: log evidence of this one less that of the other, nats; None where
            either is not known.
        evidence_deviations: that, in standard errors of both together; None where either is not
            known.
        trusted: whether Pareto k allows to trust both of these errors.
        site: the common latent with the most distinct values; None if there is none.
        total_variation: distance of its probabilities, 0 to 1: half of the sum of their absolute
            differences. Numbers with many values are compared over ten bins.
        noise: about what it is for two samples of these effective sizes from one distribution.
        agrees: whether the evidences are within 3 standard errors, and the distance is within
            twice its noise, as far as they are known; None if neither is. Noise above a half
            leaves the distance nothing to say.
    """

    other: str
    evidence_difference: float | None
    evidence_deviations: float | None
    trusted: bool
    site: str | None
    total_variation: float | None
    noise: float | None
    agrees: bool | None

    def __str__(self) -> str:
        """The comparison in words."""
        return _comparison(self)


@dataclass(frozen=True, repr=False)
class Diagnosis(Report):
    """What can be said of a posterior's samples.

    Attributes:
        method: the inference method.
        guide: the guide.
        num_samples: how many samples.
        ess: effective sample size; inf for `method="exact"`, 0 if no sample has weight.
        pareto_k: shape of the weights' tail; NaN where it cannot be estimated.
        pareto_k_threshold: up to which it can be trusted.
        distinct: different samples among those that have weight; strings are told apart by text.
        heavy: how many of them, the heaviest first, carry 90 % of the weight.
        log_evidence: nats; None where the method does not estimate it.
        log_evidence_error: its standard error, nats; None where it is not known.
        impossible_share: share of the draws that have weight zero.
        reliable: whether Pareto k allows to trust the error of the evidence.
        agreements: with each other posterior that was given.
        problems: what is wrong, and what to do; empty if nothing is.
        chains: the Markov chains behind the samples, whose own figures then stand in the place of
            Pareto k; None if the samples are independent.
    """

    report_width = 100

    method: str
    guide: str
    num_samples: int
    ess: float
    pareto_k: float
    pareto_k_threshold: float
    distinct: int
    heavy: int
    log_evidence: float | None
    log_evidence_error: float | None
    impossible_share: float
    reliable: bool
    agreements: tuple[Agreement, ...]
    problems: tuple[str, ...]
    chains: Chains | None = None

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def __rich__(self) -> rich.console.RenderableType:
        """The figures, and below them what they say."""
        table = rich.table.Table(
            box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=False
        )
        table.add_column("figure")
        table.add_column("value", overflow="fold")
        for name, value in self._rows():
            table.add_row(name, rich.text.Text(value))
        verdict = self.problems or ("Nothing in these samples speaks against them.",)
        return rich.console.Group(table, "", *(rich.text.Text(line) for line in verdict))

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("method, guide", f"{self.method}, {self.guide}, {self.num_samples} samples")]
        if self.chains is None:
            ess = "all points are listed" if math.isinf(self.ess) else f"{self.ess:.1f}"
            k = "unknown" if math.isnan(self.pareto_k) else f"{self.pareto_k:.2f}"
            rows += [
                ("ESS", ess),
                ("Pareto k", f"{k} (up to {self.pareto_k_threshold:.2f} is well)"),
            ]
        else:
            rows += [("chains", line) for line in self.chains.lines()]
        rows += [
            ("distinct samples", f"{self.distinct}, of which {self.heavy} carry {_HEAVY:.0%}"),
            ("log evidence", _evidence(self.log_evidence, self.log_evidence_error, self.reliable)),
            ("impossible draws", f"{self.impossible_share:.1%}"),
        ]
        return rows + [(f"beside {a.other}", _comparison(a)) for a in self.agreements]

    def __repr__(self) -> str:
        """The report itself: an interpreter that shows a diagnosis shows its words."""
        return str(self)


def diagnose(posterior: Posterior, others: Sequence[Posterior] = ()) -> Diagnosis:
    """Judges a posterior, alone and beside others of the same program.

    Args:
        posterior: what to judge.
        others: posteriors of the same program and observations, by other guides, methods or seeds.

    Raises:
        ValueError: if another posterior has latents and none of them in common with this one.
    """
    has_weight = bool(np.isfinite(posterior.log_weights).any())
    counts = weights_of_samples(posterior)
    cumulative = np.cumsum(np.sort(counts)[::-1])
    heavy = int(np.searchsorted(cumulative, _HEAVY - 1e-9) + 1) if has_weight else 0
    evidence, error = _known(posterior.log_evidence), _known(posterior.log_evidence_error)
    if evidence is None:
        error = None
    agreements = tuple(_agreement(posterior, other) for other in others)
    found = Diagnosis(
        method=posterior.method,
        guide=posterior.guide,
        num_samples=posterior.num_samples,
        ess=float(posterior.ess),
        pareto_k=float(posterior.pareto_k),
        pareto_k_threshold=diagnostics.pareto_k_threshold(posterior.num_samples),
        distinct=len(counts),
        heavy=heavy,
        log_evidence=evidence,
        log_evidence_error=error,
        impossible_share=float(posterior.impossible_share),
        reliable=bool(posterior.reliable),
        agreements=agreements,
        problems=(),
        chains=posterior.chains,
    )
    problems = _problems(found, has_weight, posterior.failed_sites)
    return Diagnosis(**{**found.__dict__, "problems": tuple(problems)})


def _problems(d: Diagnosis, has_weight: bool, failed: Mapping[str, int]) -> list[str]:
    """What is wrong with a posterior, the worst first."""
    worst = max(failed, key=lambda n: failed[n]) if failed else None
    if not has_weight:
        where = "" if worst is None else f" (most fail at site {worst!r})"
        return [
            f"No sample explains the observations: all {d.num_samples} have weight zero{where}; "
            f"check that the observed values are possible under their sites' rules, or {_BETTER}."
        ]
    said = _about_weights(d) if d.chains is None else _about_chains(d.chains)
    if d.impossible_share > 0.5 and d.method != "exact":
        where = "" if worst is None else f", most at site {worst!r}"
        said.append(
            f"{d.impossible_share:.0%} of the draws are impossible{where}; give strings room to "
            "finish (max_tokens), or use a guide that reads the observations."
        )
    said += [f"Beside {a.other}: {_comparison(a)}." for a in d.agreements if a.agrees is False]
    return said


def _about_weights(d: Diagnosis) -> list[str]:
    """What is wrong with the weights of independent samples."""
    said = []
    if d.num_samples / 2.0 <= d.ess < _FEW:
        said.append(f"ESS {d.ess:.1f} of {d.num_samples}: draw more (num_samples).")
    elif d.ess < max(_FEW, _SMALL_SHARE * d.num_samples):
        said.append(
            f"ESS {d.ess:.1f} of {d.num_samples}: most samples do not explain the observations; "
            f"{_BETTER}."
        )
    if math.isnan(d.pareto_k):
        said.append(
            "Pareto k is unknown, since there are too few weighted samples to judge their tail; "
            "draw more (num_samples)."
        )
    elif not d.reliable:
        said.append(
            f"Pareto k {d.pareto_k:.2f} is above {d.pareto_k_threshold:.2f}: a few samples carry "
            "the weights, so the error of the evidence cannot be trusted; use a guide that draws "
            "what the posterior likes (a GFlowNetGuide, with a defensive share), or draw more."
        )
    if d.log_evidence_error is not None and d.log_evidence_error > _LARGE_ERROR and d.reliable:
        said.append(
            f"The log evidence is known to ± {d.log_evidence_error:.2f} nats only; draw more."
        )
    return said


def _about_chains(chains: Chains) -> list[str]:
    """What is wrong with Markov chains."""
    notes = [f"{note[0].upper()}{note[1:]}." for note in chain_notes(chains)]
    if chains.worst is None:
        notes.append("No summary of the samples ever varies, so nothing shows that they move.")
    return notes


def weights_of_samples(posterior: Posterior) -> diagnostics.Array:
    """The weight of each different sample among those that have one.

    Strings are told apart by text, numbers by every digit.

    Returns:
        Shape [number of different samples], summing to one; empty if no sample has weight.
    """
    table: dict[object, float] = {}
    if not np.isfinite(posterior.log_weights).any():
        return np.zeros(0)
    for sample, weight in zip(posterior.samples, posterior.weights, strict=True):
        if weight > 0.0:
            key = hashable(sample)
            table[key] = table.get(key, 0.0) + float(weight)
    return np.array(list(table.values()))


def _agreement(one: Posterior, other: Posterior) -> Agreement:
    common = [site for site in one.sites if site in other.sites]
    if one.sites and other.sites and not common:
        raise ValueError(
            f"the posteriors have no latent in common ({', '.join(one.sites)}; "
            f"{', '.join(other.sites)}), so they are not of one program"
        )
    difference, deviations = _evidences(one, other)
    site = distance = noise = None
    if common and all(np.isfinite(p.log_weights).any() for p in (one, other)):
        tables = {s: (one.probabilities(s), other.probabilities(s)) for s in common}
        site = max(common, key=lambda s: len({**tables[s][0], **tables[s][1]}))
        distance, noise = _total_variation(*tables[site], one.ess, other.ess)
    checks = []
    if deviations is not None:
        checks.append(abs(deviations) <= _DEVIATIONS)
    if distance is not None and noise is not None and noise <= _NOISY:
        checks.append(distance <= 2.0 * noise + 1e-3)
    return Agreement(
        other=f"{other.method}, {other.guide}",
        evidence_difference=difference,
        evidence_deviations=deviations,
        trusted=bool(one.reliable and other.reliable),
        site=site,
        total_variation=distance,
        noise=noise,
        agrees=all(checks) if checks else None,
    )


def _evidences(one: Posterior, other: Posterior) -> tuple[float | None, float | None]:
    """The difference of two log evidences, and that in standard errors."""
    values = [_known(p.log_evidence) for p in (one, other)]
    errors = [_known(p.log_evidence_error) for p in (one, other)]
    if None in values or any(math.isinf(v) for v in values if v is not None):
        return None, None
    difference = float(values[0] - values[1])  # type: ignore[operator]
    if None in errors:
        return difference, None
    # Scores are float32, so what should be equal differs by some 1e-4 nats.
    together = math.hypot(*[e for e in errors if e is not None], 1e-3)
    return difference, None if math.isinf(together) else difference / together


def _total_variation(
    one: Mapping[Any, float], other: Mapping[Any, float], ess: float, other_ess: float
) -> tuple[float, float | None]:
    """Distance of two distributions, and about what it is between samples of one."""
    values = list({**one, **other})
    first = np.array([one.get(v, 0.0) for v in values])
    second = np.array([other.get(v, 0.0) for v in values])
    if len(values) > 2 * _BINS and all(map(is_number, values)):
        order = np.argsort(values)
        first, second = first[order], second[order]
        place = np.cumsum(first + second) / 2.0
        bins = np.minimum((place * _BINS).astype(int), _BINS - 1)
        first = np.bincount(bins, weights=first, minlength=_BINS)
        second = np.bincount(bins, weights=second, minlength=_BINS)
    distance = float(np.abs(first - second).sum() / 2.0)
    pooled = (first + second) / 2.0
    scale = 1.0 / max(ess, 1.0) + 1.0 / max(other_ess, 1.0)
    # The mean absolute value of a normal deviation is √(2/π) of its standard deviation.
    noise = float(np.sqrt(2.0 / math.pi * pooled * (1.0 - pooled).clip(0.0) * scale).sum() / 2.0)
    return distance, _known(min(noise, 1.0))


def _known(value: float | None) -> float | None:
    """A number; None where it is not known."""
    return None if value is None or math.isnan(value) else float(value)


def _evidence(value: float | None, error: float | None, reliable: bool) -> str:
    if value is None:
        return "not estimated"
    if error is None:
        return f"{value:.3f} nats (its error is not known)"
    return f"{value:.3f} ± {error:.3f} nats" + ("" if reliable else " (not to be trusted)")


def _comparison(a: Agreement) -> str:
    said = []
    if a.evidence_difference is not None:
        part = f"log evidence differs by {a.evidence_difference:+.3f} nats"
        if a.evidence_deviations is not None:
            doubt = "" if a.trusted else ", not to be trusted"
            part += f" ({abs(a.evidence_deviations):.1f} standard errors{doubt})"
        said.append(part)
    if a.total_variation is not None and a.noise is not None:
        few = f", and up to {2.0 * a.noise:.3f} is let pass"
        if a.noise > _NOISY:
            few = ", too few samples to tell"
        said.append(
            f"total variation {a.total_variation:.3f} on {a.site!r} (about {a.noise:.3f} would be "
            f"noise{few})"
        )
    return "; ".join([*said, _verdict(a)])


def _verdict(a: Agreement) -> str:
    if a.agrees is None:
        return "nothing to compare"
    if not a.agrees:
        return "they disagree"
    # Without enough samples the values were not compared, whatever the evidences say.
    if a.noise is None or a.noise > _NOISY:
        return "the evidences agree"
    return "they agree" if a.evidence_deviations is not None else "the values agree"
