"""A small memory of good trajectories."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


class ReplayBuffer(Generic[T]):
    """The trajectories with the highest rewards seen so far, no two equal.

    Args:
        capacity: how many to keep.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._items: dict[object, tuple[float, T]] = {}

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._items)

    def add(self, key: object, log_reward: float, item: T) -> None:
        """Keeps a trajectory if it is new and good enough.

        Args:
            key: equal for equal trajectories.
            log_reward: nats, untempered; −inf is never kept.
            item: the trajectory.
        """
        if key in self._items or log_reward == -np.inf:
            return
        self._items[key] = (log_reward, item)
        if len(self._items) > self.capacity:
            del self._items[min(self._items, key=lambda k: self._items[k][0])]

    def sample(self, n: int, rng: np.random.Generator) -> list[T]:
        """Up to n different trajectories, uniformly."""
        items = list(self._items.values())
        chosen = rng.permutation(len(items))[:n]
        return [items[k][1] for k in chosen]
