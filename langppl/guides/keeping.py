"""What of a training goes to files: checkpoints to go on from, and TensorBoard's scalars."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from langppl.distributions import StringDistribution
from langppl.guides import checkpoints
from langppl.guides.heads import specification_of
from langppl.guides.history import History
from langppl.guides.trajectories import Draw, from_records, to_record
from langppl.lm import adapters
from langppl.lm.counts import as_count, as_number
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.program.program import lms_of

if TYPE_CHECKING:
    from langppl.guides.observations import Observation
    from langppl.guides.settings import Settings
    from langppl.guides.training import Trainer


_RECORDED = (
    "settings",
    "history",
    "heads",
    "observations",
    "met",
    "leads",
    "learned",
    "flows",
    "best",
    "averaged",
    "waited",
    "is_over",
)
"""What a record holds."""


class Keeper:
    """Writes what a training asks it to.

    What a checkpoint does not hold depends on the seed and the step alone: random numbers are
    counter-based.

    Args:
        checkpoint: folder of checkpoints, None for none.
        tensorboard: folder of TensorBoard's files, None for none.
        is_first: whether this process is the one that writes these.

    Raises:
        ImportError: if TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None,
        tensorboard: str | os.PathLike[str] | None,
        is_first: bool = True,
    ) -> None:
        self.folder = None if checkpoint is None else checkpoints.place(checkpoint)
        self._is_first = is_first
        self._claim: checkpoints.Claim | None = None
        self._digests: dict[str, str] = {}
        self._writer: Any = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoard is not installed: pip install 'langppl[tensorboard]'"
                ) from error
            if is_first:
                self._writer = SummaryWriter(str(checkpoints.place(tensorboard)))

    def report(self, figures: Mapping[str, float]) -> None:
        """Passes a step's figures on."""
        if self._writer is None:
            return
        for name, value in figures.items():
            if name != "step" and not math.isnan(value):
                self._writer.add_scalar(f"langppl/{name}", value, int(figures["step"]))

    def close(self) -> None:
        """Flushes what was written, and leaves the folder to others."""
        if self._claim is not None:
            self._claim.release()
        if self._writer is not None:
            self._writer.close()

    def write(self, trainer: Trainer, step: int) -> None:
        """Writes the state after so many steps.

        Raises:
            OSError: if the folder cannot be written to.
        """
        if self.folder is None:
            return
        _forget_scores(trainer)
        own = [(k, _state_of(trainer, k)) for k in _owned(trainer)]
        visited = sorted(trainer.workers.gather(own), key=lambda pair: pair[0])
        leads = [k for k, o in enumerate(trainer.observations) if o.leads and o.is_visited]
        leads = sorted(set(trainer.workers.gather(leads)))
        if trainer.workers.is_first:
            tensors = checkpoints.state_of(trainer.all_named(), trainer.optimiser)
            for n, b in trainer.guide.heads.named_buffers():
                tensors[f"buffer {n}"] = b
            best = None
            if trainer.best is not None:
                best, weights = trainer.best
                tensors.update({f"best {n}": w for n, w in weights.items()})
            tensors.update(trainer.mean.tensors())
            record = {
                "settings": self._described(trainer),
                "history": dict(trainer.guide.history),
                "heads": trainer.guide.heads.specification,
                # Most rows of a long training have nothing that is still kept.
                "observations": {str(k): state for k, state in visited if state is not None},
                "met": [k for k, _ in visited],
                "leads": leads,
                "learned": sorted(trainer.learned),
                "flows": sorted(trainer.flows),
                "best": best,
                "averaged": trainer.mean.counts,
                "waited": trainer.waited,
                "is_over": trainer.is_over,
            }
            checkpoints.write(self.folder, step, record, tensors)
        trainer.workers.wait()

    def check_room(self, trainer: Trainer) -> None:
        """Looks whether the disk has room for the checkpoints that come.

        The first has no moments yet, so a disk that takes it may be too small for the others.

        Raises:
            OSError: if it has not.
        """
        if self.folder is None or not trainer.workers.is_first:
            return
        weights = sum(p.numel() * p.element_size() for p in trainer.all_named().values())
        # Each with its two moments; the best of a validation, and the mean of the last.
        copies = 3 + bool(trainer.held_out) + bool(trainer.settings.average)
        checkpoints.check_room(self.folder, copies * weights)

    def resume(self, trainer: Trainer) -> int:
        """Reads the newest checkpoint, if there is one; returns the steps done.

        Raises:
            ValueError: if it is of another training, or damaged; nothing has changed then.
            OSError: if another training is writing to the folder.
        """
        if self.folder is None:
            return 0
        self._take(trainer)
        found = checkpoints.read(self.folder)
        _forget_scores(trainer)
        if found is None:
            return 0
        return self._restored(trainer, *found)

    def _take(self, trainer: Trainer) -> None:
        """Claims the folder for all processes, of which the first does so.

        Raises:
            OSError: if another training has it, in each of them: none is to wait for the others.
        """
        assert self.folder is not None
        said: list[str] = []
        if self._is_first:
            try:
                self._claim = checkpoints.Claim(self.folder)
            except OSError as error:
                said = [str(error.strerror)]
        for reason in trainer.workers.gather(said):
            raise OSError(errno.EBUSY, reason, str(self.folder))

    def _restored(
        self,
        trainer: Trainer,
        step: int,
        record: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
    ) -> int:
        assert self.folder is not None
        checkpoints.check_whole(self.folder, record, _RECORDED)
        checkpoints.check_same(
            self.folder, record["settings"], self._described(trainer), "training"
        )
        guide = trainer.guide
        with checkpoints.checking(self.folder, "training"):
            heads = _check(trainer, step, record, tensors)
            history = History(record["history"])
            states = {int(k): state for k, state in record["observations"].items()}
        guide.heads.keep_only(heads)
        for name, count in heads.items():
            guide.heads.ensure(name, count)
        guide.heads.to(trainer.lm.device)
        trainer.take_heads()
        named = trainer.all_named()
        with torch.no_grad():
            for n, b in guide.heads.named_buffers():
                b.copy_(tensors[f"buffer {n}"])
        checkpoints.restore(named, trainer.optimiser, tensors)
        if record["best"] is not None:
            device = trainer.lm.device
            weights = {n: tensors[f"best {n}"].to(device) for n in named if f"best {n}" in tensors}
            trainer.best = (record["best"], weights)
        trainer.mean.restore(record["averaged"], tensors, trainer.lm.device)
        trainer.waited, trainer.is_over = record["waited"], record["is_over"]
        guide.history = history
        trainer.learned |= set(record["learned"])
        trainer.flows |= set(record["flows"])
        for k in record["met"]:
            trainer.observations[k].taken, trainer.observations[k].is_met = -1, True
        for k in record["leads"]:
            # Before scores are forgotten: others are compiled like it, now or later.
            _ = trainer.observations[k].program
        for k, state in states.items():
            trainer.observations[k].asleep = state
        kept = [(s["since"], k) for k, s in states.items() if s["since"] is not None]
        for since, k in sorted(kept):
            if (shelf := trainer.shelf_of(k)) is not None:
                shelf.put(k, since, len(states[k]["buffer"]))
        if step:
            trainer.hand_over()
        _forget_scores(trainer)
        return step

    def _described(self, trainer: Trainer) -> dict[str, Any]:
        """All that two runs must have in common for one to go on with the other."""
        settings: Settings = trainer.settings
        first = trainer.observations[0].program
        if not self._digests:
            self._digests = {
                "data": checkpoints.digest(
                    [checkpoints.plain(_row_of(o)) for o in trainer.observations]
                ),
                "given": checkpoints.digest([_latents(o.latents) for o in trainer.observations]),
                "validation": checkpoints.digest(
                    [checkpoints.plain(_row_of(o)) for o in trainer.held_out]
                ),
                "model": checkpoints.digest(checkpoints.form_of(first)),
            }
        observed = [[n, str(s.value)] for n, s in first.sites.items() if s.kind == "observed"]
        described = {
            **dataclasses.asdict(settings),
            "seed": trainer.guide.seed,
            "base": trainer.lm.weights_fingerprint,
            **self._digests,
            "alpha": trainer.lm.model.peft_config[trainer.guide.adapter].lora_alpha,
            "context": checkpoints.name_of(trainer.guide.context),
            "numeric": checkpoints.plain(trainer.guide.numeric),
            "observations": [settings.observations, len(trainer.observations), observed],
            "sites": sorted(first.sites),
            "tensors": {n: list(p.shape) for n, p in trainer.named.items()},
        }
        if own := _adapters(first):
            described["adapters"] = checkpoints.digest(own)
        if (guidance := trainer.guide.guidance) is not None:
            named = None if guidance.without is None else checkpoints.name_of(guidance.without)
            described["guidance"] = [guidance.scale, named]
        if trainer.weights is not None:
            described["weights"] = trainer.weights.tolist()
        found: dict[str, Any] = json.loads(json.dumps(described))
        return found


