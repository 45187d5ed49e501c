"""Particles: executions that stop at every latent, and strings that grow in them piece by piece.

A particle is no copy of a running program. It is the values of the latents that it has decided, by
which the model is run again up to the next latent, and the tokens of the one that it is deciding.
Copying a particle copies references; the keys and values of its tokens are in one growing cache
(`langppl.lm.kept`), in which copies read the same nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from langppl.distributions import LMString, Text
from langppl.distributions.lmstring import check_ended
from langppl.distributions.sites import naming
from langppl.distributions.tempered import TemperedFactor
from langppl.guides.base import Guide, Key
from langppl.guides.trajectories import prefix_value
from langppl.lm.requests import (
    DrawReply,
    DrawRequest,
    Request,
    ScoreReply,
    ScoreRequest,
    perform,
    watched_by,
)
from langppl.lm.rules import Path
from langppl.program import Program, run_together
from langppl.program.execution import (
    Choice,
    Chooser,
    Execution,
    Pause,
    Site,
    counted,
    score_all,
)
from langppl.program.scheduler import run
from langppl.program.statements import Known, Potential, Unfinished
from langppl.program.templates import fill_site


@dataclass(frozen=True)
class View:
    """The evidence that a particle has met, or would have met if its string ended here.

    Attributes:
        factors: observed site or factor → nats.
        is_over: whether the program ended there, so that it will meet no more.
        lacking: potentials that it will meet all the same, of which nothing is known yet that
            counts.
    """

    factors: dict[str, float]
    is_over: bool
    lacking: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Growing:
    """A string that is being drawn.

    Attributes:
        name: its site.
        fn: its distribution.
        request: what the guide asks the LM for.
        scale: Pyro's scale at the site.
        mask: Pyro's mask there.
        ids: the tokens so far.
        text: their text.
        log_q: nats, of the guide's own law for them; of the whole string when it has ended.
        log_accepted: log of an unbiased estimate of the probability, under that law, of not being
            turned down on the way, nats; see `langppl.inference.screening`.
        is_ended: whether it is whole.
        view: the evidence as if it ended here, at the last place where it could.
        potentials: the potentials of the text so far, each where it was last a number.
        twist: log ψ of a user's twist, nats, at the last place where it was a number.
        flow: log F(z₁..s) − log q(z₁..s) at the last place s where it was a number.
    """

    name: str
    fn: LMString
    request: DrawRequest
    scale: Any = 1.0
    mask: Any = None
    ids: tuple[int, ...] = ()
    text: str = ""
    log_q: float = 0.0
    log_accepted: float = 0.0
    is_ended: bool = False
    view: View | None = None
    potentials: View | None = None
    twist: float = 0.0
    flow: float | None = None

    @property
    def value(self) -> Text:
        """The string so far."""
        return self.fn.text_of(DrawReply(self.ids, self.text, self.log_q))

    @property
    def log_drawn(self) -> float:
        """What stands for the log-probability (nats) of having been drawn, in weights."""
        return self.log_q - self.log_accepted

    def reading(self, potentials: View) -> Growing:
        """The same string with what its potentials say by now."""
        return replace(self, potentials=potentials)

    @property
    def is_prior(self) -> bool:
        """Whether it is drawn from the model itself."""
        request, fn = self.request, self.fn
        own = fn.prompt_ids()
        return (
            request.beside is None
            and request.adapter == fn.adapter
            and request.temperature == 1.0
            and request.rules is fn.bound
            and request.prompt == own
            and request.limit == fn.limit(len(own))
        )

    def counted(self, log_prob: float) -> float:
        """A log-probability (nats) of the string, after Pyro's scale and mask."""
        return counted(log_prob, self.scale, self.mask)

    def path(self) -> Path | None:
        """Its actions under the model's rules; None if they do not allow it."""
        own = self.fn.prompt_ids()
        if not self.is_ended:
            return self.fn.bound.begun(self.ids, self.fn.limit(len(own)))
        found = self.fn.parse(self.value, len(own))
        return found if isinstance(found, Path) else None

    def ended_here(self) -> Text | None:
        """The string as if it ended here; None where it cannot."""
        if self.is_ended:
            return self.value
        path = self.path()
        if path is None or len(path.steps) == len(path.tokens):
            return None
        if not len(path.steps[-1].canonical):
            return None
        return prefix_value(self.fn, path, len(path.tokens))


