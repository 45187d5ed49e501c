"""How near scoring, training and decoding come to what the machine's matrix products allow.

Tokens really computed × operations of one token, over the rate of bare matrix products in the
model's shapes, measured in the same run. The backward pass through frozen weights counts once;
attention and the adapter's own products do not count at all.

    python benchmarks/limit.py --help
"""

from __future__ import annotations

from collections.abc import Callable

import common
import torch

import langppl as lp
from langppl.lm.decoding import draw
from langppl.lm.requests import DrawRequest, ScoreRequest
from langppl.lm.rules import StringRules
from langppl.lm.scoring import score, score_with_gradients


class Counter:
    """Counts the tokens and the logits that the LM computes."""

    def __init__(self, lm: lp.LM) -> None:
        self.tokens = self.logits = 0
        lm.model.get_input_embeddings().register_forward_hook(self._embedded)
        lm.model.get_output_embeddings().register_forward_hook(self._headed)

    def _embedded(self, _module: object, _args: object, out: torch.Tensor) -> None:
        self.tokens += out.shape[:-1].numel()

    def _headed(self, _module: object, _args: object, out: torch.Tensor) -> None:
        self.logits += out.shape[:-1].numel()

    def of(self, way: Callable[[], object]) -> tuple[int, int]:
        self.tokens = self.logits = 0
        way()
        return self.tokens, self.logits


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--length", type=int, default=20)
    options.add_argument("--prompt", type=int, default=60)
    options.add_argument("--rank", type=int, default=16)
    args = options.parse_args()
    lm = lp.LM(args.lm)
    guide = lp.GFlowNetGuide(lm, rank=args.rank)
    prompt = common.prompt_of(lm, args.prompt)
    ids = lm.encode_prompt(prompt)
    values = common.strings(lm, prompt, args.samples, args.length)
    bound = lm.bind(StringRules(stop=".", min_tokens=0, max_tokens=args.length))
    paths = [bound.parse(v.ids, v.encode(), args.length) for v in values]
    free = lm.bind(StringRules(min_tokens=args.length, max_tokens=args.length))

    def scoring() -> None:
        score([ScoreRequest(lm, ids, p) for p in paths])

    def training() -> None:
        found = score_with_gradients([ScoreRequest(lm, ids, p, 1.0, guide.adapter) for p in paths])
        torch.stack([f.total for f in found]).sum().backward()

    def decoding() -> None:
        draw([DrawRequest(lm, ids, free, args.length, ("limit", k)) for k in range(args.samples)])

    body, head = common.flops_of(lm)
    counter = Counter(lm)
    rows = []
    for name, way, passes in (
        ("scoring", scoring, 1),
        ("training", training, 2),
        ("decoding", decoding, 1),
    ):
        tokens, logits = counter.of(way)
        work = passes * (tokens * body + logits * head)
        fractions, rates, seconds = [], [], []
        for _ in range(args.runs):
            rate = common.product_rate(lm)
            (own,) = common.side_by_side({name: way}, 1).values()
            rates.append(rate)
            seconds += own
            fractions.append(work / own[0] / rate)
        rows.append(
            {
                "what": name,
                "tokens": tokens,
                "logits": logits,
                "seconds": common.median(seconds),
                "limit GFLOP/s": common.median(rates) / 1e9,
                "share of limit": common.median(fractions),
            }
        )
    common.report("limit", list(rows[0]), rows, args)


if __name__ == "__main__":
    main()
