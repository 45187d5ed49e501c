"""Subjectivity (arXiv 2310.04363, section 4.3): labels are observed, the reasons for them latent.

Sentences are classified as objective or subjective after 10, 20 and 50 labelled ones: by the LM
itself (zero-shot, few-shot, and with rationales of its own), by maximum likelihood of the labels
(supervised), by a GFlowNet guide that writes rationales, by the same guide trained further for a
label of lower temperature, and by expectation maximisation of guide and classifier from the first
guide on. Finished parts are kept, and a training that was cut off goes on from its checkpoint.

    python benchmarks/tasks/subjectivity.py --data DIR
    python benchmarks/tasks/subjectivity.py --help
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import Runs, example, parser, spread, write

import langppl as lp
from langppl.guides import Guide
from langppl.guides.gflownet import GUIDE_FILE
from langppl.lm.trainable import TRAINABLE_FILE

texts = example("subjectivity")

UNTRAINED = ("zero-shot", "rationales of the LM")
"""Ways that no labelled sentence changes: they run once."""
TRAINED = ("few-shot", "supervised", "gflownet", "gflownet, sharper", "gflownet, EM")
OWN_SETS = (10, 20, 50)
"""Sizes of the paper's own labelled sets, which the first seed takes."""

PART = 50
"""Sentences that are classified at once; what is kept when a run is cut off."""

Row = dict[str, Any]
Labelled = list[tuple[str, str]]


def read(folder: Path) -> list[Row]:
    """The rows of `subj.jsonl`."""
    path = folder / "subj.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; docs/tasks/subjectivity.md says what it holds")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_labelled(rows: Sequence[Row]) -> Labelled:
    """Sentences with their labels as the model writes them."""
    found = [(str(r["text"]), f" {r['label_text']}") for r in rows]
    for text, label in found:
        if label not in texts.LABELS:
            raise SystemExit(f"{text!r} has the label {label!r}; labels are {texts.LABELS}")
    return found


def labelled(rows: Sequence[Row], count: int, seed: int) -> Labelled:
    """The sentences that a seed may learn from: the paper's own set for seed 0, else a draw."""
    train = [r for r in rows if r["split"] == "train"]
    own = [r for r in train if count in r["few_shot"]]
    if seed == 0 and own:
        return as_labelled(own)
    if count > len(train):
        raise SystemExit(f"--labels {count}, and the train split has {len(train)} rows")
    order = np.random.default_rng((seed, count)).permutation(len(train))
    return as_labelled([train[k] for k in order[:count]])


def tested(rows: Sequence[Row], count: int) -> Labelled:
    """The same rows of the test split for all, of both labels in turns."""
    by_label = [
        as_labelled([r for r in rows if r["split"] == "test" and f" {r['label_text']}" == label])
        for label in texts.LABELS
    ]
    rng = np.random.default_rng(0)
    mixed = [[own[k] for k in rng.permutation(len(own))] for own in by_label]
    return [row for pair in zip(*mixed, strict=False) for row in pair][:count]


