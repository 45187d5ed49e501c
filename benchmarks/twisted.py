"""The infilling setting of twisted SMC (Zhao et al. 2024, arXiv 2404.17546): both KLs of guides.

After "Once upon a time, there was a" come T latent tokens and then c observed ones, all simulated
from the LM, so both KL(q‖p) and KL(p‖q) are bracketed by `langppl.evidence_bounds`, and the
evidence by the best of what the guides say (`langppl.pool_bounds`; own gap: with a guide's
particles alone). One guide is trained for each objective, on observations simulated apart from
those that it is judged on. Guides read the text with a gap and then its beginning again.

    python benchmarks/twisted.py --setting short
    python benchmarks/twisted.py --help
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

import langppl as lp
from langppl.guides import Guide, PriorGuide, PromptedGuide
from langppl.guides.context import ContextInfo
from langppl.guides.settings import BALANCE
from langppl.inference import EvidenceBounds

PROMPT = "Once upon a time, there was a"


@dataclass(frozen=True)
class Setting:
    """How long things are.

    Attributes:
        least: tokens of the latent at least.
        most: tokens of it at most.
        seen: tokens of what is observed.
    """

    least: int
    most: int
    seen: int


SETTINGS = {
    "short": Setting(2, 2, 1),
    "long": Setting(15, 15, 10),
    # Its latent may end anywhere, so `subtb` has inner end points.
    "variable": Setting(1, 15, 10),
}
OBJECTIVES = ("vargrad", "tb", "subtb", "forward_kl", "rao_blackwell")


def make_model(lm: lp.LM, setting: Setting) -> Callable[[str], None]:
    def infilling(seen: str) -> None:
        z = lp.sample(
            "z",
            lp.LMString(lm, PROMPT, min_tokens=setting.least, max_tokens=setting.most),
        )
        lp.sample("seen", lp.LMString(lm, f"{PROMPT}{z}"), obs=seen)

    return infilling


def whole_text(info: ContextInfo) -> str:
    """The text with a gap, then its beginning again: what guides read."""
    (seen,) = info.args
    return f"{PROMPT} [...]{seen}\n\nThe full text:\n\n{PROMPT}"


def trained(
    lm: lp.LM, objective: str, setting: Setting, rows: list[tuple[str]], args: argparse.Namespace
) -> tuple[lp.GFlowNetGuide, int]:
    """A guide trained for the minutes that each has, and its steps."""
    model = make_model(lm, setting)
    options: dict[str, Any] = {
        "objective": objective,
        "observations": args.observations,
        "batch": args.batch,
        "learning_rate": args.learning_rate,
        "lengths": {"seen": setting.seen},
        "schedule": lp.RewardSchedule(start=1.0),
    }
    if objective in BALANCE:
        options["sampling_temperature"] = (1.0, 1.3)
    place = args.out / "twisted-work" / f"{args.setting}-{objective}"
    known = place / "steps.json"
    if known.is_file():
        steps = int(json.loads(known.read_text())["steps"])
    else:
        # How long a step takes is seen on a guide that is thrown away.
        trial = lp.GFlowNetGuide(lm, rank=args.rank, context=whole_text, seed=args.seed + 1)
        trial.fit(model, rows, steps=2, progress=False, **options)
        started = time.monotonic()
        trial.fit(model, rows, steps=4, progress=False, **options)
        steps = max(4, int(60 * args.minutes * 4 / (time.monotonic() - started)))
        place.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps({"steps": steps}))
    guide = lp.GFlowNetGuide(lm, rank=args.rank, context=whole_text, seed=args.seed)
    guide.fit(model, rows, steps=steps, checkpoint=place, checkpoint_every=20, **options)
    return guide, steps


def row_of(name: str, steps: int, own: EvidenceBounds, bounds: EvidenceBounds) -> dict[str, Any]:
    """A guide's figures: `bounds` with the evidence of all guides, `own` with its alone."""

    def interval(pair: tuple[float, float], errors: tuple[float, float]) -> str:
        low, high = (f"{x:.2f} ± {e:.2f}" for x, e in zip(pair, errors, strict=True))
        return f"{low} to {high}"

    evidence = (bounds.lower, bounds.upper), (bounds.lower_error, bounds.upper_error)
    return {
        "guide": name,
        "steps": steps,
        "log evidence": interval(*evidence),
        "gap": bounds.gap,
        "own gap": own.gap,
        "KL(q‖p)": interval(bounds.kl_q_p, bounds.kl_q_p_error),
        "KL(p‖q)": interval(bounds.kl_p_q, bounds.kl_p_q_error),
        "observations": bounds.num_observations,
    }


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--setting", default="short", choices=SETTINGS)
    options.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    options.add_argument("--minutes", type=float, default=5.0, help="of training for each")
    options.add_argument("--train", type=int, default=400, help="observations to train on")
    options.add_argument("--judge", type=int, default=200, help="observations to be judged on")
    options.add_argument("--samples", type=int, default=64, help="particles for each of these")
    options.add_argument("--observations", type=int, default=8, help="in a step")
    options.add_argument("--batch", type=int, default=8, help="draws for each in a step")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--seed", type=int, default=0)
    options.set_defaults(runs=1)  # the spread is over stories, observations or evidences
    args = options.parse_args()
    lm = lp.LM(args.lm)
    setting = SETTINGS[args.setting]
    model = make_model(lm, setting)
    lengths = {"seen": setting.seen}
    program = lp.compile(model, " dog")
    drawn = program.simulate(args.train, seed=args.seed + 1, lengths=lengths)
    rows = [(d["seen"],) for d in drawn]
    guides: list[tuple[str, Callable[[], tuple[Guide, int]]]] = [
        ("prior", lambda: (PriorGuide(), 0)),
        ("prompted", lambda: (PromptedGuide(whole_text), 0)),
        *((o, lambda o=o: trained(lm, o, setting, rows, args)) for o in args.objectives),
    ]
    kept = Path(args.out) / "twisted-work" / f"{args.setting}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(kept.read_text()) if kept.is_file() else {}
    for name, make in guides:
        if name not in done:  # a run that was cut off goes on
            guide, steps = make()
            own = lp.evidence_bounds(
                program,
                guide=guide,
                num_samples=args.samples,
                num_observations=args.judge,
                seed=args.seed,
                lengths=lengths,
            )
            done[name] = [steps, dataclasses.asdict(own)]
            kept.write_text(json.dumps(done))
    steps_of = {name: done[name][0] for name, _ in guides}
    found = [EvidenceBounds(**done[name][1]) for name, _ in guides]
    rows_shown = [
        row_of(name, steps_of[name], own, bounds)
        for (name, _), own, bounds in zip(guides, found, lp.pool_bounds(found), strict=True)
    ]
    common.report(f"twisted_{args.setting}", list(rows_shown[0]), rows_shown, args)
    kept.unlink()


if __name__ == "__main__":
    main()
