"""Which models and tokenizers an LM can be made of; the others are refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from langppl.lm import adapters

if TYPE_CHECKING:
    from langppl.lm.vocabulary import Vocabulary


class NotCausalError(ValueError):
    """A model is no causal language model."""


def check_config(config: Any, made_of: str) -> None:
    """Raises NotCausalError for the config of a model with an encoder."""
    if getattr(config, "is_encoder_decoder", False):
        raise NotCausalError(f"{made_of} has an encoder; langppl takes causal LMs alone")


def check_parts(model: Any, tokenizer: Any, name: str) -> None:
    """Raises ValueError unless these are a causal language model and a tokenizer."""
    made_of = f"{name!r} ({type(model).__name__})"
    check_config(model.config, made_of)
    if adapters.in_use(model):
        raise ValueError(
            f"{made_of} has a PEFT adapter on it, which langppl would switch off; give "
            "model.merge_and_unload(), or make an LM of the base model and load the adapter on it "
            "(lm.load_adapter)"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(
            f"{made_of} has no output embeddings, so it gives no logits; take the whole causal "
            "language model (AutoModelForCausalLM)"
        )
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            f"{made_of} was made under torch.inference_mode, so nothing could be trained on it; "
            "make it outside of that"
        )
    if tokenizer is None:
        raise ValueError(f"{made_of} needs its tokenizer, got None")


def check_ordinary(vocabulary: Vocabulary, lm: object) -> None:
    """Raises ValueError if no token is ordinary, as of what transformers makes without files."""
    if vocabulary.special.all():
        raise ValueError(
            f"{lm!r} cannot be read: its tokenizer has no ordinary tokens, so every text would be "
            "empty; save its files beside the model (tokenizer.save_pretrained(folder))"
        )


def check_kind(model: Any, name: str) -> None:
    """Raises ValueError unless a model reads a text and what follows it token by token.

    Args:
        model: in evaluation mode; training may leave the cache out (gradient checkpointing).
        name: what the LM is called.
    """
    made_of = f"{name!r} ({type(model).__name__})"
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        # Configs of fine-tuned checkpoints often say that no cache is kept.
        read = model(input_ids=ids, use_cache=True)
    layers = getattr(getattr(read, "past_key_values", None), "layers", [])
    states = ("cache_params", "rnn_state", "state")
    if not layers and not any(getattr(read, s, None) is not None for s in states):
        raise ValueError(
            f"{made_of} gives no KV cache of what it has read, which langppl draws and scores "
            "with; an encoder (BERT, RoBERTa) reads as a causal LM only where its config says "
            "is_decoder"
        )
    keyless = [layer for layer in layers if getattr(layer, "keys", None) is None]
    # Some layers keep both keys and a state.
    if len(keyless) == len(layers) or any(_has_state(layer) for layer in layers):
        raise ValueError(
            f"{made_of} has layers that keep more, or else, of what they have read than keys and "
            "values, as recurrent ones; langppl draws and scores with keys and values alone, so "
            "take an LM with attention in every layer"
        )


def _has_state(layer: Any) -> bool:
    return hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states")
