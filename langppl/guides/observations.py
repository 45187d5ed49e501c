"""The data of a training, and what is kept for each row of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from langppl.guides import objectives
from langppl.guides.replay import ReplayBuffer
from langppl.guides.trajectories import Draw
from langppl.posterior import Posterior
from langppl.program import Program, compile

WHOLE = -1
"""In the place of an independent piece's number, the program as a whole."""

GivenLatents = Posterior | Sequence[Mapping[str, Any]]


class Observation:
    """One row of the data, and what is kept for it.

    Args:
        model: the model, or its compiled program.
        args: its arguments.
        buffer: what may be replayed.
        latents: given latents to learn from.
        first: the first row of the same model, whose structure this one's is looked for by; None
            for that row itself. It is always the first, as what a program is must not depend on
            which rows were taken before.

    Attributes:
        ready: the guide's own draws that wait for their step.
        given: draws from elsewhere that do; None while they were not looked at.
        again: draws that are given once more when these are used up.
        share: how much its loss counts in a step, 1 where all are taken equally often.
        taken: the step, counted over all calls of `fit`, in which this process took it last, or
            emptied its buffer; −1 for what a checkpoint had, None if there is nothing to keep.
        asleep: what a checkpoint has of it, until it is taken again.
        is_met: whether draws of it were made, of which the first may show that there is nothing to
            learn.
        anchors: for each independent piece of the program, and for all of it under `WHOLE`, power
            of the reward and the estimate of log Z (nats) that given draws are held to.
    """

    def __init__(
        self,
        model: Callable[..., Any] | Program,
        args: tuple[Any, ...],
        buffer: ReplayBuffer[Draw],
        latents: GivenLatents = (),
        first: Observation | None = None,
    ) -> None:
        self.model, self.args, self.buffer, self.latents = model, args, buffer, latents
        self._first = first
        self._program: Program | None = None
        self.share = 1.0
        self.taken: int | None = None
        self.is_met = False
        self.asleep: dict[str, Any] | None = None
        self.ready: list[Draw] = []
        self.given: list[Draw] | None = None
        self.again: list[Draw] = []
        self.anchors: dict[int, tuple[float, float]] = {}

    @property
    def is_visited(self) -> bool:
        """Whether a step has taken it, so that there may be something to keep."""
        return self._program is not None

    @property
    def is_resumed(self) -> bool:
        """Whether a checkpoint had it, and it was not taken since."""
        return self.asleep is not None or (self.is_met and not self.is_visited)

    @property
    def leads(self) -> bool:
        """Whether other rows may be compiled like it."""
        return self._first is None and not isinstance(self.model, Program)

    @property
    def program(self) -> Program:
        """The program, compiled when it is first asked for."""
        if self._program is None:
            own, first = self.model, self._first
            if isinstance(own, Program):
                self._program = own
            else:
                like = None if first is None else first.program
                self._program = compile(own, *self.args, like=like)
        return self._program

    def estimate(
        self,
        piece: int,
        fresh: torch.Tensor,
        everything: torch.Tensor,
        power: float,
        is_given: bool,
        offset: float = 0.0,
    ) -> torch.Tensor:
        """Log Z of a batch less the offset, detached.

        Args:
            piece: number of the independent piece that it is of, or `WHOLE`.
            fresh: log R − log q of the guide's own draws, or of given ones where there are none;
                replayed ones are replayed because theirs is high.
            everything: of all draws, for a batch in which no fresh one is possible.
            power: of the reward.
            is_given: whether these are given draws. The guide leaves them behind as it
                learns from them, and log Z must not follow: it stays what the first batch said.
            offset: what was taken off every log R, nats.
        """
        anchor = self.anchors.get(piece)
        if is_given and anchor is not None and anchor[0] == power:
            return fresh.new_tensor(anchor[1] - offset)
        has_possible = bool(torch.isfinite(fresh).any())
        log_z = objectives.log_evidence(fresh if has_possible else everything)
        if is_given and has_possible:
            self.anchors[piece] = (power, float(log_z) + offset)
        return log_z


@dataclass
class Turn:
    """The draws of one observation in one step.

    Attributes:
        observation: whose they are.
        own: draws that the loss is of; those that log Z is estimated from come first.
        fresh: how many these are.
        simulated: pairs of latents and data from the model itself.
        idle: the guide's own draws whose executions meet no latent of its: there is nothing to
            learn from them, but they are draws.
    """

    observation: Observation
    own: list[Draw]
    fresh: int
    simulated: list[Draw] = field(default_factory=list)
    idle: list[Draw] = field(default_factory=list)

    @property
    def learns_from_given(self) -> bool:
        """Whether log Z would be estimated from given draws."""
        return any(d.is_given for d in self.own[: self.fresh])
