"""`Comparison`: posteriors of one program under several guides and methods, side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from langppl.diagnosis import Agreement, weights_of_samples
from langppl.inference.rows import Row
from langppl.lm.tally import Tally
from langppl.posterior import Posterior
from langppl.tables import Report, escaped, moments, pandas_for, shown
from langppl.values import is_number

if TYPE_CHECKING:
    import pandas

__all__ = ["Comparison", "Cost"]

LIKELIEST = 3
"""How many of a latent's values stand in the figures."""
MOST_SITES = 4
"""Latents whose likeliest values are printed."""
WIDTH = 100


@dataclass(frozen=True)
class Cost:
    """What something took.

    Attributes:
        seconds: wall time.
        tokens: read by the LMs of the program's sites and of the guide, see `langppl.lm.tally`.
    """

    seconds: float
    tokens: Tally


class Comparison(Report):
    """Posteriors of one program under several guides and methods.

    Args:
        posteriors: by the row's name.
        errors: of the rows that failed, by name.
        costs: of rows, by name.
        training: of guides that were trained first, by the guide's name.
        wanted: what the rows were, in the order in which they are shown; by default posteriors,
            then errors.

    Attributes:
        posteriors: by the row's name, in the order they were asked for.
        errors: what the rows that failed raised, without tracebacks.
        costs: wall time and LM tokens of each row, training apart.
        training: wall time and LM tokens of training each guide that `compare` trained itself.
    """

    report_width = WIDTH

    def __init__(
        self,
        posteriors: Mapping[str, Posterior],
        errors: Mapping[str, Exception] | None = None,
        costs: Mapping[str, Cost] | None = None,
        training: Mapping[str, Cost] | None = None,
        wanted: Sequence[Row] | None = None,
    ) -> None:
        self.posteriors = dict(posteriors)
        self.errors = dict(errors or {})
        self.costs = dict(costs or {})
        self.training = dict(training or {})
        self._wanted = {row.name: row for row in wanted or ()}

    def rows(self) -> list[dict[str, Any]]:
        """The figures, one mapping for each row; nats where they are log-probabilities.

        `name`, `method` and `guide`; `log_evidence`, its `error`, and whether that is `reliable`;
        `elbo`, and `elbo_possible` of the possible draws; `sd` of their log weights; `ess`,
        `pareto_k`, the share of `impossible` draws, `distinct` samples of weight, `seconds`,
        `tokens_drawn` and `tokens_scored`; `likeliest`, for each latent some (value, probability),
        the likeliest first. None where a figure is not known. A row that failed has its `failure`
        in words, and no figures.
        """
        return [self._figures(n) for n in self._wanted or [*self.posteriors, *self.errors]]

    def _figures(self, name: str) -> dict[str, Any]:
        found = dict.fromkeys(_FIGURES)
        found["name"] = name
        if name in self.errors:
            found["failure"] = _in_words(self.errors[name])
            if name in self._wanted:
                found["method"] = self._wanted[name].method
                found["guide"] = self._wanted[name].guide_name
            return found
        found.update(figures(name, self.posteriors[name]))
        if name in self.costs:
            cost = self.costs[name]
            found["seconds"] = cost.seconds
            found["tokens_drawn"], found["tokens_scored"] = cost.tokens.drawn, cost.tokens.scored
        return found

    @property
    def reference(self) -> str | None:
        """The row that the others are held to; None if no row has a posterior with weight.

        An exact one, or else the one whose evidence has the smallest error, among those whose
        error can be trusted if there are any.
        """
        possible = {n: p for n, p in self.posteriors.items() if np.isfinite(p.log_weights).any()}

        def rank(name: str) -> tuple[bool, bool, bool, float]:
            p = possible[name]
            error = math.inf if p.log_evidence_error is None else p.log_evidence_error
            error = math.inf if math.isnan(error) else error
            return p.method != "exact", p.log_evidence is None, not p.reliable, error

        return min(possible, key=rank, default=None)

    def agreements(self) -> dict[str, Agreement]:
        """Each other row beside the `reference`: evidences and probabilities.

        Agreement is no proof: what no guide ever visits is missing from all rows.
        """
        reference = self.reference
        if reference is None:
            return {}
        held_to = self.posteriors[reference]
        return {
            name: posterior.diagnose(held_to).agreements[0]
            for name, posterior in self.posteriors.items()
            if name != reference
        }

    def __rich__(self) -> rich.console.RenderableType:
        """The figures, the likeliest values, and in words which rows agree."""
        parts: list[rich.console.RenderableType] = [self._table()]
        parts += self._likeliest()
        lines = self._agreement_lines() + self._training_lines()
        parts += [rich.text.Text(line) for line in lines]
        parts += [rich.text.Text(f"{n} failed: {_in_words(e)}") for n, e in self.errors.items()]
        return rich.console.Group(*parts)

    def _table(self) -> rich.table.Table:
        table = rich.table.Table(
            box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False
        )
        rows = self.rows()
        plain = all(r["guide"] and r["name"].startswith(r["guide"]) for r in rows)
        table.add_column("guide" if plain else "row", overflow="fold")
        heads = ("log evidence", "ELBO", "sd", "ESS", "k", "impos-\nsible", "dis-\ntinct")
        for head in (*heads, "time", "LM\ntokens"):
            table.add_column(head, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(rich.text.Text(escaped(row["name"])), *_cells(row))
        table.caption = (
            "nats; (?): not to be trusted (Pareto k; of chains R-hat); ELBO and sd: mean and "
            "spread of the log weights of the possible draws; impossible: share of the draws; "
            "distinct: different samples of weight; LM tokens: read by the LM, drawing and scoring"
        )
        table.caption_justify = "left"
        return table

    def _likeliest(self) -> list[rich.console.RenderableType]:
        tables: list[rich.console.RenderableType] = []
        sites = dict.fromkeys(s for p in self.posteriors.values() for s in p.sites)
        for site in list(sites)[:MOST_SITES]:
            table = rich.table.Table(
                box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False
            )
            table.add_column("", overflow="fold", max_width=30)
            table.add_column("", justify="right", no_wrap=True)
            likeliest_of = rich.text.Text(f"likeliest {site!r}")
            table.add_column(likeliest_of, no_wrap=True, overflow="ellipsis")
            for name, posterior in self.posteriors.items():
                found = likeliest(posterior, site)
                cells = [(f"{p:.3f}", shown(value)) for value, p in found]
                if _is_spread(posterior, site):
                    cells = [("", _moments(posterior, site))]
                shares, values = zip(*(cells or [("", "–")]), strict=True)
                row = rich.text.Text(escaped(name)), "\n".join(shares)
                table.add_row(*row, rich.text.Text("\n".join(values)))
            tables += ["", table]
        if len(sites) > MOST_SITES:
            tables.append(f"and {len(sites) - MOST_SITES} more latents")
        return [*tables, ""]

    def _agreement_lines(self) -> list[str]:
        reference = self.reference
        found = self.agreements()
        if reference is None:
            return ["No row has a possible sample." if self.posteriors else "Every row failed."]
        return [f"{name} beside {reference}: {agreement}." for name, agreement in found.items()]

    def _training_lines(self) -> list[str]:
        return [
            f"{guide} was trained first, which the rows leave out: {cost.seconds:.1f} s, "
            f"{_count(cost.tokens.total)} LM tokens."
            for guide, cost in self.training.items()
        ]

    def __repr__(self) -> str:
        """One line: the rows, and those that failed."""
        return f"Comparison(rows={list(self.posteriors)!r}, failed={list(self.errors)!r})"

    def to_pandas(self) -> pandas.DataFrame:
        """The figures as a table, one row each.

        Returns:
            The columns of `rows`, and in the place of `likeliest` a column `likeliest SITE` for
            each latent, with its likeliest value.

        Raises:
            ImportError: if pandas is not installed.
        """
        pd = pandas_for("Comparison.to_pandas")
        rows = []
        for row in self.rows():
            tops = row.pop("likeliest") or {}
            row.update({f"likeliest {s}": v[0][0] if v else None for s, v in tops.items()})
            rows.append(row)
        frame: pandas.DataFrame = pd.DataFrame(rows)
        return frame

    def to_json(self) -> str:
        """The figures as strict JSON: `rows`, `reference`, `agreements` in words, and `training`.

        Infinite numbers are text ("inf"), unknown ones null.
        """
        content = {
            "rows": self.rows(),
            "reference": self.reference,
            "agreements": {name: str(a) for name, a in self.agreements().items()},
            "training": {
                guide: {
                    "seconds": cost.seconds,
                    "tokens_drawn": cost.tokens.drawn,
                    "tokens_scored": cost.tokens.scored,
                }
                for guide, cost in self.training.items()
            },
        }
        return json.dumps(_strict(content), allow_nan=False, indent=1) + "\n"


_FIGURES = (
    *("name", "method", "guide", "log_evidence", "error", "elbo", "elbo_possible", "sd", "ess"),
    *("pareto_k", "reliable", "impossible", "distinct", "seconds", "tokens_drawn"),
    *("tokens_scored", "likeliest", "failure"),
)


def figures(name: str, posterior: Posterior) -> dict[str, Any]:
    """What a table says of one posterior; None where chains have no such figure."""
    finite = posterior.log_weights[np.isfinite(posterior.log_weights)]
    sd = float(finite.std(ddof=1)) if finite.size > 1 else math.nan
    is_drawn = posterior.chains is None and posterior.method != "exact"
    return {
        "name": name,
        "method": posterior.method,
        "guide": None if posterior.method == "exact" else posterior.guide,
        "log_evidence": posterior.log_evidence,
        "error": posterior.log_evidence_error,
        "elbo": posterior.elbo,
        "elbo_possible": posterior.elbo_possible,
        # Weights that were reset on the way are not the guide's, as with the ELBO.
        "sd": sd if is_drawn and posterior.ancestors is None and not posterior.parts else None,
        "ess": posterior.ess,
        "pareto_k": posterior.pareto_k if is_drawn else None,
        "reliable": posterior.reliable,
        "impossible": posterior.impossible_share,
        "distinct": len(weights_of_samples(posterior)),
        "seconds": posterior.elapsed,
        "likeliest": {site: likeliest(posterior, site) for site in posterior.sites},
    }


def likeliest(posterior: Posterior, site: str, most: int = LIKELIEST) -> list[tuple[Any, float]]:
    """The likeliest values of a latent or of what is computed; none if no sample has weight."""
    if not np.isfinite(posterior.log_weights).any() or site not in posterior:
        return []
    return list(posterior.probabilities(site).items())[:most]


def _is_spread(posterior: Posterior, site: str) -> bool:
    """Whether a latent's values are numbers of which there are many, none of them likely."""
    values = [value for value, _ in likeliest(posterior, site, 10 * LIKELIEST)]
    return len(values) == 10 * LIKELIEST and all(map(is_number, values))


def _moments(posterior: Posterior, site: str) -> str:
    found = posterior.probabilities(site)
    return moments({float(v): p for v, p in found.items() if is_number(v)})


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row["failure"] is not None:
        return ["failed", *["–"] * 8]
    evidence = _fixed(row["log_evidence"])
    if row["method"] == "exact":
        evidence += " exactly"
    elif row["log_evidence"] is not None:
        evidence += f" ± {_fixed(row['error'])}"
    tokens = [row["tokens_drawn"], row["tokens_scored"]]
    return [
        evidence + ("" if row["reliable"] else " (?)"),
        _fixed(row["elbo_possible"]),
        _fixed(row["sd"]),
        "–" if math.isinf(row["ess"]) else f"{row['ess']:.1f}".replace("nan", "–"),
        _fixed(row["pareto_k"]),
        f"{row['impossible']:.1%}",
        str(row["distinct"]),
        "–" if row["seconds"] is None else f"{row['seconds']:.1f} s",
        "–" if None in tokens else _count(sum(tokens)),
    ]


def _fixed(number: float | None) -> str:
    return "–" if number is None or math.isnan(number) else f"{number:.2f}"


def _count(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 10 * size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
