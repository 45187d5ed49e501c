"""How near to the posterior proposals come without training: contexts against each other.

The stories of benchmarks/objectives.py. A proposal's next-token log-probabilities are a sum, with
weights, of those under several contexts, normalised:

- `prior`: the beginning alone, as in the model;
- `whole`: `whole_story`, which shows the ending; `whole without`: the same without the ending;
- `shots`: `whole_story` after four whole stories out of the training ones in the same form;
  `shots without`: the same without the endings.

prior + w · (whole − whole without) keeps what seeing the ending changes, and drops what the form of
the context changes. Plain torch, without langppl's rules of spelling: a string ends with the first
token that has a stop in it. What to look at: gain = mean log p(fifth | first four) above the
prior's, and KL(q‖prior), exact at every state that is met; their difference is how much the ELBO
is above the prior's.

    python benchmarks/contrast.py --data DIR
    python benchmarks/contrast.py --help
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from objectives import read_stories
from rich.progress import track
from torch import Tensor

import langppl as lp

STOPS = ".!?"
LONGEST = 20
Story = tuple[str, str, str]
"""Beginning, fourth sentence and ending."""


def of_form(story: Story, *, ending: bool, whole: bool) -> str:
    """A story with a gap, then its beginning again, or (`whole`) all of it."""
    beginning, fourth, fifth = story
    gap = f" {fifth.strip()}" if ending else ""
    told = f"{fourth}{fifth if ending else ''}\n\n\n" if whole else ""
    return f"{beginning} [...]{gap}\n\nThe full story:\n\n{beginning}{told}"


def contexts(shown: Sequence[Story]) -> dict[str, Callable[[Story], str]]:
    """What stands before the fourth sentence, by name."""
    shots = {e: "".join(of_form(s, ending=e, whole=True) for s in shown) for e in (False, True)}
    return {
        "prior": lambda s: s[0],
        "whole": lambda s: of_form(s, ending=True, whole=False),
        "whole without": lambda s: of_form(s, ending=False, whole=False),
        "shots": lambda s: shots[True] + of_form(s, ending=True, whole=False),
        "shots without": lambda s: shots[False] + of_form(s, ending=False, whole=False),
    }


def proposals(strengths: Sequence[float]) -> dict[str, dict[str, float]]:
    """Weights of contexts, by what the table calls them."""
    found: dict[str, dict[str, float]] = {
        "prior": {"prior": 1.0},
        "whole": {"whole": 1.0},
        "shots": {"shots": 1.0},
    }
    for name in ("whole", "shots"):
        for w in strengths:
            weights = {"prior": 1.0, name: w, f"{name} without": -w}
            found[f"prior + {w:g} ({name} − without)"] = weights
    return found


class Sampler:
    """Draws from weighted contexts.

    Args:
        lm: the LM.
        draws: for each story.
    """

    def __init__(self, lm: lp.LM, draws: int) -> None:
        self.lm, self.draws = lm, draws
        texts = [
            lm.vocabulary.join((i,)).decode("utf-8", "replace") for i in range(lm.vocabulary.size)
        ]
        self.ends = torch.tensor([any(c in t for c in STOPS) for t in texts])

    @torch.inference_mode()
    def draw(
        self, texts: Mapping[str, str], weights: Mapping[str, float], seed: int
    ) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
        """Tokens of each draw, whether it ended, and KL(q‖prior) along it, nats."""
        random = torch.Generator().manual_seed(seed)
        names = list(dict.fromkeys(["prior", *weights]))
        states = {n: self._begin(texts[n]) for n in names}
        alive = torch.ones(self.draws, dtype=torch.bool)
        ended = torch.zeros(self.draws, dtype=torch.bool)
        divergence = torch.zeros(self.draws)
        tokens: list[list[int]] = [[] for _ in range(self.draws)]
        for _ in range(LONGEST):
            prior = states["prior"][1]
            mixed = torch.stack([w * states[n][1] for n, w in weights.items()]).sum(0)
            log_q = mixed.log_softmax(-1)
            share = log_q.exp()
            divergence += torch.where(alive, (share * (log_q - prior)).sum(-1), 0.0)
            taken = torch.multinomial(share, 1, generator=random)
            for k in alive.nonzero()[:, 0].tolist():
                tokens[k].append(int(taken[k]))
            over = alive & self.ends[taken[:, 0]]
            ended, alive = ended | over, alive & ~over
            if not alive.any():
                break
            states = {n: self._go_on(s[0], taken) for n, s in states.items()}
        return tokens, ended.numpy(), divergence.numpy()

    def _begin(self, text: str) -> tuple[Any, Tensor]:
        ids = torch.tensor([self.lm.encode_prompt(text)])
        found = self.lm.model(ids, use_cache=True, logits_to_keep=1)
        found.past_key_values.batch_repeat_interleave(self.draws)
        return found.past_key_values, self._log_probs(found).repeat(self.draws, 1)

    def _go_on(self, past: Any, taken: Tensor) -> tuple[Any, Tensor]:
        found = self.lm.model(taken, past_key_values=past, use_cache=True)
        return found.past_key_values, self._log_probs(found)

    @staticmethod
    def _log_probs(found: Any) -> Tensor:
        return found.logits[:, -1].float().log_softmax(-1)  # type: ignore[no-any-return]


def endings(lm: lp.LM, story: Story, tokens: Sequence[Sequence[int]]) -> np.ndarray:
    """log p(fifth | first four) for each fourth sentence, nats."""
    beginning, _, ending = story

    def score(text: str) -> float:
        return float(lp.LMString(lm, f"{beginning}{text}").log_prob(ending))

    return np.array([score(lm.vocabulary.join(t).decode("utf-8", "replace")) for t in tokens])


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with stories.jsonl")
    options.add_argument("--stories", type=int, default=40, help="training stories after the first")
    options.add_argument("--first", type=int, default=200, help="where these begin")
    options.add_argument("--draws", type=int, default=8, help="for each story")
    options.add_argument("--strengths", type=float, nargs="*", default=[0.5, 0.75, 1.0])
    options.add_argument("--seed", type=int, default=0)
    options.set_defaults(runs=1)
    args = options.parse_args()
    lm = lp.LM(args.lm, dtype=torch.bfloat16)
    known = read_stories(args.data, "train", args.first + args.stories)
    # The shortest of those that a guide may be trained on.
    shown = sorted(known[: args.first], key=lambda s: len("".join(s)))[:4]
    made, sampler = contexts(shown), Sampler(lm, args.draws)
    rows: list[dict[str, object]] = []
    for name, weights in proposals(args.strengths).items():
        found = [
            of_story(lm, sampler, story, made, weights, args.seed + k)
            for k, story in enumerate(track(known[args.first :], description=name))
        ]
        rows.append(row(name, found, rows))
        common.report("contrast", list(rows[0]), rows, args)


def of_story(
    lm: lp.LM,
    sampler: Sampler,
    story: Story,
    made: Mapping[str, Callable[[Story], str]],
    weights: Mapping[str, float],
    seed: int,
) -> tuple[float, float, float]:
    """Mean log p(fifth) and KL(q‖prior) of the draws that end, and the share of others."""
    tokens, ended, divergence = sampler.draw({n: f(story) for n, f in made.items()}, weights, seed)
    if not ended.any():
        return math.nan, math.nan, 1.0
    scores = endings(lm, story, [t for t, e in zip(tokens, ended, strict=True) if e])
    return float(scores.mean()), float(divergence[ended].mean()), 1.0 - float(ended.mean())


def row(name: str, found: Sequence[tuple[float, ...]], before: Sequence[Any]) -> dict[str, object]:
    log_p, divergence, lost = np.nanmean(np.array(found), axis=0)
    gain = float(log_p - before[0]["log p(fifth)"]) if before else 0.0
    return {
        "proposal": name,
        "log p(fifth)": float(log_p),
        "gain": gain,
        "KL(q‖prior)": float(divergence),
        "gain − KL": gain - float(divergence),
        "unended": f"{lost:.1%}",
    }


if __name__ == "__main__":
    main()
