"""Guides that are trained on 200 observations and answer for 100 that they have not seen, exactly.

The LM is a tiny smooth one (weights of 0.05, as transformers initialises), and its observations are
sharpened by a temperature, so that posteriors differ from priors in a way that 200 examples can
teach. KL(q‖p) is exact: strings by enumeration, a number by quadrature. All seeds are fixed. A
part of the cells is in the test suite.

    python benchmarks/amortized.py
    python benchmarks/amortized.py --programs chain --objectives subtb
"""

from __future__ import annotations

import functools
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common
import numpy as np
import pyro.distributions as dist
import torch

from langppl import (
    GFlowNetGuide,
    JoinWarning,
    LMString,
    RewardSchedule,
    compile,
    infer,
    sample,
)
from langppl.guides import ContextInfo
from langppl.guides.policy import Policy
from langppl.guides.trajectories import Draw, Part, log_q, policy_scores
from langppl.lm import LM
from langppl.posterior import Posterior
from langppl.program import Program, run_together
from langppl.testing import tiny_lm

LETTERS = "abcdefghijklmnopqrs."
SHARPENED = 0.4


def make_lm(alphabet: str) -> LM:
    return tiny_lm(alphabet, seed=1, sharpness=0.05, hidden_size=64)


def observe(lm: LM, text: str, first: str, second: str) -> None:
    sample("first", LMString(lm, f"a{text}", temperature=SHARPENED), obs=first)
    sample("second", LMString(lm, f"b{text}", temperature=SHARPENED), obs=second)


def single(lm: LM, first: str, second: str) -> None:
    z = sample("z", LMString(lm, "a", stop=".", max_tokens=2, allow=list("abcdef.")))
    observe(lm, z, first, second)


def chain(lm: LM, first: str, second: str) -> None:
    one = sample("one", LMString(lm, "a", max_tokens=1, allow=list("abcdef")))
    two = sample("two", LMString(lm, f"b{one}", max_tokens=1, allow=list("abcdef")))
    sample("first", LMString(lm, f"a{one}", temperature=SHARPENED), obs=first)
    sample("second", LMString(lm, f"{one}{two}", temperature=SHARPENED), obs=second)


def loop(lm: LM, first: str, second: str) -> None:
    text = ""
    for turn in range(3):
        text += sample(f"word_{turn}", LMString(lm, f"a{text}", max_tokens=1, allow=list("abcd.")))
        if text.endswith("."):
            break
    observe(lm, text, first, second)


def number(lm: LM, heads: float, first: str, second: str) -> None:
    p = sample("p", dist.Beta(2.0, 2.0))
    z = sample("z", LMString(lm, "a" if p < 0.5 else "b", max_tokens=1, allow=list("abc")))
    sample("heads", dist.Binomial(9, probs=p), obs=heads)
    observe(lm, z, first, second)


def context(info: ContextInfo) -> str:
    shown = [str(int(a)) if isinstance(a, float) else a for a in info.args[1:]]
    return "".join(shown) + str(info.prompt)[-3:]


@functools.cache
def observations(model: Callable[..., None], lm: LM) -> list[tuple[Any, ...]]:
    """300 different ones that the model itself makes."""
    if model is number:
        pairs = observations(single, lm)
        rng = np.random.default_rng(0)
        return [(lm, float(rng.integers(10)), *row[1:]) for row in pairs]
    program = compile(model, lm, "a", "b")
    drawn = program.simulate(4000, seed=5, lengths={"first": 1, "second": 1})
    found = dict.fromkeys((lm, str(d["first"]), str(d["second"])) for d in drawn)
    assert len(found) >= 300
    return list(found)[:300]


@functools.cache
def unseen(model: Callable[..., None], lm: LM) -> list[Program]:
    """The programs of 100 observations that no guide learns from."""
    first, *rest = observations(model, lm)[200:]
    program = compile(model, *first)
    return [program, *(compile(model, *row, like=program) for row in rest)]


def trained(model: Callable[..., None], lm: LM, objective: str, **options: Any) -> GFlowNetGuide:
    guide = GFlowNetGuide(lm, rank=32, alpha=128, context=context, objective=objective, seed=0)
    return guide.fit(
        model,
        observations(model, lm)[:200],
        observations=8,
        batch=16,
        schedule=RewardSchedule(start=1.0),
        progress=False,
        **{"steps": 250, "learning_rate": 1.5e-3, "head_rate": 4.0, **options},
    )


