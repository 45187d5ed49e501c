"""What a share of the prior is worth: the demo's guides alone, and in mixtures.

A guide that was trained for a story may miss a part of its posterior; then its evidence is too low,
with an error that is too small. Each way estimates the evidence of each of the demo's stories
several times, with other seeds, and stands beside the long run of `examples/story_reference.json`.

    python benchmarks/mixtures.py
    python benchmarks/mixtures.py --help
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
from pathlib import Path
from typing import Any

import common
import numpy as np

import langppl as lp
from langppl.guides import Guide, PriorGuide

EXAMPLE = Path(__file__).parents[1] / "examples" / "story_infilling.py"
# As `make demo` has them.
SETTINGS = {
    "rank": 8,
    "steps": 32,
    "batch": 40,
    "learning_rate": 3e-3,
    "tempered_share": 0.25,
    "seed": 0,
}


def ways_of(guide: Guide) -> dict[str, Guide]:
    """What is compared: name → guide."""
    return {
        "prior": PriorGuide(),
        "gflownet": guide,
        "0.9 gflownet, 0.1 prior": lp.MixtureGuide([guide, "prior"], [0.9, 0.1]),
        "0.5 gflownet, 0.5 prior": lp.MixtureGuide([guide, "prior"], [0.5, 0.5]),
        "gflownet, prompted, prior": lp.MixtureGuide([guide, "prompted", "prior"]),
    }


def row_of(
    story: str, way: str, found: list[lp.Posterior], reference: dict[str, Any]
) -> dict[str, Any]:
    """One row: the runs of a way on a story."""
    off = np.array([(p.log_evidence or 0.0) - reference["log_evidence"] for p in found])
    own = [p.log_evidence_error or 0.0 for p in found]
    errors = np.array([math.hypot(e, reference["error"]) for e in own])
    reliable = np.array([p.diagnose().reliable for p in found])
    silent = (np.abs(off) > 3 * errors) & reliable
    return {
        "story": story,
        "guide": way,
        "mean difference": float(off.mean()),
        "rms difference": float(np.sqrt((off**2).mean())),
        "ESS": float(np.mean([p.ess for p in found])),
        "k too high": f"{np.mean(~reliable):.0%}",
        "> 3 errors off, k fine": f"{np.mean(silent):.0%}",
        "s": float(np.median([p.elapsed for p in found])),
        "runs": len(found),
        "log evidence": [p.log_evidence for p in found],
        "log evidence error": [p.log_evidence_error for p in found],
    }


def main() -> None:
    options = common.parser(__doc__)
    options.set_defaults(runs=8)
    options.add_argument("--samples", type=int, default=256, help="draws of each run")
    options.add_argument("--steps", type=int, default=SETTINGS["steps"], help="of training")
    args = options.parse_args()
    example = runpy.run_path(str(EXAMPLE))
    references = json.loads(example["REFERENCE"].read_text(encoding="utf-8"))
    settings = argparse.Namespace(**{**SETTINGS, "steps": args.steps})
    lm = lp.LM(args.lm)
    rows: list[dict[str, Any]] = []
    for story, texts in example["STORIES"].items():
        program = lp.compile(example["make_story"](lm), *texts)
        prior = lp.infer(program, num_samples=256, seed=settings.seed)
        guide = example["train"](lm, program, prior, settings)
        for way, own in ways_of(guide).items():
            seeds = range(100, 100 + args.runs)
            found = [lp.infer(program, guide=own, num_samples=args.samples, seed=s) for s in seeds]
            rows.append(row_of(story, way, found, references[story]))
            columns = [k for k, v in rows[0].items() if not isinstance(v, list)]
            common.report("mixtures", columns, rows, args)


if __name__ == "__main__":
    main()
