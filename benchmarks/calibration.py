"""Which methods are calibrated? Ranks of simulated latents, at the same number of simulations.

Right ones are importance sampling, SMC, Metropolis–Hastings and the raw draws of a guide that is
trained well; wrong ones are the prior's raw draws, which do not look at the observations, and those
of the same guide made overconfident. The script fails if a right one does not pass, or a wrong one
does.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --help
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import common
import numpy as np

import langppl as lp
from langppl.guides import Guide, PriorGuide
from langppl.guides.base import Key
from langppl.guides.policy import Policy
from langppl.program import Program
from langppl.program.execution import Chooser
from langppl.testing import tiny_lm

LETTERS = "abcd."
LM = tiny_lm(LETTERS, seed=1, sharpness=0.05, hidden_size=32)
LEVEL = 0.01


def single(seen: str) -> None:
    z = lp.sample("z", lp.LMString(LM, "a", stop=".", max_tokens=2, allow=list("abc.")))
    lp.sample("seen", lp.LMString(LM, f"a{z}", temperature=0.2), obs=seen)


def branch(seen: str) -> None:
    """A latent decides whether another one exists."""
    text = lp.sample("first", lp.LMString(LM, "a", max_tokens=2, allow=list("abc.")))
    if "a" in text:
        text += lp.sample("second", lp.LMString(LM, text, stop=".", max_tokens=2))
    lp.sample("seen", lp.LMString(LM, f"a{text}", temperature=0.2), obs=seen)


PROGRAMS: dict[str, Callable[[str], None]] = {f.__name__: f for f in (single, branch)}
OBSERVATIONS = [(letter,) for letter in LETTERS]
METHODS: dict[str, dict[str, Any]] = {
    "importance": {"num_samples": 64},
    "smc": {"num_samples": 48, "twist": "lookahead", "every": 1},
    "mh": {"num_samples": 8, "chains": 8, "warmup": 20},
}


class Overconfident(Guide):
    """A guide at half its temperature."""

    name = "overconfident"

    def __init__(self, guide: lp.GFlowNetGuide) -> None:
        self.guide = guide

    def chooser(self, program: Program, key: Key) -> Chooser:
        return Policy(self.guide.proposer, program, key, temperature=0.5)


def trained(model: Callable[[str], None], steps: int) -> lp.GFlowNetGuide:
    guide = lp.GFlowNetGuide(
        LM, rank=16, alpha=64, context=lambda info: info.args[0], objective="vargrad", seed=0
    )
    return guide.fit(
        model,
        OBSERVATIONS,
        steps=steps,
        observations=len(OBSERVATIONS),
        learning_rate=6e-3,
        schedule=lp.RewardSchedule(start=1.0),
        progress=False,
    )


def divergence(guide: Guide, programs: Sequence[Program]) -> float:
    """KL(p‖q), nats, averaged over the observations by their evidence."""
    total = 0.0
    for program in programs:
        truth = lp.infer(program, method="exact", progress=False)
        log_p = np.asarray(truth.log_weights)  # joint, so that the sum is weighted
        own = guide.log_q(program, truth.samples)
        total += float((np.exp(log_p) * (log_p - truth.log_evidence - own)).sum())
    return total


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--simulations", type=int, default=500)
    options.add_argument("--draws", type=int, default=7)
    options.add_argument("--steps", type=int, default=150, help="of the guide's training")
    options.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    options.set_defaults(runs=1, lm="tiny_lm")
    args = options.parse_args()
    rows = []
    for name in args.programs:
        model = PROGRAMS[name]
        program = lp.compile(model, "b")
        programs = [lp.compile(model, *row) for row in OBSERVATIONS]
        guide = trained(model, args.steps)
        ways: list[tuple[str, Guide, dict[str, Any], bool]] = [
            *((method, PriorGuide(), own, True) for method, own in METHODS.items()),
            ("raw", guide, {}, True),
            ("raw", PriorGuide(), {}, False),
            ("raw", Overconfident(guide), {}, False),
        ]
        for method, proposing, own, is_right in ways:
            started = time.perf_counter()
            found = lp.calibrate(
                program,
                guide=proposing,
                method=method,
                simulations=args.simulations,
                draws=args.draws,
                progress=False,
                **own,
            )
            worst = min(found.tests, key=lambda t: t.p_value)
            is_known = not isinstance(proposing, Overconfident)
            rows.append(
                {
                    "program": name,
                    "method": method,
                    "guide": proposing.name,
                    "KL": f"{divergence(proposing, programs):.3f}" if is_known else "",
                    "simulations": found.simulations,
                    "samples": found.num_samples,
                    "draws": found.draws,
                    "p": f"{worst.adjusted:.2g}",
                    "of": worst.name,
                    "passes": found.passes(LEVEL),
                    "right": is_right,
                    "seconds": time.perf_counter() - started,
                }
            )
            print(rows[-1], flush=True)
    columns = [c for c in rows[0] if c != "right"]
    common.report("calibration", columns, rows, args)
    wrong = [r for r in rows if r["passes"] != r["right"]]
    raise SystemExit(f"not as they should be: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
