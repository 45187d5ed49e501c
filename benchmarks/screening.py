"""Hard constraints in Python, token by token: langppl's SMC with and without screening, and AWRS.

python benchmarks/screening.py --help

A sentence after a beginning, up to its first "." or of so many tokens, under a function of the
text so far that says whether it may go on so. langppl takes it as a potential with `prefix=True`:
with `rejections=0` a particle dies at the first token that must not follow, with 32 such a token
is put aside (`langppl.inference.screening`). genlm-control takes it as a Potential, draws with AWRS
and resamples, as in its README. All runs of a system are in a process of its own, the systems in
turns over the constraints; loading and a warm-up are not counted. Every process has langppl and
torch loaded.

The reference is the evidence by langppl with many particles. Error: root-mean-square of the log
evidence over seeds, from the reference; alive: particles of weight above zero.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import torch

import langppl as lp
from langppl.lm.weights import resolve

BEGINNING, STOP, LENGTH = "The best thing about the sea is", ".", 16
WARM_UP = "My cat has"


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text)


CONSTRAINTS: dict[str, Callable[[str], bool]] = {
    "no e": lambda text: "e" not in text,
    "words of at most 5 letters": lambda text: all(len(w) <= 5 for w in words(text)),
    "words that begin with s": lambda text: all(w[0] in "sS" for w in words(text)),
}


@dataclass(frozen=True)
class Found:
    """What one inference found.

    Attributes:
        log_evidence: nats.
        alive: share of the particles.
        distinct: different texts among them.
    """

    log_evidence: float
    alive: float
    distinct: int


# Of a beginning, a constraint, a number of particles and a seed.
Inference = Callable[[str, Callable[[str], bool], int, int], Found]


def langppl_inference(args: argparse.Namespace, rejections: int) -> Inference:
    """langppl's SMC."""
    lm = lp.LM(args.lm, device="cpu", dtype=torch.float32)

    def run(beginning: str, may: Callable[[str], bool], particles: int, seed: int) -> Found:
        # No `min_tokens`: the peer does not forbid a sentence to end at once either.
        fn = lp.LMString(lm, beginning, stop=STOP, min_tokens=0, max_tokens=LENGTH)

        def sentence() -> None:
            z = lp.sample("z", fn)
            lp.potential("form", lambda t: 0.0 if may(t) else -math.inf, z, prefix=True)

        posterior = lp.infer(
            sentence,
            method="smc",
            num_samples=particles,
            seed=seed,
            rejections=rejections,
            progress=False,
        )
        alive = [
            str(z)
            for z, w in zip(posterior["z"], posterior.log_weights, strict=True)
            if w > -math.inf
        ]
        assert posterior.log_evidence is not None
        return Found(posterior.log_evidence, len(alive) / particles, len(set(alive)))

    return run


def genlm_control_inference(args: argparse.Namespace) -> Inference:
    """genlm-control's `SMC` with `AWRS`."""
    from genlm.control import AWRS, SMC, Potential, PromptedLLM

    options = {"torch_dtype": torch.float32, "device_map": "cpu"}
    llm = PromptedLLM.from_name(
        str(resolve(args.lm)), backend="hf", batch_size=2 * args.particles, hf_opts=options
    )
    backend = llm.model

    class Form(Potential):
        """Whether a text may go on so, up to its stop."""

        def __init__(self, may: Callable[[str], bool]) -> None:
            super().__init__(llm.vocab)
            self.may = may

        async def prefix(self, context: list[bytes]) -> float:
            return 0.0 if self.may(text_of(context)) else -math.inf

        async def complete(self, context: list[bytes]) -> float:
            return await self.prefix(context)

    def ended(context: list[bytes]) -> bool:
        return STOP.encode() in context[-1] or len(context) == LENGTH

    async def smc(beginning: str, may: Callable[[str], bool], particles: int, seed: int) -> Any:
        ids = backend.tokenizer.encode(beginning)
        backend.cache_kv(ids)
        tokens = AWRS(llm.spawn(prompt_ids=ids), Form(may), seed=seed)
        return await SMC(tokens)(
            n_particles=particles,
            ess_threshold=0.5,
            max_tokens=LENGTH + 1,  # the end of the sequence is one of them
            terminate_when=ended,
        )

    def run(beginning: str, may: Callable[[str], bool], particles: int, seed: int) -> Found:
        torch.manual_seed(seed)
        np.random.seed(seed)
        backend.clear_cache()
        found = asyncio.run(smc(beginning, may, particles, seed))
        weights = np.asarray(found.log_weights)
        alive = [
            text_of([t for t in c if isinstance(t, bytes)])
            for c, w in zip(found.contexts, weights, strict=True)
            if w > -math.inf
        ]
        return Found(float(found.log_ml), len(alive) / particles, len(set(alive)))

    return run


