"""Evidence at equal wall time: importance sampling, SMC with lookahead, SMC with a guide's flow.

The fourth sentence of a five-sentence story is latent and the fifth observed, as in objectives.py,
which trains the guide. For each story every method has the same seconds: how many samples these
buy is measured first; or as many samples, with `--samples`. Errors are against a long run of its
own: the mean weight of many draws from the prior and of many from the guide.

    python benchmarks/methods.py --data DIR --guide benchmarks/results/objectives-work/vargrad/guide
    python benchmarks/methods.py --data DIR --samples 32 --powers 0 0.2 0.4 0.7 1
    python benchmarks/methods.py --help
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from objectives import make_story, read_stories, whole_story

import langppl as lp
from langppl.program import Program

Options = Mapping[str, Any]


def ways(guide: lp.GFlowNetGuide | None, every: int, powers: Sequence[float]) -> dict[str, Options]:
    """What to compare."""
    ahead: Options = {"method": "smc", "twist": "lookahead", "every": every}
    found: dict[str, Options] = {"importance, prior": {}}
    if not powers:
        found["SMC, prior, lookahead"] = ahead
    for power in powers:
        found[f"SMC, prior, lookahead to the {power:g}"] = {**ahead, "twist_power": power}
    if guide is not None:
        found["importance, guide"] = {"guide": guide}
        found["SMC, guide, flow"] = {
            "guide": guide,
            "method": "smc",
            "twist": "flow",
            "every": every,
        }
    return found


def run(program: Program, options: Options, samples: int, seed: int) -> lp.Posterior:
    return lp.infer(program, num_samples=samples, seed=seed, progress=False, **options)


def reference(program: Program, guide: Any, samples: int) -> float:
    """Log evidence (nats) of a long run."""
    guides = ["prior"] if guide is None else ["prior", guide]
    found = [run(program, {"guide": g}, samples, 10**6).log_evidence for g in guides]
    return float(np.logaddexp.reduce(found) - math.log(len(found)))


def samples_for(program: Program, options: Options, seconds: float) -> int:
    """How many samples a method draws in so many seconds, from runs of two sizes."""
    took = []
    for count in (8, 32):
        started = time.perf_counter()
        run(program, options, count, 10**6 + count)
        took.append(time.perf_counter() - started)
    each = max((took[1] - took[0]) / 24, 1e-4)
    return max(4, int((seconds - max(took[0] - 8 * each, 0.0)) / each))


def of_story(
    program: Program, own: Mapping[str, Options], guide: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Of each method, its log evidences and how many samples they took; and the reference."""
    found: dict[str, Any] = {"reference": reference(program, guide, args.reference)}
    rows = {}
    for name, options in own.items():
        samples = args.samples or samples_for(program, options, args.seconds)
        rows[name] = {**options, "num_samples": samples}
        found[name] = {"samples": samples, "evidences": [], "seconds": [], "tokens": []}
    for seed in range(args.runs):
        beside = lp.compare(program, rows=rows, seed=seed, progress=False)
        for error in beside.errors.values():
            raise error
        for name in rows:
            found[name]["evidences"].append(beside.posteriors[name].log_evidence)
            found[name]["seconds"].append(beside.costs[name].seconds)
            found[name]["tokens"].append(beside.costs[name].tokens.total)
    return found


def rows_of(stories: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        errors = np.array([np.array(s[name]["evidences"]) - s["reference"] for s in stories])
        finite = np.isfinite(errors)
        # A run without a possible sample has no error in nats; it is counted beside the others.
        squares = [
            float((e[f] ** 2).mean()) for e, f in zip(errors, finite, strict=True) if f.any()
        ]
        rmse = math.sqrt(float(np.mean(squares)))
        spread = float(np.std(squares, ddof=1) / math.sqrt(len(squares))) if len(squares) > 1 else 0
        rows.append(
            {
                "method": name,
                "RMSE": rmse,
                "± error": spread / (2 * rmse) if rmse else 0.0,
                "bias": float(errors[finite].mean()),
                "no sample": int((~finite).sum()),
                "samples": common.median([s[name]["samples"] for s in stories]),
                "seconds": common.median([t for s in stories for t in s[name]["seconds"]]),
                "LM tokens": common.median([t for s in stories for t in s[name]["tokens"]]),
            }
        )
    return rows


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with stories.jsonl")
    options.add_argument("--stories", type=int, default=20, help="of the test split")
    options.add_argument("--guide", type=Path, help="folder of a guide trained by objectives.py")
    options.add_argument("--seconds", type=float, default=3.0, help="of each run")
    options.add_argument("--reference", type=int, default=1024, help="draws from each guide")
    options.add_argument("--every", type=int, default=4, help="tokens between two looks")
    options.add_argument("--samples", type=int, help="of each run, whatever time they take")
    options.add_argument("--powers", type=float, nargs="+", default=[], help="of lookahead")
    options.add_argument("--name", default="methods", help="of the JSON")
    args = options.parse_args()
    lm = lp.LM(args.lm)
    guide = (
        None if args.guide is None else lp.GFlowNetGuide.load(args.guide, lm, context=whole_story)
    )
    own = ways(guide, args.every, args.powers)
    story = make_story(lm)
    work = args.out / f"{args.name}-work.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    lines = work.read_text().splitlines() if work.is_file() else []
    done = [json.loads(line) for line in lines]  # a run that was cut off goes on
    for beginning, _, ending in read_stories(args.data, "test", args.stories)[len(done) :]:
        done.append(of_story(lp.compile(story, beginning, ending), own, guide, args))
        with work.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[-1]) + "\n")
    rows = rows_of(done, list(own))
    common.report(args.name, list(rows[0]), rows, args)
    work.unlink()


if __name__ == "__main__":
    main()