def _check(
    trainer: Trainer, step: int, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, int]:
    """Checks all that a resumed training takes over; returns the heads it is to have.

    Raises:
        Exception: of the kinds that `checkpoints.checking` knows, if something cannot be so.
    """
    heads = specification_of(record["heads"])
    expected = trainer.guide.heads.expected(heads)
    buffers = {n for n, _ in trainer.guide.heads.named_buffers()}
    named: dict[str, torch.Tensor] = dict(trainer.named)
    named |= {f"heads.{n}": t for n, t in expected.items() if n not in buffers}
    more = {f"buffer {n}": expected[n] for n in buffers}
    if record["best"] is not None:
        as_number("best", record["best"])
        more |= {f"best {n}": p for n, p in named.items() if f"best {n}" in tensors}
    for name, count in record["averaged"].items():
        as_count(f"the steps of the mean of {name!r}", count, 1)
        more[f"mean {name}"] = named[name]
    checkpoints.check_tensors(tensors, named, more)
    if step > trainer.settings.steps:
        raise ValueError(f"its step is {step}, of {trainer.settings.steps}")
    if History(record["history"]).rows < step:
        raise ValueError(f"its history ends before step {step}")
    as_count("waited", record["waited"], 0)
    if not isinstance(record["is_over"], bool):
        raise ValueError(f"is_over is {record['is_over']!r}")
    for what in ("learned", "flows"):
        names = record[what]
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{what} must be a list of names, got {names!r}")
    states = {int(k): state for k, state in record["observations"].items()}
    for k in (*record["met"], *record["leads"], *states):
        if as_count("a row's number", k, 0) >= len(trainer.observations):
            raise ValueError(f"it has a row {k}, and there are {len(trainer.observations)}")
    for k, state in states.items():
        _check_row(k, state)
    return heads


