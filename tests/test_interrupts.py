"""An interrupt may come before any line: no state of the process stays behind."""

from __future__ import annotations

import gc
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from contextvars import Context
from typing import Any

import pytest
import torch

import langppl as lp
from langppl.distributions import sites
from langppl.lm import adapters, kept, model, requests
from langppl.lm.requests import ScoreRequest, serve
from langppl.lm.rules import Path, StringRules
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)
GUIDE = lp.GFlowNetGuide(LM, rank=2)
for parameter in LM.model.parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))

LOCKING = ("waiting", "_before")


@pytest.fixture(autouse=True)
def without_garbage() -> Iterator[None]:
    """Blocks of an earlier test that are collected during a trace would be traced too."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def interrupted(
    k: int, files: tuple[str, ...], act: Callable[[], object]
) -> tuple[bool, BaseException | None]:
    """Interrupts before the k-th line that is run of some files.

    Returns:
        Whether there is such a line, and what came out of it; an inference that has a draw ends
        with what it has.
    """
    seen, came = 0, False

    def trace(frame: types.FrameType, event: str, arg: Any) -> Any:
        nonlocal seen, came
        # Traces see the line of a `with` again where it ends; a signal is not looked at between
        # that and the release of a lock of Python's own.
        if not frame.f_code.co_filename.endswith(files) or frame.f_code.co_name in LOCKING:
            return None
        if event == "line":
            if seen == k:
                came = True
                raise KeyboardInterrupt
            seen += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt as error:
        return came, error
    finally:
        sys.settrace(before)
    return came, None


def everywhere(files: tuple[str, ...], act: Callable[[], object], step: int = 1) -> Iterator[int]:
    """Interrupts before each line in turn, or every few; the exceptions live on.

    As they do in a notebook.
    """
    held = []
    for k in itertools.count(0, step):
        came, error = interrupted(k, files, act)
        if not came:
            return
        held.append(error)
        yield k


def logits() -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = LM.model(torch.tensor([LM.encode_text("ab")])).logits
    return found


def assert_as_it_was(expected: torch.Tensor, k: int) -> None:
    assert LM.active_adapter is None and LM._blocks == [], k
    assert all(layer._disable_adapters for layer in adapters._layers(LM.model)), k
    torch.testing.assert_close(logits(), expected, rtol=0, atol=0, msg=str(k))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"), k
    assert requests._states.get() is None and requests._digests.get() is None, k
    assert requests._server.get() is None, k
    assert kept._trees.get() is None and sites.current() is None, k
    assert not requests._alone._is_owned() and not requests._last.locked(), k


def under_adapter() -> None:
    with LM.adapter(GUIDE.adapter):
        assert not torch.equal(logits(), EXPECTED)


EXPECTED = logits()


def test_a_block_with_an_adapter() -> None:
    count = 0
    for k in everywhere(("lm/model.py", "lm/adapters.py"), under_adapter):
        assert_as_it_was(EXPECTED, k)
        count += 1
    assert count > 50


def test_blocks_within_one_another() -> None:
    def act() -> None:
        with LM.adapter(GUIDE.adapter), LM.adapter(None), LM.adapter(GUIDE.adapter):
            pass

    def check() -> None:
        with LM.adapter(GUIDE.adapter):
            try:
                act()
            finally:
                assert LM.active_adapter == GUIDE.adapter
                assert not any(layer._disable_adapters for layer in adapters._layers(LM.model))

    for k in everywhere(("lm/model.py",), act):
        assert_as_it_was(EXPECTED, k)
    check()


def test_blocks_that_end_out_of_turn() -> None:
    """As those of two executions do."""
    first, second = LM.adapter(GUIDE.adapter), LM.adapter(None)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert LM.active_adapter is None
    second.__exit__(None, None, None)
    assert_as_it_was(EXPECTED, 0)


def test_a_block_that_was_left_may_end_late() -> None:
    late = LM.adapter(GUIDE.adapter)
    requests.alone(late.__enter__)()
    assert_as_it_was(EXPECTED, 0)
    with LM.adapter(GUIDE.adapter):
        late.__exit__(None, None, None)
        assert LM.active_adapter == GUIDE.adapter and not torch.equal(logits(), EXPECTED)
    assert_as_it_was(EXPECTED, 0)


PROCESS = (
    "contextlib.py",
    "grad_mode.py",
    "autocast_mode.py",
    "lm/model.py",
    "lm/adapters.py",
    "lm/requests.py",
    "lm/nested.py",
    "lm/kept.py",
)


def test_scores_under_an_adapter() -> None:
    path = LM.bind(StringRules(max_tokens=4)).parse(LM.encode_text("ab"), b"ab", None)
    assert isinstance(path, Path)
    request = ScoreRequest(LM, LM.encode_text("a"), path, adapter=GUIDE.adapter)
    expected = serve([request])[0].log_prob

    def act() -> None:
        LM.memo.clear()
        serve([request])

    count = 0
    for k in everywhere(PROCESS, act):
        assert_as_it_was(EXPECTED, k)
        count += 1
    assert count > 200
    LM.memo.clear()
    assert serve([request])[0].log_prob == expected


def story() -> None:
    z = lp.sample("z", lp.LMString(LM, "a", stop=".", max_tokens=1))
    lp.sample("seen", lp.LMString(LM, f"a{z}"), obs="ab")


@pytest.mark.filterwarnings("ignore:interrupted")
def test_an_inference_under_a_guide() -> None:
    program = lp.compile(story)
    expected = lp.infer(program, guide=GUIDE, num_samples=1, progress=False).log_evidence

    def act() -> None:
        LM.memo.clear()
        lp.infer(program, guide=GUIDE, num_samples=1, progress=False)

    count = 0
    for k in everywhere(PROCESS, act, step=23):
        assert_as_it_was(EXPECTED, k)
        count += 1
    assert count > 20
    LM.memo.clear()
    again = lp.infer(program, guide=GUIDE, num_samples=1, progress=False).log_evidence
    assert again == pytest.approx(expected, abs=1e-6)


def test_adding_an_adapter() -> None:
    config = LM.model.peft_config[GUIDE.adapter]

    def act() -> None:
        LM.add_adapter("other", config)

    # Each takes a while, as an adapter has many parts.
    for k in everywhere(("lm/model.py", "lm/requests.py"), act, step=3):
        assert_as_it_was(EXPECTED, k)
        if "other" in adapters.names(LM.model):
            LM.remove_adapter("other")
    LM.remove_adapter("other")

    def remove() -> None:
        LM.add_adapter("other", config)
        LM.remove_adapter("other")

    for k in everywhere(("lm/model.py",), remove, step=4):
        assert_as_it_was(EXPECTED, k)
        if "other" in adapters.names(LM.model):
            LM.remove_adapter("other")


def test_modes_that_were_left_switched() -> None:
    @requests.alone
    def leave() -> None:
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        requests.same_weights().__enter__()
        sites.naming("z").__enter__()

    leave()
    assert_as_it_was(EXPECTED, 0)


def test_a_block_is_closed_in_another_context() -> None:
    """What an interrupt has left is closed by the garbage collector, wherever that happens."""
    for block in (sites.naming("z"), requests.served_by(None), requests.same_weights()):
        Context().run(block.__enter__)
        block.__exit__(None, None, None)
    assert sites.current() is None and requests._states.get() is None


def test_files_of_the_lm_are_those_that_are_traced() -> None:
    for module, file in ((model, "lm/model.py"), (adapters, "lm/adapters.py")):
        assert str(module.__file__).endswith(file)
