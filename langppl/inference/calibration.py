"""`calibrate`: simulation-based calibration of an inference method.

Latents and data are drawn from the program, so the latents are one exact posterior sample given
the data. If a method's draws follow the posterior as well, the rank of any summary of the true
latents among L draws is uniform on 0, …, L, whatever the summary; ranks that are not show that the
method is wrong, and how. That they are uniform is necessary, not sufficient: it is as good a test
as the summaries and the number of simulations make it.

References:
    S. Talts, M. Betancourt, D. Simpson, A. Vehtari, A. Gelman (2018). Validating Bayesian inference
    algorithms with simulation-based calibration. arXiv 1804.06788.
    M. Modrák, A. Moon, S. Kim, P. Bürkner, N. Huurre, K. Faltejsková, A. Gelman, A. Vehtari (2023).
    Simulation-based calibration checking for Bayesian computation: the choice of test quantities
    shapes sensitivity. arXiv 2211.02383 (why the likelihood is among the summaries).
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text
import torch

from langppl import diagnostics
from langppl.defaults import CHAINS, NUM_SAMPLES
from langppl.diagnostics import InferenceWarning
from langppl.guides.function import GuideLike
from langppl.inference.importance import BATCH
from langppl.inference.methods import given_guide, infer
from langppl.inference.settings import METHODS, Method, check_options, names_of, split_options
from langppl.inference.simulated import (
    check_same_observed,
    check_same_observed_by,
    draw_together,
    score_truths,
    simulate_pairs,
)
from langppl.inference.sites import log_weight
from langppl.lm.counts import as_count
from langppl.lm.seeds import as_seed, generator
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.program.execution import Execution
from langppl.program.keys import hashable
from langppl.program.program import as_program
from langppl.program.scheduler import run_whole
from langppl.progress import bar
from langppl.tables import Report, pandas_for
from langppl.warn import warn

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Calibration", "SummaryTest", "calibrate"]

LIKELIHOOD = "log p(observations | latents)"
"""The name of the summary that sees whether the data were used at all."""

_MOST_BINS = 20
_LEAST_EXPECTED = 5.0
_LEAST_BINS = 4
_TIE_NATS = 1e-4
"""Log-probabilities that are equal come out of batches of other shapes a little different."""

_MEND = (
    "raise num_samples, use a better guide, or take fewer draws, before the ranks mean anything."
)

Values = Mapping[str, float]


@dataclass(frozen=True)
class SummaryTest:
    """Whether the ranks of one summary are uniform.

    Attributes:
        name: the summary's.
        counts: simulations whose rank falls into each bin.
        expected: how many would on average, in each bin.
        statistic: χ² = Σ (count − expected)² / expected.
        p_value: of so large a χ², or a larger one, if the ranks are uniform.
        adjusted: the p value times the number of summaries (Bonferroni), at most 1.
        words: what the ranks look like.
    """

    name: str
    counts: tuple[int, ...]
    expected: tuple[float, ...]
    statistic: float
    p_value: float
    adjusted: float
    words: str


@dataclass(frozen=True)
class Calibration(Report):
    """Ranks of simulated latents among posterior draws, and what they say.

    Attributes:
        guide: name of the guide.
        method: the inference method.
        simulations: how many latents and data were simulated.
        draws: posterior draws for each, L.
        num_samples: what the draws were chosen from.
        ranks: summary → the rank of the true value in each simulation, 0 to L.
        median_ess: median effective sample size over the simulations in which it is known; None
            where there are none.
        unknown_ess: simulations in which the method has an effective sample size, but it is not
            known: of chains that are too short, or whose samples never vary.
    """

    report_width = 120

    guide: str
    method: str
    simulations: int
    draws: int
    num_samples: int
    ranks: Mapping[str, tuple[int, ...]] = field(repr=False)
    median_ess: float | None
    unknown_ess: int = 0

    @functools.cached_property
    def tests(self) -> tuple[SummaryTest, ...]:
        """The test of each summary."""
        return tuple(_test(n, r, self.draws, len(self.ranks)) for n, r in self.ranks.items())

    @property
    def is_telling(self) -> bool:
        """Whether a wrong method could well be seen.

        That takes 5 simulations for each of 4 bins of ranks (or of all ranks, if these are fewer):
        with fewer, hardly any ranks contradict a method.
        """
        return self.simulations >= _LEAST_EXPECTED * min(_LEAST_BINS, self.draws + 1)

    def passes(self, level: float = 0.01) -> bool:
        """Whether no summary's ranks contradict the method.

        Where they do not, and there are too few simulations to tell (`is_telling`), a warning says
        so.

        Args:
            level: probability with which a right method fails, over all summaries together.

        Raises:
            ValueError: unless it is between 0 and 1.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be between 0 and 1, got {level!r}")
        passed = self._passes(level)
        if passed and not self.is_telling:
            warn(f"the ranks pass, but there are {self._too_few}", InferenceWarning)
        return passed

    @property
    def _too_few(self) -> str:
        least = math.ceil(_LEAST_EXPECTED * min(_LEAST_BINS, self.draws + 1))
        return (
            f"too few simulations to tell: {self.simulations}, and {least} are the least in which "
            "a wrong method could well be seen"
        )

    def _passes(self, level: float) -> bool:
        return all(t.adjusted > level for t in self.tests)

    def plot(self) -> Figure:
        """Draws the rank histograms: see `langppl.plots.plot_calibration`."""
        plots = importlib.import_module("langppl.plots")
        figure: Figure = plots.plot_calibration(self)
        return figure

    def to_pandas(self) -> pandas.DataFrame:
        """The ranks, a column for each summary and a row for each simulation.

        Raises:
            ImportError: if pandas is not installed.
        """
        pd = pandas_for("Calibration.to_pandas")
        frame: pandas.DataFrame = pd.DataFrame(dict(self.ranks))
        return frame

    def __rich__(self) -> rich.console.RenderableType:
        """A row for each summary, and below it the verdict."""
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("summary", overflow="fold")
        for head in ("χ²", "p", "p × summaries"):
            table.add_column(head, justify="right")
        table.add_column("ranks of the true value")
        for test in self.tests:
            table.add_row(
                rich.text.Text(test.name),
                f"{test.statistic:.1f}",
                f"{test.p_value:.2g}",
                f"{test.adjusted:.2g}",
                test.words,
            )
        return rich.console.Group(table, "", *(rich.text.Text(line) for line in self._words()))

    def _words(self) -> list[str]:
        lines = [
            f"method {self.method}, guide {self.guide}: {self.simulations} simulations, "
            f"{self.draws} draws each"
        ]
        if self._passes(0.01) and not self.is_telling:
            lines.append(f"There are {self._too_few}.")
        elif self._passes(0.01):
            lines.append(
                "The ranks are as uniform as those of a calibrated method (level 0.01 over all "
                "summaries)."
            )
        else:
            worst = min(self.tests, key=lambda t: t.p_value)
            lines.append(
                f"Not calibrated (level 0.01 over all summaries): {worst.name!r} is off the most; "
                f"{worst.words}."
            )
        # Where most are unknown, so is the median of all: nothing says that there are enough.
        is_unknown = 2 * self.unknown_ess >= max(self.simulations, 1)
        is_small = self.median_ess is not None and self.median_ess < 2 * self.draws
        if is_small and not is_unknown:
            lines.append(
                f"The median ESS is {self.median_ess:.1f}, and {self.draws} draws are taken from "
                f"so few effective samples: {_MEND}"
            )
        if is_unknown:
            lines.append(
                f"The ESS is unknown in {self.unknown_ess} of {self.simulations} simulations "
                "(chains shorter than 4 samples, or samples that never vary), so the "
                f"{self.draws} draws may be of too few effective samples: {_MEND}"
            )
        return lines


