"""Story infilling: the fourth of five sentences from those around it, for stories not seen.

Prompting, supervised fine-tuning on true fourth sentences, importance sampling, sequential Monte
Carlo and GFlowNet guides, trained on the same stories for the same number of steps (or, with
--minutes, for the same time), all over the program of benchmarks/objectives.py. Finished parts are
kept, and a training that was cut off goes on from its checkpoint.

    python benchmarks/tasks/infilling.py --data DIR
    python benchmarks/tasks/infilling.py --data DIR --guide FOLDER
    python benchmarks/tasks/infilling.py --help
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from notes import note
from peft import PeftModel
from results import Runs, parser, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import langppl as lp
from langppl.guides import Guide, PriorGuide, PromptedGuide
from langppl.guides.context import ContextInfo
from langppl.guides.gflownet import GUIDE_FILE
from langppl.lm.prompts import Prompt
from langppl.lm.weights import resolve
from langppl.program import Program

import measures  # isort: skip - results finds the folder of these
import objectives  # isort: skip
from embedding import Embedder  # isort: skip
from objectives import draw, log_mean, make_story, read_stories, whole_story  # isort: skip

UNTRAINED = ("prior", "prompted", "importance", "smc")
TRAINED = ("supervised", "gflownet", "gflownet, supervised start")
GUIDE = "guide"
"""The way of a guide that is given."""

PART = 10
"""Stories that are answered for at once; what is kept when a run is cut off."""

COLUMNS = {
    "ELBO": "{:.2f}",
    "log p(s5)": "{:.2f}",
    "similarity": "{:.3f}",
    "BLEU-4": "{:.4f}",
    "GLEU-4": "{:.4f}",
    "GLEU to s5": "{:.3f}",
    "distinct": "{:.2f}",
    "distance": "{:.3f}",
    "impossible": "{:.3f}",
}
Found = list[dict[str, Any]]
"""For each draw its text, its log weight and log p(s5 | s1..s4), nats; None for −inf."""


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def raw(guide: Guide, programs: Sequence[Program], samples: int, seed: int) -> list[Found]:
    """Draws of a guide as they come."""
    return [
        [
            {"text": str(t), "weight": _number(w), "ending": _number(e)}
            for t, w, e in zip(d.texts, d.log_weights, d.log_endings, strict=True)
        ]
        for d in draw(guide, programs, samples, seed)
    ]


def chosen(
    texts: Sequence[str], weights: np.ndarray, endings: np.ndarray, evidence: float, key: Any
) -> dict[str, Any]:
    """One of several weighted draws, taken by weight; its own weight is their estimate."""
    if not np.isfinite(weights).any():
        return {"text": str(texts[0]), "weight": None, "ending": None}
    share = np.exp(weights - np.logaddexp.reduce(weights))
    k = np.random.default_rng(key).choice(len(share), p=share / share.sum())
    return {"text": str(texts[k]), "weight": evidence, "ending": float(endings[k])}


def importance(programs: Sequence[Program], samples: int, particles: int, seed: int) -> list[Found]:
    """One draw of every so many from the prior, by weight."""
    found = []
    for k, d in enumerate(draw(PriorGuide(), programs, samples * particles, seed)):
        own = []
        for i in range(samples):
            part = slice(i * particles, (i + 1) * particles)
            weights = d.log_weights[part]
            evidence = log_mean(weights)
            own.append(chosen(d.texts[part], weights, d.log_endings[part], evidence, (seed, k, i)))
        found.append(own)
    return found


def smc(
    programs: Sequence[Program], samples: int, particles: int, every: int, seed: int
) -> list[Found]:
    """One particle of every run of sequential Monte Carlo, by weight."""
    found = []
    for k, program in enumerate(programs):
        own = []
        for i in range(samples):
            run = lp.infer(
                program,
                method="smc",
                twist="lookahead",
                num_samples=particles,
                every=every,
                seed=1_000_000 * seed + 1_000 * k + i,
                progress=False,
            )
            texts = [row["middle"] for row in run.samples]
            # No ending was scored where every particle died.
            endings = run.site_log_probs.get("ending", np.full(particles, np.nan))
            own.append(chosen(texts, run.log_weights, endings, run.log_evidence, (seed, k, i)))
        found.append(own)
    return found


# -- training ---------------------------------------------------------------------------------


def as_asked(info: ContextInfo) -> Prompt:
    """What the author reads: what the LM reads."""
    return info.prompt


def author(args: argparse.Namespace) -> lp.LM:
    """The LM that tells the stories: as it is, or after it has learned their manner.

    Maximum likelihood of the true fourth and fifth sentences, each after what stands before it;
    then it is an LM of its own, which every way begins with.
    """
    dtype = getattr(torch, args.dtype)
    if not args.author_steps:
        return lp.LM(args.model, device=args.device, dtype=dtype)
    folder = args.work / "author"
    if not (folder / "guide" / GUIDE_FILE).is_file():
        lm = lp.LM(args.model, device=args.device, dtype=dtype)
        rows = read_stories(args.data, "train", args.train)
        rules = {"stop": (".", "!", "?"), "truncate": "reject"}

        def tell(beginning: str) -> None:
            middle = lp.sample("middle", lp.LMString(lm, beginning, max_tokens=20, **rules))
            lp.sample("ending", lp.LMString(lm, f"{beginning}{middle}", max_tokens=40, **rules))

        learner = lp.GFlowNetGuide(lm, rank=args.rank, context=as_asked, seed=0)
        learner.fit(
            tell,
            [(b,) for b, _, _ in rows],
            objective="mle",
            given=[{"middle": m, "ending": e} for _, m, e in rows],
            steps=args.author_steps,
            observations=args.observations,
            batch=2,
            learning_rate=args.author_rate,
            checkpoint=folder / "state",
        )
        learner.save(folder / "guide")
    if not (folder / "lm" / "config.json").is_file():
        merge(args.model, folder / "guide", folder / "lm")
    return lp.LM(folder / "lm", device=args.device, dtype=dtype)


def merge(model: str, adapter: Path, folder: Path) -> None:
    """Writes an LM whose weights hold what an adapter has learned."""
    source = resolve(model)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    whole = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    part = folder.with_name(folder.name + ".part")
    whole.save_pretrained(part)
    AutoTokenizer.from_pretrained(source).save_pretrained(part)
    part.replace(folder)


def phases(way: str, args: argparse.Namespace) -> list[tuple[str, float]]:
    """Objectives one after the other, each with its share of the steps."""
    own = objectives.WAYS[args.objective]
    if way == "supervised":
        return [("mle", 1.0)]
    if way == "gflownet":
        return own
    return [("mle", 0.3), (own[-1][0], 0.7)]


def train(lm: lp.LM, way: str, seed: int, args: argparse.Namespace) -> lp.GFlowNetGuide:
    """A guide of a way, from its folder if it was trained before."""
    folder = args.work / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
    if (folder / "guide" / GUIDE_FILE).is_file():
        return lp.GFlowNetGuide.load(folder / "guide", lm, context=whole_story)
    rows = read_stories(args.data, "train", args.train + args.held_out)
    held_out = [(b, e) for b, _, e in rows[args.train :]]
    rows = rows[: args.train]
    story, pairs = make_story(lm), [(b, e) for b, _, e in rows]
    guide = lp.GFlowNetGuide(lm, rank=args.rank, context=whole_story, seed=seed)
    seconds = 0.0
    for k, (objective, share) in enumerate(phases(way, args)):
        options: dict[str, Any] = {
            "objective": objective,
            "observations": args.observations,
            "batch": args.batch,
            "learning_rate": args.learning_rate,
            "betas": (0.8, 0.95),
            "schedule": lp.RewardSchedule(start=args.power, until=1.0, end=args.end_power),
            "average": args.average,
            "sampling_temperature": (1.0, 1.3),
            "every": args.every,
        }
        if objective == "mle":
            options["given"] = [{"middle": m} for _, m, _ in rows]
        place = folder / str(k)
        steps = max(2, round(args.steps * share))
        if args.minutes is not None:
            steps = _steps(lm, story, pairs, options, 60 * args.minutes * share, place)
        started = time.monotonic()
        guide.fit(
            story,
            pairs,
            steps=steps,
            validation=held_out or None,
            validate_every=max(steps // 4, 1),
            validation_samples=4,
            checkpoint=place,
            checkpoint_every=5,
            **options,
        )
        seconds += time.monotonic() - started
        print(f"{way}, seed {seed}: {steps} steps of {objective}, {seconds:.0f} s", flush=True)
    guide.save(folder / "guide")
    return guide


def _steps(
    lm: lp.LM, story: Any, pairs: list, options: dict[str, Any], seconds: float, place: Path
) -> int:
    """How many steps a time is enough for, seen on a guide that is thrown away."""
    known = place / "steps.json"
    if not known.is_file():
        trial = lp.GFlowNetGuide(lm, context=whole_story)
        trial.fit(story, pairs, steps=1, progress=False, **options)
        started = time.monotonic()
        trial.fit(story, pairs, steps=3, progress=False, **options)
        each = (time.monotonic() - started) / 3
        place.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps({"steps": max(2, int(seconds / each)), "seconds": each}))
    return int(json.loads(known.read_text())["steps"])


def given_guide(lm: lp.LM, folder: Path) -> lp.GFlowNetGuide:
    """A guide that was trained before, with the context that it was trained with."""
    record = json.loads((folder / GUIDE_FILE).read_text(encoding="utf-8"))
    context = None if record["default_context"] else whole_story
    return lp.GFlowNetGuide.load(folder, lm, context=context)


def answer(
    lm: lp.LM, way: str, seed: int, args: argparse.Namespace
) -> Callable[[Sequence[Program], int], list[Found]]:
    """What draws fourth sentences in a way, for programs and a seed."""
    if way == "importance":
        return lambda ps, s: importance(ps, args.samples, args.particles, s)
    if way == "smc":
        return lambda ps, s: smc(ps, args.samples, args.particles, args.look_every, s)
    if way == "prior":
        guide: Guide = PriorGuide()
    elif way == "prompted":
        guide = PromptedGuide(whole_story)
    else:
        guide = given_guide(lm, args.guide) if way == GUIDE else train(lm, way, seed, args)
    return lambda ps, s: raw(guide, ps, args.samples, s)


# -- what is shown ----------------------------------------------------------------------------


def of_story(draws: Found, truth: str, ending: str, embed: Embedder) -> dict[str, float]:
    """The figures of one story; those of texts are of its possible draws."""
    possible = [d for d in draws if d["weight"] is not None]
    found = {"impossible": 1.0 - len(possible) / len(draws)}
    if not possible:
        return {**dict.fromkeys(COLUMNS, math.nan), **found}
    texts = [d["text"] for d in possible]
    vectors = embed(texts)
    return {
        "ELBO": float(np.mean([d["weight"] for d in possible]))
        + math.log(len(possible) / len(draws)),
        "log p(s5)": float(np.mean([d["ending"] for d in possible])),
        "similarity": float(np.mean(vectors @ embed([truth])[0])),
        "BLEU-4": float(np.mean([measures.bleu(t, truth) for t in texts])),
        "GLEU-4": float(np.mean([measures.gleu(t, truth) for t in texts])),
        # A sentence that says the ending before it makes it likely and is no story.
        "GLEU to s5": float(np.mean([measures.gleu(t, ending) for t in texts])),
        "distinct": measures.distinct_share(texts),
        "distance": measures.mean_distance(vectors),
        **found,
    }


def with_error(values: np.ndarray, form: str) -> str:
    """Mean over stories and its standard error."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "–"
    shown = form.format(known.mean())
    if len(known) > 1:
        shown += " ± " + form.format(known.std(ddof=1) / math.sqrt(len(known)))
    return shown


