"""One run of a model under langppl's handlers, and its log joint site by site."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from greenlet import GreenletExit
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger

from langppl.distributions import StringDistribution, Tempered
from langppl.distributions.base import Key, Pending
from langppl.distributions.sites import current, naming, where
from langppl.distributions.tempered import TemperedFactor
from langppl.lm.requests import Reply, Request, perform
from langppl.lm.seeds import generator, seeded
from langppl.program.calls import Memo, memo_of_calls
from langppl.program.contents import is_users_own, parameters
from langppl.program.densities import drawing, is_outside, log_density
from langppl.program.pyros import (
    check_intervention,
    check_latent,
    check_subsample,
    warn_of_subsample,
)
from langppl.program.scheduler import run
from langppl.program.statements import (
    BadNumber,
    Constant,
    Known,
    Model,
    as_value,
    check_observation,
    check_string_site,
    factor_of_tempered,
    plate_error,
    unboxed,
)
from langppl.warn import warn

_NOTED = 5

Kind = Literal["latent", "observed", "factor", "deterministic"]
T = TypeVar("T")


@dataclass
class Site:
    """What happened at one site of one execution.

    Attributes:
        name: the site's name.
        kind: `"latent"`, `"observed"`, `"factor"` or `"deterministic"` (tool calls too).
        fn: the distribution.
        value: the value.
        log_prob: nats, after Pyro's `scale` and `mask`; None until scored.
        log_q: nats, with which a latent was proposed; None if it was given.
        scale: Pyro's scale.
        mask: Pyro's mask.
        defence: share of the prior in the mixture that proposed a latent, where `log_q` does not
            count it yet: scoring the latent, which gives its probability under the prior, does so.
        made_of: of a user's own distribution what it was made of when it was met (see
            `langppl.program.contents.parameters`), as its methods may change it.
    """

    name: str
    kind: Kind
    fn: Any
    value: Any
    log_prob: float | None = None
    log_q: float | None = None
    scale: Any = 1.0
    mask: Any = None
    defence: float = 0.0
    made_of: Any = None

    @property
    def is_string(self) -> bool:
        """Whether the site's distribution is over strings."""
        return isinstance(self.fn, StringDistribution)

    @property
    def content(self) -> Any:
        """The value as the model has it; of tool calls and deterministic sites without its box."""
        return unboxed(self.value) if self.kind == "deterministic" else self.value

    def counted(self, log_prob: float) -> float:
        """A log-probability (nats) under the site's distribution, after Pyro's scale and mask."""
        return counted(log_prob, self.scale, self.mask)

    def learn(self, log_prob: float) -> None:
        """Takes the log-probability (nats) of the value under the site's distribution."""
        if self.defence and self.log_q is not None:
            self.log_q, self.defence = mixed(self.log_q, log_prob, self.defence), 0.0
        self.log_prob = self.counted(log_prob)


def counted(log_prob: float, scale: Any, mask: Any) -> float:
    """A log-probability (nats) after Pyro's scale and mask."""
    plain = torch.tensor(log_prob, dtype=torch.float64)
    return float(scale_and_mask(plain, scale, mask).sum())


class Pause(BaseException):
    """Raised by a chooser to stop an execution before a site.

    No error, so few models catch it, and where one does the execution has stopped there all the
    same (see `run_once`).

    Args:
        name: the site that was met.
        fn: its distribution.
        request: what was asked for there, if anything was.

    Attributes:
        scale: Pyro's scale at a latent; known once the execution has stopped.
        mask: Pyro's mask there.
    """

    scale: Any = 1.0
    mask: Any = None

    def __init__(self, name: str, fn: Any, request: Request | None = None) -> None:
        super().__init__(name)
        self.name, self.fn, self.request = name, fn, request


