"""Tokenizers whose texts are not what their tokens spell, and those that end every text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import langppl as lp
from langppl.lm import LM
from langppl.lm.prompts import PromptWarning

WORDS = ["hello", "world", "a", "b", "c", "he", "llo"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def made(backend: Tokenizer, **options: Any) -> LM:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return LM.from_parts(LlamaForCausalLM(config), tokenizer, "own")


def ids(tokens: list[str]) -> dict[str, int]:
    return {t: i for i, t in enumerate(dict.fromkeys(["<s>", "</s>", "<unk>", *tokens]))}


def word_piece() -> Tokenizer:
    tokens = [*WORDS, *(f"##{w}" for w in WORDS)]
    backend = Tokenizer(models.WordPiece(ids(tokens), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return backend


def word_piece_without_decoder() -> Tokenizer:
    backend = word_piece()
    backend.decoder = decoders.Fuse()
    return backend


def with_suffix(decoder: Any) -> Tokenizer:
    tokens = ["a", "b", "a</w>", "b</w>", "ab</w>"]
    model = models.BPE(ids(tokens), [("a", "b</w>")], end_of_word_suffix="</w>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoder
    return backend


def ctc() -> Tokenizer:
    backend = Tokenizer(models.WordLevel(ids(["<pad>", "|", *"abc"]), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.CTC()
    return backend


def word_level(decoder: Any = None) -> Tokenizer:
    backend = Tokenizer(models.WordLevel(ids(WORDS), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        backend.decoder = decoder
    return backend


def removing() -> Tokenizer:
    """A mark that the decoder takes out."""
    backend = Tokenizer(models.BPE(ids(["a@@", "b@@", "a", "b"]), []))
    backend.decoder = decoders.Sequence([decoders.Replace("@@", ""), decoders.Fuse()])
    return backend


REFUSED: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "WordPiece": (word_piece, "decoder is WordPiece"),
    "WordPiece, another decoder": (word_piece_without_decoder, "marks tokens by '##'"),
    "suffix": (lambda: with_suffix(decoders.BPEDecoder()), "decoder is BPEDecoder"),
    "suffix, byte-level": (lambda: with_suffix(decoders.ByteLevel()), "marks tokens by '</w>'"),
    "CTC": (ctc, "decoder is CTC"),
    "words": (word_level, "the spaces between words are in none of them"),
    "words, decoded": (
        lambda: word_level(decoders.Sequence([decoders.WordPiece(prefix="##"), decoders.Fuse()])),
        "decoder is WordPiece",
    ),
    "mark": (removing, "decoder makes '.*' of tokens that spell '.*@@"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_when_the_lm_is_made(kind: str) -> None:
    backend, says = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"LM\('own'\) cannot be read: .*{says}.*byte-level"):
        made(backend())


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("h", "e")]
    backend = Tokenizer(models.BPE(ids([*alphabet, *("".join(m) for m in merges)]), merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback() -> Tokenizer:
    """As Llama 2's."""
    tokens = [*BYTES, "▁", *"helowrd", "▁h", "he"]
    merges = [("▁", "h"), ("h", "e")]
    model = models.BPE(ids(tokens), merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def gemma() -> Tokenizer:
    backend = byte_fallback()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def metaspace() -> Tokenizer:
    pieces = [(t, -1.0) for t in ["<s>", "</s>", "<unk>", "▁", *"helowrd", "▁h", "he", "▁world"]]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def characters() -> Tokenizer:
    """Without a decoder, as of letters of DNA."""
    return Tokenizer(models.BPE(ids([*"helowrd "]), []))


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, gemma, metaspace, characters])
def test_what_spells_its_texts_is_taken(kind: Callable[[], Tokenizer]) -> None:
    lm = made(kind())
    assert lm.vocabulary.join(lm.encode_text("hello world")).decode().strip() == "hello world"
    assert not getattr(lm, "_appended", ())


def ending(backend: Tokenizer, template: str) -> Tokenizer:
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return backend


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [("$A </s>", [], "</s>"), ("<s> $A </s>", [0], "</s>"), ("<s> $A </s> </s>", [0], "</s></s>")],
)
@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_prompts_are_read_without_what_is_put_after_them(
    kind: Callable[[], Tokenizer], template: str, before: list[int], after: str
) -> None:
    with pytest.warns(PromptWarning, match=f"puts '{after}' after every text") as caught:
        lm = made(ending(kind(), template))
        plain = lm.tokenizer("hello", add_special_tokens=False)["input_ids"]
        assert lm.encode_prompt("hello") == (*before, *plain)
        assert lm.encode_prompt("he") != lm.encode_prompt("hello")
    assert len(caught) == 1
    bare = made(ending(kind(), template.replace(" </s>", "")))
    values = [float(lp.LMString(m, "hello", max_tokens=2).log_prob(" h")) for m in (lm, bare)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, gemma, metaspace])
def test_added_tokens_spell_what_the_decoder_makes_of_them(kind: Callable[[], Tokenizer]) -> None:
    """Gemma's own tokenizer has runs of spaces among its added tokens."""
    backend = kind()
    backend.add_tokens([AddedToken(t, normalized=False) for t in ("▁▁", "<think>", "日本")])
    lm = made(backend)
    assert isinstance(lm.tokenizer, PreTrainedTokenizerFast)
    (letter,) = lm.tokenizer.convert_tokens_to_ids(["h"])
    for i, token in lm.tokenizer.added_tokens_decoder.items():
        if not token.special:
            shown = backend.decode([letter, i, letter], skip_special_tokens=False)
            assert "h" + lm.vocabulary.text(i) + "h" == shown


def test_a_text_with_an_added_run_of_spaces_has_a_probability() -> None:
    backend = gemma()
    backend.add_tokens([AddedToken("▁▁", normalized=False), "▁▁▁"])
    lm = made(backend)
    string = lp.LMString(lm, "he", max_tokens=6)
    assert lm.vocabulary.join(lm.encode_text("h   l")) == b"h   l"
    assert float(string.log_prob("h   l")) > -float("inf")
    assert not any("▁" in string.draw((k,))[0] for k in range(40))


def test_an_added_token_of_byte_level_letters_is_bytes() -> None:
    backend = byte_level()
    backend.add_tokens(["é!", "Ġh"])
    lm = made(backend)
    found = lm.tokenizer.convert_tokens_to_ids(["é!", "Ġh"])
    assert [lm.vocabulary.bytes[i] for i in found] == [b"\xe9!", b" h"]
