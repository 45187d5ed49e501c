"""Objectives at equal wall time: guides trained on some stories, asked for others.

The fourth sentence of a five-sentence story is latent, the first three are given and the fifth is
observed. Every way trains a guide from scratch for the same time; then each answers for stories it
has not seen. Where a run was cut off it goes on: trainings have checkpoints, finished ways are kept
in the JSON. The stories are not part of langppl (docs/benchmarks.md says where they come from).

    python benchmarks/objectives.py --data DIR
    python benchmarks/objectives.py --help
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np

import langppl as lp
from langppl.distributions import Text
from langppl.guides import Guide, PriorGuide, PromptedGuide
from langppl.guides.base import log_q_together
from langppl.guides.context import ContextInfo, observations_first
from langppl.guides.settings import BALANCE
from langppl.inference.sites import log_weight
from langppl.program import Program, run_together
from langppl.program.execution import Execution, score
from langppl.program.scheduler import run

WAYS: dict[str, list[tuple[str, float]]] = {
    "subtb": [("subtb", 1.0)],
    "vargrad": [("vargrad", 1.0)],
    "tb": [("tb", 1.0)],
    "db": [("db", 1.0)],
    "forward_kl": [("forward_kl", 1.0)],
    "forward_kl, subtb": [("forward_kl", 0.3), ("subtb", 0.7)],
    "forward_kl, vargrad": [("forward_kl", 0.3), ("vargrad", 0.7)],
    "reverse_kl": [("reverse_kl", 1.0)],
    "rao_blackwell": [("rao_blackwell", 1.0)],
    "rao_blackwell and pairs": [("rao_blackwell", 1.0)],
    "rao_blackwell, from the prior": [("rao_blackwell", 1.0)],
    "reward": [("reward", 1.0)],
    "rws": [("rws", 1.0)],
    "mle": [("mle", 1.0)],
}
"""Objectives one after the other, each with its share of the time."""

SIMULATED = {"rao_blackwell and pairs": 0.25}
"""Share of each batch that is simulated from the model, latents and data."""

FROM_PRIOR = ("rao_blackwell, from the prior",)
"""Ways whose untrained guide is the prior."""

CHUNK = 128
"""Draws at once."""


@dataclass
class Draws:
    """What a guide drew for one story.

    Attributes:
        log_weights: shape [n], nats.
        log_endings: log p(fifth | first four) of each, nats; NaN for an impossible one.
        texts: the fourth sentences.
    """

    log_weights: np.ndarray
    log_endings: np.ndarray
    texts: list[Text]

    @property
    def possible(self) -> np.ndarray:
        return np.isfinite(self.log_weights)


def make_story(lm: lp.LM | lp.TrainableLM) -> Any:
    def story(beginning: str, ending: str) -> str:
        middle = lp.sample(
            "middle",
            lp.LMString(lm, beginning, stop=(".", "!", "?"), max_tokens=20, truncate="reject"),
        )
        lp.sample("ending", lp.LMString(lm, f"{beginning}{middle}"), obs=ending)
        return middle

    return story


def whole_story(info: ContextInfo) -> str:
    """The story with a gap, then its beginning again: what the guides read."""
    beginning, ending = info.args
    return f"{beginning} [...] {str(ending).strip()}\n\nThe full story:\n\n{beginning}"


def without_ending(info: ContextInfo) -> str:
    """`whole_story` where nobody knows how the story ends."""
    beginning = info.args[0]
    return f"{beginning} [...]\n\nThe full story:\n\n{beginning}"


CONTEXTS = {"whole story": whole_story, "ending first": observations_first}
"""What the guides may read."""


def read_stories(folder: Path, split: str, count: int) -> list[tuple[str, str, str]]:
    """Beginning, fourth sentence and ending of the first stories of a split."""
    path = folder / "stories.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    own = [r["sentences"] for r in rows if r["split"] == split][:count]
    if len(own) < count:
        raise ValueError(f"{path} has {len(own)} stories of split {split!r}, not {count}")
    return [(" ".join(s[:3]), f" {s[3]}", f" {s[4]}") for s in own]


def draw(guide: Guide, programs: Sequence[Program], samples: int, seed: int) -> list[Draws]:
    """Weighted draws for each program."""
    wanted = [(k, i) for k in range(len(programs)) for i in range(samples)]
    executions: list[Execution] = []
    for first in range(0, len(wanted), CHUNK):
        pairs = [
            (programs[k], guide.chooser(programs[k], (seed, "evaluate", k, i)))
            for k, i in wanted[first : first + CHUNK]
        ]
        executions += run_together(pairs, score)
    found = []
    for k in range(len(programs)):
        own = executions[k * samples : (k + 1) * samples]
        weights = np.array([log_weight(e) for e in own])
        endings = np.array([e.sites["ending"].log_prob or np.nan for e in own], dtype=float)
        endings[~np.isfinite(weights)] = np.nan
        found.append(Draws(weights, endings, [e.latents["middle"] for e in own]))
    return found


def log_mean(log_weights: np.ndarray) -> float:
    """Log of the mean weight, nats: an estimate of the log evidence, too low on average."""
    return float(np.logaddexp.reduce(log_weights) - np.log(len(log_weights)))


def resampled_endings(prior: Sequence[Draws], seed: int) -> float:
    """Mean log p(fifth | first four) of one draw from the prior's, chosen by its weight."""
    rng = np.random.default_rng(seed)
    found = []
    for d in prior:
        if d.possible.any():
            share = np.exp(d.log_weights - np.logaddexp.reduce(d.log_weights))
            found.append(d.log_endings[rng.choice(len(share), p=share / share.sum())])
    return float(np.mean(found))