def calibrate(
    model: Callable[..., Any] | Program,
    *args: Any,
    guide: GuideLike = "prior",
    method: Literal["raw"] | Method = "importance",
    simulations: int = 200,
    num_samples: int = NUM_SAMPLES,
    draws: int = 15,
    summaries: Mapping[str, Callable[[dict[str, Any]], Any]] | None = None,
    seed: int = 0,
    lengths: Mapping[str, int] | None = None,
    progress: bool = True,
    **named: Any,
) -> Calibration:
    """Checks an inference method on data that are simulated from the program.

    Args:
        model: a model function, or a compiled `Program` (then without `args`).
        *args: the model's arguments. The observations among them only say what is observed, and
            how long open strings are.
        guide: `"prior"`, `"prompted"`, a function, or a guide object.
        method: how the posterior draws are made: `"importance"` (weighted samples, resampled to
            far fewer draws), `"raw"` (the guide's own draws, unweighted, a `defensive` share
            included), `"exact"`, or another method of `infer`: `"smc"`, whose particles are
            resampled to the draws, or `"mh"`, whose samples are taken without replacement. Of
            these many simulations are run at once, as batches of the LM allow.
        simulations: how many; fewer than 20 are too few to tell (see `Calibration.is_telling`).
        num_samples: samples for each, of which the draws are chosen; take several times as many
            effective ones as draws, or the method looks worse than it is. Not used by `"raw"` and
            `"exact"`.
        draws: posterior draws for each, L.
        summaries: name → function of the latents (site → value), a number. By default the number
            of tokens and the log-probability of each latent string, each number itself, and
            log p(observations | latents). A latent that an execution does not reach, and a
            log-probability of an impossible draw, count as −inf.
        seed: equal seeds give equal results.
        lengths: tokens of each observed string that is open; as long as what is observed in the
            arguments by default.
        progress: as in `infer`.
        **named: settings of the method, as `infer` takes them (for `"smc"` for instance `twist`,
            for `"mh"` `chains` and `warmup`), and the model's arguments by their names. The draws
            of a chain depend on each other: take as many chains as draws, or more.

    Returns:
        The ranks and their tests; print it for a table, `.passes()` for the verdict.

    Raises:
        ValueError: for a program that cannot be simulated, observes nothing, has no latents or
            does not observe the same sites whatever its latents are; for an unknown method; if a
            summary is NaN; for an option out of range; or if no sample of a simulation has weight.
        TypeError: for options that the method does not have, arguments that do not fit the model,
            or a seed that is no integer.

    Example:
        >>> found = calibrate(story, *pair, method="raw", guide=guide, simulations=20, draws=3)
        >>> sorted(found.ranks)
        ['log p(observations | latents)', 'middle: log p', 'middle: tokens']
    """
    simulations = as_count("simulations", simulations, 2)
    num_samples = as_count("num_samples", num_samples, 1)
    draws = as_count("draws", draws, 1)
    methods = tuple(dict.fromkeys(("importance", "raw", *METHODS)))
    if method not in methods:
        raise ValueError(f"unknown method {method!r}; methods are: {', '.join(methods)}")
    options, arguments = split_options(named)
    check_options(method, options, calibrate)
    seed = as_seed(seed)
    program = as_program(model, args, seed, arguments, names_of(calibrate, method))
    if not program.latents:
        raise ValueError("the program has no latents, so there is nothing to calibrate")
    proposing = given_guide(guide)
    proposing.check(program)
    pairs = simulate_pairs(program, simulations, (seed, "calibrate"), lengths)
    truths = score_truths(pairs)
    programs = [p for _, p in pairs]
    of = _Summaries(program, summaries)
    ranks: dict[str, list[int]] = {}
    sizes: list[float] = []
    with bar(f"calibrating {method}", simulations, progress) as advance:
        found: Iterator[tuple[list[_Draw], float | None]]
        if method in ("importance", "raw"):
            count = num_samples if method == "importance" else draws
            made = draw_together(programs, proposing, count, (seed, "calibrate"), lambda _: None)
            found = _of_executions(truths, made, method, draws, seed)
        else:
            made_by = functools.partial(
                infer,
                guide="prior" if method == "exact" else proposing,
                method=method,
                num_samples=num_samples,
                progress=False,
                **options,
            )
            # Rows of the LM that one simulation takes at a time.
            rows = {"smc": num_samples, "mh": options.get("chains", CHAINS)}.get(method, BATCH)
            found = _of_posteriors(programs, truths, made_by, rows, draws, seed)
        for k, (truth, (drawn, ess)) in enumerate(zip(truths, found, strict=True)):
            for name, rank in _ranks(of, _of_execution(truth), drawn, (seed, "ties", k)).items():
                ranks.setdefault(name, []).append(rank)
            sizes += [] if ess is None else [ess]
            advance(1)
    known = [size for size in sizes if not math.isnan(size)]
    return Calibration(
        guide="enumeration" if method == "exact" else proposing.name,
        method=method,
        simulations=simulations,
        draws=draws,
        num_samples=draws if method == "raw" else num_samples,
        ranks={name: tuple(own) for name, own in ranks.items()},
        median_ess=float(np.median(known)) if known else None,
        unknown_ess=len(sizes) - len(known),
    )


