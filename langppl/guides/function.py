"""A guide that is written as in Pyro: a function that draws a model's latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch

from langppl.distributions import LMChoice, LMString, StringDistribution
from langppl.guides.base import Guide, Key, Scorer, not_a_guide, raw_log_prob
from langppl.guides.checks import check_number, check_run, name_of
from langppl.guides.identity import of_function
from langppl.guides.support import is_covered, tell_left_out
from langppl.program import Program
from langppl.program.apart import unseen
from langppl.program.execution import (
    Choice,
    Chooser,
    Execution,
    Pause,
    Site,
    draw_prior,
    run_once,
)
from langppl.program.execution import given as given_values
from langppl.program.statements import as_value

GuideLike: TypeAlias = Literal["prior", "prompted", "gflownet"] | str | Guide | Callable[..., Any]
"""A guide by name, as an object, or as a function (see `FunctionGuide`)."""


class FunctionGuide(Guide):
    """Proposes what a function draws at sites of the same names, as a guide of Pyro's does.

    The function takes the model's arguments and calls `langppl.sample` for the latents that it
    proposes, in any distribution: a string by another prompt, by other rules or under an adapter,
    a number from another law. Latents that it does not draw come from the prior. What it draws
    besides is no latent, and each weight is right whatever it was; `log_q`, bounds, mixtures and
    Metropolis–Hastings, which must know how likely values are that it did not draw, do not take
    that. Wherever a guide is asked for, the function itself will do.

    The function's rules (stop, max_tokens, ban, a grammar) must allow all that the posterior does.
    What they leave out is missing from evidence and posterior, and no weight shows it;
    `MixtureGuide([fn, "prior"])` mends that, and `evidence_bounds(...).missed` says how much it is.

    Args:
        fn: the function.

    `method="smc"`, whose particles follow one law of tokens, does not take it.

    Raises:
        TypeError: for what is no function.

    Example:
        >>> def backwards(beginning, ending):
        ...     prompt = f"{ending} That is because:"
        ...     sample("middle", LMString(lm, prompt, stop=".", max_tokens=8))
        >>> posterior = infer(story, *pair, guide=backwards, num_samples=8)
        >>> posterior.guide
        'backwards'
    """

    is_sequential = False
    may_leave_out = True

    def __init__(self, fn: Callable[..., Any]) -> None:
        if not callable(fn) or isinstance(fn, type | Guide | Program):
            raise TypeError(f"a guide is written as a function, got {fn!r}")
        self.fn = fn
        self.name = name_of(fn)
        self._told: set[str] = set()

    def __repr__(self) -> str:
        """The function's name."""
        return f"FunctionGuide({self.name})"

    def identity(self) -> str:
        """See `Guide.identity`; the function by its name and what it is bound to."""
        return f"{super().identity()} {of_function(self.fn)}"

    def chooser(self, program: Program, key: Key) -> Chooser:
        """See `Guide.chooser`."""
        run = _Run(self, program)
        is_alone = not is_covered()

        def draw(name: str, fn: Any, execution: Execution) -> Choice:
            return draw_prior(fn, (*key, name))

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            # Values that were not drawn here (a chain's other latents) are what it goes on from.
            known = execution.latents
            site = run.site(name, known, given_values(known, otherwise=draw))
            if site is None:
                return draw(name, fn, execution)
            self._check_site(name, fn, site)
            if is_alone:
                tell_left_out(self.name, program, name, fn, site.fn, self._told)
            if isinstance(fn, LMString) and fn.is_read_anew(site.value):
                raise ValueError(
                    f"the guide {self.name!r} drew {str(site.value)!r} for site {name!r} in a "
                    "token that goes on after it, past a stop that the model's site has not; it "
                    "may draw the same string in other tokens too, which the model does not tell "
                    "apart, so its probability is not known; give the guide's site the model's "
                    "stops"
                )
            return Choice(site.value, site.log_q)

        return choose

    def given(self, program: Program, values: Mapping[str, Any]) -> Chooser:
        """See `Guide.given`."""
        take = given_values(values)
        log_q = self._scorer(program, lambda execution: values)

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            value = take(name, fn, execution).value
            return Choice(value, log_q(name, fn, value, execution))

        return choose

    def scorer(self, program: Program, key: Key) -> Scorer:
        """See `Guide.scorer`."""
        return self._scorer(program, lambda execution: execution.latents)

    def _scorer(self, program: Program, known: Callable[[Execution], Mapping[str, Any]]) -> Scorer:
        run = _Run(self, program)
        of_prior: set[str] = set()

        def log_q(name: str, fn: Any, value: Any, execution: Execution) -> float:
            values = {**known(execution), name: value}
            site = run.site(name, values, _scored(values))
            assert run.execution is not None
            late = name if site is None and run.would_meet(name, values) else None
            # What it draws may depend on what it has drawn.
            late = late or next((n for n in run.execution.sites if n in of_prior), None)
            if late is not None:
                before = run.stopped_at or name
                raise ValueError(
                    f"the guide {self.name!r} draws {before!r} before {late!r}, and what it drew "
                    "there is not known where it is asked how likely it is to propose this "
                    f"{late!r}; let it draw the model's latents alone, in the model's order"
                )
            if site is None:
                of_prior.add(name)
                return raw_log_prob(fn, value)
            self._check_site(name, fn, site)
            assert site.log_q is not None
            return site.log_q

        return log_q

    def _check_site(self, name: str, fn: Any, site: Site) -> None:
        """Raises ValueError if a value of the guide's site is none of the model's, or is unsure."""
        is_string = isinstance(fn, StringDistribution)
        if is_string != site.is_string:
            kinds = ["a number", "a string"]
            raise ValueError(
                f"the guide {self.name!r} draws {kinds[site.is_string]} at site {name!r}, and the "
                f"model {kinds[is_string]}"
            )
        if not is_string:
            check_number(self.name, name, fn, site.fn)
            return
        if isinstance(site.fn, LMChoice):
            return
        if isinstance(fn, LMChoice):
            raise ValueError(
                f"the guide {self.name!r} draws site {name!r} from an LMString, which spells an "
                "option in several ways, and the model from an LMChoice; use an LMChoice there too"
            )
        if site.fn.lm.fingerprint != fn.lm.fingerprint:
            raise ValueError(
                f"the guide {self.name!r} draws site {name!r} from {site.fn.lm!r}, and the "
                f"model from {fn.lm!r}; a string's probability is that of its tokens, so both "
                "LMs must have the same tokenizer"
            )


