"""What `compare` is asked for: rows of a method, a guide and the method's options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langppl.guides import Guide
from langppl.guides.function import GuideLike, as_guide
from langppl.inference.methods import check_names, infer
from langppl.inference.settings import METHODS, OPTIONS, check_values
from langppl.lm.counts import as_count
from langppl.lm.seeds import as_seed

RowLike = tuple[Any, ...] | Mapping[str, Any]
"""(method, guide), (method, guide, options), or the arguments of `infer` by name."""


@dataclass(frozen=True)
class Row:
    """One row of a comparison.

    Attributes:
        name: shown in the table, different for all rows.
        method: the inference method.
        guide: what proposes the latents; None for `"exact"`, which takes none.
        options: further arguments of `infer`.
    """

    name: str
    method: str
    guide: str | Guide | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def guide_name(self) -> str | None:
        """The guide's name."""
        return None if self.guide is None else _name_of(self.guide)


def rows_of(
    guides: Sequence[GuideLike] | None,
    methods: Sequence[str] | None,
    rows: Sequence[RowLike] | Mapping[str, RowLike] | None,
    default_guides: Sequence[GuideLike],
) -> list[Row]:
    """The rows that were asked for.

    Args:
        guides: with every method.
        methods: with every guide; `"exact"` once.
        rows: in place of both; a mapping names them.
        default_guides: where no guides are given.

    Raises:
        ValueError: if there is no row, both kinds are given, or a method, guide or option is not
            known.
        TypeError: if a row is none.
    """
    if rows is None:
        return _product(default_guides if guides is None else guides, methods)
    if guides is not None or methods is not None:
        raise ValueError("give either rows, or guides and methods, not both")
    if isinstance(rows, str) or not isinstance(rows, Sequence | Mapping):
        raise TypeError(f"rows are a list, or a mapping of names to them, got {rows!r}")
    if not rows:
        raise ValueError("give at least one row to compare")
    if isinstance(rows, Mapping):
        return [_row(value, str(name)) for name, value in rows.items()]
    return _distinct([_row(value) for value in rows])


def _product(guides: Sequence[GuideLike], methods: Sequence[str] | None) -> list[Row]:
    for word, given in (("guides", guides), ("methods", methods)):
        if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
            raise TypeError(f"{word} must be a list, got {given!r}: write [{given!r}]")
    if methods is not None and not methods:
        raise ValueError("give at least one method to compare")
    if not guides and any(m != "exact" for m in methods or ("importance",)):
        raise ValueError("give at least one guide to compare")
    if methods is None:
        # With one method for all, a guide is name enough.
        return _distinct([_row(("importance", g), _name_of(g)) for g in guides])
    found = []
    for method in methods:
        check_names(method, "prior")
        own = [None] if method == "exact" else guides
        found += [_row((method, guide)) for guide in own]
    return _distinct(found)


def _row(given: Any, name: str | None = None) -> Row:
    where = "a row" if name is None else f"row {name!r}"
    if isinstance(given, Mapping):
        options = dict(given)
        method, guide = options.pop("method", "importance"), options.pop("guide", None)
        if guide is None and method != "exact":
            guide = "prior"
    elif isinstance(given, tuple | list) and 2 <= len(given) <= 3:
        method, guide = given[:2]
        options = given[2] if len(given) == 3 else {}
        if not isinstance(options, Mapping):
            raise TypeError(f"the options of {where} are a mapping, got {options!r}")
        options = dict(options)
    else:
        raise TypeError(
            f"{where} is (method, guide), (method, guide, options), or a mapping of infer's "
            f"arguments, got {given!r}"
        )
    if method in METHODS and method != "exact" and guide is None:
        raise ValueError(f"method {method!r} takes a guide, but {where} has None")
    check_names(method, "prior" if guide is None else guide)
    _check_options(method, options, where)
    guide = None if method == "exact" else as_guide(guide)
    return Row(_title(method, guide, options) if name is None else name, method, guide, options)


def _check_options(method: str, options: Mapping[str, Any], where: str) -> None:
    known = ("num_samples", "seed", *OPTIONS[method])
    for name in options:
        if name in known:
            continue
        # An option of another method would be passed over in silence.
        of_infer = name in inspect.signature(infer).parameters
        what = f"is no option of method {method!r}" if of_infer else "is no option of infer"
        raise ValueError(f"{name!r} in {where} {what}; options are: {', '.join(known)}")
    values = dict(options)
    if "num_samples" in values:
        as_count("num_samples", values.pop("num_samples"), 1)
    if "seed" in values:
        as_seed(values.pop("seed"))
    check_values(**values)


def _title(method: str, guide: str | Guide | None, options: Mapping[str, Any]) -> str:
    said = [f"{k}={getattr(v, '__name__', v)}" for k, v in options.items()]
    return " ".join([method, *([] if guide is None else [_name_of(guide)]), *said])


def _name_of(guide: GuideLike) -> str:
    found = as_guide(guide)
    return found if isinstance(found, str) else found.name


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """The rows, of equal names all but the first with a number."""
    found: dict[str, Row] = {}
    for row in rows:
        name, count = row.name, 2
        while name in found:
            name, count = f"{row.name} {count}", count + 1
        found[name] = Row(name, row.method, row.guide, row.options)
    return list(found.values())
