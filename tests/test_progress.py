"""Progress where there is no terminal: lines in the log."""

from __future__ import annotations

import logging

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


def test_a_notebook_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def drawn(title: str, total: int) -> object:
        shown.append(f"{title} {total}")
        return progress.contextlib.nullcontext(lambda steps=1, text=None: None)

    monkeypatch.setattr(progress, "_is_notebook", lambda: True)
    monkeypatch.setattr(progress, "_drawn", drawn)
    with progress.bar("working", 9, show=True) as advance:
        advance(1)
    assert shown == ["working 9"]
