"""Kills trainings at random moments and resumes them; prints what their adapters are in the end.

Run by `test_checkpoints.py`, as a process of its own: it forks one for each training.

    python tests/guides/killed.py FOLDER TRIALS
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # so that a child is killed while it trains, not while it imports
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import langppl as lp
from langppl.testing import tiny_lm

OPTIONS: list[dict[str, Any]] = [
    {"objective": "subtb", "draw_ahead": 3},
    {"objective": "vargrad", "given": 24, "given_share": 0.3, "average": 0.8},
    {
        "objective": "tb",
        "data": [("aab.",), ("ab.",), ("...",)],
        "observations": 2,
        "simulated_share": 0.25,
        "validation": [("bb.",)],
        "validate_every": 4,
        "validation_samples": 4,
    },
]


def train(folder: Path, kind: int) -> str:
    """Trains, or goes on with it; a digest of the adapter's numbers."""
    lm = tiny_lm(["a", "b", "."], seed=2, merged=["ab", "b."])

    def story(ending: str) -> None:
        z = lp.sample("z", lp.LMString(lm, "ab", stop=".", max_tokens=4))
        lp.sample("y", lp.LMString(lm, f"ab{z}"), obs=ending)

    options = {"data": [("aab.",)], **OPTIONS[kind]}
    guide = lp.GFlowNetGuide(lm, rank=4, objective=options.pop("objective"), seed=3)
    if "given" in options:
        program = lp.compile(story, "aab.")
        options["given"] = lp.infer(program, num_samples=options["given"], progress=False)
    guide.fit(
        story,
        steps=14,
        batch=12,
        checkpoint=folder,
        checkpoint_every=3,
        progress=False,
        **options,
    )
    digest = hashlib.sha256()
    for name, p in lm.model.named_parameters():
        if f".{guide.adapter}." in name:
            digest.update(p.detach().numpy().tobytes())
    for _, p in sorted(guide.heads.named_parameters()):
        digest.update(p.detach().numpy().tobytes())
    return digest.hexdigest()


def start(folder: Path, kind: int) -> int:
    """A process that trains and writes its digest to `folder`.txt."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            found = train(folder, kind)
            folder.with_suffix(".txt").write_text(found)
            status = 0
        finally:
            os._exit(status)
    return child


def whole(folder: Path, kind: int) -> str:
    """Trains in a process of its own until it is done; the digest."""
    _, status = os.waitpid(start(folder, kind), 0)
    assert status == 0, f"the training in {folder} failed"
    return folder.with_suffix(".txt").read_text()


def kill(folder: Path, kind: int, moment: float) -> float | None:
    """Starts a training and kills it at a moment, in seconds; how long it took if that was less."""
    child, started = start(folder, kind), time.monotonic()
    while time.monotonic() < started + moment:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"the training in {folder} failed"
            return time.monotonic() - started
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else time.monotonic() - started


def main() -> None:
    root, trials = Path(sys.argv[1]), int(sys.argv[2])
    rng = random.Random(0)
    expected, lasted = {}, {}
    for kind in range(len(OPTIONS)):
        started = time.monotonic()
        expected[kind] = whole(root / f"unbroken{kind}", kind)
        lasted[kind] = time.monotonic() - started
    for trial in range(trials):
        kind = trial % len(OPTIONS)
        folder = root / f"trial{trial}"
        # The machine may be faster than it was: a training that ended first is begun anew.
        while (took := kill(folder, kind, rng.uniform(0.0, lasted[kind]))) is not None:
            lasted[kind] = min(took, 0.9 * lasted[kind])
            shutil.rmtree(folder)
            folder.with_suffix(".txt").unlink()
        steps = sorted(p.name for p in folder.glob("step-*"))
        print(trial, steps, whole(folder, kind) == expected[kind], flush=True)
    print("digests", len(set(expected.values())))


if __name__ == "__main__":
    main()
