"""Twists: how promising particles are while their strings grow.

A twist ψ is a positive number for each unfinished particle. Particles are resampled by their weight
times ψ, and carry 1/ψ on from there, so a twist changes the variance of what is found and never the
answer (Whiteley and Lee 2014, *Twisted particle filters*, arXiv 1210.0220; for language models Zhao
et al. 2024, arXiv 2404.17546).

Evidence meets all particles at the same time. A string that ends early would otherwise pay for the
ending that is observed after it (some −17 nats) while the unfinished ones still stand at 0, and be
resampled away. So a factor counts once every particle has met it, would meet it if its string
ended here, or has nothing more to meet. A potential that was passed over so far is still to be met:
were it to count for the others, the particle that it says nothing of would outweigh them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from langppl.distributions import LMString
from langppl.guides.base import Guide
from langppl.inference.particles import Crowd, Growing, Particle, View, is_potential, is_steering
from langppl.inference.potentials import has_potentials, has_prefixes, read_potentials
from langppl.lm.counts import as_share
from langppl.program import Program
from langppl.program.statements import Number, Potential

UserTwist = Callable[[str, str], torch.Tensor | Number]
"""Site and text so far → log ψ, nats."""

_Twist = Literal["lookahead", "flow"]
TWISTS: tuple[str, ...] = get_args(_Twist)
TwistLike: TypeAlias = _Twist | str | UserTwist | None

POWER = 0.4
"""Of lookahead."""


class Twist(ABC):
    """Weighs particles whose strings grow."""

    def needs_turns(self, crowd: Crowd) -> bool:
        """Whether weights can differ before strings are whole."""
        return True

    @abstractmethod
    def weigh(self, crowd: Crowd) -> bool:
        """Sets each particle's `ratio`; False if there is nothing to tell them apart by yet."""

    def weigh_at_rest(self, crowd: Crowd) -> None:
        """Sets each particle's `ratio` where no string grows."""
        weigh_at_rest(crowd)


def check_twist(twist: Any, power: Any = None) -> None:
    """Checks what can be checked of a twist without a program.

    Raises:
        ValueError: for an unknown name, or a power out of range or of another twist.
        TypeError: for anything else.
    """
    if power is not None:
        if twist != "lookahead":
            raise ValueError(f'twist_power is of twist="lookahead", and the twist is {twist!r}')
        as_share("twist_power", power)
    if isinstance(twist, str) and twist not in TWISTS:
        raise ValueError(f"unknown twist {twist!r}; twists are: {', '.join(TWISTS)}, or a function")
    if not (twist is None or isinstance(twist, str) or callable(twist)):
        raise TypeError(f"a twist is a name or a function of site and text, got {twist!r}")


def make_twist(
    twist: str | UserTwist | None, program: Program, guide: Guide, power: float | None = None
) -> Twist:
    """A twist by name; a user's function as one.

    Args:
        twist: see `langppl.inference.smc.smc`.
        program: the program.
        guide: proposes its latents.
        power: of `"lookahead"`; None for `POWER`.

    Raises:
        ValueError: if `"flow"` is not known of the guide, or as `check_twist`.
        TypeError: as `check_twist`.
    """
    check_twist(twist, power)
    if twist is None:
        return Plain()
    if twist == "lookahead":
        return Lookahead(POWER if power is None else float(power))
    if twist == "flow":
        fns = [program.sites[n].fn for n in program.latents]
        if len(fns) == 1 and isinstance(fns[0], LMString):
            return Flow()
        if not guide.flows:
            raise ValueError(
                f'twist="flow" is the flow of one latent string, and the latents here are '
                f"{', '.join(map(repr, program.latents)) or 'none'}; for several, the guide must "
                'have learned flows (a GFlowNetGuide with objective="subtb" or "db"), which guide '
                f'{guide.name!r} has not. Use twist="lookahead"'
            )
        return SiteFlow()
    assert callable(twist)
    return User(twist)


class Plain(Twist):
    """No twist: the model over the proposal, and the model's own potentials."""

    def needs_turns(self, crowd: Crowd) -> bool:
        """See `Twist.needs_turns`."""
        growing = [g for _, g in crowd.growing()]
        return has_potentials(crowd.program) or not all(g.is_prior for g in growing)

    def weigh(self, crowd: Crowd) -> bool:
        """See `Twist.weigh`."""
        if has_potentials(crowd.program):
            crowd.look_ahead(is_potential, whole_only=True)
            read_potentials(crowd)
        _weigh(crowd)
        return True


