"""A model's arguments, given by place, by name, or as rows of data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from langppl.keywords import did_you_mean

if TYPE_CHECKING:
    from langppl.program.program import Program

ModelOrProgram: TypeAlias = "Callable[..., Any] | Program"


def arguments_by_place(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    named: Mapping[str, Any],
    options: Collection[str] = (),
) -> tuple[Any, ...]:
    """All of a model's arguments in their order.

    Args:
        model: the model function.
        args: those that are given by place.
        named: those that are given by name.
        options: names that the caller takes for itself, for which a name may have been meant.

    Raises:
        TypeError: for names that the model does not have, or arguments that do not fit it.
    """
    if not named:
        return tuple(args)
    signature = inspect.signature(model)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name in named:
        if name not in signature.parameters and not takes_any:
            hint = did_you_mean(name, [*signature.parameters, *options])
            nor = ", and no option here" if options else ""
            raise TypeError(f"{name!r} is no argument of the model, {signature}{nor}{hint}")
    try:
        bound = signature.bind(*args, **named)
    except TypeError as error:
        raise TypeError(
            f"{', '.join(map(repr, named))} does not fit the model's arguments {signature}: {error}"
        ) from error
    if bound.kwargs:
        # Defaults stand before an argument that is given.
        bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(
            f"the model takes {', '.join(map(repr, bound.kwargs))} by keyword alone, and a "
            "program's arguments are given by place; make it an ordinary argument"
        )
    return bound.args


def pairs_of(model: Any, data: Any) -> list[tuple[ModelOrProgram, list[tuple[Any, ...]]]]:
    """Each model with the rows of its data.

    Args:
        model: a model function, a compiled `Program`, or a list of such programs and of
            (model, data) pairs.
        data: rows of the model's arguments, tuples of them or mappings from their names: a
            sequence, another iterable, a `Dataset` of torch or Hugging Face, or a `DataFrame`,
            whose columns are the arguments' names.

    Raises:
        TypeError: for data that are no such sequence or do not fit the model, or are given besides
            what has its own.
        ValueError: for no data.
    """
    from langppl.program.program import Program

    if isinstance(model, list | tuple):
        if data is not None:
            raise TypeError("a list of (model, data) pairs has its data already; give none")
        if not model:
            raise ValueError("give at least one (model, data) pair")
        pairs = [(own, None) if isinstance(own, Program) else own for own in model]
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise TypeError(
                    f"each program must be a (model, data) pair or a Program, got {pair!r}"
                )
        return [found for m, d in pairs for found in pairs_of(m, d)]
    if isinstance(model, Program):
        if data is not None:
            raise TypeError("a compiled Program has its arguments already; give no data")
        return [(model, [()])]
    return [(model, [()] if data is None else arguments_of_rows(model, data))]


def arguments_of_rows(model: Callable[..., Any], data: Any) -> list[tuple[Any, ...]]:
    """The model's arguments in each row of its data, in its order.

    Args:
        model: a model function.
        data: see `pairs_of`.

    Raises:
        TypeError: for data that are no such sequence, or a row that does not fit the model.
        ValueError: for no data.
    """
    rows = rows_in(data)
    if not rows:
        raise ValueError("data is empty: give at least one tuple of the model's arguments")
    return [_arguments_of(model, row) for row in rows]


def rows_in(data: Any) -> list[Any]:
    """The rows of data of any kind that `pairs_of` takes; what can be read once is read here.

    Raises:
        TypeError: for data that have no rows, or none in order.
    """
    if isinstance(data, Mapping):
        raise TypeError(
            "data must be a sequence of tuples of the model's arguments, got a mapping; of columns "
            "make rows: list(zip(*columns.values()))"
        )
    if hasattr(data, "columns") and hasattr(data, "to_dict"):
        # Polars has a method of its own for rows.
        return list(data.to_dicts() if hasattr(data, "to_dicts") else _records(data))
    try:
        if isinstance(data, set | frozenset):
            raise TypeError("no order")
        if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not hasattr(data, "iloc"):
            # A Dataset need not be iterable.
            return [data[i] for i in range(len(data))]
        return list(data)
    except TypeError as error:
        raise TypeError(
            f"data must be a sequence (or a Dataset) of tuples of the model's arguments, got "
            f"a {type(data).__name__}"
        ) from error


def _records(table: Any) -> list[dict[str, Any]]:
    """The rows of a table of pandas; where no number is missing, None, as in other tables."""
    rows = table.to_dict("records")
    if not hasattr(table, "isna"):
        return list(rows)
    others = {name for name, dtype in table.dtypes.items() if dtype.kind not in "biufc"}
    missing = table.isna().to_dict("records")
    return [
        {k: None if k in others and gone[k] else v for k, v in row.items()}
        for row, gone in zip(rows, missing, strict=True)
    ]


def _arguments_of(model: Callable[..., Any], row: Any) -> tuple[Any, ...]:
    row = _as_row(row)
    if isinstance(row, tuple):
        return row
    if not isinstance(row, Mapping):
        raise TypeError(
            f"each observation must be a tuple of the model's arguments, or a mapping from their "
            f"names, got {row!r}"
        )
    wrong = _why_unfit(model, row)
    try:
        return arguments_by_place(model, (), row)
    except TypeError as error:
        raise TypeError(
            f"an observation with {', '.join(map(repr, row))} does not fit the model"
            f"{inspect.signature(model)}: {wrong or error}"
        ) from error


def _as_row(row: Any) -> Any:
    """A row as a tuple, if it has an order, or as a mapping; anything else as it is."""
    if hasattr(row, "iloc") and hasattr(row, "isna") and getattr(row, "ndim", None) == 1:
        # A row of a table of pandas has the columns' names.
        numeric = row.dtype.kind in "biufc"
        gone = row.isna().tolist()
        values = [
            None if lost and not numeric else v for v, lost in zip(row.tolist(), gone, strict=True)
        ]
        names = row.index.tolist()
        by_name = all(isinstance(name, str) for name in names)
        return dict(zip(names, values, strict=True)) if by_name else tuple(values)
    if isinstance(row, np.ndarray) and row.ndim == 1:
        return tuple(row.tolist())
    if isinstance(row, Sequence) and not isinstance(row, str | bytes):
        return tuple(row)
    return row


def _why_unfit(model: Callable[..., Any], row: Mapping[str, Any]) -> str:
    """What a row by name lacks, and what it has too much; empty if neither."""
    parameters = inspect.signature(model).parameters
    wanted = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    lacks = [p.name for p in wanted if p.name not in row and p.default is p.empty]
    extra = [name for name in row if name not in parameters]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        extra = []
    clauses = []
    if lacks:
        clauses.append(f"it lacks {', '.join(map(repr, lacks))}")
    if extra:
        columns = [p.name for p in wanted if p.name in row]
        hint = did_you_mean(str(extra[0]), lacks)
        mend = (
            f"; take the columns it has, e.g. data.select_columns({columns}) of a Dataset, "
            f"data[{columns}] of a DataFrame"
        )
        word = "is no argument" if len(extra) == 1 else "are no arguments"
        clauses.append(f"{', '.join(map(repr, extra))} {word} of the model{hint or mend}")
    return "; ".join(clauses)
