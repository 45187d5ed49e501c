"""What potentials say of strings while they grow.

A potential is a function of text, so it is asked of the text so far wherever that is whole
characters, also where the rules let no string end. What a plain one says of a part is a twist: −inf
may be of a text that is not finished, so it is passed over. What a `prefix` says is final, and a
particle of which it says −inf is dead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial

from langppl.distributions import Text
from langppl.inference.particles import Crowd, Growing, Particle, View, carry, is_potential
from langppl.program import Program
from langppl.program.execution import Execution, score_all
from langppl.program.scheduler import run
from langppl.program.statements import Potential, Unfinished


def has_potentials(program: Program) -> bool:
    """Whether a program has potentials."""
    return any(isinstance(s.fn, Potential) for s in program.sites.values())


def has_prefixes(program: Program) -> bool:
    """Whether a program has potentials with a `prefix`."""
    return any(isinstance(s.fn, Potential) and s.fn.has_prefix for s in program.sites.values())


def read_potentials(crowd: Crowd) -> None:
    """Renews what the potentials say of each unfinished string; see `Growing.potentials`.

    Raises:
        ValueError: if the text that a particle is held to begins with what has no weight.
        Exception: what a `prefix` raised.
    """
    runs: dict[tuple[int, tuple[int, ...]], tuple[Particle, Growing, Text]] = {}
    keys: dict[int, tuple[int, tuple[int, ...]]] = {}
    for particle, g in crowd.growing():
        text = None if g.is_ended else text_so_far(g)
        if text is not None:
            # Copies that have not grown apart share their run.
            key = (id(particle.execution), g.ids)
            runs.setdefault(key, (particle, g, text))
            keys[id(particle)] = key
    found = dict(
        zip(runs, run([partial(_read, crowd, *own) for own in runs.values()]), strict=True)
    )
    for key, execution in found.items():
        if execution is not None:
            carry(runs[key][0].execution, execution)
    score_all([e for e in found.values() if e is not None], is_potential)
    for i, particle in enumerate(crowd.particles):
        execution = found.get(keys[id(particle)]) if id(particle) in keys else None
        if execution is None or particle.growing is None:
            continue
        dead = dead_at(execution)
        if dead is None and execution.error is not None:
            continue  # broken on a text that is not finished, and nothing in it is final
        if dead is None:
            particle.growing = particle.growing.reading(_view(execution, particle.growing))
            continue
        if crowd.held_by(i) is not None:
            raise ValueError(
                f"potential {dead!r}: prefix gives -inf of {str(particle.growing.text)!r}, which a "
                "possible text begins with; let fn be -inf of such texts too, or prefix finite"
            )
        # It is dead at the text that killed it, which is what its sample shows.
        particle.killed = (dead, str(particle.growing.text))
        particle.execution = execution
        particle.growing = None


def text_so_far(g: Growing) -> Text | None:
    """None inside of a character."""
    try:
        text = g.fn.lm.vocabulary.join(g.ids).decode("utf-8")
    except UnicodeDecodeError:
        return None
    return Text(text, g.ids, g.fn.lm.fingerprint)


def _read(crowd: Crowd, particle: Particle, g: Growing, text: Text) -> Execution | None:
    with Unfinished(evaluates=True) as reading:
        # What a prefix has killed is dead, whatever the model makes of the text afterwards.
        execution = crowd.try_on(particle, g, text, forgive=True)
    if reading.error is not None:
        raise reading.error
    return execution


def dead_at(execution: Execution) -> str | None:
    """The potential whose −inf is final, if there is one."""
    for site in execution.sites.values():
        if is_potential(site) and site.fn.has_prefix and site.log_prob == -math.inf:
            return site.name
    return None


def _view(execution: Execution, g: Growing) -> View:
    before = {} if g.potentials is None else g.potentials.factors
    factors: dict[str, float] = {}
    lacking: set[str] = set()
    others = False
    for site in execution.sites.values():
        if not is_potential(site):
            others = others or (site.kind in ("observed", "factor") and site.log_prob is None)
        elif site.log_prob is not None and site.log_prob > -math.inf:
            factors[site.name] = site.log_prob
        elif site.name in before:
            factors[site.name] = before[site.name]
        else:
            lacking.add(site.name)
    return View(factors, execution.pause is None and not others, frozenset(lacking))


class Passed:
    """Counts how often potentials without `prefix` were −inf of whole strings."""

    def __init__(self) -> None:
        self.met: Counter[str] = Counter()
        self.impossible: Counter[str] = Counter()

    def count(self, crowd: Crowd, before: dict[int, set[str]]) -> None:
        """Counts the sites that particles have met since.

        Args:
            crowd: the particles, scored.
            before: for the identity of each particle that moved, the sites that it had met.
        """
        for particle in crowd.particles:
            known = before.get(id(particle))
            if known is None:
                continue
            for site in particle.execution.sites.values():
                if site.name in known or not is_potential(site) or site.fn.has_prefix:
                    continue
                self.met[site.name] += 1
                self.impossible[site.name] += site.log_prob == -math.inf

    @property
    def notes(self) -> tuple[str, ...]:
        """For each potential that was −inf of most strings, why that did not steer them."""
        return tuple(
            f"potential {name!r} was -inf of {self.impossible[name]} of {met} whole strings, and "
            "where it was -inf of unfinished ones it did not count, as they might have become "
            "possible; if they could not, give it prefix=True, or a prefix of its own"
            for name, met in self.met.items()
            if self.impossible[name] > met / 2
        )


def killing_notes(particles: Sequence[Particle]) -> tuple[str, ...]:
    """For each potential whose `prefix` has killed particles, where most are dead by one."""
    dead = [p.killed for p in particles if p.killed is not None]
    if len(dead) <= len(particles) / 2:
        return ()
    examples = dict(reversed(dead))
    counts = Counter(name for name, _ in dead)
    return tuple(
        f"potential {name!r}: its prefix was -inf of "
        f"{'all' if count == len(particles) else f'{count} of {len(particles)}'} strings begun, "
        f"e.g. {examples[name]!r}"
        for name, count in counts.most_common()
    )
