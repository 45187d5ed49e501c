"""Training in two processes equals training in one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from langppl import GFlowNetGuide, LMString, sample
from langppl.guides.workers import Workers
from langppl.testing import tiny_lm

SCRIPT = Path(__file__).parent / "distributed.py"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def trained(launcher: list[str], out: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(out)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained([], tmp_path_factory.mktemp("one") / "one.json")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # What `accelerate launch --num_processes 2` runs on a machine with two GPUs; here the script
    # asks for the CPU, so that the processes speak through gloo.
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launcher += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    return trained(launcher, tmp_path_factory.mktemp("two") / "two.json")


def test_two_processes_equal_one(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert (one["processes"], two["processes"]) == (1, 2)
    for kind in ("subtb", "tb"):
        a, b = one[kind], two[kind]
        assert len(a["history"]["loss"]) == 8
        for figure in ("loss", "elbo", "grad", "val_elbo", "val_variance"):
            np.testing.assert_allclose(
                a["history"][figure], b["history"][figure], rtol=1e-4, atol=1e-4
            )
        np.testing.assert_allclose(a["weights"], b["weights"], rtol=1e-3, atol=1e-4)


def test_two_processes_that_are_killed_go_on_with_what_each_row_has(two: dict[str, Any]) -> None:
    whole, again = two["killed"]["whole"], two["killed"]["again"]
    for unbroken, resumed in zip(whole, again, strict=True):
        assert resumed["left"] == unbroken["left"]
    assert again[-1]["history"] == whole[-1]["history"]
    # The given draws are used up as the steps go on, of every row.
    first, later, _ = (kept["left"] for kept in again)
    assert first.keys() == later.keys() == {"0", "1", "2"}
    assert all(later[row][0] < first[row][0] for row in first)


def test_each_process_knows_what_the_others_learned(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    known = [["x", "y", "z"], ["x", "y"]]
    assert one["shared"] == [known] and two["shared"] == [known] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_writes_for_tensorboard(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            written.append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append(f"{name} {step}")

        def close(self) -> None:
            pass

    class Two:
        process_index, num_processes = rank, 2

        def reduce(self, flat: torch.Tensor, reduction: str) -> torch.Tensor:
            return flat

    module = types.ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(module, "SummaryWriter", Writer, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Workers, "gather", lambda self, own: list(own))
    lm = tiny_lm(["a", "b", "."])

    def story(ending: str) -> None:
        z = sample("z", LMString(lm, "a", max_tokens=2))
        sample("y", LMString(lm, f"a{z}"), obs=ending)

    options: dict[str, Any] = {"steps": 2, "batch": 4, "progress": False, "accelerator": Two()}
    GFlowNetGuide(lm).fit(story, [("a",), ("b",)], tensorboard=tmp_path, **options)
    if rank:
        assert not written
    else:
        assert written[0] == str(tmp_path)
        assert [s for s in written if "loss" in s] == ["langppl/loss 0", "langppl/loss 1"]


def test_alone_nothing_is_gathered_or_added() -> None:
    workers = Workers()
    assert (workers.rank, workers.count, workers.is_first) == (0, 1, True)
    assert workers.gather([1, 2]) == [1, 2]
    workers.wait()


def test_gradients_are_added_and_those_that_no_process_has_stay_none() -> None:
    sent: list[torch.Tensor] = []

    class Other:
        process_index, num_processes = 1, 2

        def reduce(self, flat: torch.Tensor, reduction: str) -> torch.Tensor:
            sent.append(flat.clone())
            return flat

    class First(Other):
        process_index = 0

        def reduce(self, flat: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            return flat + sent[0]

    def parameters(*gradients: list[float] | None) -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.zeros(2)) for _ in gradients]
        for p, g in zip(made, gradients, strict=True):
            p.grad = None if g is None else torch.tensor(g)
        return made

    Workers(Other()).add_gradients(parameters([1.0, 2.0], None, [0.0, 0.0], None))
    own = parameters([10.0, 20.0], [3.0, 4.0], None, None)
    Workers(First()).add_gradients(own)
    found = [None if p.grad is None else p.grad.tolist() for p in own]
    assert found == [[11.0, 22.0], [3.0, 4.0], [0.0, 0.0], None]


def test_each_process_needs_an_observation() -> None:
    class Two:
        process_index, num_processes = 0, 2

    lm = tiny_lm(["a", "b", "."])

    def story() -> None:
        z = sample("z", LMString(lm, "a", max_tokens=2))
        sample("y", LMString(lm, f"a{z}"), obs="b")

    with pytest.raises(ValueError, match="each of the 2 processes needs an observation"):
        GFlowNetGuide(lm).fit(story, [()], accelerator=Two(), progress=False)


@pytest.fixture
def one_accelerator() -> Iterator[None]:
    """All accelerators of a process share their state, which outlives them."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def fit(accelerator: Any) -> GFlowNetGuide:
    lm = tiny_lm(["a", "b", "."])

    def story() -> None:
        z = sample("z", LMString(lm, "a", max_tokens=2))
        sample("y", LMString(lm, f"a{z}"), obs=".")

    guide = GFlowNetGuide(lm, rank=2)
    return guide.fit(story, [()], steps=1, batch=2, accelerator=accelerator, progress=False)


@pytest.mark.usefixtures("one_accelerator")
def test_an_accelerator_s_own_settings_are_not_silently_left_out() -> None:
    with pytest.warns(UserWarning) as said:
        fit(Accelerator(cpu=True, gradient_accumulation_steps=4, mixed_precision="bf16"))
    assert [w.filename for w in said] == [__file__] * 2
    assert [str(w.message) for w in said] == [
        "the accelerator's mixed_precision='bf16' has no effect: training computes in the LM's own "
        "type; for less memory make LM(name, dtype=torch.bfloat16)",
        "the accelerator's gradient_accumulation_steps=4 has no effect: each step of the training "
        "changes the weights; to spread one over passes give fit(accumulate=4)",
    ]


@pytest.mark.usefixtures("one_accelerator")
def test_a_plain_accelerator_is_taken_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Accelerator(cpu=True))


def test_an_accelerator_on_another_device_is_an_error() -> None:
    class Elsewhere:
        process_index, num_processes, device = 0, 1, torch.device("cuda", 1)

    with pytest.raises(ValueError, match=r"process 0 is on cuda:1, and the LM on cpu"):
        fit(Elsewhere())


@pytest.mark.parametrize(
    ("there", "lm", "same"),
    [
        ("cuda:1", "cuda:1", True),
        ("cuda", "cuda:0", True),
        ("cuda:1", "cuda", True),
        ("cuda:0", "cuda:1", False),
        ("cpu", "cpu", True),
        ("cpu", "cuda", False),
    ],
)
def test_devices_are_compared_by_type_and_number(there: str, lm: str, same: bool) -> None:
    class Placed:
        process_index, num_processes, device = 1, 2, torch.device(there)

    workers = Workers(Placed())
    if same:
        workers.check(torch.device(lm))
        return
    with pytest.raises(ValueError, match=f"of process 1 is on {there}, and the LM on {lm}"):
        workers.check(torch.device(lm))
