"""Rounds that are killed go on from the last one, and end as if they had not been."""

import json

import pytest
import torch

import langppl as lp
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
            from langppl.guides.training import Trainer

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
    with pytest.raises(ValueError, match="is damaged"):
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
        from langppl.guides.training import Trainer

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