def balanced(known: Labelled, most: int, seed: int) -> Labelled:
    """Shots for a prompt: as many of each label, in turns, the first label by the seed.

    An LM tends to repeat the label that it saw most often, or last (Zhao et al. 2021,
    arXiv 2102.09690).
    """
    rng = np.random.default_rng((seed, len(known)))
    by_label = [[row for row in known if row[1] == label] for label in texts.LABELS]
    count = min(most // 2, *map(len, by_label))
    chosen = [[own[k] for k in rng.permutation(len(own))[:count]] for own in by_label]
    turns = zip(*(chosen if rng.random() < 0.5 else chosen[::-1]), strict=True)
    return [row for pair in turns for row in pair]


class Task:
    """One LM, and the ways in which it is trained and asked.

    Args:
        lm: the LM.
        args: the options.
        kept: finished parts.
    """

    def __init__(self, lm: lp.LM, args: argparse.Namespace, kept: Runs) -> None:
        self.lm, self.args, self.kept = lm, args, kept
        self.rows = read(args.data)
        self.test = tested(self.rows, args.test)

    def folder(self, way: str, count: int, seed: int) -> Path:
        """Where a way keeps what it has learned."""
        found: Path = self.args.work / f"{way.replace(', ', '-')}-{count}-{seed}"
        return found

    def timed(self, name: str, train: Callable[[], Any]) -> float:
        """Seconds of a training, which is done if it is not known."""
        found = self.kept.get(name)
        if found is None:
            started = time.monotonic()
            train()
            found = self.kept.put(name, time.monotonic() - started)
        return float(found)

    def view(self, label: str, folder: Path) -> lp.TrainableLM:
        """A trainable view, as it was saved or as it begins."""
        found = self.lm.trainable(label)
        found.reset()
        if (folder / "view" / TRAINABLE_FILE).is_file():
            found.load(folder / "view")
        return found

    def guide(self, folder: Path, seed: int) -> lp.GFlowNetGuide:
        """A guide, as it was saved or as it begins."""
        if (folder / "guide" / GUIDE_FILE).is_file():
            return lp.GFlowNetGuide.load(folder / "guide", self.lm, context=texts.without_label)
        return lp.GFlowNetGuide(self.lm, context=texts.without_label, seed=seed)

    def supervised(self, count: int, seed: int) -> tuple[Any, Guide | None, float]:
        """Maximum likelihood of the labels."""
        args, folder = self.args, self.folder("supervised", count, seed)
        view = self.view("supervised", folder)
        model = texts.make_direct(view)

        def train() -> None:
            lp.em(
                model,
                labelled(self.rows, count, seed),
                rounds=args.supervised_rounds,
                steps=args.m_steps,
                observations=min(args.observations, count),
                learning_rate=args.em_rate,
                seed=seed,
                checkpoint=folder / "state",
            )
            view.save(folder / "view")

        return model, None, self.timed(f"seconds-supervised-{count}-{seed}", train)

    def gflownet(self, count: int, seed: int) -> tuple[Any, Guide | None, float]:
        """A guide that writes rationales for the LM as it is."""
        args, folder = self.args, self.folder("gflownet", count, seed)
        guide = self.guide(folder, seed)
        model = texts.make_classifier(self.lm, self.lm, self.args.temperature)

        def train() -> None:
            guide.fit(
                model,
                labelled(self.rows, count, seed),
                steps=args.steps,
                checkpoint=folder / "state",
                **self.settings(count),
            )
            guide.save(folder / "guide")

        return model, guide, self.timed(f"seconds-gflownet-{count}-{seed}", train)

    def sharper(self, count: int, seed: int) -> tuple[Any, Guide | None, float]:
        """From the guide on: more steps, towards a posterior in which the label weighs more."""
        args, folder = self.args, self.folder("gflownet, sharper", count, seed)
        before = self.gflownet(count, seed)[2]
        has_ended = (folder / "guide" / GUIDE_FILE).is_file()
        guide = self.guide(folder if has_ended else self.folder("gflownet", count, seed), seed)
        model = texts.make_classifier(self.lm, self.lm, args.sharper_temperature)

        def train() -> None:
            guide.fit(
                model,
                labelled(self.rows, count, seed),
                steps=args.sharper_steps,
                checkpoint=folder / "state",
                **{**self.settings(count), "batch": args.sharper_batch},
            )
            guide.save(folder / "guide")

        return model, guide, before + self.timed(f"seconds-sharper-{count}-{seed}", train)

    def settings(self, count: int) -> dict[str, Any]:
        """How a guide is trained."""
        args = self.args
        found: dict[str, Any] = texts.settings(
            objective=args.objective,
            observations=min(args.observations, count),
            batch=args.batch,
            learning_rate=args.learning_rate,
        )
        return found

    def maximised(self, count: int, seed: int) -> tuple[Any, Guide | None, float]:
        """From the guide on: EM of the guide and a classifier of its own adapter."""
        args, folder = self.args, self.folder("gflownet, EM", count, seed)
        before = self.gflownet(count, seed)[2]
        has_ended = (folder / "guide" / GUIDE_FILE).is_file()
        guide = self.guide(folder if has_ended else self.folder("gflownet", count, seed), seed)
        view = self.view("classifier", folder)
        model = texts.make_classifier(self.lm, view, args.temperature)

        def train() -> None:
            lp.em(
                model,
                labelled(self.rows, count, seed),
                guide,
                rounds=args.rounds,
                num_samples=args.batch,
                resample=args.resample,
                fit={**self.settings(count), "steps": args.fit_steps},
                steps=args.m_steps,
                observations=min(args.observations, count),
                learning_rate=args.em_rate,
                seed=seed,
                checkpoint=folder / "state",
            )
            view.save(folder / "view")
            guide.save(folder / "guide")

        return model, guide, before + self.timed(f"seconds-em-{count}-{seed}", train)

    def run(self, way: str, count: int, seed: int) -> dict[str, Any]:
        """Trains in one way, and classifies."""
        guide: Guide | None = None
        seconds = 0.0
        if way == "supervised":
            model, guide, seconds = self.supervised(count, seed)
        elif way == "gflownet":
            model, guide, seconds = self.gflownet(count, seed)
        elif way == "gflownet, sharper":
            model, guide, seconds = self.sharper(count, seed)
        elif way == "gflownet, EM":
            model, guide, seconds = self.maximised(count, seed)
        elif way == "rationales of the LM":
            model = texts.make_classifier(self.lm, self.lm, self.args.temperature)
        else:
            known = labelled(self.rows, count, seed) if way == "few-shot" else []
            model = texts.make_direct(self.lm, balanced(known, self.args.shots, seed))
        subjective: list[float] = []
        rationales: list[list[str]] = []
        started = time.monotonic()
        for first in range(0, len(self.test), PART):
            part = [s for s, _ in self.test[first : first + PART]]
            name = f"part-{way}-{count}-{seed}-{first}-{len(part)}"
            found = self.kept.get(name)
            if found is None:
                p, z = texts.predict(model, part, guide, self.args.draws, 1_000 * seed + first)
                found = self.kept.put(name, {"subjective": p.tolist(), "rationales": z})
            subjective += found["subjective"]
            rationales += found["rationales"]
        return {
            "seconds": seconds,
            "answering": time.monotonic() - started,
            **figures(self.test, subjective, rationales),
        }


def figures(
    test: Labelled, subjective: Sequence[float], rationales: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """How good the answers are, with the first of them and those that went most wrong."""
    p = np.array(subjective)
    labels = [label for _, label in test]
    of_label = np.where(np.array(labels) == texts.SUBJECTIVE, p, 1.0 - p)
    worst = [int(k) for k in np.argsort(of_label)[:2] if of_label[k] <= 0.5]
    shown = dict.fromkeys([*range(min(4, len(test))), *worst])
    return {
        "accuracy": texts.accuracy(p, labels),
        "p(label)": float(of_label.mean()),
        "subjective": float((p > 0.5).mean()),
        "shown": [
            {
                "sentence": test[k][0],
                "label": labels[k],
                "p(label)": float(of_label[k]),
                "rationales": list(dict.fromkeys(rationales[k]))[:5],
            }
            for k in shown
        ],
    }


Found = dict[str, dict[int, dict[int, dict[str, Any]]]]
"""Runs by way, number of labels, and seed."""


def row(way: str, found: dict[int, dict[int, dict[str, Any]]], counts: Sequence[int]) -> Row:
    """One line of the table; a way that needs no labels has the same figures everywhere."""
    shown: Row = {"way": way}
    own = {n: found.get(0 if way in UNTRAINED else n) for n in counts}
    for n, runs in own.items():
        values = [100 * r["accuracy"] for r in runs.values()] if runs else []
        shown[f"{n} labels, %"] = spread(values, "{:.1f}") if values else "–"
    for n, runs in own.items():
        values = [r["seconds"] for r in runs.values()] if runs else []
        shown[f"{n} labels, s"] = f"{np.mean(values):.0f}" if values else "–"
    return shown


def samples(found: Found) -> str:
    """Rationales of some sentences, right ones and those that led most astray, as they are."""
    lines = []
    for way, by_count in found.items():
        count, runs = next(reversed(by_count.items()))
        first = next(iter(runs.values()))
        if not any(z for s in first["shown"] for z in s["rationales"]):
            continue
        lines += [f"**{way}**" + (f", {count} labels" if count else ""), ""]
        for s in first["shown"]:
            rationales = ", ".join(f"“{' '.join(z.split())}”" for z in s["rationales"])
            right = f"p({s['label'].strip()}) = {s['p(label)']:.2f}"
            if s["p(label)"] <= 0.5:
                right += " (wrong)"
            lines.append(f"- {s['sentence']} *{right}*: {rationales}")
        lines.append("")
    return "\n".join(lines).strip()


def main() -> None:
    """Runs what is not yet known, and writes the table after each."""
    options = parser(__doc__, "subjectivity")
    options.add_argument("--data", type=Path, required=True, help="folder with subj.jsonl")
    options.add_argument("--labels", type=int, nargs="+", default=list(OWN_SETS))
    options.add_argument("--test", type=int, default=500, help="sentences to classify")
    options.add_argument("--draws", type=int, default=10, help="rationales for each of them")
    options.add_argument("--shots", type=int, default=10, help="labelled sentences in a prompt")
    options.add_argument("--steps", type=int, default=60, help="training steps of the guide")
    options.add_argument(
        "--temperature",
        type=float,
        default=texts.TEMPERATURE,
        help="of the label after a rationale",
    )
    options.add_argument("--objective", default="vargrad", help="of the guide")
    options.add_argument("--learning-rate", type=float, default=1e-3, help="of the guide")
    options.add_argument("--observations", type=int, default=10, help="sentences in a step")
    options.add_argument("--batch", type=int, default=8, help="draws for each of them")
    options.add_argument(
        "--sharper-temperature",
        type=float,
        default=0.1,
        help="of the label, for the guide that is trained further",
    )
    options.add_argument("--sharper-steps", type=int, default=30, help="of it")
    options.add_argument("--sharper-batch", type=int, default=16, help="its draws for a sentence")
    options.add_argument("--supervised-rounds", type=int, default=3)
    options.add_argument("--rounds", type=int, default=3, help="of EM")
    options.add_argument("--fit-steps", type=int, default=6, help="of the guide in a round of EM")
    options.add_argument(
        "--resample", type=int, default=4, help="draws that a classifier step takes"
    )
    options.add_argument("--m-steps", type=int, default=10, help="of the classifier in a round")
    options.add_argument("--em-rate", type=float, default=5e-4, help="learning rate of these")
    ways = [*UNTRAINED, *TRAINED]
    options.add_argument("--ways", nargs="+", default=ways, choices=ways)
    args = options.parse_args()
    args.work = args.work or args.out / "subjectivity-work"
    free = ("ways", "seeds", "labels", "out", "work", "data", "task", "test")
    kept = Runs(args.work, {k: v for k, v in vars(args).items() if k not in free})
    task: Task | None = None
    found: Found = {}
    # By seeds, so that a run that is cut off has a whole table of the seeds before.
    for seed in args.seeds:
        for count in args.labels:
            for way in args.ways:
                own, of_seed = (0, args.seeds[0]) if way in UNTRAINED else (count, seed)
                name = f"result-{way}-{own}-{of_seed}-{args.test}"
                known = kept.get(name)
                if known is None:
                    task = task or Task(lp.LM(args.model, device=args.device), args, kept)
                    known = kept.put(name, task.run(way, own, of_seed))
                found.setdefault(way, {}).setdefault(own, {})[of_seed] = known
                table = [row(w, f, args.labels) for w, f in found.items()]
                write(args, table, found, samples(found))


if __name__ == "__main__":
    main()
