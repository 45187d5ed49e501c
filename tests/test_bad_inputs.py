"""Twenty-two bad inputs and what a user reads: the place, the value, and the mend."""

from __future__ import annotations

import gc
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine import runtime

import langppl as lp
from langppl.diagnostics import InferenceWarning
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)
OTHER = tiny_lm("ab.", seed=2)


def short(prompt: Any = "a", tokens: int = 3, **rules: Any) -> lp.LMString:
    return lp.LMString(LM, prompt, max_tokens=tokens, **rules)


def goes_on(prompt: str) -> lp.LMString:
    return lp.LMString(LM, prompt)


def story(ending: str = "a") -> str:
    middle = lp.sample("middle", short())
    lp.sample("ending", goes_on(middle), obs=ending)
    return middle


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Any:
    yield
    assert runtime._PYRO_STACK == []
    assert torch.is_grad_enabled()


# -- 1: unknown model name -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smolm2-135m-instruct", "no such model", ""])
def test_unknown_model_name(name: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"no model is called '{name}', and no folder is there.*Known names: "
        r".*smollm2-135m-instruct.*full id, as in 'HuggingFaceTB/SmolLM2-360M'",
    ):
        lp.LM(name)


# -- 2, 3, 4: lengths and stops ------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, -3, 2.5, True, "4"])
def test_zero_or_negative_max_tokens(tokens: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"max_tokens must be an integer of at least 1, got {tokens!r}"
    ):
        lp.LMString(LM, "a", max_tokens=tokens)


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(
        ValueError, match="min_tokens=4 is above max_tokens=3: no string satisfies both"
    ):
        lp.LMString(LM, "a", min_tokens=4, max_tokens=3)


@pytest.mark.parametrize("stop", ["", [""], [".", ""]])
def test_an_empty_stop(stop: Any) -> None:
    with pytest.raises(ValueError, match=r"a stop must be a non-empty string, got .*''"):
        lp.LMString(LM, "a", stop=stop, max_tokens=3)


# -- 5: sampling an open string ------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["prior", "prompted"])
def test_sampling_an_open_string(guide: str) -> None:
    def model() -> None:
        lp.sample("ending", goes_on("a"))

    with pytest.raises(
        ValueError,
        match=r"site 'ending': an open string cannot be sampled: it has no end\. Give its LMString "
        "max_tokens or a stop, observe it, or simulate it",
    ):
        lp.infer(model, guide=guide, num_samples=2)


def test_sampling_an_open_string_outside_of_inference() -> None:
    with pytest.raises(ValueError, match="site 'ending': an open string cannot be sampled"):
        lp.sample("ending", goes_on("a"))


# -- 6, 7: options -------------------------------------------------------------------------------


def test_empty_options() -> None:
    with pytest.raises(ValueError, match="options are empty: a choice needs at least one"):
        lp.LMChoice(LM, "a", [])


def test_equal_options() -> None:
    with pytest.raises(ValueError, match="the option 'b' is given twice"):
        lp.LMChoice(LM, "a", ["a", "b", "b"])


# -- 8: duplicate site ---------------------------------------------------------------------------


def twice_latent() -> None:
    lp.sample("z", short())
    lp.sample("z", short("b"))


def twice_observed() -> None:
    lp.sample("other", short())
    lp.sample("z", goes_on("a"), obs="a")
    lp.sample("z", goes_on("a"), obs="b")


def twice_in_a_loop() -> None:
    for _ in range(2):
        lp.sample("z", dist.Normal(0.0, 1.0))


def twice_call_and_factor() -> None:
    lp.sample("other", short())
    lp.call("z", len, "ab")
    lp.factor("z", 0.0)


@pytest.mark.parametrize(
    "model", [twice_latent, twice_observed, twice_in_a_loop, twice_call_and_factor]
)
def test_duplicate_site(model: Callable[[], None]) -> None:
    with pytest.raises(
        ValueError, match=r"site 'z' is met twice in one execution.*own name, in a loop.*\"z_\{i\}"
    ):
        lp.infer(model, num_samples=2)


