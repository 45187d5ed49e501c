"""Sentence continuation: likely next sentences that differ, for prompts not seen.

The target is p(sentence)^(1/T) over whole sentences. One guide learns it for many prompts, T after
T, each going on from the one before. Beside it stand the LM's tokens at several temperatures,
nucleus sampling, the best of several draws, greedy decoding, beams and diverse beams, at as many
draws as the guide has and at five times as many. Finished parts are kept, and a training that was
cut off goes on from its checkpoint.

    python benchmarks/tasks/continuation.py --data DIR
    python benchmarks/tasks/continuation.py --help
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from notes import note
from results import Runs, example, parser, write

import langppl as lp
from langppl.guides.gflownet import GUIDE_FILE
from langppl.program import Program

import decoders  # isort: skip
import measures  # isort: skip - results finds the folder of these
from embedding import Embedder  # isort: skip

continuation = example("continuation")

PART = 10
"""Prompts that are answered for at once; what is kept when a run is cut off."""

MORE = 5
"""Draws at the larger compute, for each at the smaller."""

Answers = dict[str, list[Any]]
"""Of one prompt: the texts, and log p of each under the LM, nats; None if it is unfinished."""


def read_prompts(folder: Path, split: str, count: int) -> list[str]:
    """The first prompts of a split."""
    path = folder / "prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    own = [r["prompt"] for r in rows if r["split"] == split][:count]
    if len(own) < count:
        raise ValueError(f"{path} has {len(own)} prompts of split {split!r}, not {count}")
    return own


def _answers(pairs: Sequence[tuple[str, float]], tokens: int = 0) -> Answers:
    return {
        "texts": [str(z) for z, _ in pairs],
        "logs": [float(w) if math.isfinite(w) else None for _, w in pairs],
        "tokens": [tokens],
    }


def chain(temperatures: Sequence[float], at: int) -> str:
    """A name for the guide of a temperature: what it learned before is a part of it."""
    return "-".join(["guide", *(f"{t:g}" for t in temperatures[: at + 1])])


def trained(
    lm: lp.LM, temperatures: Sequence[float], at: int, seed: int, args: argparse.Namespace
) -> lp.GFlowNetGuide:
    """The guide of a temperature, from its folder if it was trained before."""
    temperature = temperatures[at]
    folder = args.work / f"{chain(temperatures, at)}-{seed}"
    if (folder / "guide" / GUIDE_FILE).is_file():
        return lp.GFlowNetGuide.load(folder / "guide", lm)
    if at:
        guide = trained(lm, temperatures, at - 1, seed, args)
    else:
        guide = lp.GFlowNetGuide(lm, rank=args.rank, seed=seed)
    known = read_prompts(args.data, "train", args.train + args.held_out)
    started = time.monotonic()
    continuation.train(
        guide,
        continuation.make_continuation(lm, temperature, max_tokens=args.max_tokens),
        known[: args.train],
        args.steps,
        observations=args.observations,
        batch=args.batch,
        learning_rate=args.learning_rate,
        every=args.every,
        validation=[(p,) for p in known[args.train :]] or None,
        validate_every=max(args.steps // 2, 1),
        validation_samples=4,
        checkpoint=folder / "steps",
        checkpoint_every=5,
    )
    spent = time.monotonic() - started
    print(f"guide at {temperature:g}, seed {seed}: {args.steps} steps, {spent:.0f} s", flush=True)
    guide.save(folder / "guide")
    return guide


def sources(
    lm: lp.LM, seed: int, args: argparse.Namespace
) -> dict[str, Callable[[list[Program], int], list[Answers]]]:
    """Where sentences come from: name → what answers for programs of the LM itself."""
    many = MORE * args.keep

    def of_guide(at: int) -> Callable[[list[Program], int], list[Answers]]:
        kept: list[lp.GFlowNetGuide] = []

        def answer(programs: list[Program], key: int) -> list[Answers]:
            if not kept:
                kept.append(trained(lm, args.temperatures, at, seed, args))
            rows = continuation.draws(kept[0], programs, programs, many, key)
            return [_answers(row, sum(len(z.ids or ()) for z, _ in row)) for row in rows]

        return answer

    def of_decoder(decode: Callable[..., Any]) -> Callable[[list[Program], int], list[Answers]]:
        def answer(programs: list[Program], key: int) -> list[Answers]:
            found = []
            for k, program in enumerate(programs):
                pairs, tokens = decode(program.sites["sentence"].fn, (key, k))
                found.append(_answers([(f.text, f.log_prob) for f in pairs], tokens))
            return found

        return answer

    def sampled(**options: float) -> Callable[[list[Program], int], list[Answers]]:
        return of_decoder(lambda fn, key: decoders.sample(fn, many, key, **options))

    def beams(width: int, groups: int = 1) -> Callable[[list[Program], int], list[Answers]]:
        penalty = args.penalty if groups > 1 else 0.0
        return of_decoder(lambda fn, key: decoders.beam(fn, width, groups=groups, penalty=penalty))

    return {
        **{f"guide {t:g}": of_guide(k) for k, t in enumerate(args.temperatures)},
        **{f"temperature {t:g}": sampled(temperature=t) for t in args.token_temperatures},
        **{f"nucleus {p:g}": sampled(top_p=p) for p in args.nuclei},
        "greedy": beams(1),
        "beam": beams(args.keep),
        "diverse beam": beams(args.keep, args.keep),
        f"beam ×{MORE}": beams(many),
        f"diverse beam ×{MORE}": beams(many, args.keep),
    }


def best_of(answers: Answers, n: int, draws: int) -> Answers:
    """The likeliest of every n draws, of the first so many."""
    texts, logs = [], []
    for first in range(0, draws - n + 1, n):
        own = range(first, min(first + n, len(answers["logs"])))
        best = max(own, key=lambda k: -math.inf if (w := answers["logs"][k]) is None else w)
        texts.append(answers["texts"][best])
        logs.append(answers["logs"][best])
    return {"texts": texts, "logs": logs}


def ways(found: Mapping[str, list[Answers]], keep: int) -> dict[str, tuple[int, list[Answers]]]:
    """Name → how many times the guide's draws it takes, and its answers for each prompt."""
    many = MORE * keep
    shown: dict[str, tuple[int, list[Answers]]] = {}
    for name, rows in found.items():
        kind = name.split(" ")[0]
        if kind in ("guide", "temperature", "nucleus"):
            shown[name] = (1, [best_of(a, 1, keep) for a in rows])
            if name == "temperature 1":
                for n in (2, 4):
                    if keep >= 2 * n:
                        shown[f"best of {n}"] = (1, [best_of(a, n, keep) for a in rows])
            shown[f"{name}, best of {MORE}"] = (MORE, [best_of(a, MORE, many) for a in rows])
        else:
            times = MORE if name.endswith(f"×{MORE}") else 1
            shown[name] = (times, [{k: a[k][:keep] for k in ("texts", "logs")} for a in rows])
    return shown


