"""A small memory of trajectories that the guide proposes too rarely."""

from __future__ import annotations

from collections.abc import Collection
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


class ReplayBuffer(Generic[T]):
    """The trajectories with the highest importance weights seen so far, no two equal.

    A trajectory that the posterior holds likely and the guide unlikely (log R − log q is high) is
    what on-policy training meets too seldom to learn from. Ranked by the reward alone, the buffer
    would fill with short strings, which have high densities and are proposed often anyway.

    Args:
        capacity: how many to keep.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._items: dict[object, tuple[float, T]] = {}

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._items)

    def add(self, key: object, log_weight: float, item: T) -> None:
        """Keeps a trajectory if its weight is high enough, or renews its weight.

        Args:
            key: equal for equal trajectories.
            log_weight: log R − log q as far as it is known, nats, untempered; −inf is never kept.
            item: the trajectory.
        """
        if log_weight == -np.inf:
            return
        self._items[key] = (log_weight, item)
        if len(self._items) > self.capacity:
            del self._items[min(self._items, key=lambda k: self._items[k][0])]

    def items(self) -> list[tuple[float, T]]:
        """Weights and trajectories, in the order in which they came."""
        return list(self._items.values())

    def sample(self, n: int, rng: np.random.Generator, without: Collection[object] = ()) -> list[T]:
        """Up to n different trajectories, drawn in proportion to their weights.

        Args:
            n: how many.
            rng: random numbers.
            without: keys of trajectories to leave out.
        """
        items = [v for k, v in self._items.items() if k not in without]
        # Gumbel top-k: draws without replacement, each next one in proportion to its weight.
        ranks = np.array([w for w, _ in items]) + rng.gumbel(size=len(items))
        return [items[k][1] for k in np.argsort(-ranks)[:n]]
