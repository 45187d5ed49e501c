"""A small memory of trajectories that the guide proposes too rarely."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")

REPLAYED = 16_384
"""Most draws that are kept for replay over all observations."""


class ReplayBuffer(Generic[T]):
    """The trajectories with the highest importance weights seen so far, no two equal.

    A trajectory that the posterior holds likely and the guide unlikely (log R − log q is high) is
    what on-policy training meets too seldom to learn from. Ranked by the reward alone, the buffer
    would fill with short strings, which have high densities and are proposed often anyway.

    With a `distance` above 0 no two that are kept are nearly equal either: variations of one good
    string would crowd out the rest. (The code of Hu et al. 2024, arXiv 2310.04363, keeps its buffer
    apart by edit distance too.) Two trajectories of different keys are near-duplicates if at most
    `distance` times the longer one's length edits (insertions, deletions and substitutions of
    tokens: Levenshtein) turn one into the other. Of these the one with the higher weight stays; of
    equal weights, the one that came first. Being near is not transitive: what was refused for the
    sake of one that is replaced later does not return.

    Args:
        capacity: how many to keep.
        distance: share of the longer one's tokens, at least 0 and below 1; with 0 only equal keys
            count as the same.

    Raises:
        ValueError: for a distance out of range.
    """

    def __init__(self, capacity: int, distance: float = 0.0) -> None:
        if not 0.0 <= distance < 1.0:
            raise ValueError(f"distance must be at least 0 and below 1, got {distance}")
        self.capacity = capacity
        self._distance = distance
        self._items: dict[object, tuple[float, T]] = {}
        self._tokens: dict[object, tuple[int, ...]] = {}

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._items)

    def add(self, key: object, log_weight: float, item: T, tokens: Sequence[int] = ()) -> None:
        """Keeps a trajectory if its weight is high enough, or renews its weight.

        Args:
            key: equal for equal trajectories.
            log_weight: log R − log q as far as it is known, nats, untempered; −inf is never kept.
            item: the trajectory.
            tokens: its token ids, equal for equal keys; a trajectory without any is compared with
                none.
        """
        if log_weight == -np.inf:
            return
        # A renewed one has the tokens that it had, so it is as far from the others as before.
        if self._distance and key not in self._items:
            tokens = tuple(tokens)
            rivals = self._rivals(log_weight, tokens)
            if rivals is None:
                return
            for rival in rivals:
                self._drop(rival)
            self._tokens[key] = tokens
        self._items[key] = (log_weight, item)
        if len(self._items) > self.capacity:
            self._drop(min(self._items, key=lambda k: self._items[k][0]))

    def _rivals(self, log_weight: float, tokens: tuple[int, ...]) -> list[object] | None:
        """Keys of the near-duplicates that a new one replaces; None if it is not to be kept."""
        # Imported here, since a buffer that compares nothing does not need it.
        from rapidfuzz.distance import Levenshtein

        ranked = sorted(((w, k) for k, (w, _) in self._items.items()), key=lambda pair: -pair[0])
        # It would be the first to be removed, so its neighbours need not be looked for.
        if ranked and len(ranked) >= self.capacity and log_weight < ranked[-1][0]:
            return None
        rivals: list[object] = []
        if not tokens:
            return rivals
        for weight, key in ranked:
            other = self._tokens[key]
            limit = int(self._distance * max(len(tokens), len(other)))
            if Levenshtein.distance(tokens, other, score_cutoff=limit) <= limit:
                if weight >= log_weight:
                    return None
                rivals.append(key)
        return rivals

    def clear(self) -> None:
        """Forgets all."""
        self._items.clear()
        self._tokens.clear()

    def _drop(self, key: object) -> None:
        del self._items[key]
        self._tokens.pop(key, None)

    def items(self) -> list[tuple[float, T]]:
        """Weights and trajectories, in the order in which they came.

        Added in this order to a new buffer like this one, they make an equal one.
        """
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


class Shelf:
    """Which of many rows have something in their buffers, for which there is so much room.

    Args:
        most: trajectories that may be kept for all rows together.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._rows: dict[int, tuple[int, int]] = {}
        self._total = 0

    def put(self, row: int, step: int, size: int) -> None:
        """Notes how much a row has that a step has taken; steps come in their order."""
        if row in self._rows:
            self._total -= self._rows.pop(row)[1]
        if size:
            self._rows[row] = step, size
            self._total += size

    def crowded_out(self, step: int) -> list[int]:
        """Rows whose buffers are to be emptied, those that were not taken for longest.

        What the step itself has taken stays, even if it is too much.
        """
        gone = []
        while self._total > self.most:
            row, (taken, size) = next(iter(self._rows.items()))
            if taken >= step:
                break
            del self._rows[row]
            self._total -= size
            gone.append(row)
        return gone

    def taken(self, row: int) -> int | None:
        """The step that took a row last; None if it has nothing."""
        return self._rows[row][0] if row in self._rows else None
