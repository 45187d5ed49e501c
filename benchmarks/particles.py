"""Infilling by particles: llamppl's and genlm-control's SMC against langppl, a process for each.

python benchmarks/particles.py --help

The task is growth's: a beginning, a latent sentence that ends at its first "." within 20 tokens
(or has weight zero), and an ending that is observed after it. Tokens per second count the tokens
of the latent sentence, drawn over all particles: the one that completes the sentence included,
the end-of-text token and the ending's tokens not; sentences of weight zero were drawn too. They
are counted as they are drawn, so that no copy made by resampling counts twice.

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
from typing import Any

import common
import numpy as np
import torch

import langppl as lp
from langppl.lm import decoding
from langppl.lm.decoding import draw
from langppl.lm.requests import DrawReply, DrawRequest
from langppl.lm.weights import resolve

BEGINNING, ENDING = "The door bell rang.", " It was the mailman."
STOP, LENGTH = ".", 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP = "The sun was out.", " We went home."  # shares no prefix with the task

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

    def run(beginning: str, ending: str, particles: int, seed: int) -> tuple[int, float]:
        # No `min_tokens`: the peers do not forbid a sentence to end at once either.
        fn = lp.LMString(
            lm, beginning, stop=STOP, min_tokens=0, max_tokens=LENGTH, truncate="reject"
        )

        def story() -> None:
            z = lp.sample("z", fn)
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
    drawn = 0

    class Story(Model):
        def __init__(self, beginning: str, ending: str) -> None:
            super().__init__()
            self.beginning, self.ending = beginning, ending

        async def step(self) -> None:
            nonlocal drawn
            context = await LMContext.create(lm, self.beginning)
            sentence = b""
            for _ in range(LENGTH):
                token = int(await self.sample(context.next_token()))
                if token == lm.tokenizer.eos_token_id:
                    break
                drawn += 1
                sentence += bytes(lm.byte_vocab[token])
                if STOP.encode() in sentence:
                    break
            else:
                self.condition(False)
                return
            # Costs no pass where the sentence's own tokens are those of its text.
            context = await LMContext.create(lm, self.beginning + cut(sentence))
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
    from genlm.control import SMC, Potential, PromptedLLM, direct_token_sampler

    llm = PromptedLLM.from_name(str(resolve(args.lm)), backend="hf", **peer_options(args))
    backend = llm.model
    check(backend.model, args)
    drawn = 0

    class Ending(Potential):
        """log p(ending | beginning, sentence), of a whole sentence."""

        def __init__(self, beginning: str, ending: str) -> None:
            super().__init__(llm.vocab, tables=llm.tables)
            self.beginning = beginning
            self.ids = backend.tokenizer.encode(ending, add_special_tokens=False)

        async def prefix(self, context: list[bytes]) -> float:
            return 0.0

        async def complete(self, context: list[bytes]) -> float:
            sentence = b"".join(context)
            if len(context) == LENGTH and STOP.encode() not in sentence:
                return float("-inf")
            ids = backend.tokenizer.encode(self.beginning + cut(sentence))
            if args.primed:
                await backend.next_token_logprobs(ids + self.ids[:-1])
            return await llm.spawn(prompt_ids=ids).prefix(llm.decode_tokens(self.ids))

        def is_terminal_only(self) -> bool:
            return True

    def ended(context: list[bytes]) -> bool:
        nonlocal drawn
        drawn += 1  # asked once for each token but the end of text
        return STOP.encode() in context[-1] or len(context) == LENGTH

    async def smc(beginning: str, ending: str, particles: int) -> Any:
        ids = backend.tokenizer.encode(beginning)
        backend.cache_kv(ids)
        tokens = direct_token_sampler(llm.spawn(prompt_ids=ids))
        return await SMC(tokens, critic=Ending(beginning, ending))(
            n_particles=particles,
            ess_threshold=args.ess,
            max_tokens=LENGTH + 1,  # the end of the sequence is one of them
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


def cut(sentence: bytes) -> str:
    """A sentence up to its stop, as text: a token that completes the stop may run on past it."""
    before, stop, _ = sentence.decode("utf-8", "replace").partition(STOP)
    return before + stop


def one(args: argparse.Namespace) -> dict[str, float]:
    """One inference of one system, timed; loading and a warm-up are not."""
    infer = SYSTEMS[args.only](args)
    infer(*WARM_UP, 4, 0)
    before = common.peak_memory()
    started = time.perf_counter()
    drawn, log_evidence = infer(BEGINNING, ENDING, args.particles, args.seed)
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
    command += ["--twist", args.twist, "--every", str(args.every), "--dtype", args.dtype]
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
    rows = []
    for particles in args.samples:
        found: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
        for turn in range(args.runs):
            for system in SYSTEMS:
                found[system].append(measure(system, particles, turn + 1, args))
        medians = {
            system: {k: common.median([f[k] for f in runs]) for k in runs[0]}
            for system, runs in found.items()
        }
        own = medians["langppl"]
        for peer in PEERS:
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
    name += "" if args.twist == "importance" else f"_{args.twist}"
    name += "" if args.dtype == "float32" else f"_{args.dtype}"
    common.report(name, [c for c in rows[0] if c not in ("primed", "runs")], rows, args)


if __name__ == "__main__":
    main()