@dataclass
class Particle:
    """One particle.

    Attributes:
        known: the latents that are decided.
        execution: the run that led here, scored; it is over or stops before a latent.
        ancestor: number of the first particle that it descends from.
        offset: nats; log weight less `ratio`, since it was last resampled.
        ratio: log target − log q of where it stands, nats.
        growing: the string that it is deciding.
        to_come: log of what a guide's learned flow says is to come, nats, at the last latent before
            which it was known.
        killed: the potential whose `prefix` was −inf of an unfinished string, and the string.
    """

    known: dict[str, Choice]
    execution: Execution
    ancestor: int
    offset: float = 0.0
    ratio: float = 0.0
    growing: Growing | None = None
    to_come: float = 0.0
    killed: tuple[str, str] | None = None

    @property
    def log_weight(self) -> float:
        """Nats; −inf if it is dead."""
        return self.offset + self.ratio

    @property
    def is_over(self) -> bool:
        """Whether its program has ended."""
        return self.execution.pause is None and self.growing is None

    @property
    def is_dead(self) -> bool:
        """Whether something in it is impossible."""
        return any(s.log_prob == -math.inf for s in self.execution.sites.values())

    @property
    def view(self) -> View:
        """The evidence that it has met."""
        met = {
            s.name: float(s.log_prob or 0.0)
            for s in self.execution.sites.values()
            if s.kind in ("observed", "factor")
        }
        return View(met, self.is_over)

    @property
    def of_latents(self) -> float:
        """Log p − log q of the latents that are decided, nats."""
        latents = (s for s in self.execution.sites.values() if s.kind == "latent")
        return float(sum((s.log_prob or 0.0) - (s.log_q or 0.0) for s in latents))

    def copy(self, offset: float) -> Particle:
        """A copy with another weight."""
        return replace(self, offset=offset)


@dataclass
class Held:
    """The latents that one particle keeps to.

    Attributes:
        latents: latent → value.
        at: the number of the particle.
    """

    latents: Mapping[str, Any]
    at: int


class MissedError(Exception):
    """The guide cannot draw the latents that a particle is held to."""