@dataclass(frozen=True)
class _Draw:
    """Latents and the log-probabilities (nats) of the sites they were scored at."""

    latents: dict[str, Any]
    log_probs: dict[str, float]


def _of_execution(execution: Execution) -> _Draw:
    # Where one site is impossible the others need not have been scored.
    impossible = any(s.log_prob == -math.inf for s in execution.sites.values())
    log_probs = {
        s.name: -math.inf if impossible else s.log_prob
        for s in execution.sites.values()
        if impossible or s.log_prob is not None
    }
    return _Draw(execution.latents, log_probs)  # type: ignore[arg-type]


def _of_executions(
    truths: Sequence[Execution],
    made: Iterator[list[Execution]],
    method: str,
    draws: int,
    seed: int,
) -> Iterator[tuple[list[_Draw], float | None]]:
    for k, (truth, executions) in enumerate(zip(truths, made, strict=True)):
        check_same_observed(truth, executions)
        if method == "raw":
            yield [_of_execution(e) for e in executions], None
            continue
        log_weights = [log_weight(e) for e in executions]
        if max(log_weights) == -math.inf:
            raise ValueError(_no_weight(k, len(executions)))
        weights = diagnostics.normalized_weights(log_weights)
        chosen = _choose(weights, draws, seed, k)
        yield (
            [_of_execution(executions[i]) for i in chosen],
            diagnostics.effective_sample_size(log_weights),
        )


