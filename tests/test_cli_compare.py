"""`langppl compare`, on tiny models in scripts of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from typer.testing import CliRunner

import langppl as lp
from langppl import scripts
from langppl.cli import app
from langppl.testing import tiny_lm

runner = CliRunner()

STORY = """
    from dataclasses import dataclass

    import helper
    import langppl as lp
    from langppl.testing import tiny_lm

    lm = tiny_lm("ab.", seed=2)
    number = 3


    @dataclass
    class Beginning:
        text: str


    def story(beginning, ending):
        opening = Beginning(beginning).text
        middle = lp.sample("middle", lp.LMString(lm, opening, stop=".", max_tokens=2))
        lp.sample("ending", lp.LMString(lm, helper.join(opening, middle)), obs=ending)


    def times(count: int, share: float, ending):
        assert isinstance(count, int) and isinstance(share, float)
        middle = lp.sample("middle", lp.LMString(lm, "ab", stop=".", max_tokens=count))
        lp.factor("share", share)
        lp.sample("ending", lp.LMString(lm, f"ab{middle}"), obs=ending)


    def make_story(lm):
        def story(ending):
            middle = lp.sample("middle", lp.LMString(lm, "ab", stop=".", max_tokens=2))
            lp.sample("ending", lp.LMString(lm, f"ab{middle}"), obs=ending)

        return story


    def make_nothing(lm):
        return "no model"


    async def later(ending):
        pass


    def of_list(ending: list):
        pass


    def no_latent():
        return 3


    if __name__ == "__main__":
        raise SystemExit("run as a program")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "story.py"
    path.write_text(dedent(STORY))
    (tmp_path / "helper.py").write_text("def join(*texts):\n    return ''.join(texts)\n")
    return path


@pytest.fixture(scope="module")
def folder_of_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    lm = tiny_lm("ab.", seed=6)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def arguments(*texts: str) -> list[str]:
    return [part for text in texts for part in ("--arg", text)]


