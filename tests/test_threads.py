"""Threads take turns: each gets what it would get alone."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import langppl as lp
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def story(prompt: str = "a", seen: str = "ab") -> None:
    z = lp.sample("z", lp.LMString(LM, prompt, stop=".", max_tokens=4))
    lp.sample("seen", lp.LMString(LM, f"{prompt}{z}"), obs=seen)


def guide_of(seed: int) -> lp.GFlowNetGuide:
    guide = lp.GFlowNetGuide(LM, rank=2, seed=seed)
    return guide.fit(story, steps=8, batch=8, learning_rate=1e-2, progress=False)


def test_inferences_under_different_guides() -> None:
    first, second = guide_of(1), guide_of(2)
    rows: dict[str, dict[str, Any]] = {
        "prior": {},
        "first": {"guide": first},
        "second": {"guide": second},
        "smc": {"guide": first, "method": "smc", "every": 1},
        "mh": {"method": "mh", "chains": 8},
    }
    settings = {"num_samples": 60, "progress": False}
    alone = {k: lp.infer(story, **settings, **row).probabilities("z") for k, row in rows.items()}
    found: dict[str, Any] = {}

    def ask(name: str) -> None:
        for turn in range(3):
            posterior = lp.infer(story, **settings, **rows[name])
            found[f"{name} {turn}"] = posterior.probabilities("z")

    threads = [threading.Thread(target=ask, args=(name,)) for name in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for name, probabilities in found.items():
        assert probabilities == pytest.approx(alone[name.split()[0]], abs=1e-6), name


def test_trainings_beside_one_another() -> None:
    program = lp.compile(story)
    rows = program.simulate(20, lengths={"seen": 2})
    alone = [guide_of(seed).log_q(program, rows) for seed in (1, 2)]
    found: dict[int, lp.GFlowNetGuide] = {}

    def train(seed: int) -> None:
        found[seed] = guide_of(seed)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in zip((1, 2), alone, strict=True):
        assert found[seed].log_q(program, rows) == pytest.approx(expected, abs=1e-4)


def test_threads_of_an_event_loop() -> None:
    async def ask_all() -> list[lp.Posterior]:
        calls = [
            asyncio.to_thread(lp.infer, story, num_samples=40, seed=s, progress=False)
            for s in range(4)
        ]
        return list(await asyncio.gather(*calls))

    found = asyncio.run(ask_all())
    alone = [lp.infer(story, num_samples=40, seed=s, progress=False) for s in range(4)]
    assert [p.samples for p in found] == [p.samples for p in alone]


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="forks")
def test_a_fork_beside_a_thread_at_work_infers() -> None:
    script = Path(__file__).with_name("forked.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout == "inferred\n", done.stderr
