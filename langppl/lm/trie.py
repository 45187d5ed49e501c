"""Token tries: many sequences laid out so that no common prefix is computed twice.

Sequences are sorted, so that what two of them share stands between them too, and written down
depth first: a node is followed by all that lies below it. Node j is then above node i (or is i)
if and only if j ≤ i < `below[j]`, which gives the attention mask of a whole row in one comparison.
A set of sequences is cut into rows of a bounded number of nodes, because dense attention grows
with the square of a row; what all rows have in common, the *stem*, is left out of them. Where that
would still have much run again and again (long sequences of which some have long starts in
common), each row goes on from the path at which the one before was cut off.

    >>> layout = lay_out([(1, 2, 3), (1, 2, 4)], node_budget=8)
    >>> layout.stem, layout.rows[0].ids.tolist(), layout.rows[0].paths
    ((), [1, 2, 3, 4], {0: array([0, 1, 2]), 1: array([0, 1, 3])})
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_STEM = 8
"""Fewest common first tokens that are worth a pass of their own."""

MOST_AGAIN = 1.5
"""Tokens that rows may run for each distinct one before they are made to go on from each other:
that costs copies of keys and values, and with gradients memory for these."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """Nodes to run together, depth first.

    Attributes:
        ids: token of each node, shape [n].
        depth: its place in its sequences, the stem counted in, shape [n].
        below: one past the last node below it, shape [n].
        paths: for each of the row's sequences, by its number, the nodes of its tokens after the
            stem.
        carried: how many of the nodes, the first ones, are run in the row before, all on one path.
        handed: the nodes that are carried into the next row.
    """

    ids: NDArray[Any]
    depth: NDArray[Any]
    below: NDArray[Any]
    paths: dict[int, NDArray[Any]]
    carried: int = 0
    handed: NDArray[Any] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def mask(self, stem: int) -> NDArray[Any]:
        """Which positions each node that is run here sees, the stem's first.

        Returns:
            Bool [n - carried, stem + n].
        """
        own = self.seen_by(np.arange(self.carried, len(self.ids)))
        return np.concatenate([np.ones((len(own), stem), dtype=bool), own], axis=1)

    def seen_by(self, nodes: NDArray[Any]) -> NDArray[Any]:
        """Which nodes some of them see: bool [nodes, n]."""
        of = nodes[:, None]
        return (np.arange(len(self.ids)) <= of) & (of < self.below)

    def pieces(self, most: int) -> list[Row]:
        """The same nodes in several rows, each of which finds all nodes before its own in a cache.

        Args:
            most: nodes that are run in one of them.
        """
        n = len(self.ids)
        ends = [*range(self.carried + most, n, most), n]
        return [
            Row(self.ids[:b], self.depth[:b], np.minimum(self.below[:b], b), {}, a)
            for a, b in itertools.pairwise([self.carried, *ends])
        ]


@dataclass(frozen=True)
class Layout:
    """Rows that together hold every sequence.

    Attributes:
        stem: tokens that stand before every row, to be run once; empty with a single row.
        rows: the rows.
    """

    stem: Ids
    rows: list[Row]

    @property
    def nodes(self) -> int:
        """Tokens that are run, the stem included."""
        return len(self.stem) + sum(len(row.ids) - row.carried for row in self.rows)


def shared(first: Ids, second: Ids) -> int:
    """How many first tokens two sequences have in common."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    low, high = 0, most  # the first `low` agree, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def distinct(sequences: Iterable[Ids]) -> int:
    """How many nodes the trie of some sequences has, of which there is one at least."""
    ordered = sorted(set(sequences))
    new = (len(b) - shared(a, b) for a, b in itertools.pairwise(ordered))
    return len(ordered[0]) + sum(new)


def row_of(sequences: Sequence[Ids]) -> Row:
    """The trie of all sequences in one row, however many nodes it has."""
    (row,) = lay_out(sequences, sum(map(len, sequences))).rows
    return row


