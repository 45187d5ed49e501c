"""Time and peak memory of importance sampling against the number of samples, a process for each.

python benchmarks/growth.py --help
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import common
import numpy as np
from matplotlib.figure import Figure

import langppl as lp

BEGINNING, ENDING = "The door bell rang.", " It was the mailman."


def story(lm: lp.LM) -> None:
    """The model: a missing sentence."""
    z = lp.sample("z", lp.LMString(lm, BEGINNING, stop=".", max_tokens=20, truncate="reject"))
    lp.sample("y", lp.LMString(lm, f"{BEGINNING}{z}"), obs=ENDING)


def one(args) -> dict[str, float]:
    """One inference, timed."""
    lm = lp.LM(args.lm)
    lp.infer(story, lm, num_samples=4, progress=False)
    before = common.peak_memory()
    started = time.perf_counter()
    lp.infer(story, lm, num_samples=args.only, seed=1, progress=False)
    return {
        "seconds": time.perf_counter() - started,
        "peak GiB": common.peak_memory(),
        "before GiB": before,
    }


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--samples", type=int, nargs="+", default=[8, 32, 128, 512])
    options.add_argument("--only", type=int, help="measure this number, in this process")
    args = options.parse_args()
    if args.only:
        print(json.dumps(one(args)))
        return
    rows = []
    for n in args.samples:
        found = []
        for _ in range(args.runs):
            command = [sys.executable, __file__, "--lm", args.lm, "--only", str(n)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.strip().splitlines()[-1]))
        rows.append({"samples": n, **{k: common.median([f[k] for f in found]) for k in found[0]}})
    n = np.log([r["samples"] for r in rows])
    slope = float(np.polyfit(n, np.log([r["seconds"] for r in rows]), 1)[0])
    for row in rows:
        row["slope of time"] = slope
    common.report("growth", list(rows[0]), rows, args)
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("seconds", "peak GiB"), strict=True):
        axes.loglog([r["samples"] for r in rows], [r[key] for r in rows], "o-")
        axes.set_xlabel("samples")
        axes.set_ylabel(key)
    figure.savefig(args.out / "growth.png", dpi=120)


if __name__ == "__main__":
    main()
