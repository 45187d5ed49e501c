"""The trie is checked against the definition: a node sees the tokens before it, and no others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langppl.lm.trie import LEAST_STEM, lay_out, shared

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple), min_size=1)


def read_back(layout, count):
    """Each sequence as its path spells it, and as the mask of its last node spells it."""
    spelled = {}
    for row in layout.rows:
        mask = row.mask(len(layout.stem))
        for k, path in row.paths.items():
            seen = np.flatnonzero(mask[path[-1]])
            stem = layout.stem if len(layout.stem) else ()
            assert seen[: len(stem)].tolist() == list(range(len(stem)))
            assert seen[len(stem) :].tolist() == (path + len(stem)).tolist()
            assert row.depth[path].tolist() == list(range(len(stem), len(stem) + len(path)))
            assert k not in spelled
            spelled[k] = (*stem, *row.ids[path].tolist())
    assert sorted(spelled) == list(range(count))
    return [spelled[k] for k in range(count)]


@given(sequences, st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_every_sequence_is_spelled_by_its_path_and_seen_by_its_mask(given_sequences, budget):
    layout = lay_out(given_sequences, budget)
    assert read_back(layout, len(given_sequences)) == given_sequences
    longest = max(map(len, given_sequences))
    assert all(len(row.ids) <= max(budget, longest) for row in layout.rows)


@given(sequences)
@settings(max_examples=200, deadline=None)
def test_one_row_runs_each_distinct_prefix_once(given_sequences):
    prefixes = {s[: k + 1] for s in given_sequences for k in range(len(s))}
    layout = lay_out(given_sequences, 10**6)
    assert layout.stem == () and len(layout.rows) == 1
    assert layout.nodes == len(prefixes)


def test_the_nodes_of_a_small_trie():
    layout = lay_out([(1, 2, 3), (1, 2, 4), (1, 2)], node_budget=8)
    (row,) = layout.rows
    assert row.ids.tolist() == [1, 2, 3, 4]
    assert row.depth.tolist() == [0, 1, 2, 2]
    assert row.below.tolist() == [4, 4, 3, 4]
    assert {k: p.tolist() for k, p in row.paths.items()} == {0: [0, 1, 2], 1: [0, 1, 3], 2: [0, 1]}


def test_a_long_common_start_is_run_once_for_all_rows():
    stem = tuple(range(100, 100 + 2 * LEAST_STEM))
    given_sequences = [(*stem, k, k + 1, k + 2) for k in range(8)]
    layout = lay_out(given_sequences, node_budget=len(stem) + 6)
    assert layout.stem == stem
    assert [len(row.ids) for row in layout.rows] == [6, 6, 6, 6]
    assert layout.nodes == len(stem) + 24
    assert read_back(layout, 8) == given_sequences


def test_the_stem_ends_before_the_first_wanted_position():
    stem = tuple(range(100, 120))
    given_sequences = [(*stem, k, k + 1) for k in range(8)]
    assert lay_out(given_sequences, 8, most_stem=12).stem == stem[:12]
    assert lay_out(given_sequences, 8, most_stem=LEAST_STEM - 1).stem == ()


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_shared_is_the_length_of_the_common_start(size):
    first = tuple(range(size))
    assert shared(first, first) == size
    assert shared(first, (*first, 7)) == size
    assert shared(first, (*first[:-1], -1)) == size - 1
    assert shared(first, (-1, *first[1:])) == 0
