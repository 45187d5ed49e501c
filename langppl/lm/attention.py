"""Attention over a token tree, in blocks of nodes.

A dense mask over n nodes costs n², though a node sees no more than its own path. In depth-first
order, what any node of a stretch sees outside of it lies on the path to the stretch's *first* node
(a node above a later one, standing before the stretch, is above the first one too). So nodes are
cut into blocks; each block attends to that path and to itself, and the cost grows with the number
of nodes alone.

It is one of transformers' attention functions (`transformers.AttentionInterface`), switched on for
the duration of one pass, and applies a layer's sliding window by depth.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from langppl.lm.trie import Row

NAME = "langppl_tree"

BLOCK = 64
"""Nodes of a block: fewer repeat more of the paths, more see more of each other in vain."""

SPARED_BYTES = 64 * 2**20
"""Copies of a layer's keys and values that an accelerator keeps for the backward pass."""

SPARED_BYTES_ON_CPU = 4 * 2**20
"""Likewise on the CPU."""

_UNKNOWN = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class Blocks:
    """Which keys the queries of one pass attend to.

    Attributes:
        queries: how many there are.
        size: of a block.
        keys: numbers of the keys that each block reads, shape [blocks, most]; those that a block
            needs not are repeats of key 0.
        seen: which of them each query sees, bool [blocks, size, most]; queries beyond the last see
            the first key.
        query_depth: position of each query, shape [blocks, size].
        key_depth: position of each key, shape [blocks, most].
        is_whole: whether a single block reads its keys in their order, from the first on.
    """

    queries: int
    size: int
    keys: Tensor
    seen: Tensor
    query_depth: Tensor
    key_depth: Tensor
    is_whole: bool
    _biases: dict[tuple[int | None, torch.dtype, int], Tensor] = field(default_factory=dict)
    _lists: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def bias(self, window: int | None, dtype: torch.dtype, groups: int) -> Tensor:
        """What is added to the attention scores, shape [blocks, 1, groups · size, most].

        Args:
            window: how far back a query sees, itself counted in; None for all the way.
            dtype: float type.
            groups: how many times the queries of a block stand one below the other.
        """
        key = (window, dtype, groups)
        if key not in self._biases:
            seen = self.seen
            if window is not None:
                distance = self.query_depth[:, :, None] - self.key_depth[:, None, :]
                seen = seen & (distance < window)
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            bias.masked_fill_(~seen, -torch.inf)
            self._biases[key] = bias.repeat(1, groups, 1)[:, None]
        return self._biases[key]

    def lists(self) -> tuple[Tensor, Tensor]:
        """The keys that each query sees, one query's after the other's.

        Returns:
            Where each query's begin, and their end, int64 [queries + 1], and the keys' numbers.
        """
        if not self._lists:
            seen = self.seen.flatten(0, 1)[: self.queries]
            starts = torch.zeros(self.queries + 1, dtype=torch.int64)
            starts[1:] = seen.sum(1).cumsum(0)
            keys = self.keys.repeat_interleave(self.size, 0)[: self.queries]
            self._lists.append((starts, keys[seen]))
        return self._lists[0]


def of_row(row: Row, stem: int, device: torch.device) -> Blocks:
    """The blocks of a trie's row.

    Args:
        row: the row; its nodes, without those that are carried, are the queries.
        stem: tokens before it, which every node sees; they come first among the keys.
        device: where the tensors live.
    """
    every, carried = len(row.ids), row.carried
    n = every - carried
    size = min(BLOCK, n)
    parts = []
    for first in range(carried, every, size):
        above = np.flatnonzero(row.below[:first] > first)
        parts.append(np.concatenate([above, np.arange(first, min(first + size, every))]))
    most = stem + max(map(len, parts))
    keys = np.zeros((len(parts), most), dtype=np.int64)
    seen = np.zeros((len(parts), size, most), dtype=bool)
    key_depth = np.zeros((len(parts), most), dtype=np.int64)
    query_depth = np.zeros(len(parts) * size, dtype=np.int64)
    query_depth[:n] = row.depth[carried:]
    keys[:, :stem] = key_depth[:, :stem] = np.arange(stem)
    seen[:, :, :stem] = True
    for b, own in enumerate(parts):
        at = carried + np.arange(b * size, min((b + 1) * size, n))
        last = stem + len(own)
        keys[b, stem:last] = stem + own
        key_depth[b, stem:last] = row.depth[own]
        seen[b, : len(at), stem:last] = (own <= at[:, None]) & (at[:, None] < row.below[own])
    if n < len(query_depth):
        seen[-1, n - len(query_depth) :] = False
        seen[-1, n - len(query_depth) :, 0] = True
        query_depth[n:] = key_depth[-1, 0]
    return _blocks(n, size, keys, seen, query_depth.reshape(-1, size), key_depth, device)


