"""Small passes: layers taken apart (`langppl.lm.lean`), and compiled, against transformers' own.

A pass of n nodes that continue n strings of eight tokens with one prompt, as in a step of decoding.
The first two ways multiply with oneDNN's layout of the weights, the third with functions compiled
for the machine (`langppl.lm.native`).

    python benchmarks/lean.py
    python benchmarks/lean.py --help
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import common
import numpy as np
import torch

import langppl as lp
from langppl.lm import caches, native, packed, products
from langppl.lm.decoding import BLOCK
from langppl.lm.trie import lay_out

GROWN = 8


def measure(lm: lp.LM, plain: lp.LM, prompt: int, count: int, runs: int) -> dict[str, Any]:
    """Seconds of a pass in each way; `plain` is the LM without compiled functions."""
    assert lm.packs is not None and lm.lean is not None
    rng = np.random.default_rng(0)
    ids = lm.encode_prompt(common.prompt_of(lm, prompt))
    words = rng.choice(np.flatnonzero(~lm.vocabulary.special), (count, GROWN + 1))
    strings = [(*ids, *own[:-1].tolist()) for own in words]
    (row,) = lay_out(strings, 10**6).rows
    leaves = np.array([row.paths[k][-1] for k in range(count)])
    cache = caches.cache_of([])
    packed.run_row(lm, lm.packs, row, 0, leaves, cache)
    held = caches.keys_and_values(cache)
    seen = np.concatenate([row.mask(0)[leaves], np.eye(count, dtype=bool)], axis=1)
    depth = np.concatenate([row.depth, row.depth[leaves] + 1])
    sees = packed.seen_by(lm, lm.packs, seen, depth[-count:], depth, BLOCK)
    tokens, at = torch.from_numpy(words[:, -1].copy()), torch.from_numpy(depth[-count:])
    lean = plain.lean
    states = {}

    def way(name: str, lm: lp.LM, own: Any) -> Any:
        def go() -> None:
            lm.lean = own
            everyone = torch.arange(count)
            cache = caches.cache_of(held)
            assert lm.packs is not None
            states[name] = packed.run(lm, lm.packs, tokens, at, sees, everyone, cache)

        return go

    ways = {
        "transformers": way("transformers", plain, None),
        "lean": way("lean", plain, lean),
        "compiled": way("compiled", lm, lm.lean),
    }
    seconds = common.side_by_side(ways, runs + 2)
    plain.lean = lean
    a, b, c = (common.median(seconds[name][2:]) for name in ways)
    difference = max((states[k] - states["transformers"]).abs().max() for k in ("lean", "compiled"))
    return {
        "prompt": prompt,
        "strings": count,
        "transformers' layers ms": 1e3 * a,
        "taken apart ms": 1e3 * b,
        "ratio": a / b,
        "compiled ms": 1e3 * c,
        "its ratio": a / c,
        "difference": f"{float(difference / states['transformers'].abs().max()):.0e}",
        "seconds": seconds,
    }


def main() -> None:
    options = common.parser(__doc__)
    options.set_defaults(runs=21)
    options.add_argument("--prompts", type=int, nargs="+", default=[7, 200])
    options.add_argument("--strings", type=int, nargs="+", default=[1, 8, 16, 32, 128])
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = options.parse_args()
    if native.library() is None:
        options.error(f"nothing is compiled here: {native.reason()}")
    dtype = getattr(torch, args.dtype)
    lm = lp.LM(args.lm, device="cpu", dtype=dtype)
    with mock.patch.object(native, "library", lambda: None):
        plain = lp.LM(args.lm, device="cpu", dtype=dtype)
    with torch.no_grad(), products.unchanged():
        rows = [measure(lm, plain, p, n, args.runs) for p in args.prompts for n in args.strings]
    name = "lean" if args.dtype == "float32" else f"lean_{args.dtype}"
    common.report(name, [c for c in rows[0] if c != "seconds"], rows, args)


if __name__ == "__main__":
    main()