@dataclass
class Crowd:
    """The particles of one inference.

    Args:
        program: the program.
        guide: proposes the latents.
        count: how many particles.
        seed: of all random numbers.
        held: what one of them keeps to; its own draws are these latents, whatever the guide draws.
    """

    program: Program
    guide: Guide
    count: int
    seed: int
    held: Held | None = None
    particles: list[Particle] = field(default_factory=list)

    def begin(self) -> None:
        """Runs all particles up to the first latent."""
        self.particles = [Particle({}, Execution(), i) for i in range(self.count)]
        self._go_on(self.particles, [_to_next({}) for _ in self.particles])

    def decide(self, stage: int) -> None:
        """Decides one more latent of each particle; strings are left to grow."""
        going = [(i, p) for i, p in enumerate(self.particles) if not (p.is_over or p.is_dead)]
        decided: list[dict[str, Choice]] = [{} for _ in going]
        choosers = [
            self._deciding(p, (self.seed, "smc", stage, i), own, self.held_by(i))
            for (i, p), own in zip(going, decided, strict=True)
        ]
        moving = [p for _, p in going]
        before = [p.execution for p in moving]
        found = run_together([(self.program, c) for c in choosers])
        for (i, _), new in zip(going, decided, strict=True):
            if self.held_by(i) is not None and any(c.log_q == -math.inf for c in new.values()):
                raise MissedError
        for particle, execution, new, old in zip(moving, found, decided, before, strict=True):
            particle.known = {**particle.known, **new}
            pause = execution.pause
            if pause is not None and isinstance(pause.request, DrawRequest):
                particle.growing = Growing(
                    pause.name, pause.fn, pause.request, pause.scale, pause.mask
                )
                continue
            carry(old, execution)
            particle.execution = execution
        score_all([p.execution for p in moving])
        for particle in moving:
            self._check_drawn(particle)

    def _check_drawn(self, particle: Particle) -> None:
        """Raises ValueError for a possible value that its own proposal says it never draws."""
        for site in particle.execution.sites.values():
            if site.log_q == -math.inf and not particle.is_dead:
                raise ValueError(
                    f"site {site.name!r}: the guide {self.guide.name!r} drew {site.value!r} and "
                    "says that it cannot (log q is -inf); log_q must be the log-probability with "
                    "which its chooser draws the value"
                )

    def held_by(self, i: int) -> Held | None:
        """What a particle, by its number, is held to."""
        return self.held if self.held is not None and self.held.at == i else None

    def _deciding(
        self, particle: Particle, key: Key, decided: dict[str, Choice], held: Held | None
    ) -> Chooser:
        own = self.guide.chooser(self.program, key)
        known = particle.known

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            if name in known:
                return known[name]
            if decided:
                raise Pause(name, fn)

            def watch(requests: Sequence[Request]) -> None:
                for request in requests:
                    if isinstance(request, DrawRequest):
                        if not isinstance(fn, LMString) or request.lm is not fn.lm:
                            raise ValueError(
                                f"site {name!r}: the guide {self.guide.name!r} draws from another "
                                'LM than the site\'s, which method="smc" cannot follow token by '
                                'token; use method="importance"'
                            )
                        raise Pause(name, fn, request)

            with watched_by(watch):
                choice = own(name, fn, execution)
            if held is not None:
                choice = self.guide.given(self.program, held.latents)(name, fn, execution)
            decided[name] = choice
            return choice

        return choose

    def grow(self, stage: int, turn: int, every: int | None, besides: Collection[int] = ()) -> None:
        """Draws some more tokens of each string that is not whole; None for all of them.

        Args:
            stage: how many latents were decided before.
            turn: which draw of these strings it is.
            every: how many tokens.
            besides: particles, by their numbers, to leave as they are.
        """
        growing = [
            (i, p, p.growing)
            for i, p in enumerate(self.particles)
            if p.growing is not None and not p.growing.is_ended and i not in besides
        ]
        kept = [(p, g, held) for i, p, g in growing if (held := self.held_by(i)) is not None]
        for particle, g, held in kept:
            particle.growing = followed(g, held, every)
        growing = [(i, p, g) for i, p, g in growing if self.held_by(i) is None]
        requests = [
            replace(
                g.request,
                key=(self.seed, "smc", stage, turn, i),
                begun=g.ids,
                length=_no_further(g.request.length, g.ids, every),
            )
            for i, _, g in growing
        ]
        for (_, particle, g), reply in zip(growing, perform(requests), strict=True):
            assert isinstance(reply, DrawReply)
            # As a string drawn at once: its context may leave less room than it needs.
            if g.request.length is not None and len(reply.ids) >= g.request.length:
                with naming(g.name):
                    check_ended(g.request, reply)
            particle.growing = replace(
                g,
                ids=reply.ids,
                text=reply.text,
                log_q=g.log_q + reply.log_prob,
                is_ended=reply.is_ended or reply.is_dead or every is None,
            )

    @property
    def is_growing(self) -> bool:
        """Whether some string is not whole."""
        return any(p.growing is not None and not p.growing.is_ended for p in self.particles)

    def finish(self) -> None:
        """Takes the strings that are whole as decided, and runs on to the next latents."""
        moving = [p for p in self.particles if p.growing is not None]
        for particle in moving:
            g = particle.growing
            assert g is not None
            with naming(g.name):
                log_prob = None
                if g.is_prior:
                    impossible = g.fn.why_impossible(g.value) is not None
                    log_prob = -math.inf if impossible else g.log_q
            particle.known = {**particle.known, g.name: Choice(g.value, g.log_drawn, log_prob)}
            particle.growing = None
        self._go_on(moving, [_to_next(p.known) for p in moving])

    def _go_on(self, moving: Sequence[Particle], choosers: Sequence[Chooser]) -> None:
        found = run_together([(self.program, c) for c in choosers])
        for particle, execution in zip(moving, found, strict=True):
            carry(particle.execution, execution)
            particle.execution = execution
        score_all([p.execution for p in moving])

    # -- while strings grow -------------------------------------------------------------------

    def growing(self) -> list[tuple[Particle, Growing]]:
        """The particles that are deciding a string and are not dead."""
        own = [(p, p.growing) for p in self.particles]
        return [(p, g) for p, g in own if g is not None and not p.is_dead]

    def log_p(self) -> dict[int, tuple[float, float]]:
        """What the model says of strings as they stand.

        Returns:
            For the identity of each particle that grows one: log-probability of its tokens (of the
            whole string if it has ended), and of ending here, nats, after Pyro's scale and mask;
            −inf where it cannot and that counts.
        """
        found: dict[int, tuple[float, float]] = {}
        wanted: list[tuple[Particle, Growing, ScoreRequest]] = []
        for particle, g in self.growing():
            path = g.path()
            if path is None or path.rejected:
                never = g.counted(-math.inf)
                found[id(particle)] = (never, never)
            else:
                own = g.fn.prompt_ids()
                request = ScoreRequest(g.fn.lm, own, path, g.fn.rules.temperature, g.fn.adapter)
                wanted.append((particle, g, request))
        replies = perform([r for _, _, r in wanted])
        for (particle, g, _), reply in zip(wanted, replies, strict=True):
            assert isinstance(reply, ScoreReply)
            ending = 0.0 if g.is_ended else float(reply.canonical[-1])
            found[id(particle)] = (g.counted(reply.log_prob), g.counted(ending))
        return found

    def log_q_ending(self) -> dict[int, float]:
        """For each particle with an unfinished string, log q(⊤) of ending here, nats."""
        wanted = []
        for particle, g in self.growing():
            path = None if g.is_ended else g.request.rules.begun(g.ids, g.request.limit)
            if path is not None:
                wanted.append((particle, g.request.scoring(path)))
        replies = perform([r for _, r in wanted])
        return {
            id(p): float(reply.canonical[-1])
            for (p, _), reply in zip(wanted, replies, strict=True)
            if isinstance(reply, ScoreReply)
        }

    def to_come(self) -> dict[int, tuple[float, float | None]]:
        """What the guide has learned of what comes after particles that are at rest.

        Returns:
            For the identity of each that has not ended and is not dead: log of the factors that
            depend on what is decided and are not met yet, as far as they can be known, and the
            guide's `log_flow` of the rest; nats.
        """
        going = [p for p in self.particles if not (p.is_over or p.is_dead)]
        # Copies that have not gone apart share their run.
        executions = {id(p.execution): p.execution for p in going}
        found = run([partial(self._flow_after, e) for e in executions.values()])
        ahead = [self._known_ahead(e) for e in executions.values()]
        score_all(ahead)
        known = {
            key: (e.log_joint, flow) for key, e, flow in zip(executions, ahead, found, strict=True)
        }
        return {id(p): known[id(p.execution)] for p in going}

    def _flow_after(self, execution: Execution) -> float | None:
        pause = execution.pause
        assert pause is not None
        return self.guide.log_flow(self.program, pause.name, pause.fn, execution)

    def _known_ahead(self, execution: Execution) -> Execution:
        """The factors that are not met yet and depend on what is decided alone."""
        program, found = self.program, Execution()
        if not program.is_static:
            return found
        assert program.templates is not None
        latents = execution.latents
        for template in program.templates:
            is_evidence = template.kind in ("observed", "factor")
            if not is_evidence or template.name in execution.sites:
                continue
            if program.graph.latents_above(template.name) <= latents.keys():
                found.sites[template.name] = fill_site(template, latents)
        return found

    def look_ahead(
        self,
        is_wanted: Callable[[Site], bool],
        *,
        whole_only: bool = False,
        with_potentials: bool = False,
    ) -> None:
        """Renews each growing string's view: the evidence as if it ended here.

        Where it cannot end, or that evidence is impossible, the view stays as it was. A run of a
        model on an unfinished text goes on to the next latent, tool call or error.

        Args:
            is_wanted: of the sites of evidence, those to count.
            whole_only: whether to leave out strings that have not ended.
            with_potentials: whether potentials are among the evidence of strings that have not
                ended; `langppl.inference.potentials` has what they say of the text as it stands.
        """
        runs: dict[tuple[int, tuple[int, ...] | None], tuple[Particle, Growing, Text]] = {}
        keys: dict[int, tuple[int, tuple[int, ...] | None]] = {}
        for particle, g in self.growing():
            value = g.ended_here() if g.is_ended or not whole_only else None
            if value is not None:
                # Copies that have not grown apart share their run.
                key = (id(particle.execution), value.ids)
                runs.setdefault(key, (particle, g, value))
                keys[id(particle)] = key
        tasks = [partial(self._as_if_ended, *own, with_potentials) for own in runs.values()]
        found = dict(zip(runs, run(tasks), strict=True))
        for key, execution in found.items():
            if execution is not None:
                carry(runs[key][0].execution, execution)

        def only(site: Site) -> bool:
            return site.kind in ("observed", "factor") and is_wanted(site)

        score_all([e for e in found.values() if e is not None], only)
        for particle, g in self.growing():
            execution = found.get(keys.get(id(particle), (0, None)))
            if execution is None:
                continue
            met = {
                s.name: s.log_prob
                for s in execution.sites.values()
                if s.kind in ("observed", "factor")
                and s.log_prob is not None
                and (g.is_ended or with_potentials or not is_potential(s))
            }
            if -math.inf in met.values() and not g.is_ended:
                continue
            unmet = (s for s in execution.sites.values() if s.kind in ("observed", "factor"))
            is_over = execution.pause is None and all(s.log_prob is not None for s in unmet)
            particle.growing = replace(g, view=View(met, is_over))

    def _as_if_ended(
        self, particle: Particle, g: Growing, value: Text, with_potentials: bool
    ) -> Execution | None:
        if g.is_ended:
            known = {**particle.known, g.name: Choice(value)}
            return self.program.run_once(_to_next(known))
        if with_potentials:
            return self.try_on(particle, g, value)
        with Unfinished(evaluates=False):
            return self.try_on(particle, g, value)

    def try_on(
        self, particle: Particle, g: Growing, value: Text, *, forgive: bool = False
    ) -> Execution | None:
        """Runs the model as if an unfinished string had a value; to be called in a task.

        Args:
            particle: the particle.
            g: its string.
            value: what to take for the string.
            forgive: whether what is impossible is returned also where the model then breaks.

        Returns:
            The run up to the next latent or tool call; None if the model breaks on the value.
        """
        known = {**particle.known, g.name: Choice(value, g.log_q)}

        def know(name: str, fn: Known) -> Any:
            # One before the string has its result, whatever the string will be.
            if name in particle.execution.sites:
                return particle.execution.sites[name].value
            if fn.family == "call":
                raise Pause(name, fn)
            return fn.sample()

        try:
            return self.program.run_once(_to_next(known), know, forgive=forgive)
        except Exception:  # whatever a model makes of an unfinished text
            return None


