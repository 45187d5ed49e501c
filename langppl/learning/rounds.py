"""`em`: fitting a model's own adapters by expectation maximisation.

A model may stand on trainable views of an LM (`LM.trainable`): a classifier of a rationale that is
latent, say. Each round has two steps. E: the guide is fitted, so that its draws follow the
posterior of the model as it is, and latents are drawn and weighted for each observation. M: the
adapters take gradient steps that raise the expectation of log p(observations, latents) over these
draws. Where a model has no latents there is nothing to draw, and what is left is maximum
likelihood: supervised fine-tuning.

References:
    A. Dempster, N. Laird, D. Rubin (1977). Maximum likelihood from incomplete data via the EM
    algorithm. JRSS B 39.
    G. Wei, M. Tanner (1990). A Monte Carlo implementation of the EM algorithm. JASA 85.
    E. Hu et al. (2024). Amortizing intractable inference in large language models, section 4.3
    (arXiv 2310.04363).
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import rich.box
import rich.console
import rich.table

from langppl.distributions import StringDistribution
from langppl.guides import GFlowNetGuide, Guide, History, RewardSchedule
from langppl.guides.function import GuideLike, as_guide
from langppl.guides.workers import Workers
from langppl.inference.methods import given_guide
from langppl.inference.settings import Method, check_options
from langppl.learning.draws import figures, posteriors, weighted
from langppl.learning.keeping import Keeper
from langppl.learning.likelihood import Factor, factors, views_of
from langppl.learning.maximiser import Maximiser
from langppl.learning.settings import Settings
from langppl.lm import TrainableLM
from langppl.lm.counts import as_betas
from langppl.lm.seeds import as_seed
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.program.arguments import pairs_of, rows_in
from langppl.program.program import lms_of, programs_of
from langppl.progress import bar
from langppl.tables import Report
from langppl.warn import warn

DEFAULT_OBSERVATIONS = 16
_RESERVED = ("accelerator", "checkpoint", "given", "progress", "weights")


@dataclass(frozen=True)
class EMResult(Report):
    """What `em` did.

    Attributes:
        history: a row for each round, and a last one for the model as it ended. `log_evidence` (a
            mean over observations, nats), its standard `error`, `elbo`, `ess`, `impossible` and
            `failed` are of the E step, so of the model before the round's M step;
            `val_log_evidence` is the same of the held-out observations. `objective`, `gain`,
            `kept` and `grad` are of the M step: the expected log joint of the trainable sites
            before it (a mean over observations, nats), by how much it rose, the share of the way
            that was kept, and the last norm of the gradient.
        guide: what proposed the latents, None where none was needed.
        trainables: the views that were fitted.
    """

    report_width = 100

    history: History = field(repr=False)
    guide: Guide | None
    trainables: tuple[TrainableLM, ...]

    def __rich__(self) -> rich.console.RenderableType:
        """The rounds as a table."""
        table = rich.table.Table(box=rich.box.SIMPLE)
        heads = ("round", "log_evidence", "error", "elbo", "ess", "impossible", "gain", "kept")
        shown = [h for h in (*heads, "val_log_evidence") if h in self.history]
        for head in shown:
            table.add_column(head.replace("_", " "), justify="right")
        for k in range(self.history.rows):
            values = [self.history[h][k] for h in shown]
            table.add_row(
                f"{values[0]:.0f}", *("–" if math.isnan(v) else f"{v:.3f}" for v in values[1:])
            )
        table.caption = "means over observations, nats; the last row is of the model as it ended"
        return table


def em(
    model: Callable[..., Any] | Program | Sequence[Any],
    data: Any = None,
    guide: GuideLike | None = None,
    *,
    rounds: int = 10,
    method: Method = "importance",
    num_samples: int = 32,
    weights: Literal["importance", "guide"] = "importance",
    resample: int | None = None,
    fit: bool | Mapping[str, Any] = True,
    trainable: Sequence[TrainableLM] | None = None,
    steps: int = 20,
    observations: int | None = None,
    learning_rate: float = 1e-3,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    clip: float = 1.0,
    validation: Any = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> EMResult:
    """Fits the trainable views that a model stands on, and its guide, in turns.

    What rises is the evidence of the data as the program defines it, log Σ_z R(z): with
    `truncate="reject"`, grammars or factors the mass that these reject counts.

    Args:
        model: a model function, a compiled `Program` (then without data), or a list of programs
            and of (model, data) pairs.
        data: the observations, each a tuple of the model's arguments or a mapping from their
            names: a sequence, another iterable, a `Dataset` of torch or Hugging Face, or a
            `DataFrame`.
        guide: what proposes the latents: `"prior"`, `"prompted"`, `"gflownet"` (made here) or a
            guide object. None for a model without latents, and for `method="exact"`.
        rounds: how many. A last E step after them measures the model as it ended, and leaves a
            guide that is fitted to it.
        method: how the E step draws, as for `langppl.infer`: `"importance"`, `"smc"`, `"mh"`
            (which estimates no evidence, so that the history has none), or `"exact"`, which lists
            all latents.
        num_samples: draws for each observation in a round.
        weights: what the M step takes the expectation over. `"importance"`: the draws, weighted;
            its gradient tends to that of the log evidence as draws are added, whatever the guide.
            `"guide"`: the guide's possible draws, all alike; its gradient is that of the ELBO,
            which is the same where the guide is the posterior and a lower bound elsewhere. It does
            not suffer from a few draws with all the weight (see `ess` in the history).
        resample: keep so many draws of each observation for the M step, chosen by their weights
            (systematically), which makes it cheaper and noisier; None to keep all.
        fit: how a `GFlowNetGuide` is trained in each E step: a mapping of options for its `fit`,
            such as `{"steps": 100}`; True for its defaults; False to take it as it is. It is
            trained before each round and after the last. Its weights and its history go on from
            round to round; each training has an optimiser, replay buffers and a warm-up of its
            own. A reward `schedule` given here holds for each training; without one the first
            alone is tempered.
        trainable: the views to fit; all that the model stands on if None.
        steps: gradient steps in each M step.
        observations: how many observations such a step takes; 16, or all if there are fewer, if
            None. Each is taken as often as the others.
        learning_rate: AdamW's. Its state goes on from round to round.
        betas: AdamW's.
        weight_decay: AdamW's, towards the LM itself.
        clip: largest norm of the gradient.
        validation: held-out observations, given as `data` is (a list of (model, data) pairs if
            `model` is one), whose evidence is measured in each round.
        seed: of all random numbers but the guide's own.
        checkpoint: a folder to which each round is written, and a guide's training within it.
            Called again with the same arguments `em` goes on from there; on the CPU the result
            is, bit for bit, that of a run that was never killed. A guide of your own that learns
            is not kept.
        progress: as in `langppl.infer`.
        **options: of the method, by the names that `langppl.infer` has for them, such as `twist`.

    Returns:
        The history of the rounds. The views and the guide have learned in place. Interrupted
        (Ctrl-C), they keep what they have learned.

    Raises:
        ValueError: for empty data, a model that stands on no trainable view or asks for its
            probabilities outside of a site, latents without a guide, a guide without latents, or
            if in a round no observation has a possible draw.
        TypeError: for a guide that is none, or an option that the method does not have.
        FloatingPointError: if a gradient is not finite.
        OSError: if a checkpoint cannot be written, before the first round.

    Example:
        A coin of four sides that is seen through a noisy channel: the channel is fitted.

        >>> import langppl as lp
        >>> lm = lp.testing.tiny_lm("ab.")
        >>> channel = lm.trainable("channel", rank=2)
        >>> def model(seen):
        ...     z = lp.sample("z", lp.LMChoice(lm, "a", ["a", "b"]))
        ...     lp.sample("seen", lp.LMChoice(channel, f"b{z}", ["b", "."]), obs=seen)
        >>> result = lp.em(model, [("b",), ("b",), (".",)], method="exact", rounds=3)
        >>> result.history["log_evidence"][-1] > result.history["log_evidence"][0]
        True
    """
    if Workers().count > 1:
        raise ValueError("em runs in one process; train the guide alone under accelerate launch")
    pairs = pairs_of(model, data)
    programs = programs_of(pairs)
    settings = Settings(
        rounds=rounds,
        method=method,
        num_samples=num_samples,
        weights=weights,
        resample=resample,
        steps=steps,
        observations=(
            min(DEFAULT_OBSERVATIONS, len(programs)) if observations is None else observations
        ),
        learning_rate=learning_rate,
        betas=as_betas(betas),
        weight_decay=weight_decay,
        clip=clip,
    )
    check_options(method, options, em)
    seed = as_seed(seed)
    held_out = _held_out(pairs, validation)
    made = _guide(guide, programs, settings, seed)
    fitting = _fit_options(fit, made, pairs)
    if isinstance(made, GFlowNetGuide):
        _check_covers(made, programs)
    views = _views(programs, trainable)
    run = _Run(
        programs,
        held_out,
        made,
        fitting,
        Maximiser(views, settings, seed),
        settings,
        seed,
        is_given=trainable is not None,
        progress=progress,
        options=options,
    )
    keeper = Keeper(checkpoint, run.maximiser, made, lms_of(programs))
    described: dict[str, Any] = {}
    if checkpoint is not None:
        described = keeper.described(settings, seed, fitting, programs, held_out, options)
    run.go(keeper, described)
    return EMResult(run.history, made, tuple(views.values()))


class _Run:
    """The rounds."""

    def __init__(
        self,
        programs: Sequence[Program],
        held_out: Sequence[Program],
        guide: Guide | None,
        fitting: Mapping[str, Any] | None,
        maximiser: Maximiser,
        settings: Settings,
        seed: int,
        is_given: bool,
        progress: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.programs, self.held_out = programs, held_out
        self.guide, self.fitting, self.options = guide, fitting, options
        self.maximiser, self.settings, self.seed = maximiser, settings, seed
        self.is_given, self.progress = is_given, progress
        self.history = History()

    def go(self, keeper: Keeper, described: Mapping[str, Any]) -> None:
        """Does the rounds that are not done yet."""
        try:
            self._go(keeper, described)
        finally:
            keeper.close()

    def _go(self, keeper: Keeper, described: Mapping[str, Any]) -> None:
        self.history = keeper.resume(described)
        if not keeper.has_begun:
            keeper.write(0, self.history, described)  # what cannot be written is found out now
        try:
            for number in range(self.history.rows, self.settings.rounds + 1):
                self.history.add(self._round(number, keeper))
                keeper.write(number + 1, self.history, described)
        except KeyboardInterrupt:
            warn(
                f"interrupted after {self.history.rows} of {self.settings.rounds} rounds; the "
                "model and the guide keep what they have learned",
            )

    def _round(self, number: int, keeper: Keeper) -> dict[str, float]:
        self._fit_guide(number, keeper)
        found = self._draw(self.programs, number, "draw")
        row = {"round": float(number), **figures(found)}
        if self.held_out:
            row["val_log_evidence"] = figures(self._draw(self.held_out, number, "validate"))[
                "log_evidence"
            ]
        if number < self.settings.rounds:
            every = self._factors(found, number)
            title = f"round {number + 1}/{self.settings.rounds}: maximising"
            with bar(title, self.settings.steps, self.progress) as advance:
                row.update(self.maximiser.run(every, advance))
        return row

    def _fit_guide(self, number: int, keeper: Keeper) -> None:
        if self.fitting is None:
            return
        guide = self.guide
        assert isinstance(guide, GFlowNetGuide)
        covered = [(p, None) for p in self.programs if guide.sites_of(p)]
        # From the second round on the guide is near its target: nothing is to come in by and by.
        schedule = RewardSchedule(start=1.0) if number else None
        guide.fit(
            covered,
            checkpoint=keeper.of_guide(number),
            progress=self.progress,
            **{"schedule": schedule, **self.fitting},
        )
        # `fit` ends its own interruption with a warning; the rounds must end with it.
        if guide.was_interrupted:
            raise KeyboardInterrupt

    def _draw(self, programs: Sequence[Program], number: int, what: str) -> list[Posterior]:
        settings = self.settings
        place = f"round {number + 1}/{settings.rounds}"
        title = f"{place if number < settings.rounds else 'at the end'}: drawing"
        with bar(title, len(programs), self.progress) as advance:
            return posteriors(
                programs,
                self.guide,
                settings.method,
                settings.num_samples,
                (self.seed, "em", what, number),
                advance,
                self.options,
            )

    def _factors(self, found: Sequence[Posterior], number: int) -> list[list[Factor]]:
        """The weighted factors of each observation that has some."""
        settings, views = self.settings, self.maximiser.views
        every = []
        possible = 0
        for k, (program, posterior) in enumerate(zip(self.programs, found, strict=True)):
            key = (self.seed, "em", "resample", number, k)
            is_drawn = bool(program.latents)
            draws = weighted(
                posterior,
                settings.weights if is_drawn else "importance",
                settings.resample if is_drawn else None,
                key,
            )
            possible += bool(draws.rows)
            own = factors(program, draws.rows, draws.weights, views, only_known=not self.is_given)
            if own:
                every.append(own)
        if not possible:
            raise ValueError(
                f"in round {number + 1} no observation has a possible draw of its latents; see the "
                "warnings above for the sites that fail, and take another guide or more samples"
            )
        if not every:
            raise ValueError(f"in round {number + 1} no possible draw met a trainable site")
        return every


# -- what was given --------------------------------------------------------------------------------


def _held_out(pairs: Sequence[tuple[Any, Any]], validation: Any) -> list[Program]:
    return (
        [] if validation is None else programs_of(pairs_of(_with_models(pairs, validation), None))
    )


def _with_models(pairs: Sequence[tuple[Any, Any]], validation: Any) -> list[Any]:
    """Held-out data as (model, data) pairs."""
    models = [m for m, _ in pairs]
    if len(models) == 1 and not isinstance(models[0], Program):
        return [(models[0], rows_in(validation))]  # it is read more than once
    return list(validation)


def _guide(
    guide: GuideLike | None, programs: Sequence[Program], settings: Settings, seed: int
) -> Guide | None:
    """The guide, made if it was named; None where nothing is to be proposed."""
    latents = {n: p.sites[n].fn for p in programs for n in p.latents}
    guide = None if guide is None else as_guide(guide)
    if not latents:
        if guide is not None:
            raise ValueError(
                "the model has no latents, so there is nothing for a guide to propose: leave the "
                "guide out, and em fits the likelihood itself"
            )
        return None
    if settings.method == "exact":
        if guide is not None:
            raise ValueError('method="exact" lists all latents and takes no guide')
        return None
    if guide is None:
        raise ValueError(
            f"the model has the latents {', '.join(latents)}: say what proposes them, "
            'em(model, data, guide): "prior", "prompted", "gflownet" or a guide object'
        )
    if guide != "gflownet":
        return given_guide(guide)
    lm = next((fn.lm for fn in latents.values() if isinstance(fn, StringDistribution)), None)
    if lm is None:
        raise ValueError('guide="gflownet" needs a latent string; this model has none')
    return GFlowNetGuide(lm, seed=seed)


def _fit_options(
    fit: bool | Mapping[str, Any], guide: Guide | None, pairs: Sequence[tuple[Any, Any]]
) -> dict[str, Any] | None:
    """Options of the guide's training in each round; None where it is not trained."""
    if not isinstance(fit, bool | Mapping):
        raise TypeError(f"fit is True, False or a mapping of the guide's options, got {fit!r}")
    if not isinstance(guide, GFlowNetGuide):
        if isinstance(fit, Mapping):
            raise ValueError(
                "fit has options for the training of a GFlowNetGuide, and the guide is "
                + ("none" if guide is None else repr(guide.name))
            )
        return None
    if fit is False:
        return None
    default = inspect.signature(GFlowNetGuide.fit).parameters["steps"].default
    options = {"steps": default, **({} if fit is True else fit)}
    reserved = [k for k in _RESERVED if k in options]
    if reserved:
        raise ValueError(f"fit takes no {', '.join(reserved)}: em sees to that itself")
    if options.get("validation") is not None:
        options["validation"] = _with_models(pairs, options["validation"])
    return options


