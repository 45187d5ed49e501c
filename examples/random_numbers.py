"""A language model that draws integers from 0 to 100 alike.

Asked for a random integer, an LM has its favourites, and often answers with no integer at all. Here
the answer is a latent string whose target is uniform over the strings of a regular expression. A
guide is trained for that target. The target has 101 strings, so what the guide draws is known
exactly, from its own probabilities.

    python examples/random_numbers.py
    python examples/random_numbers.py --help
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import langppl as lp
from langppl.guides import Guide

PROMPT = "Random integers between 0 and 100, drawn uniformly:\n83\n4\n57\n"
"""Three numbers, so that an untrained LM goes on with a number more often than not."""

INTEGER = lp.regex(r"(0|[1-9][0-9]?|100)\n")
STRINGS = [f"{k}\n" for k in range(101)]


def make_number(lm: lp.LM, prompt: str = PROMPT) -> Callable[[], str]:
    """The model: all that the LM may answer counts alike, if it is an integer."""

    def number() -> str:
        answer = lp.LMString(lm, prompt, stop="\n", max_tokens=6, min_tokens=0, truncate="reject")
        z = lp.sample("number", lp.Tempered(answer, math.inf))
        lp.factor("is an integer", lp.log_matches(z, INTEGER))
        return z

    return number


@dataclass(frozen=True)
class Exact:
    """What a guide's own probabilities of the 101 strings say, without sampling.

    Attributes:
        probabilities: shape [101].
    """

    probabilities: np.ndarray

    @property
    def valid(self) -> float:
        """Share of its draws that are integers from 0 to 100."""
        return float(self.probabilities.sum())

    @property
    def kl(self) -> float:
        """KL(valid draws ‖ uniform), nats."""
        share = self.probabilities / self.valid
        return float(np.sum(share * np.log(np.maximum(share, 1e-300) * len(share))))

    @property
    def kl_from_target(self) -> float:
        """KL(uniform ‖ all draws), nats; draws that are no integers count."""
        return float(-np.mean(np.log(np.maximum(self.probabilities, 1e-300) * 101)))


def exact(guide: Guide, program: lp.Program) -> Exact:
    """Scores all strings of the target under a guide."""
    return Exact(np.exp(guide.log_q(program, [{"number": z} for z in STRINGS])))


def train(
    guide: lp.GFlowNetGuide, program: lp.Program, steps: int, batch: int, **options: Any
) -> None:
    """SubTB by default: every prefix of digits is itself a string with a reward."""
    settings: dict[str, Any] = {
        "steps": steps,
        "batch": batch,
        "learning_rate": 1e-3,
        "betas": (0.8, 0.95),
        "schedule": lp.RewardSchedule(start=1.0),
        "tempered_share": 0.25,
        "sampling_temperature": (1.0, 2.0),
        "replay_share": 0.125,
        "replay_distance": 0.0,
    }
    guide.fit(program, **{**settings, **options})


def main() -> None:
    """Trains, and shows what was drawn before and what is drawn after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", default="smollm2-135m-instruct", help="name, hub id or folder")
    parser.add_argument("--steps", type=int, default=50, help="training steps")
    parser.add_argument("--batch", type=int, default=48, help="draws in a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    lm = lp.LM(args.lm)
    program = lp.compile(make_number(lm))
    guide = lp.GFlowNetGuide(lm, seed=args.seed)
    table = Table(title="Integers from 0 to 100", title_justify="left")
    for head in ("draws from", "valid", "KL(valid ‖ uniform)", "KL(uniform ‖ all)", "likeliest"):
        table.add_column(head, justify="left" if head == "draws from" else "right")
    for name in ("the LM, prompted", "the trained guide"):
        if name == "the trained guide":
            train(guide, program, args.steps, args.batch)
        found = exact(guide, program)  # an untrained guide is the LM itself
        top = np.argsort(-found.probabilities)[:4]
        table.add_row(
            name,
            f"{found.valid:.1%}",
            f"{found.kl:.4f}",
            f"{found.kl_from_target:.4f}",
            ", ".join(f"{k} {found.probabilities[k]:.1%}" for k in top),
        )
    console = Console(width=120)
    console.print(table)
    drawn = [str(row["number"]) for row in guide.sample(program, n=20, seed=args.seed)]
    console.print(f"Twenty draws of the guide: {', '.join(map(repr, drawn))}")
    console.print(f"KL in nats, exact. {time.monotonic() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