def text_of(context: list[bytes]) -> str:
    """Tokens as text, up to the stop."""
    before, stop, _ = b"".join(context).decode("utf-8", "replace").partition(STOP)
    return before + stop


SYSTEMS: dict[str, Callable[[argparse.Namespace], Inference]] = {
    "langppl, rejections=32": lambda args: langppl_inference(args, 32),
    "langppl, rejections=0": lambda args: langppl_inference(args, 0),
    "genlm-control": genlm_control_inference,
}


def all_runs(args: argparse.Namespace) -> list[dict[str, float]]:
    """The inferences of one system under one constraint, timed one by one."""
    infer, may = SYSTEMS[args.only](args), CONSTRAINTS[args.constraint]
    infer(WARM_UP, may, 4, 0)
    found = []
    for seed in range(1, args.runs + 1):
        started = time.perf_counter()
        one = infer(BEGINNING, may, args.particles, seed)
        seconds = time.perf_counter() - started
        found.append({"seconds": seconds, **vars(one)})
    return found


def measure(system: str, constraint: str, args: argparse.Namespace) -> list[dict[str, float]]:
    """`all_runs` in a process of its own."""
    command = [sys.executable, __file__, "--lm", args.lm, "--only", system]
    command += ["--constraint", constraint, "--particles", str(args.particles)]
    command += ["--runs", str(args.runs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr}")
    found: list[dict[str, float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def row(
    constraint: str, system: str, reference: float, found: list[dict[str, float]]
) -> dict[str, Any]:
    evidence = np.array([f["log_evidence"] for f in found])
    is_some = np.isfinite(evidence)
    error = evidence[is_some] - reference
    return {
        "constraint": constraint,
        "system": system,
        "reference": reference,
        "log mean": float(np.logaddexp.reduce(evidence) - np.log(len(evidence))),
        "error": float(np.sqrt((error**2).mean())) if is_some.any() else math.nan,
        "no sample": int((~is_some).sum()),
        "alive": float(np.mean([f["alive"] for f in found])),
        "distinct": common.median([f["distinct"] for f in found]),
        "seconds": common.median([f["seconds"] for f in found]),
        "found": found,
    }


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--particles", type=int, default=32)
    options.set_defaults(runs=12)
    options.add_argument("--many", type=int, default=1024, help="particles of the reference")
    options.add_argument("--constraint", choices=CONSTRAINTS, help="this one alone")
    options.add_argument("--only", choices=SYSTEMS, help="measure this system, in this process")
    args = options.parse_args()
    if args.only:
        print(json.dumps(all_runs(args)))
        return
    systems = list(SYSTEMS)
    try:
        version = importlib.metadata.version("genlm-control")
    except importlib.metadata.PackageNotFoundError:
        options.error("genlm-control is not installed: pip install 'langppl[peers]'")
    resolve(args.lm)  # nothing is downloaded by a process that is measured
    rows = []
    for constraint in [args.constraint] if args.constraint else CONSTRAINTS:
        reference = langppl_inference(args, 32)(BEGINNING, CONSTRAINTS[constraint], args.many, 0)
        for system in systems:
            shown = f"{system} {version}" if system == "genlm-control" else system
            found = measure(system, constraint, args)
            rows.append(row(constraint, shown, reference.log_evidence, found))
    common.report("screening", [c for c in rows[0] if c != "found"], rows, args)


if __name__ == "__main__":
    main()
