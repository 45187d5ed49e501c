r"""The posterior of a missing sentence: three guides on three stories.

Each story has a beginning and an ending; the sentence between them is the latent. For each story
the posterior is estimated with the model itself as proposal (`prior`), with the untrained LM that
is shown the ending (`prompted`) and with a GFlowNet guide trained on that very story, and the
three are set side by side. Writes the posteriors as JSON and one picture.

    python examples/story_infilling.py --help
    python examples/story_infilling.py --reference      # the long run beside which the demo stands

Other methods on the same model, on a story of your own:

    langppl compare examples/story_infilling.py:make_story --arg "The door bell rang." \
        --arg " It was the mailman." --method importance --method smc:twist=lookahead
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import langppl as lp
from langppl.guides import ContextInfo
from langppl.inference import Comparison
from langppl.lm.prompts import Prompt
from langppl.plots import plot_log_weights, plot_training, save_figure

STORIES = {
    "door": ("The door bell rang.", " It was the mailman."),
    "glasses": ("Grandpa lost his glasses.", " They were on his head."),
    "baby": ("The baby cried.", " She drank the milk."),
}

STYLE = """The boy was tired. He slept. He felt better.

The dog was dirty. Dad washed it. It was clean.

"""
"""Stands before every story, so that the LM writes stories of three short sentences."""

REFERENCE = Path(__file__).parent / "story_reference.json"


def make_story(lm: lp.LM) -> Callable[[str, str], str]:
    """The model: a middle sentence between a beginning and an ending."""

    def story(beginning: str, ending: str) -> str:
        opening = f"{STYLE}{beginning}"
        middle = lp.sample(
            "middle", lp.LMString(lm, opening, stop=".", max_tokens=12, truncate="reject")
        )
        lp.sample("ending", lp.LMString(lm, f"{opening}{middle}"), obs=ending)
        return middle

    return story


def ending_log_prob(posterior: lp.Posterior) -> float:
    """Mean log p(ending | middle) over a guide's possible draws, nats."""
    possible = np.isfinite(posterior.log_weights)
    return float(posterior.site_log_probs["ending"][possible].mean())


def story_table(name: str, comparison: Comparison, reference: dict | None) -> Table:
    """The figures of one story."""
    beginning, ending = STORIES[name]
    title = f"{beginning} […]{ending}"
    if reference is not None:
        evidence = f"{reference['log_evidence']:.2f} ± {reference['error']:.2f}"
        title += f"   (reference log evidence {evidence} nats)"
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("guide")
    heads = (
        "log evidence",
        "ELBO",
        "gap",
        "sd",
        "ESS",
        "k",
        "impos-\nsible",
        "log p(end)",
        "dist.",
    )
    for head in heads:
        table.add_column(head, justify="right")
    table.add_column("likeliest middles", overflow="fold", min_width=34)
    for row in comparison.rows():
        posterior = comparison.posteriors[row["guide"]]
        gap = (
            "–" if reference is None else f"{reference['log_evidence'] - row['elbo_possible']:.2f}"
        )
        top = list(posterior.probabilities("middle").items())[:3]
        table.add_row(
            row["guide"],
            f"{row['log_evidence']:.2f} ± {row['error']:.2f}" + ("" if row["reliable"] else " (?)"),
            f"{row['elbo_possible']:.2f}",
            gap,
            f"{row['sd']:.2f}",
            f"{row['ess']:.1f}",
            f"{row['pareto_k']:.2f}",
            f"{row['impossible']:.1%}",
            f"{ending_log_prob(posterior):.2f}",
            str(row["distinct"]),
            "\n".join(f"{p:.2f} {text!r}" for text, p in top),
        )
    return table


def picture(histories: dict[str, dict], comparisons: dict[str, Comparison], path: Path) -> None:
    """Training curve and log-weight histograms, a row for each story."""
    figure = Figure(figsize=(11, 3.4 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), 2, squeeze=False)
    for row, (name, comparison) in zip(axes, comparisons.items(), strict=True):
        plot_training(histories[name], ax=row[0])
        plot_log_weights(comparison.posteriors, ax=row[1])
        row[0].set_title(f"{name}: training")
        row[1].set_title(f"{name}: log weights")
    save_figure(figure, path)


def own_prompt(info: ContextInfo) -> Prompt:
    """What the guide reads: one that is trained for a single story need not be shown its ending."""
    return info.prompt


