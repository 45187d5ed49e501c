"""What decoding has computed, kept for the scoring that follows it.

Draws are mostly scored at once: an ending after each middle that was just drawn, or the middle
itself under other rules than those it was drawn by. Their keys and values are in the decoder's
cache by then, and what each next token was drawn from was computed, so while a batch of executions
goes on (`keeping`), the trees of its draws are kept: scoring begins where a tree ends, and what
lies within one needs no pass at all. Of draws under an adapter only those are kept that are to go
on later, as it is under the LM itself that draws are scored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from langppl.lm.memo import state_of
from langppl.lm.nested import opened
from langppl.lm.trie import Ids, Row

if TYPE_CHECKING:
    from langppl.lm.model import LM

KEPT_BYTES = 256 * 2**20
"""Most bytes of keys, values and states that are kept of one LM."""

KEPT_TREES = 32
"""Most trees that are kept of one LM: what is looked for is looked for in each of them."""

KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]
"""What a KV cache holds, layer by layer, each [1, heads, nodes, width]."""


@dataclass
class Tree:
    """A trie whose keys and values are in a cache.

    Attributes:
        parents: the node before each node, −1 for none.
        depth: position of each.
        nodes: (parent, token) → node; of equal nodes the first stands for all.
        first: for each node, the first equal one.
        keys: keys and values of all nodes; empty while it grows.
        ends: states (see `LM.states`) after some of the nodes, each [n, width].
        places: node (the first of equal ones) → row of all these.
        state: of the LM's weights when they were computed.
    """

    parents: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    nodes: dict[tuple[int, int], int] = field(default_factory=dict)
    first: list[int] = field(default_factory=list)
    keys: KeysAndValues = field(default_factory=list)
    ends: list[torch.Tensor] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    state: object = None

    @classmethod
    def of_row(cls, row: Row) -> Tree:
        """The tree of a trie's row."""
        tree = cls()
        path: list[int] = []
        for token, depth in zip(row.ids.tolist(), row.depth.tolist(), strict=True):
            del path[depth:]
            path.append(tree.add(path[-1] if path else -1, token))
        return tree

    def add(self, parent: int, token: int) -> int:
        """Adds the node that comes next in the cache, where equal ones may stand."""
        node = len(self.parents)
        key = (self.first[parent] if parent >= 0 else parent, token)
        self.first.append(self.nodes.setdefault(key, node))
        self.parents.append(parent)
        self.depth.append(0 if parent < 0 else self.depth[parent] + 1)
        return node

    def path(self, ids: Sequence[int]) -> list[int]:
        """The nodes of as many first tokens as it knows."""
        found: list[int] = []
        node = -1
        for token in ids:
            known = self.nodes.get((node, token))
            if known is None:
                break
            node = known
            found.append(node)
        return found

    def note(self, lm: LM, nodes: Sequence[int], states: torch.Tensor) -> None:
        """Keeps the states [nodes, width] after some nodes, unless a state is a row of logits."""
        if not lm.splits_head:
            return
        row = sum(map(len, self.ends))
        for k, node in enumerate(nodes):
            self.places.setdefault(self.first[node], row + k)
        self.ends.append(states)

    def states(self, rows: NDArray[Any]) -> torch.Tensor:
        """Rows of the states that are kept."""
        if len(self.ends) > 1:
            self.ends = [torch.cat(self.ends)]
        (every,) = self.ends
        return every[torch.from_numpy(rows).to(every.device)]

    @property
    def bytes(self) -> int:
        """Room that its keys and values take, and its states."""
        # Keys and values may lie in one room, with some to spare.
        rooms = [x.untyped_storage() for pair in self.keys for x in pair]
        of_keys = {room.data_ptr(): room.nbytes() for room in rooms}
        return sum(of_keys.values()) + sum(x.numel() * x.element_size() for x in self.ends)


