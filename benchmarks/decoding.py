"""Decoding: 32 strings of 20 tokens, transformers' `generate` with sampling against langppl.

python benchmarks/decoding.py --help
"""

from __future__ import annotations

import common
import torch

import langppl as lp
from langppl.lm.decoding import draw
from langppl.lm.requests import DrawRequest
from langppl.lm.rules import StringRules


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--length", type=int, default=20)
    options.add_argument("--prompts", type=int, nargs="+", default=[7, 60, 200])
    args = options.parse_args()
    lm, model = lp.LM(args.lm), common.plain_model(args.lm)
    rules = lm.bind(StringRules(min_tokens=args.length, max_tokens=args.length))
    rows = []
    for length in args.prompts:
        ids = lm.encode_prompt(common.prompt_of(lm, length))
        rounds = iter(range(10**6))

        def generate(ids: tuple[int, ...] = ids) -> None:
            out = model.generate(
                torch.tensor([ids] * args.samples),
                attention_mask=torch.ones(args.samples, len(ids), dtype=torch.long),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                min_new_tokens=args.length,
                max_new_tokens=args.length,
                pad_token_id=0,
            )
            assert out.shape == (args.samples, len(ids) + args.length)

        def own(ids: tuple[int, ...] = ids, rounds=rounds) -> None:
            turn = next(rounds)
            found = draw(
                [DrawRequest(lm, ids, rules, args.length, (turn, k)) for k in range(args.samples)]
            )
            assert all(len(r.ids) == args.length for r in found)

        seconds = common.side_by_side({"generate": generate, "langppl": own}, args.runs + 1)
        a, b = (common.median(seconds[k][1:]) for k in ("generate", "langppl"))
        tokens = args.samples * args.length
        rows.append(
            {
                "prompt": length,
                "generate s": a,
                "langppl s": b,
                "ratio": a / b,
                "generate tokens/s": tokens / a,
                "langppl tokens/s": tokens / b,
                "seconds": seconds,
            }
        )
    common.report("decoding", [c for c in rows[0] if c != "seconds"], rows, args)


if __name__ == "__main__":
    main()
