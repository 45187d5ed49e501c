"""What a bare `import langppl` offers, and what it leaves alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import langppl as lp


def run(code: str) -> str:
    """What a fresh Python prints."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_import_loads_nothing_else() -> None:
    loaded = ast.literal_eval(run("import sys, langppl; print(sorted(sys.modules))"))
    heavy = {"torch", "numpy", "pyro", "transformers", "matplotlib", "pandas", "arviz"}
    assert not heavy & set(loaded)
    assert [m for m in loaded if m.startswith("langppl")] == ["langppl"]


def test_submodules_are_there_after_a_bare_import() -> None:
    first = run("import sys, langppl as lp; lp.plots.plot_posterior; print(sorted(sys.modules))")
    assert not {"matplotlib", "pandas", "arviz"} & set(ast.literal_eval(first))
    named = run("import langppl as lp; print([getattr(lp, m).__name__ for m in lp._MODULES])")
    assert ast.literal_eval(named) == [f"langppl.{m}" for m in lp._MODULES]


def test_every_name_is_there_and_listed() -> None:
    for name in lp.__all__:
        assert getattr(lp, name) is not None
        assert name in dir(lp)
    assert {*lp._MODULES, *lp._HOME_OF} == set(lp.__all__)
    assert len(lp.__all__) == len(set(lp.__all__))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lp.nothing


def test_a_misspelt_name_is_told_what_may_be_meant() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import langppl; langppl.sampel"], capture_output=True, text=True
    )
    assert "has no attribute 'sampel'. Did you mean: 'sample'?" in done.stderr


def test_completion_offers_public_names_alone() -> None:
    shown = run("import langppl as lp; lp.infer, lp.em, lp.testing; print(dir(lp))")
    assert sorted(lp.__all__) == [n for n in ast.literal_eval(shown) if not n.startswith("__")]
    for module in lp._MODULES:
        public = getattr(lp, module).__all__
        assert sorted(public) == sorted(set(public)) and set(public) <= set(
            dir(getattr(lp, module))
        )


def test_types_are_those_that_calls_give_and_raise() -> None:
    lm = lp.testing.tiny_lm("ab. ")

    def model(seen: str) -> None:
        z = lp.sample("z", lp.LMChoice(lm, "a", [" a", " b"]))
        lp.sample("seen", lp.LMChoice(lm, f"a{z}", [" a", " b"]), obs=seen)

    contexts: list[lp.ContextInfo] = []

    def context(info: lp.ContextInfo) -> lp.Prompt:
        contexts.append(info)
        return lp.observations_first(info)

    found: lp.Comparison = lp.compare(
        model, " a", rows=[("exact", None), ("importance", lp.PromptedGuide(context))]
    )
    assert isinstance(found, lp.Comparison) and not found.errors
    assert contexts and isinstance(contexts[0], lp.ContextInfo)
    calibration: lp.Calibration = lp.calibrate(model, " a", simulations=20, draws=3)
    assert isinstance(calibration, lp.Calibration)
    bounds: lp.EvidenceBounds = lp.evidence_bounds(model, " a", num_samples=2, num_observations=2)
    assert isinstance(bounds, lp.EvidenceBounds)
    assert isinstance(lp.GFlowNetGuide(lm).history, lp.History)
    with pytest.raises(lp.UnknownSiteError):
        found.posteriors["exact"].probabilities("y")
    with pytest.warns(lp.PromptWarning):
        lm.encode_prompt("<s>a")
    assert issubclass(lp.FetchError, RuntimeError)
    for warning in (
        lp.InferenceWarning,
        lp.JoinWarning,
        lp.RandomnessWarning,
        lp.StaticMismatchWarning,
    ):
        assert issubclass(warning, UserWarning)


def test_loading_leaves_the_bars_of_transformers_as_they_were(tmp_path: Path) -> None:
    lm = lp.testing.tiny_lm("ab.")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    code = (
        "import langppl as lp; from transformers.utils import logging as l; "
        f"l.enable_progress_bar(); lp.LM({str(tmp_path)!r}, device='cpu'); "
        "print(l.is_progress_bar_enabled()); "
        f"l.disable_progress_bar(); lp.LM({str(tmp_path)!r}, device='cpu'); "
        "print(l.is_progress_bar_enabled())"
    )
    assert run(code).split() == ["True", "False"]