@dataclass
class Execution:
    """One run of a model.

    Attributes:
        sites: by name, in the order they were met.
        returned: what the model returned.
        pause: where it stopped before its end; None if it did not.
        error: what the model raised, in words, where the execution was impossible already; the
            sites are then those that were met before.
    """

    sites: dict[str, Site] = field(default_factory=dict)
    returned: Any = None
    pause: Pause | None = None
    error: str | None = None

    @property
    def latents(self) -> dict[str, Any]:
        """Values of the latent sites."""
        return {s.name: s.value for s in self.sites.values() if s.kind == "latent"}

    @property
    def computed(self) -> dict[str, Any]:
        """Values of the deterministic sites and results of the tool calls that were met."""
        return {s.name: s.content for s in self.sites.values() if s.kind == "deterministic"}

    @property
    def log_joint(self) -> float:
        """Sum of the sites' log-probabilities, nats."""
        return _total(s.log_prob for s in self.sites.values())

    @property
    def log_q(self) -> float:
        """Log-probability (nats) with which the latents were proposed."""
        return _total(s.log_q for s in self.sites.values())


def _total(terms: Any) -> float:
    return float(sum(t for t in terms if t is not None))


@dataclass(frozen=True)
class Choice:
    """A value for a latent site.

    Attributes:
        value: the value.
        log_q: nats, with which it was proposed; None if it was given.
        log_prob: nats, under the model, where the proposal knows it already.
        defence: share of the prior in the proposal that `log_q` does not count yet.
    """

    value: Any
    log_q: float | None = None
    log_prob: float | None = None
    defence: float = 0.0


Chooser = Callable[[str, Any, Execution], Choice]
"""Decides a latent's value from its name, its distribution and the execution so far."""


def is_plain(scale: Any, mask: Any) -> bool:
    """Whether a site's log-probability counts once, under Pyro's `scale` and `mask`."""
    if mask is not None:
        return False
    # What Pyro says where nobody scales; a tensor is made for others, which takes longer.
    return scale == 1.0 if type(scale) is float else bool((torch.as_tensor(scale) == 1.0).all())


def kind_of(fn: Any, is_observed: bool) -> Kind:
    """What a site is in the graph, by its distribution."""
    if isinstance(fn, Known):
        return "deterministic"
    if isinstance(fn, TemperedFactor | Unit):
        return "factor"
    return "observed" if is_observed else "latent"


