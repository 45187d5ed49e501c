"""A checkpoint that is no good is refused by name, and changes nothing."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file, save_file

import langppl as lp
from langppl.guides import checkpoints
from langppl.guides.keeping import Keeper
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=2)
STEP = "step-00000002"
Tensors = dict[str, torch.Tensor]


def story(end: float = 3.0) -> None:
    p = lp.sample("p", dist.Beta(2.0, 3.0))
    z = lp.sample("z", lp.LMString(LM, "ab", max_tokens=2))
    lp.sample("n", dist.Normal(p + len(z), 1.0), obs=torch.tensor(end))


def fit(guide: lp.GFlowNetGuide, folder: Path) -> None:
    guide.fit(story, [(3.0,), (2.0,)], steps=2, batch=4, checkpoint=folder, progress=False)


def made() -> lp.GFlowNetGuide:
    return lp.GFlowNetGuide(LM, rank=2, seed=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Tensors]:
    folder = tmp_path_factory.mktemp("whole")
    fit(made(), folder)
    record = json.loads((folder / STEP / checkpoints.RECORD).read_text())
    return record, load_file(folder / STEP / checkpoints.TENSORS)


def put(folder: Path, record: dict[str, Any], tensors: Tensors) -> None:
    (folder / STEP).mkdir()
    (folder / STEP / checkpoints.RECORD).write_text(json.dumps(record))
    save_file(tensors, folder / STEP / checkpoints.TENSORS)


def check_refused(folder: Path) -> None:
    guide = made()
    before = guide.identity()
    with pytest.raises(ValueError, match="damaged") as error:
        fit(guide, folder)
    assert str(folder) in str(error.value)
    assert guide.identity() == before and not guide.history and not guide.heads.made
    assert not guide.learned


def of(tensors: Tensors, kind: str) -> str:
    return next(k for k in sorted(tensors) if k.startswith(kind))


def changed(kind: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        name = of(tensors, kind)
        tensors[name] = make(tensors[name]).contiguous()

    return change


@pytest.mark.parametrize(
    "damage",
    [
        changed("weight ", lambda t: t * math.nan),
        changed("weight heads", lambda t: t + math.inf),
        changed("weight ", lambda t: t.flatten()[:1]),
        changed("weight ", lambda t: t[:1]),
        changed("weight ", lambda t: t.int()),
        changed("exp_avg ", lambda t: t * math.nan),
        changed("exp_avg ", lambda t: t.flatten()[:1]),
        changed("exp_avg_sq ", lambda t: t - 1.0),
        changed("step ", lambda t: t - 100.0),
        changed("step ", lambda t: t[None]),
        changed("buffer spread", lambda t: t[:1]),
        lambda tensors: tensors.pop(of(tensors, "weight ")),
        lambda tensors: tensors.pop(of(tensors, "exp_avg ")),
        lambda tensors: tensors.pop("buffer centre"),
        lambda tensors: tensors.update({"weight other": torch.zeros(1)}),
    ],
)
def test_tensors_that_no_training_wrote(
    whole: Any, tmp_path: Path, damage: Callable[[Tensors], Any]
) -> None:
    record, tensors = whole[0], dict(whole[1])
    damage(tensors)
    put(tmp_path, record, tensors)
    check_refused(tmp_path)


ROW = {"contexts": [], "buffer": [], "ready": [], "given": None, "again": [], "anchors": []}


@pytest.mark.parametrize(
    "damage",
    [
        {"step": -5},
        {"step": 3},
        {"step": math.inf},
        {"step": "2"},
        {"history": "x"},
        {"history": {}},
        {"history": {"loss": [[]]}},
        {"heads": [1]},
        {"heads": {"beta-1": 10**9}},
        {"heads": {"a.b": 2}},
        {"settings": None},
        {"met": [99]},
        {"met": [-1]},
        {"leads": [99]},
        {"leads": "x"},
        {"observations": {"99": {**ROW, "since": None}}},
        {"observations": {"x": {**ROW, "since": None}}},
        {"observations": {"0": None}},
        {"observations": {"0": ROW}},
        {"observations": {"0": {**ROW, "since": None, "buffer": [[1.0, {"contexts": {"z": 0}}]]}}},
        {"observations": []},
        {"learned": [[]]},
        {"best": "x"},
        {"averaged": {"x": 1}},
        {"averaged": None},
        {"waited": -1},
        {"is_over": "no"},
    ],
    ids=str,
)
def test_records_that_no_training_wrote(whole: Any, tmp_path: Path, damage: dict[str, Any]) -> None:
    put(tmp_path, {**whole[0], **damage}, whole[1])
    check_refused(tmp_path)


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a": "\xff"}'])
def test_a_record_that_is_none(whole: Any, tmp_path: Path, content: bytes) -> None:
    put(tmp_path, *whole)
    (tmp_path / STEP / checkpoints.RECORD).write_bytes(content)
    check_refused(tmp_path)


def test_a_step_beyond_the_training(whole: Any, tmp_path: Path) -> None:
    put(tmp_path, {**whole[0], "step": 10**12}, whole[1])
    (tmp_path / STEP).rename(tmp_path / f"step-{10**12}")
    check_refused(tmp_path)


# -- one folder, one training -------------------------------------------------------------------


HOLDS = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1] + "/.lock")
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_that_another_process_trains_in_is_refused_until_it_dies(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        guide = made()
        with pytest.raises(OSError, match="another training writes its checkpoints here") as error:
            fit(guide, tmp_path)
        assert str(tmp_path) in str(error.value) and not guide.history
    finally:
        other.kill()
        other.wait()
        if other.stdout is not None:
            other.stdout.close()
    fit(guide, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [STEP]


def test_all_processes_hear_of_another_training(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, None, is_first=False)

    class Others:
        """Two processes, of which this is the second."""

        def gather(self, said: list[str]) -> list[str]:
            assert said == []
            return ["another training writes its checkpoints here"]

    class Training:
        workers = Others()

    with pytest.raises(OSError, match="another training") as error:
        keeper.resume(Training())  # type: ignore[arg-type]
    assert error.value.errno == errno.EBUSY


def test_a_disk_without_locks_takes_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(handle: int, flags: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    fit(made(), tmp_path)
    assert STEP in [p.name for p in tmp_path.iterdir()]


def test_two_trainings_of_one_process_do_not_share_a_folder(tmp_path: Path) -> None:
    said = []

    def callback(figures: Any) -> None:
        with pytest.raises(OSError, match="another training") as error:
            fit(made(), tmp_path)
        said.append(error.value)

    guide = made()
    guide.fit(story, steps=1, batch=4, checkpoint=tmp_path, callback=callback, progress=False)
    assert len(said) == 1
    with pytest.raises(ValueError, match="of a training with other"):
        fit(made(), tmp_path)


def test_only_earlier_checkpoints_of_ones_own_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 9):
        checkpoints.write(tmp_path, step, {}, {})
        if step == 1:
            (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    checkpoints.write(tmp_path, 5, {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000001",
        "step-00000005",
        "step-00000009",
    ]
    assert [p.name for p in (tmp_path / "step-00000001").iterdir()] == ["notes.txt"]
