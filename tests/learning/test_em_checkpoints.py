"""Rounds that are killed go on from the last one, and end as if they had not been."""

import json
import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import langppl as lp
from langppl.guides import checkpoints
from langppl.guides.training import Trainer
from langppl.learning import rounds
from langppl.testing import tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore::langppl.JoinWarning")

DATA = [("a", "a"), ("b", "b"), ("ab", "a")]


class Killed(Exception):
    pass


def run(folder, guide="gflownet", **options):
    lm = tiny_lm("ab.", merged=["ab"], sharpness=0.3)
    view = lm.trainable("v", rank=2)

    def model(text, label):
        z = lp.sample("z", lp.LMString(lm, text, stop=".", max_tokens=2))
        lp.sample("label", lp.LMChoice(view, f"{text}{z}b", ["a", "b"]), obs=label)

    own = lp.GFlowNetGuide(lm, rank=2, seed=3) if guide == "gflownet" else guide
    fit = {"fit": {"steps": 4, "batch": 4, "checkpoint_every": 2}} if guide == "gflownet" else {}
    settings = {"rounds": 2, "steps": 3, "num_samples": 6, "observations": 2, **fit, **options}
    result = lp.em(model, DATA, own, checkpoint=folder, **settings)
    weights = {n: p.detach().clone() for n, p in lm.model.named_parameters() if ".lora_" in n}
    return result, list(weights.values())


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("guide", "place"),
    [
        *(("gflownet", place) for place in ("draw", "maximise", "write", "guide")),
        *(("prior", place) for place in ("draw", "maximise", "write")),  # it is not trained
    ],
)
def test_it_ends_as_if_it_had_not_been_killed(tmp_path, monkeypatch, guide, place):
    whole, expected = run(tmp_path / "whole", guide)
    count = 0

    def killing(original, at):
        def inner(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                raise Killed
            return original(*args, **kwargs)

        return inner

    with monkeypatch.context() as patch:
        if place == "draw":
            patch.setattr(rounds, "posteriors", killing(rounds.posteriors, 2))
        elif place == "maximise":
            step = rounds.Maximiser._step
            patch.setattr(rounds.Maximiser, "_step", killing(step, 5))
        elif place == "write":
            patch.setattr(rounds.Keeper, "write", killing(rounds.Keeper.write, 3))
        else:
            patch.setattr(Trainer, "step", killing(Trainer.step, 8))  # the second round's last
        with pytest.raises(Killed):
            run(tmp_path / "killed", guide)
    again, found = run(tmp_path / "killed", guide)
    assert same(expected, found)
    assert again.history == whole.history
    if guide == "gflownet":
        assert again.guide.history == whole.guide.history
        assert again.guide.learned == whole.guide.learned
    # A run that is over is over: it only reads what it was.
    over, still = run(tmp_path / "killed", guide)
    assert same(still, found) and over.history == whole.history
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["step-00000003"]


def test_another_run_s_folder_is_an_error(tmp_path):
    run(tmp_path, "prior")
    with pytest.raises(ValueError, match="a checkpoint of a run with other steps; give the same"):
        run(tmp_path, "prior", steps=4)
    with pytest.raises(ValueError, match="with other guide"):
        run(tmp_path, lp.PromptedGuide())


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    run(tmp_path, "prior")
    record = tmp_path / "step-00000003" / "record.json"
    record.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="corrupt, or no langppl-checkpoint"):
        run(tmp_path, "prior")


def test_a_folder_that_cannot_be_written_to_is_found_out_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(rounds, "posteriors", lambda *a, **k: pytest.fail("it began"))
    with pytest.raises(OSError, match="cannot write a checkpoint to"):
        run(tmp_path / "file" / "folder", "prior")