class _Handler(Messenger):
    """Outermost on the stack: decides the latents and records every site."""

    def __init__(
        self,
        execution: Execution,
        choose: Chooser,
        know: Callable[[str, Known], Any] | None,
        observe: Callable[[str, Any, Any], Any] | None,
    ) -> None:
        super().__init__()
        self.execution = execution
        self.choose = choose
        self.know = know
        self.observe = observe
        self.stop: BaseException | None = None
        """What stopped the execution, if anything did; a model cannot go on by catching it."""

    @staticmethod
    def _is_internal(msg: Any) -> bool:
        return type(msg["fn"]).__name__ == "_Subsample" or bool(msg["infer"].get("_do_not_trace"))

    def _pyro_sample(self, msg: Any) -> None:
        if self.stop is not None:
            raise self.stop
        try:
            self._meet(msg)
        except Exception:
            raise
        except BaseException as stop:
            self.stop = stop
            raise

    def _meet(self, msg: Any) -> None:
        if self._is_internal(msg):
            check_subsample(msg)
            return
        name, fn = msg["name"], msg["fn"]
        check_intervention(name)
        if name in self.execution.sites:
            raise ValueError(
                f"site {name!r} is met twice in one execution; give each site its own name, in a "
                f'loop for instance f"{name}_{{i}}"'
            )
        if isinstance(fn, Tempered):
            fn = _split_tempered(msg)
        if is_users_own(fn):
            msg["infer"] = {**msg["infer"], "langppl_made_of": parameters(fn)}
        if isinstance(fn, StringDistribution):
            check_string_site(name, msg["value"])
            msg["value"] = as_value(msg["value"])
            for frame in msg["cond_indep_stack"]:
                if frame.vectorized:
                    raise plate_error(name, frame.name)
        if msg["infer"].get("_deterministic"):
            # Pyro's own statement: to Pyro an observation, of a value that is computed.
            value = msg["value"]
            msg["fn"] = Known(Constant(value), (value,), "deterministic")
            msg["is_observed"] = False
            if self.know is not None:
                msg["value"] = unboxed(self.know(name, msg["fn"]))
            return
        if msg["is_observed"]:
            if self.observe is not None and kind_of(fn, is_observed=True) == "observed":
                with naming(name):
                    value = self.observe(name, fn, msg["value"])
                if value is not msg["value"]:
                    check_observation(name, fn, value)
                    msg["value"] = value
            return
        if msg["done"] or msg["value"] is not None:
            return
        if isinstance(fn, Known) and self.know is not None:
            msg["value"], msg["done"] = self.know(name, fn), True
        elif kind_of(fn, is_observed=False) == "latent":
            warn_of_subsample(name)
            if not isinstance(fn, StringDistribution):
                check_latent(name, fn, msg["mask"])
            try:
                with naming(name):
                    choice = self.choose(name, fn, self.execution)
            except Pause as pause:
                pause.scale, pause.mask = msg["scale"], msg["mask"]
                raise
            msg["value"], msg["done"] = choice.value, True
            msg["infer"] = {**msg["infer"], "langppl_choice": choice}

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._is_internal(msg):
            return
        choice = msg["infer"].get("langppl_choice", Choice(None))
        # Under Pyro's scale or mask, what the proposal knows is not the site's term; but a draw
        # that cannot be is no draw, whatever counts of it.
        is_known = is_plain(msg["scale"], msg["mask"]) or choice.log_q == -math.inf
        self.execution.sites[msg["name"]] = Site(
            name=msg["name"],
            kind=kind_of(msg["fn"], msg["is_observed"]),
            fn=msg["fn"],
            value=msg["value"],
            log_prob=choice.log_prob if is_known else None,
            log_q=choice.log_q,
            scale=msg["scale"],
            mask=msg["mask"],
            defence=choice.defence,
            made_of=msg["infer"].get("langppl_made_of"),
        )


def _split_tempered(msg: Any) -> Any:
    """Makes a tempered site of Pyro's own `sample` what `langppl.sample` would have made of it."""
    tempered, go_on = msg["fn"], msg["continuation"]

    def then(msg: Any) -> None:
        factor_of_tempered(msg["name"], tempered, msg["value"])
        if go_on is not None:
            go_on(msg)

    msg["fn"], msg["continuation"] = tempered.base, then
    return tempered.base


def run_once(
    model: Model,
    args: Sequence[Any],
    choose: Chooser,
    *,
    know: Callable[[str, Known], Any] | None = None,
    observe: Callable[[str, Any, Any], Any] | None = None,
    forgive: bool = False,
) -> Execution:
    """Runs a model once; to be called within a scheduler's task.

    What is no error and is raised by `choose`, `know` or `observe`, such as `Pause`, stops the
    execution. A model whose bare `except` catches it meets it again at each later statement, and
    whatever the model does then, the execution has stopped where it was raised first.

    Args:
        model: the model.
        args: its arguments.
        choose: decides the latents; may raise `Pause`.
        know: answers tool calls and deterministic sites in place of evaluating them; may raise
            `Pause`.
        observe: replaces the values of observed sites: name, distribution, value → value.
        forgive: whether an error ends an execution that is impossible already, such as one of an
            unfinished string that the model then fails to read. It has weight zero in any case.
    """
    execution = Execution()
    handler = _Handler(execution, choose, know, observe)
    try:
        with handler:
            returned = model(*args)
        if handler.stop is None:
            execution.returned = returned
    except (KeyboardInterrupt, SystemExit, GreenletExit):
        raise
    except BaseException as error:
        if handler.stop is not None:
            pass
        elif not isinstance(error, Exception):
            raise
        elif forgive and _is_impossible(execution):
            execution.error = f"{type(error).__name__}: {error}"
        else:
            _note_latents(error, execution)
            raise
    if isinstance(handler.stop, Pause):
        # The traceback would keep the model's frames, that of what it was handling too.
        execution.pause = handler.stop.with_traceback(None)
        execution.pause.__context__ = None
    elif handler.stop is not None:
        raise handler.stop
    return execution


