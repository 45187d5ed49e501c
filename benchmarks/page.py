"""Writes docs/benchmarks.md from the JSON under benchmarks/results/, so that no figure is typed.

python benchmarks/page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RESULTS, shown

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Every table was written by the command above it, of the commit below it, and turned into this page
by `python benchmarks/page.py`; the JSON, with every single run, is in `benchmarks/results/`. What
stands as `FOLDER` after `--trained` is a guide that was trained apart, at the settings in the text
above: there the command loads the guide and measures it, and does not train it. Where
ways are set beside each other for speed, they ran in turns in one run on one machine, and seconds
are medians. `make bench` runs the shorter tables of speed with their defaults, `make peers` those
beside the peers, `make truth` SMC's grid; the others take hours and are run on their own.
SmolLM2-135M-Instruct is taken from 4-bit weights (Q4_1); figures of the hub's own weights differ.
"""
TEXTS = {
    "prefix_rewards": """## Rewards of all prefixes

log p(z₁..t, stop, ending) for every t of every sample of 20 tokens: full forward passes in
padded batches of 32, without reuse, against langppl's one pass over the token trie. Both give
the same numbers (the largest difference is of sums over the whole string and ending).""",
    "step": """## One GFlowNet step

16 samples of 20 tokens, a context of 60, an ending of 10, SubTB with the reward at every
prefix. Plain: the paper's procedure with transformers and peft, token by token with gradients
kept through the cache, the prompt repeated over the batch, a full forward pass for the reward
of each prefix.""",
    "step_memory": """Peak memory of one such step in a process of its own, Python, torch and
weights included, and the processor's time for the gradient part of later ones. With fewer nodes
to a row than the gradient needs (`lm.gradient_node_budget`, 1,024 by default), rows but the last
are run again in the backward pass: less memory, more work.""",
    "step_bfloat16": """The same step with langppl in bfloat16, and the plain way in float32 as
above.""",
    "step_memory_bfloat16": """Its peak memory. The seconds were taken beside other work.""",
    "decoding": """## Decoding

32 strings of 20 tokens under one prompt: transformers' `generate` with sampling against
langppl.""",
    "lean": """### Layers taken apart

A pass of as many tokens as there are strings, each after a prompt and eight tokens of its own:
transformers' layers, `langppl.lm.lean` and its compiled form (`langppl.lm.native`), in turns; the
first two multiply with weights in oneDNN's layout. Difference: of the states, relative to the
largest.""",
    "lean_bfloat16": """The same in bfloat16. Compiled passes keep states and sums in float32.""",
    "grammars": """## Grammars

Strings under a JSON schema and under a regex, in batches of 32; those that end are checked with
Python's `json` and `re`. Masks: tokens' masks that llguidance made, one for each text met; their
seconds, and all else that the rules do at a token, are within those of decoding. Broken: draws
that end and break their grammar. The share counts: other work ran on the same core.""",
    "particles": """## Infilling by particles

N particles of a missing sentence with its ending observed. langppl runs its importance sampler
here.""",
    "particles_lookahead": """The same with langppl's SMC, which looks ahead at the ending every
other token (`every=2`).""",
    "particles_none": """The same with langppl's SMC that waits for the ending (`twist=None`).""",
    "particles_none_bfloat16": """The same, with all three systems in bfloat16.""",
    "particles_128": """More particles.""",
    "particles_json": """A record under a JSON schema, with a remark on it observed. langppl draws
through llguidance's mask and weights with what it took; genlm-control draws with AWRS and its
JsonSchema, whose validator runs in Python. One core; a training ran on the other. 1,000 draws of
langppl's importance sampler give a log evidence of -10.36 ± 0.02.""",
    "particles_json_none": """The same with langppl's SMC, on two cores with nothing beside it.""",
    "screening": """### Constraints in Python

A sentence of at most 16 tokens after "The best thing about the sea is", under a function of the
text so far that says whether it may go on so: in langppl a potential with `prefix=True`, whose
forbidden tokens are drawn anew (`rejections=32`) or kill (0), in genlm-control a Potential under
AWRS. 32 particles, twelve seeds; all three resample at half the effective number. Error:
root-mean-square of the log evidence over the seeds, from that of langppl with 1,024 particles; log
mean: of the evidence. Alive: particles of weight above zero; distinct: their texts.""",
    "limit": """## Against the limit

Tokens really computed × operations of a token, over the rate of bare matrix products in the
model's shapes, measured in the same run (the better of torch's and oneDNN's prepacked ones).""",
    "growth": """## Growth

Importance sampling of a missing sentence: time and peak memory of a process of its own.

![time and memory against samples](../benchmarks/results/growth.png)""",
    "objectives_time": """## Objectives at equal wall time

Guides trained on some stories and asked for others: the fourth of five sentences is latent, the
fifth observed. The stories are those of TimeTravel (Qin et al. 2019,
github.com/qkaren/Counterfactual-StoryRW): a file `stories.jsonl` with `sentences` (five) and
`split` (`train` or `test`) on each line. Log weight: of the possible draws. KL(q‖p) is bounded
below and KL(p‖q) above, as the evidence is estimated from the draws of all guides and comes out
too low on average; KL(p‖q) is over latents and endings simulated from the model. `prompted` reads
the default context; the trained guides read the whole story with a gap (`whole_story`). Log
p(fifth) is a mean over stories, of each one's possible draws. Every way has 200 stories and four
minutes of one core, which are few steps here; other work ran on the other core all along. `reward`
shows what is lost without the entropy: the likeliest endings, and the least log weight and the
fewest distinct strings of all.""",
    "objectives": """Longer trainings. This table has two guides that were trained before on 200
stories, and 100 unseen ones: `GFlowNetGuide(lm, context=whole_story).fit(story, pairs,
objective="rao_blackwell", observations=4, batch=8, betas=(0.9, 0.99), ...)`, one with `steps=250,
learning_rate=1e-3, schedule=RewardSchedule(start=1.0)`, the other (`power 2 to 1`) with `steps=160,
learning_rate=5e-4, schedule=RewardSchedule(start=2.0, until=1.0)`; 12 to 17 s a step on one core
beside other work. The second keeps more of what it reads in the ending, and pays for it. VarGrad on
the default context, 345 steps in 58 minutes of one core, came to a log weight of -31.45, 2.1 %
impossible, on the same stories (commit 5b12d8a).""",
    "objectives_contexts": """What guides read, without training: the default context
(prompted), the story with a gap (whole story) and the ending alone (`observations_first`), on 40
stories.""",
    "objectives_prior": """A guide that begins at the prior: `guidance=lp.Guidance(1.0,
without=whole_story)`, with the guide's own context once more, takes away what the untrained LM
makes of it. A step takes three readings, so there are fewer; other work ran beside both, and more
beside the second. The code was that of the commit named, and the second way, which was new.""",
    "objectives_gpu": """A guide that was trained on an H200, on all 1,500 stories: 79 steps of
sixteen with sixteen draws, `schedule=RewardSchedule(start=1.5)`, learning rate 1e-3,
TensorFloat-32; at first with eight other trainings on the device (9 s a step), then with one (3 s).
It was asked here on the CPU. 150 more steps there (four stories with sixteen draws, learning rate
5e-4, power 1.25; mean of the last six checkpoints) led to a log weight of -30.87 and a log p(fifth)
of -29.23, with 2.9 % impossible ([infilling](tasks/infilling.md)). 72 more on the CPU from there
(four stories with sixteen draws, a quarter of them pairs simulated from the model, learning rate
5e-4, power 1.4; mean of the last half) led no further: -31.12 and -29.45, 3.7 % impossible.""",
    "objectives_gpu_200": """Another, trained on 200 stories on an H200 in 8½ minutes, beside three
other trainings: 36 steps of `forward_kl`, then 225 of `subtb` with `every=2`, sixteen stories with
eight draws each, learning rate 1e-3, TensorFloat-32, the power held at 1.6
(`RewardSchedule(start=1.6, end=1.6)`), so its target is sharper than the posterior; the mean of the
last 80 weights. It was asked here on the CPU. Two trainings beside it, `rao_blackwell` at the same
power, fell apart ([guides](guides.md)).""",
    "guidance": """## Proposals without training

The same stories, unseen. Guides that read the default context, the ending and then the beginning,
or the whole story with its gap, and guidance by two of these contexts (`lp.Guidance`): so many
times what the ending changes in the LM's prediction, added to the prior's. All have eight draws a
story. KL(p‖q) as above. Error: of the log evidence of a story's eight draws, root-mean-square, from
that of all proposals' draws together; stories without a possible draw are left out and counted.
Time: of drawing and weighing, as a multiple of the prior's. In bfloat16, beside other work.""",
    "mixtures": """## Mixtures

The demo's three stories (`make demo`): the guide that was trained for each, alone and mixed with
the prior (`lp.MixtureGuide`), 256 draws a run. Differences are of the log evidence from the long
run of `examples/story_reference.json`, in nats, over runs with other seeds (its own errors are
0.07, 0.03 and 0.04). ESS and seconds: means and medians of the runs, beside other work. k too high:
share of the runs whose error Pareto k says cannot be trusted; the last share is of runs whose
evidence is more than 3 errors off and of which nothing says so. A tenth of the prior costs nothing
that shows here, and takes the worst error, that of a guide whose weights have a heavy tail
(glasses), from 0.30 to 0.08; the other differences are within the noise of eight runs.""",
    "methods": """## Methods at equal wall time

The evidence of test stories as above: root-mean-square error against long runs, in nats, each
method with the same seconds a run. Bias: of the log evidence, whose mean is too low. LM tokens:
read by the LM in a run. Here on one core for each of two processes, ten stories each, three runs of
two seconds a story. FOLDER is a young guide: `objectives.py --minutes 12 --ways subtb`, 46 steps on
one core. In two seconds the prior gives some 30 weighted draws, lookahead 14 particles, the flow 4,
which is the least that is taken and takes longer. Nothing is ahead of plain draws of the prior:
whoever looks ahead reads the ending every four tokens, the guide a context twice as long, and so
few particles do not earn that back.""",
    "twisted_short": """## The infilling setting of twisted SMC

After "Once upon a time, there was a" come latent tokens and then observed ones, both simulated from
the LM (Zhao et al. 2024, arXiv 2404.17546); the divergences are bracketed from both sides, with the
sharpest bracket of the evidence that the guides give (`lp.pool_bounds`; own gap: of a guide alone).
Two latent tokens, one observed; three minutes of one core for each guide, less for `vargrad` and
`tb`, beside which other work ran. `subtb` is `vargrad` here: no inner prefix can end.""",
    "twisted_long": """Fifteen latent tokens, ten observed. Four minutes of one core are 7 to 11
steps here, so these guides are hardly trained, and 16 particles leave the bounds far apart.""",
    "twisted_variable": """One to fifteen latent tokens, ten observed: inner prefixes can end, so
`subtb` differs. Four minutes of one core each, beside other work: these guides are hardly trained,
and no bracket with 16 particles is narrow.""",
    "truth": """## Is SMC unbiased?

Mean and standard deviation of estimated over exact evidence in tiny programs, over 400 runs, for
every twist and resampling scheme (a cell; the JSON has each); lookahead at its default power and at
its word (`twist_power=1`). A cell is unbiased if its mean is 1 within its error at 1 % over all
cells and its standard deviation is at most 1. The same seeds serve all cells, so these vary
together, and the means of skewed weights are more often too low than too high: the furthest cell
came to 0.989 ± 0.016 on 1,200 other seeds.""",
    "amortized": """## Amortized guides, exactly

Tiny programs, each with a guide that is trained on 200 observations: KL(q‖p) in nats, by listing
all strings (and by quadrature for a number, which a learned head proposes), averaged over 100
observations that it has not seen. *single*: one latent string; *chain*: two; *loop*: one to three,
as the first ones say; *number*: a Beta latent beside a string.""",
    "calibration": """## Calibration

Ranks of simulated latents among posterior draws on a tiny LM, by `lp.calibrate`; p is the smallest
over the summaries (lengths, log-probabilities, log p(observations | latents)) times their number,
and 0.01 passes. KL: of the guide, KL(p‖q) in nats, exact, averaged over the observations by their
evidence. Overconfident: the trained guide at half its temperature. Other work ran on the same core,
so the seconds say little.""",
    "precision": """## bfloat16

What `LM(dtype=torch.bfloat16)` does to log-probabilities: the same draws scored twice,
differences in nats (bfloat16 less float32). This processor multiplies bfloat16.""",
    "gpu_step": """## On a GPU

One GFlowNet step as above. The shapes of GPT-2 XL (1.5 B) and GPT-J (6 B) have random weights,
LoRA of rank 64 on all linear layers. Route: how langppl's rows go through the model, attention in
blocks, under a dense mask, or in padded batches. Peak: most memory of the device that tensors
took, weights included, with the device to one way alone.""",
    "gpu_step_smollm2": """The step under SmolLM2 itself, LoRA of rank 16; another run.""",
    "gpu_prefix_rewards": """Rewards of all prefixes on the GPU, as in the first table.""",
    "gpu_decoding": """Decoding on the GPU, 32 strings of 20 tokens.""",
    "gpu_growth": """Importance sampling of a missing sentence on the GPU.""",
}


