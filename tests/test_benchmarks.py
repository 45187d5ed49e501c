"""The plain procedure that the benchmarks measure beside langppl computes the same numbers, and
the GPU's script runs in a small shape."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import langppl as lp
from langppl.distributions import Text
from langppl.guides.trajectories import Batch, make_draws
from langppl.program.execution import given
from langppl.testing import tiny_lm


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "plain.py"
    spec = importlib.util.spec_from_file_location("plain", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_special_tokens(lm: lp.LM) -> Callable[..., Any]:
    """The model as langppl sees it: tokens that no text holds have no chance."""
    never = torch.tensor(lm.vocabulary.special)
    never[list(lm.vocabulary.end_ids)] = False

    def call(**inputs: Any) -> Any:
        out = lm.model(**inputs)
        out.logits = out.logits.masked_fill(never, -torch.inf)
        return out

    return call


def test_prefix_rewards_of_the_plain_script_are_those_of_langppl(plain: ModuleType) -> None:
    lm = tiny_lm("ab.", seed=3)
    texts = ["abba", "bbab", "aabb"]

    def story() -> None:
        z = lp.sample("z", lp.LMString(lm, "b", stop=".", min_tokens=0, max_tokens=4))
        lp.sample("y", lp.LMString(lm, f"b{z}", min_tokens=0), obs="ab")

    program = lp.compile(story)
    ids = lm.encode_prompt("b")
    values = [Text(t, lm.encode_text(t), lm.fingerprint) for t in texts]
    executions = program.run([given({"z": v}) for v in values])
    (draws,) = make_draws([Batch(program, executions, [{"z": ids}] * 3, prefixes=True)])
    expected = np.array([[p + r for _, p, r in d.ends] for d in draws])
    for batch in (2, 32):
        found = plain.prefix_log_rewards(
            without_special_tokens(lm),
            ids,
            [v.ids for v in values],
            lm.encode_text("."),
            lm.encode_text("ab"),
            batch,
        )
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)


def test_the_plain_sampler_keeps_gradients_and_normalises(plain: ModuleType) -> None:
    lm = tiny_lm("ab.", seed=3)
    stops = lm.encode_text(".")
    lm.model.requires_grad_(True)
    tokens, log_q, log_stop = plain.sample_with_gradients(
        lm.model, lm.encode_prompt("b"), 5, 4, stops, 0
    )
    assert tokens.shape == log_q.shape == (5, 4) and log_stop.shape == (5, 5)
    assert not torch.isin(tokens, torch.tensor(stops)).any()
    again = plain.sequence_log_probs(
        lm.model, [[*lm.encode_prompt("b"), *z] for z in tokens.tolist()], [4] * 5, 2
    )
    torch.testing.assert_close(torch.stack(again), log_q, rtol=1e-4, atol=1e-4)
    plain.subtb_loss(torch.zeros(5, 5), log_q, log_stop).backward()
    assert all(p.grad is not None for p in lm.model.parameters())


def test_the_page_shows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    page = importlib.import_module("page")
    content = {
        "command": "python benchmarks/decoding.py --runs 5",
        "machine": {
            "processor": "abacus",
            "threads": 2,
            "capability": "none",
            "versions": {"torch": "1", "transformers": "2"},
            "commit": "abc",
            "date": "2000-01-01",
        },
        "lm": "small",
        "runs": 5,
        "columns": ["prompt", "ratio"],
        "rows": [{"prompt": 7, "ratio": 1.754, "seconds": [1.0]}],
    }
    (tmp_path / "decoding.json").write_text(json.dumps(content))
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.main()
    text = (tmp_path / "page.md").read_text()
    assert "| prompt | ratio |\n|---|---|\n| 7 | 1.75 |" in text
    assert "`python benchmarks/decoding.py --runs 5`" in text and "medians of 5 runs" in text
    assert "bfloat16" not in text  # what was not measured is not on the page


GPU = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "gpu.py")]


def test_the_gpu_script_runs_in_a_small_shape(tmp_path: Path) -> None:
    sizes = "--samples 4 --length 6 --context 20 --ending 4 --prompts 7 --particles 16 --runs 1"
    options = ["--work", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*GPU, "--device", "cpu", "--shape", "tiny", *options, *sizes.split()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {
        name: json.loads((tmp_path / "out" / f"gpu_{name}.json").read_text())["rows"]
        for name in ("step", "prefix_rewards", "decoding", "growth")
    }
    parts = {row["part"]: row for row in found["step"]}
    assert list(parts) == ["sampling", "reward", "gradient", "step"]
    assert all(row["route"] == "blocks" and row["model"] == "tiny" for row in parts.values())
    whole, of_parts = (
        [parts[p]["langppl s"] for p in names] for names in (["step"], list(parts)[:3])
    )
    assert whole[0] == pytest.approx(sum(of_parts))  # of one run each
    assert parts["step"]["langppl /s"] == pytest.approx(1 / whole[0])
    assert float(found["prefix_rewards"][0]["largest difference"]) < 1e-3
    assert found["decoding"][0]["ratio"] > 0 and found["growth"][0]["tokens/s"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which it would measure")
def test_the_gpu_script_says_where_there_is_none(tmp_path: Path) -> None:
    done = subprocess.run([*GPU, "--work", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "no CUDA device" in line and not list(tmp_path.iterdir())
