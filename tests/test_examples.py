"""The examples' own parts, on a tiny LM; whole, they run as `make demo`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from langppl import LMString, infer, sample
from langppl.inference import Comparison
from langppl.testing import tiny_lm


@pytest.fixture
def stories() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "story_infilling.py"
    spec = importlib.util.spec_from_file_location("story_infilling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_shows_the_gap_where_there_is_a_reference(stories: ModuleType) -> None:
    lm = tiny_lm("ab.")

    def story() -> None:
        middle = sample("middle", LMString(lm, "a", stop=".", max_tokens=4, truncate="reject"))
        sample("ending", LMString(lm, f"a{middle}"), obs="ab")

    posterior = infer(story, num_samples=32, progress=False)
    shown = {}
    for name, reference in {
        "without": None,
        "with": {"log_evidence": posterior.elbo_possible + 1.25, "error": 0.5},
    }.items():
        table = stories.story_table(
            next(iter(stories.STORIES)), Comparison({"prior": posterior}), reference
        )
        console = Console(width=200)
        with console.capture() as capture:
            console.print(table)
        shown[name] = capture.get()
    assert "1.25" in shown["with"] and "± 0.50" in shown["with"]
    assert "–" in shown["without"] and "1.25" not in shown["without"]
    # With the model itself as proposal a weight is the likelihood.
    assert f"{posterior.elbo_possible:.2f}" == f"{stories.ending_log_prob(posterior):.2f}"


def test_every_story_has_a_reference_and_its_whole_command(stories: ModuleType) -> None:
    known = json.loads(stories.REFERENCE.read_text())
    assert set(known) == set(stories.STORIES)
    for name, run in known.items():
        for part in (f"--stories {name}", f"--samples {run['samples']}", "--given", "--rank"):
            assert part in run["command"]