def _check_covers(guide: GFlowNetGuide, programs: Sequence[Program]) -> None:
    if not any(guide.sites_of(p) for p in programs):
        for program in programs:
            guide.check_lm(program)
        raise ValueError(
            f"this guide, made for {guide.lm!r}, covers none of the model's latents; take another"
        )


def _views(
    programs: Sequence[Program], trainable: Sequence[TrainableLM] | None
) -> dict[tuple[int, str], TrainableLM]:
    """The views to fit, in the order of their names."""
    met: dict[tuple[int, str], TrainableLM] = {}
    for program in programs:
        met.update(views_of(program.sites))
    if trainable is not None:
        for view in trainable:
            if not isinstance(view, TrainableLM):
                raise TypeError(f"trainable takes views made by lm.trainable(name), got {view!r}")
        chosen = list(trainable)
        if not chosen:
            raise ValueError("trainable is empty: give at least one view, or leave it out")
    else:
        chosen = list(met.values())
        if not chosen:
            raise ValueError(
                "the model stands on no trainable view, so there is nothing to fit: make one with "
                'lm.trainable("name") and give it to an LMString or an LMChoice of the model'
            )
    ordered = sorted(chosen, key=lambda v: (v.lm.name, v.label))
    return {(id(v.lm), v.adapter): v for v in ordered}
