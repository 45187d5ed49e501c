"""`compare`: runs the rows of a comparison, each at its own cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from langppl.defaults import NUM_SAMPLES
from langppl.guides import Guide
from langppl.guides.function import GuideLike
from langppl.inference.comparison import Comparison, Cost
from langppl.inference.methods import check_fit, infer, make_guide
from langppl.inference.rows import Row, RowLike, rows_of
from langppl.inference.settings import names_of
from langppl.lm import LM
from langppl.lm.counts import as_count
from langppl.lm.seeds import as_seed
from langppl.lm.tally import Tally
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.program.calls import Memo, forget_since, remembered
from langppl.program.program import as_program, lms_of
from langppl.progress import say

DEFAULT_GUIDES = ("prior", "prompted", "gflownet")


def compare(
    model: Callable[..., Any] | Program,
    *args: Any,
    guides: Sequence[GuideLike] | None = None,
    methods: Sequence[str] | None = None,
    rows: Sequence[RowLike] | Mapping[str, RowLike] | None = None,
    num_samples: int = NUM_SAMPLES,
    fit: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    **named: Any,
) -> Comparison:
    """Infers with several guides and methods, and sets them side by side.

    A row that fails leaves its error in the table, and the others stand. No row goes on from the
    scores that another one has left in the LM's memo, nor from what tools have returned to it, so
    that each pays for its own work; the first also pays for what an LM makes once for all (such as
    the rules of a site), and for tools with `pure=False`, which are not evaluated again.

    Args:
        model: a model function, or a compiled `Program` (then without `args`).
        *args: the model's arguments.
        guides: names, functions or guide objects; by default all three names. `"gflownet"` is
            trained once, on these observations, and what that took is told apart.
        methods: names; every guide goes with every method, and `"exact"` stands once. By default
            importance sampling alone.
        rows: in place of `guides` and `methods`: (method, guide), (method, guide, options), or a
            mapping of `infer`'s arguments; the guide of `"exact"` is None. A mapping gives
            the rows names of your own.
        num_samples: for each row that has no number of its own.
        fit: how `"gflownet"` is trained, by the names that `GFlowNetGuide.fit` has for it.
        seed: equal seeds give equal results.
        progress: as in `infer`.
        **named: the model's arguments by their names.

    Returns:
        The posteriors and what they took; print it for the table.

    Raises:
        ValueError: before anything is drawn: if there is no row, or a method, a guide or an option
            is not known or out of range, or belongs to another method.
        TypeError: if a guide, a row or a seed is none, or for arguments that do not fit the model
            or the training.

    Example:
        >>> from langppl import LMString, sample
        >>> from langppl.testing import tiny_lm
        >>> lm = tiny_lm("ab.", seed=2)
        >>> def story(ending):
        ...     middle = sample("middle", LMString(lm, "ab", stop=".", max_tokens=2))
        ...     sample("ending", LMString(lm, f"ab{middle}"), obs=ending)
        >>> found = compare(
        ...     story,
        ...     "ba",
        ...     rows=[
        ...         ("exact", None),
        ...         ("importance", "prior"),
        ...         ("smc", "prompted", {"twist": "lookahead"}),
        ...     ],
        ... )
        >>> [row["name"] for row in found.rows()]
        ['exact', 'importance prior', 'smc prompted twist=lookahead']
        >>> found.agreements()["importance prior"].agrees
        True
    """
    wanted = rows_of(guides, methods, rows, DEFAULT_GUIDES)
    check_fit(fit, [row.guide for row in wanted])
    num_samples = as_count("num_samples", num_samples, 1)
    seed = as_seed(seed)
    program = as_program(model, args, seed, named, names_of(compare))
    before = remembered(program.memo)
    posteriors: dict[str, Posterior] = {}
    errors: dict[str, Exception] = {}
    costs: dict[str, Cost] = {}
    training: dict[str, Cost] = {}
    made: dict[str, Guide | Exception] = {}
    for at, row in enumerate(wanted):
        say(f"{at + 1} of {len(wanted)}: {row.name}", progress)
        try:
            guide = _ready(row, program, before, seed, progress, fit, made, training)
            given = {"num_samples": num_samples, "seed": seed, **row.options}
            run = partial(infer, program, method=row.method, guide=guide, progress=progress)
            forget_since(program.memo, before)
            posterior, costs[row.name] = _timed(partial(run, **given), _lms(program, guide))
        except Exception as error:  # whatever one row raises, the others are worth having
            errors[row.name] = _stripped(error)
            continue
        posteriors[row.name] = posterior
    return Comparison(posteriors, errors, costs, training, wanted)


def _ready(
    row: Row,
    program: Program,
    before: Memo,
    seed: int,
    progress: bool,
    fit: Mapping[str, Any] | None,
    made: dict[str, Guide | Exception],
    training: dict[str, Cost],
) -> Guide | str:
    """A row's guide; one that is given by name is made, and trained, once."""
    if row.guide is None:
        return "prior"
    if isinstance(row.guide, Guide):
        return row.guide
    name = row.guide
    if name not in made:
        try:
            make = partial(make_guide, name, program, seed, progress, fit)
            forget_since(program.memo, before)
            guide, cost = _timed(make, _lms(program, None))
        except Exception as error:
            made[name] = _stripped(error)
        else:
            made[name] = guide
            if name == "gflownet":
                training[name] = cost
    found = made[name]
    if isinstance(found, Exception):
        raise found
    return found


def _timed(work: Callable[[], Any], lms: Sequence[LM]) -> tuple[Any, Cost]:
    """A result and what it took, with no scores remembered from before."""
    for lm in lms:
        lm.memo.clear()
    before = [lm.tally.copy() for lm in lms]
    started = time.monotonic()
    found = work()
    seconds = time.monotonic() - started
    tokens = [lm.tally - b for lm, b in zip(lms, before, strict=True)]
    return found, Cost(seconds, sum(tokens, Tally()))


def _lms(program: Program, guide: Guide | str | None) -> list[LM]:
    """The LMs of a program's sites, and of a guide that has one."""
    found = lms_of([program])
    own = getattr(guide, "lm", None)
    if isinstance(own, LM):
        found.append(own)
    return list({id(lm): lm for lm in found}.values())


def _stripped(error: Exception) -> Exception:
    """An error without its traceback, whose frames would keep tensors alive."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
