"""One GFlowNet step, split into sampling, reward and gradient: the paper's procedure, written
plainly with transformers and peft, against langppl.

16 samples of 20 tokens, a context of 60 and an ending of 10, SubTB with the reward at every prefix.
Peak memory is that of a process which does nothing but this step.

    python benchmarks/step.py --help
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable

import common
import numpy as np
import plain
import torch
from peft import LoraConfig, get_peft_model

import langppl as lp
from langppl.guides import objectives
from langppl.guides.trajectories import Batch, make_draws, policy_scores, trajectory
from langppl.lm.decoding import draw
from langppl.lm.requests import DrawRequest
from langppl.lm.rules import StringRules
from langppl.program.execution import given

ENDING = " and in the end they were all very happy because the box was full of apples"
PARTS = ("sampling", "reward", "gradient")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def ours(lm: lp.LM, args) -> dict[str, Callable[[], object]]:
    """The parts as langppl does them."""
    prompt = common.prompt_of(lm, args.context)
    ids = lm.encode_prompt(prompt)
    ending = lm.vocabulary.join(lm.encode_text(ENDING)[: args.ending]).decode()
    values = common.strings(lm, prompt, args.samples, args.length)

    def story() -> None:
        z = lp.sample("z", lp.LMString(lm, prompt, stop=".", min_tokens=0, max_tokens=args.length))
        lp.sample("y", lp.LMString(lm, f"{prompt}{z}"), obs=ending)

    program = lp.compile(story)
    guide = lp.GFlowNetGuide(lm, rank=args.rank)
    weights = [p for n, p in lm.model.named_parameters() if f".{guide.adapter}." in n]
    optimiser = torch.optim.AdamW(weights, lr=1e-4)
    rules = lm.bind(StringRules(ban=(".",), min_tokens=args.length, max_tokens=args.length))
    kept: dict[str, list] = {}

    def sampling() -> None:
        wanted = [
            DrawRequest(lm, ids, rules, args.length, ("step", k), 1.0, guide.adapter)
            for k in range(args.samples)
        ]
        assert all(len(r.ids) == args.length for r in draw(wanted))

    def reward() -> None:
        lm.memo.clear()
        executions = program.run([given({"z": v}) for v in values])
        contexts = [{"z": ids}] * len(values)
        (kept["draws"],) = make_draws([Batch(program, executions, contexts, prefixes=True)])

    def gradient() -> None:
        optimiser.zero_grad()
        found = policy_scores(kept["draws"], lm, guide.adapter)
        paths = [trajectory(d, f[0][0], 1.0) for d, f in zip(kept["draws"], found, strict=True)]
        objectives.subtb(paths).backward()
        optimiser.step()

    return dict(zip(PARTS, (sampling, reward, gradient), strict=True))


def theirs(lm: lp.LM, args) -> dict[str, Callable[[], object]]:
    """The parts as a plain script does them."""
    ids = lm.encode_prompt(common.prompt_of(lm, args.context))
    stops, ending = common.stop_ids(lm), lm.encode_text(ENDING)[: args.ending]
    device = lm.device
    if args.memory_of:  # a plain script would not hold the weights twice
        lm.model = None
        gc.collect()
    base = common.plain_model(args.lm, device, DTYPES[args.plain_dtype])
    config = LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    kept: dict[str, torch.Tensor] = {}

    def sampling() -> None:
        kept["z"], kept["q"], kept["stop"] = plain.sample_with_gradients(
            model, ids, args.samples, args.length, stops, 0
        )

    def reward() -> None:
        with model.disable_adapter():
            kept["r"] = plain.prefix_log_rewards(model, ids, kept["z"].tolist(), stops, ending)

    def gradient() -> None:
        optimiser.zero_grad()
        plain.subtb_loss(kept["r"], kept["q"], kept["stop"]).backward()
        optimiser.step()

    return dict(zip(PARTS, (sampling, reward, gradient), strict=True))


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--samples", type=int, default=16)
    options.add_argument("--length", type=int, default=20)
    options.add_argument("--context", type=int, default=60)
    options.add_argument("--ending", type=int, default=10)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument(
        "--memory-of", choices=("plain", "langppl"), help="one step, its peak memory"
    )
    alone = options.add_mutually_exclusive_group()
    alone.add_argument("--memory-only", action="store_true", help="do not time the steps")
    alone.add_argument("--times-only", action="store_true", help="do not measure the memory")
    options.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        default=[1024, 256],
        help="nodes of a row of the gradient's pass, for the memory",
    )
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="langppl's")
    options.add_argument("--plain-dtype", choices=DTYPES, default="float32", help="the plain way's")
    args = options.parse_args()
    lm = lp.LM(args.lm, dtype=DTYPES[args.dtype])
    makers = {"plain": theirs, "langppl": ours}
    if args.memory_of:
        lm.gradient_node_budget = args.budgets[0]
        print(json.dumps(one(makers[args.memory_of](lm, args), args)))
        return

    if not args.memory_only:
        times(lm, makers, args)
    if args.times_only:
        return
    rows: list[dict[str, object]] = []
    for name, budget in (("plain", 0), *(("langppl", b) for b in args.budgets)):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        command += ["--budgets", str(budget)] if budget else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        rows.append({"way": name, "node budget": budget or "–", **found})
    for row in rows:
        row["of plain"] = row["peak GiB"] / rows[0]["peak GiB"]
    common.report(named("step_memory", args), list(rows[0]), rows, args)


def one(parts: dict[str, Callable[[], object]], args) -> dict[str, object]:
    """Peak memory of one step, and the processor's seconds for the gradient of further ones."""
    for part in PARTS:
        parts[part]()
    found: dict[str, object] = {"peak GiB": common.peak_memory(), "gradient s": "–"}
    if args.memory_of == "langppl":  # a plain one needs its sampling, with gradients, anew
        seconds = []
        for _ in range(args.runs):
            started = time.process_time()
            parts["gradient"]()
            seconds.append(time.process_time() - started)
        found["gradient s"] = common.median(seconds)
    return found


def times(lm: lp.LM, makers: dict[str, Callable], args) -> None:
    """The time of each part."""
    ways = {name: make(lm, args) for name, make in makers.items()}
    seconds: dict[str, dict[str, list[float]]] = {p: {"plain": [], "langppl": []} for p in PARTS}
    for _ in range(args.runs + 1):  # the first warms up
        for name, parts in ways.items():
            for part in PARTS:
                (own,) = common.side_by_side({name: parts[part]}, 1).values()
                seconds[part][name] += own
    rows = []
    for part in PARTS:
        own = {k: v[1:] for k, v in seconds[part].items()}
        rows.append(_row(part, *(common.median(own[k]) for k in ways)))
    whole = {
        name: common.median(np.sum([seconds[p][name][1:] for p in PARTS], axis=0).tolist())
        for name in ways
    }
    rows.append(_row("step", whole["plain"], whole["langppl"]))
    common.report(named("step", args), list(rows[0]), rows, args)


def named(name: str, args) -> str:
    return name if args.dtype == "float32" else f"{name}_{args.dtype}"


def _row(part: str, plain_way: float, own: float) -> dict[str, object]:
    return {"part": part, "plain": plain_way, "langppl": own, "ratio": plain_way / own}


if __name__ == "__main__":
    main()
