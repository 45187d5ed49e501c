"""The training loop of a GFlowNet guide.

A step takes some observations with some draws each: the guide's own, tempered, replayed, given and
simulated ones. The rewards of all of them come from one packed pass, the policy's log-probabilities
from another, and each observation's loss is its own balance with its own log Z.

An observation belongs to a *slot* of the step, and a slot to one process, so that what is kept for
an observation (draws to replay, draws made ahead) stays in one place; see `langppl.guides.workers`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from langppl.guides import objectives
from langppl.guides.averaging import Mean
from langppl.guides.drawing import Drawing
from langppl.guides.heads import FLOW, head_of
from langppl.guides.keeping import Keeper, wake
from langppl.guides.losses import loss_of
from langppl.guides.memory import Memory
from langppl.guides.objectives import Actions
from langppl.guides.observations import Observation, Turn
from langppl.guides.replay import REPLAYED, Shelf
from langppl.guides.settings import Settings, learning_rate
from langppl.guides.trajectories import Found, actions_of, log_q, plus, policy_scores
from langppl.guides.validation import Validation, validate
from langppl.guides.workers import Workers
from langppl.lm.memo import Memo
from langppl.lm.requests import alone, weights_changed
from langppl.lm.seeds import generator
from langppl.program import Program
from langppl.program.program import lms_of
from langppl.program.statements import BadNumber
from langppl.progress import bar
from langppl.warn import warn

if TYPE_CHECKING:
    from langppl.guides.gflownet import GFlowNetGuide
    from langppl.lm.model import LM

Callback = Callable[[dict[str, float]], Any]
"""Told of each step's figures; True ends the training."""

GLIMPSES = 8
"""Rows whose states heads are centred on where a step takes a single one."""


