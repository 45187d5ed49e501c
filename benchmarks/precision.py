"""What bfloat16 does to log weights: the same draws scored in float32 and in bfloat16.

Draws of the missing sentence of a story, from the float32 prior; differences in nats.

    python benchmarks/precision.py --help
"""

from __future__ import annotations

import common
import numpy as np
import torch

import langppl as lp

BEGINNING, ENDING = "The door bell rang.", " It was the mailman."


def story(lm: lp.LM) -> None:
    z = lp.sample("z", lp.LMString(lm, BEGINNING, stop=".", max_tokens=20, truncate="reject"))
    lp.sample("y", lp.LMString(lm, f"{BEGINNING}{z}"), obs=ENDING)


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--samples", type=int, default=64)
    args = options.parse_args()
    exact, rough = lp.LM(args.lm), lp.LM(args.lm, dtype=torch.bfloat16)
    posterior = lp.infer(story, exact, num_samples=args.samples, progress=False)
    draws = [s for s, w in zip(posterior.samples, posterior.log_weights, strict=True) if w > -1e9]
    ways = {name: lp.compile(story, lm) for name, lm in (("float32", exact), ("bfloat16", rough))}

    found: dict[str, list] = {}

    def score(name: str, lm: lp.LM) -> None:
        lm.memo.clear()
        found[name] = ways[name].executions(draws)

    seconds = common.side_by_side(
        {
            "float32": lambda: score("float32", exact),
            "bfloat16": lambda: score("bfloat16", rough),
        },
        args.runs,
    )
    tokens = np.array([len(d["z"].ids) for d in draws])
    rows = []
    for what in ("z", "y"):
        a, b = (np.array([e.sites[what].log_prob for e in found[n]]) for n in ways)
        rows.append(_row("log p(middle)" if what == "z" else "log weight", b - a))
        if what == "z":
            rows.append(_row("log p(middle) a token", (b - a) / tokens))
        else:
            evidence = [np.logaddexp.reduce(x) - np.log(len(x)) for x in (a, b)]
            rows.append(_row("log evidence", np.array([evidence[1] - evidence[0]])))
    fast, slow = (common.median(seconds[n]) for n in ways)
    for row in rows:
        row["time, bfloat16 : float32"] = slow / fast
    common.report("precision", list(rows[0]), rows, args)


def _row(what: str, difference: np.ndarray) -> dict[str, object]:
    return {
        "what": what,
        "of": len(difference),
        "mean": f"{difference.mean():+.4f}",
        "sd": f"{difference.std():.4f}",
        "largest": f"{np.abs(difference).max():.4f}",
    }


if __name__ == "__main__":
    main()
