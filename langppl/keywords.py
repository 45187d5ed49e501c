"""Names of arguments: the nearest of those that are known, and those of other libraries."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_ELSEWHERE = {
    "batch_size": "batch",
    "epochs": "steps",
    "lr": "learning_rate",
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_steps": "steps",
    "min_new_tokens": "min_tokens",
    "n": "num_samples",
    "num_epochs": "steps",
    "stop_sequences": "stop",
    "stop_strings": "stop",
}
"""What transformers, PyTorch and others call what has another name here."""

_NUCLEUS = {"min_p", "top_k", "top_p", "typical_p"}
"""What cuts off the LM's tail anew at each token."""


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a message about a name that is not known: the nearest one that is, if any."""
    close = difflib.get_close_matches(name, known, n=1)
    if _ELSEWHERE.get(name) in known:
        close = [_ELSEWHERE[name]]
    return f"; did you mean {close[0]!r}?" if close else ""


def named(fn: Callable[P, R]) -> Callable[P, R]:
    """A function that says which of its arguments a name that it does not have may stand for."""
    parameters = inspect.signature(fn).parameters
    title = fn.__qualname__.removesuffix(".__init__")

    @functools.wraps(fn)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in parameters:
                hint = did_you_mean(name, parameters)
                if name in _NUCLEUS and "temperature" in parameters:
                    hint = (
                        ": nucleus sampling is no fixed law of strings here; use temperature, "
                        "allow or ban"
                    )
                raise TypeError(f"{title} has no argument {name!r}{hint}")
        return fn(*args, **kwargs)

    return checked


def with_rows(fn: Callable[P, R]) -> Callable[P, R]:
    """A function of a model and data that says what data are when a row's values are given."""
    places = [p for p in inspect.signature(fn).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    count = len([p for p in places if p.kind is not p.VAR_KEYWORD])
    own = count - 1

    @functools.wraps(fn)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > count:
            raise TypeError(
                f"{fn.__qualname__} takes data by place, a sequence of rows, each a tuple of the "
                f"model's arguments; for one row write [{args[own:]!r}]"
            )
        return fn(*args, **kwargs)

    return checked
