"""The replay buffer."""

from __future__ import annotations

import numpy as np

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
    assert buffer.sample(3, np.random.default_rng(0)) == [1]


def test_samples_are_different_uniform_and_seeded() -> None:
    buffer = ReplayBuffer[int](4)
    for k in range(4):
        buffer.add(k, float(-k), k)
    draws = [buffer.sample(2, np.random.default_rng(seed)) for seed in range(400)]
    assert all(len(set(d)) == 2 for d in draws)
    counts = np.bincount([k for d in draws for k in d], minlength=4)
    # Each is in half of the 400 samples, give or take 4.5 standard deviations of 10.
    assert (abs(counts - 200) < 45).all()
    assert buffer.sample(2, np.random.default_rng(7)) == buffer.sample(2, np.random.default_rng(7))
    assert buffer.sample(0, np.random.default_rng(0)) == []
