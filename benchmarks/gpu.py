"""The benchmarks on a GPU: the GFlowNet step in the shapes of larger models, prefixes, decoding and
importance sampling under SmolLM2.

    python benchmarks/gpu.py --work /tmp/shapes
    python benchmarks/gpu.py --work /tmp/shapes --device cpu --shape tiny   # of the script itself

Only SmolLM2 has weights, if they were fetched before. The other shapes have random ones, made on
the device and saved once under `--work`, from where they are loaded like any other model: speed and
memory do not depend on what the weights are. Their tokenizer is SmolLM2's where that is at hand,
else one that is trained on the benchmarks' own text; the vocabulary is the shape's either way.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import decoding
import growth
import prefix_rewards
import step
import torch

import langppl as lp
from langppl.lm.weights import is_fetched, resolve

SMOLLM2 = "smollm2-135m-instruct"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model to measure.

    Attributes:
        kind: transformers' model type; None for known weights.
        sizes: of its config.
        dtype: float type of its weights.
        rank: of the LoRA adapter in the step.
    """

    kind: str | None
    sizes: dict[str, int]
    dtype: torch.dtype
    rank: int


SHAPES = {
    "smollm2": Shape(None, {}, torch.float32, 16),
    "gpt2-xl": Shape(
        "gpt2",
        {"n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024, "vocab_size": 50257},
        torch.float32,
        64,
    ),
    "gpt-j": Shape(
        "gptj",
        {
            "n_embd": 4096,
            "n_layer": 28,
            "n_head": 16,
            "n_positions": 2048,
            "rotary_dim": 64,
            "vocab_size": 50400,
        },
        torch.bfloat16,
        64,
    ),
    "tiny": Shape(
        "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 700},
        torch.float32,
        4,
    ),
}


def main() -> None:
    args = options().parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        options().exit(
            2,
            "gpu.py: torch finds no CUDA device here, so there is nothing to measure; "
            "`--device cpu --shape tiny` tries the script itself\n",
        )
    if args.device == "cpu" and args.shape != ["tiny"]:
        options().error("on the CPU the other benchmarks measure; --device cpu takes --shape tiny")
    names = [n for n in args.shape if n != "smollm2" or is_fetched(SMOLLM2)]
    if len(names) < len(args.shape):
        print("SmolLM2 is not at hand (`langppl fetch smollm2-135m-instruct`), so it is left out.")
    args.lm = ", ".join(names)
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        shape = SHAPES[name]
        folder = folder_of(name, shape, args)
        tables.setdefault("gpu_step", []).extend(step_rows(name, shape, folder, args))
        if name in ("smollm2", "tiny"):
            for table, rows in other_rows(shape, folder, args).items():
                tables.setdefault(table, []).extend(rows)
    for table, rows in tables.items():
        columns = [c for c in rows[0] if c not in ("seconds", "tokenizer")]
        common.report(table, columns, rows, args)


def options() -> argparse.ArgumentParser:
    found = common.parser(__doc__)
    found.add_argument("--work", type=Path, required=True, help="folder for the random weights")
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument(
        "--shape", choices=SHAPES, nargs="+", default=["smollm2", "gpt2-xl", "gpt-j"]
    )
    found.add_argument("--tokenizer", type=Path, help="folder of the random models' tokenizer")
    found.add_argument("--samples", type=int, default=16, help="of a step")
    found.add_argument("--length", type=int, default=20, help="tokens of a sample")
    found.add_argument("--context", type=int, default=60)
    found.add_argument("--ending", type=int, default=10)
    found.add_argument("--prompts", type=int, nargs="+", default=[7, 60, 200])
    found.add_argument("--particles", type=int, nargs="+", default=[32, 128, 512])
    found.add_argument(
        "--patience", type=float, default=120.0, help="seconds after which a row is not run again"
    )
    return found


# -- models ---------------------------------------------------------------------------------------


def folder_of(name: str, shape: Shape, args: argparse.Namespace) -> str:
    """The folder of a shape's weights; random ones are made if they are not there."""
    if shape.kind is None:
        return resolve(SMOLLM2)
    folder: Path = args.work / name
    if not (folder / "tokenizer.json").is_file():  # which is written last
        make(shape, folder, args)
    return str(folder)


def make(shape: Shape, folder: Path, args: argparse.Namespace) -> None:
    """Writes a model of random weights, with a tokenizer, in transformers' format."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tokenizer_of(args)
    size = shape.sizes["vocab_size"]
    if len(tokenizer) > size:
        raise SystemExit(f"a tokenizer of {len(tokenizer)} tokens does not fit {size} logits")
    end = tokenizer.eos_token_id
    config = AutoConfig.for_model(shape.kind, **shape.sizes, bos_token_id=end, eos_token_id=end)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=shape.dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokenizer_of(args: argparse.Namespace) -> Any:
    """A fast tokenizer that is at hand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if args.tokenizer is not None:
        return AutoTokenizer.from_pretrained(args.tokenizer)
    if args.shape != ["tiny"] and is_fetched(SMOLLM2):
        return AutoTokenizer.from_pretrained(resolve(SMOLLM2))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=690, min_frequency=1, special_tokens=["<|end|>"], show_progress=False
    )
    trained.train_from_iterator([common.TEXT, step.ENDING, prefix_rewards.ENDING], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|end|>")


def load(shape: Shape, folder: str, args: argparse.Namespace) -> tuple[lp.LM, str]:
    """An LM, and the route that its strings are scored by."""
    with warnings.catch_warnings():
        # That a model is scored in padded batches is said in the table.
        warnings.filterwarnings("ignore", message=".*does not take a tree attention mask")
        lm = lp.LM(folder, device=args.device, dtype=shape.dtype)
    if lm.packs is None:
        return lm, "padded"
    return lm, "blocks" if lm.packs.in_blocks else "mask"


# -- tables ---------------------------------------------------------------------------------------


def step_rows(
    name: str, shape: Shape, folder: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One GFlowNet step in its parts, each way with the device to itself."""
    kind = str(shape.dtype).removeprefix("torch.")
    more = {"lm": folder, "rank": shape.rank, "memory_of": name, "plain_dtype": kind}
    own = argparse.Namespace(**{**vars(args), **more})
    seconds: dict[str, dict[str, list[float]]] = {}
    peaks: dict[str, dict[str, float]] = {}
    routes = []
    # `theirs` needs an LM for its tokens alone, and drops its weights.
    for way, maker in (("langppl", step.ours), ("plain", step.theirs)):
        lm, route = load(shape, folder, args)
        routes.append(route)
        seconds[way], peaks[way] = measure(maker(lm, own), args)
        del lm
        free()
    rows = []
    for part in (*step.PARTS, "step"):
        of = {way: seconds[way][part] for way in seconds}
        a, b = (common.median(of[way]) for way in ("plain", "langppl"))
        rows.append(
            {
                "model": name,
                "type": kind,
                "route": routes[0],
                "part": part,
                "plain s": a,
                "langppl s": b,
                "ratio": a / b,
                "plain /s": 1 / a,
                "langppl /s": 1 / b,
                "plain peak GiB": peaks["plain"].get(part, "–"),
                "langppl peak GiB": peaks["langppl"].get(part, "–"),
                "seconds": of,
            }
        )
    return rows


def measure(
    parts: dict[str, Callable[[], object]], args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each part and of a whole step, and on a GPU the most memory held in each, GiB."""
    seconds: dict[str, list[float]] = {part: [] for part in (*step.PARTS, "step")}
    peaks: dict[str, float] = {}
    for turn in range(args.runs + 1):  # the first warms up
        whole = 0.0
        for part in step.PARTS:
            if args.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            (took,) = common.side_by_side({part: parts[part]}, 1)[part]
            whole += took
            if args.device == "cuda":
                most = torch.cuda.max_memory_allocated() / 2**30
                peaks[part] = max(peaks.get(part, 0.0), most)
            if turn:
                seconds[part].append(took)
        if turn:
            seconds["step"].append(whole)
    if peaks:
        peaks["step"] = max(peaks.values())
    return seconds, peaks


def free() -> None:
    """Gives the device's memory back, so that what comes next has it to itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def other_rows(
    shape: Shape, folder: str, args: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Rewards of prefixes, decoding, and importance sampling."""
    lm, _ = load(shape, folder, args)
    model = common.plain_model(folder, lm.device, shape.dtype)
    twice = argparse.Namespace(**{**vars(args), "samples": 2 * args.samples})
    found = {
        "gpu_prefix_rewards": [
            prefix_rewards.measure(lm, model, twice.samples, prompt, 7, twice)
            for prompt in args.prompts
        ],
        "gpu_decoding": [decoding.measure(lm, model, prompt, twice) for prompt in args.prompts],
    }
    del model
    free()
    found["gpu_growth"] = [inference(lm, n, args) for n in args.particles]
    return found


def inference(lm: lp.LM, samples: int, args: argparse.Namespace) -> dict[str, Any]:
    """Importance sampling of a missing sentence."""
    seeds = iter(range(10**6))
    tokens: list[int] = []

    def run() -> None:
        lm.memo.clear()
        posterior = lp.infer(
            growth.story, lm, num_samples=samples, seed=next(seeds), progress=False
        )
        tokens.append(sum(len(s["z"].ids) for s in posterior.samples))

    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = common.side_by_side({"langppl": run}, args.runs + 1)["langppl"][1:]
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else "–"
    rates = [n / s for n, s in zip(tokens[1:], seconds, strict=True)]
    return {
        "samples": samples,
        "seconds of one": common.median(seconds),
        "tokens/s": common.median(rates),
        "peak GiB": peak,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