# -- 9: non-string observation -------------------------------------------------------------------


@pytest.mark.parametrize("value", [3, 2.5, b"a", ["a"], torch.tensor(1.0)])
def test_non_string_observation(value: Any) -> None:
    with pytest.raises(
        TypeError, match=r"site 'ending' is a string site, but its value is .*; give a str"
    ) as caught:
        lp.infer(story, value, num_samples=2)
    assert repr(value) in str(caught.value)
    assert type(value).__name__ in str(caught.value)


# -- 10: an observation that breaks a rule -------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "value", "rule"),
    [
        ({"stop": ".", "max_tokens": 4}, "a.b", r"stop"),
        ({"max_tokens": 2}, "abab", r"max_tokens"),
        ({"max_tokens": 4, "min_tokens": 3}, "a", r"min_tokens"),
        ({"max_tokens": 4, "ban": "b"}, "ab", r"ban"),
        ({"max_tokens": 4, "allow": "a"}, "ab", r"allow"),
        ({"max_tokens": 2, "stop": ".", "truncate": "reject"}, "ab", r'truncate="reject"'),
        ({"max_tokens": 4}, "xyz", r"token"),
    ],
)
@pytest.mark.parametrize("method", ["importance", "exact"])
def test_an_observation_that_breaks_a_rule(
    rules: dict[str, Any], value: str, rule: str, method: str
) -> None:
    def model() -> None:
        lp.sample("z", lp.LMChoice(LM, "a", ["a", "b"]))
        lp.sample("seen", lp.LMString(LM, "a", **rules), obs=value)

    with pytest.warns(InferenceWarning, match="explains the observations.*-inf at site 'seen'"):
        posterior = lp.infer(model, method=method, num_samples=4)

    assert posterior.log_evidence == -math.inf
    (note,) = [n for n in posterior.notes if n.startswith("site 'seen'")]
    assert note.startswith(f"site 'seen': {value!r} is impossible: ")
    assert rule in note
    assert note.split("impossible: ")[1] in " ".join(str(posterior).split()), "it is printed"
    with pytest.raises(ValueError, match="explains the observations"):
        posterior.probabilities("z")


def test_an_observation_that_is_no_option() -> None:
    def model() -> None:
        lp.sample("z", short())
        lp.sample("seen", lp.LMChoice(LM, "a", ["a", "b"]), obs="c")

    with pytest.warns(InferenceWarning, match="-inf at site 'seen'"):
        posterior = lp.infer(model, num_samples=4)
    assert list(posterior.notes) == [
        "site 'seen': 'c' is impossible: it is none of the options ['a', 'b']"
    ]


# -- 11: prompt too long -------------------------------------------------------------------------


def test_prompt_too_long() -> None:
    small = tiny_lm("ab.", window=8)

    def latent() -> None:
        lp.sample("z", lp.LMString(small, "ababab", max_tokens=3))

    def observed() -> None:
        z = lp.sample("z", short())
        lp.sample("seen", lp.LMString(small, "ababab" + z[:0]), obs="aab")

    def choice() -> None:
        lp.sample("pick", lp.LMChoice(small, "abababab", ["a", "b"]))

    for model, site in ((latent, "z"), (observed, "seen")):
        with pytest.raises(
            ValueError,
            match=rf"site '{site}': the prompt has 6 tokens and the string needs up to 3 more, "
            r"but LM\('tiny-0'\) reads at most 8; shorten the prompt",
        ):
            lp.infer(model, num_samples=2)
    with pytest.raises(ValueError, match="site 'pick': the prompt has 8 tokens"):
        lp.infer(choice, num_samples=2)


# -- 12: empty dataset ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guide() -> lp.GFlowNetGuide:
    return lp.GFlowNetGuide(LM, rank=2)


