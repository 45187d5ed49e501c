"""What inference is asked for: names, options and their values, checked before any work is done."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

from langppl.guides.identity import of_function
from langppl.inference.resampling import SCHEMES
from langppl.inference.twists import check_twist
from langppl.keywords import did_you_mean
from langppl.lm.counts import as_count, as_share

_Method = Literal["importance", "smc", "mh", "exact"]
METHODS: tuple[str, ...] = get_args(_Method)
Method: TypeAlias = _Method | str
"""The names, for editors to offer; any `str`, for whoever goes over several, or reads one."""
OPTIONS = {
    "importance": (),
    "smc": (
        "twist",
        "twist_power",
        "resampling",
        "ess_threshold",
        "every",
        "rejections",
        "rejuvenation",
        "tail_share",
    ),
    "mh": ("chains", "warmup", "thin", "tail_share"),
    "exact": ("limit",),
}
"""The arguments of `infer` that belong to some methods alone."""

_LEAST = {"every": 1, "rejections": 0, "rejuvenation": 0, "chains": 1, "warmup": 0, "thin": 1}


def check_values(**options: Any) -> dict[str, Any]:
    """Checks options of any method, by the names that `infer` has for them.

    Returns:
        The options; numbers of things as plain integers, shares as plain floats.

    Raises:
        ValueError: for one out of range.
        TypeError: for a twist that is neither a name nor a function.
    """
    for name, value in options.items():
        if name in _LEAST and not (name == "warmup" and value is None):
            options[name] = as_count(name, value, _LEAST[name])
    scheme = options.get("resampling", SCHEMES[0])
    if scheme not in SCHEMES:
        raise ValueError(f"unknown resampling {scheme!r}; schemes are: {', '.join(SCHEMES)}")
    for name in ("ess_threshold", "tail_share"):
        if name in options:
            options[name] = as_share(name, options[name])
    check_twist(options.get("twist"), options.get("twist_power"))
    limit = options.get("limit", 1)
    if not (_is_number(limit) and limit >= 1):
        raise ValueError(f"limit must be a number of at least 1, got {limit!r}")
    return options


def options_in_words(options: Mapping[str, Any], takes: Callable[..., Any]) -> list[str]:
    """Options that are not at their defaults, in words that are the same in every process.

    Args:
        options: by name.
        takes: the function that has their defaults.
    """
    defaults = {name: p.default for name, p in inspect.signature(takes).parameters.items()}
    given = {k: options[k] for k in sorted(options) if options[k] != defaults[k]}
    return [f"{k} {of_function(v) if callable(v) else repr(v)}" for k, v in given.items()]


def split_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a method, and the arguments of a model that are given beside them.

    Args:
        given: both, by name. What is the name of any method's option is one.
    """
    names = {name for own in OPTIONS.values() for name in own}
    options = {name: value for name, value in given.items() if name in names}
    return options, {name: value for name, value in given.items() if name not in names}


def names_of(takes: Callable[..., Any], method: str = "") -> list[str]:
    """Names that a function takes for itself beside a model's arguments.

    Args:
        takes: the function.
        method: whose options it takes as well.
    """
    own = inspect.signature(takes).parameters.values()
    return [*(p.name for p in own if p.kind is p.KEYWORD_ONLY), *OPTIONS.get(method, ())]


def check_options(method: str, options: Mapping[str, Any], takes: Callable[..., Any]) -> None:
    """Checks what is passed on to a method.

    Args:
        method: the method.
        options: what is given for it.
        takes: what the user called, for whose arguments a name may have been meant.

    Raises:
        ValueError: for a value out of range.
        TypeError: for an option that the method does not have, or as `check_values`.
    """
    known = OPTIONS.get(method, ())
    for name in options:
        if name not in known:
            has = f"options are: {', '.join(known)}" if known else "it has none"
            hint = did_you_mean(name, names_of(takes, method))
            raise TypeError(
                f"method {method!r} has no option {name!r}; {has}; nor has {takes.__name__} an "
                f"argument of that name{hint}"
            )
    check_values(**options)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