class Lookahead(Twist):
    """The evidence as if the string ended here, without the probability that it does.

    It says little of a string that has hardly begun, and resampling by it at its word kills what
    would have come out well. So the unfinished strings are told apart by a power of it; of all the
    weight they keep the share that they have with the whole of it, beside the strings that have
    ended and whose evidence is known. Potentials are the user's own and count in full.

    Args:
        power: 1 for lookahead at its word, 0 for unfinished strings that are all as promising.
    """

    def __init__(self, power: float) -> None:
        self.power = power

    def weigh(self, crowd: Crowd) -> bool:
        """See `Twist.weigh`."""
        crowd.look_ahead(is_steering)
        if has_potentials(crowd.program):
            read_potentials(crowd)
        counted = _weigh(crowd)
        potentials = {s.name for s in crowd.program.sites.values() if isinstance(s.fn, Potential)}
        ahead: list[tuple[Particle, float]] = []
        for particle, g in crowd.growing():
            if g.is_ended or g.view is None or particle.log_weight == -math.inf:
                continue
            met = particle.view.factors
            own = (
                value
                for name, value in g.view.factors.items()
                if name in counted and name not in met and name not in potentials
            )
            ahead.append((particle, sum(own)))
        if ahead:
            self.temper(ahead)
        return True

    def temper(self, ahead: Sequence[tuple[Particle, float]]) -> None:
        """Changes the `ratio` of unfinished particles, of each of which lookahead is given."""
        whole = np.array([p.log_weight for p, _ in ahead])
        excess = (1.0 - self.power) * np.array([value for _, value in ahead])
        tempered = np.logaddexp.reduce(whole) - np.logaddexp.reduce(whole - excess)
        for (particle, _), change in zip(ahead, tempered - excess, strict=True):
            particle.ratio += float(change)


class User(Twist):
    """A user's function of the text so far.

    Args:
        fn: site and text → log ψ, nats; −inf and unfinished characters are passed over.
    """

    def __init__(self, fn: UserTwist) -> None:
        self.fn = fn

    def weigh(self, crowd: Crowd) -> bool:
        """See `Twist.weigh`.

        Raises:
            ValueError: if the function gives NaN or +inf.
        """
        if has_potentials(crowd.program):
            crowd.look_ahead(is_potential, whole_only=True)
            read_potentials(crowd)
        for particle, g in crowd.growing():
            found = float(self.fn(g.name, g.text))
            if math.isnan(found) or found == math.inf:
                raise ValueError(
                    f"site {g.name!r}: the twist of {g.text!r} is {found}; it must be a number "
                    "below infinity"
                )
            if found > -math.inf:
                particle.growing = replace(g, twist=found)
        _weigh(crowd)
        return True


class Flow(Twist):
    """The guide's own flow, F(z₁..t) = R(z₁..t ⊤) / q(⊤ | z₁..t).

    Over prefixes that cannot end it is carried as F(z₁..s) · q(z_{s+1}..z_t | z₁..s). Of a guide
    that is trained, F(z₁..t) / q(z₁..t) is the evidence wherever t stands.
    """

    def weigh(self, crowd: Crowd) -> bool:
        """See `Twist.weigh`."""
        if has_prefixes(crowd.program):
            read_potentials(crowd)
            _bury(crowd)
        crowd.look_ahead(lambda site: True, with_potentials=True)
        log_p, log_ending = crowd.log_p(), crowd.log_q_ending()
        for particle, g in crowd.growing():
            of_text, of_ending = log_p[id(particle)]
            known, view = particle.of_latents, g.view
            if g.is_ended:
                rest = 0.0 if view is None else sum(view.factors.values())
                particle.ratio = known + of_text - g.log_drawn + rest
                continue
            can_end = g.ended_here() is not None and view is not None and view.is_over
            if can_end and view is not None:
                flow = known + of_text + of_ending - log_ending[id(particle)] - g.log_q
                flow += sum(view.factors.values())
                if math.isfinite(flow):
                    particle.growing = replace(g, flow=flow)
        growing = crowd.growing()
        for particle, g in growing:
            if not g.is_ended and g.flow is not None:
                particle.ratio = g.flow + g.log_accepted
        return all(g.is_ended or g.flow is not None for _, g in growing)