def shortened(name: str, content: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows as they are shown: those of a long table by groups."""
    columns, rows = content["columns"], content["rows"]
    if name != "truth":
        return columns, rows
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["program"], row["guide"]), []).append(row)
    found = [
        {
            "program": program,
            "guide": guide,
            "cells": len(own),
            "lowest mean": min(r["mean"] for r in own),
            "highest mean": max(r["mean"] for r in own),
            "furthest from 1, errors": max(abs(r["mean"] - 1.0) / r["± error"] for r in own),
            "largest sd": max(r["sd"] for r in own),
            "unbiased": sum(r["unbiased"] for r in own),
        }
        for (program, guide), own in groups.items()
    ]
    return list(found[0]), found


def cell(value: Any) -> str:
    """A value as it stands in a Markdown table."""
    return shown(value).replace("|", "\\|")


def section(name: str, content: dict[str, Any]) -> str:
    """A table with its text and where it was measured."""
    machine = content["machine"]
    columns, rows = shortened(name, content)
    lines = [
        TEXTS[name],
        "",
        f"`{content['command']}`",
        "",
        "| " + " | ".join(map(cell, columns)) + " |",
        "|" + "---|" * len(columns),
        # A bar in a cell would begin another one.
        *("| " + " | ".join(cell(row[c]) for c in columns) + " |" for row in rows),
        "",
        *([content["note"], ""] if "note" in content else []),
        f"{content['lm']}, {where(name, machine)}, torch {machine['versions']['torch']}, "
        f"transformers {machine['versions']['transformers']}, commit {machine['commit']}, "
        f"{machine['date']}; "
        + (
            "medians of as many runs as the table says."
            if "runs" in columns
            else "one run."
            if content["runs"] == 1
            else f"medians of {content['runs']} runs."
        ),
    ]
    return "\n".join(lines)


def where(name: str, machine: dict[str, Any]) -> str:
    """The device, else the processor."""
    if name.startswith("gpu_"):
        return str(machine["device"])
    parts = [machine["processor"], f"{machine['threads']} threads", machine["capability"]]
    parts += ["compiled passes"] if machine.get("native") == "compiled" else []
    return ", ".join(parts)


def main() -> None:
    found = {}
    for name in TEXTS:
        path = RESULTS / f"{name}.json"
        if path.is_file():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    parts = [HEAD, *(section(name, content) for name, content in found.items())]
    PAGE.write_text("\n\n".join(p.strip() for p in parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
