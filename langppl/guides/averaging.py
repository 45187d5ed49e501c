"""The mean of a training's last weights, which has less of the last steps' noise than any of them.

Polyak and Juditsky 1992, *Acceleration of stochastic approximation by averaging*.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_MEAN = "mean "


class Mean:
    """Running means of weights, each over the steps since it was first seen.

    Attributes:
        weights: the means by name.
        counts: of how many steps each is.
    """

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, named: Mapping[str, torch.Tensor]) -> None:
        """Takes the weights of one more step."""
        for name, p in named.items():
            count = self.counts[name] = self.counts.get(name, 0) + 1
            if count == 1:
                self.weights[name] = p.detach().clone()
            else:
                self.weights[name] += (p - self.weights[name]) / count

    @torch.no_grad()
    def put(self, named: Mapping[str, torch.Tensor]) -> None:
        """Sets weights to their means, those that have one."""
        for name, p in named.items():
            if name in self.weights:
                p.copy_(self.weights[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The means as tensors to write."""
        return {f"{_MEAN}{name}": mean for name, mean in self.weights.items()}

    def restore(
        self,
        counts: Mapping[str, int],
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        """Takes over what `tensors` gave, and the counts."""
        self.counts = dict(counts)
        self.weights = {name: tensors[f"{_MEAN}{name}"].to(device) for name in counts}
