"""LoRA adapters on a model whose weights are shared.

Switching sets the LoRA layers' own flags. peft's calls for it take fifty times as long and flip
`requires_grad`, after which a backward pass silently leaves the adapter's gradients at zero.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from langppl.lm import adapter_configs
from langppl.lm.adapter_configs import check_plain
from langppl.lm.formats import shown
from langppl.lm.tensors import check_like, packed, unpacked

if TYPE_CHECKING:
    from peft import PeftConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_OF_DORA = ".lora_magnitude_vector"


_known: WeakKeyDictionary[Any, tuple[object, list[Any]]] = WeakKeyDictionary()
"""The adapters that a model had, and its layers that take adapters."""


def _layers(model: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Asked for with every pass, and the search through all modules takes longer than a small one.
    # Adapters that peft put there by itself are seen by their configs.
    state = sorted((n, id(config)) for n, config in getattr(model, "peft_config", {}).items())
    found = _known.get(model)
    if found is None or found[0] != state:
        layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        found = _known[model] = (state, layers)
    return found[1]


def names(model: Any) -> set[str]:
    """The adapters on a model."""
    return set(getattr(model, "peft_config", {}))


def in_use(model: Any) -> bool:
    """Whether adapters that are none of langppl's take part in a model's forward pass."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel):
        return True
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    # LMs switch theirs off between passes, so another LM can be made of an LM's model.
    return any(not m.disable_adapters for m in layers) or bool(names(model) and not layers)


def base_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's own weights, by the names that they have without adapters."""
    for name, tensor in model.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), tensor


def activate(model: Any, name: str | None) -> None:
    """Makes one adapter, or none, take part in the forward pass."""
    for layer in _layers(model):
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


# What is made in inference mode can never take a gradient.
@torch.inference_mode(False)
def add(
    model: Any, name: str, config: PeftConfig, is_hollow: bool = False
) -> list[torch.nn.Parameter]:
    """Adds an adapter and returns its weights, which take gradients.

    Args:
        model: the model.
        name: the adapter's.
        config: peft's.
        is_hollow: whether its weights are to have shapes alone, and take no memory.

    Raises:
        ValueError: if the name is taken, or the adapter is not plain LoRA that fits the model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if name in names(model):
        raise ValueError(f"there is an adapter {name!r} already")
    if not name or "." in name:
        raise ValueError(f"an adapter's name must be one without dots, got {name!r}")
    if not isinstance(config, LoraConfig):
        raise ValueError(f"an adapter must be a LoRA, got a {type(config).__name__}")
    check_plain(config)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    known = dict(getattr(model, "peft_config", {}))
    try:
        with warnings.catch_warnings():
            # Several adapters on one model are what this module is for.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            # peft makes layers before it has them without weights, unless torch does so.
            hollow = torch.device("meta") if is_hollow else contextlib.nullcontext()
            with _float32_by_default(), hollow:
                inject_adapter_in_model(
                    config, model, adapter_name=name, low_cpu_mem_usage=is_hollow
                )
        _check_embeddings(model, name)
    except BaseException:
        _restore(model, name, known, before)
        raise
    model.peft_config = {**known, name: config}
    _known.pop(model, None)
    # New modules are in training mode, where LoRA's dropout makes every answer random.
    model.eval()
    parameters = []
    for n, parameter in model.named_parameters():
        if _is_of(n, name):
            # In half precision a small step of the optimiser would be rounded away.
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            parameters.append(parameter)
        else:
            _take_back(n, parameter, before)
    return parameters


@contextlib.contextmanager
def _float32_by_default() -> Iterator[None]:
    """First weights of one seed are the same numbers, whatever the user's default float type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _is_of(parameter: str, name: str) -> bool:
    """Whether a parameter is an adapter's; modules may be called like it."""
    _, mark, rest = parameter.rpartition(".lora_")
    return bool(mark) and f".{name}." in rest


def _check_embeddings(model: Any, name: str) -> None:
    """Raises ValueError if an adapter is on the embeddings, whose weights peft names otherwise."""
    if name in getattr(model.get_input_embeddings(), "scaling", {}):
        raise ValueError(
            f"the adapter {name!r} is on the LM's embeddings, which is not plain LoRA here; use "
            'target_modules="all-linear"'
        )


def _restore(model: Any, name: str, known: dict[str, Any], before: dict[str, bool]) -> None:
    """Takes back what an injection that failed has done."""
    model.peft_config = {**known, name: None}
    remove(model, name)
    for n, parameter in model.named_parameters():
        _take_back(n, parameter, before)


