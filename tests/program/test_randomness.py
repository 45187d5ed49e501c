"""Random numbers that a model takes from elsewhere than its sites."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pytest
import torch

import langppl as lp
from langppl.testing import tiny_lm

LM = tiny_lm("ab")
COINS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "random": random.random,
    "numpy.random": np.random.rand,
}


def string(prompt: str) -> lp.LMString:
    return lp.LMString(LM, prompt, max_tokens=3)


@pytest.mark.parametrize("generator", COINS)
def test_a_coin_in_a_prompt_is_an_error(generator: str) -> None:
    def model() -> None:
        z = lp.sample("z", string("a" if COINS[generator]() < 0.5 else "b"))
        lp.sample("o", string(f"{z}"), obs="a")

    # Which of the runs differ first depends on the coin; that one of them does, not.
    for seed in range(20):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        with pytest.raises(ValueError, match=f"site 'z' had another.*the generator of {generator}"):
            lp.compile(model)


@pytest.mark.parametrize("generator", COINS)
def test_a_coin_in_a_branch_is_an_error(generator: str) -> None:
    def model() -> None:
        z = lp.sample("z", string("a"))
        if len(z) > 1:
            lp.sample("w", string("a" if COINS[generator]() < 0.5 else "b"))

    with pytest.raises(
        ValueError, match=f"site 'w' had another.*from the generator of {generator}"
    ):
        lp.compile(model)


@pytest.mark.parametrize("generator", COINS)
def test_a_coin_in_a_factor_is_an_error(generator: str) -> None:
    def model() -> None:
        z = lp.sample("z", string("a"))
        lp.factor("f", -COINS[generator]() * len(z))

    with pytest.raises(ValueError, match=r"'f' had another .*Randomness belongs into"):
        lp.compile(model)


@pytest.mark.parametrize("generator", COINS)
def test_a_coin_that_no_site_depends_on_is_a_warning(generator: str) -> None:
    def model() -> None:
        COINS[generator]()
        lp.sample("z", string("a"))

    with pytest.warns(lp.RandomnessWarning, match=f"the generator of {generator} outside") as heard:
        program = lp.compile(model)
    assert [w.filename for w in heard] == [__file__]
    assert program.is_static


def test_numbers_of_the_first_run_alone_are_no_matter() -> None:
    loaded: list[Any] = []

    def model() -> None:
        if not loaded:
            loaded.append(torch.nn.Linear(2, 2))
        lp.sample("z", string("a"))

    assert lp.compile(model).latents == ("z",)
    assert loaded


def test_sites_and_generators_of_the_models_own_are_let_alone() -> None:
    def model() -> None:
        p = lp.sample("p", pyro.distributions.Beta(2.0, 2.0))
        noise = torch.rand(2, generator=torch.Generator().manual_seed(3))
        weight = np.random.default_rng(3).random() + random.Random(3).random()
        lp.factor("f", p * noise.sum() * weight)
        lp.sample("z", string("a"))

    assert lp.compile(model).latents == ("p", "z")


@pytest.mark.filterwarnings("ignore::langppl.RandomnessWarning")
def test_the_check_leaves_the_generators_as_a_run_does() -> None:
    def model() -> None:
        lp.sample("z", string("a"))

    def numbers() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    expected = numbers()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    lp.compile(model)
    assert numbers() == expected


@pytest.mark.parametrize("generator", COINS)
def test_a_model_that_seeds_a_generator_itself_is_a_function(generator: str) -> None:
    seeds: dict[str, Callable[[int], Any]] = {
        "torch": torch.manual_seed,
        "random": random.seed,
        "numpy.random": np.random.seed,
    }

    def model() -> None:
        seeds[generator](3)
        lp.factor("f", COINS[generator]())
        lp.sample("z", string("a"))

    assert lp.compile(model).latents == ("z",)