def test_guides_and_methods_side_by_side(script: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    result = runner.invoke(
        app,
        [
            "compare",
            f"{script}:story",
            *arguments("ab", "ba"),
            *("--method", "exact", "--method", "importance", "--method", "smc:twist=lookahead"),
            *("--guide", "prior", "--guide", "prompted"),
            *("--num-samples", "64", "--seed", "3", "--json", str(figures)),
        ],
    )
    assert result.exit_code == 0, result.output
    names = [
        "exact",
        "importance prior",
        "importance prompted",
        "smc prior twist=lookahead",
        "smc prompted twist=lookahead",
    ]
    content = json.loads(figures.read_text())
    assert [row["name"] for row in content["rows"]] == names
    assert "likeliest 'middle'" in result.stdout and "beside exact" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100

    lm = tiny_lm("ab.", seed=2)

    def story(beginning: str, ending: str) -> None:
        middle = lp.sample("middle", lp.LMString(lm, beginning, stop=".", max_tokens=2))
        lp.sample("ending", lp.LMString(lm, f"{beginning}{middle}"), obs=ending)

    own = lp.infer(story, "ab", "ba", num_samples=64, seed=3, progress=False)
    row = content["rows"][1]
    assert row["log_evidence"] == pytest.approx(own.log_evidence, rel=1e-5)
    assert row["tokens_drawn"] > 0 and row["seconds"] > 0.0
    assert str(script.parent) not in sys.path
    assert "langppl_script_story" not in sys.modules


def test_a_function_of_lm_makes_the_model(script: Path, folder_of_lm: Path) -> None:
    spec = f"{script}:make_story"
    result = runner.invoke(
        app,
        [
            *("compare", spec, "--arg", "ba", "--lm", str(folder_of_lm)),
            *("--method", "exact", "--quiet"),
        ],
    )
    assert result.exit_code == 0, result.output
    with scripts.model_in(spec, str(folder_of_lm)) as model:
        truth = lp.infer(model, "ba", method="exact", progress=False)
    assert f"{truth.log_evidence:.2f} exactly" in result.stdout


def test_a_saved_guide(script: Path, folder_of_lm: Path, tmp_path: Path) -> None:
    spec = f"{script}:make_story"
    guide = tmp_path / "trained"
    with scripts.model_in(spec, str(folder_of_lm)) as model:
        program = lp.compile(model, "ba")
        made = lp.GFlowNetGuide(program.sites["middle"].fn.lm, rank=2)
        made.fit(program, steps=2, batch=4, progress=False)
        made.save(guide)
    result = runner.invoke(
        app,
        [
            *("compare", spec, "--arg", "ba", "--lm", str(folder_of_lm), "--num-samples", "8"),
            *("--guide", f"gflownet={guide}", "--guide", "prior"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "importance gflownet=trained" in result.stdout
    other = runner.invoke(
        app, ["compare", f"{script}:story", *arguments("ab", "ba"), "--guide", f"gflownet={guide}"]
    )
    assert other.exit_code == 2 and "was trained on" in other.stderr


def test_numbers_are_read_where_they_are_annotated(script: Path) -> None:
    spec = f"{script}:times"
    with scripts.model_in(spec, None) as model:
        assert scripts.arguments(model, ["2", "-0.5", "7"]) == [2, -0.5, "7"]
    wrong = runner.invoke(app, ["compare", spec, *arguments("two", "0.5", "ba")])
    assert wrong.exit_code == 2
    assert "argument 'count' of times must be int, got 'two'" in wrong.stderr


def test_truths_and_unions_are_read_as_they_are_annotated() -> None:
    def model(flag: bool, count: int | None, text: str | None, *more: int | bool) -> None: ...

    given = ["False", "none", "None", "1", "TRUE"]
    assert scripts.arguments(model, given) == [False, None, "None", 1, True]
    assert scripts.arguments(model, ["1", "3", "x"]) == [True, 3, "x"]
    with pytest.raises(scripts.ScriptError, match="'flag' of model must be bool: true or false"):
        scripts.arguments(model, ["no", "3", "x"])
    with pytest.raises(scripts.ScriptError, match="must be int or None, got 'three'"):
        scripts.arguments(model, ["0", "three", "x"])


def test_another_annotation_is_refused() -> None:
    def model(beginning, options: list[str]): ...  # type: ignore[no-untyped-def]

    def unknown(end: nowhere, k: int | None): ...  # type: ignore # noqa: F821

    with pytest.raises(scripts.ScriptError, match=r"annotated list\[str\], and --arg gives str"):
        scripts.arguments(model, ["a", "b"])
    with pytest.raises(scripts.ScriptError, match="'end' of unknown is annotated nowhere"):
        scripts.arguments(unknown, ["a", "2"])
    unknown.__annotations__["end"] = "str"
    assert scripts.arguments(unknown, ["a", "2"]) == ["a", 2]


def test_if_every_row_fails_the_exit_code_says_so(script: Path) -> None:
    command = ["compare", f"{script}:story", *arguments("ab", "ba")]
    failing = runner.invoke(app, [*command, "--method", "exact:limit=2"])
    assert failing.exit_code == 1
    assert "exact limit=2 failed: ValueError: " in failing.stdout
    assert "Every row failed." in failing.stdout and "the limit of exact" in failing.stdout
    half = runner.invoke(
        app,
        [*command, "--method", "exact:limit=2", "--method", "importance", "--num-samples", "8"],
    )
    assert half.exit_code == 0 and "exact limit=2 failed" in half.stdout


OWN = """
import langppl as lp
from langppl.testing import tiny_lm

lm = tiny_lm("ab.", seed=2)


def story(ending):
    middle = lp.sample("middle", lp.LMString(lm, "ab", stop=".", max_tokens=2))
    lp.sample("ending", lp.LMString(lm, f"ab{middle}"), obs=ending)
    raise ValueError("my own bug")


def broken(lm):
    return {}["model"]
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["story", "--arg", "ba"], ", line 11: ValueError: my own bug"),
        (["broken", "--lm", "{lm}"], ", line 15: KeyError: 'model'"),
    ],
)
def test_the_models_own_errors_have_their_place(
    options: list[str], message: str, folder_of_lm: Path, tmp_path: Path
) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    name, *rest = (o.format(lm=folder_of_lm) for o in options)
    result = runner.invoke(app, ["compare", f"{path}:{name}", *rest, "-q"])
    assert result.exit_code == 1
    assert result.stderr == f"Error: {str(path)!r}{message}\n"


def run_process(script: Path, folder: Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = ["compare", f"{script}:story", *arguments("ab", "ba"), "--num-samples", "8", "-q"]
    return subprocess.run(
        [sys.executable, "-m", "langppl.cli", *command, "--json", str(folder / "x.json")],
        stderr=subprocess.PIPE,
        timeout=300,
        **options,
    )


def test_what_standard_output_cannot_take_costs_no_figures(script: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run_process(script, tmp_path, env=environment, stdout=subprocess.PIPE)
    assert done.returncode == 0 and b"importance prior" in done.stdout, done.stderr
    (tmp_path / "x.json").unlink()
    reading, writing = os.pipe()
    os.close(reading)
    run_process(script, tmp_path, stdout=writing)
    os.close(writing)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))


def test_a_file_that_cannot_be_written_is_one_line(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compare", f"{script}:story", *arguments("ab", "ba"), "--num-samples", "8", "-q"]
    command += ["--json", str(tmp_path / "x.json")]

    def denied(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    late = runner.invoke(app, command)
    assert late.exit_code == 1 and "importance prior" in late.stdout
    assert late.stderr.startswith("Error: [Errno 13] the comparison cannot be saved")
    assert late.stderr.count("\n") == 1
    monkeypatch.setattr(os, "access", lambda *args: False)
    early = runner.invoke(app, command)
    assert early.exit_code == 2 and early.stdout == ""
    assert "cannot be written to; give another" in early.stderr


WRONG = [
    (["{script}"], "is not SCRIPT:MODEL"),
    (["{script}:"], "is not SCRIPT:MODEL"),
    ([":story"], "is not SCRIPT:MODEL"),
    (["{script}:no-name"], "is not SCRIPT:MODEL"),
    (["{folder}/nowhere.py:story"], "there is no file"),
    (["{folder}/story.txt:story"], "its name must end in .py"),
    (["{script}:tale"], "has no 'tale'; its functions are: story, times, make_story"),
    (["{script}:number"], "'number' in "),
    (["{script}:Beginning"], "'Beginning' is a class"),
    (["{script}:later", "--arg", "x"], "'later' is async"),
    (["{script}:no_latent"], "without meeting a site"),
    (["{script}:of_list", "--arg", "x"], "argument 'ending' of of_list is annotated list"),
    (
        ["{script}:story", "--arg", "ab"],
        "story takes 2 arguments (beginning, ending), and --arg is given 1 times",
    ),
    (["{script}:story", *arguments("ab", "ba"), "--lm", "x"], "has an LM of its own"),
    (["{script}:make_story", "--arg", "ba", "--lm", "nothing-here"], "no model is called"),
    (["{script}:make_nothing", "--lm", "{lm}"], "make_nothing(lm) must return the model"),
    (["{script}:story", "--guide", "prio"], "unknown guide 'prio'"),
    (["{script}:story", "--guide", "masked=x"], "is neither a name nor gflownet=FOLDER"),
    (["{script}:story", "--guide", "gflownet={folder}/none"], "there is no folder"),
    (["{script}:story", "--method", "vi"], "unknown method 'vi'"),
    (["{script}:story", "--method", "smc:twist"], "'twist' in method 'smc:twist' has no value"),
    (["{script}:story", "--method", "importance:every=2"], "is no option of method 'importance'"),
    (["{script}:story", "--method", "smc:twist=3"], "a twist is a name or a function"),
    (["{script}:story", "--method", "mh:seed=1.5"], "seed must be an integer, got 1.5"),
    (["{script}:story", *arguments("ab", "ba"), "--num-samples", "0"], "num_samples must be"),
    (["{script}:story", "--json", "{folder}/none/x.json"], "there is no folder"),
    (["{script}:story", "--json", "{folder}"], "is a folder"),
    (["{folder}/broken.py:story"], "line 2: NameError: name 'nothing' is not defined"),
    (["{folder}/stops.py:story"], "SystemExit: 3"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    options: list[str], message: str, script: Path, folder_of_lm: Path, tmp_path: Path
) -> None:
    (tmp_path / "story.txt").write_text("")
    (tmp_path / "broken.py").write_text("import langppl\nnothing\n")
    (tmp_path / "stops.py").write_text("raise SystemExit(3)\n")
    filled = [o.format(script=script, folder=tmp_path, lm=folder_of_lm) for o in options]
    result = runner.invoke(app, ["compare", *filled])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_the_help_says_that_the_script_is_run() -> None:
    text = " ".join(runner.invoke(app, ["compare", "--help"]).output.split())
    assert "is run as it would be if you imported it" in text


def test_the_example_can_be_compared(folder_of_lm: Path) -> None:
    path = Path(__file__).parents[1] / "examples" / "story_infilling.py"
    with scripts.model_in(f"{path}:make_story", str(folder_of_lm)) as model:
        assert scripts.arguments(model, ["A.", " B."]) == ["A.", " B."]
        assert model.__name__ == "story"
