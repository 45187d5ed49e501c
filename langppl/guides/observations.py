"""The data of a training, and what is kept for each row of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from langppl.guides import objectives
from langppl.guides.replay import ReplayBuffer
from langppl.guides.trajectories import Draw
from langppl.posterior import Posterior
from langppl.program import Program, compile

Model = Callable[..., Any] | Program
GivenLatents = Posterior | Sequence[Mapping[str, Any]]


def pairs_of(model: Any, data: Any) -> list[tuple[Model, list[tuple[Any, ...]]]]:
    """Each model with the rows of its data.

    Args:
        model: a model function, a compiled `Program`, or a list of such programs and of
            (model, data) pairs.
        data: a sequence, or a `Dataset` of torch or Hugging Face, of the model's arguments: tuples
            of them, or mappings from their names.

    Raises:
        TypeError: for data that are no such sequence or do not fit the model, or are given besides
            what has its own.
        ValueError: for no data.
    """
    if isinstance(model, list | tuple):
        if data is not None:
            raise TypeError("a list of (model, data) pairs has its data already; give none")
        if not model:
            raise ValueError("give at least one (model, data) pair")
        pairs = [(own, None) if isinstance(own, Program) else own for own in model]
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise TypeError(
                    f"each program must be a (model, data) pair or a Program, got {pair!r}"
                )
        return [found for m, d in pairs for found in pairs_of(m, d)]
    if isinstance(model, Program):
        if data is not None:
            raise TypeError("a compiled Program has its arguments already; give no data")
        return [(model, [()])]
    return [(model, [()] if data is None else arguments_of_rows(model, data))]


def arguments_of_rows(model: Callable[..., Any], data: Any) -> list[tuple[Any, ...]]:
    """The model's arguments in each row of its data, in its order.

    Args:
        model: a model function.
        data: a sequence, or a `Dataset`, which need not be iterable; see `pairs_of`.

    Raises:
        TypeError: for data that are no such sequence, or a row that does not fit the model.
        ValueError: for no data.
    """
    if isinstance(data, Mapping):
        raise TypeError(
            "data must be a sequence of tuples of the model's arguments, got a mapping; of columns "
            "make rows: list(zip(*columns.values()))"
        )
    try:
        rows = [data[i] for i in range(len(data))]
    except TypeError as error:
        raise TypeError(
            f"data must be a sequence (or a Dataset) of tuples of the model's arguments, got "
            f"a {type(data).__name__}"
        ) from error
    if not rows:
        raise ValueError("data is empty: give at least one tuple of the model's arguments")
    return [_arguments_of(model, row) for row in rows]


def _arguments_of(model: Callable[..., Any], row: Any) -> tuple[Any, ...]:
    if isinstance(row, tuple | list):
        return tuple(row)
    if not isinstance(row, Mapping):
        raise TypeError(
            f"each observation must be a tuple of the model's arguments, or a mapping from their "
            f"names, got {row!r}"
        )
    signature = inspect.signature(model)
    try:
        bound = signature.bind(**row)
    except TypeError as error:
        raise TypeError(
            f"an observation with {', '.join(map(repr, row))} does not fit the model's arguments "
            f"{signature}: {error}; leave out what is none of them"
        ) from error
    if bound.kwargs:
        # Defaults stand before an argument that is given.
        bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(
            f"the model takes {', '.join(map(repr, bound.kwargs))} by keyword alone, and a "
            "program's arguments are given by place; make it an ordinary argument"
        )
    return bound.args


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
        share: how much its loss counts in a step, 1 where all are taken equally often.
        taken: the step, counted over all calls of `fit`, in which this process took it last; −1 for
            what a checkpoint had, None if there is nothing to keep.
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
        self.share = 1.0
        self.taken: int | None = None
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

    @property
    def learns_from_given(self) -> bool:
        """Whether log Z would be estimated from given draws."""
        return any(d.is_given for d in self.own[: self.fresh])