def lay_out(sequences: Sequence[Ids], node_budget: int, most_stem: int | None = None) -> Layout:
    """Lays sequences into rows of a trie.

    Args:
        sequences: token ids, none empty; equal ones share their nodes.
        node_budget: most nodes that are run in a row, unless a single sequence is longer. Behind a
            stem there are fewer, down to a quarter.
        most_stem: most tokens of the stem, for instance what stands before the first position
            that is wanted; by default one less than the shortest sequence.

    Returns:
        The layout. A token is run once in each row that needs it, and once in all if the rows are
        one, if it belongs to the stem or if the rows go on from each other: there is no stem then,
        and a sequence may go through several rows, the last of which has its path.
    """
    if not sequences:
        return Layout((), [])
    order = sorted(range(len(sequences)), key=lambda k: sequences[k])
    common = [0] + [shared(sequences[a], sequences[b]) for a, b in itertools.pairwise(order)]
    total = sum(len(sequences[k]) - c for k, c in zip(order, common, strict=True))
    if total <= node_budget:
        return Layout((), [_row([(k, sequences[k]) for k in order], common, 0)[0]])

    shortest = min(len(s) for s in sequences) - 1
    stem = min(shared(sequences[order[0]], sequences[order[-1]]), shortest)
    stem = stem if most_stem is None else min(stem, most_stem)
    stem = stem if stem >= LEAST_STEM else 0
    # Behind a stem as long as the budget, too, a row has room for more than one sequence.
    room = max(node_budget - stem, node_budget // 4, 1)
    # Rows of even size: the last of a greedy cut would often be a stub.
    target = -(-(total - stem) // -(-(total - stem) // room))
    cuts, size, run = [0], 0, stem
    for place, k in enumerate(order):
        new = len(sequences[k]) - (common[place] if place > cuts[-1] else stem)
        if size >= target or (size and size + new > room):
            cuts.append(place)
            size, new = 0, len(sequences[k]) - stem
        size += new
        run += new
    if run > MOST_AGAIN * total:
        return Layout((), _in_turn(sequences, order, common, -(-total // -(-total // room))))
    cuts.append(len(order))
    rows = []
    for first, last in itertools.pairwise(cuts):
        members = [(k, sequences[k]) for k in order[first:last]]
        rows.append(_row(members, [stem, *common[first + 1 : last]], stem)[0])
    return Layout(sequences[order[0]][:stem], rows)


def _in_turn(
    sequences: Sequence[Ids], order: Sequence[int], common: Sequence[int], size: int
) -> list[Row]:
    """Rows that go on from each other, so that every node is run in one of them alone.

    Args:
        sequences: the sequences.
        order: their numbers, sorted.
        common: how many tokens each has in common with the one before it in this order.
        size: nodes that are run in a row; only the last has fewer.
    """
    rows: list[list[tuple[int, int, int]]] = [[]]  # of each sequence, what is run in the row
    room = size
    for k, same in zip(order, common, strict=True):
        end, length = same, len(sequences[k])
        if end == length:  # what was just run, once more
            rows[-1].append((k, end, end))
        while end < length:
            if not room:
                rows.append([])
                room = size
            start, end = end, min(length, end + room)
            rows[-1].append((k, start, end))
            room -= end - start
    found = []
    for number, parts in enumerate(rows):
        members = [
            (k if end == len(sequences[k]) else None, sequences[k][:end]) for k, _, end in parts
        ]
        row, last = _row(members, [0, *(start for _, start, _ in parts[1:])], 0)
        on = rows[number + 1][0][1] if number + 1 < len(rows) else 0
        found.append(replace(row, carried=parts[0][1], handed=last[:on]))
    return found


def _row(
    members: Sequence[tuple[int | None, Ids]], common: Sequence[int], stem: int
) -> tuple[Row, NDArray[Any]]:
    """The trie of sorted sequences; `common[i]` tokens of the i-th are also its neighbour's.

    Returns:
        The trie, with the paths of those that have a number, and the path of the last one.
    """
    ids: list[int] = []
    depth: list[int] = []
    path = np.zeros(0, dtype=np.int64)
    paths: dict[int, NDArray[Any]] = {}
    below: list[int] = []
    for (k, sequence), same in zip(members, common, strict=True):
        kept = max(same - stem, 0)
        for node in path[kept:]:
            below[node] = len(ids)
        new = sequence[stem + kept :]
        path = np.concatenate([path[:kept], np.arange(len(ids), len(ids) + len(new))])
        depth.extend(range(stem + kept, len(sequence)))
        ids.extend(new)
        below.extend([0] * len(new))
        if k is not None:
            paths[k] = path
    for node in path:
        below[node] = len(ids)
    return Row(np.array(ids), np.array(depth), np.array(below), paths), path
