"""What an adapter's file may ask for: peft does as it says, whoever wrote it.

peft's options can rewrite the LM itself (`layer_replication`), run for hours (regular expressions)
or compute other functions than LoRA's. Those that are known to be harmless are taken over, checked;
all others must be unset.
"""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langppl.lm.formats import read_json, shown

if TYPE_CHECKING:
    from peft import LoraConfig

_NAME = re.compile(r"\^?[\w\-]+(\.[\w\-]+)*")
_LARGEST = 2**31
"""More than any rank or layer number; beyond it a machine's integers end."""
_INITS = (True, False, "gaussian")
"""First weights that leave the LM's own as they are."""


def check_plain(config: LoraConfig) -> None:
    """Raises ValueError for an adapter that changes more than products of the LM's layers."""
    for option in ("modules_to_save", "trainable_token_indices", "alora_invocation_tokens"):
        if getattr(config, option, None):
            raise ValueError(
                f"an adapter with {option} is not plain LoRA, which is switched on and off as a "
                "whole and changes products alone"
            )
    if getattr(config, "layer_replication", None):
        raise ValueError(
            "an adapter with layer_replication changes the LM itself, which others use too; use "
            "an LM that has these layers"
        )
    if config.bias != "none":
        raise ValueError(f'an adapter with bias={config.bias!r} changes the LM itself; use "none"')
    if config.init_lora_weights not in _INITS:
        raise ValueError(
            f"an adapter with init_lora_weights={config.init_lora_weights!r} rewrites the LM's own "
            "weights; convert it to plain LoRA (peft's path_initial_model_for_weight_conversion)"
        )


def read(path: Path) -> LoraConfig:
    """Reads an adapter's config.

    Raises:
        ValueError: if it is corrupt, or asks for something else than plain LoRA; names the option.
    """
    from peft import LoraConfig

    record = read_json(path)
    if not isinstance(record, Mapping):
        raise ValueError(f"{shown(path)} is corrupt: it holds a {type(record).__name__}")
    if record.get("peft_type") != "LORA":
        kind = reprlib.repr(record.get("peft_type"))
        raise ValueError(f"an adapter must be a LoRA, got a {kind}, in {shown(path)}")
    taken: dict[str, Any] = {}
    unset = _defaults(LoraConfig)
    for name, value in record.items():
        if name in _IGNORED:
            continue
        if name in _CHECKS:
            if value is not None or name in _NEEDED:
                taken[name] = _checked(path, name, value)
        # Files of other versions have options that this peft does not know, or write another
        # nothing.
        elif value not in _NOTHING and not (name in unset and value == unset[name]):
            raise ValueError(
                f"the adapter in {shown(path.parent)} is refused: its {name} is not plain LoRA, "
                f"got {reprlib.repr(value)}; save it from a LoraConfig without this option"
            )
    if "target_modules" not in taken:
        raise ValueError(
            f"{shown(path)} is corrupt: target_modules is missing; give the modules' names"
        )
    config = LoraConfig(**taken)
    check_plain(config)
    return config


def _defaults(kind: type) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _checked(path: Path, name: str, value: Any) -> Any:
    is_good, said = _CHECKS[name]
    if not is_good(value):
        raise ValueError(
            f"the adapter in {shown(path.parent)} has {name}={reprlib.repr(value)}, and this must "
            f"be {said}"
        )
    return value


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _LARGEST


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < _LARGEST if isinstance(value, int) else math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0.0 <= value < 1.0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _are_targets(value: Any) -> bool:
    return value == "all-linear" or (_are_names(value) and bool(value))


def _are_layers(value: Any) -> bool:
    several = value if isinstance(value, list) else [value]
    return all(_is_count(v, 0) for v in several)


def _by_name(is_good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(_is_name(k) and is_good(v) for k, v in value.items())
    )


_NAMES = 'a list of modules\' names, such as ["q_proj", "v_proj"]; a pattern is no name'
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_count, "an integer of at least 1"),
    "lora_alpha": (_is_number, "a finite number"),
    "target_modules": (_are_targets, f'"all-linear" or {_NAMES}'),
    "exclude_modules": (_are_names, _NAMES),
    "layers_to_transform": (_are_layers, "layers' numbers"),
    "layers_pattern": (lambda v: _is_name(v) or _are_names(v), "a module's name, or such names"),
    "rank_pattern": (_by_name(_is_count), "integers of at least 1 by modules' names"),
    "alpha_pattern": (_by_name(_is_number), "finite numbers by modules' names"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "inference_mode": (_is_flag, "true or false"),
    "lora_dropout": (_is_share, "at least 0 and below 1"),
    # What these must be is said by `check_plain`.
    "init_lora_weights": (lambda v: isinstance(v, bool | str), "true, false or a name"),
    "bias": (lambda v: isinstance(v, str), "a name"),
    "base_model_name_or_path": (_is_text, "a text"),
    "revision": (_is_text, "a text"),
}
"""The options that are taken over: whether a value is good, and what it must be."""
_NEEDED = ("r", "lora_alpha")
_NOTHING: tuple[object, ...] = (None, False, {}, [])
_IGNORED = (
    *("peft_type", "peft_version", "auto_mapping", "task_type", "runtime_config"),
    *("megatron_core", "qalora_group_size"),  # of `megatron_config` and `use_qalora`, refused
)
"""What makes no difference to what an adapter computes."""
