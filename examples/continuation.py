"""The next sentence at a low temperature of whole sentences, not of tokens.

Dividing the logits of each token sharpens every choice by itself: it falls for beginnings that look
good and end badly. Here p(sentence)^(1/T) is the target. A guide is trained for it on some prompts,
then writes on from prompts that it has not seen, beside the LM at several temperatures of tokens.

    python examples/continuation.py
    python examples/continuation.py --help
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import langppl as lp
from langppl.distributions import Text
from langppl.guides import Guide, PriorGuide
from langppl.program import Program

PROMPTS = (
    "The museum reopened on Monday after two years of repairs.",
    "Rain fell on the north coast for the third day in a row.",
    "The company said that its new phone will be sold in March.",
    "My grandmother keeps bees behind her house.",
    "The team lost its first game of the season.",
    "Scientists have found a new kind of frog in the mountains.",
    "The library lends tools as well as books.",
    "She moved to the city last year and works in a small bakery.",
)
UNSEEN = (
    "The old bridge was closed to traffic this morning.",
    "A new school will open in the village next autumn.",
    "He has run the same shop for forty years.",
)


def make_continuation(
    lm: lp.LM, temperature: float = 1.0, token_temperature: float = 1.0, max_tokens: int = 20
) -> Callable[[str], str]:
    """The model: the next sentence, likelier ones sharpened as wholes."""

    def continuation(prompt: str) -> str:
        sentence = lp.LMString(
            lm,
            prompt,
            stop=".",
            max_tokens=max_tokens,
            truncate="reject",
            temperature=token_temperature,
        )
        return lp.sample("sentence", lp.Tempered(sentence, temperature))

    return continuation


def draws(
    guide: Guide, programs: Sequence[Program], plain: Sequence[Program], n: int, seed: int
) -> list[list[tuple[Text, float]]]:
    """Sentences that a guide draws, each with its log-probability under the LM itself.

    Args:
        guide: what draws.
        programs: the prompts' programs that it draws in.
        plain: the same at temperature 1.
        n: draws for each.
        seed: of the random numbers.

    Returns:
        A list for each prompt; the log-probability (nats) of an unfinished sentence is −inf.
    """
    found = []
    drawn = guide.sample_many(programs, n=n, seed=seed, progress=False)
    for program, own in zip(plain, drawn, strict=True):
        sentences = [draw["sentence"] for draw in own]
        logs = program.log_joint([{"sentence": text} for text in sentences]).tolist()
        found.append(list(zip(sentences, logs, strict=True)))
    return found


def train(
    guide: lp.GFlowNetGuide,
    model: Callable[[str], str],
    prompts: Sequence[str],
    steps: int,
    **options: Any,
) -> None:
    """SubTB: every prefix that is ended is a sentence with a reward of its own."""
    settings: dict[str, Any] = {
        "observations": 4,
        "batch": 8,
        "learning_rate": 5e-4,
        "betas": (0.8, 0.95),
        "schedule": lp.RewardSchedule(start=1.0),
        "tempered_share": 0.25,
        "sampling_temperature": (0.7, 1.3),
        "every": 2,
        **options,
    }
    guide.fit(model, [(p,) for p in prompts], steps=steps, objective="subtb", **settings)


def main() -> None:
    """Trains a guide, and sets its draws beside those of the LM."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", default="smollm2-135m-instruct", help="name, hub id or folder")
    parser.add_argument("--temperature", type=float, default=0.8, help="of whole sentences")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--samples", type=int, default=12, help="draws for each prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    lm = lp.LM(args.lm)
    guide = lp.GFlowNetGuide(lm, seed=args.seed)
    train(guide, make_continuation(lm, args.temperature), PROMPTS, args.steps)
    plain = [lp.compile(make_continuation(lm), p) for p in UNSEEN]
    ways: dict[str, list[list[tuple[Text, float]]]] = {}
    for heat in (1.0, 0.8, 0.6):
        cooled = make_continuation(lm, token_temperature=heat)
        programs = [lp.compile(cooled, p) for p in UNSEEN]
        name = f"the LM, its tokens at {heat:g}"
        ways[name] = draws(PriorGuide(), programs, plain, args.samples, args.seed)
    own = f"the guide, sentences at {args.temperature:g}"
    ways[own] = draws(guide, plain, plain, args.samples, args.seed)
    table = Table(title="Next sentences of unseen prompts", title_justify="left")
    for head in ("draws from", "log p", "of the best", "different", "unfinished"):
        table.add_column(head, justify="left" if head == "draws from" else "right")
    for name, rows in ways.items():
        whole = [[(z, w) for z, w in row if np.isfinite(w)] for row in rows]
        logs = [w for row in whole for _, w in row]
        table.add_row(
            name,
            f"{np.mean(logs):.2f}",
            f"{np.mean([max(w for _, w in row) for row in whole if row]):.2f}",
            f"{np.mean([len({str(z) for z, _ in row}) / len(row) for row in whole if row]):.0%}",
            f"{1 - len(logs) / sum(map(len, rows)):.0%}",
        )
    console = Console(width=120)
    console.print(table)
    for prompt, row in zip(UNSEEN, ways[own], strict=True):
        console.print(f"{prompt} […]", style="bold")
        for z, w in sorted(row, key=lambda r: -r[1])[:4]:
            console.print(f"  {w:7.2f} {str(z)!r}")
    console.print(
        "log p: of finished sentences under the LM, nats, mean. "
        f"{args.steps} steps, {time.monotonic() - started:.0f} s in all."
    )


if __name__ == "__main__":
    main()
