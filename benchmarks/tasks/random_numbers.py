"""Integers from 0 to 100, uniformly: the opening example of arXiv 2310.04363, with exact figures.

Before: the LM, asked for a random integer. After: the same LM trained in several ways, nothing
masked. Each is known exactly, from its own probabilities of the 101 strings. Finished runs are
kept, and a training that was cut off goes on from its checkpoint.

    python benchmarks/tasks/random_numbers.py
    python benchmarks/tasks/random_numbers.py --help
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from results import Runs, example, parser, spread, write

import langppl as lp

numbers = example("random_numbers")
TRAINED = {"gflownet": "subtb", "reverse_kl": "reverse_kl", "reward": "reward"}
"""Ways and their objectives."""
PAPER = "The following is a random integer drawn uniformly between 0 and 100: "
UNTRAINED = {"the LM, the paper's prompt": PAPER, "the LM, prompted": numbers.PROMPT}


def measure(guide: lp.GFlowNetGuide, program: lp.Program, draws: int, seed: int) -> dict[str, Any]:
    """Exact figures, and some draws."""
    found = numbers.exact(guide, program)
    drawn = [str(row["number"]) for row in guide.sample(program, n=draws, seed=seed)]
    return {
        "valid": found.valid,
        "kl": found.kl,
        "kl from target": found.kl_from_target,
        "reached": int((found.probabilities > 0.1 / 101).sum()),
        "largest": float(found.probabilities.max()),
        "probabilities": found.probabilities.tolist(),
        "draws": drawn,
    }


def run(lm: lp.LM, way: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains in one way with one seed."""
    program = lp.compile(numbers.make_number(lm, UNTRAINED.get(way, numbers.PROMPT)))
    guide = lp.GFlowNetGuide(lm, seed=seed)
    started = time.monotonic()
    if way in TRAINED:
        numbers.train(
            guide,
            program,
            args.steps,
            args.batch,
            objective=TRAINED[way],
            checkpoint=args.work / f"{way}-{seed}",
        )
    seconds = time.monotonic() - started
    return {**measure(guide, program, args.draws, seed), "seconds": seconds}


def samples(runs: dict[str, dict[str, Any]]) -> str:
    """Some draws of each way, as they are."""
    lines = []
    for way, of_seeds in runs.items():
        drawn = next(iter(of_seeds.values()))["draws"]
        lines.append(f"- {way}: {' '.join(f'`{d!r}`' for d in drawn[:20])}")
    return "\n".join(lines)


def main() -> None:
    """Runs what is not yet known, and writes the table."""
    options = parser(__doc__, "random_numbers")
    options.add_argument("--data", help="not used: this task needs no data")
    options.add_argument("--steps", type=int, default=100, help="training steps")
    options.add_argument("--batch", type=int, default=48, help="draws in a step")
    options.add_argument("--draws", type=int, default=40, help="draws to show")
    options.add_argument("--ways", nargs="+", default=list(TRAINED), choices=list(TRAINED))
    args = options.parse_args()
    args.work = args.work or args.out / "random_numbers-work"
    kept = Runs(
        args.work, {k: getattr(args, k) for k in ("model", "steps", "batch", "draws", "device")}
    )
    lm = lp.LM(args.model, device=args.device)
    runs: dict[str, dict[str, Any]] = {}
    for at, way in enumerate((*UNTRAINED, *args.ways)):
        for seed in args.seeds[:1] if way in UNTRAINED else args.seeds:
            name = f"{way}-{seed}" if way in TRAINED else f"untrained-{at}"
            found = kept.get(name) or kept.put(name, run(lm, way, seed, args))
            runs.setdefault(way, {})[str(seed)] = found
    rows = []
    for way, of_seeds in runs.items():
        values = {k: [r[k] for r in of_seeds.values()] for k in ("valid", "kl", "kl from target")}
        rows.append(
            {
                "way": way,
                "valid %": spread([100 * v for v in values["valid"]], "{:.2f}"),
                "KL(valid ‖ uniform)": spread(values["kl"], "{:.4f}"),
                "KL(uniform ‖ all)": spread(values["kl from target"], "{:.4f}"),
                "integers reached": spread([r["reached"] for r in of_seeds.values()], "{:.0f}"),
                "likeliest %": spread([100 * r["largest"] for r in of_seeds.values()], "{:.1f}"),
                "s": f"{np.mean([r['seconds'] for r in of_seeds.values()]):.0f}",
            }
        )
    write(args, rows, runs, samples(runs))


if __name__ == "__main__":
    main()
