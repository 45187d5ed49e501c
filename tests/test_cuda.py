"""On cuda everything is what it is on the CPU: strings depend on their keys alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import langppl as lp
from langppl.testing import tiny_lm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda here")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def make(device: torch.device) -> lp.LM:
    lm = tiny_lm(["a", "b", ".", " "], seed=4, merged=["ab", "b.", ".a"])
    return lp.LM.from_parts(lm.model.to(device), lm.tokenizer, "tiny")


def story(lm: lp.LM, ending: str) -> str:
    z = lp.sample("z", lp.LMString(lm, "ab", stop=".", max_tokens=6))
    y = lp.sample("y", lp.LMString(lm, f"ab{z}", stop=".", max_tokens=4))
    lp.sample("ending", lp.LMString(lm, f"ab{z}{y}"), obs=ending)
    return f"{z}{y}"


def one(lm: lp.LM, ending: str) -> str:
    z = lp.sample("z", lp.LMString(lm, "ab", stop=".", max_tokens=6))
    lp.sample("ending", lp.LMString(lm, f"ab{z}"), obs=ending)
    return str(z)


def both(ask: Any) -> tuple[Any, Any]:
    return ask(make(CPU)), ask(make(CUDA))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "importance", "num_samples": 64},
        {"method": "importance", "num_samples": 64, "guide": "prompted"},
        {"method": "smc", "num_samples": 32, "twist": "lookahead"},
        {"method": "smc", "num_samples": 32, "rejuvenation": 1},
        {"method": "mh", "num_samples": 32},
        {"method": "exact"},
    ],
)
def test_methods(options: dict[str, Any]) -> None:
    def ask(lm: lp.LM) -> Any:
        model = one if "twist" in options or options["method"] == "exact" else story
        return lp.infer(model, lm, "a.", seed=3, progress=False, **options)

    here, there = both(ask)
    assert [str(s) for s in here.samples] == [str(s) for s in there.samples]
    if here.log_evidence is not None:
        assert there.log_evidence == pytest.approx(here.log_evidence, abs=1e-3)


OBJECTIVES = ["subtb", "vargrad", "tb", "db", "reverse_kl", "rws", "reward", "forward_kl"]


@pytest.mark.parametrize("objective", [*OBJECTIVES, "rao_blackwell"])
def test_training(objective: str, tmp_path: Path) -> None:
    def ask(lm: lp.LM) -> Any:
        guide = lp.GFlowNetGuide(lm, rank=2, seed=1)
        data = [(lm, "a."), (lm, "b."), (lm, "ab.")]
        guide.fit(
            one,
            data,
            objective=objective,
            steps=3,
            batch=4,
            observations=2,
            validation=data[:1],
            validate_every=2,
            progress=False,
        )
        folder = tmp_path / lm.device.type
        guide.save(folder)
        posterior = lp.infer(one, lm, "a.", num_samples=16, guide=guide, seed=2, progress=False)
        lp.GFlowNetGuide.load(folder, lm)
        return guide.history.to_pandas()["loss"].tolist(), posterior

    (losses, here), (others, there) = both(ask)
    np.testing.assert_allclose(losses, others, rtol=1e-3, atol=1e-3)
    assert there.log_evidence == pytest.approx(here.log_evidence, abs=1e-2)


def test_a_folder_is_loaded_onto_cuda(tmp_path: Path) -> None:
    lm = make(CPU)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert lp.LM(tmp_path).device.type == "cuda"
    assert lp.LM(tmp_path, dtype=torch.bfloat16).packs is not None