def _of_posteriors(
    programs: Sequence[Program],
    truths: Sequence[Execution],
    made_by: Callable[..., Posterior],
    rows: int,
    draws: int,
    seed: int,
) -> Iterator[tuple[list[_Draw], float | None]]:
    together = max(1, BATCH // rows)
    for first in range(0, len(programs), together):
        numbers = range(first, min(first + together, len(programs)))
        seeds = [int(generator((seed, "calibrate", "infer", k)).integers(2**31)) for k in numbers]
        found = run_whole(
            [
                functools.partial(made_by, programs[k], seed=own)
                for k, own in zip(numbers, seeds, strict=True)
            ]
        )
        for k, posterior in zip(numbers, found, strict=True):
            if not np.isfinite(posterior.log_weights).any():
                raise ValueError(_no_weight(k, len(posterior)))
            check_same_observed_by(truths[k], posterior)
            is_chain = posterior.chains is not None
            chosen = _choose(posterior.weights, draws, seed, k, replace=not is_chain)
            yield _of_samples(programs[k], posterior, chosen), posterior.ess


def _of_samples(program: Program, posterior: Posterior, chosen: Sequence[int]) -> list[_Draw]:
    if not posterior.site_log_probs:
        rows = [posterior.samples[i] for i in chosen]
        return [_of_execution(e) for e in program.executions(rows)]
    columns = posterior.site_log_probs
    return [
        _Draw(
            dict(posterior.samples[i]),
            {n: float(column[i]) for n, column in columns.items() if not math.isnan(column[i])},
        )
        for i in chosen
    ]


def _choose(
    weights: diagnostics.Array, draws: int, seed: int, k: int, replace: bool = True
) -> list[int]:
    rng = generator((seed, "calibrate", "resample", k))
    if not replace and draws <= len(weights):  # of equal weights
        return [int(i) for i in rng.choice(len(weights), size=draws, replace=False)]
    return [int(i) for i in rng.choice(len(weights), size=draws, p=weights)]


def _no_weight(k: int, n: int) -> str:
    return (
        f"in simulation {k}, none of the {n} samples explains the observations, so there is no "
        "posterior to draw from; raise num_samples or use a better guide"
    )


class _Summaries:
    """The numbers whose ranks are looked at."""

    def __init__(
        self, program: Program, given: Mapping[str, Callable[[dict[str, Any]], Any]] | None
    ) -> None:
        if given is not None and not given:
            raise ValueError("summaries are empty: give at least one, or None for the default ones")
        self.program = program
        self.given = given

    def __call__(self, draw: _Draw) -> Values:
        if self.given is not None:
            return {name: _number(name, fn(dict(draw.latents))) for name, fn in self.given.items()}
        found: dict[str, float] = {}
        for name in self.program.latents:
            site, value = self.program.sites[name], draw.latents.get(name)
            if site.is_string:
                found[f"{name}: tokens"] = _tokens(site.fn, value)
                found[f"{name}: log p"] = _rounded(draw.log_probs.get(name, -math.inf))
            else:
                found |= _numbers(name, site.value, value)
        rest = [v for n, v in draw.log_probs.items() if n not in draw.latents]
        found[LIKELIHOOD] = _rounded(-math.inf if -math.inf in rest else math.fsum(rest))
        return found


def _tokens(fn: Any, value: Any) -> float:
    if value is None:
        return -math.inf
    ids = getattr(value, "ids", None)
    return float(len(fn.lm.encode_text(value) if ids is None else ids))


def _numbers(name: str, shaped: Any, value: Any) -> dict[str, float]:
    """A number, or each of several."""
    size = torch.as_tensor(shaped).numel()
    if value is None:
        flat = [-math.inf] * size
    else:
        flat = [float(v) for v in torch.as_tensor(value).flatten()]
    if size == 1:
        return {name: _number(name, flat[0])}
    return {f"{name}[{i}]": _number(name, v) for i, v in enumerate(flat)}


def _rounded(log_prob: float) -> float:
    return log_prob if math.isinf(log_prob) else round(log_prob / _TIE_NATS) * _TIE_NATS


def _number(name: str, value: Any) -> float:
    try:
        number = float("" if isinstance(value, str) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"summary {name!r} must be one number, but is {value!r}") from None
    if math.isnan(number):
        raise ValueError(f"summary {name!r} is NaN")
    return number


def _ranks(
    of: _Summaries, truth: _Draw, draws: Sequence[_Draw], key: tuple[int | str, ...]
) -> dict[str, int]:
    """The rank of the true value of each summary, ties broken at random."""
    # Equal latents have equal summaries, whatever the rounding of the batches they came from.
    known: dict[object, Values] = {}
    for draw in (truth, *draws):
        known.setdefault(_identity(draw), of(draw))
    own = known[_identity(truth)]
    others = [known[_identity(d)] for d in draws]
    found = {}
    for name, value in own.items():
        below = sum(o[name] < value for o in others)
        equal = sum(o[name] == value for o in others)
        found[name] = below + int(generator((*key, name)).integers(equal + 1))
    return found


def _identity(draw: _Draw) -> object:
    return tuple(
        (name, getattr(value, "ids", None) or hashable(value))
        for name, value in draw.latents.items()
    )


def _test(name: str, ranks: Sequence[int], draws: int, summaries: int) -> SummaryTest:
    from scipy.stats import chisquare

    simulations = len(ranks)
    bins = int(min(draws + 1, _MOST_BINS, max(2, simulations // _LEAST_EXPECTED)))
    each = np.array_split(np.arange(draws + 1), bins)
    counted = np.bincount(ranks, minlength=draws + 1)
    counts = np.array([counted[own].sum() for own in each])
    expected = np.array([simulations * len(own) / (draws + 1) for own in each])
    statistic, p_value = chisquare(counts, expected)
    return SummaryTest(
        name=name,
        counts=tuple(int(c) for c in counts),
        expected=tuple(float(e) for e in expected),
        statistic=float(statistic),
        p_value=float(p_value),
        adjusted=min(1.0, float(p_value) * summaries),
        words=_shape(ranks, draws),
    )


def _shape(ranks: Sequence[int], draws: int) -> str:
    """What the ranks look like, by their mean and spread on (0, 1)."""
    places = (np.asarray(ranks) + 0.5) / (draws + 1)
    variance = (1.0 - 1.0 / (draws + 1) ** 2) / 12.0
    fourth = _fourth_moment(draws)
    shift = (places.mean() - 0.5) / math.sqrt(variance / len(places))
    squares = (places - 0.5) ** 2
    error = math.sqrt(max(fourth - variance**2, 0.0) / len(places))
    spread = (squares.mean() - variance) / error if error > 0.0 else 0.0
    if max(abs(shift), abs(spread)) < 3.0:
        return "no lean, no bulge"
    if abs(shift) >= abs(spread):
        return (
            "lean high: the draws are too low" if shift > 0 else "lean low: the draws are too high"
        )
    if spread > 0:
        return "at both ends: the draws are too narrow"
    return "in the middle: the draws are too wide"


def _fourth_moment(draws: int) -> float:
    places = (np.arange(draws + 1) + 0.5) / (draws + 1)
    return float(((places - 0.5) ** 4).mean())