class Trainer:
    """Trains a guide's adapter and heads.

    Args:
        guide: the guide.
        observations: the data.
        weights: how often each is to be taken, relative to the others; None for equally often.
        settings: what was asked for.
        workers: the processes.
        held_out: observations to validate on.

    Attributes:
        lms: those that rows taken so far stand on, by identity.
    """

    _weighted: tuple[int, NDArray[Any], NDArray[Any], float] | None = None
    """Of the last step with weights: its number, the rows' order, its edges, and where it began."""

    def __init__(
        self,
        guide: GFlowNetGuide,
        observations: Sequence[Observation],
        weights: NDArray[Any] | None,
        settings: Settings,
        workers: Workers,
        held_out: Sequence[Observation],
    ) -> None:
        self.guide, self.settings, self.workers = guide, settings, workers
        self.observations, self.held_out = observations, held_out
        self._trained_on = {id(o) for o in observations}
        self.lm = guide.lm
        self.drawing = Drawing(guide.proposer, settings, guide.seed)
        slots = min(settings.observations, len(observations))
        self.pools = [range(j, len(observations), slots) for j in range(slots)]
        self.weights = weights
        self._shelves: list[Shelf] = []
        if sum(o.buffer.capacity for o in observations) > REPLAYED:
            # One for each slot, so that what is kept does not depend on how many processes
            # there are; with weights any slot may take any row.
            count = slots if weights is None else workers.count
            rooms = slots if weights is None else 1
            self._shelves = [Shelf(REPLAYED // count) for _ in range(rooms)]
        if weights is None:
            # One out of a larger pool is taken less often, and counts for more in turn.
            for pool in self.pools:
                for k in pool:
                    observations[k].share = len(pool) * slots / len(observations)
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
        # A permutation of all rows for each row that is taken would be most of a step's time.
        self._orders: dict[int, tuple[int, NDArray[Any]]] = {}
        self.lms: dict[int, LM] = {id(guide.lm): guide.lm}
        self._known: set[int] = set()
        self._prepared: set[int] = set()
        self._flow_is_new = False
        # The guide is told with the first step: one that took none has learned nothing.
        self.learned, self.flows = set(guide.learned), set(guide.flows)
        self.take_heads()
        self.best: tuple[float, dict[str, torch.Tensor]] | None = None
        self.mean = Mean()
        self.memory = Memory()
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
            if id(observation) in self._prepared:
                continue
            self._prepared.add(id(observation))
            with self._aside() if observation.is_resumed else contextlib.nullcontext():
                program = observation.program
                wake(observation)
            for lm in lms_of([program]):
                self.lms.setdefault(id(lm), lm)
            self.guide.check_lm(program)
            if id(observation) in self._trained_on:
                self.note(program)
            proposer = self.drawing.proposer
            if proposer.heads is not None and proposer.numeric is None:
                found = [head_of(program.sites[n].fn) for n in program.latents]
                needed.update(f for f in found if f is not None)
            # Validation asks for no flow: one of a program that is only held out never learns.
            if self._flows(program) and id(observation) in self._trained_on:
                needed[FLOW] = 1
        # Every process must have the same heads and know the same latents, whichever observations
        # it takes.
        for several, learned, flows in self.workers.gather([(needed, self.learned, self.flows)]):
            self.learned |= learned
            self.flows |= flows
            for name, count in sorted(several.items()):
                is_new = self.guide.heads.ensure(name, count)
                self._flow_is_new |= is_new and name == FLOW
        self.guide.heads.to(self.lm.device)
        self.take_heads()

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Within the block, LMs remember no scores that they did not know: it is done once more.

        What a resumed training compiles again it had compiled before its checkpoint, after which
        nothing is remembered; and scores that are remembered move those of a batch's others.
        """
        known = {key: (lm, lm.memo) for key, lm in self.lms.items()}
        for lm, _ in known.values():
            lm.memo = Memo(0)
        try:
            yield
        finally:
            for lm, memo in known.values():
                lm.memo = memo

    def note(self, program: Program) -> None:
        """Keeps what is learned of a program."""
        own = self.guide.sites_of(program)
        self.learned |= own
        if self._flows(program) and self.settings.objective != "tb":
            self.flows |= own

    def hand_over(self) -> None:
        """Tells the guide what it has learned of."""
        self.guide.learned |= self.learned
        self.guide.flows |= self.flows

    def _flows(self, program: Program) -> bool:
        """Whether the objective learns flows of a program's states."""
        own = self.settings.objective
        return own == "tb" or (own in ("subtb", "db") and not self.drawing.is_single(program))

    # -- the loop -----------------------------------------------------------------------------

    # Whoever trains wants gradients, wherever it is called.
    @torch.inference_mode(False)
    @torch.enable_grad()
    def run(self, keeper: Keeper, progress: bool, callback: Callback | None = None) -> None:
        """Trains until the steps are done, or validation or the callback ends it."""
        try:
            self._train(keeper, progress, callback)
        finally:
            keeper.close()
            # As large as the adapter; whoever goes on with it begins with none.
            self.optimiser.zero_grad(set_to_none=True)

    def _train(self, keeper: Keeper, progress: bool, callback: Callback | None) -> None:
        guide, settings = self.guide, self.settings
        guide.was_interrupted = False
        first = keeper.resume(self)
        self.done = guide.history.rows - first
        if first < settings.steps and not self.is_over:
            keeper.check_room(self)
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
                    self.memory.say()
                    guide.history.add(figures)
                    if self._is_validated(step):
                        figures.update(self._validated(step))
                    keeper.report(figures)
                    if callback is not None:
                        said = callback(dict(figures))
                        # Other values, such as a loss that is passed on, end nothing.
                        ends = isinstance(said, bool | np.bool_) and bool(said)
                        if ends and self.held_out and not self._is_validated(step):
                            found = self._validated(step)
                            keeper.report({"step": figures["step"], **found})
                        self.is_over |= ends
                    rate = self._tokens / (time.monotonic() - started)
                    advance(1, text=f"training {_shown(figures, guide.history)} {rate:.0f} tok/s")
                    last = step + 1 == settings.steps or self.is_over
                    if (step + 1) % settings.checkpoint_every == 0 or last:
                        keeper.write(self, step + 1)
        except KeyboardInterrupt:
            guide.was_interrupted = True
            goes_back = settings.keep_best and self.best is not None and not self.mean.counts
            kept = "has the weights that were best in validation"
            kept = kept if goes_back else "keeps what it has learned"
            warn(
                f"training was interrupted after {guide.history.rows - self.done} of "
                f"{settings.steps} steps; the guide {kept}",
            )
        if self.mean.counts:
            self.mean.put(self.all_named())
        else:
            self._restore_best()

    @alone
    def step(self, step: int) -> dict[str, float]:
        """One gradient step; returns the figures to report.

        Raises:
            FloatingPointError: if a reward, a loss or the gradient is not a number; names the step.
        """
        with self._named(step):
            return self._step(step)

    @contextlib.contextmanager
    def _named(self, step: int) -> Iterator[None]:
        """Within the block, an error of a number that is none names the step."""
        try:
            yield
        except BadNumber as error:
            raise FloatingPointError(f"at training step {self.done + step}, {error}") from error

    def _step(self, step: int) -> dict[str, float]:
        settings, number = self.settings, self.done + step
        power = settings.schedule.power(step, settings.steps)
        mine = [j for j in range(len(self.pools)) if j % self.workers.count == self.workers.rank]
        rows = [self.pick(j, number) for j in mine]
        chosen = [(j, self.observations[k]) for j, k in zip(mine, rows, strict=True)]
        for _, observation in chosen:
            observation.taken = number
        self.optimiser.zero_grad(set_to_none=True)
        taken = [o for _, o in chosen]
        self.prepare(taken)
        turns = self.memory.suffices_for(
            lambda: self.drawing.turns(chosen, number), self._lms(taken), "drawing"
        )
        self._tokens += sum(len(d.tokens) for t in turns for d in (*t.own, *t.simulated))
        size = math.ceil(len(turns) / settings.accumulate)
        self.memory.suffices_for(
            lambda: self._start_heads(turns, size), [self.lm], "a gradient", gradients=True
        )
        reported: list[dict[str, float]] = []
        for at in range(0, len(turns), size):
            reported += self._descend_within_memory(turns[at : at + size], number, power)
        self._make_room(rows, number)
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
                f"the norm of the gradient is {norm} of the adapter and {of_heads} of the heads at "
                f"step {number}; nothing was changed by this step; lower the learning rate"
            )
        self.optimiser.step()
        weights_changed()
        self.hand_over()
        if settings.is_averaged(step):
            self.mean.add(self.all_named())
        return {"step": float(number), **_means(self.workers.gather(reported)), "grad": norm}

    def shelf_of(self, row: int) -> Shelf | None:
        """Where a row's buffer has its room; None if there is enough for all rows."""
        return self._shelves[row % len(self._shelves)] if self._shelves else None

    def _make_room(self, rows: Sequence[int], number: int) -> None:
        """Empties the buffers of rows that were not taken for long, where all keep too much."""
        for row in sorted(set(rows)):
            if (shelf := self.shelf_of(row)) is not None:
                shelf.put(row, number, len(self.observations[row].buffer))
        for shelf in self._shelves:
            for row in shelf.crowded_out(number):
                other = self.observations[row]
                other.buffer.clear()
                if other.asleep is not None:
                    other.asleep["buffer"] = []
                # Of rows that any process may take, whoever took one last has what counts.
                if self.weights is None or other.taken != -1:
                    other.taken = number

    def pick(self, slot: int, step: int) -> int:
        """Which observation a slot takes in a step, counted over all calls of `fit`."""
        pool, seed = self.pools[slot], self.guide.seed
        if self.weights is not None:
            # Systematic: each as often as its weight says, and once in a step if that is enough.
            if self._weighted is None or self._weighted[0] != step:
                rng = generator((seed, "observation", step))
                order = rng.permutation(len(self.weights))
                edges = self.weights[order].cumsum() / self.weights.sum()
                self._weighted = step, order, edges, rng.random()
            _, order, edges, start = self._weighted
            point = (start + slot) / len(self.pools)
            chosen = int(np.searchsorted(edges, point, side="right"))
            return int(order[min(chosen, len(order) - 1)])
        if len(pool) == 1:
            return pool[0]
        # A slot keeps to its own rows, so that its process has all their draws.
        turn, at = divmod(step, len(pool))
        if slot not in self._orders or self._orders[slot][0] != turn:
            self._orders[slot] = turn, generator((seed, "order", turn, slot)).permutation(pool)
        return int(self._orders[slot][1][at])

    # -- the loss -----------------------------------------------------------------------------

    def _descend_within_memory(
        self, turns: Sequence[Turn], number: int, power: float
    ) -> list[dict[str, float]]:
        """`_descend`, in smaller rows if the memory does not suffice."""
        named = self.all_named()
        before = {n: None if p.grad is None else p.grad.clone() for n, p in named.items()}

        def undo() -> None:
            for n, p in named.items():
                g = before[n]
                # Backward passes add to it in place, and it may be needed once more.
                p.grad = None if g is None else g.clone()

        return self.memory.suffices_for(
            lambda: self._descend(turns, number, power), [self.lm], "a gradient", undo, True
        )

    def _lms(self, observations: Sequence[Observation]) -> list[LM]:
        """The LMs whose passes the draws of some observations take, and their rewards."""
        others = [lm for lm in lms_of([o.program for o in observations]) if lm is not self.lm]
        return [self.lm, *others]

    def _descend(self, turns: Sequence[Turn], number: int, power: float) -> list[dict[str, float]]:
        """Leaves the gradients of some observations' losses with the weights; their figures."""
        draws = [d for t in turns for d in (*t.own, *t.simulated)]
        with_states = self.settings.objective == "rao_blackwell"
        scores = policy_scores(draws, self.lm, self.guide.adapter, with_states)
        heads = self.guide.heads
        log_qs = [log_q(d, f, heads) for d, f in zip(draws, scores, strict=True)]
        actions = self._actions(turns, scores, log_qs) if with_states else None
        losses: list[torch.Tensor] = []
        own_log_qs: list[list[float]] = []
        # One look at the device for all draws, as each waits for it.
        totals = torch.stack([q.detach().sum() for q in log_qs]).tolist() if log_qs else []
        at = 0
        for turn in turns:
            size, pairs = len(turn.own), len(turn.simulated)
            own = slice(at, at + size)
            others = slice(at + size, at + size + pairs)
            at += size + pairs
            loss = torch.zeros((), dtype=torch.float32, device=self.lm.device)
            if size:
                acted = None if actions is None else [next(actions) for _ in turn.own]
                loss = loss + loss_of(
                    turn, scores[own], log_qs[own], self.settings, heads, power, acted
                )
            if pairs:
                weight = pairs / self.settings.batch
                total = torch.stack([q.sum() for q in log_qs[others]])
                loss = loss + weight * objectives.likelihood(total)
            losses.append(loss)
            own_log_qs.append(totals[own])
        values = torch.stack(losses).detach().tolist()
        for turn, value in zip(turns, values, strict=True):
            if not math.isfinite(value):
                parts = (*turn.own, *turn.simulated)[0].parts
                sites = ", ".join(sorted(p.site.name for p in parts))
                raise FloatingPointError(f"the loss is {value} at step {number}, sites {sites}")
        shares = [t.observation.share for t in turns]
        weighted = [s * loss for s, loss in zip(shares, losses, strict=True)]
        loss = torch.stack(weighted).sum() / len(self.pools)
        if loss.requires_grad:  # not if no draw of the step has a latent of the guide's
            loss.backward()
        if self.settings.replay_share:
            owned = [(t.observation.buffer, d) for t in turns for d in t.own]
            for (buffer, d), q in zip(owned, itertools.chain(*own_log_qs), strict=True):
                buffer.add(d.key, d.log_reward - q, d, d.tokens)
        return [_figures(*found) for found in zip(turns, own_log_qs, values, strict=True)]

    def _actions(
        self, turns: Sequence[Turn], scores: Sequence[Found], log_qs: Sequence[torch.Tensor]
    ) -> Iterator[Actions]:
        """The own draws of all observations action by action, the prior's side in one pass."""
        is_own = [k < len(t.own) for t in turns for k in range(len(t.own) + len(t.simulated))]
        places = [k for k, own in enumerate(is_own) if own]
        draws = [d for t in turns for d in t.own]
        own_scores, own_log_qs = [scores[k] for k in places], [log_qs[k] for k in places]
        return iter(actions_of(draws, own_scores, own_log_qs, self.lm))

    @torch.no_grad()
    def _start_heads(self, turns: Sequence[Turn], size: int) -> None:
        """Centres heads and lets a flow begin where that is due, by all draws of a step.

        Args:
            turns: the draws.
            size: how many turns a backward pass takes; what heads see must not depend on it.
        """
        heads = self.guide.heads
        is_due = len(heads.made) > 0 and not bool(heads.is_centred)
        if not (is_due or self._flow_is_new):
            return
        draws = [
            [d for t in turns[at : at + size] for d in (*t.own, *t.simulated)]
            for at in range(0, len(turns), size)
        ]
        scores = [f for own in draws for f in policy_scores(own, self.lm, self.guide.adapter)]
        if is_due:
            seen = scores
            if len(self.pools) == 1 < len(self.observations):
                # One row does not show how rows differ.
                rows = self.observations[:: math.ceil(len(self.observations) / GLIMPSES)]
                others = self.drawing.glimpses(rows)
                seen = [*scores, *policy_scores(others, self.lm, self.guide.adapter)]
            self._centre(seen)
        if self._flow_is_new:
            flat = itertools.chain.from_iterable(draws)
            self._start_flow(turns, [log_q(d, f, heads) for d, f in zip(flat, scores, strict=True)])

    def _centre(self, scores: Sequence[Found]) -> None:
        """Lets the heads see how the states of a first batch differ."""
        own = [p[0].state for found in scores for p in found]
        states = [s.detach().float().tolist() for s in own if s is not None]
        everything = self.workers.gather(states)
        if everything:
            self.guide.heads.centre_on(torch.tensor(everything, dtype=torch.float32))

    def _start_flow(self, turns: Sequence[Turn], log_qs: Sequence[torch.Tensor]) -> None:
        """Lets flows begin at the batch's estimate of log Z, else they learn that number first.

        Of the whole reward: where a schedule begins at another power, they learn the difference.
        """
        self._flow_is_new = False
        gaps, at = [], 0
        for turn in turns:
            own = log_qs[at : at + len(turn.own)]
            at += len(turn.own) + len(turn.simulated)
            if not self._flows(turn.observation.program):
                continue
            gaps += [
                plus(*d.balanced) - float(q.detach().sum())
                for d, q in zip(turn.own, own, strict=True)
                if plus(*d.balanced) > -math.inf
            ]
        pieces = 0  # of which a flow is; over sites it is of the whole program
        if self.settings.objective == "tb":
            pieces = max((len(d.pieces) for t in turns for d in t.own), default=0)
        everything = self.workers.gather(gaps)
        if everything:
            self.guide.heads.start_flow(float(np.mean(everything)) / max(pieces, 1))

    # -- validation ---------------------------------------------------------------------------

    def _is_validated(self, step: int) -> bool:
        settings = self.settings
        is_due = (step + 1) % settings.validate_every == 0 or step + 1 == settings.steps
        return bool(self.held_out) and is_due

    @alone
    def _validated(self, step: int) -> dict[str, float]:
        """Validates after a step, whose row in the history has the figures too."""
        with self._named(step):
            found = self._validate()
        self.guide.history.amend(found)
        return found

    def _validate(self) -> dict[str, float]:
        """Figures on held-out observations; keeps the best weights and decides to stop."""
        settings = self.settings
        mine = range(self.workers.rank, len(self.held_out), self.workers.count)
        taken = {k: self.held_out[k] for k in mine}
        self.prepare(list(taken.values()))
        programs = {k: o.program for k, o in taken.items()}
        hot = settings.temperatures[1] if settings.temperatures[1] > 1.0 else 1.2
        own = self.memory.suffices_for(
            lambda: validate(self, programs, settings.validation_samples, hot),
            self._lms(list(taken.values())),
            "validation",
        )
        found = Validation.mean(self.workers.gather(own))
        is_better = self.best is None or found.elbo > self.best[0]
        self.waited = 0 if is_better else self.waited + 1
        # While an observation has no possible draw, every bound is −inf: the latest weights count.
        if is_better or (self.best is not None and self.best[0] == -math.inf):
            weights = {n: p.detach().clone() for n, p in self.all_named().items()}
            self.best = found.elbo, weights
        self.is_over = settings.patience is not None and self.waited >= settings.patience
        return found.figures()

    def _restore_best(self) -> None:
        if self.best is None or not self.settings.keep_best:
            return
        with torch.no_grad():
            for n, p in self.all_named().items():
                if n in self.best[1]:
                    p.copy_(self.best[1][n])


def _figures(turn: Turn, log_qs: list[float], loss: float) -> dict[str, float]:
    untempered = [
        (d.log_reward, q)
        for d, q in zip(turn.own[: turn.fresh], log_qs[: turn.fresh], strict=True)
        if not (d.is_tempered or d.is_given)
    ]
    untempered += [(d.log_reward, 0.0) for d in turn.idle if not d.is_tempered]
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