def _check_row(number: int, state: Any) -> None:
    """Raises an exception if this is nothing that `wake` can take over."""
    lists = [state[what] for what in ("contexts", "buffer", "ready", "again", "anchors")]
    if state["given"] is not None:
        lists.append(state["given"])
    if not all(isinstance(own, list) for own in lists):
        raise ValueError(f"row {number} has no lists of draws")
    draws = []
    for weight, draw in state["buffer"]:
        as_number("a draw's weight", weight)
        draws.append(draw)
    for draw in (*draws, *state["ready"], *state["again"], *(state["given"] or ())):
        for place in draw["contexts"].values():
            if as_count("a context's number", place, 0) >= len(state["contexts"]):
                raise ValueError(f"row {number} has no context {place}")
    for piece, power, log_z in state["anchors"]:
        as_count("a piece's number", piece, -1)
        as_number("a power", power)
        as_number("log Z", log_z)
    if state["since"] is not None:
        as_count("a row's last step", state["since"], -1)


def _owned(trainer: Trainer) -> list[int]:
    """The rows whose state this process has: after a resume all have one, and most grow old."""
    workers = trainer.workers
    taken = [
        (k, o.taken, workers.rank)
        for k, o in enumerate(trainer.observations)
        if o.taken is not None
    ]
    newest: dict[int, tuple[int, int]] = {}
    for k, step, rank in workers.gather(taken):
        if k not in newest or step > newest[k][0]:
            newest[k] = step, rank
    return [k for k, (_, rank) in newest.items() if rank == workers.rank]


