"""What the file of a posterior holds, and reading it; it may come from anywhere."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langppl.chains import Chains
from langppl.parts import Part
from langppl.records import decode, encode, floats, numbers, optional

if TYPE_CHECKING:
    from langppl.posterior import Posterior

FORMAT = "langppl-posterior"
VERSION = 1


def content_of(posterior: Posterior) -> dict[str, Any]:
    """A posterior in strict JSON.

    Return values and computed values that JSON cannot hold are left out, with a note.

    Raises:
        TypeError: if JSON cannot hold a sample.
    """
    notes = list(posterior.notes)
    returns = _returns(posterior, notes)
    computed = _computed(posterior, notes)
    chains = posterior.chains
    return {
        "format": FORMAT,
        "version": VERSION,
        "method": posterior.method,
        "guide": posterior.guide,
        "sites": list(posterior.sites),
        "log_evidence": optional(posterior.log_evidence),
        "log_evidence_error": optional(posterior.log_evidence_error),
        "elapsed": posterior.elapsed,
        "failed_sites": posterior.failed_sites,
        "notes": notes,
        "ancestors": posterior.ancestors,
        "resampled": posterior.resampled,
        "moves": list(posterior.moves),
        "chains": None if chains is None else chains.to_json(),
        "log_weights": numbers(posterior.log_weights),
        "log_joint": numbers(posterior.log_joint),
        "log_q": numbers(posterior.log_q),
        "site_log_probs": {k: numbers(v) for k, v in posterior.site_log_probs.items()},
        "returns": returns,
        # Files of posteriors that have none are as they were before there were any.
        **({"parts": [part.to_json() for part in posterior.parts]} if posterior.parts else {}),
        **({"computed": computed} if posterior.computed_sites else {}),
        "samples": [
            {site: encode(value) for site, value in sample.items()} for sample in posterior.samples
        ],
    }


def _returns(posterior: Posterior, notes: list[str]) -> list[Any] | None:
    if posterior.returns is None:
        return None
    try:
        return [encode(value) for value in posterior.returns]
    except TypeError as error:
        notes.append(f"The return values were not saved: {error}.")
        return None


def _computed(posterior: Posterior, notes: list[str]) -> list[dict[str, Any]]:
    """The computed values, and a note for each name that JSON cannot hold."""
    rows: list[dict[str, Any]] = [{} for _ in posterior.computed]
    for name in posterior.computed_sites:
        try:
            column = {k: encode(v[name]) for k, v in enumerate(posterior.computed) if name in v}
        except TypeError as error:
            notes.append(f"The computed values {name!r} were not saved: {error}.")
            continue
        for k, value in column.items():
            rows[k][name] = value
    return rows


def read(path: str | os.PathLike[str], kind: type[Posterior]) -> Posterior:
    """Makes a posterior of a file.

    Args:
        path: the file.
        kind: the class to make.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a langppl posterior, is damaged, or was written by a later
            version.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a langppl posterior: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'{path} is not a langppl posterior: no "format": "{FORMAT}" in it')
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r} of the format; "
            f"this langppl reads version {VERSION}"
        )
    try:
        return kind(**_arguments(content))
    except (
        *(KeyError, TypeError, AttributeError, ValueError),
        # Of numbers beyond a type's range, types that torch cannot make, and nested values.
        *(OverflowError, RuntimeError, RecursionError),
    ) as error:
        raise ValueError(f"{path} is a damaged langppl posterior: {error!r}") from error


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a posterior is made of, from the content of its file."""
    _check_fields(content, len(content["samples"]))
    chains, computed, returns = content.get("chains"), content.get("computed"), content["returns"]
    evidence, spread = content["log_evidence"], content["log_evidence_error"]
    return dict(
        samples=[
            {site: decode(value) for site, value in sample.items()} for sample in content["samples"]
        ],
        log_weights=floats(content["log_weights"]),
        log_evidence=math.nan if evidence is None else float(evidence),
        log_evidence_error=None if spread is None else float(spread),
        method=content["method"],
        guide=content["guide"],
        sites=content["sites"],
        returns=None if returns is None else [decode(value) for value in returns],
        computed=None
        if computed is None
        else [{name: decode(value) for name, value in row.items()} for row in computed],
        log_joint=floats(content["log_joint"]),
        log_q=floats(content["log_q"]),
        site_log_probs={
            site: [float(v) for v in values]
            for site, values in content.get("site_log_probs", {}).items()
        },
        elapsed=content["elapsed"],
        failed_sites=content["failed_sites"],
        notes=content["notes"],
        ancestors=content.get("ancestors"),
        resampled=content.get("resampled", 0),
        moves=tuple(content.get("moves", (0, 0))),
        chains=None if chains is None else Chains.from_json(chains),
        parts=[Part.from_json(part) for part in content.get("parts", ())],
    )


def _check_fields(content: Mapping[str, Any], samples: int) -> None:
    """Checks those fields of a posterior's file that would fail only where they are used.

    Args:
        content: the file's.
        samples: how many samples it has.

    Raises:
        ValueError: for a field of another form; names it, its value and its form.
    """

    def is_count(value: Any, below: float = math.inf) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below

    def are_texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)

    def are_counts(value: Any, number: int, below: float = math.inf) -> bool:
        is_whole = isinstance(value, list) and len(value) == number
        return is_whole and all(is_count(entry, below) for entry in value)

    failed, elapsed = content["failed_sites"], content["elapsed"]
    ancestors, seconds = content.get("ancestors"), (int, float, type(None))
    forms = {
        "method": ("a text", isinstance(content["method"], str)),
        "guide": ("a text", isinstance(content["guide"], str)),
        "sites": ("a list of texts", are_texts(content["sites"])),
        "notes": ("a list of texts", are_texts(content["notes"])),
        "elapsed": ("a number or null", isinstance(elapsed, seconds)),
        "failed_sites": (
            "an object of counts",
            isinstance(failed, dict) and all(map(is_count, failed.values())),
        ),
        "moves": ("two counts", are_counts(content.get("moves", [0, 0]), 2)),
        "resampled": ("a count", is_count(content.get("resampled", 0))),
        "ancestors": (
            f"null or {samples} numbers of samples",
            ancestors is None or are_counts(ancestors, samples, samples),
        ),
    }
    for name, (form, holds) in forms.items():
        if not holds:
            raise ValueError(f"{name} is {str(content.get(name))[:80]}, and should be {form}")
