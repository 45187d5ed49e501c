"""An adapter's folder may come from anywhere: it loads as plain LoRA, or leaves all as it was."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from langppl.lm import LM
from langppl.testing import tiny_lm

IDS = torch.tensor([[1, 2, 3, 1, 2]])


def logits(lm: LM) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm.model(input_ids=IDS).logits
    return found


def saved(folder: Path, **options: Any) -> torch.Tensor:
    """Saves an adapter, and returns what the LM says under it."""
    lm = tiny_lm("ab.", seed=1)
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], **options}
    lm.add_adapter("own", LoraConfig(init_lora_weights=False, **config))
    lm.save_adapter("own", folder)
    with lm.adapter("own"):
        return logits(lm)


def change(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def names_in(lm: LM) -> list[str]:
    return [n.replace(".base_layer", "") for n, _ in lm.model.named_parameters()]


def check_refused(folder: Path, message: str) -> None:
    lm = tiny_lm("ab.", seed=1)
    before, names = logits(lm), names_in(lm)
    layers = lm.model.config.num_hidden_layers
    with pytest.raises(ValueError, match=message):
        lm.load_adapter("new", folder)
    assert torch.equal(logits(lm), before)
    assert names_in(lm) == names
    assert lm.model.config.num_hidden_layers == layers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"use_rslora": True, "lora_alpha": 7},
        {"lora_dropout": 0.3},
        {"use_dora": True},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"^model.layers.1": 4}},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    ],
)
@pytest.mark.filterwarnings("ignore:.*alpha_pattern")
def test_what_peft_makes_is_loaded(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = saved(tmp_path, **options)
    lm = tiny_lm("ab.", seed=1)
    lm.load_adapter("new", tmp_path)
    with lm.adapter("new"):
        torch.testing.assert_close(logits(lm), expected)
    assert not torch.equal(logits(lm), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": [], "trainable_token_indices": {}, "layer_replication": []},
        {"loftq_config": None, "megatron_core": None, "lora_bias": None},
        {"rank_pattern": None, "use_dora": None, "fan_in_fan_out": None, "lora_dropout": None},
        {"qalora_group_size": 32, "use_qalora": False},
    ],
)
def test_what_is_unset_has_several_forms(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = saved(tmp_path)
    change(tmp_path, **options)
    lm = tiny_lm("ab.", seed=1)
    lm.load_adapter("new", tmp_path)
    with lm.adapter("new"):
        torch.testing.assert_close(logits(lm), expected)


def test_what_other_versions_of_peft_write(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    change(tmp_path, some_new_option=None, peft_version="9.9", init_lora_weights=True)
    path = tmp_path / "adapter_config.json"
    old = ("peft_type", "base_model_name_or_path", "bias", "lora_alpha", "r", "target_modules")
    whole = json.loads(path.read_text())
    for content in (whole, {k: whole[k] for k in old}):
        path.write_text(json.dumps(content))
        lm = tiny_lm("ab.", seed=1)
        lm.load_adapter("new", tmp_path)
        with lm.adapter("new"):
            torch.testing.assert_close(logits(lm), expected)


SLOW = r"(([a-z_]*)*)*\d(([a-z_.]*)*)*!"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_replication": [[1, 2]]}, "its layer_replication is not plain LoRA"),
        ({"layer_replication": [[0, 1], [0, 1], [0, 1]]}, "layer_replication"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"some_new_option": 3}, "some_new_option"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"init_lora_weights": "pissa"}, "'pissa' rewrites the LM's own weights"),
        ({"bias": "all"}, "bias='all' changes the LM itself"),
        ({"peft_type": "LOHA"}, "must be a LoRA, got a 'LOHA'"),
        ({"peft_type": ["LORA"]}, "must be a LoRA"),
        ({"target_modules": SLOW}, "a pattern is no name"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"exclude_modules": SLOW}, "exclude_modules"),
        ({"layers_pattern": [SLOW], "layers_to_transform": [0]}, "layers_pattern"),
        ({"rank_pattern": {SLOW: 3}}, "rank_pattern"),
        ({"alpha_pattern": {SLOW: 3}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern"),
        ({"lora_alpha": "x"}, "lora_alpha='x', and this must be a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": 0}, "r=0, and this must be an integer of at least 1"),
        ({"r": 2.0}, "r=2.0"),
        ({"r": 10**400}, "r="),
        ({"lora_dropout": 1.5}, "lora_dropout"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
    ],
)
def test_a_config_that_asks_for_more_changes_nothing(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    saved(tmp_path)
    change(tmp_path, **options)
    started = time.monotonic()
    check_refused(tmp_path, message)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("options", [{"r": 10**9}, {"rank_pattern": {"q_proj": 10**9}}])
def test_weights_of_a_false_rank_are_never_made(tmp_path: Path, options: dict[str, Any]) -> None:
    saved(tmp_path)
    change(tmp_path, **options)
    check_refused(tmp_path, "does not fit this LM: .* tensors differ in name or shape")


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b'{"peft_type": "\xff"}', b"[1]", b'{"peft_type": "LORA"}', b"1e"]
)
def test_a_config_that_is_none(tmp_path: Path, content: bytes) -> None:
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(content)
    check_refused(tmp_path, r"adapter_config\.json is corrupt")


@pytest.mark.parametrize("kind", [torch.complex64, torch.int8, torch.int64, torch.bool])
def test_weights_that_are_no_floats(tmp_path: Path, kind: torch.dtype) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v.to(kind) for k, v in load_file(path).items()}, path)
    check_refused(tmp_path, "has numbers of torch.")


def test_weights_beyond_float32(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v.double() + 1e300 for k, v in load_file(path).items()}, path)
    check_refused(tmp_path, "NaN or infinity")


def test_layers_are_not_replicated_for_the_user_either() -> None:
    lm = tiny_lm("ab.", seed=1)
    before = logits(lm)
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(1, 2)])
    with pytest.raises(ValueError, match="layer_replication changes the LM itself"):
        lm.add_adapter("new", config)
    assert torch.equal(logits(lm), before)


@pytest.mark.skipif(os.name == "nt", reason="names of Unix")
def test_a_folder_whose_name_is_no_unicode(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff"))
    expected = saved(folder)
    lm = tiny_lm("ab.", seed=1)
    lm.load_adapter("new", folder)
    with lm.adapter("new"):
        torch.testing.assert_close(logits(lm), expected)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is corrupt") as error:
        lm.load_adapter("other", folder)
    str(error.value).encode()