class _Run:
    """The function's run for one execution of the model."""

    def __init__(self, guide: FunctionGuide, program: Program) -> None:
        self.guide, self.program = guide, program
        self.execution: Execution | None = None

    @property
    def stopped_at(self) -> str | None:
        """The latent before which the run stopped, if it did."""
        assert self.execution is not None
        return None if self.execution.pause is None else self.execution.pause.name

    def site(self, name: str, known: Mapping[str, Any], choose: Chooser) -> Site | None:
        """What the function does at a latent, None if it does not meet it.

        Args:
            name: the latent.
            known: values of latents, which the run must have.
            choose: decides what the function draws.
        """
        if self.execution is None or not self._has(known):
            self.execution = self._of(choose)
            check_run(self.guide.name, self.program, self.execution, self.guide._told)
        found = self.execution.sites.get(name)
        return None if found is None or found.kind != "latent" else found

    def would_meet(self, name: str, known: Mapping[str, Any]) -> bool:
        """Whether a run that stopped would have met a latent, had it gone on."""
        if self.stopped_at is None:
            return False

        def draw(unknown: str, fn: Any, execution: Execution) -> Choice:
            return draw_prior(fn, ("trial", unknown))

        return name in self._of(given_values(known, otherwise=draw)).sites

    def _of(self, choose: Chooser) -> Execution:
        with unseen(), torch.no_grad():
            return run_once(self.guide.fn, self.program.shown_args, choose)

    def _has(self, known: Mapping[str, Any]) -> bool:
        assert self.execution is not None
        sites = self.execution.sites
        if self.execution.pause is not None and self.execution.pause.name in known:
            return False
        return all(_same(sites[n].value, v) for n, v in known.items() if n in sites)


def as_guide(guide: Any) -> str | Guide:
    """A guide as it is given: an object or a name as it is, a function as a guide.

    Raises:
        TypeError: for what is none.
    """
    if isinstance(guide, str | Guide):
        return guide
    if callable(guide) and not isinstance(guide, type | Program):
        return FunctionGuide(guide)
    raise not_a_guide(guide)


def _scored(values: Mapping[str, Any]) -> Chooser:
    """Takes known values, with the log q of each, and stops where one is not known."""
    take = given_values(values)

    def choose(name: str, fn: Any, execution: Execution) -> Choice:
        if name not in values:
            raise Pause(name, fn)
        value = take(name, fn, execution).value
        return Choice(value, raw_log_prob(fn, value))

    return choose


def _same(mine: Any, other: Any) -> bool:
    if isinstance(mine, str):
        ids = getattr(mine, "ids", None)
        return bool(mine == other and ids == getattr(other, "ids", None))
    return bool((as_value(mine) == as_value(other)).all())