class SiteFlow(Twist):
    """The flow that a guide has learned of a program's states, before each latent.

    Particles meet at latents alone: within a string the flow is carried on, and only a
    potential's `prefix` tells them apart, by those that are dead. What is known by then
    counts (forward-looking), met or not: in a program of fixed templates, factors that are met
    later and depend on nothing else are evaluated at once.
    """

    def needs_turns(self, crowd: Crowd) -> bool:
        """See `Twist.needs_turns`."""
        return has_prefixes(crowd.program)

    def weigh(self, crowd: Crowd) -> bool:
        """See `Twist.weigh`."""
        if not has_prefixes(crowd.program):
            return False
        read_potentials(crowd)
        _bury(crowd)
        return True

    def weigh_at_rest(self, crowd: Crowd) -> None:
        """See `Twist.weigh_at_rest`."""
        known = crowd.to_come()
        for particle in crowd.particles:
            particle.ratio = -math.inf
            if particle.is_dead:
                continue
            particle.ratio = particle.of_latents + sum(particle.view.factors.values())
            if not particle.is_over:
                factors, flow = known[id(particle)]
                if flow is not None:
                    particle.to_come = flow
                particle.ratio += factors + particle.to_come


def weigh_at_rest(crowd: Crowd) -> None:
    """Sets each particle's `ratio` where no string grows."""
    counted = _counted([p.view for p in crowd.particles if not p.is_dead])
    for particle in crowd.particles:
        particle.ratio = -math.inf
        if not particle.is_dead:
            particle.ratio = particle.of_latents + _sum(particle.view, counted)


def _weigh(crowd: Crowd) -> set[str]:
    """Sets each particle's `ratio` by the model over the proposal, its twist and its view.

    Returns:
        The factors that count.
    """
    growing = crowd.growing()
    drawn = [(p, g) for p, g in growing if not g.is_prior]
    log_p = crowd.log_p() if drawn else {}
    asks = has_potentials(crowd.program)
    views = {id(p): _view(p, p.growing, asks) for p in crowd.particles if not p.is_dead}
    counted = _counted(views.values())
    for particle in crowd.particles:
        g = particle.growing
        if particle.is_dead:
            particle.ratio = -math.inf
            continue
        own = 0.0
        if g is not None:
            of_text = _of_prior(g) if g.is_prior else log_p[id(particle)][0]
            own = g.twist + (of_text - g.log_drawn)
        particle.ratio = particle.of_latents + own + _sum(views[id(particle)], counted)
    return counted


def _of_prior(g: Growing) -> float:
    """What counts, nats, of a string as it stands that is drawn from the model itself."""
    is_impossible = g.is_ended and g.fn.why_impossible(g.value) is not None
    return g.counted(-math.inf if is_impossible else g.log_q)


def _view(particle: Particle, g: Growing | None, has_potentials: bool) -> View:
    met = particle.view
    if g is None:
        return met
    # Of a string that has ended, its potentials are those of the whole text.
    ahead = (g.view, None if g.is_ended else g.potentials)
    factors, is_over = dict(met.factors), False
    lacking: frozenset[str] = frozenset()
    for view in ahead:
        if view is not None:
            factors |= view.factors
            is_over = is_over or view.is_over
            lacking |= view.lacking
    # Of a text that the model could not be asked of, nobody knows which potentials it has.
    is_asked = g.is_ended or g.potentials is not None or not has_potentials
    return View(factors, is_over and is_asked, lacking - factors.keys())


def _bury(crowd: Crowd) -> None:
    """Sets the `ratio` of dead particles alone."""
    for particle in crowd.particles:
        if particle.is_dead:
            particle.ratio = -math.inf


def _counted(views: Iterable[View]) -> set[str]:
    """The factors that every particle has met or never will."""
    own = list(views)
    everything = {name for view in own for name in view.factors}
    lacking = {name for view in own for name in view.lacking}
    open_ = [view.factors for view in own if not view.is_over]
    return {name for name in everything - lacking if all(name in factors for factors in open_)}


def _sum(view: View, counted: set[str]) -> float:
    return float(sum(v for name, v in view.factors.items() if name in counted))
