"""What the documentation shows is run: the pages' Python blocks, and the docstrings' examples.

A page's blocks are run in order, in one namespace, as a reader would paste them, in an empty
folder. `lp.LM(...)` gives a tiny LM that knows all of ASCII. Comments of a page, which readers do
not see, say what else is to be done:

- `<!-- test: skip, REASON -->` before a block: it is not run.
- `<!-- test: with OLD as NEW; OLD as NEW -->` before a block: it is run with smaller numbers.
- `<!-- test: run`, lines of code, `-->`: run where it stands, to give what a fragment needs, or to
  use what it has defined. The modules of `examples/` can be imported there.

Docstrings' examples may use langppl's own names, an `lm`, and a `story` with its `pair` of texts
and a `guide`.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import langppl as lp
from langppl.cli import app
from langppl.testing import tiny_lm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"

_PARTS = re.compile(
    r"^<!-- test: (?P<word>\w+)\b(?P<rest>.*?)-->$|^```python\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Code:
    """Code of a page.

    Attributes:
        text: the code, preceded by as many empty lines as there are lines before it.
        line: where it begins.
        skipped: why it is not run; empty if it is.
    """

    text: str
    line: int
    skipped: str = ""


def codes(page: str) -> list[Code]:
    """The code of a page, as its comments would have it."""
    found: list[Code] = []
    skipped, changes = "", {}
    for part in _PARTS.finditer(page):
        word, rest, code = part["word"], part["rest"], part["code"]
        line = page.count("\n", 0, part.start()) + 1
        if word == "run":
            found.append(Code("\n" * (line - 1) + rest, line))
        elif word == "skip":
            skipped = rest.strip(", \n")
            assert skipped, f"line {line}: a skipped block needs a reason"
        elif word == "with":
            changes = dict(pair.strip().split(" as ") for pair in rest.split(";"))
        elif word is not None:
            raise AssertionError(f"line {line}: no comment is called {word!r}")
        else:
            for old, new in changes.items():
                assert code.count(old) == 1, f"line {line}: {old!r} must be there once"
                code = code.replace(old, new)
            found.append(Code("\n" * line + code, line, skipped))
            skipped, changes = "", {}
    assert not skipped and not changes, "a comment stands before no block"
    return found


def ascii_lm(*_: object, **__: object) -> lp.LM:
    """A tiny LM that reads and writes all of ASCII, and chats."""
    lm = tiny_lm(["\n", *(string.printable[:95])], seed=1, window=1024)
    lm.tokenizer.chat_template = CHAT
    return lm


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_can_be_pasted(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    # The benchmarks of the tasks have modules of the same names.
    for path in (ROOT / "examples").glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    monkeypatch.setattr(lp, "LM", ascii_lm)
    namespace: dict[str, Any] = {"__name__": "page"}
    for code in codes(path.read_text()):
        if not code.skipped:
            exec(compile(code.text, str(path), "exec"), namespace)


def test_no_block_is_overlooked() -> None:
    for path in PAGES:
        text = path.read_text()
        blocks = sum(1 for c in re.finditer(r"^[ \t]*(```|~~~)[ \t]*py", text, re.M))
        assert blocks == len(re.findall(r"^```python$", text, re.M)), path
        assert text.count("<!-- test:") == len(re.findall(r"^<!-- test: ", text, re.M)), path


def test_comments_of_a_page() -> None:
    block = "```python\nx = 500\n```\n"
    assert [c.text.strip() for c in codes(block)] == ["x = 500"]
    assert codes(f"<!-- test: with 500 as 5 -->\n{block}{block}")[0].text.strip() == "x = 5"
    assert codes(f"<!-- test: with 500 as 5 -->\n{block}{block}")[1].text.strip() == "x = 500"
    (skipped,) = codes(f"<!-- test: skip, two GPUs -->\n{block}")
    assert skipped.skipped == "two GPUs"
    first, second = codes(f"<!-- test: run\ny = 1\n-->\n{block}")
    assert (first.text.strip(), second.text.strip()) == ("y = 1", "x = 500")
    assert second.text.split("\n").index("x = 500") == 4
    for wrong in ("skip", "with 7 as 5", "ru"):
        with pytest.raises(AssertionError, match=r"needs a reason|there once|is called"):
            codes(f"<!-- test: {wrong} -->\n{block}")
    with pytest.raises(AssertionError, match="before no block"):
        codes("<!-- test: skip, no block -->\n")


def modules() -> list[str]:
    """The modules whose docstrings have examples."""
    files = sorted((ROOT / "langppl").rglob("*.py"))
    names = [f.relative_to(ROOT).with_suffix("").parts for f in files if ">>>" in f.read_text()]
    return [".".join(parts).removesuffix(".__init__") for parts in names]


def known() -> dict[str, Any]:
    """What the examples of docstrings need not define."""
    lm = ascii_lm()

    def story(beginning: str, ending: str) -> None:
        middle = lp.sample("middle", lp.LMString(lm, beginning, stop=".", max_tokens=8))
        lp.sample("ending", lp.LMString(lm, f"{beginning}{middle}"), obs=ending)

    names = {name: getattr(lp, name) for name in lp.__all__ if name not in lp._MODULES}
    pair = ("The cat was hungry.", " Now it sleeps.")
    return {**names, "lm": lm, "story": story, "pair": pair, "guide": lp.PromptedGuide()}


@pytest.mark.parametrize("name", modules())
def test_examples_of_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = doctest.testmod(importlib.import_module(name), extraglobs=known())
    assert result.failed == 0, said.getvalue()


INDEX = (ROOT / "docs" / "index.md").read_text()


def test_the_index_lists_all_pages() -> None:
    linked = {(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)#]+)", INDEX)}
    assert linked == {p for p in PAGES if p.name != "index.md"}


def test_the_index_knows_extras_commands_and_variables() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    install, commands, variables = INDEX.split("\n## ")[1:]
    assert set(re.findall(r"^\| `(\w+)`", install, re.M)) == set(
        re.findall(r"^(\w+) = \[", extras, re.M)
    )
    command = typer.main.get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    assert set(re.findall(r"^langppl (\w+)", commands, re.M)) == set(command.commands)
    source = "".join(f.read_text() for f in (ROOT / "langppl").rglob("*.py"))
    assert set(re.findall(r"\bLANGPPL_[A-Z]+", source)) == set(
        re.findall(r"^\| `(LANGPPL_\w+)`", variables, re.M)
    )


def test_the_names_are_all_there() -> None:
    names = re.findall(r"^\| `lp\.(\w+)` \|", (ROOT / "docs" / "names.md").read_text(), re.M)
    assert sorted(names) == sorted(lp.__all__)


def test_links_between_pages_lead_somewhere() -> None:
    for path in PAGES:
        text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, heading = link.partition("#")
            target = (path.parent / name) if name else path
            if link.startswith("http"):
                continue
            assert target.exists(), f"{path}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
                slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
                assert heading in slugs, f"{path}: {link}"