FIGURES = ("log p", "best log p", "distance", "distinct", "distinct-2", "words", "unfinished")


def of_prompt(answers: Answers, embed: Embedder) -> dict[str, float]:
    """The figures of one prompt, of its finished sentences."""
    whole = [
        (t, w) for t, w in zip(answers["texts"], answers["logs"], strict=True) if w is not None
    ]
    count = len(answers["texts"])
    unfinished = 1.0 - len(whole) / count if count else 1.0
    if not whole:
        return {**dict.fromkeys(FIGURES, math.nan), "unfinished": unfinished}
    texts, logs = [t for t, _ in whole], [w for _, w in whole]
    return {
        "log p": float(np.mean(logs)),
        "best log p": max(logs),
        "distance": measures.mean_distance(embed(texts)),
        "distinct": measures.distinct_share(texts),
        "distinct-2": measures.distinct_grams(texts),
        "words": float(np.mean([len(measures.words(t)) for t in texts])),
        "unfinished": unfinished,
    }


def known_means(rows: np.ndarray) -> np.ndarray:
    """Means of columns without their NaNs; NaN for one that has nothing else."""
    return np.array(
        [c[np.isfinite(c)].mean() if np.isfinite(c).any() else math.nan for c in rows.T]
    )


def at_distance(curve: Sequence[tuple[float, float]], distance: float) -> float:
    """Log p of a family of decoders at a diversity, between its settings; NaN outside of them.

    Args:
        curve: mean distance and mean log p of each setting.
        distance: the diversity.
    """
    points = sorted(curve)
    if not points or not points[0][0] <= distance <= points[-1][0]:
        return math.nan
    return float(np.interp(distance, *zip(*points, strict=True)))


