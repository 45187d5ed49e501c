"""What a program's sites are, and what flows into what.

First the model runs once with a marked placeholder for every latent string and every tool call.
If nothing looks inside them, every prompt is a template, and runs with made-up values must meet
exactly the sites that the filled templates say: then the program is *static*. Otherwise the graph
is found by experiment: one site's value is changed while all the others are held, and the sites
that come out different depend on it; then once more, from runs in which another site's value had
led elsewhere, as what one latent leads to may be in a branch that another opens. No step scores
anything; the LM is asked only where made-up values will not do, as with tool calls, which must not
be run on made-up arguments.

An experiment finds a dependence only if one of its values shows it. The values are taken from the
program itself (its string constants, and what it compares its latents with) and from a small
general list.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from typing import Any, NamedTuple, TypeVar

import torch
from pyro.poutine.runtime import _PYRO_STACK

from langppl.distributions import LMChoice, StringDistribution, Text
from langppl.distributions.sites import pattern
from langppl.program.calls import Memo
from langppl.program.execution import (
    Choice,
    Chooser,
    Execution,
    Site,
    draw_prior,
    given,
    run_many,
    run_once,
)
from langppl.program.forms import Forms
from langppl.program.graph import ProgramGraph
from langppl.program.hidden import forget_hidden, told_of_hidden
from langppl.program.keys import hashable
from langppl.program.literals import literals
from langppl.program.placeholders import Placeholder, marker, sites_in, strings_in
from langppl.program.places import place
from langppl.program.randomness import Watched, check_randomness
from langppl.program.statements import Boxed, Known, Model
from langppl.program.templates import fill_all, signature, signatures

T = TypeVar("T")

_VALUES = (
    " yes", " no", "yes", "no", "0", " 1", "7", " 12", "-3.5", "True", "a", "b", "ab.", " the",
    " The quick brown fox.", " Yes, she did!", "\n", "{}", "[1, 2]", "x = 1", "",
)  # fmt: skip
_LONG = "".join(f" {number}," for number in range(1_000))
"""No part of it is like another, and a prompt that keeps some end of it is no template."""
_MOST_VALUES = 48
_DRAWS = 8
_MOST_DRAWN = 2 * _DRAWS
_NUMBERS, _MOST_LISTED = 5, 16
_MOST_TELLING, _MOST_ELSEWHERE, _VALUES_ELSEWHERE = 4, 16, 3
_MOST_TURNS, _MOST_STRINGS, _SAME_OPTION = 8, 16, 4
"""Numbers or choices, and strings, of one loop that are examined, of those that experiments alone
have met: a loop that is told by such a value whether to go on has no last turn."""
_MOST_MADE_UP, _MOST_CHANGED = 1_000, 64
"""Latents of one loop, beyond those of the run before, after which a run is given up: made-up
values may never be what ends it."""
_MOST_SITES = 100_000
"""Latents of a run that looks at no string: what these are will not end it."""
_MOST_PLACED = 16
"""As `_MOST_TURNS`, of one place in the model whose sites have names without a pattern: they may be
a list of names, and no loop. If none led to another, `_MOST_CHANGED`."""
_RULE = (
    "a model must be a function of its sites: with the same values it must meet the same sites in "
    "the same order. Randomness belongs into lp.sample, and state that changes between runs out of "
    "the model"
)
_CACHES = "A cache of sites (functools.cache, a dict) must be made anew within the model"
_BUDGET = 1_000
"""Runs that look for what a latent leads to in a branch that another one opens."""
_LISTED = (torch.distributions.Bernoulli, torch.distributions.Categorical)
_MOST_REPEATED = 8
_MOST_ARGUMENTS = 4


@dataclass
class Structure:
    """What is known of a program before any inference.

    Attributes:
        graph: sites and dependencies.
        sites: each site as some run met it.
        templates: its sites with markers in their prompts, if the placeholder run went through.
        is_static: whether the templates are the program.
    """

    graph: ProgramGraph
    sites: dict[str, Site]
    templates: tuple[Site, ...] | None
    is_static: bool


class _ToolNeeded(BaseException):
    """A run with made-up values met a tool call; no error, as it says nothing of the program."""


class _EndlessError(BaseException):
    """A run goes on and on; no error, as it says nothing of the program."""


def discover(
    model: Model, args: Sequence[Any], memo: Memo, seed: int, forms: Forms | None = None
) -> Structure:
    """Finds a program's sites and dependencies.

    Args:
        model: the model.
        args: its arguments.
        memo: results of tool calls.
        seed: of the numeric latents' values and of draws, where those are needed.
        forms: of rows whose templates hold. Those of another row like them are compared with a few
            runs only; a row of another form is added if they hold.

    Raises:
        ValueError: if the model has no sites, or its sites change between equal runs.
    """
    forget_hidden()
    search = _Search(model, args, memo, seed)
    traced = search.trace()
    if traced is not None:
        search.check_met(traced)
        numeric = [s for s in traced.sites.values() if s.kind == "latent" and not s.is_string]
        known = [s for s in traced.sites.values() if s.kind == "deterministic"]
        if not search.looked_inside and not numeric and not known:
            _check_has_sites(traced)
            sites = tuple(traced.sites.values())
            is_known = forms is not None and forms.has(args, sites)
            if search.templates_hold(traced, is_known):
                search.check_randomness([traced])
                if forms is not None and not is_known:
                    forms.add(args, sites)
                return Structure(_graph(traced), traced.sites, sites, True)
    if not search.is_broken:
        search.check_memory()
    graph = search.experiment()
    if traced is not None and not search.looked_inside:
        for name, parents in _edges(traced):
            graph.add_edges_from((p, name) for p in parents if p in graph and name in graph)
    templates = None if traced is None else tuple(traced.sites.values())
    return Structure(graph, search.nodes, templates, False)


def retrace(
    model: Model,
    args: Sequence[Any],
    memo: Memo,
    seed: int,
    observe: Callable[[str, Any, Any], Any],
) -> Structure | None:
    """The structure of a program of templates under other observations.

    What is observed may decide which sites there are, and what flows into their prompts.

    Returns:
        None if a run with placeholders does not go through.
    """
    search = _Search(model, args, memo, seed, observe)
    traced = search.trace()
    if traced is None or search.looked_inside:
        return None
    return Structure(_graph(traced), traced.sites, tuple(traced.sites.values()), True)


def take_over(
    model: Model,
    args: Sequence[Any],
    memo: Memo,
    seed: int,
    graph: ProgramGraph,
    sites: Mapping[str, Site],
) -> Structure | None:
    """The structure of a program that was found by experiment, for other arguments of the model.

    One run with the values that are known shows the sites as they are under these arguments; the
    LM is asked nothing and no tool is called.

    Args:
        model: the model.
        args: its arguments.
        memo: results of tool calls.
        seed: of the numeric latents' values.
        graph: the other program's.
        sites: the other program's.

    Returns:
        None if that run does not go through, meets a site that is not in the graph or is of another
        kind there, or misses one that is observed, or if a latent stands in a prompt that it does
        not flow into there: then the structure must be searched for.
    """
    search = _Search(model, args, memo, seed)
    traced = search.trace()
    held = {n: s.value for n, s in sites.items() if s.kind in ("latent", "deterministic")}
    try:
        run = search._run(given(held), lambda name, fn: held[name])
    except Exception:
        return None
    observed = {n for n, s in sites.items() if s.kind == "observed"}
    if not observed <= run.sites.keys() <= sites.keys():
        return None
    # What is missing in one row of data and observed in another has other edges.
    if any(graph.nodes[n]["kind"] != site.kind for n, site in run.sites.items()):
        return None
    if traced is not None:
        for name, parents in _edges(traced):
            known = [p for p in parents if p in graph and name in graph]
            if not all(graph.has_edge(p, name) for p in known):
                return None
    templates = None if traced is None else tuple(traced.sites.values())
    return Structure(graph, {**sites, **run.sites}, templates, False)


def _check_has_sites(execution: Execution) -> None:
    if not execution.sites:
        raise ValueError(
            "the model returned without meeting a site: it has no lp.sample, so there is nothing "
            "to infer"
        )


def _family(site: Site) -> str:
    if isinstance(site.fn, Known):
        return site.fn.family
    return "factor" if site.kind == "factor" else type(site.fn).__name__


def _edges(traced: Execution) -> Iterator[tuple[str, set[str]]]:
    for name, site in traced.sites.items():
        found = sites_in(signature(site))
        yield name, {p for p in found if p != name}


def _graph(traced: Execution) -> ProgramGraph:
    graph = ProgramGraph()
    for name, site in traced.sites.items():
        graph.add_node(name, kind=site.kind, family=_family(site))
    for name, parents in _edges(traced):
        graph.add_edges_from((p, name) for p in traced.sites if p in parents)
    return graph


class _Change(NamedTuple):
    """What came of another value of a site.

    Attributes:
        value: the value.
        after: the run with it.
        moved: the other sites that came out different.
    """

    value: Any
    after: Execution
    moved: frozenset[str]


class _Search:
    """Runs a model in all the ways that show its structure.

    Attributes:
        watched: the model, and what it draws from generators of its own accord.
        looked_inside: whether it looked into a placeholder, or did not go through with them.
        is_broken: whether the placeholder run raised what no other values would mend.
        literals: what it compared placeholders with.
        drawn: whether experiments begin with draws, as made-up values will not do.
        nodes: each site as the first run of the experiments that has it met it.
    """

    def __init__(
        self,
        model: Model,
        args: Sequence[Any],
        memo: Memo,
        seed: int,
        observe: Callable[[str, Any, Any], Any] | None = None,
    ) -> None:
        self.model, self.args, self.memo, self.seed = model, args, memo, seed
        self.watched = Watched(model)
        self.observe = observe
        self.looked_inside = False
        self.is_broken = False
        self.literals: list[str] = []
        self.drawn = False
        self.nodes: dict[str, Site] = {}
        self._seen: list[Execution] = []
        self._telling: dict[str, list[_Change]] = {}
        self._values: dict[str, list[Any]] = {}
        self._left = 0
        self._filler = _VALUES[0]
        self._base_value = _VALUES[0]
        self._tried: set[tuple[int, str]] = set()
        self._beyond: set[str] = set()
        self._led_to: dict[str, str] = {}
        # Whether choices take another option after some turns at a place, of whatever name.
        self._by_place = False
        self._gave_up = False
        self._places: dict[str, int] = {}
        self._numbered: dict[Hashable, int] = {}
        self._traced: list[str] = []

    def _noting(self, decide: Callable[..., T]) -> Callable[..., T]:
        """A chooser, or what answers tool calls, that notes where in the model it was asked."""

        def noted(name: str, *rest: Any) -> T:
            if name not in self._places:
                # A place is long, and to hash code takes a while each time.
                self._places[name] = self._numbered.setdefault(place(), len(self._numbered))
            return decide(name, *rest)

        return noted

    def _run(self, choose: Any, know: Any = None, forgive: bool = False) -> Execution:
        def task() -> Execution:
            return run_once(
                self.watched,
                self.args,
                self._noting(choose),
                know=None if know is None else self._noting(know),
                observe=self.observe,
                forgive=forgive,
            )

        return run_many([task], self.memo)[0]

    def _numeric(self, name: str, fn: Any, round_: int = 0) -> Choice:
        return draw_prior(fn, (self.seed, "structure", round_, name))

    # -- the placeholder run -----------------------------------------------------------------

    def trace(self) -> Execution | None:
        """A run with placeholders; None if the program does not go through with them."""
        has_met = False
        turns = _Turns(self._places)
        self._traced, self._gave_up = [], False

        def report(method: str, args: tuple[Any, ...]) -> None:
            self.looked_inside = True
            self.literals += [a for a in args if isinstance(a, str) and "\ue000" not in a]

        def note(name: str) -> None:
            self._traced.append(name)
            # In a loop such names would hold one another, and grow with each turn to twice as much.
            if sites_in(name):
                self.looked_inside = True
                raise _EndlessError
            if len(self._traced) > _MOST_SITES and not self.looked_inside:
                raise _EndlessError

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            nonlocal has_met
            has_met = True
            note(name)
            if turns.add(name) > _MOST_MADE_UP and self.looked_inside:
                raise _EndlessError
            if isinstance(fn, StringDistribution):
                return Choice(Placeholder.make(marker(name), report))
            return self._numeric(name, fn)

        def know(name: str, fn: Known) -> Any:
            nonlocal has_met
            has_met = True
            note(name)
            return Boxed(Placeholder.make(marker(name), report))

        try:
            return self._run(choose, know)
        except _EndlessError:
            self._gave_up = True
            if not self.looked_inside:
                raise ValueError(
                    f"the model met {_MOST_SITES} latents in one run, {self._traced[-1]!r} the "
                    "last, and went on; end the loop after a number of turns, or by what a latent "
                    "is"
                ) from None
            return None
        except Exception as error:
            # What is raised before there is any value, and a name that is missing where none was
            # looked into, other values do not mend.
            own = isinstance(error, NameError) or not has_met
            self.is_broken = own and not self.looked_inside
            # Whatever else a program does with a marker in place of text, real values will tell.
            self.looked_inside = True
            self._gave_up = isinstance(error, RecursionError)
            return None

    def check_met(self, traced: Execution) -> None:
        """Raises ValueError if a site holds the placeholder of one that its run did not meet.

        It is of a run before, which an error ended or which another `compile` made, and was kept
        in a cache that lived on.
        """
        # Within a model they may be that model's own placeholders.
        if self.looked_inside or _PYRO_STACK:
            return
        if all(parents <= traced.sites.keys() for _, parents in _edges(traced)):
            return
        # What changes a text without a look inside (`re.sub`) may have changed one of this run.
        try:
            run = self._made_up_run(_VALUES[0])
        except (Exception, _ToolNeeded, _EndlessError):
            return  # it tells nothing; the experiments say why no value goes through
        for name, parents in _edges(run):
            for other in sorted(parents):
                raise ValueError(
                    f"site {name!r} holds what site {other!r} was in an earlier run, and the model "
                    f"did not meet {other!r} in this one; {_RULE}. {_CACHES}"
                )

    def check_memory(self) -> None:
        """Raises ValueError if what the placeholder run met is not met a second time.

        A cache that outlives a run holds its placeholders, and no later run would show the latent.
        """
        if self._gave_up:
            return  # where a recursion ends that has no last turn is no matter of the model's
        before = self._traced
        # Under what the first run began with, or long loops would be given up in this one alone.
        looked, self.looked_inside = self.looked_inside, False
        self.trace()
        self.looked_inside |= looked
        again = set(self._traced)
        moved = [n for n in before if n not in again]
        if moved and not self._gave_up and not self.watched.drew:
            raise ValueError(
                f"run again, the model did not meet site {moved[0]!r}; {_RULE}. {_CACHES}"
            )

    def templates_hold(self, traced: Execution, is_known: bool = False) -> bool:
        """Whether runs with made-up values meet what the filled templates say.

        Args:
            traced: the placeholder run.
            is_known: whether this was seen of another row like this one, so that a few will do.
        """
        latents = [s for s in traced.sites.values() if s.kind == "latent"]
        known = self._pool()
        # What a row of data compares a latent with is often in its arguments; and what looks for
        # anything inside of one finds it where everything stands together.
        texts = list(dict.fromkeys(t for t in strings_in(self.args) if t))[:_MOST_ARGUMENTS]
        own = [_LONG, " ".join(known), *texts]
        if is_known:
            # Another one for each row, so that many rows try them all.
            pool = [*own, known[zlib.crc32("\n".join(texts).encode()) % len(known)]]
        else:
            pool = [*known, *own]
        counts = [len(s.fn.options) for s in latents if isinstance(s.fn, LMChoice)]
        for at in range(max(len(pool), min(max(counts, default=0), _MOST_VALUES))):
            values = {}
            for k, site in enumerate(latents):
                options = site.fn.options if isinstance(site.fn, LMChoice) else pool
                values[site.name] = Text(str(options[(at + 5 * k) % len(options)]))
            try:
                execution = self._run(given(values))
            except Exception:
                return False
            expected = signatures(fill_all(tuple(traced.sites.values()), values))
            if list(signatures(execution).items()) != list(expected.items()):
                return False
        return True

    # -- experiments -------------------------------------------------------------------------

    def _pool(self) -> list[str]:
        constants = [c for c in literals(self.model) if len(c) <= 40]
        around = [f" {c} x" for c in dict.fromkeys(self.literals)]
        found = dict.fromkeys([*self.literals, *around, *_VALUES, *constants])
        return list(found)[:_MOST_VALUES]

    def experiment(self) -> ProgramGraph:
        """The graph from changing sites' values; see the module."""
        self.drawn = False
        try:
            return self._explore()
        except _ToolNeeded:  # made-up values led past a tool until one of them was changed
            self.drawn = True
            return self._explore()
        finally:
            # The sites' placeholders, which a program keeps, lead here.
            self._seen, self._telling = [], {}

    def _explore(self) -> ProgramGraph:
        runs = self._base_runs()
        base = runs[0]
        _check_has_sites(base)
        self._check_repeats(base)
        graph = ProgramGraph()
        nodes = self.nodes = dict[str, Site]()
        for execution in runs:
            for name, site in execution.sites.items():
                nodes.setdefault(name, site)
        edges: set[tuple[str, str]] = set()
        of_runs = set(nodes)
        turns = _Turns(self._places)
        # In order, which a set has not from process to process.
        examined: dict[str, None] = {}
        # Changing a value may bring sites that no run has met; those are examined in their turn.
        while waiting := [n for n in nodes if n not in examined and _can_change(nodes[n])]:
            for name in waiting:
                if name not in of_runs:
                    has_few = _has_few_values(nodes[name])
                    turns.add(name)
                    most = _MOST_TURNS if has_few else _MOST_STRINGS
                    placed = _MOST_PLACED if self._is_of_a_loop(name) else _MOST_CHANGED
                    if turns.alike(name) > most or turns.there(name) > placed:
                        del nodes[name]  # one that goes on for as long as it is told to
                        self._beyond.add(name)
                        continue
                examined[name] = None
                start = next(r for r in [*runs, *self._seen] if name in r.sites)
                changes = self._changes(start, name, self._alternatives(nodes[name], runs))
                telling = _telling(changes, _has_few_values(nodes[name]))
                self._telling[name] = telling
                first = [*telling[:_MOST_TELLING], *changes][: _MOST_TELLING + _VALUES_ELSEWHERE]
                self._values[name] = [c.value for c in first]
                edges |= {(name, other) for change in changes for other in change.moved}
            if all(name in examined for name in nodes if _can_change(nodes[name])):
                for name in examined:
                    known = {b for a, b in edges if a == name}
                    edges |= {(name, other) for other in self._elsewhere(name, known)}
        order = [n for n in _merged_order([*runs, *self._seen]) if n in nodes]
        for name in order:
            graph.add_node(name, kind=nodes[name].kind, family=_family(nodes[name]))
        position = {name: k for k, name in enumerate(order)}
        self.check_randomness([base, *self._seen])
        graph.add_edges_from(
            sorted(
                ((a, b) for a, b in edges if b in nodes and position[a] < position[b]),
                key=lambda e: (position[e[0]], position[e[1]]),
            )
        )
        return graph

    def _is_of_a_loop(self, name: str) -> bool:
        """Whether of the sites whose changes led to a site, one by one, two share a place."""
        met: set[int | str] = set()
        at: str | None = name
        while at is not None:
            place_of = self._places.get(at, at)
            if place_of in met:
                return True
            met.add(place_of)
            at = self._led_to.get(at)
        return False

    def _elsewhere(self, name: str, known: set[str]) -> set[str]:
        """The sites that a site's value moves where another has another value, as in a branch.

        Args:
            name: the site.
            known: sites that it is known to move.
        """
        moved: set[str] = set()
        # What has few values is what programs branch on.
        order = sorted(self._telling, key=lambda n: not _has_few_values(self.nodes[n]))
        others = (c for other in order if other != name for c in self._telling[other])
        left = min(_MOST_ELSEWHERE, self._left // len(self._values[name] or [0]))
        for change in others:
            start = change.after
            if not left:
                break
            if name not in start.sites:
                continue
            if (id(start), name) in self._tried:
                continue
            # What depends on both depends on the other too.
            later = [*start.sites][[*start.sites].index(name) + 1 :]
            if change.moved.intersection(later) <= known | moved:
                continue
            self._tried.add((id(start), name))
            left -= 1
            self._left -= len(self._values[name])
            changes = self._changes(start, name, self._values[name])
            moved.update(*(c.moved for c in changes))
        return moved

    def _changes(self, start: Execution, name: str, values: Sequence[Any]) -> list[_Change]:
        """What comes of other values of one site; notes sites that are new."""
        changes = []
        before = signatures(start)
        for value, after in zip(values, self._changed(start, name, values), strict=True):
            if after is None:
                continue
            self._seen.append(after)
            now = signatures(after)
            moved = set()
            # In the order of a run: that of a set differs from process to process.
            for other in dict.fromkeys([*before, *now]):
                if other == name or other in self._beyond:
                    continue
                if other not in self.nodes:
                    self.nodes[other] = (after if other in now else start).sites[other]
                    self._led_to[other] = name
                if before.get(other) != now.get(other):
                    moved.add(other)
            changes.append(_Change(value, after, frozenset(moved)))
        return changes

    def _base_runs(self) -> list[Execution]:
        self._seen, self._telling, self._values = [], {}, {}
        self._left, self._tried, self._beyond, self._led_to = _BUDGET, set(), set(), {}
        self._filler = self._base_value = _VALUES[0]

        if self.is_broken and not self.drawn:
            # An error of a draw is the model's own, and is not swallowed.
            self._run(self._drawn(0), forgive=True)
        for value in () if self.drawn else self._pool():
            try:
                found = self._made_up_run(value)
            except _ToolNeeded:
                break
            except (Exception, _EndlessError):
                continue
            self._base_value = value
            return [found]
        self.drawn = True
        choosers = [self._noting(self._drawn(k)) for k in range(_DRAWS)]
        drawn = run_many(
            [partial(run_once, self.watched, self.args, c, forgive=True) for c in choosers],
            self.memo,
        )
        # Those that went through to their end tell more.
        return sorted(drawn, key=lambda execution: execution.error is not None)

    def _made_up_run(self, value: str) -> Execution:
        """A run with one made-up value for all strings."""

        def run(most: int) -> Execution:
            choose = _ending(self._made_up(value), _Turns(self._places), most)
            return self._run(choose, _no_tools)

        if not self._by_place:
            try:
                return run(_MOST_CHANGED)
            except (RecursionError, _EndlessError):
                self._by_place = True  # the first option may be what a loop goes on with
        return run(_MOST_MADE_UP)

    def _made_up(self, value: str) -> Any:
        """The chooser of one run."""

        def report(method: str, args: tuple[Any, ...]) -> None:
            # Another latent's placeholder is no literal, and reports being compared itself.
            plain = [a for a in args if isinstance(a, str) and not isinstance(a, Placeholder)]
            self.literals += plain

        turns, counted = _Turns(self._places), 0

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            nonlocal counted
            if isinstance(fn, LMChoice):
                # Of one run, whose sites only become more: to count all each time is slow.
                for met in islice(execution.sites, counted, None):
                    turns.add(met)
                counted = len(execution.sites)
                turn = turns.of(name) if self._by_place else turns.alike(name)
                option = fn.options[turn // _SAME_OPTION % len(fn.options)]
                return Choice(Placeholder.make(str(option), report))
            if isinstance(fn, StringDistribution):
                return Choice(Placeholder.make(value, report))
            return self._numeric(name, fn)

        return choose

    def _drawn(self, k: int) -> Any:
        return lambda name, fn, _: draw_prior(fn, (self.seed, "structure", k, name))

    def _alternatives(self, site: Site, runs: Sequence[Execution]) -> list[Any]:
        found = [r.sites[site.name] for r in [*runs, *self._seen] if site.name in r.sites]
        met = [s.value for s in found]
        if isinstance(site.fn, Known) and site.fn.family == "deterministic":
            # Experiments hold its value, and it shows what it would have been.
            met += [s.fn.inputs[0] for s in found if isinstance(s.fn, Known)]
        # Every experiment is a run that the later ones could repeat; a loop has many of them.
        different = {hashable(v.value if isinstance(v, Boxed) else v): v for v in met}
        drawn = list(different.values())[:_MOST_DRAWN]
        if isinstance(site.fn, Known):
            return drawn
        if not site.is_string:
            return self._numbers(site)
        if isinstance(site.fn, LMChoice):
            return [Text(str(o)) for o in site.fn.options]
        if self.drawn:
            more = run_many(
                [
                    partial(draw_prior, site.fn, (self.seed, "structure", 100 + k, site.name))
                    for k in range(_DRAWS)
                ],
                self.memo,
            )
            return [*drawn, *(choice.value for choice in more)]
        return [Text(v) for v in self._pool()]

    def _numbers(self, site: Site) -> list[Any]:
        """All values of a number that has few, as draws may leave out a rare one; else draws.

        Of a count the smallest too, with which a loop ends at once; and of many numbers at one site
        each by itself, as one that is likely may be the same in all draws.
        """
        fn = site.fn
        plain = fn
        while isinstance(plain, torch.distributions.Independent):
            plain = plain.base_dist
        values = _least(plain, site.value)
        is_one = not values or not (fn.batch_shape or fn.event_shape)
        if not is_one:
            values = _one_by_one(site.value, values)
        values = [v for v in values if float(fn.log_prob(v).sum()) > -math.inf]
        if is_one and values and isinstance(fn, _LISTED):
            return values
        drawn = [self._numeric(site.name, fn, k).value for k in range(1, 1 + _NUMBERS)]
        return [*values, *drawn]

    def _changed(
        self, start: Execution, name: str, values: Sequence[Any]
    ) -> list[Execution | None]:
        """Runs with one site changed and the others held; None for one that does not go through."""
        kinds = ("latent", "deterministic")
        before = {n: s.value for n, s in start.sites.items() if s.kind in kinds}
        met = _Turns(self._places, (n for n, s in start.sites.items() if s.kind == "latent"))

        def task(value: Any) -> Execution | None:
            held = {**before, name: value}

            def know(site: str, fn: Known) -> Any:
                if site in held:
                    return held[site]
                if not self.drawn and fn.family != "deterministic":
                    raise _ToolNeeded
                return fn()

            while True:
                filler = self._filler
                default = self._drawn(0) if self.drawn else self._made_up(filler)
                choose = given(held, default)
                if not self.drawn:
                    choose = _ending(choose, met, _MOST_CHANGED)
                try:
                    return run_once(
                        self.watched,
                        self.args,
                        self._noting(choose),
                        know=self._noting(know),
                        observe=self.observe,
                    )
                except Exception:
                    return None
                except _EndlessError:
                    if not self._by_place:
                        self._by_place = True
                        continue
                    if filler == self._base_value:
                        return None
                    self._filler = self._base_value  # with which the run before came to its end

        # At once, as what comes after a changed value may have to be drawn from the LM.
        return run_many([partial(task, value) for value in values], self.memo)

    def check_randomness(self, runs: Sequence[Execution]) -> None:
        """Raises ValueError if the sites depend on random numbers from outside of them."""
        # One for each set of sites that runs have met: what draws may stand in a branch.
        different = list({tuple(r.sites): r for r in reversed(runs)}.values())[-_MOST_REPEATED:]

        def check() -> None:
            for run in different:
                self._check_repeats(run)

        check_randomness(self.watched, check)

    def _check_repeats(self, base: Execution) -> None:
        values = {
            n: s.value for n, s in base.sites.items() if s.kind in ("latent", "deterministic")
        }
        again = self._run(
            given(values, self._drawn(0)),
            lambda n, fn: values[n] if n in values else fn(),
            forgive=base.error is not None,
        )
        try:
            check_same_sites(base, again)
        except ValueError as error:
            if not self.watched.drew:
                raise
            names = " and ".join(self.watched.drew)
            more = f" (it draws from the generator of {names}){told_of_hidden()}"
            raise ValueError(f"{error}{more}") from error


class _Turns:
    """How many sites there are of each loop, or of what calls itself.

    Args:
        places: where sites were met.
        names: sites that count already.
    """

    def __init__(self, places: Mapping[str, int], names: Iterable[str] = ()) -> None:
        self.places = places
        self._alike: Counter[str] = Counter()
        self._there: Counter[int | str] = Counter()
        for name in names:
            self.add(name)

    def add(self, name: str) -> int:
        """Counts a site; which turn of its loop it is, from 1 on."""
        self._alike[pattern(name)] += 1
        self._there[self.places.get(name, name)] += 1
        return self.of(name)

    def of(self, name: str) -> int:
        """How many turns of a site's loop were counted."""
        return max(self.alike(name), self.there(name))

    def alike(self, name: str) -> int:
        """How many sites were counted whose names differ by numbers alone."""
        return self._alike[pattern(name)]

    def there(self, name: str) -> int:
        """How many sites were counted that were met at the same place in the model."""
        return self._there[self.places.get(name, name)]


def _no_tools(name: str, fn: Known) -> Any:
    if fn.family == "deterministic":
        return fn()  # it is no tool: its value is there already
    raise _ToolNeeded


def _ending(choose: Chooser, met: _Turns, most: int) -> Chooser:
    """Gives a run up in which latents of one loop are so many more than those met before."""
    turns = _Turns(met.places)

    def choose_next(name: str, fn: Any, execution: Execution) -> Choice:
        if turns.add(name) > most + met.of(name):
            raise _EndlessError
        return choose(name, fn, execution)

    return choose_next


def _telling(changes: Sequence[_Change], has_few: bool) -> list[_Change]:
    """Those worth a second look: of few values all that moved anything, else one of a kind."""
    moving = [c for c in changes if c.moved]
    if has_few:
        return moving
    return list({c.moved: c for c in reversed(moving)}.values())[-_MOST_TELLING:][::-1]


def _least(fn: Any, value: torch.Tensor) -> list[torch.Tensor]:
    """The values of one number that has few, or the smallest of a count; of others none."""
    if isinstance(fn, _LISTED):
        found: Any = fn  # torch does not say what it lists
        each = found.enumerate_support(expand=False).flatten()
        return list(each) if len(each) <= _MOST_LISTED else []
    try:
        is_count = fn.support is torch.distributions.constraints.nonnegative_integer
    except (NotImplementedError, AttributeError):  # one that does not say
        return []
    return list(torch.arange(_NUMBERS).to(value)) if is_count else []


def _one_by_one(value: torch.Tensor, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Many numbers at one site with one of them changed."""
    found = []
    for other in values:
        for at in range(min(value.numel(), _MOST_LISTED)):
            changed = value.flatten().clone()
            if changed[at] != other:
                changed[at] = other
                found.append(changed.reshape(value.shape))
    return found[:_MOST_LISTED]


def _has_few_values(site: Site) -> bool:
    return isinstance(site.fn, LMChoice) or not site.is_string


def _can_change(site: Site) -> bool:
    return site.kind == "latent" or isinstance(site.fn, Known)


def _merged_order(executions: Iterable[Execution]) -> list[str]:
    order: list[str] = []
    for execution in executions:
        at = 0
        for name in execution.sites:
            if name in order:
                at = order.index(name) + 1
            else:
                order.insert(at, name)
                at += 1
    return order


def check_same_sites(first: Execution, second: Execution) -> None:
    """Raises ValueError, naming the site that moved, unless two equal runs met equal sites."""
    before, after = signatures(first), signatures(second)
    for one, two in zip_longest(before, after):
        if one is None or two is None:
            moved = two if one is None else one
            raise ValueError(f"run again, the model met site {moved!r} in one run only; {_RULE}")
        if one != two:
            raise ValueError(f"run again, the model met site {two!r} where {one!r} was; {_RULE}")
        if before[one] != after[two]:
            raise ValueError(
                f"run again, site {one!r} had another distribution or observed value; {_RULE}"
            )