def _is_impossible(execution: Execution) -> bool:
    """Whether a site of an execution, scored or not, has probability zero without asking an LM."""
    return any(_log_prob_without_lm(site) == -math.inf for site in execution.sites.values())


def _log_prob_without_lm(site: Site) -> float:
    if site.log_prob is not None:
        return site.log_prob
    if isinstance(site.fn, TemperedFactor):
        return 0.0  # of a string that has a site of its own
    if isinstance(site.fn, StringDistribution):
        pending = site.fn.pending(site.value)
        return site.counted(0.0 if pending.requests else pending.finish(()))
    return _plain_log_prob(site)


def _plain_log_prob(site: Site) -> float:
    """Log-probability (nats) at a site whose distribution is not over strings.

    A value outside of the support is impossible, as a string is that breaks its rules.
    """
    try:
        if is_outside(site.fn, site.value, site.mask):
            return -math.inf
        plain = site.fn.log_prob(site.value)
    except ValueError as error:
        raise ValueError(f"site {site.name!r}, of {site.fn!r}: {error}") from error
    return float(scale_and_mask(plain, site.scale, site.mask).detach().sum())


def _note_latents(error: Exception, execution: Execution) -> None:
    """Adds to a model's error what was drawn before it."""
    drawn = [f"{name}={_short(value)}" for name, value in execution.latents.items()]
    if drawn and hasattr(error, "add_note"):  # from Python 3.11 on
        more = f" and {len(drawn) - _NOTED} more" if len(drawn) > _NOTED else ""
        error.add_note(f"raised in an execution with {', '.join(drawn[:_NOTED])}{more}")


def _short(value: Any) -> str:
    shown = repr(str(value)) if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def score(
    execution: Execution, only: Callable[[Site], bool] = lambda _: True, *, whole: bool = False
) -> Execution:
    """Fills in the sites' log-probabilities; see `score_all`."""
    score_all([execution], only, whole=whole)
    return execution


def score_all(
    executions: Sequence[Execution],
    only: Callable[[Site], bool] = lambda _: True,
    *,
    whole: bool = False,
) -> None:
    """Fills in the sites' log-probabilities, all LM requests at once.

    Args:
        executions: runs; sites that have a log-probability keep it.
        only: which of the others to score.
        whole: whether an impossible execution has its other sites scored too.

    Raises:
        ValueError: if a site's log-probability is NaN or +inf; names the site.
    """
    wanted: list[tuple[Site, Pending]] = []
    for execution in executions:
        start = len(wanted)
        for site in execution.sites.values():
            if site.log_prob is not None or not only(site):
                continue
            with naming(site.name):
                if isinstance(site.fn, StringDistribution):
                    wanted.append((site, site.fn.pending(site.value)))
                elif isinstance(site.fn, TemperedFactor):
                    wanted.append((site, _tempered(site.fn)))
                else:
                    site.log_prob = _plain_log_prob(site)
        # One impossible site makes the execution impossible: the LM need not score the others.
        hopeless = [
            (site, pending)
            for site, pending in wanted[start:]
            if not pending.requests and site.counted(pending.finish(())) == -math.inf
        ]
        if not whole and (
            hopeless or any(s.log_prob == -math.inf for s in execution.sites.values())
        ):
            wanted[start:] = [w for w in wanted[start:] if w in hopeless or w[0].defence]
    requests: list[Request] = [r for _, pending in wanted for r in pending.requests]
    replies: list[Reply] = perform(requests)
    at = 0
    for site, pending in wanted:
        mine = replies[at : at + len(pending.requests)]
        at += len(mine)
        site.learn(pending.finish(mine))
    for execution in executions:
        for site in execution.sites.values():
            check_number(site.name, site.log_prob)