def gaps(
    figures: Mapping[str, np.ndarray], times: Mapping[str, int], prompts: int
) -> list[dict[str, str]]:
    """How much likelier the guide's sentences are at the diversity that they have.

    The error is the standard deviation over bootstrap samples of the prompts.

    Args:
        figures: way → shape [prompts, 2]: log p and distance.
        times: way → how many times the guide's draws it takes.
        prompts: their number.
    """
    families = {
        "nucleus": [w for w in figures if w.startswith("nucleus") and times[w] == 1],
        "temperature": [w for w in figures if w.startswith("temperature") and times[w] == 1],
        # One draw is the best of one.
        "best of N": [w for w in figures if w.startswith("best of") or w == "temperature 1"],
        f"nucleus, best of {MORE}": [
            w for w in figures if w.startswith("nucleus") and times[w] == MORE
        ],
        f"temperature, best of {MORE}": [
            w for w in figures if w.startswith("temperature") and times[w] == MORE
        ],
    }
    rng = np.random.default_rng(0)
    picks = [np.arange(prompts), *(rng.integers(prompts, size=(500, prompts)))]

    def gap(guide: str, family: list[str], rows: np.ndarray) -> float:
        means = {w: known_means(figures[w][rows]) for w in (guide, *family)}
        curve = [(means[w][1], means[w][0]) for w in family]
        return float(means[guide][0] - at_distance(curve, means[guide][1]))

    found = []
    for guide in figures:
        if not guide.startswith("guide"):
            continue
        row = {"way": guide}
        for name, family in families.items():
            whole, *others = [gap(guide, family, p) for p in picks]
            known = np.array(others)[np.isfinite(others)]
            row[name] = "–" if math.isnan(whole) else f"{whole:+.2f} ± {known.std():.2f}"
        found.append(row)
    return found


def picture(figures: Mapping[str, np.ndarray], times: Mapping[str, int], path: Path) -> None:
    """Log p against diversity, a line for each family."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"].colors)
    families: dict[str, list[tuple[float, float, str]]] = {}
    for way, rows in figures.items():
        y, x = known_means(rows)
        if math.isnan(x):  # a single sentence has no pairs
            x = 0.0
        head, _, tail = way.partition(", ")
        kind, _, setting = head.rpartition(" ")
        if head.startswith(("best of", "greedy", "beam", "diverse")):
            kind, setting = ("best of N", head) if head.startswith("best of") else (head, "")
        families.setdefault(f"{kind}, {tail}" if tail else kind, []).append((x, y, setting))
    for name, points in families.items():
        points.sort()
        guide = name.startswith("guide")
        axes.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            marker="o" if guide else "s" if len(points) > 1 else "^",
            linewidth=2.2 if guide else 1.0,
            linestyle="--" if f"best of {MORE}" in name else "-",
            label=name,
        )
        for x, y, setting in points:
            axes.annotate(setting, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel("mean distance between two sentences of a prompt (1 − cosine)")
    axes.set_ylabel("mean log p of a sentence, nats")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs what is not yet known, and writes the table and the picture."""
    options = parser(__doc__, "continuation")
    options.set_defaults(seeds=[0])
    options.add_argument("--data", type=Path, required=True, help="folder with prompts.jsonl")
    options.add_argument("--train", type=int, default=200, help="prompts to train on")
    options.add_argument("--held-out", type=int, default=10, help="prompts to validate on")
    options.add_argument("--unseen", type=int, default=50, help="prompts to answer for")
    options.add_argument("--keep", type=int, default=8, help="sentences for each prompt")
    options.add_argument("--steps", type=int, default=100, help="training steps of each T")
    options.add_argument("--observations", type=int, default=4, help="prompts in a step")
    options.add_argument("--batch", type=int, default=8, help="draws for each prompt in a step")
    options.add_argument("--every", type=int, default=2, help="prefixes whose reward is taken")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--learning-rate", type=float, default=5e-4)
    options.add_argument("--max-tokens", type=int, default=30, help="of a sentence")
    options.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[0.9, 0.8, 0.7],
        help="T of the guides, in the order of training",
    )
    options.add_argument(
        "--token-temperatures", type=float, nargs="+", default=[0.4, 0.6, 0.8, 1.0]
    )
    options.add_argument("--nuclei", type=float, nargs="+", default=[0.5, 0.7, 0.85, 0.95])
    options.add_argument("--penalty", type=float, default=1.0, help="of diverse beams, nats")
    options.add_argument("--shown", type=int, default=4, help="prompts of which draws are shown")
    args = options.parse_args()
    args.work = args.work or args.out / "continuation-work"
    free = ("seeds", "out", "work", "shown", "data", "task", "unseen", "temperatures", "nuclei")
    kept = Runs(
        args.work,
        {k: v for k, v in vars(args).items() if k not in (*free, "token_temperatures")},
    )
    lm = lp.LM(args.model, device=args.device)
    plain = continuation.make_continuation(lm, max_tokens=args.max_tokens)
    prompts = read_prompts(args.data, "test", args.unseen)
    programs = [lp.compile(plain, p) for p in prompts]
    chains = {f"guide {t:g}": chain(args.temperatures, k) for k, t in enumerate(args.temperatures)}
    found: dict[int, dict[str, list[Answers]]] = {}
    for seed in args.seeds:
        found[seed] = {}
        for name, answer in sources(lm, seed, args).items():
            own: list[Answers] = []
            for first in range(0, len(programs), PART):
                part = programs[first : first + PART]
                label = f"{chains.get(name, name)}-{seed}-{first}-{len(part)}"
                known = kept.get(label) or kept.put(label, answer(part, 1_000 * seed + first))
                own += known
            found[seed][name] = own
            print(f"{name}, seed {seed}: done", flush=True)
    show(prompts, found, args)


