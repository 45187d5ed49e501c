"""Infilling by particles: llamppl's and genlm-control's SMC against langppl, a process for each.

python benchmarks/particles.py --help

The task is growth's: a beginning, a latent sentence that ends at its first "." within 20 tokens
(or has weight zero), and an ending that is observed after it. With `--task json` the latent string
is a record under a JSON schema, after two others, and a remark on it is observed; the evidence is
that of the LM's own law, which few of its draws would satisfy: langppl draws through llguidance's
mask (`MaskedGuide`), genlm-control with AWRS and its JsonSchema, as in its README. llamppl knows no
schemas. genlm-control's schema also admits another order and other whitespace, which the two
records before it make very unlikely.

Tokens per second count the tokens of the latent string, drawn over all particles: the one that
completes it included, the end-of-text token and the ending's tokens not; strings of weight zero
were drawn too. They are counted as they are drawn, so that no copy made by resampling counts twice.

langppl's SMC (`--twist`) resamples inside the sentence, by the ending as if it ended there.

The peers are used as their documentation shows, with what helps them: the prompt's keys and values
are kept (`cache_kv`), a batch has room for all particles, and none resamples before the endings
are observed. (llamppl: sentence and ending are one step, as in its infilling example.
genlm-control: ESS threshold 0, by which its critic comes at the end.) Resampling token by token
kills the sentences that end first, whose endings are already paid for: log evidence came out 3 to
6 nats low, at no more tokens per second.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import torch
from grammars import SCHEMA

import langppl as lp
from langppl.lm import decoding
from langppl.lm.decoding import draw
from langppl.lm.requests import DrawReply, DrawRequest
from langppl.lm.weights import resolve


@dataclass(frozen=True)
class Task:
    """What is inferred.

    Attributes:
        beginning: what stands before the latent string.
        ending: what is observed after it.
        stop: what ends it.
        length: most tokens of it.
        schema: a JSON schema that it satisfies, or none.
        warm_up: beginning and ending of another such task, with no prefix in common.
    """

    beginning: str
    ending: str
    stop: str
    length: int
    warm_up: tuple[str, str]
    schema: dict[str, Any] | None = None


TASKS = {
    "infilling": Task(
        "The door bell rang.",
        " It was the mailman.",
        stop=".",
        length=20,
        warm_up=("The sun was out.", " We went home."),
    ),
    "json": Task(
        '{"name": "Ann", "age": 34} has two children.\n{"name": "Bob", "age": 81} walks slowly.\n',
        " goes to school.",
        stop="}",
        length=24,
        warm_up=('Dogs:\n{"name": "Rex", "age": 3} barks.\n', " bites."),
        schema={key: SCHEMA[key] for key in SCHEMA if key != "x-guidance"},
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Of a beginning, an ending, a number of particles and a seed: tokens drawn and log evidence.
Inference = Callable[[str, str, int, int], tuple[int, float]]


def langppl_inference(args: argparse.Namespace) -> Inference:
    """langppl's importance sampler, or its SMC."""
    options: dict[str, Any] = {}
    if args.twist != "importance":
        twist = None if args.twist == "none" else args.twist
        options = {"method": "smc", "twist": twist, "every": args.every}
    lm = lp.LM(args.lm, device="cpu", dtype=DTYPES[args.dtype])
    check(lm.model, args)
    task = TASKS[args.task]
    form = None if task.schema is None else lp.json_schema(task.schema)
    if form is not None:
        options["guide"] = lp.MaskedGuide({"z": form})

    def run(beginning: str, ending: str, particles: int, seed: int) -> tuple[int, float]:
        # No `min_tokens`: the peers do not forbid a sentence to end at once either.
        fn = lp.LMString(
            lm, beginning, stop=task.stop, min_tokens=0, max_tokens=task.length, truncate="reject"
        )

        def story() -> None:
            z = lp.sample("z", fn)
            if form is not None:
                lp.factor("form", lp.log_matches(z, form))
            lp.sample("y", lp.LMString(lm, f"{beginning}{z}"), obs=ending)

        drawn = 0

        def counting(requests: Sequence[DrawRequest]) -> list[DrawReply]:
            nonlocal drawn
            replies = draw(requests)
            pairs = zip(replies, requests, strict=True)
            drawn += sum(len(reply.ids) - len(request.begun) for reply, request in pairs)
            return replies

        decoding.draw = counting
        try:
            posterior = lp.infer(story, num_samples=particles, seed=seed, progress=False, **options)
        finally:
            decoding.draw = draw
        assert posterior.log_evidence is not None
        return drawn, posterior.log_evidence

    return run


