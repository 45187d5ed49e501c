"""Results show as tables in terminals and notebooks, and as one line among others."""

from __future__ import annotations

import html
import importlib
import inspect
import io
import math
import pkgutil
import re
from typing import Any

import pytest

import langppl
from langppl.guides import History
from langppl.inference.bounds import EvidenceBounds
from langppl.inference.calibration import Calibration
from langppl.inference.comparison import Comparison
from langppl.learning import EMResult
from langppl.posterior import Posterior
from langppl.program.graph import ProgramGraph
from langppl.tables import Report, as_text, moments, shown

POSTERIOR = Posterior([{"z": "<cat>"}, {"z": "dog"}], [0.0, math.log(3.0)])
HISTORY = History({"round": [0.0, 1.0], "log_evidence": [-2.5, -1.25]})
RANKS = (0, 1, 2, 3) * 20
REPORTS: dict[str, tuple[Report, str]] = {
    "Posterior": (POSTERIOR, "'<cat>'"),
    "Comparison": (Comparison({"a": POSTERIOR}, {"b": ValueError("no")}), "likeliest 'z'"),
    "EMResult": (EMResult(HISTORY, None, ()), "-1.250"),
    "Calibration": (Calibration("prior", "exact", 80, 3, 1, {"s": RANKS}, None), "calibrated"),
    "Diagnosis": (POSTERIOR.diagnose(), "distinct samples"),
    "EvidenceBounds": (
        EvidenceBounds(
            *("prior", "importance", 1, 2, -2.0, -1.0, 1.0, (0.0, 1.0), (0.0, 1.0), 0.1, 0.1),
            *(0.1, (0.1, 0.1), (0.1, 0.1), 0.0, 0.0, {"lower": (-2.0,)}),
        ),
        "KL(q‖p)",
    ),
}


def test_every_class_that_prints_a_table_is_a_report() -> None:
    modules = [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(langppl.__path__, "langppl.")
    ]
    found = {
        cls.__name__
        for module in modules
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__.startswith("langppl") and "__rich__" in vars(cls) and cls is not Report
    }
    assert found == set(REPORTS)
    assert all(isinstance(report, Report) for report, _ in REPORTS.values())


@pytest.mark.parametrize("name", REPORTS)
def test_a_notebook_shows_the_table(name: str) -> None:
    report, mark = REPORTS[name]
    bundle: dict[str, Any] = report._repr_mimebundle_(include=None, exclude=None)

    assert set(bundle) == {"text/plain", "text/html"}
    assert bundle["text/plain"] == str(report)
    assert mark in str(report)
    page = bundle["text/html"]
    assert page.startswith("<pre style=") and page.rstrip().endswith("</pre>")
    assert "<html" not in page and "class=" not in page
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert text.split() == str(report).split()


@pytest.mark.parametrize("name", sorted(set(REPORTS) - {"Diagnosis"}))
def test_among_others_it_is_one_line(name: str) -> None:
    text = repr(REPORTS[name][0])
    assert text.startswith(f"{name}(") and "\n" not in text
    for whole in ("history", "ranks", "observations={"):
        assert whole not in text


def test_the_lines() -> None:
    assert repr(REPORTS["Comparison"][0]) == "Comparison(rows=['a'], failed=['b'])"
    assert repr(REPORTS["EMResult"][0]) == "EMResult(guide=None, trainables=())"
    assert repr(REPORTS["Calibration"][0]) == (
        "Calibration(guide='prior', method='exact', simulations=80, draws=3, num_samples=1, "
        "median_ess=None, unknown_ess=0)"
    )


def test_an_interpreter_shows_a_diagnosis_in_words() -> None:
    diagnosis = POSTERIOR.diagnose()
    assert repr(diagnosis) == str(diagnosis)
    assert "draw more (num_samples)" in repr(diagnosis)


def test_html_is_as_wide_as_the_text() -> None:
    report, _ = REPORTS["Comparison"]
    assert str(report) == as_text(report, width=100)
    lines = html.unescape(re.sub(r"<[^>]+>", "", report._repr_mimebundle_()["text/html"]))
    assert max(map(len, lines.splitlines())) <= 100


def test_moments_are_weighted() -> None:
    # Mean (1·3 + 5·1)/4 = 2, variance (1·3 + 9·1)/4 = 3.
    assert moments({1.0: 3.0, 5.0: 1.0}) == "mean 2, sd 1.732 (2 values)"


def test_values_are_quoted_and_shortened() -> None:
    assert (shown(0.5), shown(" a"), shown(2.0)) == ("0.5", "' a'", "2")
    assert shown("abcdefgh", 6) == "'ab … gh'"
    assert shown("abcd", 6) == "'abcd'"


HOSTILE = "\x1b[31mEVIL\x1b[0m\x07"


def test_names_may_look_like_markup() -> None:
    posterior = Posterior([{"z[/x]": "a"}, {"z[/x]": "b"}], [0.0, 0.0])
    for report in (posterior, Comparison({"g[/y]": posterior, "[red]p": posterior}, {})):
        assert "z[/x]" in str(report)
    assert "g[/y]" in str(report) and "[red]p" in str(report)


def test_control_characters_of_names_are_written_out() -> None:
    posterior = Posterior([{HOSTILE: "a"}, {HOSTILE: "b"}], [0.0, 0.0])
    graph = ProgramGraph()
    graph.add_node(HOSTILE, kind="latent", family="LMString")
    graph.add_node("end\u202e", kind="observed", family="LMString")
    graph.add_edge(HOSTILE, "end\u202e")
    compared = Comparison({HOSTILE: posterior}, {})
    shown_forms = [str(graph), graph._repr_html_()]
    for report in (posterior, compared):
        shown_forms += report._repr_mimebundle_().values()
    for text in shown_forms:
        assert "EVIL" in text and "x1b[31m" in text
        assert all(c.isprintable() or c == "\n" for c in text)
    assert "end\\u202e" in str(graph)


def test_a_comparison_on_a_terminal_writes_control_characters_of_names_out() -> None:
    from rich.console import Console

    posterior = Posterior([{"z": "a"}, {"z": "b"}], [0.0, 0.0])
    console = Console(width=200, force_terminal=True, color_system=None, file=io.StringIO())
    console.print(Comparison({HOSTILE: posterior}, {}))
    shown_as = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\\x1b[31mEVIL" in shown_as and "\x1b[31mEVIL" not in shown_as and "\x07" not in shown_as
