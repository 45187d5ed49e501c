"""The command line."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from langppl.cli import app
from langppl.lm import weights

runner = CliRunner()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LANGPPL_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"langppl {version('langppl')}\n"


def test_models_says_which_are_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = runner.invoke(app, ["models"])
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if "smollm2-135m-instruct" in line)
    cells = [cell.strip() for cell in row.strip("│┃|").split("│")]
    assert cells[:4] == ["smollm2-135m-instruct", "92.9 MB", "Apache-2.0", "no"]
    assert f"Cache folder: {cache}" in result.stdout

    monkeypatch.setattr(weights, "is_fetched", lambda name: True)
    assert " yes " in runner.invoke(app, ["models"]).stdout


@pytest.mark.parametrize("width", [20, 40, 60])
def test_nothing_is_cut_short_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = runner.invoke(app, ["models"]).stdout
    model = weights.KNOWN_MODELS["smollm2-135m-instruct"]
    for cell in ("smollm2-135m-instruct", "92.9 MB", "fetched: no", model.licence):
        assert cell in said
    assert model.description in said and "…" not in said


def test_a_folder_that_looks_like_markup_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LANGPPL_CACHE", str(tmp_path / "[red]x[" / "y]"))
    result = runner.invoke(app, ["models"])
    assert f"Cache folder: {tmp_path}/[red]x[/y]" in result.stdout


def test_fetch_prints_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, *, progress: bool) -> Path:
        asked.append((name, progress))
        return Path("/models/toy")

    monkeypatch.setattr(weights, "fetch", fetch)
    assert runner.invoke(app, ["fetch", "toy"]).stdout == "/models/toy\n"
    assert runner.invoke(app, ["fetch", "toy", "--quiet"]).exit_code == 0
    assert asked == [("toy", True), ("toy", False)]


def test_an_unknown_name_is_a_usage_error() -> None:
    result = runner.invoke(app, ["fetch", "smollm2"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: no model is called 'smollm2'")
    assert "Did you mean 'smollm2-135m-instruct'?" in result.stderr


def test_a_failed_fetch_is_one_line_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, *, progress: bool) -> Path:
        raise weights.FetchError("the line is dead")

    monkeypatch.setattr(weights, "fetch", fetch)
    result = runner.invoke(app, ["fetch", "toy"])
    assert result.exit_code == 1
    assert result.stderr == "Error: the line is dead\n"
    assert "Traceback" not in result.output


def test_without_a_command_there_is_help() -> None:
    result = runner.invoke(app, [])
    assert "fetch" in result.output
    assert "models" in result.output
