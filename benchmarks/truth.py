"""Is SMC's evidence unbiased? Every scheme, twist and proposal, against exact sums.

Each cell is a program, a proposal, a twist and a resampling scheme. The mean of Ẑ/Z over many runs,
those of zero included, must be 1 within its standard error, two-sided at 1 % over all cells
(Bonferroni); the relative standard deviation of a run must be at most 1, or the test says little.
A part of the cells is in the test suite.

    python benchmarks/truth.py
    python benchmarks/truth.py --help
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import common
import numpy as np
from scipy.stats import norm

import langppl as lp
from langppl.diagnostics import InferenceWarning
from langppl.guides import Guide, PriorGuide, PromptedGuide
from langppl.inference.resampling import SCHEMES
from langppl.program import Program
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=5, merged=["ab", "b."])
EVERY = 1
PARTICLES = {"prior": 24, "prompted": 32, "gflownet": 16}
MORE = {("at_the_end", "gflownet"): 32}
"""Where the relative standard deviation of a run would else be above 1."""


def infilling() -> None:
    middle = lp.sample("middle", lp.LMString(LM, "ab", stop=".", max_tokens=3, truncate="reject"))
    lp.sample("ending", lp.LMString(LM, f"ab{middle}"), obs="ab")


def at_the_end() -> None:
    """A pattern that no unfinished string satisfies."""
    text = lp.sample("text", lp.LMString(LM, "a", max_tokens=3))
    lp.factor("pattern", 0.0 if re.fullmatch(r"[ab]+b\.[ab.]?", text) else -math.inf)


def branch() -> None:
    first = lp.sample("first", lp.LMString(LM, "ab", max_tokens=2))
    if "a" in first:
        second = lp.sample("second", lp.LMString(LM, f"a{first}", stop=".", max_tokens=2))
        lp.sample("seen", lp.LMString(LM, f"{first}{second}"), obs="b")
    else:
        lp.sample("seen", lp.LMString(LM, f"{first}a"), obs="b")


def steered() -> None:
    """A loop of random length under a potential."""
    text = ""
    for turn in range(2):
        text += lp.sample(f"word_{turn}", lp.LMString(LM, f"a{text}", max_tokens=2))
        if text.endswith("."):
            break
    lp.potential("few b", lambda t: -0.7 * t.count("b"), text)
    lp.sample("seen", lp.LMString(LM, f"b{text}"), obs="b")


PROGRAMS: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (infilling, at_the_end, branch, steered)
}
SINGLE = ("infilling", "at_the_end")


def user_twist(site: str, text: str) -> float:
    """A bad guess, which must do no harm but to the variance."""
    return 0.4 * text.count("b") - 0.3 * len(text)


def trained(program: Program) -> Guide:
    guide = lp.GFlowNetGuide(LM, seed=0)
    return guide.fit(program, steps=25, batch=16, learning_rate=3e-3, progress=False)


GUIDES: dict[str, Callable[[Program], Guide]] = {
    "prior": lambda _: PriorGuide(),
    "prompted": lambda _: PromptedGuide(),
    "gflownet": trained,
}
TWISTS: dict[str, dict[str, Any]] = {
    "none": {},
    "lookahead": {"twist": "lookahead"},
    "lookahead, whole": {"twist": "lookahead", "twist_power": 1.0},
    "flow": {"twist": "flow"},
    "user": {"twist": user_twist},
}


@dataclass(frozen=True)
class Cell:
    program: str
    guide: str
    twist: str
    scheme: str


def cells() -> Iterator[Cell]:
    """The grid; a flow is known for one latent string alone."""
    for program in PROGRAMS:
        for guide in GUIDES:
            for twist in TWISTS:
                if twist == "flow" and program not in SINGLE:
                    continue
                for scheme in SCHEMES:
                    yield Cell(program, guide, twist, scheme)


def ratios(cell: Cell, guide: Guide, program: Program, log_z: float, runs: int) -> np.ndarray:
    """Ẑ/Z of some runs, shape [runs]."""

    def evidence(run: int) -> float:
        return lp.infer(
            program,
            guide=guide,
            method="smc",
            **TWISTS[cell.twist],
            resampling=cell.scheme,
            ess_threshold=0.9,
            every=EVERY,
            num_samples=MORE.get((cell.program, cell.guide), PARTICLES[cell.guide]),
            seed=run,
            progress=False,
        ).log_evidence

    with warnings.catch_warnings():
        # A run whose particles are all dead counts: its evidence is zero.
        warnings.simplefilter("ignore", InferenceWarning)
        return np.exp(np.array([evidence(run) for run in range(runs)]) - log_z)


def verdict(found: np.ndarray, count: int) -> dict[str, Any]:
    """Mean and spread of Ẑ/Z, and whether it is 1 within its error over so many cells."""
    spread = float(found.std(ddof=1))
    error = spread / math.sqrt(len(found))
    # 1e-5 is float32's rounding.
    most = float(norm.isf(0.01 / 2 / count)) * error + 1e-5
    mean = float(found.mean())
    return {
        "mean": mean,
        "± error": error,
        "sd": spread,
        "unbiased": abs(mean - 1.0) <= most and spread <= 1.0,
    }


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--evidences", type=int, default=400, help="runs of each cell")
    options.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    options.add_argument("--twists", nargs="+", default=list(TWISTS), choices=list(TWISTS))
    options.set_defaults(runs=1)  # the spread is over stories, observations or evidences
    args = options.parse_args()
    work = args.out / "truth-work.jsonl"
    work.parent.mkdir(parents=True, exist_ok=True)
    every = list(cells())
    asked = [c for c in every if c.program in args.programs and c.twist in args.twists]
    done = {}
    if work.is_file():  # a run that was cut off goes on
        lines = [json.loads(line) for line in work.read_text().splitlines()]
        done = {tuple(x["cell"].values()): x for x in lines if x["runs"] == args.evidences}
    rows = []
    for name in args.programs:
        program = lp.compile(PROGRAMS[name])
        log_z = lp.infer(program, method="exact", progress=False).log_evidence
        guides = {g: make(program) for g, make in GUIDES.items()}
        for cell in (c for c in asked if c.program == name):
            key = tuple(asdict(cell).values())
            if key not in done:
                started = time.monotonic()
                found = ratios(cell, guides[cell.guide], program, log_z, args.evidences)
                done[key] = {
                    "cell": asdict(cell),
                    "runs": args.evidences,
                    "ratios": found.tolist(),
                    "seconds": time.monotonic() - started,
                }
                with work.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[key]) + "\n")
            row = {**asdict(cell), **verdict(np.array(done[key]["ratios"]), len(every))}
            print(row, flush=True)
            rows.append(row)
    common.report("truth", list(rows[0]), rows, args)
    work.unlink()
    failed = sum(not r["unbiased"] for r in rows)
    print(f"{len(rows)} cells, {failed} not shown to be unbiased")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
