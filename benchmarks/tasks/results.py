"""How the benchmarks of the paper's tasks keep and show what they found."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import common

PAGES = Path(__file__).parents[2] / "docs" / "tasks"


def example(name: str) -> ModuleType:
    """The example of the same task, which has the model."""
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def parser(doc: str, name: str) -> argparse.ArgumentParser:
    """Options that every task has."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--model", default="smollm2-135m-instruct", help="name, hub id or folder")
    found.add_argument("--device", help="such as cuda; chosen if left out")
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--out", type=Path, default=common.RESULTS, help="folder for the results")
    found.add_argument("--work", type=Path, help="folder of checkpoints and finished runs")
    found.set_defaults(task=name)
    return found


class Runs:
    """Finished runs as files, so that a benchmark that was cut off goes on where it was.

    Args:
        folder: where they are kept.
        settings: what they were run with; runs under other settings are not taken for these.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "settings.json"
        text = json.dumps(dict(settings), indent=1, sort_keys=True, default=str)
        if known.is_file() and known.read_text(encoding="utf-8") != text:
            raise SystemExit(
                f"{folder} holds runs with other settings ({known}); give another --work"
            )
        known.write_text(text, encoding="utf-8")

    def get(self, name: str) -> Any:
        """A finished run, None if there is none."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def put(self, name: str, found: Any) -> Any:
        """Keeps a run."""
        partial = self.folder / f"{name}.partial"
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.replace(self.folder / f"{name}.json")
        return found


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean and sample standard deviation over seeds."""
    shown = form.format(float(np.mean(values)))
    if len(values) > 1:
        shown += " ± " + form.format(float(np.std(values, ddof=1)))
    return shown


def write(
    args: argparse.Namespace, rows: Sequence[Mapping[str, str]], runs: Any, samples: str
) -> None:
    """Prints the table, writes it with real samples as Markdown, and all runs as JSON.

    With the usual folder for results, the page of the task takes the Markdown too.
    """
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(str(row[h]) for h in heads)} |" for row in rows]
    table = "\n".join(lines)
    name = Path(sys.argv[0]).name
    command = shlex.join(["python", f"benchmarks/tasks/{name}", *map(str, sys.argv[1:])])
    machine = common.machine()
    where = f"{machine['processor']}, {machine['threads']} threads, {machine['device']}"
    note = f"`{command}`\n\n{table}\n\n{args.model}, {where}, commit {machine['commit']}.\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.task}.md").write_text(f"{note}\n{samples}\n", encoding="utf-8")
    content = {
        "task": args.task,
        "command": command,
        "model": args.model,
        "seeds": args.seeds,
        "commit": machine["commit"],
        "machine": machine,
        "rows": list(rows),
        "runs": runs,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (args.out / f"{args.task}.json").write_text(text, encoding="utf-8")
    if args.out == common.RESULTS:
        page = PAGES / f"{args.task}.md"
        filled = fill(fill(page.read_text(encoding="utf-8"), "table", note), "samples", samples)
        page.write_text(filled, encoding="utf-8")
    print(note)


def fill(page: str, part: str, text: str) -> str:
    """A page with another text between the marks of a part."""
    begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no {begin} … {end}")
    return f"{page.split(begin)[0]}{begin}\n{text.strip()}\n{end}{page.split(end, 1)[1]}"
