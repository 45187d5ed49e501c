"""The training loop of a GFlowNet guide.

A step takes some observations with some draws each: the guide's own, tempered, replayed, given and
simulated ones. The rewards of all of them come from one packed pass, the policy's log-probabilities
from another, and each observation's loss is its own balance with its own log Z.

An observation belongs to a *slot* of the step, and a slot to one process, so that what is kept for
an observation (draws to replay, draws made ahead) stays in one place; see `langppl.guides.workers`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from langppl.distributions import LMString
from langppl.guides import objectives
from langppl.guides.base import Key
from langppl.guides.heads import FLOW, head_of
from langppl.guides.keeping import Keeper
from langppl.guides.policy import Policy
from langppl.guides.replay import ReplayBuffer
from langppl.guides.schedules import RewardSchedule
from langppl.guides.trajectories import (
    Batch,
    Contexts,
    Draw,
    Found,
    Part,
    key_of,
    log_q,
    make_draws,
    plus,
    policy_scores,
    site_trajectory,
    trajectory,
)
from langppl.guides.validation import Validation, validate
from langppl.guides.workers import Workers
from langppl.lm.decoding import generator
from langppl.posterior import Posterior
from langppl.program import Program, compile, run_together
from langppl.program.scheduler import run
from langppl.progress import bar

if TYPE_CHECKING:
    from langppl.guides.gflownet import GFlowNetGuide

OBJECTIVES = (
    "auto",
    "subtb",
    "db",
    "vargrad",
    "tb",
    "forward_kl",
    "reverse_kl",
    "reward",
    "rws",
    "mle",
)
BALANCE = ("auto", "subtb", "db", "vargrad", "tb")
ON_POLICY = {
    "reverse_kl": objectives.reverse_kl,
    "reward": objectives.reward,
    "rws": objectives.wake,
}
LEAST_NODES = 16
"""Rows of fewer nodes are no remedy for a lack of memory."""
REPLAYED = 16_384
"""Most draws that are kept for replay over all observations."""

T = TypeVar("T")
GivenLatents = Posterior | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What `GFlowNetGuide.fit` was asked for; see there."""

    steps: int
    batch: int
    observations: int
    objective: str
    learning_rate: float
    head_rate: float
    betas: tuple[float, float]
    warmup: int
    clip: float
    lam: float
    schedule: RewardSchedule
    tempered_share: float
    sampling_temperature: float | tuple[float, float]
    replay_share: float
    replay_size: int
    replay_distance: float
    draw_ahead: int
    every: int
    given_share: float
    simulated_share: float
    lengths: Mapping[str, int] | None
    validate_every: int
    validation_samples: int
    patience: int | None
    keep_best: bool
    accumulate: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        at_least_one = {
            k: getattr(self, k)
            for k in (
                "steps",
                "observations",
                "draw_ahead",
                "every",
                "validate_every",
                "validation_samples",
                "accumulate",
                "checkpoint_every",
            )
        }
        for name, value in at_least_one.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.batch < 2:
            raise ValueError(f"need batch >= 2, got batch={self.batch}")
        if not all(0.0 <= b < 1.0 for b in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {self.betas}")
        if not 0.0 < self.given_share <= 1.0:
            raise ValueError(f"given_share must be above 0 and at most 1, got {self.given_share}")
        for name in ("tempered_share", "replay_share", "simulated_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        low, high = self.temperatures
        if not 0.0 < low <= high < math.inf:
            raise ValueError(
                "sampling_temperature must be above 0, or a range (low, high) of such numbers, "
                f"got {self.sampling_temperature}"
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, or None, got {self.patience}")

    @property
    def temperatures(self) -> tuple[float, float]:
        """The range of the sampling temperature."""
        found = self.sampling_temperature
        return found if isinstance(found, tuple) else (found, found)


class Observation:
    """One row of the data, and what is kept for it.

    Args:
        model: the model, or its compiled program.
        args: its arguments.
        buffer: what may be replayed.
        latents: given latents to learn from.

    Attributes:
        ready: the guide's own draws that wait for their step.
        given: draws from elsewhere that do; None while they were not looked at.
        again: draws that are given once more when these are used up.
        anchors: for each independent piece of the program, power of the reward and the estimate of
            log Z (nats) that given draws are held to.
    """

    def __init__(
        self,
        model: Callable[..., Any] | Program,
        args: tuple[Any, ...],
        buffer: ReplayBuffer[Draw],
        latents: GivenLatents = (),
    ) -> None:
        self.model, self.args, self.buffer, self.latents = model, args, buffer, latents
        self._program: Program | None = None
        self.ready: list[Draw] = []
        self.given: list[Draw] | None = None
        self.again: list[Draw] = []
        self.anchors: dict[int, tuple[float, torch.Tensor]] = {}

    @property
    def is_visited(self) -> bool:
        """Whether a step has taken it, so that there may be something to keep."""
        return self._program is not None

    @property
    def program(self) -> Program:
        """The program, compiled when it is first asked for."""
        if self._program is None:
            own = self.model
            self._program = own if isinstance(own, Program) else compile(own, *self.args)
        return self._program

    def estimate(
        self,
        piece: int,
        fresh: torch.Tensor,
        everything: torch.Tensor,
        power: float,
        is_given: bool,
    ) -> torch.Tensor:
        """Log Z of a batch, detached.

        Args:
            piece: number of the independent piece that it is of.
            fresh: log R − log q of the guide's own draws, or of given ones where there are none;
                replayed ones are replayed because theirs is high.
            everything: of all draws, for a batch in which no fresh one is possible.
            power: of the reward.
            is_given: whether these are given draws. The guide leaves them behind as it
                learns from them, and log Z must not follow: it stays what the first batch said.
        """
        anchor = self.anchors.get(piece)
        if is_given and anchor is not None and anchor[0] == power:
            return anchor[1]
        has_possible = bool(torch.isfinite(fresh).any())
        log_z = objectives.log_evidence(fresh if has_possible else everything)
        if is_given and has_possible:
            self.anchors[piece] = (power, log_z)
        return log_z


@dataclass
class Turn:
    """The draws of one observation in one step.

    Attributes:
        observation: whose they are.
        own: draws that the loss is of; those that log Z is estimated from come first.
        fresh: how many these are.
        simulated: pairs of latents and data from the model itself.
    """

    observation: Observation
    own: list[Draw]
    fresh: int
    simulated: list[Draw] = field(default_factory=list)


class Trainer:
    """Trains a guide's adapter and heads.

    Args:
        guide: the guide.
        observations: the data.
        weights: how often each is to be taken, relative to the others; None for equally often.
        settings: what was asked for.
        workers: the processes.
        held_out: observations to validate on.
    """

    def __init__(
        self,
        guide: GFlowNetGuide,
        observations: Sequence[Observation],
        weights: np.ndarray | None,
        settings: Settings,
        workers: Workers,
        held_out: Sequence[Observation],
    ) -> None:
        self.guide, self.settings, self.workers = guide, settings, workers
        self.observations, self.held_out = observations, held_out
        self.lm, self.proposer = guide.lm, guide.proposer
        slots = min(settings.observations, len(observations))
        self.pools = [list(range(len(observations)))[j::slots] for j in range(slots)]
        self.weights = weights
        # Adding an adapter injects new tensors; those of this guide are found by its name.
        self.named = {
            n.replace(f".{guide.adapter}.", "."): p
            for n, p in guide.lm.model.named_parameters()
            if f".{guide.adapter}." in n
        }
        self.optimiser = torch.optim.AdamW(
            list(self.named.values()),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=0.0,
        )
        self._known: set[int] = set()
        self._flow_is_new = False
        self.take_heads()
        self.best: tuple[float, dict[str, torch.Tensor]] | None = None
        self.waited = 0
        self.is_over = False
        self.done = 0
        self._tokens = 0

    # -- weights ------------------------------------------------------------------------------

    def all_named(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's and the heads' weights by name."""
        heads = {f"heads.{n}": p for n, p in self.guide.heads.named_parameters()}
        return {**self.named, **heads}

    def take_heads(self) -> None:
        """Puts heads that are new under the optimiser."""
        new = [p for p in self.guide.heads.parameters() if id(p) not in self._known]
        if new:
            self._known |= {id(p) for p in new}
            self.optimiser.add_param_group({"params": new, "head": True})

    def prepare(self, observations: Sequence[Observation]) -> None:
        """Compiles the programs of observations that are new, and makes the heads they need.

        Raises:
            ValueError: if the guide covers none of a program's latents.
        """
        needed: dict[str, int] = {}
        for observation in observations:
            if observation.is_visited:
                continue
            program = observation.program
            self.guide.check_lm(program)
            self.guide.learned |= self.guide.sites_of(program)
            if self.proposer.heads is not None and self.proposer.numeric is None:
                found = [head_of(program.sites[n].fn) for n in program.latents]
                needed.update(f for f in found if f is not None)
            if self._flows(program):
                needed[FLOW] = 1
        # Every process must have the same heads, whichever observations it takes.
        for several in self.workers.gather([needed]):
            for name, count in sorted(several.items()):
                is_new = self.guide.heads.ensure(name, count)
                self._flow_is_new |= is_new and name == FLOW
        self.guide.heads.to(self.lm.device)
        self.take_heads()

    def _flows(self, program: Program) -> bool:
        """Whether the objective learns flows of a program's states."""
        own = self.settings.objective
        return own == "tb" or (own in ("subtb", "db") and not self._single(program))

    def _single(self, program: Program) -> bool:
        """Whether a program has one latent, an `LMString` of the guide's LM."""
        names = program.latents
        fns = [program.sites[n].fn for n in names]
        return len(names) == 1 and isinstance(fns[0], LMString) and fns[0].lm is self.lm

    # -- the loop -----------------------------------------------------------------------------

    def run(self, keeper: Keeper, progress: bool) -> None:
        """Trains until the steps are done, or validation has stopped improving."""
        guide, settings = self.guide, self.settings
        first = keeper.resume(self)
        self.done = guide.history.rows - first
        if not first:
            keeper.write(self, 0)  # a folder that cannot be written to is found out now
        try:
            with bar("training", settings.steps, progress and self.workers.is_first) as advance:
                advance(first)
                for step in range(first, settings.steps):
                    if self.is_over:
                        break
                    started, self._tokens = time.monotonic(), 0
                    figures = self.step(step)
                    guide.history.add(figures)
                    keeper.report(figures)
                    rate = self._tokens / (time.monotonic() - started)
                    advance(1, text=f"training {_shown(figures, guide.history)} {rate:.0f} tok/s")
                    last = step + 1 == settings.steps or self.is_over
                    if (step + 1) % settings.checkpoint_every == 0 or last:
                        keeper.write(self, step + 1)
        except KeyboardInterrupt:
            warnings.warn(
                f"training was interrupted after {guide.history.rows - self.done} of "
                f"{settings.steps} steps; the guide keeps what it has learned",
                UserWarning,
                stacklevel=3,
            )
        finally:
            keeper.close()
        self._restore_best()

    def step(self, step: int) -> dict[str, float]:
        """One gradient step; returns the figures to report."""
        settings, number = self.settings, self.done + step
        power = settings.schedule.power(step, settings.steps)
        mine = [j for j in range(len(self.pools)) if j % self.workers.count == self.workers.rank]
        chosen = [(j, self.observations[self.pick(j, step)]) for j in mine]
        self.optimiser.zero_grad(set_to_none=True)
        turns = self._turns(chosen, number)
        size = math.ceil(len(turns) / settings.accumulate)
        reported: list[dict[str, float]] = []
        for at in range(0, len(turns), size):
            reported += self._descend_within_memory(turns[at : at + size], number, power)
        rate = learning_rate(step, settings.steps, settings.warmup)
        for group in self.optimiser.param_groups:
            factor = settings.head_rate if group.get("head") else 1.0
            group["lr"] = settings.learning_rate * factor * rate
        heads = [p for _, p in sorted(self.guide.heads.named_parameters())]
        self.workers.add_gradients([*self.named.values(), *heads])
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.named.values()), settings.clip))
        # Apart, as a flow's first errors are many nats and would drown the adapter's gradient.
        of_heads = float(torch.nn.utils.clip_grad_norm_(heads, settings.clip)) if heads else 0.0
        if not math.isfinite(norm + of_heads):
            raise FloatingPointError(
                f"the gradient is {norm} at step {number}; nothing was changed by this step; "
                "lower the learning rate"
            )
        self.optimiser.step()
        figures = {"step": float(number), **_means(self.workers.gather(reported)), "grad": norm}
        if self.held_out and ((step + 1) % settings.validate_every == 0):
            figures.update(self._validate(number))
        return figures

    def pick(self, slot: int, step: int) -> int:
        """Which observation a slot takes in a step."""
        pool, seed = self.pools[slot], self.guide.seed
        if len(pool) == 1:
            return pool[0]
        if self.weights is not None:
            share = self.weights[pool] / self.weights[pool].sum()
            return int(generator((seed, "observation", step, slot)).choice(pool, p=share))
        turn, at = divmod(step, len(pool))
        return int(generator((seed, "order", turn, slot)).permutation(pool)[at])

    # -- draws --------------------------------------------------------------------------------

    def _turns(self, chosen: Sequence[tuple[int, Observation]], number: int) -> list[Turn]:
        """The draws of a step."""
        self.prepare([o for _, o in chosen])
        plans = [self._plan(slot, observation, number) for slot, observation in chosen]
        self._draw_fresh([p for p in plans if p.wanted], number)
        simulated = self._simulate(plans, number)
        turns = []
        for plan, pairs in zip(plans, simulated, strict=True):
            observation = plan.observation
            fresh, observation.ready = observation.ready[: plan.own], observation.ready[plan.own :]
            taken = {d.key for d in (*fresh, *plan.given)}
            rng = generator((self.guide.seed, "replay", number, *plan.suffix))
            replayed = observation.buffer.sample(plan.replayed, rng, taken)
            given = plan.given
            # Those that log Z is estimated from come first.
            if not fresh:
                fresh, given = given, []
            fresh, given = (
                [d for d in draws if all(p.requests(self.lm, None) for p in d.parts)]
                for draws in (fresh, given)
            )
            own = [*fresh, *given, *replayed]
            least = 2 if self.settings.objective in BALANCE else 1
            if self.settings.objective != "forward_kl" and len(own) < least:
                raise ValueError(
                    f"at training step {number}, no draw follows the latents' own rules"
                )
            turns.append(Turn(observation, own, len(fresh), pairs))
            self._tokens += sum(len(d.tokens) for d in (*own, *pairs))
        return turns

    def _plan(self, slot: int, observation: Observation, number: int) -> _Plan:
        settings = self.settings
        self._score_given(observation)
        assert observation.given is not None
        simulated = round(settings.batch * settings.simulated_share)
        if settings.objective == "forward_kl":
            simulated = settings.batch
        room = settings.batch - simulated
        replayed = min(int(settings.batch * settings.replay_share), len(observation.buffer))
        count = max(room - replayed, 0)
        if settings.objective == "mle":
            count = min(count, len(observation.again))
        suffix: Key = (slot,) if slot else ()
        while observation.again and len(observation.given) < count:
            rng = generator((self.guide.seed, "again", number, len(observation.given), *suffix))
            order = rng.permutation(len(observation.again))
            observation.given += [observation.again[k] for k in order]
        taken = min(len(observation.given), math.ceil(count * settings.given_share))
        given = observation.given[:taken]
        observation.given = observation.given[taken:]
        own = count - taken
        wanted = own * settings.draw_ahead if len(observation.ready) < own else 0
        return _Plan(observation, suffix, given, own, replayed, simulated, wanted)

    def _draw_fresh(self, plans: Sequence[_Plan], number: int) -> None:
        """The guide's own draws, some of them from a tempered policy, spread evenly."""
        if not plans:
            return
        share, (low, high) = self.settings.tempered_share, self.settings.temperatures
        seed = self.guide.seed
        policies: list[list[Policy]] = []
        for plan in plans:
            hot = [math.floor((i + 1) * share) > math.floor(i * share) for i in range(plan.wanted)]
            own = []
            for i in range(plan.wanted):
                key = (seed, "train", number, i, *plan.suffix)
                temperature = 1.0
                if hot[i]:
                    spread = generator((*key, "temperature")).random() if high > low else 0.0
                    temperature = low * (high / low) ** spread
                own.append(Policy(self.proposer, plan.observation.program, key, temperature))
            policies.append(own)
        try:
            draws = self.rewards([p.observation.program for p in plans], policies)
        except ValueError as error:
            if " is nan" in str(error):
                raise FloatingPointError(f"at training step {number}, {error}") from error
            raise
        for plan, found, own in zip(plans, draws, policies, strict=True):
            for d, policy in zip(found, own, strict=True):
                d.is_tempered = policy.temperature != 1.0
            plan.observation.ready += found

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
            _check_contexts(contexts)
            takes = self._takes_prefixes(program, contexts) if prefixes is None else prefixes
            known = None if log_joints is None else log_joints[k]
            batches.append(Batch(program, ran, contexts, takes, known, self.settings.every))
        return make_draws(batches)

    def _takes_prefixes(self, program: Program, contexts: Sequence[Contexts]) -> bool:
        """Whether the objective is a balance over prefixes: one latent, a string of this LM."""
        names = {n for c in contexts for n in c}
        single = self._single(program) and names == set(program.latents)
        return single and self.settings.objective in ("auto", "subtb", "db")

    def _score_given(self, observation: Observation) -> None:
        """Latents from elsewhere as draws, scored unless the posterior knows enough."""
        if observation.given is not None:
            return
        given, program = observation.latents, observation.program
        rows = given.samples if isinstance(given, Posterior) else list(given)
        observation.given = []
        if not rows:
            return
        policies = [
            Policy(self.proposer, program, (self.guide.seed, "given", i), 1.0, row)
            for i, row in enumerate(rows)
        ]
        settings = self.settings
        if settings.objective == "mle":
            draws = self._unscored([program] * len(rows), policies)
        else:
            draws = self._scored_given(program, given, rows, policies)
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
            settings.objective == "auto" and self._single(program)
        )
        if (
            isinstance(given, Posterior)
            and settings.schedule.start == 1.0
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
        _check_contexts([p.contexts for p in policies])
        draws = []
        for execution, policy in zip(executions, policies, strict=True):
            parts = [Part(execution.sites[n], ids) for n, ids in policy.contexts.items()]
            draws.append(Draw(key_of(parts, execution), parts, 0.0, 0.0, latents=execution.latents))
        return draws

    def _simulate(self, plans: Sequence[_Plan], number: int) -> list[list[Draw]]:
        """Latents and data from the model itself, as draws of programs that observe the data."""

        def task(plan: _Plan, i: int) -> tuple[dict[str, Any], Program]:
            key = (self.guide.seed, "simulate", number, i, *plan.suffix)
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
        return [[next(draws) for _ in range(plan.simulated)] for plan in plans]

    # -- the loss -----------------------------------------------------------------------------

    def _descend_within_memory(
        self, turns: Sequence[Turn], number: int, power: float
    ) -> list[dict[str, float]]:
        """`_descend`, in smaller rows if the memory does not suffice."""
        named = self.all_named()
        before = {n: None if p.grad is None else p.grad.clone() for n, p in named.items()}
        while True:
            try:
                return self._descend(turns, number, power)
            except RuntimeError as error:
                budget = self.lm.node_budget // 2
                if not _is_out_of_memory(error) or budget < LEAST_NODES:
                    raise
            self.lm.node_budget = budget
            for n, p in named.items():
                p.grad = before[n]
            warnings.warn(
                f"out of memory: training goes on with lm.node_budget = {budget}, half of what it "
                "was",
                UserWarning,
                stacklevel=5,
            )

    def _descend(self, turns: Sequence[Turn], number: int, power: float) -> list[dict[str, float]]:
        """Leaves the gradients of some observations' losses with the weights; their figures."""
        draws = [d for t in turns for d in (*t.own, *t.simulated)]
        scores = policy_scores(draws, self.lm, self.guide.adapter)
        heads = self.guide.heads
        log_qs = [log_q(d, f, heads) for d, f in zip(draws, scores, strict=True)]
        if self._flow_is_new:
            self._start_flow(turns, log_qs)
        reported, losses = [], []
        own_log_qs: list[float] = []
        at = 0
        for turn in turns:
            size, pairs = len(turn.own), len(turn.simulated)
            own = slice(at, at + size)
            others = slice(at + size, at + size + pairs)
            at += size + pairs
            loss = torch.zeros((), device=self.lm.device)
            if size:
                loss = loss + self._loss(turn, scores[own], log_qs[own], power)
            if pairs:
                weight = pairs / self.settings.batch
                total = torch.stack([q.sum() for q in log_qs[others]])
                loss = loss + weight * objectives.likelihood(total)
            if not bool(torch.isfinite(loss)):
                parts = (*turn.own, *turn.simulated)[0].parts
                sites = ", ".join(sorted(p.site.name for p in parts))
                raise FloatingPointError(
                    f"the loss is {float(loss)} at step {number}, sites {sites}"
                )
            losses.append(loss)
            found = [float(q.detach().sum()) for q in log_qs[own]]
            own_log_qs += found
            reported.append(_figures(turn, found, float(loss.detach())))
        (torch.stack(losses).sum() / len(self.pools)).backward()
        if self.settings.replay_share:
            owned = [(t.observation.buffer, d) for t in turns for d in t.own]
            for (buffer, d), q in zip(owned, own_log_qs, strict=True):
                buffer.add(d.key, d.log_reward - q, d, d.tokens)
        return reported

    def _loss(
        self, turn: Turn, scores: Sequence[Found], log_qs: Sequence[torch.Tensor], power: float
    ) -> torch.Tensor:
        """The loss of one observation's draws."""
        objective, draws = self.settings.objective, turn.own
        total = torch.stack([q.sum() for q in log_qs])
        if objective == "mle":
            return objectives.likelihood(total)
        reward = total.new_tensor([plus(d.log_prior, d.log_rest, power) for d in draws])
        if objective in ON_POLICY:
            return ON_POLICY[objective](reward, total)
        if draws[0].ends:
            return self._prefix_loss(turn, scores, power)
        if objective in ("subtb", "db"):
            return self._site_loss(turn, scores, log_qs, power)
        counts = {len(d.pieces) for d in draws}
        if len(counts) > 1 or counts <= {0, 1}:
            return self._balance(turn, 0, reward, total, scores, [0] * len(draws), power)
        losses = []
        for k in range(counts.pop()):
            pieces = [d.pieces[k] for d in draws]
            own = torch.stack([q[p.parts].sum() for q, p in zip(log_qs, pieces, strict=True)])
            reward = own.new_tensor([plus(p.log_prior, p.log_rest, power) for p in pieces])
            first = [p.parts[0] for p in pieces]
            losses.append(self._balance(turn, k, reward, own, scores, first, power))
        return torch.stack(losses).sum()

    def _balance(
        self,
        turn: Turn,
        piece: int,
        reward: torch.Tensor,
        own: torch.Tensor,
        scores: Sequence[Found],
        first: Sequence[int],
        power: float,
    ) -> torch.Tensor:
        """Trajectory balance of one piece; `first`: its first part in each draw."""
        if self.settings.objective == "tb":
            log_z = torch.stack(
                [self._flow(found, k) for found, k in zip(scores, first, strict=True)]
            )
        else:
            gap = reward - own
            is_given = any(d.is_given for d in turn.own[: turn.fresh])
            log_z = turn.observation.estimate(piece, gap[: turn.fresh], gap, power, is_given)
        return objectives.trajectory_balance(reward, own, log_z)

    def _prefix_loss(self, turn: Turn, scores: Sequence[Found], power: float) -> torch.Tensor:
        paths = [trajectory(d, f[0][0], power) for d, f in zip(turn.own, scores, strict=True)]
        log_z = turn.observation.estimate(
            0,
            objectives.root_gaps(paths[: turn.fresh] or paths),
            objectives.root_gaps(paths),
            power,
            any(d.is_given for d in turn.own[: turn.fresh]),
        )
        if self.settings.objective == "db":
            return objectives.detailed_balance(paths, log_z)
        return objectives.subtb(paths, self.settings.lam, log_z)

    def _site_loss(
        self,
        turn: Turn,
        scores: Sequence[Found],
        log_qs: Sequence[torch.Tensor],
        power: float,
    ) -> torch.Tensor:
        paths, roots = [], []
        for d, found, own in zip(turn.own, scores, log_qs, strict=True):
            flows = torch.stack([self._flow(found, k) for k in range(len(d.parts))])
            roots.append(flows[0])
            paths.append(site_trajectory(d, own, flows[1:], power))
        log_z = torch.stack(roots)
        if self.settings.objective == "db":
            return objectives.detailed_balance(paths, log_z)
        return objectives.subtb(paths, self.settings.lam, log_z)

    def _flow(self, found: Found, part: int) -> torch.Tensor:
        """Log flow of the program's state before a part, nats, with gradients."""
        state = found[part][0].state
        assert state is not None
        return self.guide.heads.flow(state)

    def _start_flow(self, turns: Sequence[Turn], log_qs: Sequence[torch.Tensor]) -> None:
        """Lets flows begin at the batch's estimate of log Z, else they learn that number first."""
        self._flow_is_new = False
        gaps, at = [], 0
        for turn in turns:
            own = log_qs[at : at + len(turn.own)]
            at += len(turn.own) + len(turn.simulated)
            gaps += [
                d.log_reward - float(q.detach().sum())
                for d, q in zip(turn.own, own, strict=True)
                if d.log_reward > -math.inf
            ]
        pieces = max((len(d.pieces) for t in turns for d in t.own), default=0)
        everything = self.workers.gather(gaps)
        if everything:
            self.guide.heads.start_flow(float(np.mean(everything)) / max(pieces, 1))

    # -- validation ---------------------------------------------------------------------------

    def _validate(self, number: int) -> dict[str, float]:
        """Figures on held-out observations; keeps the best weights and decides to stop."""
        settings = self.settings
        mine = range(self.workers.rank, len(self.held_out), self.workers.count)
        self.prepare([self.held_out[k] for k in mine])
        own = validate(
            self,
            {k: self.held_out[k].program for k in mine},
            settings.validation_samples,
            settings.temperatures[1] if settings.temperatures[1] > 1.0 else 1.2,
        )
        found = Validation.mean(self.workers.gather(own))
        if self.best is None or found.elbo > self.best[0]:
            weights = {n: p.detach().clone() for n, p in self.all_named().items()}
            self.best, self.waited = (found.elbo, weights), 0
        else:
            self.waited += 1
        self.is_over = settings.patience is not None and self.waited >= settings.patience
        return found.figures()

    def _restore_best(self) -> None:
        if self.best is None or not self.settings.keep_best:
            return
        with torch.no_grad():
            for n, p in self.all_named().items():
                if n in self.best[1]:
                    p.copy_(self.best[1][n])


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


def _figures(turn: Turn, log_qs: list[float], loss: float) -> dict[str, float]:
    untempered = [
        (d.log_reward, q)
        for d, q in zip(turn.own[: turn.fresh], log_qs[: turn.fresh], strict=True)
        if not (d.is_tempered or d.is_given)
    ]
    possible = [(r, q) for r, q in untempered if r > -math.inf]
    return {
        "loss": loss,
        "log_reward": float(np.mean([r for r, _ in possible])) if possible else math.nan,
        "elbo": float(np.mean([r - q for r, q in possible])) if possible else math.nan,
        "impossible": 1.0 - len(possible) / len(untempered) if untempered else math.nan,
    }


def _means(reported: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over observations, of those that have a number."""
    means = {}
    for name in reported[0]:
        known = [r[name] for r in reported if not math.isnan(r[name])]
        means[name] = float(np.mean(known)) if known else math.nan
    return means


def _shown(figures: Mapping[str, float], history: Any) -> str:
    shown = {k: v for k, v in figures.items() if k != "step" and not math.isnan(v)}
    variance = history.latest("val_variance")
    if not math.isnan(variance):
        shown["val_variance"] = variance
    names = ("loss", "log_reward", "elbo", "impossible", "val_elbo", "val_variance")
    return " ".join(f"{k} {shown[k]:.2f}" for k in names if k in shown)


def _check_contexts(contexts: Sequence[Contexts]) -> None:
    if not all(contexts):
        raise ValueError("some executions meet no latent that this guide covers")


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


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator has no error type of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))
