"""What a saved guide's record says of it; the file may come from anywhere.

Functions are not saved, only their names: those that a guide reads its context by are given again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langppl.guides.context import ContextFunction, default_context, observations_first
from langppl.guides.guidance import Guidance
from langppl.guides.heads import specification_of
from langppl.guides.history import History
from langppl.guides.settings import check_objective
from langppl.lm.counts import as_part
from langppl.lm.formats import check_format, read_json, shown
from langppl.lm.seeds import as_seed
from langppl.records import floats
from langppl.warn import warn

FORMAT = "langppl-guide"
VERSION = 3


@dataclass(frozen=True)
class Saved:
    """The record of a guide; see `GFlowNetGuide` for what most of it means.

    Attributes:
        base: the LM's name.
        fingerprint: of its weights.
        is_default: whether the context is the default one.
        context: the context function's name.
        scale: of its guidance, None for none.
        without: the name of the guidance's own function, None for none.
        numeric: "head", "prior", or "pyro" for a Pyro guide.
        heads: name and count of each head.
        digests: those of the files beside it, None in those of old.
    """

    base: str
    fingerprint: str
    objective: str
    seed: int
    is_default: bool
    context: str
    scale: Any
    without: str | None
    numeric: str
    defensive: float
    learned: set[str]
    flows: set[str]
    heads: dict[str, int]
    history: History
    digests: Any


def read(path: Path) -> Saved:
    """Reads a guide's record.

    Raises:
        ValueError: if it is corrupt, or of a version that this langppl does not read.
    """
    record = read_json(path)
    check_format(path, record, FORMAT, VERSION)
    try:
        check_objective(record["objective"])
        without = record.get("without")
        return Saved(
            base=_text("base_model", record["base_model"]),
            fingerprint=_text("base_fingerprint", record["base_fingerprint"]),
            objective=record["objective"],
            seed=as_seed(record["seed"]),
            is_default=_flag("default_context", record["default_context"]),
            context=_text("context", record.get("context", "")),
            scale=record.get("guidance"),
            without=None if without is None else _text("without", without),
            # The first version drew numbers from the prior.
            numeric=_numeric(record.get("numeric", "prior")),
            defensive=as_part("defensive", record.get("defensive", 0.0)),
            learned=_names("sites", record.get("sites", [])),
            flows=_names("flows", record.get("flows", [])),
            heads=specification_of(record.get("heads", {})),
            # Older ones have none.
            history=_history(record.get("history", {})),
            digests=record.get("sha256"),
        )
    except KeyError as error:
        raise ValueError(f"{shown(path)} is corrupt: it lacks {error}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{shown(path)} is corrupt: {error}") from error


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def _names(name: str, value: Any) -> set[str]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of names, got {value!r}")
    return {_text(f"each of {name}", v) for v in value}


def _numeric(value: Any) -> str:
    if value not in ("head", "prior", "pyro"):
        raise ValueError(f'numeric must be "head", "prior" or "pyro", got {value!r}')
    return str(value)


def _history(value: Any) -> History:
    if not isinstance(value, Mapping) or not all(isinstance(v, list) for v in value.values()):
        raise ValueError("history must have a list of numbers for each figure")
    return History({figure: floats(values) or () for figure, values in value.items()})


def name_of(function: Any) -> str:
    """A function's module and name, as records have it."""
    module = getattr(function, "__module__", "?")
    return f"{module}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def context_of(
    folder: str | os.PathLike[str],
    named: str,
    is_default: bool,
    context: ContextFunction | None,
) -> ContextFunction | None:
    """The context that a saved guide is to read: what is given, or langppl's own of its name.

    Args:
        folder: where the guide is.
        named: the name of the function that it was trained with.
        is_default: whether that is the default one.
        context: what `load` was given.

    Returns:
        None for the default one.

    Raises:
        ValueError: if it was a function of the user's own, and none is given.
    """
    if context is None:
        if is_default:
            return None
        own = {name_of(f): f for f in (default_context, observations_first)}
        if named in own:
            return own[named]
        raise ValueError(
            f"the guide in {folder} was trained with a context function of its own, {named}; give "
            "it to load"
        )
    _warn_of_another(folder, "context", named, context)
    return context


def guidance_of(
    path: Path, scale: Any, named: str | None, without: ContextFunction | None
) -> Guidance | None:
    """The guidance of a saved guide, with its function if it had one of its own.

    Args:
        path: the guide's record.
        scale: of its guidance, None for none.
        named: the name of its own function, None for none.
        without: what `load` was given.

    Raises:
        ValueError: if the record is corrupt, or what is given does not belong to it.
    """
    if scale is None:
        if without is not None:
            raise ValueError(
                f"the guide in {path.parent} has no guidance, so load takes no without"
            )
        return None
    if named is not None and without is None:
        raise ValueError(
            f"the guide in {path.parent} was trained with a guidance by a function of its own, "
            f"{named}; give it to load as without"
        )
    if named is None and without is not None:
        raise ValueError(
            f"the guidance of the guide in {path.parent} is by its context function, so load takes "
            "no without"
        )
    if without is not None and named is not None:
        _warn_of_another(path.parent, "context without observations", named, without)
    try:
        return Guidance(scale, without)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is corrupt: {error}") from error


def _warn_of_another(
    folder: str | os.PathLike[str], what: str, named: str, function: ContextFunction
) -> None:
    """Warns of a function of another name than a guide was trained with."""
    # What was a script's own function then may be a module's now; the first version has no name.
    if named and name_of(function).partition(":")[2] != named.partition(":")[2]:
        warn(
            f"the guide in {folder} was trained with the {what} {named}, and reads "
            f"{name_of(function)} now",
        )
