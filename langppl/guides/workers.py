"""Training in several processes, one a device, under Hugging Face's accelerate.

Each process takes its share of a step's observations, and the gradients are added up. Random
numbers depend on the seed, the step and the observation alone, so several processes do what one
does, up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from langppl.warn import warn

T = TypeVar("T")


class Workers:
    """The processes of a training, as one of them sees them.

    Args:
        accelerator: accelerate's `Accelerator`; made here if None and the process was started by
            `accelerate launch` (or torchrun) together with others.

    Attributes:
        rank: number of this process.
        count: how many there are.
    """

    def __init__(self, accelerator: Any = None) -> None:
        if accelerator is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            accelerator = Accelerator()
        self._accelerator = accelerator
        self.rank: int = 0 if accelerator is None else accelerator.process_index
        self.count: int = 1 if accelerator is None else accelerator.num_processes

    def check(self, device: torch.device) -> None:
        """Looks for what an accelerator was asked for and cannot have here.

        Warns of mixed precision and of gradient accumulation, which training takes from elsewhere.

        Args:
            device: where the LM is.

        Raises:
            ValueError: if the accelerator is on another device.
        """
        own = self._accelerator
        there = getattr(own, "device", None)
        if there is not None and not _is_same(torch.device(there), device):
            raise ValueError(
                f"the accelerator of process {self.rank} is on {there}, and the LM on {device}; "
                "make the LM where the process is: LM(name, device=accelerator.device)"
            )
        if not self.is_first:
            return
        precision = str(getattr(own, "mixed_precision", "no"))
        if precision != "no":
            _warn(
                f"mixed_precision={precision!r} has no effect: training computes in the LM's own "
                "type; for less memory make LM(name, dtype=torch.bfloat16)"
            )
        passes = getattr(own, "gradient_accumulation_steps", 1)
        if passes > 1:
            _warn(
                f"gradient_accumulation_steps={passes} has no effect: each step of the training "
                f"changes the weights; to spread one over passes give fit(accumulate={passes})"
            )

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def gather(self, own: Sequence[T]) -> list[T]:
        """The items of all processes, in the order of their ranks; each gets all."""
        if self.count == 1:
            return list(own)
        from accelerate.utils import gather_object

        # accelerate adds lists up, and takes an empty one for no answer.
        found: list[list[T]] = gather_object([list(own)])
        return [item for items in found for item in items]

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replaces each gradient by the sum of all processes' gradients, None if none has one."""
        if self.count == 1:
            return
        # Zeros in the place of none would let the optimiser move weights that took no part.
        has_one = [p.grad is not None for p in parameters]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.reshape(-1).float() for p in parameters if p.grad is not None])
        flat = torch.cat([flat, flat.new_tensor(has_one)])
        flat = self._accelerator.reduce(flat, reduction="sum")
        has_one = (flat[-len(parameters) :] > 0.0).tolist()
        at = 0
        for p, is_needed in zip(parameters, has_one, strict=True):
            assert p.grad is not None
            p.grad.copy_(flat[at : at + p.numel()].reshape(p.shape))
            at += p.numel()
            if not is_needed:
                p.grad = None

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()


def _is_same(one: torch.device, two: torch.device) -> bool:
    """Whether two devices are one; without a number, "cuda" may be any."""
    return one.type == two.type and (None in (one.index, two.index) or one.index == two.index)


def _warn(message: str) -> None:
    warn(f"the accelerator's {message}")
