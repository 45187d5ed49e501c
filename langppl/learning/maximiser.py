"""The M step: gradient steps that raise the expected log joint over trainable adapters.

The steps are AdamW's, and a round of them need not raise the expectation over all draws (a long
step may overshoot, a small batch may point elsewhere). It is looked at before and after; where it
fell, the round is taken back half the way, and again, and at last altogether. So each round does
what a generalised EM step must (Dempster, Laird, Rubin 1977): with exact posteriors the likelihood
never falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from langppl.learning.likelihood import Factor, Views, ascend, expected
from langppl.learning.settings import Settings
from langppl.lm.requests import alone, weights_changed
from langppl.lm.seeds import generator

HALVINGS = 5
"""How often a round that lowered the expectation is halved before it is taken back."""
_ROUNDING = 1e-5
"""Nats for each observation that are no fall: scores differ so much from batch to batch."""


class Maximiser:
    """Fits trainable adapters; its optimiser goes on from round to round.

    Args:
        views: the views that are fitted.
        settings: what was asked for.
        seed: of the order in which observations are taken.

    Attributes:
        named: the weights that are fitted, by name.
        done: gradient steps so far.
    """

    def __init__(self, views: Views, settings: Settings, seed: int) -> None:
        self.views, self.settings, self.seed = views, settings, seed
        self.named = {
            f"{k} {view.label} {name}": p
            for k, view in enumerate(views.values())
            for name, p in view.named_parameters.items()
        }
        self.optimiser = torch.optim.AdamW(
            list(self.named.values()),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.done = 0
        self._order: tuple[tuple[int, int], NDArray[Any]] | None = None

    # Whoever fits wants gradients, wherever it is called.
    @alone
    @torch.inference_mode(False)
    @torch.enable_grad()
    def run(
        self, every: Sequence[Sequence[Factor]], advance: Callable[[int], None]
    ) -> dict[str, float]:
        """One M step.

        Args:
            every: for each observation that has possible draws, its weighted factors.
            advance: told of gradient steps that are done.

        Returns:
            `objective`: the expectation before, a mean over observations, nats; `gain`: by how
            much it rose; `kept`: the share of the steps' way that was kept; `grad`: the last norm
            of the gradient.

        Raises:
            FloatingPointError: if the gradient is not finite; that step changes nothing.
        """
        before = {n: p.detach().clone() for n, p in self.named.items()}
        flat = [f for own in every for f in own]
        objective = expected(flat) / len(every)
        grad = math.nan
        for _ in range(self.settings.steps):
            grad = self._step(every)
            advance(1)
        kept, gain = self._settle(flat, len(every), before, objective)
        return {"objective": objective, "gain": gain, "kept": kept, "grad": grad}

    def _step(self, every: Sequence[Sequence[Factor]]) -> float:
        chosen = self._chosen(len(every))
        self.optimiser.zero_grad(set_to_none=True)
        ascend([f for k in chosen for f in every[k]], 1.0 / len(chosen))
        norm = float(torch.nn.utils.clip_grad_norm_(self.named.values(), self.settings.clip))
        if not math.isfinite(norm):
            self.optimiser.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"the gradient of the M step is {norm} after {self.done} steps; that step changed "
                "nothing; lower the learning rate"
            )
        self.optimiser.step()
        weights_changed()
        self.optimiser.zero_grad(set_to_none=True)
        self.done += 1
        return norm

    def _chosen(self, count: int) -> list[int]:
        """The observations of a step: each as often as the others, in an order of its own."""
        size = min(self.settings.observations, count)
        chosen = []
        for at in range(self.done * size, (self.done + 1) * size):
            turn, place = divmod(at, count)
            # As many rows have possible draws in one round as in another, or more, or less.
            if self._order is None or self._order[0] != (turn, count):
                order = generator((self.seed, "em", "order", turn)).permutation(count)
                self._order = (turn, count), order
            chosen.append(int(self._order[1][place]))
        return sorted(chosen)

    def _settle(
        self,
        flat: Sequence[Factor],
        count: int,
        before: dict[str, torch.Tensor],
        objective: float,
    ) -> tuple[float, float]:
        """Keeps so much of the round that the expectation did not fall: the share, and the gain."""
        share = 1.0
        for _ in range(HALVINGS + 1):
            gain = expected(flat) / count - objective
            if gain >= -_ROUNDING:
                return share, gain
            share /= 2
            with torch.no_grad():
                for name, p in self.named.items():
                    p.copy_((p + before[name]) / 2)
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(before[name])
        # What it remembers of these steps would lead there again.
        self.optimiser.state.clear()
        return 0.0, 0.0
