"""Work that is done again in smaller passes where memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from langppl.lm.model import LM
from langppl.warn import warn

T = TypeVar("T")

LEAST = 16
"""Passes of fewer tokens are no remedy for a lack of memory."""


class Memory:
    """The token budgets of one training's LMs, halved where memory runs out."""

    def __init__(self) -> None:
        self._first: dict[tuple[LM, str], int] = {}
        self._is_said = False

    def suffices_for(
        self,
        work: Callable[[], T],
        lms: Sequence[LM],
        what: str,
        undo: Callable[[], None] = lambda: None,
        gradients: bool = False,
    ) -> T:
        """The result of some work, done again with half the budgets until memory suffices.

        Args:
            work: may be broken off anywhere; done again, it gives what it would have given.
            lms: those whose passes it runs.
            what: the work, for an error.
            undo: takes back what a work that was broken off has left.
            gradients: whether the memory is that of passes with gradients.

        Raises:
            torch.OutOfMemoryError: if the budgets are as small as they may be.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if not self._halve(lms, gradients):
                    raise torch.OutOfMemoryError(_said_at_last(lms, what, error)) from error
            # Only here, where the error no longer holds the tensors of its frames.
            undo()

    def say(self) -> None:
        """Warns, once in a training, if anything was halved."""
        if self._is_said or not self._first:
            return
        self._is_said = True
        budgets = [
            f"{lm!r}.{name} = {getattr(lm, name)} (it was {was})"
            for (lm, name), was in self._first.items()
        ]
        warn(
            f"out of memory: training goes on in smaller passes, with {', '.join(budgets)}; they "
            "stay like that, and go on being halved where need be without another word",
        )

    def _halve(self, lms: Sequence[LM], gradients: bool) -> bool:
        """Halves what bounds such passes; whether anything could be."""
        is_changed = False
        for lm in lms:
            for name in _bounds(lm, gradients):
                was = getattr(lm, name)
                if was // 2 >= LEAST:
                    self._first.setdefault((lm, name), was)
                    setattr(lm, name, was // 2)
                    is_changed = True
        return is_changed


def _bounds(lm: LM, gradients: bool) -> tuple[str, ...]:
    """The budgets on which the memory of an LM's passes depends."""
    if lm.packs is None:
        return ("token_budget",)
    # Strings that are drawn are bounded by the token budget, packed rows by the others.
    return ("node_budget", "gradient_node_budget") if gradients else ("node_budget", "token_budget")


def _said_at_last(lms: Sequence[LM], what: str, error: RuntimeError) -> str:
    names = ("node_budget", "token_budget")
    budgets = [f"{lm!r}.{name} = {getattr(lm, name)}" for lm in lms for name in names]
    return (
        f"out of memory in {what}, in the smallest passes too ({', '.join(budgets)}): {error}; "
        "take a smaller batch or fewer observations in a step (or accumulate=...), shorter "
        "prompts, or an LM in torch.bfloat16"
    )


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator has no error type of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
