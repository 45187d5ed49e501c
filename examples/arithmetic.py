"""Sums with a calculator: the steps are latent, and the answer is observed.

The LM works a sum off step by step. At each step it writes the next operation, a calculator writes
the result, and the LM goes on or ends. A few sums have worked steps: what a guide learns by
imitating them becomes the model. Then it is trained on sums whose answers are known and whose steps
are not, and asked for sums whose answers it never sees.

    python examples/arithmetic.py
    python examples/arithmetic.py --help
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import langppl as lp
from langppl.guides import ContextInfo, Guide, PriorGuide
from langppl.lm import TrainableLM
from langppl.lm.prompts import Prompt
from langppl.program import Program

SHOTS = "4+5-1:4+5=9-1=8;\n1-6-9+3:1-6=-5-9=-14+3=-11;\n"
"""Two sums with their steps, before every question that the model itself is asked."""

FIRST = lp.regex(r"[0-9][+-][0-9]=")
NEXT = lp.regex(r"[+-][0-9]=|;")
MOST_STEPS = 6

_SUM = re.compile(r"-?[0-9]{1,9}(?:[+-][0-9]{1,9})*=")
_PART = re.compile(r"[+-]?[0-9]+")


def calculate(expression: str) -> int:
    """The calculator: the value of a chain of additions and subtractions such as `"-3+4="`.

    It reads digits and signs from left to right and evaluates nothing else.

    Raises:
        ValueError: for anything but integers of at most nine digits with + or - between them and
            one "=" at the end.
    """
    if _SUM.fullmatch(expression) is None:
        raise ValueError(f"the calculator takes a sum such as '-3+4=', got {expression!r}")
    return sum(int(part) for part in _PART.findall(expression))


def make_solver(lm: lp.LM | TrainableLM, shots: str = SHOTS) -> Callable[..., str]:
    """The model: operations until ";", each followed by what the calculator says."""

    def solve(question: str, answer: int | None = None) -> str:
        text, total = f"{shots}{question}:", ""
        for turn in range(MOST_STEPS):
            rules = {"stop": ["=", ";"], "min_tokens": 0, "max_tokens": 5}
            grammar = NEXT if turn else FIRST
            step = lp.sample(f"step {turn}", lp.LMString(lm, text, grammar=grammar, **rules))
            if step == ";":
                text += ";"
                break
            total = str(lp.call(f"result {turn}", calculate, f"{total}{step}"))
            text += f"{step}{total}"
        if answer is not None:
            lp.factor("answer", 0.0 if text.endswith(f"={answer};") else -math.inf)
        return text.removeprefix(shots)

    return solve


def without_shots(info: ContextInfo) -> Prompt:
    """What a guide reads: the question and the steps so far, and never the answer."""
    return str(info.prompt).removeprefix(SHOTS)


@dataclass(frozen=True)
class Sum:
    """A problem, such as `Sum("4+5-1", 8)`."""

    question: str
    answer: int

    @property
    def parts(self) -> list[str]:
        """Its operands with their signs."""
        return re.findall(r"[+-]?[0-9]", self.question)

    @property
    def operands(self) -> int:
        """How many numbers it has."""
        return len(self.parts)

    @property
    def steps(self) -> dict[str, str]:
        """The steps from left to right, as latents."""
        first, second, *others = self.parts
        written = [f"{first}{second}=", *(f"{part}=" for part in others), ";"]
        return {f"step {turn}": step for turn, step in enumerate(written)}


def make_sums(operands: Sequence[int], count: int, seed: int) -> list[Sum]:
    """Different sums of one-digit numbers, as many of each number of operands."""
    rng = np.random.default_rng(seed)
    found: dict[str, Sum] = {}
    while len(found) < count:
        numbers = rng.integers(10, size=operands[len(found) % len(operands)])
        text = str(numbers[0]) + "".join(f"{rng.choice(['+', '-'])}{n}" for n in numbers[1:])
        if text not in SHOTS:
            found[text] = Sum(text, calculate(f"{text}="))
    return list(found.values())


class Solver:
    """The model with its programs; the structure of the first is taken over by the others.

    Args:
        lm: the LM, or a view of it.
        shots: what stands before every question.
    """

    def __init__(self, lm: lp.LM | TrainableLM, shots: str = SHOTS) -> None:
        self.lm, self.model = lm, make_solver(lm, shots)
        self._first: dict[bool, Program] = {}

    def programs(self, problems: Sequence[Sum], are_answered: bool = True) -> list[Program]:
        """A program for each problem, with its answer observed or without."""
        found = []
        for p in problems:
            args = (p.question, p.answer) if are_answered else (p.question,)
            program = lp.compile(self.model, *args, like=self._first.get(are_answered))
            self._first.setdefault(are_answered, program)
            found.append(program)
        return found

    def draw(self, guide: Guide, problems: Sequence[Sum], draws: int, seed: int) -> list[list[str]]:
        """Worked steps for each problem, unweighted, from a guide that is not shown the answer."""
        programs = self.programs(problems, are_answered=False)
        found = guide.sample_many(programs, n=draws, seed=seed, progress=False)
        return [[draw["_RETURN"] for draw in own] for own in found]


def imitate(
    guide: lp.GFlowNetGuide, solver: Solver, problems: Sequence[Sum], steps: int, **options: Any
) -> None:
    """Maximum likelihood of the worked steps of a few sums."""
    guide.fit(
        [(p, None) for p in solver.programs(problems)],
        objective="mle",
        given=[[p.steps] for p in problems],
        steps=steps,
        observations=min(10, len(problems)),
        batch=2,
        betas=(0.8, 0.95),
        **options,
    )


def learned(lm: lp.LM, folder: Path) -> Solver:
    """The model whose prior is what a guide, saved in a folder, has imitated.

    Under the LM as it is, right steps have a prior of e^-4 to e^-12, and others that come to the
    right answer by chance e^-3 together: its posterior given the answer is guessing, however well
    it is inferred.
    """
    return Solver(lm.trainable("worker").load(folder), shots="")


def refine(
    guide: lp.GFlowNetGuide, solver: Solver, problems: Sequence[Sum], steps: int, **options: Any
) -> None:
    """Training on sums whose answers are known, and whose steps are not."""
    settings: Mapping[str, Any] = {
        "objective": "rws",
        "steps": steps,
        "observations": 8,
        "batch": 8,
        "learning_rate": 3e-4,
        "betas": (0.9, 0.99),
        "warmup": 10,
        "schedule": lp.RewardSchedule(start=1.0),
        "tempered_share": 0.25,
        "sampling_temperature": (1.0, 1.5),
        "replay_distance": 0.0,
    }
    guide.fit([(p, None) for p in solver.programs(problems)], **{**settings, **options})


def answer_of(text: str) -> str:
    """What worked steps come to; empty for steps without an end."""
    return text[:-1].rpartition("=")[2] if text.endswith(";") else ""


def figures(problems: Sequence[Sum], drawn: Sequence[Sequence[str]]) -> dict[str, float]:
    """Shares of right draws and right majorities; distinct draws of a problem, and right ones."""
    rows = []
    for problem, texts in zip(problems, drawn, strict=True):
        answers = [answer_of(t) for t in texts]
        right = [a == str(problem.answer) for a in answers]
        winner = Counter(answers).most_common(1)[0][0]
        distinct = {t for t, r in zip(texts, right, strict=True) if r}
        rows.append((np.mean(right), winner == str(problem.answer), len({*texts}), len(distinct)))
    one, vote, several, good = np.mean(rows, axis=0)
    return {"one": one, "vote": vote, "distinct": several, "right distinct": good}


def main() -> None:
    """Trains, and answers sums of 3, 4 and 5 operands; none of five occurs in training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", default="smollm2-135m-instruct", help="name, hub id or folder")
    parser.add_argument("--demos", type=int, default=20, help="sums with worked steps")
    parser.add_argument("--demo-steps", type=int, default=40, help="steps of imitation")
    parser.add_argument("--steps", type=int, default=30, help="steps on answers alone")
    parser.add_argument("--test", type=int, default=12, help="sums to answer, of each length")
    parser.add_argument("--draws", type=int, default=4, help="draws for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="for the guides")
    args = parser.parse_args()
    started = time.monotonic()
    console = Console(width=120)
    lm = lp.LM(args.lm)
    solver = Solver(lm)
    known = make_sums((3, 4), args.demos + 8 * args.steps, args.seed)
    unseen = {
        n: [p for p in make_sums((n,), 2 * args.test, args.seed + n) if p not in known][: args.test]
        for n in (3, 4, 5)
    }
    guide = lp.GFlowNetGuide(lm, context=without_shots, seed=args.seed)
    heads = ("way", *(f"{n} operands" for n in unseen), "distinct of " + str(args.draws))
    table = Table(*heads, title="Right answers to unseen sums", title_justify="left")
    examples = []

    def show(way: str, asked: Guide) -> None:
        drawn = {n: solver.draw(asked, p, args.draws, args.seed) for n, p in unseen.items()}
        found = [figures(unseen[n], texts) for n, texts in drawn.items()]
        distinct = np.mean([f["distinct"] for f in found])
        table.add_row(way, *(f"{f['one']:.0%}" for f in found), f"{distinct:.1f}")
        examples.append(f"{way}: {'   '.join(texts[0][0] for texts in drawn.values())}")

    show("few-shot", PriorGuide())
    imitate(guide, solver, known[: args.demos], args.demo_steps)
    show("supervised", guide)
    guide.save(args.out / "arithmetic-supervised")
    refine(guide, learned(lm, args.out / "arithmetic-supervised"), known[args.demos :], args.steps)
    guide.save(args.out / "arithmetic-guide")
    show("guide", guide)
    console.print(table, *examples, sep="\n")
    console.print(f"{time.monotonic() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
