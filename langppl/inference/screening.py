"""Screening: tokens that a potential's `prefix` says no to are drawn anew, with the weight due.

Where few tokens may follow, particles that draw from the LM soon are all dead. Here a token that
must not follow is put aside and another one drawn, without replacement, until one may. That draws
from the LM's law given that the token may follow, so the particle has to be weighed by the
probability Z that one may, which only a look at the whole vocabulary would tell. An unbiased
estimate will do: the draws go on, with the accepted token in the urn, until a second one may
follow, and with m₀ = 1, m₁, m₂, ... what of the probability was left after each rejection,

    Ẑ = 1 / (1/m₀ + 1/m₁ + ... + 1/m_k).

That is adaptive weighted rejection sampling (Lipkin et al. 2025, *Fast controlled generation from
language models with adaptive weighted rejection sampling*, arXiv 2504.05410).

There may be at most K rejections. With the last of them the draws end if a token was accepted by
then, else one more is drawn and is dead if it may not follow. Ẑ by the same formula is unbiased
with that too: whatever was rejected, the first token that may follow has the LM's law given that,
and over all k < K, Σ P(k rejected, then one) · Z/m_k = 1 - P(K rejected), while those that come to
K have P(K rejected) · (Z/m₀ + ... + Z/m_K), the last term for those that accept nothing before.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyro.distributions as dist

from langppl.distributions import Text
from langppl.distributions.lmstring import check_ended
from langppl.distributions.sites import naming
from langppl.inference.particles import Crowd, Growing, Particle, carry, followed, is_potential
from langppl.inference.potentials import dead_at, has_prefixes, text_so_far
from langppl.lm.requests import Candidates, DrawReply, perform
from langppl.lm.seeds import generator
from langppl.program import Program
from langppl.program.execution import Execution, Site, score_all
from langppl.program.scheduler import run
from langppl.program.statements import Potential, Unfinished

Draws = Generator[int, bool, tuple[int, float]]
"""Asks of candidates, by their numbers, whether they may follow; returns which is taken, log Ẑ."""


def rejecting(candidates: Candidates, most: int, rng: np.random.Generator) -> Draws:
    """Draws until two candidates may follow, or `most` may not; see the module.

    Args:
        candidates: more than `most`, or all there are.
        most: rejections, K.
        rng: random numbers.

    Returns:
        The number of the first that may follow, of the last that may not if none did, and log Ẑ,
        nats.
    """
    left, masses = candidates.left, np.exp(candidates.log_probs)
    taken: int | None = None
    inverse, rejected, at = 1.0, 0, 0
    while at < len(candidates) and (taken is None or rejected < most):
        in_urn = left[at] + (0.0 if taken is None else masses[taken])
        if taken is not None and rng.random() * in_urn < masses[taken]:
            break
        may_follow = yield at
        at += 1
        if may_follow and taken is not None:
            break
        if may_follow:
            taken = at - 1
            continue
        if rejected == most:
            break  # the last draw of all
        rejected += 1
        rest = left[at] + (0.0 if taken is None else masses[taken])
        if rest > 0.0:
            inverse += 1.0 / rest
    return (at - 1 if taken is None else taken), -math.log(inverse)


def rejecting_beside(candidates: Candidates, most: int) -> Draws:
    """As `rejecting`, for a particle that is held to what follows.

    Given that token, and weighed by Ẑ, what is rejected has the law of draws until one may follow.
    """
    inverse, rejected = 1.0, 0
    for at in range(min(most, len(candidates))):
        if (yield at):
            break
        rejected += 1
        if candidates.left[at + 1] > 0.0:
            inverse += 1.0 / candidates.left[at + 1]
    return rejected, -math.log(inverse)


@dataclass
class Screen:
    """Has the strings of a crowd grow by tokens that may follow.

    Args:
        crowd: the particles.
        most: rejections at each place; 0 to take what is drawn.

    Attributes:
        is_active: whether it has drawn any token.
    """

    crowd: Crowd
    most: int
    is_active: bool = False
    _watched: dict[str, bool] = field(default_factory=dict)
    _known: dict[tuple[int, tuple[int, ...], str, bool], Execution | None] = field(
        default_factory=dict
    )

    def grow(self, stage: int, turn: int, every: int | None) -> None:
        """Draws some more tokens of each string that is not whole; see `Crowd.grow`."""
        crowd = self.crowd
        screened = {
            i
            for i, p in enumerate(crowd.particles)
            if self.most and p.growing is not None and self._is_watched(p.growing.name)
        }
        self.is_active |= bool(screened)
        crowd.grow(stage, turn, every, besides=screened)
        for place in range(every or 0):
            going = [
                (i, p, p.growing)
                for i, p in enumerate(crowd.particles)
                if i in screened and p.growing is not None and not p.growing.is_ended
            ]
            if going:
                self._grow_by_one(going, (crowd.seed, "smc", stage, turn, "screen", place))

    def _is_watched(self, name: str) -> bool:
        if name not in self._watched:
            self._watched[name] = is_watched(self.crowd.program, name)
        return self._watched[name]

    def _grow_by_one(
        self, going: Sequence[tuple[int, Particle, Growing]], key: tuple[int | str, ...]
    ) -> None:
        crowd = self.crowd
        requests = [
            replace(
                g.request,
                key=(*key, i),
                begun=g.ids,
                length=len(g.ids) + 1,
                candidates=self.most + 2,
            )
            for i, _, g in going
            if not _is_full(g)
        ]
        replies = iter(perform(requests))
        draws: dict[int, Draws] = {}
        lined_up: dict[int, Candidates] = {}
        for i, particle, g in going:
            held = crowd.held_by(i)
            reply = DrawReply(g.ids, g.text, 0.0) if _is_full(g) else next(replies)
            assert isinstance(reply, DrawReply)
            if reply.candidates is not None:
                lined_up[i] = reply.candidates
                rng = generator((*key, i, "again"))
                draws[i] = (
                    rejecting(reply.candidates, self.most, rng)
                    if held is None
                    else rejecting_beside(reply.candidates, self.most)
                )
            elif held is not None:
                particle.growing = followed(g, held, 1)
            else:
                # No action is legal, or there is no room for one.
                with naming(g.name):
                    check_ended(g.request, reply)
                particle.growing = replace(g, is_ended=True)
        members = {i: (p, g) for i, p, g in going if i in draws}
        self._known.clear()
        for i, (at, log_accepted) in self._settle(members, draws, lined_up).items():
            particle, g = members[i]
            held = crowd.held_by(i)
            after = followed(g, held, 1) if held is not None else _after(g, lined_up[i].take(at))
            particle.growing = replace(after, log_accepted=g.log_accepted + log_accepted)
            if held is None and not after.is_ended:
                self._bury(particle, after)

    def _settle(
        self,
        members: dict[int, tuple[Particle, Growing]],
        draws: dict[int, Draws],
        lined_up: dict[int, Candidates],
    ) -> dict[int, tuple[int, float]]:
        """Asks of the candidates of all strings, one each at a time, until all draws are done."""
        done: dict[int, tuple[int, float]] = {}
        answers: dict[int, bool | None] = dict.fromkeys(draws)
        while answers:
            asked: dict[int, DrawReply] = {}
            for i, answer in answers.items():
                try:
                    at = next(draws[i]) if answer is None else draws[i].send(answer)
                except StopIteration as end:
                    done[i] = end.value
                else:
                    asked[i] = lined_up[i].take(at)
            found = self._may_follow([(*members[i], reply) for i, reply in asked.items()])
            answers = dict(zip(asked, found, strict=True))
        return done

    def _may_follow(self, asked: Sequence[tuple[Particle, Growing, DrawReply]]) -> list[bool]:
        """Whether nothing says that strings as they would be have no weight."""
        strings = [_after(g, reply) for _, g, reply in asked]
        particles = [p for p, _, _ in asked]
        new = {
            _key(p, s): (p, s)
            for p, s in zip(particles, strings, strict=True)
            if _key(p, s) not in self._known
        }
        executions = run([partial(self._read, *own) for own in new.values()])
        for (particle, _), execution in zip(new.values(), executions, strict=True):
            if execution is not None:
                carry(particle.execution, execution)
        for (_, g), execution in zip(new.values(), executions, strict=True):
            if execution is not None:
                score_all([execution], _is_plain if g.is_ended else is_potential)
        self._known |= zip(new, executions, strict=True)
        return [
            not _is_impossible(self._known[_key(p, s)], s)
            for p, s in zip(particles, strings, strict=True)
        ]

    def _read(self, particle: Particle, g: Growing) -> Execution | None:
        """A run of the model on a string as it would be; None if nothing can be said of it."""
        if g.is_ended:
            # What breaks on a whole text is an error where that is drawn, which it may never be.
            return self.crowd.try_on(particle, g, g.value, forgive=True)
        text = text_so_far(g)
        return None if text is None else self._ask(particle, g, text)

    def _ask(self, particle: Particle, g: Growing, text: Text) -> Execution | None:
        with Unfinished(evaluates=True) as reading:
            execution = self.crowd.try_on(particle, g, text, forgive=True)
        if reading.error is not None:
            raise reading.error
        return execution

    def _bury(self, particle: Particle, g: Growing) -> None:
        """Ends a particle whose last token must not follow, as no other was found."""
        execution = self._known.get(_key(particle, g))
        name = None if execution is None else dead_at(execution)
        if execution is not None and name is not None:
            particle.killed = (name, str(g.text))
            particle.execution = execution
            particle.growing = None


def is_watched(program: Program, name: str) -> bool:
    """Whether a potential with a `prefix` may say something of a latent string."""
    if not has_prefixes(program):
        return False
    if not program.is_static or name not in program.graph:
        return True
    return any(
        name in program.graph.latents_above(s.name)
        for s in program.sites.values()
        if isinstance(s.fn, Potential) and s.fn.has_prefix
    )


def _key(particle: Particle, g: Growing) -> tuple[int, tuple[int, ...], str, bool]:
    # Copies that have not grown apart share their runs.
    return id(particle.execution), g.ids, g.text, g.is_ended


def _after(g: Growing, reply: DrawReply) -> Growing:
    log_q = g.log_q + reply.log_prob
    return replace(g, ids=reply.ids, text=reply.text, log_q=log_q, is_ended=reply.is_ended)


def _is_full(g: Growing) -> bool:
    return g.request.length is not None and len(g.ids) >= g.request.length


def _is_plain(site: Site) -> bool:
    """Whether a site is a factor, whose value is there as soon as it is met."""
    return isinstance(site.fn, dist.Unit)


def _is_impossible(execution: Execution | None, g: Growing) -> bool:
    if execution is None:
        return False
    if not g.is_ended:
        return dead_at(execution) is not None
    return any(_is_plain(s) and s.log_prob == -math.inf for s in execution.sites.values())
