"""The command line: fetching models, seeing which are known, and comparing methods on a model.

    $ langppl models
    $ langppl fetch smollm2-135m-instruct
    $ langppl compare story.py:story --arg "The cat was hungry." --arg " Now it sleeps."

Errors that a user can mend end in one line on standard error: exit code 2 for a wrong name or
argument, 1 for a fetch that failed, for an error of the model's own (with its place), and for a
comparison in which every row failed or which cannot be written.
"""

from __future__ import annotations

import os
from importlib.metadata import version as _version_of
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from langppl.defaults import NUM_SAMPLES

__all__ = ["app"]

_NARROW = 70
"""Columns of a terminal below which a table has cells that are cut short."""

app = typer.Typer(
    name="langppl",
    help="Probabilistic programming where strings are random variables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"langppl {_version_of('langppl')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Probabilistic programming where strings are random variables."""


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A known model's name; see `langppl models`.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Download a known model, convert it once, and print the folder that it is in."""
    from langppl.lm import weights

    try:
        folder = weights.fetch(name, progress=not quiet)
    except ValueError as error:
        _fail(error, code=2)
    except weights.FetchError as error:
        _fail(error, code=1)
    else:
        typer.echo(folder)


@app.command()
def models() -> None:
    """List the models that are known by name."""
    from rich.console import Console
    from rich.table import Column, Table

    from langppl.lm import weights

    # A name that is cut short cannot be copied.
    table = Table(
        Column("name", no_wrap=True, min_width=max(map(len, weights.KNOWN_MODELS))),
        *("download", "licence", "fetched", "description"),
    )
    for name, model in sorted(weights.KNOWN_MODELS.items()):
        size = f"{model.size_bytes / 1e6:.1f} MB"
        fetched = "yes" if weights.is_fetched(name) else "no"
        table.add_row(name, size, model.licence, fetched, model.description)
    console = Console()
    if console.width < _NARROW:
        heads = [str(column.header) for column in table.columns]
        for row in zip(*(column.cells for column in table.columns), strict=True):
            for head, cell in zip(heads, row, strict=True):
                console.print(f"{head}: {cell}", soft_wrap=True, highlight=False, markup=False)
    else:
        console.print(table)
    folder = f"Cache folder: {weights.cache_dir()}"
    console.print(folder, soft_wrap=True, highlight=False, markup=False)


@app.command()
def compare(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT:MODEL",
            help="A Python file, which is imported (so its top level is run), and a function in "
            "it: the model, or a function of `lm` alone that makes the model.",
        ),
    ],
    arg: Annotated[
        list[str] | None,
        typer.Option(
            help="An argument of the model, in order; a number where its parameter is annotated "
            "int or float, true or false where bool."
        ),
    ] = None,
    guide: Annotated[
        list[str] | None,
        typer.Option(
            help="prior, prompted, gflownet (trained first, on these observations) or "
            "gflownet=FOLDER (one that was saved). By default prior and prompted."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:OPTION=VALUE,...]",
            help="importance (the default), smc, mh or exact, with infer's own options: "
            "smc:twist=lookahead,every=4. Each goes with every guide; exact takes none.",
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="For each row.")] = NUM_SAMPLES,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal results.")] = 0,
    lm: Annotated[
        str | None,
        typer.Option(
            help="A known name, a hub id or a folder: the LM for a function of `lm` that makes "
            "the model. By default smollm2-135m-instruct. A model by itself has its own LM."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Set guides and methods side by side on a model of your own.

    The script is your own code, and is run as it would be if you imported it.
    """
    import io
    import sys

    from rich.console import Console

    from langppl import scripts
    from langppl.inference import compare as side_by_side
    from langppl.lm import weights
    from langppl.lm.files import write_atomically
    from langppl.program import compile

    # Found out before the work, not after it.
    if json is not None:
        _check_writable(json)
    try:
        asked = scripts.rows_of(method or ("importance",), guide or ("prior", "prompted"))
    except (TypeError, ValueError) as error:  # an option of a wrong type; no code of the user's ran
        _fail(error, code=2)
    try:
        with scripts.model_in(spec, lm) as model:
            program = compile(model, *scripts.arguments(model, arg or ()), seed=seed)
            found = side_by_side(
                program,
                rows=scripts.with_guides(asked, program),
                num_samples=num_samples,
                seed=seed,
                progress=not quiet,
            )
    except weights.FetchError as error:
        _fail(error, code=1)
    except Exception as error:
        if place := scripts.place_of(error, spec):
            _fail(f"{place}: {type(error).__name__}: {error}", code=1)
        if not isinstance(error, ValueError):
            raise
        _fail(error, code=2)
    unwritten: OSError | None = None
    # Before anything is printed, for which the other end of a pipe may be closed.
    if json is not None:
        try:
            write_atomically(json.expanduser(), found.to_json(), "comparison")
        except OSError as error:
            unwritten = error
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Not every encoding has the table's characters.
        sys.stdout.reconfigure(errors="replace")
    if sys.stdout.isatty():
        Console().print(found)
    else:
        typer.echo(str(found))
    if unwritten is not None:
        _fail(unwritten, code=1)
    if not found.posteriors:
        raise typer.Exit(1)


def _check_writable(file: Path) -> None:
    from langppl.lm.files import is_stream

    path = file.expanduser()
    if not path.parent.is_dir():
        _fail(f"there is no folder for {str(file)!r}", code=2)
    if path.is_dir():
        _fail(f"{str(file)!r} is a folder; give a file", code=2)
    if not is_stream(path) and not os.access(path.resolve().parent, os.W_OK):
        _fail(f"the folder of {str(file)!r} cannot be written to; give another", code=2)


def _fail(error: Exception | str, *, code: int) -> NoReturn:
    typer.echo(f"Error: {error}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
