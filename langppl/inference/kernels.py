"""Metropolis–Hastings moves of executions: one latent at a time, many executions at once.

A move chooses one latent site of an execution, evenly, and proposes another value for it, runs the
program with that value and the other latents as they were, and accepts with the probability that
leaves the posterior as it is. Two kinds of moves:

- *site*: the guide proposes the whole value, whatever it was (an independence proposal).
- *tail*, for an `LMString`: the string is cut before one of its actions, chosen evenly, and what
  follows is drawn anew, token by token, from the LM after the guide's context (under the prior:
  the site's own prompt) and by the guide's rules (under a `MaskedGuide`: its mask).

Where the program has other sites with the new value, latents that appear are proposed by the
guide, and latents that vanish would have to be on the way back. For a move from x, which has n
latents, to x', which has n', the acceptance probability is the smaller of 1 and

    p(x') / p(x) · (n / n') · q(back) / q(there),

where q counts the moved value, the latents that appear or vanish and, for tails, the cut: 1/A for
a string of A actions, an ending action included (see `langppl.lm.rules`).

References:
    D. Wingate, A. Stuhlmüller, N. Goodman (2011). Lightweight implementations of probabilistic
    programming languages via transformational compilation. AISTATS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from langppl.defaults import TAIL_SHARE
from langppl.distributions import LMString, StringDistribution
from langppl.guides.base import Guide, Key
from langppl.lm.requests import Reading, ScoreReply, perform
from langppl.lm.rules import Path, Violation
from langppl.lm.seeds import generator
from langppl.program import Program, run_together
from langppl.program.densities import is_outside
from langppl.program.execution import (
    Choice,
    Execution,
    Pause,
    Site,
    draw_prior,
    given,
    is_plain,
    score,
)

MoveKind = Literal["site", "tail"]


@dataclass(frozen=True)
class Moved:
    """What became of a move.

    Attributes:
        execution: where the chain stands now: the proposed execution, scored, or the one before.
        kind: which move.
        site: the latent that it moved.
        log_ratio: log of the acceptance ratio, nats; −inf if the proposal is impossible.
        accepted: whether the proposal was accepted.
    """

    execution: Execution
    kind: MoveKind
    site: str
    log_ratio: float
    accepted: bool


def move(
    program: Program,
    guide: Guide,
    states: Sequence[Execution],
    keys: Sequence[Key],
    tail_share: float = TAIL_SHARE,
    decided: int | None = None,
) -> list[Moved]:
    """Moves one latent of each execution, all at once.

    Each move leaves the program's posterior as it is, so it can follow any other step that does.
    For executions that stop before a latent it leaves exp(log joint) as it is, over those that stop
    after as many latents.

    Args:
        program: the program.
        guide: proposes values; it must have a `scorer`.
        states: scored executions of the program, all possible.
        keys: for each, what the random numbers of its move depend on.
        tail_share: probability that an `LMString` has its tail moved.
        decided: the latents of executions that stop before another one; None for whole ones.

    Returns:
        What became of each.

    Raises:
        ValueError: if an execution is impossible, or has no latent.
    """
    moves = [
        _Move(program, guide, state, key, tail_share, decided)
        for state, key in zip(states, keys, strict=True)
    ]
    proposed = run_together([(program, m.choose) for m in moves], [m.weigh for m in moves])
    return [m.decide(execution) for m, execution in zip(moves, proposed, strict=True)]


class _Move:
    """One proposal: it decides the latents of an execution, and weighs what came of it."""

    def __init__(
        self,
        program: Program,
        guide: Guide,
        state: Execution,
        key: Key,
        tail_share: float,
        decided: int | None,
    ) -> None:
        latents = _latents(state)
        if not latents:
            raise ValueError("there is no latent site to move")
        if not math.isfinite(state.log_joint):
            raise ValueError(f"a move begins at a possible execution, not at {state.latents}")
        if decided is not None and (state.pause is None or len(latents) != decided):
            raise ValueError(f"a move begins at {decided} latents, not at {state.latents}")
        self.decided = decided
        self.program, self.guide, self.state, self.key = program, guide, state, key
        rng = generator((*key, "move"))
        self.site = state.sites[latents[int(rng.integers(len(latents)))]]
        is_tail = rng.random() < tail_share and isinstance(self.site.fn, LMString)
        self.kind: MoveKind = "tail" if is_tail else "site"
        self.place, self.threshold = rng.random(), math.log1p(-rng.random())
        self.log_ratio = -math.inf
        self._kept: set[str] = set()
        self._is_possible = True
        self._cut = 0
        self._read: tuple[Reading | None, str | None] = (None, None)
        self._law: Any = self.site.fn

    def choose(self, name: str, fn: Any, execution: Execution) -> Choice:
        """See `langppl.program.execution.Chooser`."""
        if self.decided is not None and len(_latents(execution)) == self.decided:
            raise Pause(name, fn)
        if name == self.site.name and self.kind == "tail":
            return self._tail(fn, execution)
        old = self.state.sites.get(name)
        is_known = old is not None and old.kind == "latent" and _is_alike(old.fn, fn)
        if name == self.site.name or old is None or not is_known:
            return self.guide.chooser(self.program, self._key_of(name))(name, fn, execution)
        if not _supports(fn, old.value):
            self._is_possible = False
            return draw_prior(fn, (*self._key_of(name), "unused"))
        self._kept.add(name)
        return given({name: old.value})(name, fn, execution)

    def _key_of(self, name: str) -> Key:
        # Its own for each latent: what else a guide draws to propose one is then drawn apart from
        # the others, on the way there and on the way back.
        return (*self.key, name)

    def _tail(self, fn: Any, execution: Execution) -> Choice:
        name = self.site.name
        self._read = self.guide.reads(self.program, name, fn, execution)
        self._law = self.guide.law(self.program, name, fn, execution)
        path = self._law.parse(self.site.value)
        if isinstance(path, Violation):  # the guide would never have come here
            self._is_possible = False
            return draw_prior(fn, (*self._key_of(name), "unused"))
        actions = _actions(path)
        self._cut = int(self.place * actions)
        prompt, adapter = self._read
        begun = path.tokens[: self._cut]
        key = (*self._key_of(name), "tail")
        value, log_q = self._law.draw_on(begun, key, prompt=prompt, adapter=adapter)
        return Choice(value, log_q - math.log(actions))

    def weigh(self, execution: Execution) -> Execution:
        """Scores the proposed execution and finds the acceptance ratio; within the scheduler."""
        for site in execution.sites.values():
            if site.log_prob is None:
                known = _log_prob_before(site, self.state.sites.get(site.name))
                if known is not None:
                    site.learn(known)
        if self.decided is not None and execution.pause is None:
            return execution
        score(execution)
        if self._is_possible and execution.log_joint > -math.inf:
            self.log_ratio = self._ratio(execution)
            if math.isnan(self.log_ratio):
                raise ValueError(f"the acceptance ratio of a move of {self.site.name!r} is nan")
        return execution

    def _ratio(self, execution: Execution) -> float:
        before, after = _latents(self.state), _latents(execution)
        there = [execution.sites[name].log_q for name in after if name not in self._kept]
        back = [self._log_q_back(name, execution) for name in before if name not in self._kept]
        return (
            execution.log_joint
            - self.state.log_joint
            + math.log(len(before))
            - math.log(len(after))
            + math.fsum(back)
            - math.fsum(q for q in there if q is not None)
        )

    def _log_q_back(self, name: str, execution: Execution) -> float:
        """Log-probability (nats) that the way back proposes the value of a latent."""
        site = self.state.sites[name]
        if name == self.site.name and self.kind == "tail":
            return self._tail_back(execution)
        known = self.guide.scorer(self.program, self._key_of(name))
        return known(name, site.fn, site.value, _before(self.state, name))

    def _tail_back(self, execution: Execution) -> float:
        law, name = self._law, self.site.name
        prompt, adapter = self._read
        request = law.request(self.site.value, prompt=prompt, adapter=adapter)
        (reply,) = perform([request])
        assert isinstance(reply, ScoreReply)
        tail = float(reply.tokens[self._cut :].sum() + reply.ending)
        return tail - math.log(_actions(law.parse(execution.sites[name].value)))

    def decide(self, execution: Execution) -> Moved:
        """Accepts or rejects."""
        accepted = self.threshold < self.log_ratio
        now = execution if accepted else self.state
        return Moved(now, self.kind, self.site.name, self.log_ratio, accepted)


def _latents(execution: Execution) -> list[str]:
    return [s.name for s in execution.sites.values() if s.kind == "latent"]


def _log_prob_before(site: Site, old: Site | None) -> float | None:
    """Log-probability (nats) of a string that is as it was, under the distribution that it had."""
    if old is None or not (site.is_string and type(site.fn) is type(old.fn)):
        return None
    if not (is_plain(site.scale, site.mask) and is_plain(old.scale, old.mask)):
        return None
    is_same = site.value == old.value and site.fn.fields() == old.fn.fields()
    # One text may have several spellings in tokens.
    is_same &= getattr(site.value, "ids", None) == getattr(old.value, "ids", None)
    return old.log_prob if is_same else None


def _before(execution: Execution, name: str) -> Execution:
    """An execution up to a site."""
    found = Execution()
    for site in execution.sites.values():
        if site.name == name:
            break
        found.sites[site.name] = site
    return found


def _actions(path: Path) -> int:
    """How many actions made a string."""
    return len(path.tokens) + (path.ending in ("end", "stop"))


def _is_alike(old: Any, new: Any) -> bool:
    """Whether a value of one distribution can stand as it is under another.

    If not, the latent is another one that happens to have the same name: it is proposed anew.
    """
    if isinstance(old, StringDistribution) or isinstance(new, StringDistribution):
        return type(old) is type(new) and old.lm is new.lm
    return _form(old) == _form(new)


def _form(fn: Any) -> tuple[Any, ...]:
    discrete = bool(getattr(fn, "has_enumerate_support", False))
    return type(fn), discrete, tuple(fn.batch_shape), tuple(fn.event_shape)


def _supports(fn: Any, value: Any) -> bool:
    """Whether a number is in a distribution's support; strings are judged when they are scored."""
    return isinstance(fn, StringDistribution) or not is_outside(fn, value)