@pytest.mark.parametrize("place", ["draw", "guide"])
def test_an_interruption_keeps_what_was_learned(tmp_path, monkeypatch, place):
    count = 0

    def interrupting(original, at):
        def inner(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return inner

    if place == "draw":
        monkeypatch.setattr(rounds, "posteriors", interrupting(rounds.posteriors, 2))
    else:
        monkeypatch.setattr(Trainer, "step", interrupting(Trainer.step, 6))
    with pytest.warns(UserWarning) as caught:
        result, _ = run(None)
    messages = [str(w.message) for w in caught if "interrupted" in str(w.message)]
    # A guide's training says so itself first.
    assert len(messages) == (2 if place == "guide" else 1)
    assert "interrupted after 1 of 2 rounds" in messages[-1]
    assert result.history.rows == 1


def test_a_guide_s_training_does_not_go_on_under_another_state_of_the_view(tmp_path):
    lm = tiny_lm("ab.", merged=["ab"], sharpness=0.3)
    view = lm.trainable("v", rank=2)

    def model(text, label):
        z = lp.sample("z", lp.LMString(lm, text, stop=".", max_tokens=2))
        lp.sample("label", lp.LMChoice(view, f"{text}{z}b", ["a", "b"]), obs=label)

    def fit():
        guide = lp.GFlowNetGuide(lm, rank=2)
        return guide.fit(model, DATA, steps=1, batch=2, checkpoint=tmp_path)

    fit()
    fit()
    lp.em(model, DATA, "prior", rounds=1, steps=1, num_samples=2)
    with pytest.raises(ValueError, match="a training with other adapters"):
        fit()


@pytest.mark.parametrize("number", [0, 1])
def test_a_round_goes_on_from_its_guides_checkpoint(tmp_path, monkeypatch, number):
    whole, expected = run(tmp_path / "whole")
    plain = Trainer.step
    taken = []

    def step(self, at):
        taken.append(at)
        if len(taken) == 4 * number + 4:
            raise Killed
        return plain(self, at)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(Killed):
        run(tmp_path / "cut")
    taken.clear()
    monkeypatch.setattr(Trainer, "step", lambda self, at: taken.append(at) or plain(self, at))
    resumed, weights = run(tmp_path / "cut")
    assert taken[:2] == [2, 3]  # of that round, from its checkpoint on
    assert resumed.history == whole.history and same(weights, expected)


def test_an_interruption_of_the_guides_training_ends_the_rounds(tmp_path, monkeypatch):
    plain = Trainer.step
    taken = []

    def step(self, at):
        taken.append(at)
        if len(taken) == 2:
            raise KeyboardInterrupt
        return plain(self, at)

    monkeypatch.setattr(Trainer, "step", step)
    fit = {"steps": 4, "batch": 4, "patience": 3, "validation": [("b", "a")], "validate_every": 2}
    with (
        pytest.warns(UserWarning, match="interrupted after 0 of 2 rounds"),
        pytest.warns(UserWarning, match="interrupted after 1 of 4 steps"),
    ):
        result, _ = run(tmp_path, fit=fit)
    assert result.history.rows == 0 and len(taken) == 2


def test_other_guides_views_and_data_are_refused(tmp_path, monkeypatch):
    run(tmp_path)
    made = lp.GFlowNetGuide
    for change, named in (
        ({"seed": 4}, "guide's settings"),
        ({"objective": "vargrad"}, "guide's settings"),
        ({"alpha": 8}, "guide's adapter"),
        ({"rank": 3}, "guide's adapter"),
        ({"context": lambda info: info.prompt}, "context"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(
                lp, "GFlowNetGuide", lambda lm, c=change, **own: made(lm, **{**own, **c})
            )
            with pytest.raises(ValueError, match=f"other {named}"):
                run(tmp_path)
    with pytest.raises(ValueError, match="other validation"):
        run(tmp_path, validation=[("b", "a")])


@pytest.mark.parametrize("changed", [False, True])
def test_data_in_lists_count(tmp_path, changed):
    lm = tiny_lm("ab.", merged=["ab"], sharpness=0.3)
    view = lm.trainable("v", rank=2)

    def model(labels):
        for k, label in enumerate(labels):
            lp.sample(f"label{k}", lp.LMChoice(view, f"b{k}a", ["a", "b"]), obs=label)

    options = {"rounds": 1, "steps": 1, "progress": False, "checkpoint": tmp_path}
    lp.em(model, [(["a", "a"],)], **options)
    if not changed:
        assert lp.em(model, [(["a", "a"],)], **options).history.rows == 2
        return
    with pytest.raises(ValueError, match="other data"):
        lp.em(model, [(["b", "b"],)], **options)


def test_tensors_among_the_arguments(tmp_path):
    lm = tiny_lm("ab.", sharpness=0.3)
    view = lm.trainable("v", rank=2)

    def model(features, label):
        text = "a" if float(features.sum()) > 0 else "b"
        lp.sample("label", lp.LMChoice(view, text, ["a", "b"]), obs=label)

    options = {"rounds": 1, "steps": 1, "progress": False}
    one = torch.ones(2, dtype=torch.bfloat16)
    for folder in (None, tmp_path):
        lp.em(model, [(one, "a")], checkpoint=folder, **options)
    with pytest.raises(ValueError, match="other data"):
        lp.em(model, [(2 * one, "a")], checkpoint=tmp_path, **options)


def twist_of(name, text, scale):
    return scale * text.count("a")


def test_options_of_the_method_count(tmp_path):
    smc = {"guide": "prior", "method": "smc", "rounds": 1}
    run(tmp_path, **smc, twist=partial(twist_of, scale=1.0), every=5)
    # Another object of the same content, and an option that is at its default.
    assert run(tmp_path, **smc, twist=partial(twist_of, scale=1.0))[0].history.rows == 2
    for options in ({"twist": partial(twist_of, scale=2.0)}, {"twist": "lookahead"}, {}):
        with pytest.raises(ValueError, match="other options of the method"):
            run(tmp_path, **smc, **options)


def test_options_of_the_guides_training(tmp_path):
    def options(callback, **changes):
        fit = {"steps": 2, "batch": 4, "callback": callback, "validation": [("b", "a")]}
        fit |= {"schedule": lp.RewardSchedule(start=0.7), "betas": [0.8, 0.9], **changes}
        return {"rounds": 1, "fit": fit}

    seen = []
    run(tmp_path, **options(seen.append))
    assert len(seen) == 4
    # Another function of no other effect, and what prints alike in every process.
    again = options(lambda figures: None, betas=(0.8, 0.9), tensorboard=None)
    assert run(tmp_path, **again)[0].history.rows == 2
    for changes in (
        {"validation": [("b", "b")]},
        {"validation": None},
        {"schedule": lp.RewardSchedule(start=0.8)},
        {"betas": (0.8, 0.99)},
    ):
        with pytest.raises(ValueError, match="with other fit; give the same"):
            run(tmp_path, **options(None, **changes))


def test_what_held_out_programs_observe_counts(tmp_path):
    lm = tiny_lm("ab.", sharpness=0.3)
    view = lm.trainable("v", rank=2)

    def model(text):
        lp.sample("label", lp.LMChoice(view, text, ["a", "b"]), obs="a")

    program = lp.compile(model, "ab")
    other = program.observing({"label": "b"})
    options = {"rounds": 1, "steps": 1, "progress": False, "checkpoint": tmp_path}
    lp.em([program], validation=[(program, None)], **options)
    with pytest.raises(ValueError, match="other validation"):
        lp.em([program], validation=[(other, None)], **options)


BRANCHING = """
import langppl as lp
from langppl.guides import checkpoints
from langppl.testing import tiny_lm

lm = tiny_lm("ab.", seed=1)

def model():
    k = lp.sample("k", lp.LMChoice(lm, "a", ["a", "b", "."]))
    names = {"a": ["x"], "b": ["one", "two", "three"], ".": ["four", "five"]}[str(k)]
    for name in names:
        lp.sample(name, lp.LMChoice(lm, name[0] + "b", ["a", "b"]))

program = lp.compile(model)
print(list(program.sites), checkpoints.digest(checkpoints.form_of(program)))
"""


def test_a_program_looks_the_same_in_every_process():
    said = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", BRANCHING],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(2)
    }
    assert len(said) == 1 and "three" in said.pop()


def test_objects_among_the_arguments_do_not_tell_where_they_are():
    class Record:
        pass

    first, second = (np.array([Record(), "a", 1], dtype=object) for _ in range(2))
    assert checkpoints.plain(first) == checkpoints.plain(second)
    assert checkpoints.plain(first) != checkpoints.plain(first[1:])
    assert checkpoints.plain({"b", "a"}) == checkpoints.plain({"a", "b"})
    assert checkpoints.plain({"b", "a"}) != checkpoints.plain({"b", "c"})


def test_only_what_it_wrote_is_removed(tmp_path):
    theirs = ("guide-v1", "guide-", "guide-2b", "guide-7")
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text("precious")
    run(tmp_path, "prior")
    assert sorted(p.name for p in tmp_path.iterdir()) == [*sorted(theirs), "step-00000003"]
    assert all((tmp_path / name / "adapter_model.safetensors").is_file() for name in theirs)


@pytest.mark.parametrize(
    "damage", [{"history": "x"}, {"steps": -1}, {"steps": math.inf}, {"history": {}}, "weights"]
)
def test_a_checkpoint_that_no_run_wrote_changes_nothing(tmp_path, damage):
    run(tmp_path, "prior")
    path = tmp_path / "step-00000003"
    if damage == "weights":
        tensors = load_file(path / "tensors.safetensors")
        name = next(k for k in tensors if k.startswith("weight "))
        save_file({**tensors, name: tensors[name] * math.nan}, path / "tensors.safetensors")
    else:
        record = json.loads((path / "record.json").read_text())
        (path / "record.json").write_text(json.dumps({**record, **damage}))
    with pytest.raises(ValueError, match="is of another run, or damaged"):
        run(tmp_path, "prior")
