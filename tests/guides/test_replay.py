"""The replay buffer."""

from __future__ import annotations

import numpy as np
import pytest

from langppl.guides.replay import ReplayBuffer


def test_the_best_are_kept() -> None:
    buffer = ReplayBuffer[str](2)
    for key, reward in (("low", -3.0), ("high", -1.0), ("middle", -2.0), ("lowest", -9.0)):
        buffer.add(key, reward, key)
    assert len(buffer) == 2
    assert set(buffer.sample(5, np.random.default_rng(0))) == {"high", "middle"}


def test_equal_and_impossible_trajectories_are_not_added() -> None:
    buffer = ReplayBuffer[int](3)
    buffer.add("a", -1.0, 1)
    buffer.add("a", -1.0, 2)
    buffer.add("b", -np.inf, 3)
    assert buffer.sample(3, np.random.default_rng(0)) == [2]  # renewed, not kept twice


def test_samples_are_different_weighted_and_seeded() -> None:
    buffer = ReplayBuffer[int](4)
    for k, weight in enumerate((0.1, 0.2, 0.3, 0.4)):
        buffer.add(k, float(np.log(weight)), k)
    firsts = [buffer.sample(1, np.random.default_rng(seed))[0] for seed in range(2000)]
    share = np.bincount(firsts, minlength=4) / 2000
    # 4.5 standard deviations of at most 0.011.
    assert share == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.05)
    draws = [buffer.sample(3, np.random.default_rng(seed)) for seed in range(50)]
    assert all(len(set(d)) == 3 for d in draws)
    assert buffer.sample(2, np.random.default_rng(7)) == buffer.sample(2, np.random.default_rng(7))
    assert buffer.sample(0, np.random.default_rng(0)) == []


def test_some_can_be_left_out() -> None:
    buffer = ReplayBuffer[int](4)
    for k in range(4):
        buffer.add(k, 0.0, k)
    assert set(buffer.sample(4, np.random.default_rng(0), {1, 2})) == {0, 3}


def test_a_new_weight_takes_the_place_of_the_old() -> None:
    buffer = ReplayBuffer[str](2)
    buffer.add("a", 5.0, "a")
    buffer.add("b", 1.0, "b")
    buffer.add("a", 0.0, "a")
    buffer.add("c", 2.0, "c")
    assert set(buffer.sample(2, np.random.default_rng(0))) == {"b", "c"}
