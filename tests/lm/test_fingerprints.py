"""What names an LM's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import langppl as lp
from langppl.lm import adapters, fingerprints
from langppl.testing import tiny_lm


def changed(how: str) -> lp.LM:
    lm = tiny_lm(seed=1)
    weights = dict(lm.model.named_parameters())
    with torch.no_grad():
        if how == "all a little":
            for p in weights.values():
                p.mul_(1.001)
        else:
            weights["model.layers.0.mlp.up_proj.weight"].view(-1)[1::2] += 5.0
    return lm


def test_float_types_share_a_name() -> None:
    lm = tiny_lm(seed=1)
    name = lm.weights_fingerprint
    lm.model.to(torch.bfloat16)
    assert lm.weights_fingerprint == name
    lm.model.to(torch.float32)
    assert lm.weights_fingerprint == name


@pytest.mark.parametrize("how", ["all a little", "every other number of one"])
def test_other_weights_have_another(how: str) -> None:
    assert changed(how).weights_fingerprint != tiny_lm(seed=1).weights_fingerprint


def test_adapters_do_not_count() -> None:
    lm = tiny_lm(seed=1)
    name = lm.weights_fingerprint
    lp.GFlowNetGuide(lm, rank=2)
    lm.trainable("view", rank=2)
    assert lm.weights_fingerprint == name


@pytest.mark.parametrize("what", ["guide", "trainable"])
def test_folders_know_their_lm_in_another_float_type_and_of_older_versions(
    tmp_path: Path, what: str
) -> None:
    lm = tiny_lm(seed=1)
    own = lp.GFlowNetGuide(lm, rank=2) if what == "guide" else lm.trainable("view", rank=2)
    own.save(tmp_path)

    def load(lm: lp.LM) -> object:
        if what == "guide":
            return lp.GFlowNetGuide.load(tmp_path, lm)
        return lm.trainable("view", rank=2).load(tmp_path)

    half = tiny_lm(seed=1)
    half.model.to(torch.bfloat16)
    load(half)
    with pytest.raises(ValueError, match="has other weights"):
        load(changed("all a little"))
    path = tmp_path / f"{what}.json"
    record = json.loads(path.read_text())
    base = adapters.base_tensors(tiny_lm(seed=1).model)
    record["base_fingerprint"] = fingerprints.by_means(lm.fingerprint, base)
    path.write_text(json.dumps(record))
    load(tiny_lm(seed=1))
    with pytest.raises(ValueError, match="has other weights"):
        load(tiny_lm(seed=2))


def test_a_guide_takes_a_name_that_is_free(tmp_path: Path) -> None:
    lm = tiny_lm(seed=1)
    first = lp.GFlowNetGuide(lm, rank=2)
    first.save(tmp_path)
    number = int(first.adapter.removeprefix("guide"))
    # As an LM that comes from another process has it.
    lm.load_adapter(f"guide{number + 1}", tmp_path)
    second = lp.GFlowNetGuide(lm, rank=2)
    assert second.adapter == f"guide{number + 2}"
