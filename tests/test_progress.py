"""Progress where there is no terminal: lines in the log."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import types

import pytest

from langppl import progress


def test_the_log_has_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, logger="langppl"):
        with progress.bar("working", 9, show=True) as advance:
            for k in range(9):
                now[0] += 4.0
                advance(1, text=f"step {k}")
        progress.say("done", show=True)
        with progress.bar("quiet", 9, show=False) as advance:
            now[0] += 100.0
            advance(9)
        progress.say("quiet", show=False)
    # Every third step of four seconds is past ten.
    assert caplog.messages == [
        "step 2: 3 of 9, 12 s",
        "step 5: 6 of 9, 24 s",
        "step 8: 9 of 9, 36 s",
        "done",
    ]


class Handle:
    def __init__(self, shown: list[str]) -> None:
        self.shown = shown

    def update(self, line: dict[str, str], raw: bool) -> None:
        assert raw
        self.shown.append(line["text/plain"])


def test_a_notebook_has_one_line_that_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    handles: list[Handle] = []

    def display(line: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert raw and display_id
        handles.append(Handle(shown))
        handles[-1].update(line, raw=True)
        return handles[-1]

    now = [100.0]
    module = types.ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(progress, "_is_notebook", lambda: True)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.bar("working", 9, show=True) as advance:
        for _ in range(9):
            now[0] += 0.125
            advance(1)
    # The first second shows nothing.
    assert shown == ["working: 8 of 9, 1 s", "working: 9 of 9, 1 s"] and len(handles) == 1
    with progress.bar("short", 9, show=True) as advance:
        now[0] += 0.5
        advance(9)
    assert len(handles) == 1


PRINTS = """
import sys, time
from langppl import progress
sys.stderr.isatty = lambda: True
with progress.bar("working", 3, True) as advance:
    for k in range(3):
        advance(1)
        print("x" * 200, flush=True)
"""


def test_what_is_printed_into_a_file_stays_there_beside_a_bar() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ("x" * 200 + "\n") * 3
    assert "xxx" not in done.stderr


def test_a_title_is_no_markup_and_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "dumb")
    with progress.bar("guide [/y] \x1b]0;evil\x07", 2, show=True) as advance:
        advance(text="then [/z] \x1b]0;evil\x07")
    progress.say("saved \x1b]0;evil\x07", show=True)
    text = shown.getvalue()
    assert "[/y]" in text or "[/z]" in text
    assert "\x1b]" not in text and "\x07" not in text
    assert "saved \\x1b]0;evil\\x07" in text