def train(
    lm: lp.LM, program: lp.Program, prior: lp.Posterior, args: argparse.Namespace
) -> lp.GFlowNetGuide:
    """A guide for one story; it begins as the prior, and first learns from the prior's draws."""
    guide = lp.GFlowNetGuide(
        lm, context=own_prompt, objective="vargrad", rank=args.rank, seed=args.seed
    )
    return guide.fit(
        program,
        given=prior,
        steps=args.steps,
        batch=args.batch,
        learning_rate=args.learning_rate,
        betas=(0.8, 0.95),
        warmup=4,
        schedule=lp.RewardSchedule(start=1.0),
        tempered_share=args.tempered_share,
        replay_share=0.2,
        replay_distance=0.0,
        draw_ahead=2,
    )


def main() -> None:
    """Runs the demo, or the reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", default="smollm2-135m-instruct", help="name, hub id or folder")
    parser.add_argument("--samples", type=int, default=256, help="samples for each guide")
    parser.add_argument("--steps", type=int, default=32, help="training steps for each story")
    parser.add_argument("--batch", type=int, default=40, help="trajectories in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA adapter")
    parser.add_argument(
        "--tempered-share", type=float, default=0.25, help="of draws from the tempered policy"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for results")
    parser.add_argument("--stories", nargs="+", default=list(STORIES), choices=list(STORIES))
    parser.add_argument("--given", type=int, default=512, help="prior draws of the reference run")
    parser.add_argument(
        "--reference",
        action="store_true",
        help=f"a long run from a guide of its own seed and steps; writes {REFERENCE.name}",
    )
    args = parser.parse_args()
    console = Console(width=150)
    started = time.monotonic()
    lm = lp.LM(args.lm)
    story = make_story(lm)
    if args.reference:
        reference_run(lm, story, args, console)
        return

    args.out.mkdir(parents=True, exist_ok=True)
    known = json.loads(REFERENCE.read_text()) if REFERENCE.is_file() else {}
    histories, comparisons = {}, {}
    for name in args.stories:
        begun = time.monotonic()
        program = lp.compile(story, *STORIES[name])
        if name == args.stories[0]:
            console.print(repr(program))
            program.graph.show()
        options = {"num_samples": args.samples, "seed": args.seed}
        prior = lp.infer(program, guide="prior", **options)
        started_training = time.monotonic()
        guide = train(lm, program, prior, args)
        trained = time.monotonic() - started_training
        posteriors = {
            "prior": prior,
            "prompted": lp.infer(program, guide="prompted", **options),
            "gflownet": lp.infer(program, guide=guide, **options),
        }
        comparison = Comparison(posteriors)
        console.print(story_table(name, comparison, known.get(name)))
        console.print(
            f"{args.steps} training steps {trained:.0f} s, with sampling and scoring "
            f"{time.monotonic() - begun:.0f} s\n"
        )
        for g, posterior in comparison.posteriors.items():
            posterior.save(args.out / f"{name}-{g}.json")
        histories[name], comparisons[name] = guide.history, comparison
    picture(histories, comparisons, args.out / "story_infilling.png")
    console.print(
        "ELBO: mean log weight of the possible draws; gap: reference log evidence less ELBO; sd: "
        "of the log weights; (?): Pareto k says that the error cannot be trusted; log p(end): mean "
        "log p(ending | middle) of the possible draws; dist.: distinct middles. Nats throughout."
    )
    console.print(
        f"Posteriors and picture in {args.out}/. {time.monotonic() - started:.0f} s in all."
    )


def reference_run(
    lm: lp.LM, story: Callable[[str, str], str], args: argparse.Namespace, console: Console
) -> None:
    """Importance sampling at length, from a guide of its own."""
    found = json.loads(REFERENCE.read_text()) if REFERENCE.is_file() else {}
    for name in args.stories:
        program = lp.compile(story, *STORIES[name])
        prior = lp.infer(program, num_samples=args.given, seed=args.seed)
        guide = train(lm, program, prior, args)
        posterior = lp.infer(program, guide=guide, num_samples=args.samples, seed=args.seed)
        console.print(name, posterior)
        found[name] = {
            "log_evidence": posterior.log_evidence,
            "error": posterior.log_evidence_error,
            "ess": posterior.ess,
            "pareto_k": posterior.pareto_k,
            "samples": args.samples,
            "steps": args.steps,
            "seed": args.seed,
            "command": f"python examples/story_infilling.py --reference --stories {name} "
            f"--samples {args.samples} --steps {args.steps} --batch {args.batch} "
            f"--learning-rate {args.learning_rate} --rank {args.rank} --given {args.given} "
            f"--tempered-share {args.tempered_share} --seed {args.seed}",
        }
        REFERENCE.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