def _no_further(room: int | None, ids: Sequence[int], every: int | None) -> int | None:
    """How long a string may be after a turn; None for as long as it is."""
    if every is None:
        return room
    return len(ids) + every if room is None else min(room, len(ids) + every)


def followed(g: Growing, held: Held, every: int | None) -> Growing:
    """A string after some more tokens of the value that it is held to; None for all of them."""
    if g.name not in held.latents:
        raise ValueError(f"latent site {g.name!r} has no value to be held to")
    value, request = held.latents[g.name], g.request
    path = request.rules.parse(g.fn.tokens_of(value), value.encode(), request.limit)
    if not isinstance(path, Path) or path.ending == "dead":
        raise MissedError
    (reply,) = perform([request.scoring(path)])
    assert isinstance(reply, ScoreReply)
    length = len(path.tokens) + 1 if every is None else len(g.ids) + every
    # As a draw of so many tokens: one that stands at its limit has ended, others have yet to.
    most = len(path.tokens) - (path.ending == "cut")
    if length > most:
        ids = g.fn.tokens_of(value)
        return replace(g, ids=ids, text=str(value), log_q=reply.log_prob, is_ended=True)
    ids = path.tokens[:length]
    text = g.fn.lm.vocabulary.join(ids).decode("utf-8", errors="replace")
    return replace(g, ids=ids, text=text, log_q=float(reply.tokens[:length].sum()))


def is_steering(site: Site) -> bool:
    """Whether a site of evidence says how promising an unfinished string is.

    The power of a tempered string includes its ending, which says more about where it stands than
    about how promising it is.
    """
    return not isinstance(site.fn, TemperedFactor)


def is_potential(site: Site) -> bool:
    """Whether a site is a `potential`."""
    return isinstance(site.fn, Potential)


def _to_next(known: dict[str, Choice]) -> Chooser:
    """Takes what is known and stops at the next latent."""

    def choose(name: str, fn: Any, execution: Execution) -> Choice:
        if name not in known:
            raise Pause(name, fn)
        return known[name]

    return choose


def carry(old: Execution, new: Execution) -> None:
    """Takes over what was found out of sites when they were scored before."""
    for name, site in new.sites.items():
        known = old.sites.get(name)
        if known is not None and known.log_prob is not None:
            site.log_prob, site.log_q, site.defence = known.log_prob, known.log_q, known.defence
