"""`compare`: the same program under several guides, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table

from langppl.guides import Guide
from langppl.inference.methods import as_program, infer
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.tables import as_text

__all__ = ["Comparison", "compare"]


class Comparison:
    """Posteriors of one program under several guides.

    Attributes:
        posteriors: by the guide's name, in the order they were asked for.
    """

    def __init__(self, posteriors: dict[str, Posterior]) -> None:
        self.posteriors = posteriors

    def rows(self) -> list[dict[str, Any]]:
        """The figures, one mapping for each guide; nats where they are log-probabilities."""
        return [figures(name, p) for name, p in self.posteriors.items()]

    def __rich__(self) -> rich.console.RenderableType:
        """The table."""
        table = rich.table.Table(box=rich.box.SIMPLE)
        table.add_column("guide")
        for head in ("log evidence", "± error", "ELBO", "sd", "ESS", "k", "impossible", "distinct"):
            table.add_column(head, justify="right")
        for row in self.rows():
            trusted = "" if row["reliable"] else " (?)"
            table.add_row(
                row["guide"],
                _fixed(row["log_evidence"]),
                _fixed(row["error"]) + trusted,
                _fixed(row["elbo_possible"]),
                _fixed(row["sd"]),
                f"{row['ess']:.1f}",
                _fixed(row["pareto_k"]),
                f"{row['impossible']:.1%}",
                str(row["distinct"]),
            )
        table.caption = (
            "ELBO: mean log weight of the possible draws; sd: of their log weights; (?): the "
            "error cannot be trusted (Pareto k); distinct: different samples"
        )
        return table

    def __str__(self) -> str:
        """The table as text."""
        return as_text(self, width=100)


def _fixed(number: float | None) -> str:
    return "–" if number is None else f"{number:.2f}"


def figures(name: str, posterior: Posterior) -> dict[str, Any]:
    """What a table says of one posterior; None where chains have no such figure."""
    finite = posterior.log_weights[np.isfinite(posterior.log_weights)]
    sd = float(finite.std(ddof=1)) if finite.size > 1 else math.nan
    is_weighted = posterior.chains is None
    keys = {tuple((k, str(v)) for k, v in s.items()) for s in posterior.samples}
    return {
        "guide": name,
        "log_evidence": posterior.log_evidence,
        "error": posterior.log_evidence_error,
        "elbo": posterior.elbo,
        "elbo_possible": posterior.elbo_possible,
        "sd": sd if is_weighted else None,
        "ess": posterior.ess,
        "pareto_k": posterior.pareto_k if is_weighted else None,
        "reliable": posterior.reliable,
        "impossible": posterior.impossible_share,
        "distinct": len(keys),
        "seconds": posterior.elapsed,
    }


def compare(
    model: Callable[..., Any] | Program,
    *args: Any,
    guides: Sequence[str | Guide] = ("prior", "prompted", "gflownet"),
    num_samples: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Infers with several guides and sets them side by side.

    Args:
        model: a model function, or a compiled `Program` (then without `args`).
        *args: the model's arguments.
        guides: names or guide objects.
        num_samples: for each guide.
        seed: equal seeds give equal results.
        progress: whether to show progress bars on a terminal.

    Returns:
        The posteriors; print it for the table.

    Raises:
        ValueError: if no guide is given, or as `infer` does.
    """
    if not guides:
        raise ValueError("give at least one guide to compare")
    program = as_program(model, args, seed)
    posteriors: dict[str, Posterior] = {}
    for guide in guides:
        name = base = guide if isinstance(guide, str) else guide.name
        count = 2
        while name in posteriors:
            name, count = f"{base} {count}", count + 1
        posteriors[name] = infer(
            program, guide=guide, num_samples=num_samples, seed=seed, progress=progress
        )
    return Comparison(posteriors)