def _take_back(name: str, parameter: torch.nn.Parameter, before: dict[str, bool]) -> None:
    wanted = before.get(name, before.get(name.replace(".base_layer", ""), False))
    # Of tensors of inference mode it cannot even be set to what it is.
    if parameter.requires_grad != wanted:
        parameter.requires_grad_(wanted)


def remove(model: Any, name: str) -> None:
    """Removes an adapter and its weights."""
    _known.pop(model, None)
    for layer in _layers(model):
        # peft would activate another adapter in its place, and flip `requires_grad` with it.
        layer._active_adapter = [n for n in layer.active_adapters if n != name]
        layer.delete_adapter(name)
    model.peft_config = {k: v for k, v in model.peft_config.items() if k != name}


def state(model: Any, name: str, is_hollow: bool = False) -> dict[str, torch.Tensor]:
    """An adapter's weights, by the names that peft gives them in a file."""
    from peft import get_peft_model_state_dict

    # Else peft asks the hub for the model's config, and warns where it finds none. An adapter of
    # ours never holds embeddings.
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
    return {
        (k if k.startswith(_PREFIX) else _PREFIX + k): (
            v if is_hollow else v.detach().cpu().contiguous()
        )
        for k, v in found.items()
    }


def digest(model: Any, name: str) -> bytes:
    """Tells an adapter as it is from any other: every number counts, and every layer's scale."""
    found = hashlib.blake2b(digest_size=16)
    # Asked for with every batch of scores; peft's own list of an adapter's weights takes longer.
    for key, tensor in model.named_parameters():
        if _is_of(key, name):
            found.update(key.replace(f".{name}.", ".").encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    found.update(repr(scales(model, name)).encode())
    return found.digest()


def versions(model: Any, name: str) -> tuple[object, ...]:
    """What shows that an adapter's weights were exchanged or written to, without reading them."""
    found: list[object] = []
    for layer in _layers(model):
        for part in layer.adapter_layer_names:
            held = getattr(layer, part)
            if name in held:
                own = held[name]
                tensors = own.parameters() if isinstance(own, torch.nn.Module) else (own,)
                found += [(t.data_ptr(), t._version) for t in tensors]
    return (*found, *scales(model, name))


def merged(model: Any) -> list[tuple[str, ...]]:
    """The adapters that peft has added to each layer's own weight."""
    return [tuple(layer.merged_adapters) for layer in _layers(model)]


def scales(model: Any, name: str | None) -> list[float]:
    """LoRA's scale in each layer that an adapter has; empty for none."""
    return [float(layer.scaling[name]) for layer in _layers(model) if name in layer.scaling]


def files(model: Any, name: str) -> dict[str, bytes]:
    """The files of a folder that `PeftModel.from_pretrained` reads, weights first."""
    # As peft writes it, which has no way to get it but into a file.
    options = {
        k: sorted(v) if isinstance(v, set) else v
        for k, v in model.peft_config[name].to_dict().items()
    }
    text = json.dumps(options, indent=2, sort_keys=True)
    return {WEIGHTS: packed(state(model, name)), CONFIG: text.encode()}


@torch.inference_mode(False)
def load(model: Any, name: str, folder: str | os.PathLike[str]) -> None:
    """Reads a PEFT folder as an adapter; nothing stays behind if that fails.

    Raises:
        ValueError: if a file is missing or corrupt, or the tensors are not the adapter's.
    """
    from peft import set_peft_model_state_dict

    source = Path(folder).expanduser()
    for file in (CONFIG, WEIGHTS):
        if not (source / file).is_file():
            raise ValueError(f"{shown(source)} is no adapter folder: {file} is missing")
    config = adapter_configs.read(source / CONFIG)
    tensors = unpacked(source / WEIGHTS)
    what, misfit = f"the adapter in {shown(source)}", "does not fit this LM"

    # A small file may ask for any rank, and weights of that would be made before they are compared.
    # DoRA's are made of the LM's own, which has numbers.
    trial = copy.deepcopy(config)
    trial.use_dora = False
    add(model, name, trial, is_hollow=True)
    try:
        own = {k: v for k, v in tensors.items() if not (config.use_dora and _OF_DORA in k)}
        check_like(what, own, state(model, name, is_hollow=True), misfit)
    finally:
        remove(model, name)
    add(model, name, config)
    try:
        check_like(what, tensors, state(model, name), misfit)
        set_peft_model_state_dict(
            model, {k.removeprefix(_PREFIX): v for k, v in tensors.items()}, adapter_name=name
        )
    except BaseException:
        remove(model, name)
        raise
