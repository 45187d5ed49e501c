"""A training that is killed and resumed ends as one that was not, bit for bit."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch

import langppl as lp
from langppl.guides import checkpoints, gflownet, observations, training
from langppl.guides.keeping import Keeper
from langppl.guides.training import Trainer
from langppl.testing import tiny_lm


@contextlib.contextmanager
def cut_off(
    monkeypatch: pytest.MonkeyPatch, step: int | None, error: BaseException | None = None
) -> Iterator[None]:
    """Within the block, trainings fail before a step; not if it is None."""
    plain = Trainer.step

    def failing(self: Trainer, at: int) -> dict[str, float]:
        if at == step:
            raise error or RuntimeError("power cut")
        return plain(self, at)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", failing)
        yield


QUICK: dict[str, Any] = {"batch": 8, "checkpoint_every": 2, "progress": False}


def program_and_guide(seed: int = 3, obs: str = "aab.") -> tuple[lp.Program, lp.GFlowNetGuide]:
    lm = tiny_lm(["a", "b", "."], seed=2, merged=["ab", "b."])

    def story() -> None:
        z = lp.sample("z", lp.LMString(lm, "ab", stop=".", max_tokens=4))
        lp.sample("y", lp.LMString(lm, f"ab{z}"), obs=obs)

    return lp.compile(story), lp.GFlowNetGuide(lm, rank=4, seed=seed)


def test_killed_at_twenty_moments_it_ends_the_same(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "20"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    *trials, last = done.stdout.splitlines()
    assert len(trials) == 20 and all(line.endswith("True") for line in trials), done.stdout
    assert last == "digests 3"
    # Some were killed in the middle: after the first checkpoint, before the last.
    assert sum("step-00000003" in t or "step-00000006" in t or "step-00000009" in t for t in trials)


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    program, guide = program_and_guide()
    guide.fit(program, steps=4, checkpoint=tmp_path, **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    again, other = program_and_guide()
    other.fit(again, steps=4, checkpoint=tmp_path, **QUICK)
    assert other.history == guide.history and len(guide.history["loss"]) == 4
    for (_, p), (_, q) in zip(
        guide.lm.model.named_parameters(), other.lm.model.named_parameters(), strict=True
    ):
        assert torch.equal(p, q)


def test_another_training_is_refused(tmp_path: Path) -> None:
    program, guide = program_and_guide()
    guide.fit(program, steps=2, checkpoint=tmp_path, **QUICK)
    program, guide = program_and_guide()
    with pytest.raises(ValueError, match="other steps, batch; give the same arguments"):
        guide.fit(program, steps=3, checkpoint=tmp_path, **{**QUICK, "batch": 6})
    program, guide = program_and_guide(obs="ab.")
    with pytest.raises(ValueError, match="other observations"):
        guide.fit(program, steps=2, checkpoint=tmp_path, **QUICK)
    program, guide = program_and_guide()
    with pytest.raises(ValueError, match="other given; give"):
        guide.fit(program, steps=2, checkpoint=tmp_path, given=[{"z": "a."}] * 8, **QUICK)
    program, guide = program_and_guide(seed=4)
    with pytest.raises(ValueError, match="other seed"):
        guide.fit(program, steps=2, checkpoint=tmp_path, **QUICK)


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_first_step(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    program, guide = program_and_guide()
    with pytest.raises(OSError, match=r"cannot write a checkpoint to .*file"):
        guide.fit(program, steps=2, checkpoint=tmp_path / "file", **QUICK)
    assert not guide.history


def with_free(monkeypatch: pytest.MonkeyPatch, free: float, total: int = 10**12) -> list[Path]:
    """A disk with so many free bytes; the folders that it is asked about."""
    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return shutil._ntuple_diskusage(total, 0, int(free))  # type: ignore[attr-defined]

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage)
    return asked


@pytest.mark.parametrize(
    "options", [{}, {"validation": True}, {"validation": True, "average": 1.0}], ids=str
)
def test_a_disk_without_room_for_two_is_an_error_before_the_first_step(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Any] = []

    def trained(folder: Path) -> lp.GFlowNetGuide:
        lm = tiny_lm(["a", "b", "."], seed=2, merged=["ab", "b."])

        def story(obs: str) -> None:
            z = lp.sample("z", lp.LMString(lm, "ab", stop=".", max_tokens=4))
            lp.sample("y", lp.LMString(lm, f"ab{z}"), obs=obs)

        # So large that the tensors' names do not count.
        guide = lp.GFlowNetGuide(lm, rank=128)
        own = {**options, "validation": [(".",)]} if options else {}
        return guide.fit(
            story, [("aab.",)], steps=2, checkpoint=folder, callback=steps.append, **QUICK, **own
        )

    trained(tmp_path / "plain")
    (path,) = (tmp_path / "plain").glob("step-*/tensors.safetensors")
    size = path.stat().st_size
    assert len(steps) == 2
    new = tmp_path / "not" / "there"
    asked = with_free(monkeypatch, 1.9 * size)
    with pytest.raises(OSError, match=r"checkpoints in .*there need \d+\.\d MB") as said:
        trained(new)
    assert said.value.errno == errno.ENOSPC
    assert f"{1.9 * size / 1e6:.1f} MB are free" in str(said.value)
    assert (asked, len(steps)) == ([new], 2) and not new.exists()
    with_free(monkeypatch, 2.01 * size)
    trained(new)
    assert len(steps) == 4


def test_what_is_there_already_counts_as_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.write(tmp_path, 1, {}, {"x": torch.zeros(10**5)})
    with_free(monkeypatch, 3.9e5)
    with pytest.raises(OSError, match=r"need 0\.4 MB"):
        checkpoints.check_room(tmp_path, 4 * 10**5)
    with_free(monkeypatch, 4e5)
    checkpoints.check_room(tmp_path, 4 * 10**5)
    # Some folders tell nothing.
    with_free(monkeypatch, 0, total=0)
    checkpoints.check_room(tmp_path, 4 * 10**5)


def test_a_finished_training_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, guide = program_and_guide()
    guide.fit(program, steps=2, checkpoint=tmp_path, **QUICK)
    with_free(monkeypatch, 0)
    program, guide = program_and_guide()
    guide.fit(program, steps=2, checkpoint=tmp_path, **QUICK)
    assert guide.history.rows == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.write(tmp_path, 1, {"a": 1}, {"x": torch.ones(2)})
    plain = Path.write_text

    def full(self: Path, text: str, **options: Any) -> int:
        return plain(Path("/dev/full"), text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(tmp_path, 2, {"a": 2}, {"x": torch.zeros(2)})
    monkeypatch.undo()
    found = checkpoints.read(tmp_path)
    assert found is not None
    step, record, tensors = found
    assert (step, record["a"], tensors["x"].tolist()) == (1, 1, [1.0, 1.0])


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    assert checkpoints.read(tmp_path) is None
    checkpoints.write(tmp_path, 7, {"x": float("-inf")}, {})
    found = checkpoints.read(tmp_path)
    assert found is not None and found[1]["x"] == float("-inf")
    path = tmp_path / "step-00000007" / checkpoints.TENSORS
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(ValueError, match="step-00000007 is damaged"):
        checkpoints.read(tmp_path)


def test_what_a_killed_write_left_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, 1, {}, {})
    (tmp_path / "step-00000002.partial").mkdir()
    found = checkpoints.read(tmp_path)
    assert found is not None and found[0] == 1
    checkpoints.write(tmp_path, 2, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_numbers_and_their_heads_survive_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Beta and two Normals: replayed, drawn ahead, and killed between two checkpoints."""

    def trained(folder: Path, fails_at: int | None) -> lp.GFlowNetGuide:
        lm = tiny_lm(["a", "b", "."], seed=2)

        def rated() -> None:
            p = lp.sample("p", dist.Beta(2.0, 3.0))
            z = lp.sample("z", lp.LMString(lm, "ab", max_tokens=2))
            r = lp.sample("r", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            lp.sample("n", dist.Normal(p + r.sum() + len(z), 1.0), obs=torch.tensor(3.0))

        guide = lp.GFlowNetGuide(lm, rank=2, seed=3)
        with cut_off(monkeypatch, fails_at):
            guide.fit(rated, steps=9, draw_ahead=2, checkpoint=folder, **QUICK)
        return guide

    whole = trained(tmp_path / "whole", None)
    with pytest.raises(RuntimeError, match="power cut"):
        trained(tmp_path / "cut", 7)
    resumed = trained(tmp_path / "cut", None)
    assert resumed.history == whole.history
    assert whole.heads.specification == {"beta-1": 2, "normal-2": 4}
    for p, q in zip(whole.heads.parameters(), resumed.heads.parameters(), strict=True):
        assert torch.equal(p, q)
    last = dict(whole.heads.named_parameters())["made.beta-1.2.weight"]
    assert float(last.detach().abs().max()) > 0


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    data = [("aab.", ["a"]), ("ab.", ["b"])]

    def story(end: str, more: list[str]) -> None:
        z = lp.sample("z", lp.LMString(guide.lm, "ab", stop=".", max_tokens=4))
        lp.sample("y", lp.LMString(guide.lm, f"ab{z}"), obs=end)

    def guide_of(**options: Any) -> lp.GFlowNetGuide:
        lm = tiny_lm(["a", "b", "."], seed=2, merged=["ab", "b."])
        return lp.GFlowNetGuide(lm, rank=4, seed=3, **options)

    def fit(**options: Any) -> None:
        guide.fit(story, **{"data": data, "steps": 2, "checkpoint": tmp_path, **QUICK, **options})

    guide = guide_of()
    fit()
    (tmp_path / "step-notes.txt").write_text("mine")
    guide = guide_of()
    fit()
    assert (tmp_path / "step-notes.txt").exists()
    guide = guide_of(alpha=16)
    with pytest.raises(ValueError, match="other alpha; give"):
        fit()
    guide = guide_of(context=lambda info: info.prompt)
    with pytest.raises(ValueError, match="other context; give"):
        fit()
    guide = guide_of(numeric="prior")
    with pytest.raises(ValueError, match="other numeric; give"):
        fit()
    guide = guide_of()
    with pytest.raises(ValueError, match="other validation; give"):
        fit(validation=[("ab.", ["a"])])
    with pytest.raises(ValueError, match="other data; give"):
        fit(data=[("aab.", ["b"]), ("ab.", ["b"])])

    def longer(end: str, more: list[str]) -> None:
        z = lp.sample("z", lp.LMString(guide.lm, "ab", stop=".", max_tokens=5))
        lp.sample("y", lp.LMString(guide.lm, f"ab{z}"), obs=end)

    with pytest.raises(ValueError, match="other model; give"):
        guide.fit(longer, data, steps=2, checkpoint=tmp_path, **QUICK)
    record = tmp_path / "step-00000002" / "record.json"
    content = json.loads(record.read_text())
    del content["waited"]
    record.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged: it lacks waited"):
        fit()


@pytest.mark.parametrize("fails", ["resume", "check_room", "write", "step", None])
def test_a_training_ends_without_open_files_and_gradients(
    fails: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Keeper] = []
    close = Keeper.close

    def noted(self: Keeper) -> None:
        closed.append(self)
        close(self)

    def failing(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(Keeper, "close", noted)
    program, guide = program_and_guide()
    named = dict(guide.lm.model.named_parameters())
    own = [p for n, p in named.items() if f".{guide.adapter}." in n]
    seen: list[bool] = []

    def look(figures: Any) -> None:
        if fails == "step":
            for p in own:
                p.grad = torch.zeros_like(p)
            raise RuntimeError("no")
        seen.append(True)

    if fails in ("resume", "check_room", "write"):
        monkeypatch.setattr(Keeper, fails, failing)
    with contextlib.nullcontext() if fails is None else pytest.raises(RuntimeError, match="no"):
        guide.fit(program, steps=2, checkpoint=tmp_path, callback=look, **QUICK)
    assert len(closed) == 1 and len(seen) == (2 if fails is None else 0)
    assert own and all(p.grad is None for p in own)


# -- many rows -----------------------------------------------------------------------------------


class Crowded:
    """A training of twelve rows, with room for some of their draws."""

    rows = tuple((k, end) for k, end in enumerate(("aab.", "ab.", "b.", "a.") * 3))
    room = 24

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.kept: list[list[int]] = []
        self.compiled: list[Any] = []

    def fit(self, fails_at: int | None = None, steps: int = 12, **options: Any) -> Any:
        lm = tiny_lm(["a", "b", "."], seed=2, merged=["ab", "b."])

        def story(number: int, end: str) -> None:
            z = lp.sample("z", lp.LMString(lm, "ab" * (number + 1), stop=".", max_tokens=4))
            lp.sample("y", lp.LMString(lm, f"ab{z}"), obs=end)

        def compiling(model: Any, *args: Any, **named: Any) -> lp.Program:
            self.compiled.append(args[0])
            return lp.compile(model, *args, **named)

        trainers: list[Trainer] = []
        run = Trainer.run

        def noted(trainer: Trainer, *args: Any) -> None:
            trainers.append(trainer)
            run(trainer, *args)

        def count(figures: Any) -> None:
            self.kept.append([len(o.buffer) for o in trainers[0].observations])

        guide = lp.GFlowNetGuide(lm, rank=2, seed=3)
        with self.monkeypatch.context() as patch, cut_off(self.monkeypatch, fails_at):
            patch.setattr(training, "REPLAYED", self.room)
            patch.setattr(gflownet, "REPLAYED", self.room)
            patch.setattr(observations, "compile", compiling)
            patch.setattr(Trainer, "run", noted)
            guide.fit(
                story,
                self.rows,
                steps=steps,
                observations=3,
                replay_distance=0.0,
                checkpoint=self.folder,
                callback=count,
                **{**QUICK, "batch": 6, **options},
            )
        weights = [p for n, p in lm.model.named_parameters() if f".{guide.adapter}." in n]
        return dict(guide.history), weights

    def taken(self, steps: int) -> Sequence[list[int]]:
        """The rows of each step."""
        trainer = object.__new__(Trainer)
        trainer.weights, trainer._orders = None, {}
        trainer.pools = [range(j, len(self.rows), 3) for j in range(3)]
        trainer.guide = type("Seeded", (), {"seed": 3})()  # type: ignore[assignment]
        return [[trainer.pick(slot, step) for slot in range(3)] for step in range(steps)]


def test_rows_that_were_not_taken_for_long_lose_what_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowded = Crowded(tmp_path, monkeypatch)
    crowded.fit()
    taken = crowded.taken(12)
    # The capacity of a row is its batch here, and eight draws of each of the three slots are kept.
    assert max(map(sum, crowded.kept)) <= 24
    lost = 0
    for step, kept in enumerate(crowded.kept):
        assert all(kept[k] for k in taken[step])
        for slot in range(3):
            last = {k: t for t, own in enumerate(taken[: step + 1]) for k in own if k % 3 == slot}
            newest = sorted(last, key=lambda k: -last[k])
            held = [k for k in newest if kept[k]]
            assert held == newest[: len(held)]
            assert sum(kept[k] for k in held) <= 8
            lost += len(newest) - len(held)
    assert lost > 12


def test_where_there_is_room_for_all_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowded = Crowded(tmp_path, monkeypatch)
    crowded.room = 72
    crowded.fit()
    assert all(
        after >= min(before, 1)
        for one, two in zip(crowded.kept, crowded.kept[1:], strict=False)
        for before, after in zip(one, two, strict=True)
    )
    assert sum(map(bool, crowded.kept[-1])) == 12


@pytest.mark.parametrize("options", [{}, {"draw_ahead": 2}, {"objective": "vargrad"}], ids=str)
def test_many_rows_resume_bit_for_bit(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Crowded(tmp_path / "whole", monkeypatch)
    history, weights = whole.fit(**options)
    cut = Crowded(tmp_path / "cut", monkeypatch)
    for fails_at in (5, 9):  # the second dies with rows that nothing was made of since the first
        with pytest.raises(RuntimeError, match="power cut"):
            cut.fit(fails_at, **options)
    found, other = cut.fit(**options)
    assert found == history
    assert all(torch.equal(p, q) for p, q in zip(weights, other, strict=True))
    assert [sum(k) for k in whole.kept[8:10]] != [0, 0]


def test_a_resumed_training_compiles_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowded = Crowded(tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match="power cut"):
        crowded.fit(11)
    crowded.compiled.clear()
    crowded.fit()
    # Two steps are left, and the others are compiled like the first.
    assert set(crowded.compiled) == {0, *crowded.taken(12)[10], *crowded.taken(12)[11]}


def test_a_context_is_written_once_for_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowded = Crowded(tmp_path, monkeypatch)
    crowded.fit(steps=4)
    (path,) = tmp_path.glob("step-*/record.json")
    record = json.loads(path.read_text())
    taken = {k for own in crowded.taken(4) for k in own}
    assert record["met"] == sorted(taken)
    assert set(record["observations"]) <= {str(k) for k in taken}
    states = record["observations"].values()
    assert states and all(len(state["contexts"]) == 1 for state in states)
    draws = [d for state in states for _, d in state["buffer"]]
    assert len(draws) > len(states)
    assert all(d["contexts"] == {"z": 0} for d in draws)


def two_lms(folder: Path, fails_at: int | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    lm, other = (tiny_lm("ab.", seed, merged=["ab"], sharpness=0.3) for seed in (0, 5))

    def model(text: str, label: str) -> None:
        z = lp.sample("z", lp.LMString(lm, text, stop=".", max_tokens=3))
        lp.sample("label", lp.LMString(other, f"{text}{z}b"), obs=label)

    guide = lp.GFlowNetGuide(lm, rank=2, seed=3, objective="vargrad")
    with cut_off(monkeypatch, fails_at):
        guide.fit(
            model,
            [("a", "a"), ("b", "b"), ("ab", "a")],
            steps=9,
            batch=5,
            observations=2,
            checkpoint=folder,
            checkpoint_every=3,
            progress=False,
        )
    return [p for n, p in lm.model.named_parameters() if f".{guide.adapter}." in n]


@pytest.mark.filterwarnings("ignore::langppl.JoinWarning")
def test_a_program_on_two_lms_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = two_lms(tmp_path / "whole", None, monkeypatch)
    for at in (4, 7):
        with pytest.raises(RuntimeError, match="power cut"):
            two_lms(tmp_path / str(at), at, monkeypatch)
        resumed = two_lms(tmp_path / str(at), None, monkeypatch)
        assert all(map(torch.equal, whole, resumed))


def test_an_interrupted_training_goes_on_in_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(folder: Path, stops_at: int | None) -> lp.GFlowNetGuide:
        lm = tiny_lm(["a", "b", "."], seed=2)

        def rated() -> None:
            p = lp.sample("p", dist.Beta(2.0, 3.0))
            z = lp.sample("z", lp.LMString(lm, "ab", max_tokens=2))
            lp.sample("n", dist.Normal(p + len(z), 1.0), obs=torch.tensor(3.0))

        guide = lp.GFlowNetGuide(lm, rank=2, seed=3)
        options = {**QUICK, "checkpoint_every": 5}
        if stops_at is not None:
            stopped = cut_off(monkeypatch, stops_at, KeyboardInterrupt())
            with stopped, pytest.warns(UserWarning, match="interrupted"):
                guide.fit(rated, steps=8, checkpoint=folder, **options)
        guide.fit(rated, steps=8, checkpoint=folder, **options)
        return guide

    whole, again = trained(tmp_path / "whole", None), trained(tmp_path / "cut", 3)
    assert again.history == whole.history
    for p, q in zip(whole.heads.parameters(), again.heads.parameters(), strict=True):
        assert torch.equal(p, q)


def test_another_observation_of_any_program_is_noticed(tmp_path: Path) -> None:
    def programs(second: str) -> tuple[list[lp.Program], lp.GFlowNetGuide]:
        lm = tiny_lm(["a", "b", "."], seed=2, merged=["ab", "b."])

        def story() -> None:
            z = lp.sample("z", lp.LMString(lm, "ab", stop=".", max_tokens=4))
            lp.sample("y", lp.LMString(lm, f"ab{z}"), obs="aab.")

        program = lp.compile(story)
        own = [program, program.observing({"y": second})]
        return own, lp.GFlowNetGuide(lm, rank=2)

    own, guide = programs("bb.")
    guide.fit(own, steps=2, checkpoint=tmp_path, **QUICK)
    own, guide = programs("ab.")
    with pytest.raises(ValueError, match="with other data; give the same"):
        guide.fit(own, steps=2, checkpoint=tmp_path, **QUICK)
    own, guide = programs("bb.")
    guide.fit(own, steps=2, checkpoint=tmp_path, **QUICK)
    assert guide.history.rows == 2


def test_a_checkpoint_stays_whole_where_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    program, guide = program_and_guide()

    def moves(figures: Any) -> None:
        os.chdir(tmp_path / "elsewhere")

    guide.fit(program, steps=4, checkpoint="kept", callback=moves, **QUICK)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["step-00000004"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    program, guide = program_and_guide()
    guide.fit(program, steps=2, checkpoint="~/kept", **QUICK)
    guide.save("~/guide")
    lp.GFlowNetGuide.load("~/guide", guide.lm)
    lp.infer(program, num_samples=4).save("~/posterior.json")
    lp.Posterior.load("~/posterior.json")
    guide.lm.trainable("view", rank=2).save("~/view")
    guide.lm.trainable("view", rank=2).load("~/view")
    names = ["guide", "kept", "posterior.json", "view"]
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_guide_is_no_file(tmp_path: Path) -> None:
    guide = program_and_guide()[1]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"cannot be saved .*give a folder") as caught:
        guide.save(tmp_path / "file")
    assert caught.value.filename == str(tmp_path / "file")