_trees: ContextVar[dict[int, list[Tree]] | None] = ContextVar("langppl_trees", default=None)


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Within the block, trees are kept; they are forgotten at the end of the outermost one."""
    with opened(_trees):
        yield


def keep(lm: LM, tree: Tree, keys: KeysAndValues) -> None:
    """Keeps a tree of an LM's draws, if there is room; the oldest go first.

    Args:
        lm: the LM, under the adapter with which it drew.
        tree: the tree.
        keys: keys and values of all its nodes.
    """
    every = _trees.get()
    if every is None:
        return
    forget(lm, tree)
    trees = every.setdefault(id(lm), [])
    tree.keys = keys
    if tree.bytes > KEPT_BYTES:
        return
    tree.state = state_of(lm, lm.active_adapter)
    trees.append(tree)
    while len(trees) > KEPT_TREES or sum(t.bytes for t in trees) > KEPT_BYTES:
        trees.pop(0)


def forget(lm: LM, tree: Tree) -> None:
    """Keeps a tree no longer."""
    trees = (_trees.get() or {}).get(id(lm), [])
    trees[:] = [t for t in trees if t is not tree]


def trees_of(lm: LM, adapter: str | None) -> list[Tree]:
    """The trees that are kept of an LM as its weights are now.

    Args:
        lm: the LM.
        adapter: the adapter under which they were made, or None.
    """
    trees = (_trees.get() or {}).get(id(lm), [])
    if not trees:
        return []
    state = state_of(lm, adapter)
    return [t for t in trees if t.state == state]


def computed(
    trees: Sequence[Tree], sequences: Sequence[Ids], first: Sequence[int], count: Sequence[int]
) -> Iterator[tuple[torch.Tensor, dict[int, NDArray[Any]]]]:
    """States that were computed when strings were drawn.

    Args:
        trees: where they are looked for.
        sequences: token ids.
        first: for each, the first position whose state is wanted.
        count: for each, how many.

    Yields:
        As `langppl.lm.packed.states`, for the sequences all of whose states are known.
    """
    done: set[int] = set()
    for tree in trees:
        rows: dict[int, list[int]] = {}
        for k, ids in enumerate(sequences):
            nodes = [] if k in done else tree.path(ids[: first[k] + count[k]])[first[k] :]
            places = [tree.places.get(node, -1) for node in nodes]
            if len(places) == count[k] > 0 and min(places) >= 0:
                rows[k] = places
        if rows:
            done |= rows.keys()
            which = np.unique(np.concatenate([np.array(own) for own in rows.values()]))
            yield tree.states(which), {k: np.searchsorted(which, own) for k, own in rows.items()}


def known(
    trees: Sequence[Tree], sequences: Sequence[Ids], most: Sequence[int]
) -> list[tuple[Tree, list[int]]]:
    """For each sequence, the tree that knows most of its first tokens, and their nodes.

    Args:
        trees: where they are looked for.
        sequences: token ids.
        most: how many tokens of each may be taken from a tree.

    Returns:
        One entry for each sequence; empty if nothing is known of any of them.
    """
    if not trees:
        return []
    found = []
    for ids, limit in zip(sequences, most, strict=True):
        paths = [(tree, tree.path(ids[:limit])) for tree in trees]
        found.append(max(paths, key=lambda p: len(p[1])))
    return found if any(path for _, path in found) else []


@dataclass(frozen=True)
class Branches:
    """Nodes that are run after those of a tree.

    Attributes:
        ids: token of each, shape [n].
        depth: position of each, shape [n].
        seen: what each sees of the tree and of the nodes, bool [n, tree + n].
        place: of each node of the row that they come from, its number among them.
        carried: how many of them, the first ones, are run already.
    """

    ids: NDArray[Any]
    depth: NDArray[Any]
    seen: NDArray[Any]
    place: NDArray[Any]
    carried: int


def branches(tree: Tree, row: Row) -> Branches:
    """A row's nodes, without those that stand for a node of a tree (−1 − node in a token's place).

    What lies below such a node sees the tree's path to it instead.
    """
    is_new = row.ids >= 0
    place = np.cumsum(is_new) - 1
    of_tree = np.zeros((len(row.ids), len(tree.parents)), dtype=bool)
    depth = row.depth.copy()
    for first in np.flatnonzero(~is_new).tolist():
        below = slice(first, int(row.below[first]))
        node = -1 - int(row.ids[first])
        depth[below] += tree.depth[node]
        above = []
        while node >= 0:
            above.append(node)
            node = tree.parents[node]
        of_tree[below, above] = True
    own = replace(row, carried=0).mask(0)[is_new][:, is_new]
    return Branches(
        row.ids[is_new],
        depth[is_new],
        np.concatenate([of_tree[is_new], own], axis=1),
        place,
        int(is_new[: row.carried].sum()),
    )
