"""A guide that is trained on 200 observations answers for 100 that it has not seen.

The cells are a part of benchmarks/amortized.py, which runs all of them and says what is learned.
"""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("single", "subtb"),
        ("chain", "vargrad"),
        ("number", "vargrad"),
    ],
)
def test_an_amortized_guide_answers_for_unseen_observations(
    amortized: ModuleType, name: str, objective: str
) -> None:
    lm = amortized.lm_of(name)
    # There is something to learn.
    least = {"single": 0.3, "chain": 0.4, "number": 0.8}[name]
    assert amortized.mean_of(name, lm, None) > least
    model, steps = amortized.PROGRAMS[name], amortized.steps_of(name, objective)
    guide = amortized.trained(model, lm, objective, steps=steps)
    assert amortized.mean_of(name, lm, guide) <= amortized.AT_MOST[name]
