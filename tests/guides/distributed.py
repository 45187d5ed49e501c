"""Trains in as many processes as it is started in; the first writes what came of it.

Run by `test_workers.py`, alone and under a launcher.

    python tests/guides/distributed.py OUT.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from accelerate import Accelerator

import langppl as lp
from langppl.guides.workers import Workers
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


def share(accelerator: Accelerator) -> list[list[list[str]]]:
    """Two programs, one for each of two processes; what each guide says it has learned."""
    lm = tiny_lm(["a", "b", "."], seed=2)

    def story() -> None:
        z = lp.sample("z", lp.LMString(lm, "a", stop=".", max_tokens=2))
        lp.sample("e", lp.LMString(lm, f"a{z}"), obs="b")

    def chain() -> None:
        x = lp.sample("x", lp.LMString(lm, "b", max_tokens=2))
        y = lp.sample("y", lp.LMString(lm, f"b{x}", stop=".", max_tokens=2))
        lp.sample("e", lp.LMString(lm, f"b{y}"), obs="a")

    guide = lp.GFlowNetGuide(lm, rank=2, objective="subtb")
    programs: Any = [(story, [()]), (chain, [()])]
    guide.fit(programs, steps=2, batch=4, accelerator=accelerator, progress=False)
    return Workers(accelerator).gather([[sorted(guide.learned), sorted(guide.flows)]])


class PowerCut(Exception):
    pass


def keep(accelerator: Accelerator, folder: Path, dies_after: int | None) -> dict[str, Any]:
    """Trains on given draws, or goes on with it; in the end or after a step, what rows have."""
    lm = tiny_lm(["a", "b", "."], seed=2, merged=["ab", "b."])

    def story(ending: str) -> None:
        z = lp.sample("z", lp.LMString(lm, "ab", stop=".", max_tokens=4))
        lp.sample("y", lp.LMString(lm, f"ab{z}"), obs=ending)

    data = [("a.",), ("b.",), ("ab",)]
    rows = lp.infer(story, "a.", num_samples=24, progress=False).samples
    guide = lp.GFlowNetGuide(lm, rank=4, objective="vargrad", seed=3)

    def die(figures: Mapping[str, float]) -> None:
        if figures["step"] == dies_after:
            raise PowerCut

    with contextlib.suppress(PowerCut):
        guide.fit(
            story,
            data,
            steps=9,
            observations=2,
            batch=6,
            draw_ahead=2,
            given=[rows] * len(data),
            given_share=0.5,
            checkpoint=folder,
            checkpoint_every=2,
            accelerator=accelerator,
            callback=die,
            progress=False,
        )
    accelerator.wait_for_everyone()
    record = json.loads((max(folder.glob("step-*")) / "record.json").read_text())
    own = record["observations"].items()
    left = {k: [len(o[what]) for what in ("given", "ready", "buffer")] for k, o in own}
    accelerator.wait_for_everyone()  # else the next one's checkpoint takes this one's place
    return {"history": dict(guide.history), "left": left}


def killed(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """An unbroken training, and one that dies twice; what both have in their checkpoints."""
    whole = [keep(accelerator, folder / str(at), at) for at in (4, 7)]
    whole.append(keep(accelerator, folder / "whole", None))
    again = [keep(accelerator, folder / "cut", at) for at in (4, 7, None)]
    return {"whole": whole, "again": again}


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    found: dict[str, Any] = {kind: train(accelerator, kind) for kind in ("subtb", "tb")}
    found["shared"] = share(accelerator)
    found["killed"] = killed(accelerator, Path(sys.argv[1]).with_suffix(".checkpoints"))
    found["processes"] = accelerator.num_processes
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main()
