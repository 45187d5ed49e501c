"""What the benchmarks share: timing side by side, the machine's limit, tables and files."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import langppl as lp
from langppl.distributions import Text
from langppl.lm import native
from langppl.lm.rules import StringRules
from langppl.lm.weights import resolve

RESULTS = Path(__file__).parent / "results"
TEXT = (
    "Once upon a time there was a small village at the foot of a high mountain. The people who "
    "lived there grew apples and kept sheep. Every morning the baker lit his oven before the sun "
    "was up, and the smell of bread went through all the streets. One day a stranger came down "
    "the road with a donkey and a heavy box. Nobody knew where he had come from, and he did not "
    "say. He sat down by the well, drank some water, and looked at the houses for a long time. "
    "The children were the first who dared to speak to him, and they asked him what was in his "
    "box. He smiled and shook his head, and told them that they would have to wait until the "
    "evening, when everybody was home from the fields and the orchard. So the children waited, "
    "and the whole village waited with them, and in the evening they all came to the well. The "
    "stranger opened the box, and inside there was nothing but a small black book. He began to "
    "read from it, and nobody made a sound until the moon stood over the hill"
)


def parser(doc: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--lm", default="smollm2-135m-instruct", help="name, hub id or folder")
    found.add_argument("--runs", type=int, default=3, help="runs of each row; medians are shown")
    found.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    return found


def side_by_side(ways: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Seconds of each way, in turns, so that a slow minute of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def linear_layers(lm: lp.LM) -> list[torch.nn.Linear]:
    """The model's own linear layers, without those of adapters."""
    named = lm.model.named_modules()
    return [m for n, m in named if isinstance(m, torch.nn.Linear) and ".lora_" not in n]


def flops_of(lm: lp.LM) -> tuple[int, int]:
    """Floating-point operations of the matrix products: of one token, and of its logits."""
    head = lm.model.get_output_embeddings().weight.numel()
    whole = sum(m.weight.numel() for m in linear_layers(lm))
    return 2 * (whole - head), 2 * head


def product_rate(lm: lp.LM, rows: int = 512, runs: int = 1) -> float:
    """Operations a second of matrix products in the model's own shapes: the machine's limit.

    The best of some runs, of torch's plain products and of those that langppl uses.
    """
    layers = linear_layers(lm)
    inputs = {m.in_features: torch.randn(rows, m.in_features, dtype=m.weight.dtype) for m in layers}
    ways = [
        [
            functools.partial(torch.nn.functional.linear, inputs[m.in_features], m.weight)
            for m in layers
        ],
        [functools.partial(m, inputs[m.in_features]) for m in layers],
    ]
    best = float("inf")
    with torch.no_grad():
        for _ in range(runs + 1):
            for products in ways:
                started = time.perf_counter()
                for product in products:
                    product()
                best = min(best, time.perf_counter() - started)
    return 2 * rows * sum(m.weight.numel() for m in layers) / best


def plain_model(
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The same weights as transformers gives them, untouched by langppl."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype, use_safetensors=True)
    return model.to(device).eval().requires_grad_(False)


def peak_memory() -> float:
    """Most memory that this process has held so far, GiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # a child's ru_maxrss begins with what its parent held
        (line,) = (li for li in status.read_text().splitlines() if li.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def prompt_of(lm: lp.LM, length: int) -> str:
    """A prompt of so many tokens."""
    ids = lm.encode_text(TEXT)[:length]
    if len(ids) < length:
        raise ValueError(f"the benchmarks' text has fewer than {length} tokens")
    prompt = lm.vocabulary.join(ids).decode()
    if len(lm.encode_prompt(prompt)) != length:
        raise ValueError(f"a prompt of {length} tokens does not survive encoding; take another")
    return prompt


def strings(lm: lp.LM, prompt: str, n: int, length: int, seed: int = 0) -> list[Text]:
    """Strings of exactly so many tokens, drawn from the LM, every token a whole word.

    Any prefix of them, with a full stop after it, is encoded as these very tokens: a plain script
    that joins ids, and langppl, which joins text, then score the same thing.
    """
    before, (stop,) = lm.encode_prompt(prompt), lm.encode_text(".")

    def is_plain(ids: tuple[int, ...]) -> bool:
        return all(
            lm.encode_prompt(prompt + lm.vocabulary.join(ids[:t]).decode() + ".")
            == (*before, *ids[:t], stop)
            for t in range(len(ids) + 1)
        )

    fn = lp.LMString(lm, prompt, min_tokens=length, max_tokens=length, allow=_is_word)

    def draw() -> str:
        return lp.sample("z", fn)

    found: list[Text] = []
    for turn in range(seed, seed + 20):  # a seed of its own for each, or nothing new comes
        samples = lp.infer(draw, num_samples=2 * n, seed=turn, progress=False).samples
        found += [s["z"] for s in samples if is_plain(s["z"].ids)]
        if len(found) >= n:
            return found[:n]
    raise ValueError(f"fewer than {n} strings of {length} tokens survive encoding")


def _is_word(text: str) -> bool:
    return text.startswith(" ") and text[1:].isascii() and text[1:].isalpha()


def stop_ids(lm: lp.LM) -> list[int]:
    """The tokens that end a string at a full stop, the stop's own first."""
    rules = lm.bind(StringRules(stop=".", min_tokens=0))
    step = rules.step(rules.start(None))
    (own,) = lm.encode_text(".")
    return [own, *(t for t in step.canonical.tolist() if t != own)]


def report(
    name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], args: argparse.Namespace
) -> None:
    """Prints rows as a table and writes them, with the machine and the versions, as JSON."""
    table = Table(title=name, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(shown(row[c]) for c in columns))
    Console(width=140).print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": name,
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": machine(),
        "lm": args.lm,
        "runs": args.runs,
        "columns": list(columns),
        "rows": list(rows),
    }
    path = args.out / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    versions = ("langppl", "torch", "transformers", "peft", "numpy")
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native": native.reason() or "compiled",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {p: importlib.metadata.version(p) for p in versions},
        "commit": revision,
        "date": time.strftime("%Y-%m-%d"),
    }