def of_mask(
    seen: NDArray[Any],
    query_depth: NDArray[Any],
    key_depth: NDArray[Any],
    device: torch.device,
    size: int,
) -> Blocks:
    """Blocks of queries in any order, each reading what one of its queries sees.

    Args:
        seen: which keys each query sees, bool [queries, keys], at least one each.
        query_depth: position of each query, shape [queries].
        key_depth: position of each key, shape [keys].
        device: where the tensors live.
        size: most queries of a block.
    """
    n = len(seen)
    size = min(size, n)
    at = np.minimum(np.arange(n + -n % size), n - 1).reshape(-1, size)
    rows, depth = seen[at], query_depth[at]
    parts = [np.flatnonzero(own.any(axis=0)) for own in rows]
    most = max(map(len, parts))
    keys = np.zeros((len(parts), most), dtype=np.int64)
    found = np.zeros((len(parts), size, most), dtype=bool)
    for b, own in enumerate(parts):
        keys[b, : len(own)] = own
        found[b, :, : len(own)] = rows[b][:, own]
    return _blocks(n, size, keys, found, depth, key_depth[keys], device)


def _blocks(
    queries: int,
    size: int,
    keys: NDArray[Any],
    seen: NDArray[Any],
    query_depth: NDArray[Any],
    key_depth: NDArray[Any],
    device: torch.device,
) -> Blocks:
    is_whole = len(keys) == 1 and np.array_equal(keys[0], np.arange(keys.shape[1]))
    arrays = (keys, seen, query_depth, key_depth)
    found, sees, of_queries, of_keys = (torch.from_numpy(a).to(device) for a in arrays)
    return Blocks(queries, size, found, sees, of_queries, of_keys, is_whole)


_active: ContextVar[Blocks | None] = ContextVar("langppl_blocks", default=None)
_windows: ContextVar[set[int] | None] = ContextVar("langppl_windows", default=None)


@contextlib.contextmanager
def in_blocks(model: Any, blocks: Blocks) -> Iterator[None]:
    """Within the block the model's attention follows these blocks, whatever mask it is given."""
    _register()
    before = model.config._attn_implementation
    token = _active.set(blocks)
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _active.reset(token)


@contextlib.contextmanager
def watched(windows: set[int]) -> Iterator[None]:
    """Within the block, the sliding windows that layers ask for are put into the set."""
    token = _windows.set(windows)
    try:
        yield
    finally:
        _windows.reset(token)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' layers call it.

    Args:
        module: the layer.
        query: shape [1, heads, queries, width].
        key: shape [1, key heads, keys, width]; heads share them in groups.
        value: shape [1, key heads, keys, value width].
        attention_mask: not used; the blocks say what is seen.
        dropout: share of the attention weights set to 0.
        scaling: of the scores; one over the root of the width if None.
        sliding_window: how far back the layer sees.
        **options: what other layers need is an error here.

    Returns:
        Shape [1, queries, heads, value width], and None for the weights.
    """
    blocks = _active.get()
    if blocks is None:
        raise RuntimeError(f"attention {NAME!r} serves packed passes only")
    needed = [o for o in _UNKNOWN if options.get(o) is not None]
    if needed:
        raise NotImplementedError(f"attention in blocks has no {needed[0]}")
    windows = _windows.get()
    if windows is not None and sliding_window is not None:
        windows.add(sliding_window)
    found = attend_to(
        blocks, query, key, value, dropout=dropout, scaling=scaling, window=sliding_window
    )
    return found, None


def attend_to(
    blocks: Blocks,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of queries to the keys of their blocks.

    Args:
        blocks: what each query sees.
        query: see `attend`, as are key, value, dropout and scaling.
        key: the keys.
        value: the values.
        dropout: share of the attention weights set to 0.
        scaling: of the scores.
        window: how far back a query sees.

    Returns:
        Shape [1, queries, heads, value width].
    """
    (count, most), size = blocks.keys.shape, blocks.size
    heads, n, width = query.shape[1:]
    shared = key.shape[1]
    groups = heads // shared
    query = query[0] if count * size == n else pad(query[0], (0, 0, 0, count * size - n))
    query = query.reshape(shared, groups, count, size, width).permute(2, 0, 1, 3, 4)
    query = query.reshape(count, shared, groups * size, width)
    bias = blocks.bias(window, query.dtype, groups)

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling
        )

    def of_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        places = blocks.keys.flatten()
        keys, values = (
            x[0].index_select(1, places).view(shared, count, most, -1).transpose(0, 1)
            for x in (key, value)
        )
        return attended(query, keys, values)

    if blocks.is_whole and most == key.shape[2]:
        found = attended(query, key, value)
    elif torch.is_grad_enabled() and key.requires_grad and _is_large(blocks, key):
        # Each block's copy of what it sees is made again in the backward pass, not kept.
        found = checkpoint(of_blocks, query, key, value, use_reentrant=False)
    else:
        found = of_blocks(query, key, value)
    found = found.view(count, shared, groups, size, -1).permute(0, 3, 1, 2, 4)
    return found.reshape(count * size, heads, -1)[None, :n]


def _is_large(blocks: Blocks, key: Tensor) -> bool:
    """Whether the copies of keys and values are worth the time to make them again."""
    copied = 2 * key[0, :, 0].nbytes * blocks.keys.numel()
    return copied > (SPARED_BYTES_ON_CPU if key.device.type == "cpu" else SPARED_BYTES)


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface  # takes a second to import

    AttentionInterface.register(NAME, attend)
