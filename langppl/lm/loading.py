"""Reading a model and its tokenizer from a folder or the hub, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from langppl.lm.kinds import NotCausalError, check_config
from langppl.lm.weights import check_index, embedded_adapter, without_bars

MOST_SAID = 300
"""Letters of what transformers says; some of its messages list every architecture it knows."""

MOST_NAMED = 3
"""Tensors that an error names; a checkpoint of another kind lacks hundreds."""


class MissingTensorsError(ValueError):
    """A checkpoint lacks some of the model's tensors."""


class RefusedFilesError(ValueError):
    """A checkpoint names files that are not to be read."""


def read_parts(
    source: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype | str | None,
    revision: str | None,
    token: str | bool | None,
) -> tuple[Any, Any]:
    """Reads a model, on its device, and its tokenizer; the arguments are those of `LM`.

    Raises:
        ValueError: if the checkpoint lacks some of the model's tensors, is damaged or is of a
            model with an encoder, or a revision or a token is given for a folder.
        OSError: if it cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    hub = _hub_options(source, revision, token)
    options: dict[str, Any] = {"trust_remote_code": False, **hub}
    # Some of the hub's own messages, and all of the files' readers', do not say what was asked for.
    version = f", revision {revision!r}," if revision else ""
    said = f"the LM {source!r}{version} could not be read"
    try:
        with without_bars():  # loading takes a second, fetching has its own
            config = AutoConfig.from_pretrained(source, **options)
            check_config(config, f"{source!r} ({config.model_type})")
            _check_files(source, config, hub)
            read: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype or "auto",
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            model, info = read
            _check_whole(source, model, info)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except OSError as error:
        raise OSError(f"{said}: {error}") from error
    except (
        NotCausalError,
        RefusedFilesError,
        MissingTensorsError,
        MemoryError,
        torch.OutOfMemoryError,
    ):
        raise
    except Exception as error:  # whatever the readers of its files make of damaged ones
        raise ValueError(f"{said}: {type(error).__name__}: {str(error)[:MOST_SAID]}") from error
    return model.to(device), tokenizer


def _check_files(source: str, config: Any, hub: dict[str, str | bool]) -> None:
    """Raises RefusedFilesError for weights that transformers would read and langppl does not.

    Of a folder `langppl.lm.weights.resolve` has checked all else. What is asked of the hub here is
    what `from_pretrained` asks for next, so that it finds it in the cache.
    """
    from transformers.utils.hub import cached_file

    own = getattr(config, "transformers_weights", None)
    if own is not None:
        raise RefusedFilesError(
            f"the config of the LM {source!r} names its own weights, transformers_weights={own!r}; "
            "load the model by transformers and save it anew by `save_pretrained`"
        )
    if os.path.isdir(source):
        return
    options = {**hub, "_commit_hash": getattr(config, "_commit_hash", None)}

    def found(name: str) -> str | None:
        # What is not in a cache and cannot be asked for, `from_pretrained` does not find either.
        file: str | None = cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **options,
        )
        return file

    if found("adapter_config.json"):
        raise RefusedFilesError(embedded_adapter(f"the hub's {source!r}"))
    if not found("model.safetensors") and (index := found("model.safetensors.index.json")):
        try:
            check_index(Path(index))
        except ValueError as error:
            raise RefusedFilesError(str(error)) from error


def _check_whole(source: str, model: Any, info: dict[str, Any]) -> None:
    """Raises ValueError if a checkpoint lacks tensors, which transformers makes up at random."""
    # Of those of another shape the shapes are told too.
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    missing = sorted(set(info["missing_keys"]) | mismatched)
    if not missing:
        return
    named = ", ".join(missing[:MOST_NAMED])
    more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
    raise MissingTensorsError(
        f"the checkpoint of the LM {source!r} lacks tensors that a {type(model).__name__} is made "
        f"of ({named}{more}), which would be random numbers; save the whole causal language model "
        "(AutoModelForCausalLM), not its body or a classifier"
    )


def _hub_options(
    source: str, revision: str | None, token: str | bool | None
) -> dict[str, str | bool]:
    """What `from_pretrained` takes besides, for a hub id alone."""
    given = {"revision": revision, "token": token}
    options = {k: v for k, v in given.items() if v is not None}
    if options and os.path.isdir(source):
        raise ValueError(
            f"{' and '.join(options)} go with a hub id; this LM is read from {source!r}"
        )
    return options