def _forget_scores(trainer: Trainer) -> None:
    """A resumed run remembers no scores, and a batch's others move a score's last bits."""
    own = [o.program for o in trainer.observations if o.leads and o.is_visited]
    for lm in (*trainer.lms.values(), *lms_of(own)):
        lm.memo.clear()


def _row_of(observation: Observation) -> Any:
    """What tells a row of the data from others: of a compiled program, what it observes too."""
    own = observation.model
    if not isinstance(own, Program):
        return observation.args
    return own.shown_args, {n: own.sites[n].value for n in own.observed}


def _adapters(program: Program) -> list[bytes]:
    """The states of the adapters that a program's own sites stand on, as trainable views do."""
    fns = [s.fn for s in program.sites.values() if isinstance(s.fn, StringDistribution)]
    return [adapters.digest(fn.lm.model, fn.adapter) for fn in fns if fn.adapter is not None]


def _latents(given: Any) -> list[Any]:
    rows = given.samples if isinstance(given, Posterior) else given
    return [sorted((k, repr(checkpoints.plain(v))) for k, v in row.items()) for row in rows]


def _state_of(trainer: Trainer, row: int) -> dict[str, Any] | None:
    """What is kept for a row; None if that is nothing."""
    observation = trainer.observations[row]
    shelf = trainer.shelf_of(row)
    state = observation.asleep
    if state is None:
        state = {"contexts": (contexts := _Contexts()).records}
        state["buffer"] = [[w, contexts.record(d)] for w, d in observation.buffer.items()]
        state["ready"] = [contexts.record(d) for d in observation.ready]
        given = observation.given if len(observation.latents) else None
        state["given"] = None if given is None else [contexts.record(d) for d in given]
        state["again"] = [contexts.record(d) for d in observation.again]
        state["anchors"] = [[k, p, z] for k, (p, z) in observation.anchors.items()]
    state["since"] = None if shelf is None else shelf.taken(row)
    has_any = any(state[what] for what in ("buffer", "ready", "again", "anchors"))
    return state if has_any or state["given"] is not None else None


class _Contexts:
    """The contexts of a row's draws, most of which are one and the same."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self._places: dict[Any, int] = {}

    def record(self, draw: Draw) -> dict[str, Any]:
        """A draw with the places of its contexts."""
        record = to_record(draw)
        for part in draw.parts:
            name = part.site.name
            if part.context not in self._places:
                self._places[part.context] = len(self.records)
                self.records.append(record["contexts"][name])
            record["contexts"][name] = self._places[part.context]
        return record


def wake(observation: Observation) -> None:
    """Takes over what a checkpoint has of a row, which waits until the row is taken again."""
    state, observation.asleep = observation.asleep, None
    if state is None:
        return

    def draws_of(records: Sequence[Mapping[str, Any]]) -> list[Draw]:
        found = [
            {**r, "contexts": {n: state["contexts"][k] for n, k in r["contexts"].items()}}
            for r in records
        ]
        return from_records(observation.program, found)

    try:
        _take_over(observation, state, draws_of)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"the checkpoint's draws of a row are of another training, or damaged: {error}; give "
            "another folder"
        ) from error


def _take_over(
    observation: Observation,
    state: Mapping[str, Any],
    draws_of: Callable[[Sequence[Mapping[str, Any]]], list[Draw]],
) -> None:
    draws = draws_of([d for _, d in state["buffer"]])
    for (weight, _), draw in zip(state["buffer"], draws, strict=True):
        observation.buffer.add(draw.key, weight, draw, draw.tokens)
    observation.ready = draws_of(state["ready"])
    if state["given"] is not None:
        observation.given = draws_of(state["given"])
    observation.again = draws_of(state["again"])
    for k, power, log_z in state["anchors"]:
        observation.anchors[int(k)] = (float(power), float(log_z))
