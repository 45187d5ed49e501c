"""`infer_many`: one posterior for each row of data, in full batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langppl.defaults import CHAINS, NUM_SAMPLES
from langppl.diagnostics import InferenceWarning
from langppl.guides.function import GuideLike
from langppl.inference.importance import BATCH
from langppl.inference.methods import check_names, given_guide, infer
from langppl.inference.settings import Method, check_options
from langppl.keywords import with_rows
from langppl.lm.counts import as_count
from langppl.lm.seeds import as_seed, row_seed
from langppl.posterior import Posterior
from langppl.program import Program, compile
from langppl.program.arguments import ModelOrProgram, pairs_of
from langppl.program.program import as_program
from langppl.program.scheduler import run_whole
from langppl.progress import bar
from langppl.warn import warn


@with_rows
def infer_many(
    model: Callable[..., Any] | Program | Sequence[Any],
    data: Any = None,
    *,
    guide: GuideLike = "prior",
    method: Method = "importance",
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> list[Posterior]:
    """The posterior of each row of data.

    As `infer` for one row after the other, but several rows are run at once, so that the LM sees
    full batches where each row has few samples. How many are run together changes no result.

    Args:
        model: a model function, or a list of compiled programs and of (model, data) pairs.
        data: the rows, as `GFlowNetGuide.fit` takes them: a sequence, another iterable, a
            `Dataset` or a `DataFrame`, of tuples of the model's arguments or of mappings from
            their names.
        guide: as in `infer`, but for `"gflownet"`: train one guide for all rows, and give it.
        method: as in `infer`.
        num_samples: for each row.
        seed: equal seeds give equal results. Each row has random numbers of its own: those of
            `infer` with `langppl.lm.seeds.row_seed(seed, k)`.
        progress: as in `infer`.
        **options: of the method, by the names that `infer` has for them.

    Returns:
        A posterior for each row, in order. Interrupted (Ctrl-C), those of the first rows, as far
        as they are finished, with a warning.

    Raises:
        ValueError: as `infer`; or for no data.
        TypeError: as `infer`; for an option that the method does not have; or for rows that do not
            fit the model.

    Example:
        >>> found = infer_many(story, [pair, pair], guide=guide, num_samples=16)
        >>> [len(posterior) for posterior in found]
        [16, 16]
    """
    check_names(method, guide)
    num_samples = as_count("num_samples", num_samples, 1)
    check_options(method, options, infer_many)
    seed = as_seed(seed)
    settings: dict[str, Any] = {"method": method, "num_samples": num_samples, **options}
    if method != "exact":
        settings["guide"] = given_guide(guide)
    elif guide != "prior":
        raise ValueError(f"method 'exact' takes no guide, got {guide!r}")
    pairs = pairs_of(model, data)
    count = sum(len(found) for _, found in pairs)
    together = rows_at_once(method, num_samples, options)
    done: list[Posterior] = []
    try:
        with bar("inferring", count, progress) as advance:
            rows = _rows(pairs, seed)
            for first in range(0, count, together):
                part = [
                    functools.partial(_infer, *rows[k], row_seed(seed, k), settings)
                    for k in range(first, min(first + together, count))
                ]
                found = run_rows(part, method, num_samples)
                done += found
                advance(len(found))
    except KeyboardInterrupt:
        if not done:
            raise
        warn(
            f"interrupted: the posteriors are of the first {len(done)} rows of {count}",
            InferenceWarning,
        )
    return done


def _rows(
    pairs: Sequence[tuple[ModelOrProgram, list[tuple[Any, ...]]]], seed: int
) -> list[tuple[ModelOrProgram, tuple[Any, ...], Program | None]]:
    """Model, arguments and the program of the model's first row, which is compiled here."""
    rows: list[tuple[ModelOrProgram, tuple[Any, ...], Program | None]] = []
    for model, found in pairs:
        first = as_program(model, found[0], row_seed(seed, len(rows)))
        rows.append((first, (), None))
        rows += [(model, row, first) for row in found[1:]]
    return rows


def _infer(
    model: ModelOrProgram,
    row: tuple[Any, ...],
    first: Program | None,
    seed: int,
    settings: Mapping[str, Any],
) -> Posterior:
    if not isinstance(model, Program):
        model = compile(model, *row, seed=seed, like=first)
    return infer(model, seed=seed, progress=False, **settings)


def run_rows(
    tasks: Sequence[Callable[[], Posterior]], method: str, num_samples: int
) -> list[Posterior]:
    """Runs the inferences of several rows at once.

    Args:
        tasks: the inferences.
        method: their method.
        num_samples: how many samples each is to have.

    Raises:
        KeyboardInterrupt: if a method heard it, and returned a part of its samples.
    """
    found = run_whole(tasks) if len(tasks) > 1 else [task() for task in tasks]
    if method != "exact" and any(len(posterior) < num_samples for posterior in found):
        raise KeyboardInterrupt
    return found


def rows_at_once(method: str, num_samples: int, options: Mapping[str, Any]) -> int:
    """How many rows fill the LM's batches.

    Args:
        method: as `infer` has them.
        num_samples: for each row.
        options: of the method.
    """
    if method == "exact":
        return 1  # fills its batches by itself
    width = int(options.get("chains", CHAINS)) if method == "mh" else num_samples
    return max(1, BATCH // width)