def test_empty_dataset(guide: lp.GFlowNetGuide) -> None:
    with pytest.raises(
        ValueError, match="data is empty: give at least one tuple of the model's arguments"
    ):
        guide.fit(story, data=[], steps=1)


def test_a_dataset_of_no_tuples(guide: lp.GFlowNetGuide) -> None:
    with pytest.raises(
        TypeError, match=r"must be a tuple of the model's arguments, or a mapping .*, got 'ab'"
    ):
        guide.fit(story, data=["ab"], steps=1)


# -- 13, 14: numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, -1, 2.0, True])
def test_zero_samples(number: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"num_samples must be an integer of at least 1, got {number!r}"
    ):
        lp.infer(story, num_samples=number)


def test_zero_draws_of_a_guide(guide: lp.GFlowNetGuide) -> None:
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        guide.sample(story, n=0)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, True, "1"])
def test_a_temperature_of_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be above 0, got {temperature!r}"):
        short(temperature=temperature)
    with pytest.raises(ValueError, match=f"temperature must be above 0, got {temperature!r}"):
        lp.Tempered(short(), temperature)


# -- 15: NaN from a factor -----------------------------------------------------------------------


def nan_for_long_strings() -> None:
    z = lp.sample("z", short("a", 3))
    lp.factor("bonus", torch.log(torch.tensor(3.5 - 10.0 * ("b" in z and "yes" not in z))))
    lp.sample("seen", goes_on(z), obs="a")


@pytest.mark.parametrize("method", ["importance", "exact"])
def test_nan_from_a_factor(method: str) -> None:
    with pytest.raises(ValueError, match="factor 'bonus' is nan; a log weight must be below inf"):
        lp.infer(nan_for_long_strings, method=method, num_samples=50)


def test_nan_from_every_run() -> None:
    def model() -> None:
        lp.sample("z", short())
        lp.factor("bonus", math.nan)

    with pytest.raises(ValueError, match="factor 'bonus' is nan"):
        lp.infer(model, num_samples=2)


def test_nan_from_a_factor_in_training(guide: lp.GFlowNetGuide) -> None:
    with pytest.raises(FloatingPointError, match="at training step 0, factor 'bonus' is nan"):
        guide.fit(nan_for_long_strings, steps=2, batch=32)


# -- 16, 17: unknown guide and method ------------------------------------------------------------


def test_an_unknown_guide() -> None:
    with pytest.raises(
        ValueError, match="unknown guide 'gflow'; guides are: prior, prompted, gflownet"
    ):
        lp.infer(story, guide="gflow")
    with pytest.raises(TypeError, match="a guide is a name, a Guide or a function, got 3"):
        lp.infer(story, guide=3)
    with pytest.raises(ValueError, match="unknown guide 'gflow'"):
        lp.compare(story, guides=["gflow"])


def test_an_unknown_method() -> None:
    methods = "unknown method 'vi'; methods are: importance, smc, mh, exact"
    with pytest.raises(ValueError, match=methods):
        lp.infer(story, method="vi")


# -- 18: a guide made for another LM -------------------------------------------------------------


def test_a_guide_made_for_another_lm(tmp_path: Path) -> None:
    other = lp.GFlowNetGuide(OTHER, rank=2)
    message = (
        r"this guide was made for LM\('tiny-2'\), but latent 'middle' is under LM\('tiny-1'\); "
        "make a guide for that LM"
    )
    with pytest.raises(ValueError, match=message):
        lp.infer(story, guide=other, num_samples=2)
    with pytest.raises(ValueError, match=message):
        other.fit(story, steps=1)
    with pytest.raises(ValueError, match=message):
        other.sample(story)
    alike = lp.GFlowNetGuide(LM.from_parts(OTHER.model, OTHER.tokenizer, LM.name), rank=2)
    with pytest.raises(ValueError, match="is under another LM object of that name"):
        lp.infer(story, guide=alike, num_samples=2)

    other.save(tmp_path)
    with pytest.raises(
        ValueError, match=r"was trained on 'tiny-2' .*, and LM\('tiny-1'\) has other weights"
    ):
        lp.GFlowNetGuide.load(tmp_path, LM)


