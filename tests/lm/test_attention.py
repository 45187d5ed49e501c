"""Blocks of attention show each node what the dense mask shows it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from langppl.lm import attention
from langppl.lm.trie import Row, lay_out

CPU = torch.device("cpu")
sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple), min_size=1)


def dense(blocks: attention.Blocks, keys: int, window: int | None = None) -> np.ndarray:
    """What each query sees, as a mask [queries, keys]."""
    found = np.zeros((blocks.keys.shape[0] * blocks.size, keys), dtype=bool)
    bias = blocks.bias(window, torch.float32, 1)[:, 0]
    for b, q, k in zip(*np.nonzero(torch.isfinite(bias).numpy()), strict=True):
        found[b * blocks.size + q, blocks.keys[b, k]] = True
    assert found.any(axis=1).all()  # else a softmax over nothing
    return found[: blocks.queries]


@given(sequences, st.integers(1, 9), st.integers(0, 3), st.sampled_from([None, 1, 2, 5]))
@settings(max_examples=300, deadline=None)
def test_a_row_in_blocks_is_a_row_under_its_mask(given_sequences, size, stem, window):
    (row,) = lay_out(given_sequences, 10**6).rows
    row = Row(row.ids, row.depth + stem, row.below, row.paths)
    mask = row.mask(stem)
    depth = np.concatenate([np.arange(stem), row.depth])
    if window is not None:
        mask = mask & (row.depth[:, None] - depth[None, :] < window)
    before, attention.BLOCK = attention.BLOCK, size
    try:
        blocks = attention.of_row(row, stem, CPU)
    finally:
        attention.BLOCK = before
    np.testing.assert_array_equal(dense(blocks, mask.shape[1], window), mask)
    longest = stem + max(map(len, given_sequences))
    assert blocks.keys.shape[1] <= longest + size  # the path to a block, and the block


@given(
    st.integers(1, 7), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1),
    st.sampled_from([None, 3]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_queries_in_any_order_see_their_mask(queries, keys, size, seed, window):
    rng = np.random.default_rng(seed)
    mask = rng.random((queries, keys)) < 0.5
    mask[:, -1] = True
    query_depth, key_depth = rng.integers(0, 9, queries), rng.integers(0, 9, keys)
    key_depth[-1] = query_depth.max()
    blocks = attention.of_mask(mask, query_depth, key_depth, CPU, size)
    if window is not None:
        mask = mask & (query_depth[:, None] - key_depth[None, :] < window)
    np.testing.assert_array_equal(dense(blocks, keys, window), mask)


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_attention_is_the_dense_one(shared):
    rng = torch.Generator().manual_seed(0)
    (row,) = lay_out([(1, 2, 3, k, k + 1) for k in range(6)] + [(1, 2)], 100).rows
    n = len(row.ids)
    query = torch.randn(1, 4, n, 8, generator=rng)
    key, value = (torch.randn(1, shared, n + 2, 8, generator=rng) for _ in range(2))
    mask = torch.from_numpy(row.mask(2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(4 // shared, 1),
        value.repeat_interleave(4 // shared, 1),
        attn_mask=mask,
    ).transpose(1, 2)
    before, attention.BLOCK = attention.BLOCK, 4
    try:
        blocks = attention.of_row(Row(row.ids, row.depth + 2, row.below, row.paths), 2, CPU)
    finally:
        attention.BLOCK = before

    class Model:
        class config:
            _attn_implementation = "sdpa"

    with attention.in_blocks(Model, blocks):
        assert Model.config._attn_implementation == attention.NAME
        found, _ = attention.attend(None, query, key, value, None)
        with pytest.raises(NotImplementedError, match="softcap"):
            attention.attend(None, query, key, value, None, softcap=3.0)
    assert Model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="packed passes only"):
        attention.attend(None, query, key, value, None)
