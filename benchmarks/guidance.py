"""Proposals without training: contexts, and guidance by them at several scales.

The stories of benchmarks/objectives.py. A guide reads the whole story with a gap (`whole_story`),
the default context or the ending first; guidance (`langppl.Guidance`) adds to the prior, so many
times, what these change. All proposals have as many draws. Log weight, log p(fifth), impossible: as
in objectives.py. KL(p‖q): bounded above, over latents and endings simulated from the model. Error:
root-mean-square difference of the log evidence of a story from that of all proposals' draws
together, in nats. Time: of drawing and weighing, as a multiple of the prior's.

    python benchmarks/guidance.py --data DIR
    python benchmarks/guidance.py --help
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from objectives import (
    Draws,
    draw,
    log_mean,
    make_story,
    read_stories,
    whole_story,
    without_ending,
)

import langppl as lp
from langppl.guides import Guide, PriorGuide, PromptedGuide
from langppl.guides.base import log_q_together
from langppl.guides.context import observations_first
from langppl.program.scheduler import run


def proposals(scales: list[float]) -> dict[str, Guide]:
    found: dict[str, Guide] = {
        "prior": PriorGuide(),
        "default context": PromptedGuide(),
        "ending first": PromptedGuide(observations_first),
        "whole story": PromptedGuide(whole_story),
    }
    for s in scales:
        guidance = lp.Guidance(s, without_ending)
        found[f"whole story, guidance {s:g}"] = PromptedGuide(whole_story, guidance=guidance)
    for s in scales:
        found[f"default context, guidance {s:g}"] = PromptedGuide(guidance=lp.Guidance(s))
    return found


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with stories.jsonl")
    options.add_argument("--stories", type=int, default=60, help="test stories to answer for")
    options.add_argument("--samples", type=int, default=8, help="draws for each story")
    options.add_argument("--scales", type=float, nargs="*", default=[0.25, 0.5, 0.75, 1.0])
    options.add_argument("--seed", type=int, default=0)
    options.set_defaults(runs=1)  # the spread is over stories
    args = options.parse_args()
    lm = lp.LM(args.lm, dtype=torch.bfloat16)
    story = make_story(lm)
    rows = read_stories(args.data, "test", args.stories)
    programs = [lp.compile(story, b, e) for b, _, e in rows]

    def simulated(k: int) -> Any:
        return programs[k].simulated((args.seed, "pair", k))

    pairs = run([lambda k=k: simulated(k) for k in range(len(programs))])
    log_joints = [float(p.log_joint(latents)) for latents, p in pairs]
    drawn: dict[str, list[Draws]] = {}
    on_pairs: dict[str, list[np.ndarray]] = {}
    log_qs: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    for name, guide in proposals(args.scales).items():
        started = time.monotonic()
        drawn[name] = draw(guide, programs, args.samples, args.seed)
        seconds[name] = time.monotonic() - started
        found = draw(guide, [p for _, p in pairs], args.samples, args.seed + 1)
        on_pairs[name] = [d.log_weights for d in found]
        log_qs[name] = log_q_together(guide, [(p, x) for x, p in pairs])
        evidence, references = (
            [log_mean(np.concatenate([w[k] for w in own.values()])) for k in range(len(programs))]
            for own in (on_pairs, {n: [d.log_weights for d in ds] for n, ds in drawn.items()})
        )
        table = []
        for way, draws in drawn.items():
            some = [d for d in draws if d.possible.any()]
            errors = np.array(
                [log_mean(d.log_weights) - r for d, r in zip(draws, references, strict=True)]
            )
            forward = [j - z - q for j, z, q in zip(log_joints, evidence, log_qs[way], strict=True)]
            means = [d.log_weights[d.possible].mean() for d in some]
            table.append(
                {
                    "proposal": way,
                    "log weight": float(np.mean(means)),
                    "log p(fifth)": float(np.mean([np.nanmean(d.log_endings) for d in some])),
                    "impossible": f"{1.0 - np.mean([d.possible.mean() for d in draws]):.1%}",
                    "KL(p‖q) ≤": float(np.mean(forward)),
                    "error": float(np.sqrt(np.mean(errors[np.isfinite(errors)] ** 2))),
                    "no possible draw": int((~np.isfinite(errors)).sum()),
                    "time": seconds[way] / seconds["prior"],
                }
            )
        common.report("guidance", list(table[0]), table, args)


if __name__ == "__main__":
    main()
