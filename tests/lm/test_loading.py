"""Folders that are not a whole causal LM, and those that are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import langppl as lp
from langppl.testing import tiny_lm


def saved(folder: Path, model: Any = None, tokenizer: bool = True) -> Path:
    """The folder of a model, by default that of a tiny LM, with the tokenizer of tiny LMs."""
    lm = tiny_lm("ab.", seed=1)
    (lm.model if model is None else model).save_pretrained(folder)
    if tokenizer:
        lm.tokenizer.save_pretrained(folder)
    return folder


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig.from_dict({**tiny_lm("ab.").model.config.to_dict(), **changes})


@pytest.mark.parametrize("kind", ["body", "classifier", "one lost"])
def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, kind: str) -> None:
    from transformers import LlamaForSequenceClassification

    if kind == "body":
        folder = saved(tmp_path, tiny_lm("ab.", seed=1).model.model)
    elif kind == "classifier":
        folder = saved(tmp_path, LlamaForSequenceClassification(llama()))
    else:
        folder = saved(tmp_path)
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    lost = "layers.1.mlp.up_proj.weight" if kind == "one lost" else "lm_head.weight"
    with pytest.raises(ValueError, match=rf"(?s){tmp_path.name}.* lacks tensors .*{lost}"):
        lp.LM(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_whole_checkpoints_are_read(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama(tie_word_embeddings=tied))
    lm = lp.LM(saved(tmp_path, model), device="cpu")
    ids = torch.tensor([[0, 3, 4, 5]])
    torch.testing.assert_close(lm.model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_a_folder_of_a_model_with_an_encoder_is_named(tmp_path: Path, family: str) -> None:
    import transformers

    size = tiny_lm("ab.").vocabulary.size
    if family == "T5":
        options = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    else:
        layers = {"encoder_layers": 1, "decoder_layers": 1}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        options = {"d_model": 16, **layers, **heads, "max_position_embeddings": 32}
    config = getattr(transformers, f"{family}Config")(vocab_size=size, **options)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}' .{family.lower()}. has an encoder"):
        lp.LM(saved(tmp_path, model))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_files_are_read_by_name(tmp_path: Path, file: str) -> None:
    folder = saved(tmp_path)
    path = folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((ValueError, OSError), match=rf"the LM .*{tmp_path.name}.* could not be re"):
        lp.LM(folder)


def test_a_tokenizer_without_tokens_reads_nothing(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(ValueError, match=rf"{tmp_path.name}.* a model and no tokenizer"):
        lp.LM(saved(tmp_path, tokenizer=False))
    empty = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    with pytest.raises(ValueError, match=r"LM.'mute'. cannot be read: .*no ordinary tokens"):
        lp.LM.from_parts(tiny_lm("ab.").model, empty, "mute")