def llamppl_inference(args: argparse.Namespace) -> Inference:
    """llamppl's `smc_standard`."""
    from llamppl import CachedCausalLM, LMContext, Model, smc_standard

    # `batch_size` goes to the backend; llamppl's examples set it on `lm`, which does nothing.
    lm = CachedCausalLM.from_pretrained(str(resolve(args.lm)), backend="hf", **peer_options(args))
    check(lm.model.model, args)
    task = TASKS[args.task]
    drawn = 0

    class Story(Model):
        def __init__(self, beginning: str, ending: str) -> None:
            super().__init__()
            self.beginning, self.ending = beginning, ending

        async def step(self) -> None:
            nonlocal drawn
            context = await LMContext.create(lm, self.beginning)
            sentence = b""
            for _ in range(task.length):
                token = int(await self.sample(context.next_token()))
                if token == lm.tokenizer.eos_token_id:
                    break
                drawn += 1
                sentence += bytes(lm.byte_vocab[token])
                if task.stop.encode() in sentence:
                    break
            else:
                self.condition(False)
                return
            # Costs no pass where the sentence's own tokens are those of its text.
            context = await LMContext.create(lm, self.beginning + cut(sentence, task))
            ids = lm.tokenizer.encode(self.ending, add_special_tokens=False)
            if args.primed:
                await lm.next_token_logprobs(context.tokens + ids)
            for token in ids:
                await self.observe(context.next_token(), token)
            self.finish()

    async def smc(beginning: str, ending: str, particles: int) -> list[Any]:
        lm.cache_kv(lm.tokenizer.encode(beginning))
        return await smc_standard(Story(beginning, ending), particles, ess_threshold=0.5)

    def run(beginning: str, ending: str, particles: int, seed: int) -> tuple[int, float]:
        nonlocal drawn
        drawn = 0
        np.random.seed(seed)
        lm.clear_cache()
        weights = [p.weight for p in asyncio.run(smc(beginning, ending, particles))]
        return drawn, float(np.logaddexp.reduce(weights) - np.log(particles))

    return run


def genlm_control_inference(args: argparse.Namespace) -> Inference:
    """genlm-control's `SMC`, the ending as its critic."""
    from genlm.control import (
        AWRS,
        SMC,
        JsonSchema,
        Potential,
        PromptedLLM,
        direct_token_sampler,
    )

    llm = PromptedLLM.from_name(str(resolve(args.lm)), backend="hf", **peer_options(args))
    backend = llm.model
    check(backend.model, args)
    task = TASKS[args.task]
    stop = task.stop.encode()
    form = None
    if task.schema is not None:
        # Up to the stop, as all tokens that complete it are one ending.
        form = JsonSchema(task.schema).coerce(
            llm, f=lambda tokens: cut(b"".join(tokens), task).encode()
        )
    drawn = 0

    class Ending(Potential):
        """log p(ending | beginning, string), of a whole string."""

        def __init__(self, beginning: str, ending: str) -> None:
            super().__init__(llm.vocab, tables=llm.tables)
            self.beginning = beginning
            self.ids = backend.tokenizer.encode(ending, add_special_tokens=False)

        async def prefix(self, context: list[bytes]) -> float:
            return 0.0

        async def complete(self, context: list[bytes]) -> float:
            sentence = b"".join(context)
            if len(context) == task.length and stop not in sentence:
                return float("-inf")
            ids = backend.tokenizer.encode(self.beginning + cut(sentence, task))
            if args.primed:
                await backend.next_token_logprobs(ids + self.ids[:-1])
            return await llm.spawn(prompt_ids=ids).prefix(llm.decode_tokens(self.ids))

        def is_terminal_only(self) -> bool:
            return True

    def ended(context: list[bytes]) -> bool:
        nonlocal drawn
        drawn += 1  # asked once for each token but the end of text
        return stop in context[-1] or len(context) == task.length

    async def smc(beginning: str, ending: str, particles: int) -> Any:
        ids = backend.tokenizer.encode(beginning)
        backend.cache_kv(ids)
        prompted = llm.spawn(prompt_ids=ids)
        tokens = direct_token_sampler(prompted) if form is None else AWRS(prompted, form)
        return await SMC(tokens, critic=Ending(beginning, ending))(
            n_particles=particles,
            ess_threshold=args.ess,
            max_tokens=task.length + 1,  # the end of the sequence is one of them
            terminate_when=ended,
        )

    def run(beginning: str, ending: str, particles: int, seed: int) -> tuple[int, float]:
        nonlocal drawn
        drawn = 0
        torch.manual_seed(seed)
        backend.clear_cache()
        sequences = asyncio.run(smc(beginning, ending, particles))
        return drawn, float(sequences.log_ml)

    return run


SYSTEMS = {
    "langppl": langppl_inference,
    "llamppl": llamppl_inference,
    "genlm-control": genlm_control_inference,
}
PEERS = ("llamppl", "genlm-control")


