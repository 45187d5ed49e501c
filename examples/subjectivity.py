"""Objective or subjective? The reason for a label is latent, and the label is observed.

A sentence about a film tells what happens in it, or what somebody thinks of it. Between sentence
and label the LM writes a few words about the sentence, which nobody has written down for it. A
guide is trained on a dozen labelled sentences to write such words for sentences whose label it
never sees; then the classifier that reads them is trained too, by expectation maximisation.

    python examples/subjectivity.py
    python examples/subjectivity.py --help
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
from langppl.guides import ContextInfo, Guide
from langppl.lm import TrainableLM
from langppl.lm.prompts import Prompt
from langppl.program import Program

Model = Callable[..., str]
Labelled = Sequence[tuple[str, str]]
"""Sentences with their labels."""

LABELS = (" objective", " subjective")
OBJECTIVE, SUBJECTIVE = LABELS

INTRO = (
    "Classify each sentence as objective or subjective. A sentence that tells what happens in a "
    "story is objective. A sentence that says what somebody thinks of a film is subjective.\n\n"
)
MAX_TOKENS = 5
"""Of a rationale."""

TEMPERATURE = 0.25
"""Of the label: the target is p(rationale)·p(label)^4. A label that has two values says little, and
at 1 most of the posterior is rationales that say nothing."""

KNOWN: Labelled = (
    ("a clerk finds a letter that was meant for the man in the flat before him .", OBJECTIVE),
    ("the jokes are stale and the hero is a bore .", SUBJECTIVE),
    ("after the war two brothers open a garage on the road to the coast .", OBJECTIVE),
    ("a warm , clever film that i would gladly see again .", SUBJECTIVE),
    ("her father sells the boat , and she leaves the island to look for work .", OBJECTIVE),
    ("never has a chase through a market been filmed with so little excitement .", SUBJECTIVE),
    ("the nurse learns that the old man has hidden money in the cellar .", OBJECTIVE),
    ("the two leads are a joy , even where the script lets them down .", SUBJECTIVE),
    ("on the night before the wedding the groom is called back to his regiment .", OBJECTIVE),
    ("an overlong mess that mistakes shouting for drama .", SUBJECTIVE),
    ("a boy teaches his deaf neighbour to play the drums .", OBJECTIVE),
    ("it is the kind of picture that gives thrillers a good name .", SUBJECTIVE),
)  # fmt: skip
UNSEEN: Labelled = (
    ("a retired teacher hides a runaway girl from the police .", OBJECTIVE),
    ("lovely to look at , and dull from beginning to end .", SUBJECTIVE),
    ("when the mine closes , the miners form a choir and travel to london .", OBJECTIVE),
    ("you will laugh , and then you will be ashamed that you did .", SUBJECTIVE),
    ("the detective finds out that his partner sold the gun .", OBJECTIVE),
    ("the director has no idea what to do with so fine a cast .", SUBJECTIVE),
    ("she moves into a house whose last owner was never found .", OBJECTIVE),
    ("a small miracle of a film , tender and very funny .", SUBJECTIVE),
    ("two thieves plan to rob the bank in which their mother works .", OBJECTIVE),
    ("the ending is so silly that it spoils what came before .", SUBJECTIVE),
)


def make_classifier(
    lm: lp.LM, judge: lp.LM | TrainableLM, temperature: float = TEMPERATURE
) -> Model:
    """The model: a few words about a sentence, and the label that follows from both."""

    def classify(sentence: str, label: str | None = None) -> str:
        text = f"{INTRO}Sentence: {sentence}\nThis is"
        rules = {"stop": ".", "ban": "\n", "max_tokens": MAX_TOKENS}
        rationale = lp.sample("rationale", lp.LMString(lm, text, **rules))
        choice = lp.LMChoice(judge, f"{text}{rationale}\nThis sentence is", LABELS)
        return lp.sample("label", lp.Tempered(choice, temperature), obs=label)

    return classify


def make_direct(judge: lp.LM | TrainableLM, shots: Labelled = ()) -> Model:
    """The model without a rationale, with labelled sentences before the one that is asked for."""
    shown = "".join(f"Sentence: {s}\nThis sentence is{label}.\n\n" for s, label in shots)

    def classify(sentence: str, label: str | None = None) -> str:
        text = f"{INTRO}{shown}Sentence: {sentence}\nThis sentence is"
        return lp.sample("label", lp.LMChoice(judge, text, LABELS), obs=label)

    return classify


def without_label(info: ContextInfo) -> Prompt:
    """What a guide reads: the sentence, and never its label."""
    return info.prompt


def programs(model: Model, data: Labelled) -> list[Program]:
    """A program for each labelled sentence; the structure of the first is that of all."""
    found: list[Program] = []
    for row in data:
        found.append(lp.compile(model, *row, like=found[0] if found else None))
    return found


def predict(
    model: Model,
    sentences: Sequence[str],
    guide: Guide | None = None,
    draws: int = 10,
    seed: int = 0,
) -> tuple[np.ndarray, list[list[str]]]:
    """How likely each sentence is subjective: mean of p(label | sentence, rationale) over draws.

    It is a learned prediction: the rationales are the guide's own, not weighted.

    Args:
        model: the model.
        sentences: what to classify.
        guide: draws rationales, by a context that does not show the label; None for the prior.
        draws: rationales for each sentence; a model without any takes one.
        seed: of the draws.

    Returns:
        Probabilities, shape [sentences], and the rationales of each sentence.
    """
    # Both labels come of one softmax, so one of them, observed, gives the probabilities of both.
    asked = programs(model, [(s, SUBJECTIVE) for s in sentences])
    found = lp.infer_many(
        asked,
        guide=guide or "prior",
        num_samples=draws if asked[0].latents else 1,
        seed=seed,
        progress=False,
    )
    means = [float(np.exp(p.site_log_probs["label"]).mean()) for p in found]
    return np.array(means), [[str(d.get("rationale", "")) for d in p.samples] for p in found]


def accuracy(subjective: np.ndarray, labels: Sequence[str]) -> float:
    """Share of right labels, from the probability that each sentence is subjective."""
    right = (subjective > 0.5) == (np.array(labels) == SUBJECTIVE)
    return float(right.mean())


def settings(**options: Any) -> dict[str, Any]:
    """How a guide is trained: from the prior on, which is what it begins as."""
    return {
        "objective": "vargrad",
        "observations": 6,
        "batch": 8,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.99),
        "schedule": lp.RewardSchedule(start=1.0),
        **options,
    }


def main() -> None:
    """Trains guide and classifier, and asks for the labels of unseen sentences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", default="smollm2-135m-instruct", help="name, hub id or folder")
    parser.add_argument("--steps", type=int, default=20, help="of the guide alone")
    parser.add_argument("--rounds", type=int, default=2, help="of EM")
    parser.add_argument("--draws", type=int, default=6, help="rationales for each sentence")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    lm = lp.LM(args.lm)
    judge = lm.trainable("classifier")
    frozen, learning = make_classifier(lm, lm), make_classifier(lm, judge)
    guide = lp.GFlowNetGuide(lm, context=without_label, seed=args.seed)
    sentences, labels = zip(*UNSEEN, strict=True)
    table = Table("way", "right", "p(label)", title="Unseen sentences", title_justify="left")
    written: dict[str, list[list[str]]] = {}

    def show(way: str, model: Model, asked: Guide | None = None) -> None:
        subjective, rationales = predict(model, sentences, asked, args.draws, args.seed)
        given = np.where(np.array(labels) == SUBJECTIVE, subjective, 1.0 - subjective)
        table.add_row(way, f"{accuracy(subjective, labels):.0%}", f"{given.mean():.2f}")
        written[way] = rationales

    show("zero-shot", make_direct(lm))
    show("rationales of the LM", frozen)
    guide.fit(frozen, KNOWN, steps=args.steps, **settings())
    show("gflownet", frozen, guide)
    result = lp.em(
        learning,
        KNOWN,
        guide,
        rounds=args.rounds,
        num_samples=8,
        resample=4,
        steps=6,
        learning_rate=5e-4,
        fit=settings(steps=4, learning_rate=5e-4),
        seed=args.seed,
    )
    show("gflownet, EM", learning, guide)
    console = Console(width=120)
    console.print(table)
    for k, (sentence, label) in enumerate(UNSEEN[:4]):
        console.print(f"{sentence} ({label.strip()})", style="bold")
        for way in ("rationales of the LM", "gflownet", "gflownet, EM"):
            console.print(f"  {way}: {', '.join(repr(z) for z in written[way][k][:3])}")
    console.print(result)
    console.print(f"{time.monotonic() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