def differences(
    figures: dict[str, dict[str, np.ndarray]], names: Sequence[str]
) -> list[dict[str, str]]:
    """What each trained guide has more than prompting and supervision, paired by story."""
    rows = []
    for way in figures:
        if way in UNTRAINED or way == "supervised":
            continue
        for other in ("prompted", "supervised"):
            if other in figures:
                gaps = {n: figures[way][n] - figures[other][n] for n in names}
                shown = {n: with_error(gaps[n], COLUMNS[n]) for n in names}
                rows.append({"way": way, "less": other, **shown})
    return rows


def main() -> None:
    """Runs what is not yet known, and writes the table."""
    options = parser(__doc__, "infilling")
    options.set_defaults(seeds=[0])
    options.add_argument("--data", type=Path, required=True, help="folder with stories.jsonl")
    options.add_argument("--train", type=int, default=200, help="stories to train on")
    options.add_argument("--held-out", type=int, default=20, help="stories to validate on")
    options.add_argument("--unseen", type=int, default=100, help="stories to answer for")
    options.add_argument("--samples", type=int, default=8, help="answers for each story")
    options.add_argument("--particles", type=int, default=10, help="draws for one answer")
    options.add_argument("--look-every", type=int, default=4, help="tokens between SMC's looks")
    options.add_argument("--steps", type=int, default=150, help="training steps of each way")
    options.add_argument("--minutes", type=float, help="of training, in the place of --steps")
    options.add_argument(
        "--objective",
        default="forward_kl, subtb",
        choices=[w for w in objectives.WAYS if w != "mle"],
        help="of the guides, as in benchmarks/objectives.py",
    )
    options.add_argument("--observations", type=int, default=4, help="stories in a step")
    options.add_argument("--batch", type=int, default=8, help="draws for each story in a step")
    options.add_argument("--every", type=int, default=2, help="prefixes whose reward is taken")
    options.add_argument(
        "--power", type=float, default=1.0, help="of the reward at the first step of a guide"
    )
    options.add_argument("--end-power", type=float, default=1.0, help="the same at its last step")
    options.add_argument(
        "--average",
        type=float,
        default=0.0,
        help="share of the steps, the last ones, whose weights' mean a guide ends with",
    )
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument(
        "--author-steps",
        type=int,
        default=0,
        help="steps in which the LM first learns the manner of the stories, as in the paper",
    )
    options.add_argument("--author-rate", type=float, default=3e-4, help="learning rate of these")
    options.add_argument("--guide", type=Path, help="folder of a trained guide, as one more way")
    options.add_argument(
        "--ways", nargs="+", default=[*UNTRAINED, *TRAINED], choices=[*UNTRAINED, *TRAINED]
    )
    options.add_argument("--shown", type=int, default=6, help="stories of which draws are shown")
    args = options.parse_args()
    args.work = args.work or args.out / "infilling-work"
    ways = [*args.ways, *([GUIDE] if args.guide else [])]
    free = ("ways", "seeds", "out", "work", "shown", "data", "task", "guide", "unseen", "device")
    kept = Runs(args.work, {k: v for k, v in vars(args).items() if k not in free})
    lm = author(args)
    story = make_story(lm)
    rows = read_stories(args.data, "test", args.unseen)
    programs = [lp.compile(story, b, e) for b, _, e in rows]
    drawn: dict[tuple[str, int], list[Found]] = {}
    for way in ways:
        for seed in args.seeds:
            make = None
            own: list[Found] = []
            for first in range(0, len(programs), PART):
                part = programs[first : first + PART]
                name = f"{way}-{seed}-{first}-{len(part)}"
                if way == GUIDE:
                    name += f"-{args.guide.resolve().as_posix().replace('/', '_')}"
                found = kept.get(name)
                if found is None:
                    make = make or answer(lm, way, seed, args)
                    started = time.monotonic()
                    answers = make(part, 1_000 * seed + first)
                    spent = time.monotonic() - started
                    found = kept.put(name, {"answers": answers, "seconds": spent})
                own += found["answers"]
            drawn[way, seed] = own
    show(rows, drawn, args)


