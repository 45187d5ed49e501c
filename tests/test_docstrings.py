"""What docstrings say of arguments and errors is what signatures and code say."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import langppl as lp


def _public() -> Iterator[tuple[str, Any]]:
    for module in lp._MODULES:
        for name in getattr(lp, module).__all__:
            yield f"{module}.{name}", getattr(getattr(lp, module), name)


def _functions() -> Iterator[tuple[str, Any, str]]:
    """Public functions, methods and constructors of langppl's own, with their docstrings."""
    for path, value in dict(_public()).items():
        if inspect.isfunction(value):
            yield path, value, value.__doc__ or ""
        if not inspect.isclass(value) or not value.__module__.startswith("langppl."):
            continue
        made = value.__dict__.get("__init__")
        if inspect.isfunction(made) and not dataclasses.is_dataclass(value):
            yield path, made, value.__doc__ or ""
        for name, member in vars(value).items():
            fn = getattr(member, "__func__", member)
            if inspect.isfunction(fn) and not name.startswith("_"):
                yield f"{path}.{name}", fn, inspect.getdoc(getattr(value, name)) or ""


FUNCTIONS = {path: (inspect.unwrap(fn), doc) for path, fn, doc in _functions()}


def _section(doc: str, name: str) -> list[str] | None:
    """The names that a section lists, without stars; None if there is no such section."""
    found = re.search(rf"^{name}:\n((?: .*\n|\n)*)", inspect.cleandoc(doc) + "\n", re.M)
    if found is None:
        return None
    return re.findall(r"^    \*{0,2}([\w.]+):", found[1], re.M)


def test_the_functions_are_found() -> None:
    assert {"inference.infer", "guides.GFlowNetGuide", "posterior.Posterior.load"} <= set(FUNCTIONS)
    assert _section(lp.infer.__doc__ or "", "Args")


def test_arguments_are_those_of_the_signature() -> None:
    assert not [path for path, (_, doc) in FUNCTIONS.items() if not doc]
    wrong = {}
    for path, (fn, doc) in FUNCTIONS.items():
        listed = _section(doc, "Args")
        names = {name for name in inspect.signature(fn).parameters if name not in ("self", "cls")}
        if listed is not None and (set(listed) != names or len(listed) > len(names)):
            wrong[path] = names.symmetric_difference(listed)
    assert not wrong


def test_errors_of_a_bad_argument_are_listed() -> None:
    wrong = {}
    for path, (fn, doc) in FUNCTIONS.items():
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
        made = [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise)]
        kinds = {
            e.func.id for e in made if isinstance(e, ast.Call) and isinstance(e.func, ast.Name)
        }
        missing = kinds & {"TypeError", "ValueError"} - set(_section(doc, "Raises") or ())
        # A docstring of one sentence has no sections.
        if missing and _section(doc, "Args") is not None:
            wrong[path] = missing
    assert not wrong


def test_fields_are_listed() -> None:
    classes = {v for _, v in _public() if inspect.isclass(v) and dataclasses.is_dataclass(v)}
    assert len(classes) > 5
    for made in classes:
        listed = [*(_section(made.__doc__, s) or () for s in ("Attributes", "Args"))]
        names = {f.name for f in dataclasses.fields(made) if not f.name.startswith("_")}
        assert names <= {name for section in listed for name in section}, made
