"""Diagnostics of log weights, against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from langppl.diagnostics import (
    effective_sample_size,
    log_evidence,
    normalized_weights,
    pareto_k,
    pareto_k_threshold,
)

LOG1, LOG3 = 0.0, math.log(3.0)
NO_WEIGHT = [-math.inf] * 30

log_weights = st.lists(st.floats(-50.0, 50.0) | st.just(-math.inf), min_size=1, max_size=40).filter(
    lambda values: max(values) > -math.inf
)
shifts = st.floats(-1000.0, 1000.0)


@pytest.mark.parametrize(
    "make", [list, np.array, torch.tensor, lambda v: torch.tensor(v).double().requires_grad_()]
)
def test_weights_one_to_three(make: Callable[[list[float]], Any]) -> None:
    weights = make([LOG1, LOG3])
    np.testing.assert_allclose(normalized_weights(weights), [0.25, 0.75], rtol=1e-6)
    assert normalized_weights(weights).dtype == np.float64
    assert effective_sample_size(weights) == pytest.approx(1.6)  # (1 + 3)² / (1 + 9)
    # Mean 2, sd √2 (n − 1 form), error √2 / (2·√2).
    assert log_evidence(weights) == pytest.approx((math.log(2.0), 0.5))


def test_an_impossible_sample_is_a_draw_of_weight_zero() -> None:
    weights = [LOG1, LOG3, -math.inf, -math.inf]
    # Mean 1, squared deviations 0 + 4 + 1 + 1, sd √2, error √2 / √4.
    assert log_evidence(weights) == pytest.approx((0.0, math.sqrt(2.0) / 2.0), abs=1e-12)
    assert effective_sample_size(weights) == pytest.approx(1.6)
    np.testing.assert_allclose(normalized_weights(weights), [0.25, 0.75, 0.0, 0.0])


def test_equal_weights() -> None:
    assert effective_sample_size([-700.0] * 7) == 7.0
    assert log_evidence([-7000.0] * 7) == pytest.approx((-7000.0, 0.0))


def test_one_possible_sample_of_n() -> None:
    weights = [-math.inf] * 8 + [-2.0]
    assert effective_sample_size(weights) == 1.0
    # Weights 1, 0, …: mean 1/n and sd 1/√n make the error exactly 1.
    assert log_evidence(weights) == pytest.approx((-2.0 - math.log(9.0), 1.0))


def test_a_single_sample_has_no_error() -> None:
    assert log_evidence([-3.0]) == (-3.0, math.inf)
    assert effective_sample_size([-3.0]) == 1.0
    assert math.isnan(pareto_k([-3.0]))


def test_no_weight_at_all() -> None:
    assert log_evidence(NO_WEIGHT) == (-math.inf, math.inf)
    assert effective_sample_size(NO_WEIGHT) == 0.0
    assert math.isnan(pareto_k(NO_WEIGHT))
    with pytest.raises(ValueError, match="nothing to normalise"):
        normalized_weights(NO_WEIGHT)


def test_the_delta_method_error_is_the_spread_of_repeated_estimates() -> None:
    rng = np.random.default_rng(0)
    runs = [log_evidence(rng.normal(0.0, 0.5, 400)) for _ in range(400)]
    estimates, errors = np.array(runs).T
    # The relative error of a standard deviation from 400 values is 1/√800, about 3.5 %.
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.12)
    assert np.mean(estimates) == pytest.approx(0.125, abs=0.005)  # mean of a lognormal: σ²/2


@pytest.mark.parametrize(
    "function", [effective_sample_size, log_evidence, normalized_weights, pareto_k]
)
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0, math.nan, 1.0, math.nan], r"log_weights is NaN at indices 1, 3 of 4"),
        ([0.0, math.nan], r"log_weights is NaN at index 1 of 2"),
        ([math.nan] * 13, r"8, 9 and 3 more of 13"),
        ([math.inf, 0.0], r"log_weights is \+inf at index 0 of 2"),
        ([], r"at least one sample"),
        ([[0.0, 1.0]], r"shape \[n\], got \(1, 2\)"),
        (torch.tensor(0.0), r"shape \[n\], got \(\)"),
    ],
)
def test_bad_weights(function: Callable[[Any], Any], weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(weights)


def test_the_input_is_left_as_it_was() -> None:
    weights = np.random.default_rng(0).normal(0.0, 1.0, 100)
    before = weights.copy()
    for function in (effective_sample_size, log_evidence, normalized_weights, pareto_k):
        function(weights)
    np.testing.assert_array_equal(weights, before)


@pytest.mark.parametrize("shape", [0.2, 0.5, 1.0])
def test_pareto_k_finds_the_shape_of_a_pareto_tail(shape: float) -> None:
    weights = np.random.default_rng(1).pareto(1.0 / shape, 50_000) + 1.0
    assert pareto_k(np.log(weights)) == pytest.approx(shape, abs=0.12)


def test_pareto_k_of_bounded_weights_is_below_zero() -> None:
    uniform = np.random.default_rng(2).uniform(0.0, 1.0, 2_000)
    # A uniform tail is a generalised Pareto with k = −1; the fit's prior pulls it to 0.5 a little.
    assert pareto_k(np.log(uniform)) == pytest.approx(-1.0, abs=0.25)


def test_pareto_k_of_equal_weights() -> None:
    assert pareto_k([-4.0] * 50) == -math.inf
    assert pareto_k([-math.inf] * 50 + [-4.0] * 50) == -math.inf
    assert pareto_k([-4.0 + 1e-8 * (i % 3) for i in range(50)]) == -math.inf


def test_pareto_k_counts_impossible_samples_among_n() -> None:
    rng = np.random.default_rng(3)
    possible = rng.normal(0.0, 2.0, 500)
    diluted = np.concatenate([possible, np.full(4_500, -np.inf)])
    # 500 weights of 5,000: the tail is the largest 213, not the largest 68.
    assert pareto_k(diluted) != pytest.approx(pareto_k(possible), abs=1e-3)
    assert math.isfinite(pareto_k(diluted))


def test_pareto_k_of_few_possible_samples_has_their_tail() -> None:
    possible = np.random.default_rng(0).normal(0.0, 2.0, 15)
    # 15 weights stand above 100 others: 23 of 115 are the tail, not 3 of 15.
    assert math.isfinite(pareto_k(np.concatenate([np.full(100, -np.inf), possible])))


def test_pareto_k_of_a_tail_that_is_equal_and_stands_above_the_rest() -> None:
    # The tail is the largest ten; the eleventh, from which it starts, is below them.
    assert pareto_k([0.0] * 10 + [-5.0] * 40) != -math.inf
    assert pareto_k([0.0] * 11 + [-5.0] * 39) == -math.inf


@pytest.mark.parametrize(
    "weights",
    [
        np.arange(20.0),
        np.array([0.0] * 98 + [5.0, 6.0]),
        np.array([-np.inf] * 997 + [0.0, 1.0, 2.0]),
    ],
)
def test_pareto_k_of_too_few_tail_weights_is_nan(weights: Any) -> None:
    assert math.isnan(pareto_k(weights))


@pytest.mark.parametrize(
    ("n", "threshold"),
    [(1, -math.inf), (10, 0.0), (100, 0.5), (1_000, 2.0 / 3.0), (10_000, 0.7), (10**6, 0.7)],
)
def test_pareto_k_threshold(n: int, threshold: float) -> None:
    assert pareto_k_threshold(n) == pytest.approx(threshold)


def test_pareto_k_threshold_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pareto_k_threshold(0)


@given(log_weights, shifts)
def test_a_constant_factor_on_the_weights_changes_only_the_evidence(
    values: list[float], shift: float
) -> None:
    shifted = np.array(values) + shift
    evidence, error = log_evidence(values)
    moved, moved_error = log_evidence(shifted)
    assert moved == pytest.approx(evidence + shift, abs=1e-9)
    assert moved_error == pytest.approx(error, rel=1e-6, abs=1e-6)
    assert effective_sample_size(shifted) == pytest.approx(effective_sample_size(values), rel=1e-9)
    np.testing.assert_allclose(
        normalized_weights(shifted), normalized_weights(values), rtol=1e-9, atol=1e-12
    )


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.1, 3.0), shifts)
def test_a_constant_factor_on_the_weights_leaves_pareto_k(
    seed: int, spread: float, shift: float
) -> None:
    weights = np.random.default_rng(seed).normal(0.0, spread, 100)
    assert pareto_k(weights + shift) == pytest.approx(pareto_k(weights), abs=1e-6, nan_ok=True)


@given(log_weights)
def test_ranges(values: list[float]) -> None:
    assert 1.0 <= effective_sample_size(values) <= len(values)
    assert normalized_weights(values).sum() == pytest.approx(1.0)
    assert log_evidence(values)[0] <= max(values) + 1e-12
    assert log_evidence(values)[1] >= 0.0


@given(log_weights, st.randoms(use_true_random=False))
def test_order_does_not_matter(values: list[float], random: Any) -> None:
    shuffled = random.sample(values, len(values))
    assert effective_sample_size(shuffled) == pytest.approx(effective_sample_size(values))
    assert log_evidence(shuffled) == pytest.approx(log_evidence(values), rel=1e-9, abs=1e-12)
