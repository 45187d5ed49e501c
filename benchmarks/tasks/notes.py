"""Further tables of a task, after the one that `results.write` writes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from results import PAGES, fill

import common  # isort: skip - results finds its folder


def note(
    args: argparse.Namespace, part: str, title: str, rows: Sequence[Mapping[str, str]]
) -> None:
    """Prints a table and adds it to the task's Markdown.

    With the usual folder for results, the part of the page that has its name takes it too.
    """
    heads = list(rows[0])
    lines = [title, "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(row[h] for h in heads)} |" for row in rows]
    text = "\n".join(lines)
    with (args.out / f"{args.task}.md").open("a", encoding="utf-8") as file:
        file.write(f"\n{text}\n")
    if args.out == common.RESULTS:
        page = PAGES / f"{args.task}.md"
        page.write_text(fill(page.read_text(encoding="utf-8"), part, text), encoding="utf-8")
    print(text)
