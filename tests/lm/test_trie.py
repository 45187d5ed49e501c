"""The trie is checked against the definition: a node sees the tokens before it, and no others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langppl.lm.trie import LEAST_STEM, MOST_AGAIN, distinct, lay_out, row_of, shared

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple), min_size=1)


def read_back(layout, count):
    """Each sequence as its path spells it, and as the mask of its last node spells it."""
    spelled = {}
    stem = layout.stem
    handed = []
    for row in layout.rows:
        assert row.ids[: row.carried].tolist() == handed
        assert row.depth[: row.carried].tolist() == list(range(row.carried))
        handed = row.ids[row.handed].tolist()
        mask = row.mask(len(stem))
        assert len(mask) == len(row.ids) - row.carried
        for k, path in row.paths.items():
            if path[-1] >= row.carried:
                seen = np.flatnonzero(mask[path[-1] - row.carried])
                assert seen[: len(stem)].tolist() == list(range(len(stem)))
                assert seen[len(stem) :].tolist() == (path + len(stem)).tolist()
            assert row.depth[path].tolist() == list(range(len(stem), len(stem) + len(path)))
            assert k not in spelled
            spelled[k] = (*stem, *row.ids[path].tolist())
    assert sorted(spelled) == list(range(count))
    return [spelled[k] for k in range(count)]


def run_by(row):
    return len(row.ids) - row.carried


@given(sequences, st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_every_sequence_is_spelled_by_its_path_and_seen_by_its_mask(given_sequences, budget):
    layout = lay_out(given_sequences, budget)
    assert read_back(layout, len(given_sequences)) == given_sequences
    longest = max(map(len, given_sequences))
    assert all(run_by(row) <= max(budget, longest) for row in layout.rows)


@given(sequences, st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_little_is_run_twice_whatever_the_budget(given_sequences, budget):
    prefixes = {s[: k + 1] for s in given_sequences for k in range(len(s))}
    layout = lay_out(given_sequences, budget)
    assert len(prefixes) <= layout.nodes <= MOST_AGAIN * len(prefixes)
    if any(row.carried for row in layout.rows):
        assert layout.nodes == len(prefixes)
        assert all(run_by(row) <= budget for row in layout.rows)


@given(sequences)
@settings(max_examples=200, deadline=None)
def test_one_row_runs_each_distinct_prefix_once(given_sequences):
    prefixes = {s[: k + 1] for s in given_sequences for k in range(len(s))}
    layout = lay_out(given_sequences, 10**6)
    assert layout.stem == () and len(layout.rows) == 1
    assert layout.nodes == len(prefixes) == distinct(given_sequences)
    assert row_of(given_sequences).ids.tolist() == layout.rows[0].ids.tolist()


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
    stem = tuple(range(100, 113))
    given_sequences = [(*stem, k, k + 1) for k in range(8)]
    assert lay_out(given_sequences, 8, most_stem=12).stem == stem[:12]
    assert lay_out(given_sequences, 8, most_stem=LEAST_STEM - 1).stem == ()


def test_rows_of_long_sequences_go_on_from_each_other():
    long, other = tuple(range(100, 120)), tuple(range(200, 220))
    given_sequences = [(*long, 1), (*long, 2), (*long[:19], 3), (*other, 1), (*other, 2), other]
    layout = lay_out(given_sequences, node_budget=16)
    assert layout.stem == ()
    assert layout.nodes == 20 + 3 + 20 + 2
    assert [run_by(row) for row in layout.rows] == [15, 15, 15]
    assert [(row.carried, row.handed.tolist()) for row in layout.rows] == [
        (0, list(range(15))),  # the first 15 of `long`
        (15, list(range(23, 30))),  # the other 5, its three ends, and the first 7 of `other`
        (7, []),
    ]
    assert read_back(layout, 6) == given_sequences


def test_rows_that_run_little_twice_do_not_go_on_from_each_other():
    given_sequences = [(k, 1, 2, j) for k in range(3) for j in range(4)]
    layout = lay_out(given_sequences, node_budget=5)  # 7 nodes for each k
    assert [row.ids.tolist() for row in layout.rows] == [
        row for k in range(3) for row in ([k, 1, 2, 0, 1], [k, 1, 2, 2, 3])
    ]
    assert all(row.carried == 0 and not len(row.handed) for row in layout.rows)
    assert layout.nodes == 30 <= MOST_AGAIN * 21


def test_behind_a_stem_as_long_as_the_budget_rows_hold_many_sequences():
    stem = tuple(range(100, 160))
    given_sequences = [(*stem, k, 1) for k in range(20)]
    layout = lay_out(given_sequences, node_budget=32)
    assert layout.stem == stem
    assert [len(row.ids) for row in layout.rows] == [8] * 5
    assert read_back(layout, 20) == given_sequences


@given(sequences, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_a_row_in_pieces_sees_what_it_sees_in_one(given_sequences, most):
    (row,) = lay_out(given_sequences, 10**6).rows
    pieces = row.pieces(most)
    assert sum(map(run_by, pieces)) == len(row.ids)
    assert all(run_by(piece) <= most for piece in pieces)
    whole = row.mask(0)
    for piece in pieces:
        n = len(piece.ids)
        np.testing.assert_array_equal(piece.mask(0), whole[piece.carried : n, :n])
        assert piece.ids.tolist() == row.ids[:n].tolist()
        assert piece.depth.tolist() == row.depth[:n].tolist()


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_shared_is_the_length_of_the_common_start(size):
    first = tuple(range(size))
    assert shared(first, first) == size
    assert shared(first, (*first, 7)) == size
    assert shared(first, (*first[:-1], -1)) == size - 1
    assert shared(first, (-1, *first[1:])) == 0