def of_unseen(
    draws: Sequence[Draws], references: Sequence[float], names: Mapping[str, Any]
) -> dict[str, Any]:
    """The figures of one guide on stories that it has not seen."""
    weights = np.concatenate([d.log_weights for d in draws])
    possible = np.isfinite(weights)
    means = [d.log_weights[d.possible].mean() for d in draws if d.possible.any()]
    gaps = [
        r - (d.log_weights[d.possible].mean() + np.log(d.possible.mean()))
        for d, r in zip(draws, references, strict=True)
        if d.possible.any()
    ]
    # One draw a story on average: stories whose draws are seldom possible count as much.
    endings = [np.nanmean(d.log_endings) for d in draws if d.possible.any()]
    distinct = [len({str(t) for t in d.texts}) / len(d.texts) for d in draws]
    return {
        **names,
        "log weight": float(np.mean(means)),
        "± error": float(np.std(means, ddof=1) / np.sqrt(len(means))),
        "impossible": f"{1.0 - possible.mean():.1%}",
        "log p(fifth), raw draw": float(np.mean(endings)),
        "KL(q‖p) ≥": float(np.mean(gaps)),
        "distinct": f"{np.mean(distinct):.0%}",
    }


def train(
    lm: lp.LM, way: str, rows: list, held_out: list, args: argparse.Namespace
) -> tuple[lp.GFlowNetGuide, int]:
    """A guide trained for the time that every way has; and its steps."""
    story = make_story(lm)
    pairs = [(b, e) for b, _, e in rows]
    context = CONTEXTS[args.context]
    # What the LM makes of the context by itself is taken away again; what the adapter makes is not.
    guidance = lp.Guidance(1.0, without=context) if way in FROM_PRIOR else None
    made = partial(lp.GFlowNetGuide, lm, rank=args.rank, context=context, guidance=guidance)
    guide = made(seed=args.seed)
    total = 0
    for k, (objective, share) in enumerate(WAYS[way]):
        options: dict[str, Any] = {
            "objective": objective,
            "observations": args.observations,
            "batch": args.batch,
            "learning_rate": args.learning_rate,
            "betas": (0.9, 0.99),
            "schedule": lp.RewardSchedule(start=args.power),
            "simulated_share": SIMULATED.get(way, 0.0),
        }
        if objective in BALANCE:
            options.update(sampling_temperature=(1.0, 1.3), every=args.every)
        if objective == "mle":
            options["given"] = [{"middle": m} for _, m, _ in rows]
        place = args.work / f"{way.replace(', ', '-')}-{k}"
        known = place / "steps.json"
        if known.is_file():
            steps = json.loads(known.read_text())["steps"]
        else:
            # How long a step takes is seen on a guide that is thrown away.
            trial = made(seed=args.seed + 1)
            trial.fit(story, pairs, steps=2, progress=False, **options)
            started = time.monotonic()
            trial.fit(story, pairs, steps=args.trial, progress=False, **options)
            each = (time.monotonic() - started) / args.trial
            steps = max(2, int(60 * args.minutes * share / each))
            place.mkdir(parents=True, exist_ok=True)
            known.write_text(json.dumps({"steps": steps, "seconds": each}))
        guide.fit(
            story,
            pairs,
            steps=steps,
            validation=[(b, e) for b, _, e in held_out] or None,
            validate_every=max(steps // 4, 1),
            validation_samples=8,
            checkpoint=place,
            checkpoint_every=5,
            **options,
        )
        total += steps
    guide.save(args.work / way.replace(", ", "-") / "guide")
    return guide, total


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with stories.jsonl")
    options.add_argument("--train", type=int, default=200, help="stories to train on")
    options.add_argument("--unseen", type=int, default=100, help="stories to answer for")
    options.add_argument("--held-out", type=int, default=0, help="stories to validate on")
    options.add_argument("--minutes", type=float, default=20.0, help="of training for each way")
    options.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    options.add_argument(
        "--trained",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="guides to judge that were trained and saved before, on the same context",
    )
    options.add_argument("--context", default="whole story", choices=CONTEXTS, help="of guides")
    options.add_argument("--samples", type=int, default=8, help="draws for each unseen story")
    options.add_argument("--pairs", type=int, default=40, help="simulated pairs for KL(p‖q)")
    options.add_argument("--observations", type=int, default=4, help="stories in a step")
    options.add_argument("--batch", type=int, default=8, help="draws for each story in a step")
    options.add_argument("--every", type=int, default=2, help="prefixes whose reward is taken")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--power", type=float, default=1.0, help="of the reward at the first step")
    options.add_argument("--trial", type=int, default=3, help="steps by which time is measured")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--work", type=Path, help="folder of checkpoints and guides")
    options.set_defaults(runs=1)  # the spread is over stories, observations or evidences
    args = options.parse_args()
    args.work = args.work or args.out / "objectives-work"
    lm = lp.LM(args.lm)
    story = make_story(lm)
    # Held-out stories come after those to train on, out of the same split.
    known = read_stories(args.data, "train", args.train + args.held_out)
    rows, held_out = known[: args.train], known[args.train :]
    programs = [lp.compile(story, b, e) for b, _, e in read_stories(args.data, "test", args.unseen)]

    def simulated(k: int) -> Any:
        return programs[k].simulated((args.seed, "pair", k))

    pairs = run([lambda k=k: simulated(k) for k in range(min(args.pairs, len(programs)))])
    log_joints = [float(p.log_joint(latents)) for latents, p in pairs]
    guides: dict[str, Guide] = {
        "prior": PriorGuide(),
        "prompted": PromptedGuide(),
        # Where the trainings begin.
        **{f"prompted, {name}": PromptedGuide(context) for name, context in CONTEXTS.items()},
    }
    drawn: dict[str, list[Draws]] = {
        name: draw(guide, programs, 10 if name == "prior" else args.samples, args.seed)
        for name, guide in guides.items()
    }
    steps: dict[str, int | str] = dict.fromkeys(guides, 0)
    on_pairs: dict[str, list[np.ndarray]] = {}
    finish(guides, drawn, on_pairs, steps, pairs, log_joints, args)
    for name, _, folder in (found.partition("=") for found in args.trained):
        guides[name] = lp.GFlowNetGuide.load(folder, lm, context=CONTEXTS[args.context])
        drawn[name] = draw(guides[name], programs, args.samples, args.seed)
        steps[name] = "–"
        finish(guides, drawn, on_pairs, steps, pairs, log_joints, args)
    for way in args.ways:
        guides[way], steps[way] = train(lm, way, rows, held_out, args)
        drawn[way] = draw(guides[way], programs, args.samples, args.seed)
        finish(guides, drawn, on_pairs, steps, pairs, log_joints, args)


def finish(
    guides: Mapping[str, Any],
    drawn: Mapping[str, list[Draws]],
    on_pairs: dict[str, list[np.ndarray]],
    steps: Mapping[str, int | str],
    pairs: Sequence[Any],
    log_joints: Sequence[float],
    args: argparse.Namespace,
) -> None:
    """Prints and writes what is known so far."""
    count = len(drawn["prior"])
    # Unbiased for the evidence, whichever guides they are from; its log is too low on average.
    references = [
        log_mean(np.concatenate([d[k].log_weights for d in drawn.values()])) for k in range(count)
    ]
    for name in guides:
        if name not in on_pairs:
            found = draw(guides[name], [p for _, p in pairs], args.samples, args.seed + 1)
            on_pairs[name] = [d.log_weights for d in found]
    evidence = [
        log_mean(np.concatenate([w[k] for w in on_pairs.values()])) for k in range(len(pairs))
    ]
    rows = []
    for name, guide in guides.items():
        row = of_unseen(drawn[name], references, {"way": name, "steps": steps[name]})
        qs = log_q_together(guide, [(p, x) for x, p in pairs])
        forward = [j - z - q for j, z, q in zip(log_joints, evidence, qs, strict=True)]
        row["KL(p‖q) ≤"] = float(np.mean(forward))
        rows.append(row)
    chosen = resampled_endings(drawn["prior"], args.seed)
    rows[0]["log p(fifth), best of 10"] = chosen
    for row in rows[1:]:
        row["log p(fifth), best of 10"] = "–"
    common.report("objectives", list(rows[0]), rows, args)


if __name__ == "__main__":
    main()
