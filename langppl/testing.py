"""Tiny language models whose posteriors are known exactly, and contracts to check against them.

`tiny_lm` makes a real transformer over a handful of tokens. Its strings are short enough to
enumerate, so every distribution, guide and method can be held to exact answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from langppl.distributions import LMString, Text
from langppl.lm.model import LM
from langppl.lm.rules import BoundRules, State

if TYPE_CHECKING:
    pass

DEFAULT_ALPHABET = ("a", "b", ".", " ")


def tiny_lm(
    alphabet: Sequence[str] = DEFAULT_ALPHABET,
    seed: int = 0,
    *,
    merged: Sequence[str] = (),
    split: Sequence[str] = (),
    hidden_size: int = 32,
    window: int = 256,
    sharpness: float = 0.2,
) -> LM:
    """A small random transformer with a small tokenizer.

    Two layers of transformers' own Llama, with seeded random weights that are large enough for
    posteriors to differ from priors.

    Args:
        alphabet: single ASCII characters, one token each.
        seed: of the weights.
        merged: further tokens put together from two earlier ones, such as "ab", "b.", "..".
        split: characters of several UTF-8 bytes whose bytes are one token each, such as "é".
        hidden_size: width of the model.
        window: context window, tokens.
        sharpness: standard deviation of the weights; at transformers' default 0.02 every
            distribution is almost uniform.

    Returns:
        An LM with a begin token, an end token and one more special token.

    Raises:
        ValueError: if the alphabet is not of single ASCII characters, or a merged token cannot be
            made of two others.

    Example:
        >>> lm = tiny_lm("ab.", merged=["ab", ".."], split=["é"])
        >>> sorted(lm.vocabulary.text(i) for i in lm.encode_text("ab.."))
        ['..', 'ab']
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from langppl.lm.vocabulary import _BYTE_LEVEL

    if any(len(c) != 1 or ord(c) > 127 for c in alphabet) or len(set(alphabet)) < len(alphabet):
        raise ValueError(f"alphabet must be different single ASCII characters, got {alphabet!r}")
    printable = {byte: char for char, byte in _BYTE_LEVEL.items()}

    def shown(data: bytes) -> str:
        return "".join(printable[b] for b in data)

    tokens = ["<s>", "</s>", "<unused>"]
    tokens += [shown(c.encode()) for c in alphabet]
    for character in split:
        tokens += [shown(bytes([b])) for b in character.encode() if shown(bytes([b])) not in tokens]
    merges: list[tuple[str, str]] = []
    for text in merged:
        whole = shown(text.encode())
        cuts = [(whole[:k], whole[k:]) for k in range(1, len(whole))]
        pair = next((cut for cut in cuts if cut[0] in tokens and cut[1] in tokens), None)
        if pair is None or whole in tokens:
            raise ValueError(f"merged token {text!r} must be new and made of two earlier tokens")
        merges.append(pair)
        tokens.append(whole)

    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<unused>"],
    )
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=window,
        initializer_range=sharpness,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return LM.from_parts(model, tokenizer, f"tiny-{seed}")


def enumerate_strings(
    dist: LMString, limit: int | None = None, most: int = 1_000_000
) -> Iterator[tuple[Text, bool]]:
    """All token sequences that a distribution's rules allow.

    Args:
        dist: an `LMString` with `max_tokens`, or a `limit`.
        limit: most actions, if not the distribution's own.
        most: strings to list before giving up.

    Yields:
        Each string, and whether it is rejected for being unfinished.

    Raises:
        ValueError: if there are more than `most`.
    """
    bound = dist.bound
    if limit is None:
        limit = dist.limit(len(dist.prompt_ids()))
    if limit is None:
        raise ValueError("an open string has no end, so its strings cannot be listed")
    for count, item in enumerate(_walk(bound, bound.start(limit), (), dist)):
        if count >= most:
            raise ValueError(f"more than {most} strings")
        yield item


def _walk(
    bound: BoundRules, state: State, ids: tuple[int, ...], dist: LMString
) -> Iterator[tuple[Text, bool]]:
    vocabulary, fingerprint = bound.vocabulary, dist.lm.fingerprint
    if state.remaining == 0:
        yield (
            Text(vocabulary.join(ids).decode("utf-8"), ids, fingerprint),
            bound.rules.truncate == "reject",
        )
        return
    step = bound.step(state)
    if len(step.end_ids):
        yield Text(vocabulary.join(ids).decode("utf-8"), ids, fingerprint), False
    for kept, members in step.groups.items():
        last = bound.representative(kept, members.tolist())
        text = (vocabulary.join(ids) + kept).decode("utf-8")
        yield Text(text, (*ids, last), fingerprint), False
    for token in np.flatnonzero(step.legal.numpy()):
        if int(token) not in step.kept and int(token) not in vocabulary.end_ids:
            yield from _walk(bound, bound.advance(state, int(token)), (*ids, int(token)), dist)
