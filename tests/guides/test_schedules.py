"""The reward's schedule."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from langppl.guides import RewardSchedule


def test_the_power_rises_in_a_straight_line_and_then_stays() -> None:
    assert RewardSchedule(0.5, 0.4).powers(10) == [0.5, 0.625, 0.75, 0.875] + [1.0] * 6
    assert RewardSchedule(0.0, 1.0).powers(4) == [0.0, 0.25, 0.5, 0.75]
    assert RewardSchedule(0.5, 0.0).powers(3) == [0.5, 1.0, 1.0]
    assert RewardSchedule(1.0).powers(2) == [1.0, 1.0]
    assert RewardSchedule().power(9, 60) == 0.75  # half of the 18 steps that it rises over
    assert RewardSchedule(2.0, 0.4).powers(10) == [2.0, 1.75, 1.5, 1.25] + [1.0] * 6
    assert RewardSchedule(1.0, 0.5, end=2.0).powers(4) == [1.0, 1.5, 2.0, 2.0]
    assert RewardSchedule(1.5, end=1.5).powers(3) == [1.5] * 3


def test_it_says_what_it_is() -> None:
    assert str(RewardSchedule()) == (
        "reward power 0.5 at the first step, rising to 1 after 30 % of the steps"
    )
    assert str(RewardSchedule(0.0, 0.07)) == (
        "reward power 0 at the first step, rising to 1 after 7 % of the steps"
    )
    assert str(RewardSchedule(0.5, 0.0)) == "reward power 0.5 at the first step, then 1"
    assert str(RewardSchedule(2.0, 0.5)) == (
        "reward power 2 at the first step, falling to 1 after 50 % of the steps"
    )
    assert str(RewardSchedule(2.0, 0.5, end=1.5)) == (
        "reward power 2 at the first step, falling to 1.5 after 50 % of the steps"
    )
    assert str(RewardSchedule(1.0)) == "reward power 1 throughout"
    assert str(RewardSchedule(1.5, end=1.5)) == "reward power 1.5 throughout"
    assert repr(RewardSchedule()) == "RewardSchedule(start=0.5, until=0.3, end=1.0)"


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_shares_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=f"until must be between 0 and 1, got {value}"):
        RewardSchedule(until=value)


@pytest.mark.parametrize("value", [-0.5, float("inf"), float("nan")])
def test_powers_out_of_range(value: float) -> None:
    for name in ("start", "end"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite, got {value}"):
            RewardSchedule(**{name: value})


def test_powers_that_are_no_numbers() -> None:
    for name in ("start", "until", "end"):
        with pytest.raises(ValueError, match=f"{name} must be a number, got '0.5'"):
            RewardSchedule(**{name: "0.5"})  # type: ignore[arg-type]


def test_no_steps() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        RewardSchedule().powers(0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        RewardSchedule().plot(0)


def test_its_picture() -> None:
    figure = RewardSchedule(0.0, 0.5).plot(4)
    (ax,) = figure.axes
    (line,) = ax.lines
    assert list(line.get_xdata()) == [0, 1, 2, 3]
    assert list(line.get_ydata()) == [0.0, 0.5, 1.0, 1.0]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == (
        "Reward schedule",
        "step",
        "power of the reward",
    )
    given = Figure()
    ax = given.subplots()
    assert RewardSchedule().plot(3, ax) is given and len(ax.lines) == 1
