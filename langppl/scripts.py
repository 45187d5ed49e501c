"""Models in users' own scripts, for the command line: `SCRIPT:NAME`.

A script is imported, so what it does at its top level is done; what stands under
`if __name__ == "__main__"` is not. NAME is the model, which closes over an LM that the script made,
or a function of `lm` alone that makes the model:

    lm = lp.LM("smollm2-135m-instruct")

    def story(beginning, ending): ...     # story.py:story

    def make_story(lm):                   # story.py:make_story, with an LM of the caller's choice
        def story(beginning, ending): ...
        return story
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from langppl.distributions import StringDistribution
from langppl.guides import GFlowNetGuide, Guide
from langppl.inference import rows
from langppl.inference.rows import Row, RowLike
from langppl.lm import LM
from langppl.program import Program

DEFAULT_LM = "smollm2-135m-instruct"


class ScriptError(ValueError):
    """What the command line names is not there, or is not what it should be."""


@contextlib.contextmanager
def model_in(spec: str, lm: str | None) -> Iterator[Callable[..., Any]]:
    """The model that a script holds; within the block its folder is one to import from.

    Args:
        spec: `SCRIPT:NAME`, a Python file and the name of a function in it.
        lm: name or folder of the LM for a function that makes the model; None for `DEFAULT_LM`.

    Raises:
        ScriptError: if the file or the function is not there, importing the file fails, the LM
            cannot be loaded, or one is given and the model has its own.
        FetchError: as `LM`.
    """
    script, colon, name = spec.rpartition(":")
    if not colon or not script or not name.isidentifier():
        raise ScriptError(f"{spec!r} is not SCRIPT:MODEL; write it as in examples/story.py:model")
    path = Path(script).expanduser()
    if not path.is_file():
        raise ScriptError(f"there is no file {script!r}")
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        module = _imported(path)
        yield _model(module, script, name, lm)
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
        sys.modules.pop(_module_name(path), None)


def _imported(path: Path) -> ModuleType:
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ScriptError(f"{str(path)!r} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if _is(f, path)]
        where = f", line {lines[-1]}" if lines else ""
        said = str(error).splitlines()[0] if str(error) else ""
        raise ScriptError(
            f"importing {str(path)!r} failed{where}: {type(error).__name__}: {said}"
        ) from error
    return module


def place_of(error: Exception, spec: str) -> str | None:
    """Where an error was raised, if that is in the script or in a file beside it."""
    path = Path(spec.rpartition(":")[0]).expanduser()
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or Path(frames[-1].filename).resolve().parent != path.resolve().parent:
        return None
    return f"{frames[-1].filename!r}, line {frames[-1].lineno}"


def _module_name(path: Path) -> str:
    # Its own, so that a script called random.py hides no module.
    return f"langppl_script_{path.stem}"


def _is(frame: traceback.FrameSummary, path: Path) -> bool:
    return Path(frame.filename) == path


def _model(module: ModuleType, script: str, name: str, lm: str | None) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if found is None:
        raise ScriptError(f"{script!r} has no {name!r}; its functions are: {_functions(module)}")
    if not callable(found):
        raise ScriptError(
            f"{name!r} in {script!r} is no function, but of type {type(found).__name__}; its "
            f"functions are: {_functions(module)}"
        )
    if list(inspect.signature(found).parameters) != ["lm"]:
        if lm is not None:
            raise ScriptError(
                f"--lm is for a function of lm alone that makes the model, but {name!r} takes "
                f"({_parameters(found)}) and has an LM of its own"
            )
        return _checked(found, name)
    made = found(_loaded(lm or DEFAULT_LM))
    if not callable(made):
        raise ScriptError(
            f"{name}(lm) must return the model, a function, but returned {type(made).__name__}"
        )
    return _checked(made, f"{name}(lm)")


def _checked(model: Any, name: str) -> Callable[..., Any]:
    if inspect.isclass(model) or inspect.iscoroutinefunction(model):
        kind = "a class" if inspect.isclass(model) else "async"
        raise ScriptError(f"{name!r} is {kind}; a model is a plain function")
    found: Callable[..., Any] = model
    return found


def _loaded(name: str) -> LM:
    try:
        return LM(name)
    except OSError as error:  # transformers' word for what is not on the hub, or not within reach
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ScriptError(f"the LM {name!r} could not be loaded: {said[0]}") from error


def _functions(module: ModuleType) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    return ", ".join(own) or "none"


def _parameters(function: Callable[..., Any]) -> str:
    return ", ".join(inspect.signature(function).parameters)


def arguments(model: Callable[..., Any], texts: Sequence[str]) -> list[Any]:
    """The arguments of a model, from text.

    A parameter that is annotated `int`, `float` or `bool` takes a number or a truth value, one of a
    union of these and `str` the first of them that can be read (`None` too, where no `str` is in
    it), and one without an annotation the text.

    Raises:
        ScriptError: if their number is wrong, one cannot be read as what it is annotated, or is
            annotated as anything else.
    """
    signature = _signature(model)
    name = getattr(model, "__name__", "the model")
    try:
        bound = signature.bind(*texts)
    except TypeError:
        count = len(signature.parameters)
        word = "argument" if count == 1 else "arguments"
        raise ScriptError(
            f"{name} takes {count} {word} ({_parameters(model)}), and --arg is given "
            f"{len(texts)} times"
        ) from None
    for parameter in signature.parameters.values():
        if parameter.name not in bound.arguments:
            continue
        what = f"argument {parameter.name!r} of {name}"
        kinds = _kinds(parameter.annotation, what)
        given = bound.arguments[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            bound.arguments[parameter.name] = tuple(_read_as(kinds, t, what) for t in given)
        else:
            bound.arguments[parameter.name] = _read_as(kinds, given, what)
    return list(bound.args)


def _signature(model: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(model, eval_str=True)
    except Exception:  # what is imported for a type checker alone has no value
        return inspect.signature(model)


def _truth(text: str) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if text.strip().lower() not in known:
        raise ValueError(text)
    return known[text.strip().lower()]


def _nothing(text: str) -> None:
    if text.strip().lower() != "none":
        raise ValueError(text)


_READERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    bool: _truth,
    type(None): _nothing,
    str: str,
}
"""By type, in the order in which those of a union are tried."""


def _kinds(annotation: Any, what: str) -> list[Any]:
    """The types that an argument may have, in the order in which they are tried."""
    if annotation in (inspect.Parameter.empty, Any, object):
        return [str]
    named = {"None": type(None), **{kind.__name__: kind for kind in _READERS}}
    members: Sequence[Any] = (annotation,)
    if isinstance(annotation, str):
        members = [m.strip() for m in annotation.split("|")]
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
    found = [named.get(m, m) if isinstance(m, str) else m for m in members]
    for kind in found:
        if kind not in _READERS:
            # To Python 3.10 `list[str]` is a class, of the name `list`.
            is_class = isinstance(kind, type) and not isinstance(kind, types.GenericAlias)
            shown = getattr(kind, "__name__", kind) if is_class else kind
            raise ScriptError(
                f"{what} is annotated {shown}, and --arg gives str, int, float and bool; write a "
                "function that makes it of one of these"
            )
    kinds = [kind for kind in _READERS if kind in found]
    return [k for k in kinds if k is not type(None) or str not in kinds]


def _read_as(kinds: Sequence[Any], text: str, what: str) -> Any:
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return _READERS[kind](text)
    shown = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    hint = ": true or false" if list(kinds) == [bool] else ""
    raise ScriptError(f"{what} must be {shown}{hint}, got {text!r}")


def rows_of(methods: Sequence[str], guides: Sequence[str]) -> list[Row]:
    """Every method with every guide, checked before any script is run.

    Args:
        methods: `NAME` or `NAME:OPTION=VALUE,...`.
        guides: a name, or `gflownet=FOLDER` for one that was saved; see `with_guides`.

    Raises:
        ScriptError: if an option has no value, or a guide's folder holds none.
        ValueError: if a method, a guide or an option is not known.
        TypeError: if an option's value is of a wrong type.
    """
    for text in guides:
        _check_guide(text)
    asked: list[tuple[Any, ...]] = []
    texts: list[str | None] = []
    for text in methods:
        method, _, rest = text.partition(":")
        options = dict(_option(part, text) for part in rest.split(",") if part)
        for guide in [None] if method == "exact" else guides:
            # A saved guide is read on the model's own LM, which is not there yet.
            asked.append((method, guide and guide.partition("=")[0], options))
            texts.append(guide)
    found = rows.rows_of(None, None, asked, ())
    return [replace(row, guide=text) for row, text in zip(found, texts, strict=True)]


def _check_guide(text: str) -> None:
    name, equals, folder = text.partition("=")
    if not equals:
        return
    if name != "gflownet" or not folder:
        raise ScriptError(f"guide {text!r} is neither a name nor gflownet=FOLDER")
    if not Path(folder).expanduser().is_dir():
        raise ScriptError(f"there is no folder {folder!r} for guide {text!r}")


def with_guides(asked: Sequence[Row], program: Program) -> list[RowLike]:
    """The rows of `rows_of`, with saved guides read on the program's LM.

    Raises:
        ScriptError: if the program has no latent string for a saved guide.
        ValueError: as `GFlowNetGuide.load`.
    """
    texts = dict.fromkeys(str(row.guide) for row in asked if "=" in str(row.guide))
    loaded = {text: _read(text, program) for text in texts}
    return [(r.method, loaded.get(str(r.guide), r.guide), r.options) for r in asked]


def _read(text: str, program: Program) -> Guide:
    folder = text.partition("=")[2]
    latents = [program.sites[site].fn for site in program.latents]
    lm = next((fn.lm for fn in latents if isinstance(fn, StringDistribution)), None)
    if lm is None:
        raise ScriptError(f"guide {text!r} needs a latent string, and the model has none")
    guide = GFlowNetGuide.load(folder, lm)
    guide.name = f"gflownet={Path(folder).resolve().name}"
    return guide


def _option(part: str, method: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise ScriptError(f"{part!r} in method {method!r} has no value; write {part}=VALUE")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()
