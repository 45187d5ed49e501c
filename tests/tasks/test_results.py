"""The tasks' benchmarks run whole on a tiny LM, keep what they finished, and fill their pages."""

from __future__ import annotations

import importlib
import json
import string
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from examples_of import load

from langppl.testing import tiny_lm

TASKS = Path(__file__).parents[2] / "benchmarks" / "tasks"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lm = tiny_lm(f"{string.ascii_letters}{string.digits} .,:;+-=\n", window=512)
    folder = tmp_path_factory.mktemp("lm")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TASKS))
    return importlib.import_module("results")


def benchmark(name: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(TASKS / f"{name}.py"), *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_random_numbers_goes_on_where_it_was(tiny: Path, tmp_path: Path) -> None:
    options = f"--model {tiny} --steps 2 --batch 8 --draws 3 --out {tmp_path} --seeds".split()
    benchmark("random_numbers", *options, "0", "--ways", "gflownet")
    kept = tmp_path / "random_numbers-work" / "gflownet-0.json"
    before = kept.stat().st_mtime_ns
    shown = benchmark("random_numbers", *options, "0", "1")
    assert kept.stat().st_mtime_ns == before
    found = json.loads((tmp_path / "random_numbers.json").read_text())
    assert set(found["runs"]["gflownet"]) == {"0", "1"} and found["seeds"] == [0, 1]
    assert found["command"].startswith("python benchmarks/tasks/random_numbers.py --model")
    assert "| gflownet |" in shown and "| reward |" in (tmp_path / "random_numbers.md").read_text()


def test_arithmetic_runs(tiny: Path, tmp_path: Path) -> None:
    rows = []
    for split, operands, count in (("train", (3, 4), 70), ("test", (3, 4, 5), 9)):
        for k, s in enumerate(load("arithmetic").make_sums(operands, count, seed=len(split))):
            rows.append(
                {
                    "expression": s.question,
                    "answer": s.answer,
                    "split": split,
                    "rationale_shipped": split == "train" and k < 50,
                }
            )
    (tmp_path / "arithmetic.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    sizes = "--demos 3 --demo-steps 2 --labels 4 --steps 2 --test 2 --draws 2 --seeds 0"
    shown = benchmark(
        "arithmetic",
        *f"--data {tmp_path} --model {tiny} --out {tmp_path} {sizes}".split(),
        *["--ways", "few-shot", "supervised", "gflownet"],
    )
    found = json.loads((tmp_path / "arithmetic.json").read_text())
    assert list(found["runs"]) == ["few-shot", "supervised", "gflownet"]
    assert "| gflownet |" in shown
    assert 0.0 <= found["runs"]["gflownet"]["0"]["5"]["vote"] <= 1.0


def test_subjectivity_goes_on_where_it_was(tiny: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{split[0]} {k}", "label_text": label, "split": split, "few_shot": []}
        for split, count in (("train", 6), ("test", 2))
        for label in ("objective", "subjective")
        for k in range(count)
    ]
    (tmp_path / "subj.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    sizes = "--labels 4 --test 2 --draws 2 --steps 2 --batch 2 --observations 2 --shots 2 --seeds 1"
    learning = "--supervised-rounds 1 --rounds 1 --fit-steps 1 --m-steps 1 --sharper-steps 1"
    options = f"--data {tmp_path} --model {tiny} --out {tmp_path} {sizes} {learning}".split()
    benchmark("subjectivity", *options, "--ways", "zero-shot", "gflownet")
    kept = tmp_path / "subjectivity-work" / "result-gflownet-4-1-2.json"
    before = kept.stat().st_mtime_ns
    shown = benchmark("subjectivity", *options)
    assert kept.stat().st_mtime_ns == before
    found = json.loads((tmp_path / "subjectivity.json").read_text())
    assert list(found["runs"]) == [
        "zero-shot",
        "rationales of the LM",
        "few-shot",
        "supervised",
        "gflownet",
        "gflownet, sharper",
        "gflownet, EM",
    ]
    # It goes on from the guide, whose seconds are its own too.
    seconds = [found["runs"][w]["4"]["1"]["seconds"] for w in ("gflownet", "gflownet, sharper")]
    assert seconds[1] > seconds[0]
    work = tmp_path / "subjectivity-work"
    adapters = {
        (work / f"gflownet{name}-4-1" / "guide" / "adapter_model.safetensors").read_bytes()
        for name in ("", "-sharper", "-EM")
    }
    assert len(adapters) == 3
    assert "| gflownet, EM |" in shown
    run = found["runs"]["gflownet, EM"]["4"]["1"]
    assert 0.0 <= run["accuracy"] <= 1.0 and len(run["shown"][0]["rationales"]) in (1, 2)
    assert "**gflownet, EM**, 4 labels" in (tmp_path / "subjectivity.md").read_text()


def test_a_page_is_filled(results: ModuleType) -> None:
    page = "a\n<!-- table -->\nold\n<!-- end of table -->\nb\n"
    filled = results.fill(page, "table", "new\n")
    assert filled == "a\n<!-- table -->\nnew\n<!-- end of table -->\nb\n"
    with pytest.raises(ValueError, match="the page has no"):
        results.fill("a", "table", "new")
    for name in ("random_numbers", "arithmetic", "subjectivity"):
        text = (results.PAGES / f"{name}.md").read_text()
        results.fill(results.fill(text, "table", "x"), "samples", "y")


def test_runs_under_other_settings_are_refused(results: ModuleType, tmp_path: Path) -> None:
    results.Runs(tmp_path, {"steps": 1}).put("a", {"x": 1})
    assert results.Runs(tmp_path, {"steps": 1}).get("a") == {"x": 1}
    with pytest.raises(SystemExit, match="other settings"):
        results.Runs(tmp_path, {"steps": 2})
