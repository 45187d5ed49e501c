"""Where a step's draws come from: the guide, a tempered guide, replay, given latents, the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from langppl.distributions import LMString
from langppl.guides.base import Key
from langppl.guides.observations import GivenLatents, Observation, Turn
from langppl.guides.policy import Policy, Proposer, RewardedPolicy
from langppl.guides.settings import BALANCE, LEAST_NEW, Settings
from langppl.guides.trajectories import Batch, Contexts, Draw, Part, key_of, make_draws
from langppl.lm.seeds import generator
from langppl.posterior import Posterior
from langppl.program import Program, run_together
from langppl.program.scheduler import run

LEAST_GIVEN = 256
"""Draws of a posterior that maximum likelihood learns from, or as many as it has."""


class Drawing:
    """Makes the draws of a training.

    Args:
        proposer: what the guide proposes with.
        settings: what was asked for.
        seed: of all random numbers.
    """

    def __init__(self, proposer: Proposer, settings: Settings, seed: int) -> None:
        self.proposer, self.settings, self.seed = proposer, settings, seed
        self.lm = proposer.lm

    def is_single(self, program: Program) -> bool:
        """Whether a program has one latent, an `LMString` of the guide's LM."""
        names = program.latents
        fns = [program.sites[n].fn for n in names]
        return len(names) == 1 and isinstance(fns[0], LMString) and fns[0].lm is self.lm

    def turns(self, chosen: Sequence[tuple[int, Observation]], number: int) -> list[Turn]:
        """The draws of a step; after an error the observations have what they had."""
        before = [(o, o.ready[:], None if o.given is None else o.given[:]) for _, o in chosen]
        try:
            return self._turns(chosen, number)
        except BaseException:
            # Done again, as where memory ran out, it takes the same draws.
            for observation, ready, given in before:
                observation.ready, observation.given = ready, given
            raise

    def _turns(self, chosen: Sequence[tuple[int, Observation]], number: int) -> list[Turn]:
        plans: list[_Plan] = []
        # With weights a row may have several slots of a step, and draws that wait serve one.
        waiting: dict[int, int] = {}
        for slot, observation in chosen:
            ready = waiting.get(id(observation), len(observation.ready))
            plans.append(plan := self._plan(slot, observation, number, ready))
            waiting[id(observation)] = ready + plan.wanted - plan.own
        self._draw_fresh([p for p in plans if p.wanted], number)
        simulated = self._simulate(plans, number)
        turns = []
        for plan, pairs in zip(plans, simulated, strict=True):
            observation = plan.observation
            drawn, observation.ready = observation.ready[: plan.own], observation.ready[plan.own :]
            fresh, idle = [d for d in drawn if d.parts], [d for d in drawn if not d.parts]
            if idle and not fresh and not observation.is_met:
                self._check_meets(observation.program, number)
            observation.is_met = True
            taken = {d.key for d in (*fresh, *plan.given)}
            rng = generator((self.seed, "replay", number, *plan.suffix))
            replayed = observation.buffer.sample(plan.replayed, rng, taken)
            given = plan.given
            # Those that log Z is estimated from come first.
            if not fresh:
                fresh, given = given, []
            if idle and len(fresh) < LEAST_NEW:
                replayed = []
            own = [*fresh, *given, *replayed]
            least = 2 if self.settings.objective in BALANCE else 1
            if self.settings.objective != "forward_kl" and len(own) < least and not idle:
                raise ValueError(
                    f"at training step {number}, no draw follows the latents' own rules"
                )
            turns.append(Turn(observation, own, len(fresh), pairs, idle))
        return turns

    def _check_meets(self, program: Program, number: int) -> None:
        """Raises ValueError if a program is not known to have a latent that the guide covers."""
        if not any(self.proposer.covers(program.sites[n].fn) for n in program.latents):
            raise ValueError(
                f"at training step {number}, no execution meets a latent that this guide covers: "
                f"the program's are {', '.join(program.latents) or 'none'}, and it covers strings "
                f'of {self.lm!r} and, with numeric="head", numbers of some families'
            )

    def _plan(self, slot: int, observation: Observation, number: int, ready: int) -> _Plan:
        settings = self.settings
        self._score_given(observation)
        assert observation.given is not None
        simulated = round(settings.batch * settings.simulated_share)
        if settings.objective == "forward_kl":
            simulated = settings.batch
        room = settings.batch - simulated
        replayed = min(int(settings.batch * settings.replay_share), len(observation.buffer))
        replayed = max(min(replayed, room - LEAST_NEW), 0)
        count = max(room - replayed, 0)
        if settings.objective == "mle":
            count = min(count, len(observation.again))
        suffix: Key = (slot,) if slot else ()
        while observation.again and len(observation.given) < count:
            rng = generator((self.seed, "again", number, len(observation.given), *suffix))
            order = rng.permutation(len(observation.again))
            observation.given += [observation.again[k] for k in order]
        taken = min(len(observation.given), math.ceil(count * settings.given_share))
        given = observation.given[:taken]
        observation.given = observation.given[taken:]
        own = count - taken
        wanted = own * settings.draw_ahead if ready < own else 0
        return _Plan(observation, suffix, given, own, replayed, simulated, wanted)

    def _draw_fresh(self, plans: Sequence[_Plan], number: int) -> None:
        """The guide's own draws, some of them from a tempered policy, spread evenly."""
        if not plans:
            return
        low, high = self.settings.temperatures
        seed = self.seed
        policies: list[list[Policy]] = []
        for plan in plans:
            hot = self._hot(plan, number)
            own = []
            for i in range(plan.wanted):
                key = (seed, "train", number, i, *plan.suffix)
                temperature = 1.0
                if hot[i]:
                    spread = generator((*key, "temperature")).random() if high > low else 0.0
                    temperature = low * (high / low) ** spread
                own.append(Policy(self.proposer, plan.observation.program, key, temperature))
            policies.append(own)
        draws = self.rewards([p.observation.program for p in plans], policies)
        for plan, found, own in zip(plans, draws, policies, strict=True):
            for d, policy in zip(found, own, strict=True):
                d.is_tempered = policy.temperature != 1.0
            plan.observation.ready += found

    def _hot(self, plan: _Plan, number: int) -> list[bool]:
        """Which of the draws that are made are tempered.

        The share is of the batch, and of what is not drawn too: where it makes less than a draw,
        some steps have one.
        """
        size = self.settings.batch * self.settings.tempered_share
        found: list[bool] = []
        for step in range(number, number + plan.wanted // max(plan.own, 1)):
            count = _whole(size * (step + 1)) - _whole(size * step)
            count = min(count, plan.own)
            found += [(i + 1) * count // plan.own > i * count // plan.own for i in range(plan.own)]
        return found

    def rewards(
        self,
        programs: Sequence[Program],
        policies: Sequence[Sequence[Policy]],
        prefixes: bool | None = None,
        log_joints: Sequence[Sequence[float] | None] | None = None,
    ) -> list[list[Draw]]:
        """Runs programs under policies and scores what came out, all at once.

        Args:
            programs: the programs.
            policies: for each, one policy for each run.
            prefixes: whether to take the rewards of prefixes; None for what the objective needs.
            log_joints: for each program, log joints that are known.
        """
        executions = iter(
            run_together(
                [(program, p) for program, own in zip(programs, policies, strict=True) for p in own]
            )
        )
        batches = []
        for k, (program, own) in enumerate(zip(programs, policies, strict=True)):
            contexts = [p.contexts for p in own]
            ran = [next(executions) for _ in own]
            takes = self._takes_prefixes(program, contexts) if prefixes is None else prefixes
            known = None if log_joints is None else log_joints[k]
            batches.append(Batch(program, ran, contexts, takes, known, self.settings.every))
        return make_draws(batches)

    def glimpses(self, observations: Sequence[Observation]) -> list[Draw]:
        """A draw of each of some rows without its reward, which shows what the policy reads."""
        programs = [o.program for o in observations]
        policies = [
            Policy(self.proposer, program, (self.seed, "glimpse", k))
            for k, program in enumerate(programs)
        ]
        return self._unscored(programs, policies)

    def _takes_prefixes(self, program: Program, contexts: Sequence[Contexts]) -> bool:
        """Whether the objective is a balance over prefixes: one latent, a string of this LM."""
        if not self.is_single(program) or self.settings.objective not in ("auto", "subtb", "db"):
            return False
        # A rare string may lead to further latents, after it.
        return all(next(iter(c), None) == program.latents[0] for c in contexts)

    def _score_given(self, observation: Observation) -> None:
        """Latents from elsewhere as draws, scored unless the posterior knows enough."""
        if observation.given is not None:
            return
        given, program = observation.latents, observation.program
        rows = given.samples if isinstance(given, Posterior) else list(given)
        if (
            isinstance(given, Posterior)
            and self.settings.objective == "mle"
            and np.ptp(given.weights) > 0.0
        ):
            # Every draw counts alike there, and this posterior's do not.
            drawn = given.resample(max(given.num_samples, LEAST_GIVEN), seed=self.seed)
            rows = [{n: v for n, v in row.items() if n in given.sites} for row in drawn]
        observation.given = []
        if not rows:
            return
        settings = self.settings
        if settings.objective == "mle":
            policies = [
                Policy(self.proposer, program, (self.seed, "given", i), 1.0, row)
                for i, row in enumerate(rows)
            ]
            draws = self._unscored([program] * len(rows), policies)
        else:
            rewarded = [
                RewardedPolicy(self.proposer, program, (self.seed, "given", i), 1.0, row)
                for i, row in enumerate(rows)
            ]
            draws = self._scored_given(program, given, rows, rewarded)
            draws = [d for d, p in zip(draws, rewarded, strict=True) if p.is_proposable]
        # Of an execution that meets no latent of the guide's there is nothing to learn.
        met = [d for d in draws if d.parts]
        if draws and not met:
            if settings.objective == "mle":
                raise ValueError(
                    f"none of the {len(rows)} given draws has a latent that this guide covers, the "
                    f"first is { {k: str(v) for k, v in rows[0].items()} }"
                )
            return
        draws = [d for d in met if all(p.is_drawable(self.lm) for p in d.parts)]
        if not draws:
            raise ValueError(
                f"none of the {len(rows)} given draws follows the latents' own rules, the first is "
                f"{ {k: str(v) for k, v in rows[0].items()} }"
            )
        for d in draws:
            d.is_given = True
        observation.given = draws
        observation.again = list(draws) if settings.objective == "mle" else []

    def _scored_given(
        self,
        program: Program,
        given: GivenLatents,
        rows: Sequence[Mapping[str, Any]],
        policies: Sequence[Policy],
    ) -> list[Draw]:
        settings = self.settings
        names = program.latents
        alone = all(self.proposer.covers(program.sites[n].fn) for n in names) and all(
            set(row) == set(names) for row in rows
        )
        known: list[float] | None = None
        whole = settings.objective in ("auto", "vargrad", "tb") and not (
            settings.objective == "auto" and self.is_single(program)
        )
        if (
            isinstance(given, Posterior)
            and settings.schedule.is_plain
            and alone
            and whole
            and len(program.graph.independent()) == 1
        ):
            known = None if given.log_joint is None else [float(v) for v in given.log_joint]
            _check_same_program(program, rows, known)
        return self.rewards([program], [policies], log_joints=[known])[0]

    def _unscored(self, programs: Sequence[Program], policies: Sequence[Policy]) -> list[Draw]:
        """Draws of given latents whose reward does not matter."""
        executions = run_together(list(zip(programs, policies, strict=True)))
        draws = []
        for execution, policy in zip(executions, policies, strict=True):
            parts = [Part(execution.sites[n], ids) for n, ids in policy.contexts.items()]
            draws.append(Draw(key_of(parts, execution), parts, 0.0, 0.0, latents=execution.latents))
        return draws

    def _simulate(self, plans: Sequence[_Plan], number: int) -> list[list[Draw]]:
        """Latents and data from the model itself, as draws of programs that observe the data."""

        def task(plan: _Plan, i: int) -> tuple[dict[str, Any], Program]:
            key = (self.seed, "simulate", number, i, *plan.suffix)
            return plan.observation.program.simulated(key, self.settings.lengths)

        wanted = [(plan, i) for plan in plans for i in range(plan.simulated)]
        if not wanted:
            return [[] for _ in plans]
        pairs = run([partial(task, p, i) for p, i in wanted])
        policies = [
            Policy(self.proposer, program, ("simulated", i), 1.0, latents)
            for i, (latents, program) in enumerate(pairs)
        ]
        draws = iter(self._unscored([program for _, program in pairs], policies))
        found = [[next(draws) for _ in range(plan.simulated)] for plan in plans]
        return [[d for d in own if d.parts] for own in found]


@dataclass
class _Plan:
    """What one observation needs in a step: so many draws of each kind."""

    observation: Observation
    suffix: Key
    given: list[Draw]
    own: int
    replayed: int
    simulated: int
    wanted: int


def _whole(number: float) -> int:
    """The whole part, of a product that may have lost its last bits."""
    return math.floor(number + 1e-6)


def _check_same_program(
    program: Program, rows: Sequence[Mapping[str, Any]], log_joints: Sequence[float] | None
) -> None:
    """Raises ValueError if the first possible row has another log joint under the program."""
    for row, known in zip(rows, log_joints or (), strict=bool(log_joints)):
        if known > -math.inf:
            found = float(program.log_joint(row))
            # Wide enough for half precision in batches of another shape.
            if not abs(found - known) <= 0.5 + 0.01 * abs(known):
                raise ValueError(
                    f"the given posterior is of another program or other observations: its sample "
                    f"{ {k: str(v) for k, v in row.items()} } has log joint {known:.3f} there and "
                    f"{found:.3f} here; give its samples instead, to have them scored"
                )
            return
