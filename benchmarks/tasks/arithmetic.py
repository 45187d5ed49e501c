"""Sums with a calculator (arXiv 2310.04363, section 4.4): steps are latent, answers are observed.

Every way answers for sums of 3, 4 and 5 operands that no training saw: from the LM itself
(zero-shot and few-shot), from maximum likelihood on a few sums with worked steps (supervised), and
from four trainings that begin there, take it for the model's prior, and go on with sums of which
the answer alone is known: reweighted wake-sleep (`rws`), trajectory balance (`gflownet`), and
reinforcement learning with (`reverse_kl`) and without (`reward`) an entropy term. Five operands
occur in no training. Finished runs are kept, and a training that was cut off goes on from its
checkpoint.

    python benchmarks/tasks/arithmetic.py --data DIR
    python benchmarks/tasks/arithmetic.py --help
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import Runs, example, parser, spread, write

import langppl as lp
from langppl.guides import Guide, PriorGuide

sums = example("arithmetic")
UNTRAINED = {"zero-shot": "", "few-shot": sums.SHOTS}
REFINED = {
    "rws": "rws",
    "gflownet": "vargrad",
    "reverse_kl": "reverse_kl",
    "reward": "reward",
}
"""Ways that begin with the supervised guide, and their objectives."""
OPERANDS = (3, 4, 5)


def read(folder: Path, split: str) -> list[Any]:
    """The sums of a split; those with worked steps first."""
    path = folder / "arithmetic.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    own = sorted((r for r in rows if r["split"] == split), key=lambda r: not r["rationale_shipped"])
    return [sums.Sum(r["expression"].replace(" ", ""), int(r["answer"])) for r in own]


def chosen(problems: Sequence[Any], seed: int, count: int) -> list[Any]:
    """Some of them, by a seed."""
    order = np.random.default_rng(seed).permutation(len(problems))
    return [problems[k] for k in order[:count]]


class Task:
    """One LM, and the ways in which it is trained and asked.

    Args:
        lm: the LM.
        args: the options.
    """

    def __init__(self, lm: lp.LM, args: argparse.Namespace) -> None:
        self.lm, self.args = lm, args
        self.solvers = {shots: sums.Solver(lm, shots) for shots in ("", sums.SHOTS)}
        known = read(args.data, "train")
        shown = set(sums.SHOTS.replace("\n", ":").split(":"))
        self.worked = [p for p in known[:50] if p.question not in shown]
        self.labelled = [p for p in known[50:] if p.question not in shown]
        test = [p for p in read(args.data, "test") if p.question not in shown]
        self.test = {n: [p for p in test if p.operands == n][: args.test] for n in OPERANDS}

    def supervised(self, seed: int) -> lp.GFlowNetGuide:
        """Maximum likelihood of the worked steps of a few sums."""
        folder = self.args.work / f"supervised-{seed}"
        if not (folder / "guide" / "guide.json").is_file():
            guide = lp.GFlowNetGuide(self.lm, context=sums.without_shots, seed=seed)
            sums.imitate(
                guide,
                self.solvers[sums.SHOTS],
                chosen(self.worked, seed, self.args.demos),
                self.args.demo_steps,
                checkpoint=folder / "state",
            )
            guide.save(folder / "guide")
        return lp.GFlowNetGuide.load(folder / "guide", self.lm, context=sums.without_shots)

    def refined(self, way: str, seed: int) -> lp.GFlowNetGuide:
        """From the supervised guide on, with sums whose answers alone are known."""
        guide = self.supervised(seed)
        learnt = sums.learned(self.lm, self.args.work / f"supervised-{seed}" / "guide")
        order = chosen(self.labelled, seed, self.args.labels + self.args.held_out)
        held_out = order[self.args.labels :]
        sums.refine(
            guide,
            learnt,
            order[: self.args.labels],
            self.args.steps,
            objective=REFINED[way],
            learning_rate=self.args.learning_rate,
            batch=self.args.batch,
            validation=[(p, None) for p in learnt.programs(held_out)] or None,
            validate_every=max(self.args.steps // 8, 1),
            validation_samples=4,
            keep_best=way != "reward",  # which is not after the ELBO
            checkpoint=self.args.work / f"{way}-{seed}",
        )
        return guide

    def run(self, way: str, seed: int) -> dict[str, Any]:
        """Trains in one way, and answers."""
        started = time.monotonic()
        guide: Guide = PriorGuide()
        if way == "supervised":
            guide = self.supervised(seed)
        elif way in REFINED:
            guide = self.refined(way, seed)
        seconds = time.monotonic() - started
        found: dict[str, Any] = {"seconds": seconds}
        solver = self.solvers[UNTRAINED.get(way, sums.SHOTS)]
        for n, problems in self.test.items():
            drawn = solver.draw(guide, problems, self.args.draws, seed)
            found[str(n)] = sums.figures(problems, drawn)
            found[f"{n} drawn"] = {p.question: d for p, d in zip(problems[:6], drawn, strict=False)}
        return found


def row(way: str, of_seeds: Sequence[dict[str, Any]]) -> dict[str, str]:
    """One line of the table."""
    shown = {"way": way}
    for figure, head in (("one", "one sample"), ("vote", "vote")):
        for n in OPERANDS:
            values = [100 * run[str(n)][figure] for run in of_seeds]
            shown[f"{n} operands, {head} %"] = spread(values, "{:.1f}")
    for figure, head in (("distinct", "distinct"), ("right distinct", "right and distinct")):
        values = [np.mean([run[str(n)][figure] for n in OPERANDS]) for run in of_seeds]
        shown[head] = spread(values, "{:.1f}")
    shown["s"] = f"{np.mean([run['seconds'] for run in of_seeds]):.0f}"
    return shown


def samples(runs: dict[str, dict[str, Any]]) -> str:
    """Some draws of each way, right and wrong ones, as they are."""
    lines = []
    for way, of_seeds in runs.items():
        found = next(iter(of_seeds.values()))
        lines.append(f"- {way}")
        for n in OPERANDS:
            question, texts = next(iter(found[f"{n} drawn"].items()))
            answer = str(sums.calculate(f"{question}="))
            shown = [
                f"`{t.partition(':')[2]}`" + ("" if sums.answer_of(t) == answer else " (wrong)")
                for t in dict.fromkeys(texts)
            ]
            lines.append(f"  - `{question}` = {answer}: {', '.join(shown[:3])}")
    return "\n".join(lines)


def main() -> None:
    """Runs what is not yet known, and writes the table after each."""
    options = parser(__doc__, "arithmetic")
    options.add_argument("--data", type=Path, required=True, help="folder with arithmetic.jsonl")
    options.add_argument("--demos", type=int, default=20, help="sums with worked steps")
    options.add_argument("--demo-steps", type=int, default=40, help="supervised steps")
    options.add_argument("--labels", type=int, default=950, help="sums with the answer alone")
    options.add_argument("--held-out", type=int, default=50, help="more of these, to validate on")
    options.add_argument("--steps", type=int, default=120, help="steps after the supervised ones")
    options.add_argument("--batch", type=int, default=8, help="draws for each of 8 sums in a step")
    options.add_argument("--learning-rate", type=float, default=7e-4, help="of these")
    options.add_argument("--test", type=int, default=30, help="sums to answer, of each length")
    options.add_argument("--draws", type=int, default=10, help="for each, of which most win")
    ways = [*UNTRAINED, "supervised", *REFINED]
    options.add_argument("--ways", nargs="+", default=ways, choices=ways)
    args = options.parse_args()
    args.work = args.work or args.out / "arithmetic-work"
    free = ("ways", "seeds", "out", "work", "data", "task", "device")
    kept = Runs(args.work, {k: v for k, v in vars(args).items() if k not in free})
    task: Task | None = None
    runs: dict[str, dict[str, Any]] = {}
    # By seeds, so that a run that is cut off has a whole table of the seeds before.
    for seed in args.seeds:
        for way in args.ways:
            if way in UNTRAINED and seed != args.seeds[0]:
                continue
            name = f"result-{way}-{seed}"
            found = kept.get(name)
            if found is None:
                task = task or Task(lp.LM(args.model, device=args.device), args)
                found = kept.put(name, task.run(way, seed))
            runs.setdefault(way, {})[str(seed)] = found
            table = [row(w, list(r.values())) for w, r in runs.items()]
            write(args, table, runs, samples(runs))


if __name__ == "__main__":
    main()
