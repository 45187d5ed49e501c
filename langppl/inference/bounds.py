"""`evidence_bounds`: the evidence and a guide's divergences, bracketed from both sides.

Of latents z* and data x drawn from the program itself, z* is an exact posterior sample given x.
Importance weights w(z) = p(z, x) / q(z | x) of K draws then bound log p(x) from below in
expectation, and the same with z* in the place of one draw bounds it from above:

    E[log 1/K Σ_k w(z_k)]  ≤  log p(x)  ≤  E[log 1/K (w(z*) + Σ_{k<K} w(z_k))].

With `method="smc"` the bounds are those of SMC and of conditional SMC, in which z* is the
trajectory of one particle (see `langppl.inference.conditional`).

With them come both divergences of the guide from the posterior p(z | x):
KL(q‖p) = log p(x) − ELBO, with ELBO = E_q[log w], and KL(p‖q) = EUBO − log p(x), with
EUBO = E[log w(z*)].

References:
    R. Grosse, Z. Ghahramani, R. Adams (2015). Sandwiching the marginal likelihood using
    bidirectional Monte Carlo. arXiv 1511.02543.
    S. Zhao, R. Brekelmans, A. Makhzani, R. Grosse (2024). Probabilistic inference in language
    models via twisted sequential Monte Carlo. arXiv 2404.17546, section 5.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from langppl.diagnostics import Array
from langppl.guides import Guide
from langppl.guides.base import log_q_together
from langppl.guides.function import GuideLike
from langppl.inference.conditional import smc_evidence
from langppl.inference.importance import BATCH
from langppl.inference.methods import given_guide
from langppl.inference.settings import (
    check_options,
    names_of,
    options_in_words,
    split_options,
)
from langppl.inference.simulated import (
    Pair,
    check_same_observed,
    draw_together,
    score_truths,
    simulate_pairs,
)
from langppl.inference.sites import log_weight
from langppl.inference.smc import run_crowd
from langppl.lm.counts import as_count
from langppl.lm.seeds import as_seed, generator
from langppl.program import Program
from langppl.program.program import as_program
from langppl.program.scheduler import run_whole
from langppl.progress import bar
from langppl.tables import Report, pandas_for

if TYPE_CHECKING:
    import pandas

__all__ = ["EvidenceBounds", "ParticleMethod", "evidence_bounds"]

ParticleMethod = Callable[[Program, Guide, int, int, "Mapping[str, Any] | None"], float]
"""Estimates log p(x) with particles: (program, guide, particles, seed, held latents) → nats.