def peer_options(args: argparse.Namespace) -> dict[str, Any]:
    """What both peers hand on to the backend that they share, genlm-backend's."""
    # Twice the particles, as in llamppl's examples: a request of each fits, and some for endings.
    return {
        "batch_size": 2 * args.particles,
        "hf_opts": {"torch_dtype": DTYPES[args.dtype], "device_map": "cpu"},
    }


def check(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """That a system computes as asked, on the CPU; the peers' own choice is the file's type."""
    kinds = {(p.dtype, p.device.type) for p in model.parameters()}
    if kinds != {(DTYPES[args.dtype], "cpu")}:
        raise RuntimeError(f"expected {args.dtype} weights on the CPU, found {kinds}")


def cut(sentence: bytes, task: Task) -> str:
    """A string up to its stop, as text: a token that completes the stop may run on past it."""
    before, stop, _ = sentence.decode("utf-8", "replace").partition(task.stop)
    return before + stop


def one(args: argparse.Namespace) -> dict[str, float]:
    """One inference of one system, timed; loading and a warm-up are not."""
    infer = SYSTEMS[args.only](args)
    task = TASKS[args.task]
    infer(*task.warm_up, 4, 0)
    before = common.peak_memory()
    started = time.perf_counter()
    drawn, log_evidence = infer(task.beginning, task.ending, args.particles, args.seed)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "tokens": drawn,
        "tokens/s": drawn / seconds,
        "log evidence": log_evidence,
        "peak GiB": common.peak_memory(),
        "before GiB": before,
    }


def measure(system: str, particles: int, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """One inference in a process of its own.

    Every process has langppl and torch loaded, so that none is charged for it alone.
    """
    command = [sys.executable, __file__, "--lm", args.lm, "--only", system]
    command += ["--particles", str(particles), "--seed", str(seed), "--ess", str(args.ess)]
    command += [
        "--task",
        args.task,
        "--twist",
        args.twist,
        "--every",
        str(args.every),
        "--dtype",
        args.dtype,
    ]
    command += ["--primed"] if args.primed else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--samples", type=int, nargs="+", default=[16, 32], help="particles")
    options.add_argument(
        "--primed",
        action="store_true",
        help="ask the peers' backend for the whole ending at once before they ask it token by "
        "token, which fills its cache (their documentation does not show this)",
    )
    options.add_argument(
        "--ess",
        type=float,
        default=0.0,
        help="genlm-control's threshold of resampling, at each token (its README: 0.5)",
    )
    options.add_argument(
        "--twist",
        default="importance",
        choices=("importance", "none", "lookahead"),
        help="langppl's importance sampler, or its SMC under this twist",
    )
    options.add_argument("--every", type=int, default=2, help="tokens between two looks of SMC")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="of every system")
    options.add_argument("--task", choices=TASKS, default="infilling")
    options.add_argument("--only", choices=SYSTEMS, help="measure this system, in this process")
    options.add_argument("--particles", type=int, default=16, help="with --only")
    options.add_argument("--seed", type=int, default=1, help="with --only")
    args = options.parse_args()
    try:
        versions = {peer: importlib.metadata.version(peer) for peer in PEERS}
    except importlib.metadata.PackageNotFoundError as error:
        options.error(f"{error.name} is not installed: pip install 'langppl[peers]'")
    if args.only:
        print(json.dumps(one(args)))
        return
    resolve(args.lm)  # nothing is downloaded by a process that is measured
    systems = [s for s in SYSTEMS if TASKS[args.task].schema is None or s != "llamppl"]
    rows = []
    for particles in args.samples:
        found: dict[str, list[dict[str, float]]] = {system: [] for system in systems}
        for turn in range(args.runs):
            for system in systems:
                found[system].append(measure(system, particles, turn + 1, args))
        medians = {
            system: {k: common.median([f[k] for f in runs]) for k in runs[0]}
            for system, runs in found.items()
        }
        own = medians["langppl"]
        for peer in systems[1:]:
            other = medians[peer]
            rows.append(
                {
                    "particles": particles,
                    "peer": f"{peer} {versions[peer]}",
                    "ratio": own["tokens/s"] / other["tokens/s"],
                    **{
                        f"{name} {key}": of[key]
                        for key in ("tokens/s", "seconds", "peak GiB", "log evidence")
                        for name, of in (("langppl", own), ("peer", other))
                    },
                    "primed": args.primed,
                    "runs": {"langppl": found["langppl"], peer: found[peer]},
                }
            )
    name = "particles-primed" if args.primed else "particles"
    name += "" if args.task == "infilling" else f"_{args.task}"
    name += "" if args.twist == "importance" else f"_{args.twist}"
    name += "" if args.dtype == "float32" else f"_{args.dtype}"
    common.report(name, [c for c in rows[0] if c not in ("primed", "runs")], rows, args)


if __name__ == "__main__":
    main()
