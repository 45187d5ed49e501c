"""`compile` and `Program`: a model and its arguments as a mathematical object."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from langppl.distributions import LMString, StringDistribution
from langppl.distributions.sites import naming
from langppl.keywords import did_you_mean
from langppl.lm.model import LM
from langppl.lm.seeds import as_seed
from langppl.lm.texts import plain_text
from langppl.program.arguments import arguments_by_place
from langppl.program.calls import Memo, memo_of_calls
from langppl.program.discovery import discover, retrace, take_over
from langppl.program.execution import (
    Chooser,
    Execution,
    Site,
    draw_prior,
    given,
    is_plain,
    run_many,
    run_once,
    score_all,
)
from langppl.program.forms import Forms
from langppl.program.graph import ProgramGraph
from langppl.program.keys import hashable
from langppl.program.lengths import (
    MOST_ATTEMPTS,
    EndedEarly,
    RejectedDraw,
    as_lengths,
    check_lengths,
    draw_open,
    too_short,
)
from langppl.program.scheduler import run
from langppl.program.statements import (
    Known,
    Model,
    as_value,
    check_observation,
    named_in,
)
from langppl.program.templates import fill_all, signatures
from langppl.warn import warn

After = Callable[[Execution], Execution]

_FIRST_CHECKED = 8
"""Rows of a static program that are run before only one of each batch is."""


class StaticMismatchWarning(UserWarning):
    """A program that looked static turned out not to be, and is run from now on."""


class Program:
    """A model with its arguments: its sites, its graph and its log joint.

    Made by `langppl.compile`.

    Attributes:
        model: the model function.
        args: its arguments.
        graph: the sites and what flows into what (see `ProgramGraph`).
        sites: each site as a first run met it.
        memo: results of tool calls, one for each name and arguments.
        shown_args: the arguments as a guide's context shows them: where `observing` put an
            observation in the place of one that was an argument, it stands here too.
    """

    model: Model

    def __init__(
        self, model: Model, args: Sequence[Any], seed: int = 0, like: Program | None = None
    ) -> None:
        _check_model(model)
        if like is not None and like.model is not model:
            raise ValueError(
                f"like must be a program of the same model, got {like!r}; compile it without like"
            )
        self.model = model
        self.args = tuple(args)
        self.memo: Memo = {}
        structure = None
        self._forms: Forms | None = None
        if like is not None and like.is_static:
            self._forms = like._known_forms()
        elif like is not None:
            structure = take_over(model, self.args, self.memo, seed, like.graph, like.sites)
        if structure is None:
            structure = discover(model, self.args, self.memo, seed, self._forms)
        self.graph: ProgramGraph = structure.graph
        self.sites: dict[str, Site] = structure.sites
        self.templates: tuple[Site, ...] | None = structure.templates
        self._is_static = structure.is_static
        self._checks = 0
        self._observations: dict[str, Any] = {}
        self._seed = seed
        self.shown_args = self.args
        self._check_names()

    def _known_forms(self) -> Forms:
        if self._forms is None:
            self._forms = Forms(self.model)
            # Under other observations the templates were not compared with many runs.
            if self.templates is not None and not self._observations:
                self._forms.add(self.args, self.templates)
        return self._forms

    def _check_names(self) -> None:
        for named in named_in(self.model):
            self._warn_unmet(named.by, sorted(named.names - named.met), tuple(self.sites))

    def _warn_unmet(self, by: str, missing: Sequence[str], known: Sequence[str]) -> None:
        if missing:
            hint = did_you_mean(missing[0], known)
            warn(
                f"{by} names the site {', '.join(map(repr, missing))}, and no run of the model has "
                f"met it; its sites are {', '.join(map(repr, known))}{hint}"
            )

    def _of_kind(self, kind: str) -> tuple[str, ...]:
        return tuple(n for n, d in self.graph.nodes(data=True) if d["kind"] == kind)

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the latent sites, in program order."""
        return self._of_kind("latent")

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the observed sites, in program order."""
        return self._of_kind("observed")

    @property
    def is_static(self) -> bool:
        """Whether the program is fixed templates of its latents, so scoring need not run it."""
        return self._is_static

    def __repr__(self) -> str:
        """The model's name and its sites."""
        name = getattr(self.model, "__name__", "model")
        kind = "static" if self.is_static else "dynamic"
        return f"Program({name}, latents={self.latents}, observed={self.observed}, {kind})"

    # -- running ------------------------------------------------------------------------------

    def run(
        self,
        choosers: Sequence[Chooser],
        after: Callable[[Execution], Execution] = lambda execution: execution,
    ) -> list[Execution]:
        """Runs the model once for each chooser, all at once.

        Args:
            choosers: decide the latents of one execution each.
            after: what to do at the end of each execution, such as scoring it.
        """
        return run_together([(self, c) for c in choosers], after)

    def run_once(
        self,
        choose: Chooser,
        know: Callable[[str, Known], Any] | None = None,
        forgive: bool = True,
    ) -> Execution:
        """One run; to be called within a scheduler's task. See `langppl.program.execution`."""
        memo_of_calls.set(self.memo)
        observe = self._observe if self._observations else None
        return run_once(self.model, self.args, choose, know=know, observe=observe, forgive=forgive)

    def observing(self, values: Mapping[str, Any]) -> Program:
        """The same program with other observations.

        The structure of a program of templates is that under the new observations; any other's is
        not searched again.

        Args:
            values: observed site → value; a warning names sites that no run has met yet.

        Raises:
            ValueError: if a site is known and not observed, or the program is static and has none
                of that name.
            TypeError: if a string site is given what is no string, or another one a string.
        """
        for name in values:
            if name not in self.sites and self.is_static:
                raise ValueError(
                    f"there is no site {name!r}; observed are: "
                    f"{', '.join(map(repr, self.observed)) or 'none'}"
                )
            if name in self.sites and self.sites[name].kind != "observed":
                raise ValueError(f"site {name!r} is {self.sites[name].kind}, not observed")
        self._warn_unmet("observing", [n for n in values if n not in self.sites], self.observed)
        return self._observing(values)

    def _observing(self, values: Mapping[str, Any]) -> Program:
        known = {name: site.fn for name, site in self.sites.items() if not site.is_string}
        new = {k: as_value(v, known.get(k)) for k, v in values.items()}
        for name in new.keys() & self.sites.keys():
            check_observation(name, self.sites[name].fn, new[name])

        def renewed(site: Site) -> Site:
            return replace(site, value=new[site.name]) if site.name in new else site

        other = copy.copy(self)
        other._observations = {**self._observations, **new}
        other.sites = {n: renewed(s) for n, s in self.sites.items()}
        if self.templates is not None:
            # An observation may go on into later prompts, so renewing the values is not enough.
            found = retrace(self.model, self.args, self.memo, self._seed, other._observe)
            other.templates = None if found is None else found.templates
            other._is_static = self._is_static and found is not None
            if self._is_static and found is not None:
                other.graph, other.sites = found.graph, found.sites
        other.shown_args = tuple(_renewed(a, new, self.sites) for a in self.shown_args)
        return other

    def _observe(self, name: str, fn: Any, value: Any) -> Any:
        return self._observations.get(name, value)

    def executions(
        self,
        assignments: Sequence[Mapping[str, Any]],
        only: Callable[[Site], bool] = lambda _: True,
        otherwise: Chooser | None = None,
    ) -> list[Execution]:
        """Executions with given latents, scored.

        A static program is filled in; some rows of the first batches, and one of each later one,
        are also run, and if the two differ the program is run from then on.

        Args:
            assignments: latent → value, one mapping for each execution.
            only: the sites to score; of an execution that was paused, none are.
            otherwise: decides latents that have no value and are met in a run; None to make them
                an error.

        Raises:
            ValueError: if a latent has no value, or a log-probability is NaN.
        """
        if not assignments:
            return []
        if self._is_static and self._row_agrees(assignments, otherwise):
            assert self.templates is not None
            filled = [fill_all(self.templates, values) for values in assignments]
            score_all(filled, only)
            return filled
        return self._ran(assignments, only, otherwise)

    def _ran(
        self,
        assignments: Sequence[Mapping[str, Any]],
        only: Callable[[Site], bool] = lambda _: True,
        otherwise: Chooser | None = None,
    ) -> list[Execution]:
        found = self.run([given(v, otherwise) for v in assignments])
        score_all([e for e in found if e.pause is None], only)
        return found

    def _row_agrees(
        self, assignments: Sequence[Mapping[str, Any]], otherwise: Chooser | None
    ) -> bool:
        assert self.templates is not None
        for values in assignments:
            missing = [name for name in self.latents if name not in values]
            if missing:
                raise ValueError(f"latent site {missing[0]!r} has no value")
        if self._checks < _FIRST_CHECKED:
            rows = self._different(assignments, _FIRST_CHECKED - self._checks)
        else:
            rows = [assignments[self._checks % len(assignments)]]
        self._checks += len(rows)
        return all(self.agrees(ran) for ran in self.run([given(r, otherwise) for r in rows]))

    def _different(
        self, assignments: Sequence[Mapping[str, Any]], most: int
    ) -> list[Mapping[str, Any]]:
        """Some rows that differ in their latents, from all over a batch."""
        rows = {tuple(hashable(r[n]) for n in self.latents): r for r in reversed(assignments)}
        different = list(rows.values())[::-1]
        count = min(most, len(different))
        return [different[k * len(different) // count] for k in range(count)]

    def agrees(self, execution: Execution) -> bool:
        """Whether an execution of a static program is what its templates say.

        Where one is not, the program is dynamic from then on, and a warning says so.
        """
        if not self._is_static:
            return False
        assert self.templates is not None
        row, found = execution.latents, signatures(execution)
        known = all(name in row for name in self.latents)
        expected = signatures(fill_all(self.templates, row)) if known else {}
        if list(expected.items()) == list(found.items()):
            return True
        self._is_static = False
        moved = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
        warn(
            "the program's sites are not fixed templates of its latents after all: with "
            f"{ {k: str(v) for k, v in row.items()} } a run differs at "
            f"{', '.join(map(repr, moved)) or 'the order of its sites'}; it will be run for every "
            "sample",
            StaticMismatchWarning,
        )
        return False

    def log_joint(
        self, assignments: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        """Log joint density of latents and observations.

        Args:
            assignments: latent → value, or a list of such mappings; a warning names sites that no
                run has met.

        Returns:
            Nats, float64: a scalar for one mapping, shape [n] for n of them; −inf where the
            rules could not have produced a value.

        Raises:
            ValueError: if a latent has no value, or a value is given for what is no latent.
        """
        single = isinstance(assignments, Mapping)
        rows = [assignments] if isinstance(assignments, Mapping) else list(assignments)
        names = dict.fromkeys(n for row in rows for n in row)
        for name in names:
            self._check_latent(name)
        # All rows are run: where the templates do not hold, a check of some may miss it.
        found = self._ran(rows)
        for execution in found if self._is_static else ():
            if not execution.error and not self.agrees(execution):
                break
        # What an execution would have met after an error is not known.
        if not any(e.error for e in found):
            met = {"_RETURN", *self.sites, *(n for e in found for n in e.sites)}
            self._warn_unmet("log_joint", [n for n in names if n not in met], self.latents)
        totals = torch.tensor([e.log_joint for e in found], dtype=torch.float64)
        return totals[0] if single else totals

    def _check_latent(self, name: str) -> None:
        # Only a static program is known to have no other sites.
        if name in self.latents or (name not in self.sites and not self.is_static):
            return
        # A guide's draws and a posterior's samples have these beside the latents.
        if name == "_RETURN" or (name in self.sites and self.sites[name].kind == "deterministic"):
            return
        if name in self.observed:
            raise ValueError(
                f"site {name!r} is observed; for another value take "
                f"program.observing({{{name!r}: value}})"
            )
        raise ValueError(
            f"{name!r} is no latent site of the program; its latents are: "
            + (", ".join(self.latents) or "none")
        )

    # -- simulating ---------------------------------------------------------------------------

    def simulate(
        self, n: int, seed: int = 0, lengths: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """Draws latents and data from the model itself.

        Args:
            n: how many.
            seed: equal seeds give equal draws.
            lengths: tokens of each open string; those that are not named are as long as what is
                observed. An open string is the event "the text goes on like this", so draws in
                which the LM ends it earlier are drawn anew, as a whole.

        Returns:
            For each draw, site → value of its latent and observed sites.

        Raises:
            ValueError: for an open site without a length, a length of what is no open string, and
                for programs with `factor`, `Tempered`, `truncate="reject"` or a grammar, which
                are not data-generating processes.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        check_lengths([self], lengths)
        known = self._lengths(lengths)
        return run_many(
            [partial(self._simulate_one, i, as_seed(seed), known) for i in range(n)],
            self.memo,
        )

    def _lengths(self, lengths: Mapping[str, int] | None) -> dict[str, int]:
        known = as_lengths(lengths)
        for name, site in self.sites.items():
            if site.kind == "observed" and isinstance(site.fn, LMString) and site.fn.is_open:
                known.setdefault(name, max(len(site.fn.tokens_of(site.value)), 1))
        return known

    def _simulate_one(self, i: int, seed: int, lengths: Mapping[str, int]) -> dict[str, Any]:
        for attempt in range(MOST_ATTEMPTS):
            try:
                execution = self._attempt((seed, "simulate", i, attempt), lengths)
            except EndedEarly:
                continue
            return {
                s.name: s.value
                for s in execution.sites.values()
                if s.kind in ("latent", "observed")
            }
        raise too_short(lengths)

    def simulated(
        self, key: tuple[int | str, ...], lengths: Mapping[str, int] | None = None
    ) -> tuple[dict[str, Any], Program]:
        """One draw of the latents, and the program that observes what was drawn with them.

        Unlike `simulate`, a draw with an unfinished string that is rejected is drawn anew, as a
        whole: the latents then follow the posterior given the observations, rejection included.
        To be called within a scheduler's task.

        Args:
            key: what the random numbers depend on.
            lengths: tokens of each open string; those that are not named are as long as what is
                observed.

        Returns:
            Latent → value, and the program.

        Raises:
            ValueError: for programs with `factor` or `Tempered`, or if no attempt succeeds.
        """
        memo_of_calls.set(self.memo)
        known = self._lengths(lengths)
        reasons: set[str] = set()
        for attempt in range(MOST_ATTEMPTS):
            try:
                execution = self._attempt((*key, attempt), known, redraw=True)
            except EndedEarly as early:
                reasons.add(str(early))
                continue
            sites = execution.sites.values()
            observed = {s.name: s.value for s in sites if s.kind == "observed"}
            return execution.latents, self._observing(observed)
        often = " or ".join(sorted(reasons))
        raise ValueError(
            f"{MOST_ATTEMPTS} draws from the model came to nothing: {often}. Ask for shorter open "
            "strings (lengths=...), and give strings that are rejected more max_tokens"
        )

    def _attempt(
        self, key: tuple[int | str, ...], lengths: Mapping[str, int], redraw: bool = False
    ) -> Execution:
        def draw(name: str, fn: Any, value: Any = None) -> Any:
            if isinstance(fn, LMString):
                if fn.rules.truncate == "reject" and not redraw:
                    mend = 'use truncate="keep"' if fn.rules.grammar is None else "it has a grammar"
                    raise ValueError(
                        f"site {name!r} rejects unfinished strings, so the program cannot be "
                        f"simulated as data; {mend}"
                    )
                if fn.is_open:
                    return draw_open(name, fn, (*key, name), lengths, "simulate")
            choice = draw_prior(fn, (*key, name))
            if choice.log_prob == -torch.inf:
                raise RejectedDraw(name)
            return choice.value

        def choose(name: str, fn: Any, execution: Execution) -> Any:
            return given({name: draw(name, fn)})(name, fn, execution)

        execution = run_once(self.model, self.args, choose, observe=draw)
        for site in execution.sites.values():
            if site.kind == "factor":
                raise ValueError(
                    f"site {site.name!r} is a factor, so the program is not a process that "
                    "generates data and cannot be simulated"
                )
            if not is_plain(site.scale, site.mask):
                raise ValueError(
                    f"site {site.name!r} is scaled or masked, so the program is not a process "
                    "that generates data and cannot be simulated"
                )
        return execution

    def why_impossible(self, execution: Execution) -> dict[str, str]:
        """For each site with probability zero, the rule that its value breaks, or its support."""
        found = {}
        for site in execution.sites.values():
            if site.log_prob == -torch.inf and site.kind in ("latent", "observed"):
                with naming(site.name):
                    if isinstance(site.fn, StringDistribution):
                        reason = site.fn.why_impossible(site.value)
                    else:
                        reason = _why_outside(site.fn, site.value)
                if reason is not None:
                    found[site.name] = reason
        return found


def _why_outside(fn: Any, value: Any) -> str | None:
    """The support that a number is outside of, or None if it is inside or that is not known."""
    try:
        if bool(fn.support.check(value).all()):
            return None
        return f"it is outside of the support of {fn!r}, {fn.support}"
    except Exception:  # no support, or no such shape
        return None


def lms_of(programs: Iterable[Program]) -> list[LM]:
    """The LMs that the sites of some programs stand on."""
    fns = [s.fn for p in programs for s in p.sites.values()]
    return list({id(f.lm): f.lm for f in fns if isinstance(f, StringDistribution)}.values())


def _renewed(argument: Any, new: Mapping[str, Any], sites: Mapping[str, Site]) -> Any:
    """An argument, or what is observed now if it was the value of one site and of no other."""
    owners = [n for n, s in sites.items() if s.kind == "observed" and _is_value_of(argument, s)]
    return new.get(owners[0], argument) if len(owners) == 1 else argument


def _check_model(model: Any) -> None:
    """Raises TypeError for what does not run as a plain function does."""
    if not callable(model):
        raise TypeError(f"a model is a function, got {model!r}")
    if isinstance(model, Program):
        raise TypeError("a compiled Program is no model to compile; use it as it is")
    if isinstance(model, type):
        raise TypeError(f"a model is a function, got the class {model.__name__}; give an instance")
    for is_other, what in (
        (inspect.isgeneratorfunction, "a generator: it yields, and a model returns"),
        (inspect.iscoroutinefunction, "async; write it as a plain function"),
        (inspect.isasyncgenfunction, "an async generator; write it as a plain function"),
    ):
        if is_other(model):
            raise TypeError(f"the model {getattr(model, '__name__', model)!r} is {what}")


def _is_value_of(argument: Any, site: Site) -> bool:
    """Whether an argument is what a site observes."""
    if isinstance(argument, str) or isinstance(site.value, str):
        return isinstance(argument, str) and plain_text(argument) == plain_text(site.value)
    tensor = as_value(argument, site.fn)
    return isinstance(tensor, torch.Tensor) and torch.equal(tensor, as_value(site.value))


def run_together(
    pairs: Sequence[tuple[Program, Chooser]],
    after: After | Sequence[After] = lambda execution: execution,
) -> list[Execution]:
    """Runs programs once for each chooser, all at once, whatever programs they are.

    Args:
        pairs: a program, and what decides its latents.
        after: what to do at the end of each execution, such as scoring it; one for all, or one
            for each.
    """

    def task(program: Program, choose: Chooser, end: After) -> Execution:
        return end(program.run_once(choose))

    ends = [after] * len(pairs) if callable(after) else after
    return run(
        [partial(task, p, choose, end) for (p, choose), end in zip(pairs, ends, strict=True)]
    )


def programs_of(pairs: Iterable[tuple[Any, Iterable[tuple[Any, ...]]]]) -> list[Program]:
    """A program for each row of data, each compiled like the first of its model.

    Args:
        pairs: models, or compiled programs, and their rows.
    """
    programs: list[Program] = []
    for model, rows in pairs:
        first: Program | None = None
        for row in rows:
            own = isinstance(model, Program)
            programs.append(model if own else compile(model, *row, like=first))
            first = first or programs[-1]
    return programs


def as_program(
    model: Model | Program,
    args: tuple[Any, ...],
    seed: int = 0,
    named: Mapping[str, Any] | None = None,
    options: Collection[str] = (),
) -> Program:
    """A model and its arguments as a program; a program, which has its arguments, as it is.

    Args:
        model: the model function, or a program.
        args: its arguments by place.
        seed: as for `compile`.
        named: its arguments by name.
        options: names that the caller takes for itself, for which a name may have been meant.

    Raises:
        TypeError: for arguments that do not fit the model, or any besides a program.
        ValueError: as `compile`.
    """
    if isinstance(model, Program):
        if args or named:
            names = f", got {', '.join(named)}" if named else ""
            hint = did_you_mean(next(iter(named)), options) if named else ""
            raise TypeError(f"a compiled Program has its arguments already; give none{names}{hint}")
        return model
    if named:
        _check_model(model)
        args = arguments_by_place(model, args, named, options)
    return Program(model, args, seed)


def compile(
    model: Model, *args: Any, seed: int = 0, like: Program | None = None, **named: Any
) -> Program:
    """Finds a model's sites and dependencies.

    Args:
        model: a function that calls `langppl.sample`.
        *args: its arguments.
        seed: of the values with which the structure is found, where made-up ones will not do.
        like: a program of the same model with other arguments, as of the first row of the data. If
            it had to be found by experiment (it looks inside a latent, or calls tools, so the LM
            was asked), its dependences are taken over. They are right where the arguments change
            what the sites say and not which sites there are; where a run shows otherwise, they are
            searched for anew. What a missed dependence costs is context for a guide, never a
            weight. If it is static, the templates are those of these arguments, and are compared
            with a few runs only where the arguments lead the model the way they did there (see
            `langppl.program.forms`).
        **named: the model's arguments by their names.

    Returns:
        The program.

    Raises:
        ValueError: if the model meets no site, its sites change between equal runs, a run of it
            goes on and on, or `like` is a program of another model.
        TypeError: for arguments that do not fit the model.

    Example:
        >>> first, *others = [pair, ("The door bell rang.", " It was the mailman.")]
        >>> program = compile(story, *first)
        >>> rest = [compile(story, *o, like=program) for o in others]
    """
    if named:
        _check_model(model)
        args = arguments_by_place(model, args, named, ("seed", "like"))
    return Program(model, args, as_seed(seed), like)
