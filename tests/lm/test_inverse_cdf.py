"""Draws by blocks of shares against running sums over all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from langppl.lm.inverse_cdf import SUMMED, by_inverse_cdf

SIZES = st.sampled_from([1, 2, 7, SUMMED - 1, SUMMED, SUMMED + 1, 3 * SUMMED, 3 * SUMMED + 5])
LAST = 1.0 - 2.0**-53
"""The largest uniform number there is."""


@given(
    seed=st.integers(0, 10**6),
    size=SIZES,
    zeros=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    sharpness=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_it_is_where_the_running_sum_passes(
    seed: int, size: int, zeros: float, sharpness: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=sharpness, size=(20, size))
    logits[rng.random((20, size)) < zeros] = -np.inf
    logits[np.arange(20), rng.integers(0, size, 20)] = 0.0
    shares = torch.tensor(logits, dtype=torch.float32).softmax(-1)
    uniforms = np.array([0.0, LAST, *rng.random(18)])[:, None]
    found = by_inverse_cdf(shares, torch.from_numpy(uniforms))
    assert found.shape == (20, 1)
    exact = shares.double().numpy()
    for row, token, uniform in zip(exact, found[:, 0].tolist(), uniforms[:, 0], strict=True):
        assert row[token] > 0.0
        below = uniform * row.sum()
        assert row[:token].sum() <= below + 1e-12
        assert row[: token + 1].sum() >= below - 1e-12


def test_draws_follow_the_shares() -> None:
    shares = torch.zeros(1, 2 * SUMMED + 3)
    places = [0, SUMMED - 1, SUMMED, 2 * SUMMED + 2]
    shares[0, places] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    # Uniform numbers in the middle of a thousand equal parts: each share to one of them.
    uniforms = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    found = by_inverse_cdf(shares.expand(1000, -1), uniforms)[:, 0]
    counts = found.bincount(minlength=shares.shape[1])
    assert counts[places].tolist() == [100, 200, 300, 400]


@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_of_a_row_without_shares_it_is_some_token(fill: float) -> None:
    shares = torch.full((2, SUMMED + 3), fill)
    shares[1] = 0.0
    shares[1, 5] = 1.0
    found = by_inverse_cdf(shares, torch.full((2, 1), 0.5, dtype=torch.float64))
    assert 0 <= int(found[0]) < SUMMED + 3  # a dead end, which the caller knows of
    assert int(found[1]) == 5