def mixed(log_q: float, log_prior: float, defence: float) -> float:
    """Log-probability (nats) under a proposal mixed with so large a share of the prior."""
    return float(np.logaddexp(np.log1p(-defence) + log_q, np.log(defence) + log_prior))


def _tempered(fn: TemperedFactor) -> Pending:
    base = fn.base.pending(fn.value)

    def finish(replies: Sequence[Reply]) -> float:
        log_prob = base.finish(replies)
        # An impossible string stays impossible, whatever the sign of the power.
        return log_prob if log_prob == -math.inf else fn.power * log_prob

    return Pending(base.requests, finish)


def check_number(site: str, log_prob: float | None) -> None:
    """Raises `BadNumber`, naming the site, if a log-probability is NaN or +inf."""
    if log_prob is not None and (math.isnan(log_prob) or log_prob == math.inf):
        raise BadNumber(f"the log-probability of site {site!r} is {log_prob}")


# -- choosers ----------------------------------------------------------------------------------


def draw_prior(fn: Any, key: Key) -> Choice:
    """Draws a value from a site's own distribution.

    The log-probability of the draw is both its proposal's and the model's.
    """
    if isinstance(fn, StringDistribution):
        value, log_q = fn.draw(key)
        impossible = fn.why_impossible(value) is not None
        return Choice(value, log_q, -np.inf if impossible else log_q)
    value = draw_number(fn, key)
    log_q = log_density(fn, value)
    return choice_of_number(fn, value, log_q, log_q if drawing(fn) is fn else None)


def draw_number(fn: Any, key: Key) -> Any:
    """Draws a value from one of Pyro's distributions."""
    seed = int(generator(key).integers(2**62))
    with seeded(seed), torch.no_grad():
        return fn()


def choice_of_number(fn: Any, value: Any, log_q: float, log_prob: float | None = None) -> Choice:
    """A number that was drawn; one without a density is impossible, and a warning says so.

    Args:
        fn: the distribution that drew it.
        value: the value.
        log_q: nats, with which it was drawn.
        log_prob: nats, under the model, where it is known already.
    """
    if log_q != -math.inf:
        return Choice(value, log_q, log_prob)
    # Outside of a site it is a trial value of the search for a program's structure.
    if current() is not None:
        warn(
            f"{where()}{fn!r} drew {_short(value)}, which has no density under it: the number "
            f"under- or overflows {getattr(value, 'dtype', 'its type')}. Such draws count as "
            "impossible, so what they stand for is missing from the posterior and the evidence; "
            "give the distribution parameters in torch.float64, or less extreme ones",
            once=("no density", current()),
        )
    return Choice(value, log_q, log_q)


def given(values: Mapping[str, Any], otherwise: Chooser | None = None) -> Chooser:
    """Takes latents from a mapping.

    Args:
        values: site → value.
        otherwise: for the other sites; None to make them an error.
    """

    def choose(name: str, fn: Any, execution: Execution) -> Choice:
        if name in values:
            if isinstance(fn, StringDistribution):
                check_string_site(name, values[name])
                return Choice(as_value(values[name]))
            return Choice(as_value(values[name], fn))
        if otherwise is None:
            raise ValueError(
                f"latent site {name!r} has no value; values are given for: "
                + (", ".join(sorted(values)) or "none")
            )
        return otherwise(name, fn, execution)

    return choose


def run_many(tasks: Sequence[Callable[[], T]], memo: Memo) -> list[T]:
    """Runs tasks at once, with tool calls remembered in `memo`."""

    def with_memo(task: Callable[[], T]) -> Callable[[], T]:
        def inner() -> T:
            memo_of_calls.set(memo)
            return task()

        return inner

    return run([with_memo(t) for t in tasks])