def q_of(guide: GFlowNetGuide, program: Program, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Log q (nats) of each row of latents, shape [rows, latents]."""
    policies = [Policy(guide.proposer, program, (), values=row) for row in rows]
    executions = run_together([(program, p) for p in policies])
    draws = [
        Draw(k, [Part(e.sites[n], ids) for n, ids in p.contexts.items()], 0.0, 0.0)
        for k, (e, p) in enumerate(zip(executions, policies, strict=True))
    ]
    with torch.no_grad():
        found = policy_scores(draws, guide.lm, guide.adapter)
        return np.array(
            [float(log_q(d, f, guide.heads).sum()) for d, f in zip(draws, found, strict=True)]
        )


@functools.cache
def truth(program: Program) -> Posterior:
    """All that the latents can be."""
    return infer(program, method="exact", progress=False)


def divergence(guide: GFlowNetGuide | None, program: Program) -> float:
    """KL(q‖p) over all values of the latents, nats; of the prior where there is no guide."""
    known = truth(program)
    log_p = np.asarray(known.log_weights) - known.log_evidence
    if guide is None:
        # A turn of the loop that was not taken has no log-probability.
        own = np.nansum([known.site_log_probs[n] for n in program.latents], axis=0)
    else:
        own = q_of(guide, program, known.samples)
    assert abs(np.exp(own).sum() - 1.0) < 1e-3
    return float((np.exp(own) * (own - log_p)).sum())


def mean_divergence(model: Callable[..., None], guide: GFlowNetGuide | None, lm: LM) -> float:
    return float(np.mean([divergence(guide, p) for p in unseen(model, lm)]))


GRID = (np.arange(400) + 0.5) / 400


def number_divergence(guide: GFlowNetGuide | None, program: Program) -> float:
    """KL(q‖p) of `number`: over p by the midpoint rule, over z by listing."""
    letters = list("abc")
    p = torch.tensor(GRID)
    density = dist.Beta(2.0, 2.0).log_prob(p) + dist.Binomial(9, probs=p).log_prob(
        torch.tensor(program.args[1])
    )
    prior, rest, proposed = [], [], []
    for side in (0.25, 0.75):
        rows = [{"p": torch.tensor(side), "z": z} for z in letters]
        executions = program.executions(rows)
        prior.append([e.sites["z"].log_prob for e in executions])
        rest.append(
            [
                (e.sites["first"].log_prob or 0) + (e.sites["second"].log_prob or 0)
                for e in executions
            ]
        )
        if guide is not None:
            both = q_of(guide, program, rows)
            at = q_of_number(guide, program, np.array([side]))
            proposed.append(both - at)
    at_side = (GRID >= 0.5).astype(int)
    joint = density.numpy()[:, None] + (np.array(prior) + np.array(rest))[at_side]
    log_p = joint - np.logaddexp.reduce(joint, axis=None) + np.log(400)
    if guide is None:
        own = dist.Beta(2.0, 2.0).log_prob(p).numpy()[:, None] + np.array(prior)[at_side]
    else:
        own = q_of_number(guide, program, GRID)[:, None] + np.array(proposed)[at_side]
    assert abs(np.exp(own).sum() / 400 - 1.0) < 1e-2
    return float((np.exp(own) * (own - log_p)).sum() / 400)


def q_of_number(guide: GFlowNetGuide, program: Program, values: np.ndarray) -> np.ndarray:
    row = {"p": torch.tensor(0.5), "z": "a"}
    policy = Policy(guide.proposer, program, (), values=row)
    (execution,) = run_together([(program, policy)])
    part = Part(execution.sites["p"], policy.contexts["p"])
    with torch.no_grad():
        found = policy_scores([Draw(0, [part], 0.0, 0.0)], guide.lm, guide.adapter)
        made = guide.heads.proposal(part.site.fn, found[0][0][0].state)
        return np.asarray(made.log_prob(torch.tensor(values, dtype=torch.float32)).double())


PROGRAMS: dict[str, Callable[..., None]] = {
    "single": single,
    "chain": chain,
    "loop": loop,
    "number": number,
}
OBJECTIVES = ("subtb", "vargrad", "tb")
AT_MOST = {"single": 0.1, "chain": 0.15, "loop": 0.15, "number": 0.15}
"""Of the mean KL(q‖p), nats."""
STEPS = {
    ("single", "tb"): 400,  # a learned log Z takes longer
    ("chain", "subtb"): 500,  # so does a learned flow between two latents
    ("chain", "tb"): 400,
    ("loop", "subtb"): 400,
    ("loop", "tb"): 400,
    ("number", "subtb"): 200,
    ("number", "vargrad"): 200,
    ("number", "tb"): 400,
}
"""Of training; 250 for the others."""


def lm_of(name: str) -> LM:
    """The LM of a program; the one with a number also writes digits."""
    return make_lm(LETTERS if name == "single" else LETTERS + "0123456789")


def mean_of(name: str, lm: LM, guide: GFlowNetGuide | None) -> float:
    """Mean KL(q‖p) (nats) over the observations that were not learned from."""
    if name == "number":
        return float(np.mean([number_divergence(guide, p) for p in unseen(number, lm)]))
    return mean_divergence(PROGRAMS[name], guide, lm)


def steps_of(name: str, objective: str) -> int:
    return STEPS.get((name, objective), 250)


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    options.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    args = options.parse_args()
    args.lm, args.runs = "tiny", 1
    warnings.simplefilter("ignore", JoinWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.out / "amortized-work.jsonl"
    lines = work.read_text().splitlines() if work.is_file() else []
    rows = [json.loads(line) for line in lines]  # a run that was cut off goes on
    done = {(row["program"], row["objective"]) for row in rows}
    for name in args.programs:
        for objective in args.objectives:
            if (name, objective) in done:
                continue
            lm, steps = lm_of(name), steps_of(name, objective)
            started = time.perf_counter()
            guide = trained(PROGRAMS[name], lm, objective, steps=steps)
            seconds = time.perf_counter() - started
            row = {
                "program": name,
                "objective": objective,
                "steps": steps,
                "KL(q‖p)": mean_of(name, lm, guide),
                "at most": AT_MOST[name],
                "of the prior": mean_of(name, lm, None),
                "seconds": seconds,
            }
            rows.append(row)
            with work.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    common.report("amortized", list(rows[0]), rows, args)
    work.unlink()


if __name__ == "__main__":
    main()
