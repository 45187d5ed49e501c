"""Rewards of all prefixes: padded batches without reuse against langppl, in one run.

Samples of 20 tokens; a stop and the ending after every prefix. Both ways give the same numbers,
which is checked before anything is timed.

    python benchmarks/prefix_rewards.py --help
"""

from __future__ import annotations

import argparse
from typing import Any

import common
import numpy as np
import plain

import langppl as lp
from langppl.guides.trajectories import Batch, make_draws
from langppl.lm.rules import StringRules
from langppl.program.execution import given

ENDING = " and in the end they were all very happy because the box was full of apples and bread"


def case(lm: lp.LM, model: Any, samples: int, length: int, prompt_length: int, ending_length: int):
    """The two ways of one row, each giving log rewards [samples, length + 1]."""
    prompt = common.prompt_of(lm, prompt_length)
    ending = lm.vocabulary.join(lm.encode_text(ENDING)[:ending_length]).decode()
    values = common.strings(lm, prompt, samples, length)

    def story() -> None:
        z = lp.sample("z", lp.LMString(lm, prompt, stop=".", min_tokens=0, max_tokens=length))
        lp.sample("y", lp.LMString(lm, f"{prompt}{z}", min_tokens=0), obs=ending)

    program = lp.compile(story)
    ids = lm.encode_prompt(prompt)
    stops = common.stop_ids(lm)
    target = lm.encode_text(ending)

    # langppl leaves out tokens that begin no text (special ones, ends of characters): so both do.
    rules = lm.bind(StringRules(min_tokens=0))
    never = (~rules.step(rules.start(None)).legal).nonzero()[:, 0].tolist()

    def padded():
        samples = [v.ids for v in values]
        found = plain.prefix_log_rewards(model, ids, samples, stops, target, never=never)
        return found.cpu().numpy()

    def packed():
        lm.memo.clear()
        executions = program.run([given({"z": v}) for v in values])
        contexts = [{"z": ids}] * len(values)
        (draws,) = make_draws([Batch(program, executions, contexts, prefixes=True)])
        return np.array([[p + r for _, p, r in d.ends] for d in draws])

    return padded, packed


def measure(
    lm: lp.LM,
    model: Any,
    samples: int,
    prompt: int,
    ending: int,
    args: argparse.Namespace,
    most: float = 2e-3,
) -> dict[str, Any]:
    """Seconds of both ways, which are to agree within `most` nats."""
    padded, packed = case(lm, model, samples, args.length, prompt, ending)
    found: dict[str, np.ndarray] = {}
    ways = {
        "padded": lambda: found.update(padded=padded()),
        "packed": lambda: found.update(packed=packed()),
    }
    seconds: dict[str, list[float]] = {k: [] for k in ways}
    while len(seconds["padded"]) < args.runs:
        for name, own in common.side_by_side(ways, 1).items():
            seconds[name] += own
        if sum(seconds["padded"]) > args.patience:
            break
    assert found["packed"].shape == found["padded"].shape
    difference = float(np.abs(found["packed"] - found["padded"]).max())
    if not difference <= most:
        raise AssertionError(f"the two ways differ by {difference} nats")
    a, b = (common.median(seconds[k]) for k in ("padded", "packed"))
    return {
        "samples": samples,
        "prompt": prompt,
        "ending": ending,
        "padded s": a,
        "langppl s": b,
        "ratio": a / b,
        "runs": len(seconds["padded"]),
        "largest difference": f"{difference:.1e}",
        "seconds": seconds,
    }


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--samples", type=int, nargs="+", default=[8, 32])
    options.add_argument("--length", type=int, default=20)
    options.add_argument("--prompts", type=int, nargs="+", default=[7, 60, 200])
    options.add_argument("--endings", type=int, nargs="+", default=[7, 20])
    options.add_argument(
        "--patience", type=float, default=600.0, help="seconds after which a row is not run again"
    )
    args = options.parse_args()
    lm, model = lp.LM(args.lm), common.plain_model(args.lm)
    rows = []
    for samples in args.samples:
        for prompt in args.prompts:
            for ending in args.endings:
                rows.append(measure(lm, model, samples, prompt, ending, args))
    columns = [c for c in rows[0] if c != "seconds"]
    common.report("prefix_rewards", columns, rows, args)


if __name__ == "__main__":
    main()
