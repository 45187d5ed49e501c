"""Decoding: 32 strings of 20 tokens, transformers' `generate` with sampling against langppl.

python benchmarks/decoding.py --help
"""

from __future__ import annotations

import argparse
from typing import Any

import common
import torch

import langppl as lp
from langppl.lm.decoding import draw
from langppl.lm.requests import DrawRequest
from langppl.lm.rules import StringRules


def measure(lm: lp.LM, model: Any, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both ways under a prompt of so many tokens."""
    rules = lm.bind(StringRules(min_tokens=args.length, max_tokens=args.length))
    ids = lm.encode_prompt(common.prompt_of(lm, length))
    rounds = iter(range(10**6))

    def generate() -> None:
        out = model.generate(
            torch.tensor([ids] * args.samples, device=model.device),
            attention_mask=torch.ones(
                args.samples, len(ids), dtype=torch.long, device=model.device
            ),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            min_new_tokens=args.length,
            max_new_tokens=args.length,
            pad_token_id=0,
        )
        assert out.shape == (args.samples, len(ids) + args.length)

    def own() -> None:
        turn = next(rounds)
        found = draw(
            [DrawRequest(lm, ids, rules, args.length, (turn, k)) for k in range(args.samples)]
        )
        assert all(len(r.ids) == args.length for r in found)

    seconds = common.side_by_side({"generate": generate, "langppl": own}, args.runs + 1)
    a, b = (common.median(seconds[k][1:]) for k in ("generate", "langppl"))
    tokens = args.samples * args.length
    return {
        "prompt": length,
        "generate s": a,
        "langppl s": b,
        "ratio": a / b,
        "generate tokens/s": tokens / a,
        "langppl tokens/s": tokens / b,
        "seconds": seconds,
    }


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--length", type=int, default=20)
    options.add_argument("--prompts", type=int, nargs="+", default=[7, 60, 200])
    args = options.parse_args()
    lm, model = lp.LM(args.lm), common.plain_model(args.lm)
    rows = [measure(lm, model, length, args) for length in args.prompts]
    common.report("decoding", [c for c in rows[0] if c != "seconds"], rows, args)


if __name__ == "__main__":
    main()
