"""The command line: fetching models, and seeing which are known.

    $ langppl models
    $ langppl fetch smollm2-135m-instruct

Errors that a user can mend end in one line on standard error: exit code 2 for a wrong name, 1 for
a fetch that failed.
"""

from __future__ import annotations

from importlib.metadata import version as _version_of
from typing import Annotated, NoReturn

import typer

__all__ = ["app"]

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
    console.print(table)
    console.print(f"Cache folder: {weights.cache_dir()}", soft_wrap=True, highlight=False)


def _fail(error: Exception, *, code: int) -> NoReturn:
    typer.echo(f"Error: {error}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
