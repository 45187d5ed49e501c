"""Where warnings point to."""

from __future__ import annotations

import inspect
import warnings

import pytest

import langppl as lp
from langppl.testing import tiny_lm
from langppl.warn import _registries, _said, warn


def test_a_warning_about_a_model_points_into_it() -> None:
    lm = tiny_lm("ab")

    def model() -> None:
        number = lp.sample("n", lp.LMString(lm, "a", max_tokens=2))
        if len(number) > 5:
            lp.sample("never", lp.LMString(lm, "b"))
        lp.sample("z", lp.LMString(lm, f"b{number}a", max_tokens=2), obs="b")

    lines, start = inspect.getsourcelines(model)
    at = next(k for k, line in enumerate(lines) if 'obs="b"' in line)
    with pytest.warns(lp.JoinWarning) as heard:
        lp.compile(model).log_joint({"n": "a"})
    assert {w.filename for w in heard} == {__file__}
    assert {w.lineno for w in heard} <= {start + at, *_calls_of("log_joint")}


def _calls_of(name: str) -> list[int]:
    source = inspect.getsource(inspect.getmodule(_calls_of))
    return [k for k, line in enumerate(source.splitlines(), 1) if f".{name}(" in line]


def test_a_warning_of_inference_points_to_who_asked() -> None:
    lm = tiny_lm("ab")

    def model() -> None:
        lp.sample("z", lp.LMString(lm, "a", max_tokens=2))
        lp.factor("f", -float("inf"))

    with pytest.warns(lp.InferenceWarning) as heard:
        lp.infer(model, progress=False)
    assert [w.filename for w in heard] == [__file__]


def test_what_was_said_is_kept_for_a_thousand_subjects() -> None:
    for k in [*range(3000), 2999]:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            warn(f"subject {k}", once=("test", k))
        assert len(_said) <= 1024
    assert not heard  # the last one had been said


def said(*messages: str) -> list[tuple[str, int]]:
    """Messages that are shown by the default filter, of two lines of this file."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        for message in messages:
            warn(message)
        for message in messages:
            warn(message)
    return [(str(w.message), w.lineno) for w in heard]


def test_equal_messages_are_said_once_for_each_line() -> None:
    lines, start = inspect.getsourcelines(said)
    first, second = (start + k for k, line in enumerate(lines) if "warn(message)" in line)
    assert said("a", "a", "b", "a") == [("a", first), ("b", first), ("a", second), ("b", second)]


def test_what_python_notes_of_messages_is_bounded() -> None:
    globals().pop("__warningregistry__", None)
    messages = [f"message {k}" for k in range(3000)]
    assert len(said(*messages, *messages[-1000:])) == 6000
    assert "__warningregistry__" not in globals()
    assert len(_registries[__file__]) <= 1025
    # As by the filter of errors.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="message 2999"):
            warn("message 2999")


def test_files_are_bounded_too() -> None:
    for k in range(600):
        code = compile("warn('of a cell')", f"<cell {k}>", "exec")
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("default")
            exec(code, {"warn": warn, "__name__": "__main__"})
        assert [w.filename for w in heard] == [f"<cell {k}>"]
    assert len(_registries) == 256


def test_filters_of_the_user_hold() -> None:
    for action, expected in [("ignore", 0), ("always", 6), ("module", 2), ("default", 4)]:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter(action)  # type: ignore[arg-type]
            for message in ("a", "b", "a"):
                warn(message)
            for message in ("a", "b", "a"):
                warn(message)
        assert len(heard) == expected, action