def show(
    rows: Sequence[tuple[str, str, str]],
    drawn: dict[tuple[str, int], list[Found]],
    args: argparse.Namespace,
) -> None:
    """Measures, and writes the tables and some draws."""
    embed = Embedder(device=args.device)
    figures: dict[str, dict[str, np.ndarray]] = {}
    runs: dict[str, Any] = {}
    for way in dict.fromkeys(w for w, _ in drawn):
        by_seed = {
            seed: [
                of_story(d, truth, end, embed)
                for d, (_, truth, end) in zip(found, rows, strict=True)
            ]
            for (w, seed), found in drawn.items()
            if w == way
        }
        # A story counts once, whatever the number of seeds.
        figures[way] = {
            c: np.mean([[f[c] for f in of] for of in by_seed.values()], axis=0) for c in COLUMNS
        }
        runs[way] = {
            seed: {c: float(np.nanmean([f[c] for f in of])) for c in COLUMNS}
            for seed, of in by_seed.items()
        }
    table = [
        {"way": way, **{c: with_error(found[c], form) for c, form in COLUMNS.items()}}
        for way, found in figures.items()
    ]
    names = ("ELBO", "log p(s5)", "similarity", "BLEU-4", "GLEU-4")
    gaps = differences(figures, names)
    first = {w: found for (w, s), found in drawn.items() if s == args.seeds[0]}
    write(args, table, {"figures": runs, "differences": gaps}, samples(rows[: args.shown], first))
    if gaps:
        note(args, "differences", "Differences, paired by story:", gaps)


def samples(
    rows: Sequence[tuple[str, str, str]], drawn: dict[str, list[Found]], each: int = 3
) -> str:
    """The first draws of every way for some stories, as Markdown."""
    lines = []
    for k, (beginning, truth, ending) in enumerate(rows):
        lines += [f"**{beginning} […]{ending}** (true:{truth})", ""]
        for way, found in drawn.items():
            shown = "; ".join(
                f"“{' '.join(d['text'].split())}”"
                + (" (unfinished)" if d["weight"] is None else "")
                for d in found[k][:each]
            )
            lines.append(f"- *{way}*: {shown}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