# -- 19: a corrupt adapter folder ----------------------------------------------------------------


def cut_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def nan_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({k: v * math.nan for k, v in load_file(path).items()}, path)


def missing_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def cut_config(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(path.read_text()[:40])


def no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def cut_record(folder: Path) -> None:
    path = folder / "guide.json"
    path.write_text(path.read_text()[:40])


def other_record(folder: Path) -> None:
    (folder / "guide.json").write_text(json.dumps({"format": "something else"}))


def no_record(folder: Path) -> None:
    (folder / "guide.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, r"adapter_model\.safetensors is corrupt"),
        (no_weights, "is no adapter folder: adapter_model.safetensors is missing"),
        (nan_weights, "is corrupt: it holds NaN or infinity"),
        (missing_tensor, "does not fit this LM: 1 tensors differ"),
        (cut_config, r"adapter_config\.json is corrupt"),
        (no_config, "is no adapter folder: adapter_config.json is missing"),
        (cut_record, r"guide.json is corrupt"),
        (other_record, r"guide.json is corrupt"),
        (no_record, "is no guide folder: guide.json is missing"),
    ],
)
def test_a_corrupt_adapter_folder(
    damage: Callable[[Path], None], message: str, guide: lp.GFlowNetGuide, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    guide.save(folder)
    # Old ones have no digests, by which damage of the weights would be found first.
    record = json.loads((folder / "guide.json").read_text())
    (folder / "guide.json").write_text(json.dumps({**record, "sha256": None}))
    damage(folder)
    gc.collect()
    with LM.adapter(None):
        pass  # Guides of other tests that are gone leave the LM here.
    weights = {n for n, _ in LM.model.named_parameters()}
    adapters = set(LM.model.peft_config)

    with pytest.raises(ValueError, match=message) as caught:
        lp.GFlowNetGuide.load(folder, LM)

    assert str(folder) in str(caught.value)
    assert {n for n, _ in LM.model.named_parameters()} == weights, "nothing is left behind"
    assert set(LM.model.peft_config) == adapters


# -- 20: a string site in a vectorised plate -----------------------------------------------------


@pytest.mark.parametrize("obs", [None, "a"])
def test_a_string_site_in_a_vectorised_plate(obs: str | None) -> None:
    def model() -> None:
        with pyro.plate("rows", 3):
            lp.sample("z", short(), obs=obs)

    message = (
        r"string site 'z' is inside the vectorised plate 'rows'.*use a sequential plate: "
        r"for i in pyro.plate\(\"rows\", n\): lp.sample\(f\"z_\{i\}\""
    )
    with pytest.raises(ValueError, match=message):
        lp.infer(model, num_samples=2)
    with pytest.raises(ValueError, match=message):
        model()


def test_pyros_own_sample_in_a_vectorised_plate() -> None:
    def model() -> None:
        with pyro.plate("rows", 3):
            pyro.sample("z", short())

    with pytest.raises(ValueError, match="string site 'z' is inside the vectorised plate 'rows'"):
        lp.infer(model, num_samples=2)


# -- 21: a model that returns without sampling ---------------------------------------------------


@pytest.mark.parametrize("method", ["importance", "exact"])
def test_a_model_that_returns_without_sampling(method: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"the model returned without meeting a site: it has no lp\.sample, so there is "
        "nothing to infer",
    ):
        lp.infer(lambda: "a", method=method)


# -- 22: a model whose sites change between identical runs ---------------------------------------


def changing(what: str) -> Callable[[], None]:
    runs = itertools.count()

    def model() -> None:
        k = next(runs)
        z = lp.sample("z", short())
        if what == "name":
            lp.sample(f"seen_{k}", goes_on(z), obs="a")
        elif what == "prompt":
            lp.sample("seen", goes_on(z + "a" * k), obs="a")
        elif what == "observation":
            lp.sample("seen", goes_on(z), obs="a" * (k + 1))
        elif what == "order":
            for name in ("one", "two") if k % 2 else ("two", "one"):
                lp.sample(name, goes_on(z), obs="a")
        elif what == "number" and k % 2:
            lp.sample("sometimes", goes_on(z), obs="a")

    return model


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("name", r"run again, the model met site 'seen_\d+' where 'seen_\d+' was"),
        ("prompt", r"run again, site 'seen' had another distribution or observed value"),
        ("observation", r"run again, site 'seen' had another distribution or observed value"),
        ("order", r"run again, the model met site '(one|two)' where '(one|two)' was"),
        ("number", r"run again, the model met site 'sometimes' in one run only"),
    ],
)
def test_a_model_whose_sites_change_between_identical_runs(what: str, message: str) -> None:
    with pytest.raises(
        ValueError, match=message + r".*a model must be a function of its sites.*lp\.sample"
    ):
        lp.infer(changing(what), num_samples=4)