Without held latents, exp of the estimate must be unbiased for the evidence. With them, latents
that are an exact posterior sample, they are one of the particles, and the inverse of exp of the
estimate must be unbiased for the inverse of the evidence, or too small on average.
"""

Interval = tuple[float, float]

_LONGEST_STREAM = 100
"""Characters; what is longer goes by its digest."""


@dataclass(frozen=True)
class EvidenceBounds(Report):
    """Bounds of the mean log evidence of simulated data, and a guide's divergences; nats.

    All figures are means over the observations; each has a standard error over them, which is inf
    for a single observation and for a mean that is infinite.

    Attributes:
        guide: name of the guide.
        method: name of the particle method.
        num_observations: how many observations were simulated.
        num_samples: particles for each.
        lower: the lower bound, −inf if all draws for some observation are impossible.
        upper: the upper bound, inf if the guide cannot draw some exact sample.
        gap: upper − lower.
        kl_q_p: KL(q‖p) with the lower bound in the place of the log evidence, and with the upper
            one: it lies between them. inf if some draw is impossible.
        kl_p_q: KL(p‖q) with the upper bound and with the lower one; inf if the guide cannot draw
            some exact sample.
        lower_error: standard error of `lower`.
        upper_error: of `upper`.
        gap_error: of `gap`.
        kl_q_p_error: of the two ends of `kl_q_p`.
        kl_p_q_error: of the two ends of `kl_p_q`.
        impossible: share of the guide's draws that have weight zero.
        missed: share of the exact samples that the guide cannot draw.
        observations: `lower`, `upper`, `elbo`, `eubo` and `log_joint` of each observation; the
            last is log p(z*, x) of the exact sample and the data.
        streams: names of the random numbers behind `lower` and `upper`. Bounds that share one are
            not independent, whatever their `num_samples`.
    """

    report_width = 100

    guide: str
    method: str
    num_observations: int
    num_samples: int
    lower: float
    upper: float
    gap: float
    kl_q_p: Interval
    kl_p_q: Interval
    lower_error: float
    upper_error: float
    gap_error: float
    kl_q_p_error: Interval
    kl_p_q_error: Interval
    impossible: float
    missed: float
    observations: Mapping[str, tuple[float, ...]] = field(repr=False)
    streams: Sequence[str] = field(default=(), repr=False)

    def to_pandas(self) -> pandas.DataFrame:
        """The bounds of each observation, one row each.

        Returns:
            The columns of `observations`, nats.

        Raises:
            ImportError: if pandas is not installed.
        """
        pd = pandas_for("EvidenceBounds.to_pandas")
        frame: pandas.DataFrame = pd.DataFrame(dict(self.observations))
        return frame

    def __rich__(self) -> rich.console.RenderableType:
        """A table of the figures, and below it what they are of."""
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("nats, mean over observations")
        table.add_column("at least", justify="right")
        table.add_column("at most", justify="right")
        for title, (low, high), (low_error, high_error) in (
            ("log evidence", (self.lower, self.upper), (self.lower_error, self.upper_error)),
            ("KL(q‖p)", self.kl_q_p, self.kl_q_p_error),
            ("KL(p‖q)", self.kl_p_q, self.kl_p_q_error),
        ):
            table.add_row(title, _shown(low, low_error), _shown(high, high_error))
        return rich.console.Group(table, "", *(rich.text.Text(line) for line in self._words()))

    def _words(self) -> list[str]:
        lines = [
            f"guide {self.guide}, method {self.method}: {self.num_observations} simulated "
            f"observations, {self.num_samples} particles each; gap "
            f"{_shown(self.gap, self.gap_error)}"
        ]
        if self.impossible:
            lines.append(
                f"{self.impossible:.1%} of the guide's draws are impossible, so KL(q‖p) is infinite"
            )
        if self.missed:
            lines.append(
                f"the guide cannot draw {self.missed:.1%} of the exact samples, so KL(p‖q) is "
                "infinite; mix it with the prior (MixtureGuide)"
            )
        return lines


def evidence_bounds(
    model: Callable[..., Any] | Program,
    *args: Any,
    guide: GuideLike = "prior",
    method: Literal["importance", "smc"] | str | ParticleMethod = "importance",
    num_samples: int = 64,
    num_observations: int = 32,
    seed: int = 0,
    lengths: Mapping[str, int] | None = None,
    progress: bool = True,
    **named: Any,
) -> EvidenceBounds:
    """Bounds the evidence of data simulated from a program, and a guide's divergences.

    The observations are simulated, so the bounds hold for the model's own data, not for those in
    the arguments; these only say what is observed, and how long open strings are. With more
    particles the bounds meet.

    Args:
        model: a model function, or a compiled `Program` (then without `args`).
        *args: the model's arguments.
        guide: `"prior"`, `"prompted"`, a function, or a guide object, which must have `log_q`.
        method: what bounds the evidence: `"importance"`; `"smc"`, from above by conditional SMC,
            where one particle keeps to the exact sample; or a `ParticleMethod`.
        num_samples: particles for each observation.
        num_observations: how many to simulate.
        seed: equal seeds give equal results.
        lengths: tokens of each observed string that is open; as long as what is observed in the
            arguments by default.
        progress: as in `infer`.
        **named: settings of `"smc"`, as `infer` takes them (`twist`, `twist_power`, `resampling`,
            `ess_threshold` and `every`), and the model's arguments by their names.

    Returns:
        The bounds; print them for a table.

    Raises:
        ValueError: for programs with `factor` or `Tempered` or without observations, for one that
            does not observe the same sites whatever its latents are, for an unknown guide, or an
            option out of range.
        NotImplementedError: if the guide has no `log_q`.
        TypeError: for options that the method does not have, arguments that do not fit the model,
            or a seed that is no integer.

    Example:
        >>> found = evidence_bounds(story, *pair, guide=guide, num_samples=8, num_observations=4)
        >>> found.lower < found.upper
        True
    """
    num_samples = as_count("num_samples", num_samples, 1)
    num_observations = as_count("num_observations", num_observations, 1)
    if not callable(method) and method not in ("importance", "smc"):
        raise ValueError(f'method must be "importance", "smc" or a function, got {method!r}')
    options, arguments = split_options(named)
    if options and method != "smc":
        name = method if isinstance(method, str) else _name_of(method)
        raise TypeError(f"method {name!r} has no settings, got {', '.join(options)}")
    check_options("smc", options, evidence_bounds)
    seed = as_seed(seed)
    if options.get("rejuvenation"):
        raise ValueError(
            "rejuvenation moves particles away from the latents that one of them must keep to for "
            "the upper bound; leave it out"
        )
    program = as_program(model, args, seed, arguments, names_of(evidence_bounds, "smc"))
    proposing = given_guide(guide)
    proposing.check(program)
    pairs = simulate_pairs(program, num_observations, (seed, "bounds"), lengths)
    stream = _stream(proposing)
    log_joint, exact, drawn = _weights(pairs, proposing, stream, num_samples, seed, progress)
    # Runs of SMC under other options draw other numbers.
    stream += "".join(f", {own}" for own in options_in_words(options, run_crowd))
    if callable(method):
        low, high = _by_particles(method, pairs, proposing, stream, num_samples, seed)
    elif method == "smc":
        by_smc = functools.partial(smc_evidence, **options)
        # Both sides of some observations at once, in batches of the LM's size.
        together = max(1, BATCH // (2 * num_samples))
        low, high = _by_particles(by_smc, pairs, proposing, stream, num_samples, seed, together)
    else:
        low, high = _log_mean(drawn), _log_mean(np.column_stack([exact, drawn[:, 1:]]))
    name = method if isinstance(method, str) else _name_of(method)
    return replace(
        _report(proposing.name, name, log_joint, exact, drawn, low, high),
        streams=(f"{name}, {stream}",),
    )


def _stream(guide: Guide) -> str:
    """Names the random numbers of a guide: pooled, those of others are independent.

    How many particles there are is not told apart: of two runs the smaller is the beginning of the
    larger, and `pool_bounds` refuses them.
    """
    words = guide.identity()
    # It goes into the key of every draw.
    is_short = len(words) <= _LONGEST_STREAM
    return f"guide {words if is_short else hashlib.blake2b(words.encode()).hexdigest()}"


def _weights(
    pairs: Sequence[Pair],
    guide: Guide,
    stream: str,
    num_samples: int,
    seed: int,
    progress: bool,
) -> tuple[Array, Array, Array]:
    """Log p(z*, x), shape [n]; log weights of the z*, shape [n], and of draws, shape [n, K]."""
    truths = score_truths(pairs)
    log_q: list[float] = []
    for first in range(0, len(pairs), BATCH):
        chunk = pairs[first : first + BATCH]
        log_q += log_q_together(guide, [(p, latents) for latents, p in chunk]).tolist()
    log_joint = np.array([float(t.log_joint) for t in truths])
    exact = log_joint - np.array(log_q)
    rows = []
    programs = [p for _, p in pairs]
    with bar(f"sampling from {guide.name}", len(pairs) * num_samples, progress) as advance:
        draws = draw_together(programs, guide, num_samples, (seed, "bounds", stream), advance)
        for truth, executions in zip(truths, draws, strict=True):
            check_same_observed(truth, executions)
            rows.append([log_weight(e) for e in executions])
    return log_joint, exact, np.array(rows)


def _by_particles(
    method: ParticleMethod,
    pairs: Sequence[Pair],
    guide: Guide,
    stream: str,
    num_samples: int,
    seed: int,
    together: int = 1,
) -> tuple[Array, Array]:
    def task(k: int, side: str) -> float:
        latents, program = pairs[k]
        own = int(generator((seed, "bounds", stream, side, k)).integers(2**31))
        held = latents if side == "upper" else None
        value = float(method(program, guide, num_samples, own, held))
        if math.isnan(value):
            raise ValueError(f"the particle method's {side} estimate of the evidence is NaN")
        return value

    tasks = [
        functools.partial(task, k, side) for k in range(len(pairs)) for side in ("lower", "upper")
    ]
    found: list[float] = []
    for first in range(0, len(tasks), 2 * together):
        chunk = tasks[first : first + 2 * together]
        # A user's function need not bear to run beside itself.
        found += run_whole(chunk) if together > 1 else [own() for own in chunk]
    low, high = np.array(found).reshape(-1, 2).T
    return low, high


def _report(
    guide: str, method: str, log_joint: Array, exact: Array, drawn: Array, low: Array, high: Array
) -> EvidenceBounds:
    return EvidenceBounds(
        guide=guide,
        method=method,
        num_observations=len(exact),
        num_samples=drawn.shape[1],
        impossible=float((drawn == -np.inf).mean()),
        missed=float((exact == np.inf).mean()),
        **figures(low, high, drawn.mean(1), exact, log_joint),
    )


def figures(low: Array, high: Array, elbo: Array, eubo: Array, log_joint: Array) -> dict[str, Any]:
    """What `EvidenceBounds` says of the columns of its `observations`, and these; shapes [n]."""
    with np.errstate(invalid="ignore"):
        forward = [np.where(elbo == -np.inf, np.inf, b - elbo) for b in (low, high)]
        backward = [np.where(eubo == np.inf, np.inf, eubo - b) for b in (high, low)]
    lower, upper, gap = (_mean(v) for v in (low, high, high - low))
    q_p, p_q = [_mean(v) for v in forward], [_mean(v) for v in backward]
    table = {"lower": low, "upper": high, "elbo": elbo, "eubo": eubo, "log_joint": log_joint}
    return {
        "lower": lower[0],
        "upper": upper[0],
        "gap": gap[0],
        "kl_q_p": (q_p[0][0], q_p[1][0]),
        "kl_p_q": (p_q[0][0], p_q[1][0]),
        "lower_error": lower[1],
        "upper_error": upper[1],
        "gap_error": gap[1],
        "kl_q_p_error": (q_p[0][1], q_p[1][1]),
        "kl_p_q_error": (p_q[0][1], p_q[1][1]),
        "observations": {name: tuple(map(float, values)) for name, values in table.items()},
    }


def _log_mean(log_weights: Array) -> Array:
    """Log of the mean weight of each row, nats."""
    found: Array = np.logaddexp.reduce(log_weights, axis=1) - math.log(log_weights.shape[1])
    return found


def _mean(values: Array) -> Interval:
    """A mean and its standard error."""
    mean = float(values.mean())
    if not math.isfinite(mean) or len(values) < 2:
        return mean, math.inf
    return mean, float(values.std(ddof=1) / math.sqrt(len(values)))


def _shown(value: float, error: float) -> str:
    if not math.isfinite(value):
        return f"{value}"
    return f"{value:.3f} ± {error:.3f}"


def _name_of(method: Any) -> str:
    return str(getattr(method, "__name__", type(method).__name__))
