"""Models of the Hugging Face Hub, read from its cache folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import langppl as lp
from langppl.testing import tiny_lm

REVISIONS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, lp.LM]:
    """A hub's cache with one model in two revisions; their LMs by revision."""
    from huggingface_hub import constants
    from transformers.utils import hub as transformers_hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert transformers_hub.constants is constants
    place = tmp_path / "models--org--tiny"
    lms = {}
    for seed, (name, commit) in enumerate(REVISIONS.items()):
        lms[name] = lm = tiny_lm("ab", seed=seed)
        lm.model.save_pretrained(place / "snapshots" / commit)
        lm.tokenizer.save_pretrained(place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / name).write_text(commit)
    return lms


def evidence(lm: lp.LM) -> float:
    def model() -> None:
        lp.sample("x", lp.LMString(lm, "a", max_tokens=4), obs="ab")

    return float(lp.infer(model, progress=False).log_evidence)


@pytest.mark.parametrize("revision", [None, "main", "v2", "b" * 40])
def test_a_revision_is_read(hub: dict[str, lp.LM], revision: str | None) -> None:
    lm = lp.LM("org/tiny", device="cpu", dtype=torch.float32, revision=revision)
    expected = {name: evidence(own) for name, own in hub.items()}
    assert abs(expected["main"] - expected["v2"]) > 1e-2
    which = "v2" if revision in ("v2", "b" * 40) else "main"
    assert evidence(lm) == pytest.approx(expected[which], abs=1e-5)
    assert lm.revision == revision


def test_an_adapter_names_the_revision(hub: dict[str, lp.LM], tmp_path: Path) -> None:
    from peft import PeftConfig

    lm = lp.LM("org/tiny", revision="v2")
    lp.GFlowNetGuide(lm, rank=2).save(tmp_path / "guide")
    lm.trainable("view", rank=2).save(tmp_path / "view")
    for folder in ("guide", "view"):
        config = PeftConfig.from_pretrained(str(tmp_path / folder))
        assert (config.base_model_name_or_path, config.revision) == ("org/tiny", "v2")


def test_a_revision_that_is_not_there(hub: dict[str, lp.LM]) -> None:
    with pytest.raises(OSError, match="the LM 'org/tiny', revision 'v3', could not be read"):
        lp.LM("org/tiny", revision="v3")
    with pytest.raises(OSError, match="the LM 'org/other' could not be read"):
        lp.LM("org/other")


@pytest.mark.parametrize("options", [{"revision": "v2"}, {"token": "hf_x"}, {"token": False}])
def test_a_folder_has_no_revision(tmp_path: Path, options: dict[str, str]) -> None:
    lm = tiny_lm("ab")
    lm.model.save_pretrained(tmp_path / "own")
    lm.tokenizer.save_pretrained(tmp_path / "own")
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name} go with a hub id; .*own"):
        lp.LM(tmp_path / "own", **options)


@pytest.mark.parametrize("what", ["pickle", "outside", "adapter", "config"])
def test_files_that_are_not_to_be_read(hub: dict[str, lp.LM], tmp_path: Path, what: str) -> None:
    place = tmp_path / "models--org--tiny" / "snapshots" / REVISIONS["v2"]
    if what == "adapter":
        (place / "adapter_config.json").write_text("{}")
        message = "the hub's 'org/tiny' holds a model and a PEFT adapter"
    elif what == "config":
        config = json.loads((place / "config.json").read_text())
        config["transformers_weights"] = "sub/evil.safetensors.index.json"
        (place / "config.json").write_text(json.dumps(config))
        message = "transformers_weights='sub/evil"
    else:
        (place / "model.safetensors").unlink()
        shard = "evil.bin" if what == "pickle" else "../w.safetensors"
        index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
        message = "names the weights"
    with pytest.raises(ValueError, match=message):
        lp.LM("org/tiny", revision="v2")
    assert lp.LM("org/tiny", revision="main").revision == "main"
