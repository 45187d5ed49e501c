"""Threads take turns: each gets what it would get alone."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import langppl as lp
from langppl.lm import requests
from langppl.lm.matcher import Matcher
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


def started(act: Callable[[], object]) -> threading.Thread:
    """A thread that has come to stand in line."""
    before = requests._last
    thread = threading.Thread(target=act)
    thread.start()
    while requests._last is before:
        time.sleep(0.001)
    return thread


def test_threads_are_let_in_in_their_order() -> None:
    order: list[str] = []
    note = requests.alone(order.append)

    @requests.alone
    def first() -> list[threading.Thread]:
        threads = [started(partial(note, str(k))) for k in range(6)]
        note("first")
        return threads

    threads = first()
    # It comes again, behind those that wait.
    note("again")
    for thread in threads:
        thread.join()
    assert order == ["first", "0", "1", "2", "3", "4", "5", "again"]


def test_one_that_is_interrupted_while_it_waits_lets_the_others_in() -> None:
    order: list[str] = []
    note = requests.alone(order.append)
    is_held, may_go_on = threading.Event(), threading.Event()

    @requests.alone
    def hold() -> None:
        is_held.set()
        may_go_on.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait()
    others: list[threading.Thread] = []
    before = requests._last

    def interrupt() -> None:
        while requests._last is before:
            time.sleep(0.001)
        others.append(started(partial(note, "other")))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    # A suite that was started in the background of a shell has it ignored.
    handled = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            note("interrupted")
        assert order == []
    finally:
        signal.signal(signal.SIGINT, handled)
        may_go_on.set()
    for thread in (interrupting, holder, *others):
        thread.join()
    note("after")
    assert order == ["other", "after"] and not requests._alone._is_owned()


def test_a_model_that_infers_and_raises_gives_its_turn_back() -> None:
    def outer() -> None:
        inner = lp.infer(story, num_samples=4, progress=False)
        lp.sample("z", lp.LMString(LM, "a", stop=".", max_tokens=2))
        lp.factor("bad", inner.log_evidence)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lp.infer(outer, num_samples=2, progress=False)
    done = threading.Thread(target=requests.alone(lambda: None))
    done.start()
    done.join(timeout=60)
    assert not done.is_alive()


def test_an_inference_beside_a_training_waits_for_a_few_steps() -> None:
    steps = 0
    is_over, is_training = threading.Event(), threading.Event()

    def count(*_: Any) -> bool:
        nonlocal steps
        steps += 1
        is_training.set()
        return is_over.is_set()

    guide = lp.GFlowNetGuide(LM, rank=2)
    options: dict[str, Any] = {"steps": 100_000, "batch": 8, "progress": False, "callback": count}
    training = threading.Thread(target=partial(guide.fit, story, **options))
    training.start()
    is_training.wait()
    taken = []
    for seed in range(8):
        before = steps
        lp.infer(story, num_samples=4, seed=seed, progress=False)
        taken.append(steps - before)
    is_over.set()
    training.join()
    assert max(taken) <= 3


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


def test_a_grammar_is_walked_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matcher moves from text to text: another thread would find it elsewhere."""
    go, walking, most = Matcher._go, 0, 0

    def slowly(own: Matcher, text: bytes) -> Any:
        nonlocal walking, most
        walking += 1
        most = max(most, walking)
        time.sleep(1e-4)
        found = go(own, text)
        walking -= 1
        return found

    monkeypatch.setattr(Matcher, "_go", slowly)
    form = lp.regex(r"a(b|ab)*\.?")
    known = {text: re.fullmatch(r"a(b|ab)*\.?", text) is not None for text in ALL_TEXTS}
    string = lp.LMString(LM, "a", max_tokens=5, grammar=form)
    wrong: list[str] = []

    def ask(first: int) -> None:
        for text in ALL_TEXTS[first:] + ALL_TEXTS[:first]:
            if (lp.log_matches(text, form) == 0.0) != known[text]:
                wrong.append(text)
            if (string.why_impossible(text) is None) != known[text]:
                wrong.append(text)

    each(ask, [0, 40, 80])
    assert not wrong and most == 1


ALL_TEXTS = ["".join(t) for n in (1, 2, 3, 4) for t in itertools.product("ab.", repeat=n)]


def each(task: Callable[[int], None], numbers: list[int]) -> None:
    """Runs a task in a thread for each number, and raises what they raise."""
    with ThreadPoolExecutor(len(numbers)) as pool:
        for done in [pool.submit(task, n) for n in numbers]:
            done.result()


def test_a_tool_that_asks_with_the_models_context_from_elsewhere_says_so() -> None:
    def score(text: str) -> float:
        return float(lp.LMString(LM, "a").log_prob(text))

    def tool(text: str) -> float:
        return asyncio.run(asyncio.to_thread(score, text))

    def model() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        lp.factor("f", lp.call("tool", tool, str(z)))

    with pytest.raises(RuntimeError, match="asked from another thread than the model's"):
        lp.infer(model, num_samples=2, progress=False)
