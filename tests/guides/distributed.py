"""Trains in as many processes as it is started in; the first writes what came of it.

Run by `test_workers.py`, alone and under a launcher.

    python tests/guides/distributed.py OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from accelerate import Accelerator

import langppl as lp
from langppl.testing import tiny_lm


def train(accelerator: Accelerator, kind: str) -> dict[str, Any]:
    lm = tiny_lm(["a", "b", "."], seed=2, merged=["ab", "b."])

    def story(ending: str) -> None:
        if kind == "tb":
            p = lp.sample("p", dist.Beta(2.0, 1.0))
            lp.factor("high", p.log())
        z = lp.sample("z", lp.LMString(lm, "ab", stop=".", max_tokens=3))
        lp.sample("y", lp.LMString(lm, f"ab{z}"), obs=ending)

    guide = lp.GFlowNetGuide(lm, rank=4, objective=kind, seed=3)
    guide.fit(
        story,
        [(e,) for e in ("a.", "b.", "ab", "ba", "..")],
        steps=8,
        observations=4,
        batch=6,
        draw_ahead=2,
        validation=[("aa",), ("bb",), (".a",)],
        validate_every=4,
        validation_samples=4,
        accelerator=accelerator,
        progress=False,
    )
    named = [(n, p) for n, p in lm.model.named_parameters() if f".{guide.adapter}." in n]
    weights = [p.detach().flatten() for _, p in named]
    weights += [p.detach().flatten() for p in guide.heads.parameters()]
    return {"history": dict(guide.history), "weights": torch.cat(weights).tolist()}


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    found = {kind: train(accelerator, kind) for kind in ("subtb", "tb")}
    found["processes"] = accelerator.num_processes
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main()
