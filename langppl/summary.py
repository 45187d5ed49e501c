"""A posterior as a table of its likeliest values, and what the samples are worth in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import rich.box
import rich.console
import rich.table
import rich.text

from langppl import diagnostics
from langppl.tables import moments, shown
from langppl.values import ABSENT, LONGEST_VALUE, UncountableError, is_number

if TYPE_CHECKING:
    from langppl.posterior import Posterior

_TOP_VALUES = 5
_MOST_COMPONENTS = 8


def report(posterior: Posterior) -> rich.console.RenderableType:
    """A table of each site's likeliest values, and below it what they are worth."""
    lines = [rich.text.Text(line) for line in _lines(posterior)]
    if not _has_weight(posterior):
        return rich.console.Group(*lines)
    found = {site: _rows(posterior, site) for site in _names(posterior)}
    # What made-up values led a dynamic program to may be many sites that no run of it meets.
    idle = [site for site, own in found.items() if [v for v, _ in own] == [str(ABSENT)]]
    met = {site: own for site, own in found.items() if site not in idle}
    if idle:
        names = ", ".join(shown(site, LONGEST_VALUE) for site in idle[:_TOP_VALUES])
        more = f" and {len(idle) - _TOP_VALUES} more" if len(idle) > _TOP_VALUES else ""
        lines.insert(0, rich.text.Text(f"met by no sample of weight: {names}{more}"))
    if not met:
        return rich.console.Group(*lines)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("site", overflow="fold")
    table.add_column("value", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for site, own in met.items():
        name = site
        for value, probability in own:
            table.add_row(rich.text.Text(name), rich.text.Text(value), _percentage(probability))
            name = ""
        table.add_section()
    return rich.console.Group(table, rich.text.Text(""), *lines)


def rows(posterior: Posterior) -> list[tuple[str, str, float]]:
    """The rows of the table: site, value as shown, probability; NaN where it has no meaning."""
    return [(site, *row) for site in _names(posterior) for row in _rows(posterior, site)]


def failure(posterior: Posterior) -> str:
    """Why no sample has weight, and what to try."""
    what = "point of the support" if _is_exact(posterior) else "sample"
    text = f"no {what} explains the observations: all {posterior.num_samples} have weight zero. "
    if posterior.failed_sites:
        text += f"The log probability is -inf at {failed_at(posterior.failed_sites)}. "
    else:
        text += "The site that failed is not recorded. "
    text += (
        "Try: check that an observed value there can be: a string under its site's rules (stop, "
        "max_tokens, min_tokens, ban, allow, grammar), a number within its distribution's support; "
        'that a latent with truncate="reject" has room to finish'
    )
    if not _is_exact(posterior):
        text += (
            "; draw more samples; or use a guide that reads the observations "
            '("prompted", "gflownet")'
        )
    return text + "."


def _names(posterior: Posterior) -> tuple[str, ...]:
    """The latents, then what was computed."""
    return tuple(dict.fromkeys([*posterior.sites, *posterior.computed_sites]))


def _rows(posterior: Posterior, site: str) -> list[tuple[str, float]]:
    """The likeliest values of a site as shown, the rest in one row; a mean for numbers."""
    try:
        table = posterior.probabilities(site)
    except UncountableError:
        kinds = dict.fromkeys(type(v).__name__ for v in posterior[site] if v is not None)
        return [(f"not hashable ({', '.join(kinds)})", math.nan)]
    if len(table) > _TOP_VALUES and (components := _components(table)) is not None:
        mass = math.fsum(table.values())
        found = [(f"{place} {moments(own)}", mass) for place, own in components.items()]
        more = len(found) - _MOST_COMPONENTS
        return found if more <= 0 else [*found[:-more], (f"{more} more components", mass)]
    numeric = {float(v): p for v, p in table.items() if is_number(v) and math.isfinite(v)}
    if len(numeric) > _TOP_VALUES:
        found = [(moments(numeric), math.fsum(numeric.values()))]
        table = {v: p for v, p in table.items() if v not in numeric}
    else:
        found = []
    top = list(table.items())[:_TOP_VALUES]
    found += [(shown(value, LONGEST_VALUE), p) for value, p in top]
    others = list(table.values())[_TOP_VALUES:]
    if others:
        found.append((f"{len(others)} more", math.fsum(others)))
    return found


def _components(table: Mapping[Any, float]) -> dict[str, dict[float, float]] | None:
    """For each place in arrays of one shape, number → weight; None if the values are no such."""
    found: dict[str, dict[float, float]] = {}
    first: list[tuple[int, ...]] | None = None
    for value, weight in table.items():
        flat = list(_flat(value))
        places = [place for place, _ in flat]
        if first is None:
            first = places
        if not isinstance(value, tuple) or not places or places != first:
            return None
        for place, number in flat:
            if not is_number(number) or not math.isfinite(number):
                return None
            own = found.setdefault(str(list(place)), {})
            own[float(number)] = own.get(float(number), 0.0) + weight
    return found


def _flat(value: Any, place: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    if not isinstance(value, tuple):
        yield place, value
        return
    for k, part in enumerate(value):
        yield from _flat(part, (*place, k))


def _lines(posterior: Posterior) -> list[str]:
    """The lines under the table."""
    kind = "points" if _is_exact(posterior) else "samples"
    lines = [] if _has_weight(posterior) else [failure(posterior)]
    if _has_weight(posterior):
        lines.append(_evidence(posterior))
        if posterior.chains is not None:
            lines += posterior.chains.lines()
        elif not _is_exact(posterior):
            lines.append(
                f"ESS {posterior.ess:.1f} of {posterior.num_samples} samples, "
                f"Pareto k {_unknown(posterior.pareto_k)}"
            )
        if posterior.resampled:
            left = len(set(posterior.ancestors or ()))
            lines.append(
                f"resampled {posterior.resampled} times: the samples descend from {left} of "
                f"{posterior.num_samples} first particles, which is what ESS counts"
            )
        if posterior.parts:
            lines.append(
                f"{len(posterior.parts)} independent parts, each resampled on its own and paired; "
                "ESS and Pareto k are the worst part's"
            )
        tried, accepted = posterior.moves
        if tried:
            lines.append(f"{accepted} of {tried} Metropolis–Hastings moves were accepted")
        if posterior.impossible_share > 0.0:
            lines.append(f"{posterior.impossible_share:.1%} of the samples are impossible")
    size = f"{posterior.num_samples} {kind}"
    elapsed = "" if posterior.elapsed is None else f", {posterior.elapsed:.1f} s"
    lines.append(f"method {posterior.method}, guide {posterior.guide}, {size}{elapsed}")
    return [*lines, *posterior.notes]


def _evidence(posterior: Posterior) -> str:
    """The evidence, and in words whether its error can be trusted."""
    if posterior.log_evidence is None or posterior.log_evidence_error is None:
        return f"log evidence is not estimated by method {posterior.method}"
    value = f"log evidence {posterior.log_evidence:.3f}"
    if _is_exact(posterior):
        return f"{value} nats (exact)"
    if math.isnan(posterior.log_evidence_error):
        value += " nats (its error is not known)"
    else:
        value += f" ± {posterior.log_evidence_error:.3f} nats"
    if posterior.reliable:
        return value
    if math.isnan(posterior.pareto_k):
        return (
            f"{value}: this error cannot be trusted, there are too few weighted samples "
            f"to judge their tail"
        )
    threshold = diagnostics.pareto_k_threshold(posterior.num_samples)
    return (
        f"{value}: this error cannot be trusted, Pareto k {posterior.pareto_k:.2f} is above "
        f"{threshold:.2f}; draw more samples or use a better guide"
    )


def _has_weight(posterior: Posterior) -> bool:
    # The share of impossible draws is a product over parts, which may round to 1.
    return bool((posterior.log_weights > -math.inf).any())


def _is_exact(posterior: Posterior) -> bool:
    return posterior.method == "exact"


def _percentage(probability: float) -> str:
    if math.isnan(probability):
        return ""
    return "<0.001" if 0.0 < probability < 0.0005 else f"{probability:.3f}"


def _unknown(number: float) -> str:
    return "unknown" if math.isnan(number) else f"{number:.2f}"


def failed_at(failed_sites: Mapping[str, int]) -> str:
    """Sites and how often each failed, the most frequent first."""
    ordered = sorted(failed_sites.items(), key=lambda item: -item[1])
    return ", ".join(f"site {name!r} (in {count} samples)" for name, count in ordered)