def show(
    prompts: Sequence[str], found: dict[int, dict[str, list[Answers]]], args: argparse.Namespace
) -> None:
    """Measures, and writes the tables, the picture and some draws."""
    embed = Embedder(device=args.device)
    by_seed = {seed: ways(rows, args.keep) for seed, rows in found.items()}
    first = by_seed[args.seeds[0]]
    times = {way: n for way, (n, _) in first.items()}
    figures: dict[str, dict[str, np.ndarray]] = {}
    for way in first:
        measured = [[of_prompt(a, embed) for a in of[way][1]] for of in by_seed.values()]
        # A prompt counts once, whatever the number of seeds.
        figures[way] = {f: np.mean([[p[f] for p in m] for m in measured], axis=0) for f in FIGURES}
    forms = dict(
        zip(FIGURES, ("{:.2f}", "{:.2f}", *("{:.3f}",) * 3, "{:.1f}", "{:.3f}"), strict=True)
    )
    table = []
    for way, own in figures.items():
        row = {"way": way, "draws": f"×{times[way]}"}
        for f, form in forms.items():
            known = own[f][np.isfinite(own[f])]
            row[f] = form.format(known.mean()) if len(known) else "–"
            if f in ("log p", "distance") and len(known) > 1:
                row[f] += " ± " + form.format(known.std(ddof=1) / math.sqrt(len(known)))
        table.append(row)
    of_curves = {w: np.stack([f["log p"], f["distance"]], axis=1) for w, f in figures.items()}
    compared = gaps(of_curves, times, len(prompts))
    means = {
        w: {f: float(known_means(v[:, None])[0]) for f, v in own.items()}
        for w, own in figures.items()
    }
    tokens = {
        seed: {n: sum(a["tokens"][0] for a in rows) for n, rows in of.items()}
        for seed, of in found.items()
    }
    runs = {"figures": means, "tokens read": tokens, "gaps": compared}
    write(args, table, runs, samples(prompts[: args.shown], first))
    note(args, "gaps", "Log p above each family's at equal diversity, nats:", compared)
    picture(of_curves, times, args.out / "continuation.png")


def samples(
    prompts: Sequence[str], drawn: Mapping[str, tuple[int, list[Answers]]], each: int = 3
) -> str:
    """The first sentences of every way for some prompts, as Markdown."""
    lines = []
    for k, prompt in enumerate(prompts):
        lines += [f"**{prompt}** […]", ""]
        for way, (_, rows) in drawn.items():
            pairs = list(zip(rows[k]["texts"], rows[k]["logs"], strict=True))[:each]
            shown = "; ".join(
                f"“{' '.join(t.split())}”" + (" (unfinished)" if w is None else f" ({w:.1f})")
                for t, w in pairs
            )
            lines.append(f"- *{way}*: {shown}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