# -- 23 on: what newcomers write ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"twist": "lookahead"}, "method 'importance' takes no twist, got 'lookahead'; .*'smc'"),
        ({"chains": 3}, "method 'importance' takes no chains, got 3; chains is of method='mh'"),
        ({"method": "mh", "every": 2}, "method 'mh' takes no every, got 2"),
        ({"method": "smc", "thin": 2}, "method 'smc' takes no thin"),
        ({"method": "exact", "guide": "prompted"}, "method 'exact' takes no guide"),
        ({"limit": 10}, "method 'importance' takes no limit"),
    ],
)
def test_an_option_of_another_method(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.infer(story, num_samples=4, progress=False, **options)


def test_the_name_of_an_lm_for_the_lm() -> None:
    message = r"lm must be a langppl.LM, got 'gpt2'; write LM\('gpt2'\)"
    for make in (
        lambda: lp.LMString("gpt2", "a"),
        lambda: lp.LMChoice("gpt2", "a", ["b", "c"]),
        lambda: lp.GFlowNetGuide("gpt2"),
    ):
        with pytest.raises(TypeError, match=message):
            make()


def test_the_class_of_an_lm_for_the_lm() -> None:
    with pytest.raises(TypeError, match=r"langppl.LM, got .*; give an instance: LM\(name"):
        lp.LMString(lp.LM, "a")  # type: ignore[arg-type]


def test_what_is_no_distribution() -> None:
    with pytest.raises(TypeError, match="site 'z' needs a distribution, got 'a'"):
        lp.sample("z", "a")
    own = torch.distributions.Normal(0.0, 1.0)
    with pytest.raises(TypeError, match=r"torch's own; write pyro\.distributions\.Normal"):
        lp.sample("z", own)
    with pytest.raises(TypeError, match=r"site 'z' is no string site .*its value is '3'"):
        lp.sample("z", dist.Normal(0.0, 1.0), obs="3")
    for value in ("x", None):
        with pytest.raises(TypeError, match=f"factor 'f' must be one number, got {value!r}"):
            lp.factor("f", value)
    with pytest.raises(TypeError, match="call 'tool' needs a function, got 3"):
        lp.call("tool", 3)


@pytest.mark.parametrize("change", [lp.condition, lp.do])
def test_sites_that_no_run_meets(change: Any) -> None:
    with pytest.warns(UserWarning, match="names the site 'midle', and no run .* 'middle'"):
        lp.compile(change(story, {"midle": "a"}))
    nested = change(change(story, {"middle": "ab"}), {"midle": "a"})
    with pytest.warns(UserWarning, match="names the site 'midle'"):
        lp.compile(nested)
    lp.compile(change(story, {"middle": "ab"}))
    with pytest.raises(ValueError, match="there is no site 'endig'; observed are: 'ending'"):
        lp.compile(story).observing({"endig": "a"})


def test_exact_inference_says_how_many_executions_are_left() -> None:
    def loop() -> None:
        text = ""
        for turn in range(4):
            text += lp.sample(f"s{turn}", short(text or "a", 1))

    with pytest.raises(ValueError, match=r"the limit of exact inference is 20 executions, of whi"):
        lp.infer(loop, method="exact", limit=20, progress=False)


def test_patience_without_validation(guide: lp.GFlowNetGuide) -> None:
    with pytest.raises(ValueError, match="patience=2 counts validations, and validation is None"):
        guide.fit(story, steps=2, patience=2, progress=False)
    with pytest.raises(TypeError, match="schedule must be a RewardSchedule, got 'linear'"):
        guide.fit(story, steps=2, schedule="linear", progress=False)


def test_validation_is_done_at_the_end_of_a_short_training(guide: lp.GFlowNetGuide) -> None:
    guide.fit(story, data=[("a",), ("b",)], validation=[("ab",)], steps=2, progress=False)
    assert math.isfinite(guide.history["val_elbo"][-1])


@pytest.mark.parametrize("temperature", [1e-39])
def test_a_temperature_that_no_logit_can_be_divided_by(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be at least 1e-30, got 1e-39"):
        short(temperature=temperature)


# -- settings, before any work -------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("smc", {"twist": "lookback"}, "unknown twist 'lookback'"),
    ("smc", {"twist": "lookahead", "twist_power": 2.0}, "twist_power must be .* got 2.0"),
    ("smc", {"resampling": "none"}, "unknown resampling 'none'"),
    ("smc", {"every": 0}, "every must be an integer of at least 1, got 0"),
    ("smc", {"ess_threshold": math.nan}, "ess_threshold must be between 0 and 1, got nan"),
    ("mh", {"chains": 0}, "chains must be an integer of at least 1, got 0"),
    ("smc", {"ess_threshold": True}, "ess_threshold must be a number, got True"),
    (
        "smc",
        {"twist": "lookahead", "twist_power": "0.5"},
        "twist_power must be a number, got '0.5'",
    ),
    ("mh", {"tail_share": True}, "tail_share must be a number, got True"),
    ("mh", {"tail_share": math.nan}, "tail_share must be between 0 and 1, got nan"),
    ("exact", {"limit": math.nan}, "limit must be a number of at least 1, got nan"),
    ("exact", {"limit": "many"}, "limit must be a number of at least 1, got 'many'"),
]


def never_run() -> None:
    raise AssertionError("the model was run")


@pytest.mark.parametrize(("method", "options", "message"), WRONG)
def test_a_setting_is_checked_before_the_model_runs(
    method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lp.infer(never_run, method=method, **options)
    with pytest.raises(ValueError, match=message):
        lp.compare(never_run, rows=[(method, None if method == "exact" else "prior", options)])
    with pytest.raises(ValueError, match=message):
        lp.calibrate(never_run, method=method, **options)
    if method == "smc":
        with pytest.raises(ValueError, match=message):
            lp.evidence_bounds(never_run, method=method, **options)


@pytest.mark.parametrize("check", [lp.calibrate, lp.evidence_bounds])
def test_an_option_that_no_method_has(check: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"'twits' is no arg.*no option.*did you mean 'twist'"):
        check(never_run, method="smc", twits="lookahead")


@pytest.mark.parametrize(
    "ask", [lp.infer, lp.compare, lp.calibrate, lp.evidence_bounds, lp.compile]
)
@pytest.mark.parametrize("seed", [1.0, "1", None])
def test_a_seed_that_is_no_integer(ask: Callable[..., Any], seed: Any) -> None:
    with pytest.raises(TypeError, match=rf"seed must be an integer, got {seed!r}"):
        ask(never_run, seed=seed)


@pytest.mark.parametrize(
    "ask",
    [
        lambda seed: lp.GFlowNetGuide(LM, seed=seed),
        lambda seed: lp.GFlowNetGuide(LM).sample(story, seed=seed),
        lambda seed: lp.compile(story).simulate(1, seed=seed),
        lambda seed: LM.trainable("seedless", seed=seed),
        lambda seed: lp.em(story, [()], guide="prior", seed=seed),
    ],
    ids=["guide", "sample", "simulate", "trainable", "em"],
)
def test_no_seed_is_cut_to_an_integer(ask: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"seed must be an integer, got 1\.5"):
        ask(1.5)


def test_numbers_of_numpys_are_numbers() -> None:
    lp.infer(story, method="exact", limit=np.int64(1000))
    half = np.float32(0.5)
    lp.infer(story, method="smc", num_samples=4, ess_threshold=half)
    lp.infer(story, method="smc", num_samples=4, twist="lookahead", twist_power=half)
    lp.infer(story, method="mh", num_samples=4, chains=2, tail_share=half)


def test_seeds_of_any_integer_type_are_the_same() -> None:
    first, second = (lp.infer(story, num_samples=4, seed=s) for s in (3, np.int64(3)))
    assert first.samples == second.samples


@pytest.mark.parametrize("guides", [5, lp.PriorGuide(), "prior"])
def test_guides_to_compare_that_are_no_list(guides: Any) -> None:
    with pytest.raises(TypeError, match="guides must be a list"):
        lp.compare(never_run, guides=guides)


def test_a_choice_of_an_lm_whose_weights_are_not_finite() -> None:
    broken = tiny_lm("ab.", seed=1)
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[:] = math.nan

    def choice() -> None:
        lp.sample("mood", lp.LMChoice(broken, "a", ["a", "b"]))

    with pytest.raises(ValueError, match=r"site 'mood'.*are the LM's weights finite"):
        lp.infer(choice, num_samples=2)


def yields() -> Any:
    yield lp.sample("z", lp.LMString(LM, "a", max_tokens=1))


async def waits() -> None:
    lp.sample("z", lp.LMString(LM, "a", max_tokens=1))


class Made:
    def __init__(self) -> None:
        lp.sample("z", lp.LMString(LM, "a", max_tokens=1))


@pytest.mark.parametrize(
    ("ask", "error", "match"),
    [
        (lambda: lp.infer(yields), TypeError, "the model 'yields' is a generator"),
        (lambda: lp.infer(waits), TypeError, "the model 'waits' is async"),
        (lambda: lp.infer(Made), TypeError, "got the class Made; give an instance"),
        (
            lambda: lp.condition(lp.compile(story), {"middle": "a"}),
            TypeError,
            r"program\.observing",
        ),
        (lambda: lp.do(lp.compile(story), {"z": "a"}), TypeError, "do changes a model"),
        (lambda: lp.LM(LM.model), TypeError, r"LM\.from_parts\(model, tokenizer, name\)"),
        (lambda: lp.GFlowNetGuide.load("there", "smollm2"), TypeError, r"write LM\('smollm2'\)"),
        (
            lambda: lp.GFlowNetGuide(LM).fit(story, data={"x": [1]}),
            TypeError,
            "got a mapping; of columns make rows",
        ),
        (
            lambda: lp.infer(story, guide=lp.PromptedGuide(lambda info: 3)),
            TypeError,
            "guide's context for site 'middle': a prompt must be a string",
        ),
        (
            lambda: lp.LMString(LM, "a", stop=re.compile("b")),
            ValueError,
            "a stop must be a non-empty string",
        ),
        (lambda: lp.evidence_bounds(only_factors), ValueError, "conditioned by factors"),
    ],
)
def test_what_is_taken_for_something_else(
    ask: Callable[[], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ask()


def only_factors() -> None:
    z = lp.sample("z", lp.LMString(LM, "a", max_tokens=1))
    lp.factor("short", -float(len(z)))


def test_numbers_of_things_may_be_of_any_integer_type(tmp_path: Path) -> None:
    lm = tiny_lm("ab.", seed=1)
    four, two = np.int64(4), np.int32(2)

    def model() -> None:
        z = lp.sample("z", lp.LMString(lm, "a", stop=".", max_tokens=four, min_tokens=two))
        lp.sample("y", lp.LMString(lm, f"{z}"), obs="ab")

    found = lp.infer(model, num_samples=four, progress=False)
    assert found.num_samples == 4 and type(lp.LMString(lm, "a", max_tokens=four).limit(1)) is int
    lp.infer(model, method="smc", num_samples=four, every=two, progress=False)
    guide = lp.GFlowNetGuide(lm, rank=two)
    guide.fit(model, steps=two, batch=four, observations=np.int64(1), progress=False)
    assert guide.history.rows == 2
    chains = lp.infer(model, method="mh", num_samples=8, chains=four, thin=two, progress=False)
    chains.save(tmp_path / "chains.json")
    assert repr(lp.Posterior.load(tmp_path / "chains.json").chains) == repr(chains.chains)  # NaN
    for value in (True, 4.0, "4"):
        with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got"):
            lp.infer(model, num_samples=value, progress=False)


# -- what is of a wrong type, or in a wrong place ------------------------------------------------


class Answer:
    """As a model of Pydantic is."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {"type": "boolean"}


LETTER = lp.regex("a")
MISPLACED: list[tuple[Callable[[], object], str]] = [
    (lambda: lp.MaskedGuide(LETTER), r"MaskedGuide takes a mapping .* MaskedGuide\({\"z\": gramm"),
    (lambda: lp.pool_bounds(3), r"takes a list of what evidence_bounds returns, got 3; write"),
    (lambda: lp.pool_bounds([3]), r"takes a list of what evidence_bounds returns, got \[3\]"),
    (
        lambda: lp.Posterior([{"z": "a"}], [0.0]).diagnose([lp.Posterior([{"z": "a"}], [0.0])]),
        r"takes posteriors, got a list; .* posterior.diagnose\(\*others\)",
    ),
    (lambda: lp.deterministic(3, "a"), r"a site's name .* got 3; it comes first"),
    (lambda: lp.call(len, "abc"), r"a site's name .* got <built-in function len>; it comes first"),
    (lambda: lp.factor(-1.0, "f"), r"a site's name .* got -1.0; it comes first"),
    (lambda: lp.potential(len, len, "a"), r"a site's name .* it comes first"),
    (lambda: lp.json_schema(Answer), r"write json_schema\(Answer.model_json_schema\(\)\)"),
    (lambda: lp.regex(re.compile("a")), r"one that Python compiled, .* give its .pattern"),
    (lambda: lp.PromptedGuide(context="text"), r"context must be a function .* got 'text'"),
    (
        lambda: lp.infer(story, guide=lp.GFlowNetGuide),
        r"a guide is a name, a Guide or a function, .* the class; make one: GFlowNetGuide\(...\)",
    ),
    (
        lambda: lp.MixtureGuide([lp.GFlowNetGuide, "prior"], [0.5, 0.5]),
        r"the class; make one: GFlowNetGuide\(...\)",
    ),
    (lambda: lp.GFlowNetGuide.load(LM, "folder"), r"comes first, load\(folder, lm\), got LM"),
]


@pytest.mark.parametrize(("call", "says"), MISPLACED)
def test_what_is_of_a_wrong_type(call: Callable[[], object], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        call()


def test_a_number_outside_of_its_support_is_named_with_it() -> None:
    def model() -> None:
        lp.sample("z", short())
        lp.sample("share", dist.Beta(1.0, 1.0), obs=2.0)

    with pytest.warns(InferenceWarning, match="a number within its distribution's support"):
        found = lp.infer(model, num_samples=4, progress=False)
    (note,) = found.notes
    assert note.startswith("site 'share': 2.0 is impossible: it is outside of the support of Beta(")
