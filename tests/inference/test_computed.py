"""What a model computes, and what it returns, reaches the posterior under every method."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import langppl as lp
from langppl.diagnosis import diagnose
from langppl.inference.comparison import figures, likeliest
from langppl.learning.draws import posteriors
from langppl.posterior import ABSENT, UnknownSiteError
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=1)


def capitals(text: str) -> list[str]:
    return [c.upper() for c in text]


def counted() -> str:
    z = lp.sample("z", lp.LMString(LM, "a", stop=".", min_tokens=0, max_tokens=2))
    length = lp.deterministic("length", len(z))
    parts = lp.call("parts", capitals, z)
    if length > 1:
        lp.deterministic("last", z[-1])
    lp.sample("seen", lp.LMString(LM, f"b{z}"), obs="a")
    parts.append("changed by the model")
    return f"<{z}>"


METHODS: dict[str, dict[str, Any]] = {
    "importance": {"num_samples": 40},
    "prompted": {"num_samples": 40, "guide": "prompted"},
    "smc": {"method": "smc", "num_samples": 40, "twist": "lookahead", "every": 1},
    "rejuvenated": {"method": "smc", "num_samples": 20, "rejuvenation": 2},
    "mh": {"method": "mh", "num_samples": 80, "chains": 8, "warmup": 0},
    "exact": {"method": "exact"},
}


@pytest.mark.parametrize("options", METHODS.values(), ids=list(METHODS))
def test_every_method_keeps_what_is_computed(options: dict[str, Any]) -> None:
    posterior = lp.infer(counted, progress=False, **options)

    assert posterior.computed_sites[:2] == ("length", "parts")
    assert len(posterior.computed) == len(posterior)
    assert len({s["z"] for s in posterior.samples}) > 1
    for sample, computed, returned in zip(
        posterior.samples, posterior.computed, posterior.returns or [], strict=True
    ):
        z = sample["z"]
        expected: dict[str, Any] = {"length": len(z), "parts": capitals(z)}
        if len(z) > 1:
            expected["last"] = z[-1]
        assert computed == expected
        assert returned == f"<{z}>"
        assert set(sample) == {"z"}


def test_the_posterior_of_what_is_computed() -> None:
    posterior = lp.infer(counted, method="exact", progress=False)
    by_text = posterior.probabilities("z")

    lengths: dict[float, float] = {}
    for text, p in by_text.items():
        lengths[float(len(text))] = lengths.get(float(len(text)), 0.0) + p
    assert posterior.probabilities("length") == pytest.approx(lengths)
    assert len(lengths) == 3
    mean = sum(n * p for n, p in lengths.items())
    assert posterior.expect("length") == pytest.approx(mean)
    assert posterior.expect(lambda s: s["length"]) == pytest.approx(mean)
    assert posterior.probabilities("last")[ABSENT] == pytest.approx(lengths[0.0] + lengths[1.0])
    assert posterior.probabilities("_RETURN") == pytest.approx(
        {f"<{text}>": p for text, p in by_text.items()}
    )
    assert posterior.mode("length") == max(lengths, key=lambda n: lengths[n])
    assert likeliest(posterior, "length", 1)[0][0] == posterior.mode("length")
    (row,) = [line.split() for line in str(posterior).splitlines() if line.startswith("length")]
    likely = posterior.mode("length")
    assert row == ["length", f"{likely:g}", f"{lengths[likely]:.3f}"]


def test_what_is_computed_is_no_latent() -> None:
    lm = tiny_lm("ab.", seed=1, merged=["ab"])

    def plain() -> lp.Text:
        z = lp.sample("z", lp.LMString(lm, "a", max_tokens=2))
        lp.sample("seen", lp.LMString(lm, f"b{z}"), obs="a")
        return z

    def spelled() -> None:
        # Tells samples of one text and different tokens apart.
        lp.deterministic("ids", plain().ids)

    one = lp.infer(plain, num_samples=40, progress=False)
    other = lp.infer(spelled, num_samples=40, progress=False)
    assert len(set(other["ids"])) > len(set(other["z"]))

    assert one.sites == other.sites == ("z",)
    assert one.samples == other.samples
    assert list(one.log_weights) == list(other.log_weights)
    assert one.log_joint is not None and other.log_joint is not None
    assert list(one.log_joint) == list(other.log_joint)
    assert diagnose(one).distinct == diagnose(other).distinct < 40
    assert figures("a", one)["distinct"] == figures("a", other)["distinct"]
    assert list(figures("a", other)["likeliest"]) == ["z"]


def test_a_file_keeps_what_is_computed_and_says_what_it_cannot(tmp_path: Path) -> None:
    def model() -> None:
        z = lp.sample("z", lp.LMString(LM, "a", stop=".", min_tokens=0, max_tokens=2))
        lp.deterministic("length", len(z))
        lp.deterministic("own", frozenset(z))

    posterior = lp.infer(model, num_samples=6, progress=False)
    posterior.save(tmp_path / "p.json")
    loaded = lp.Posterior.load(tmp_path / "p.json")

    assert loaded.computed == tuple({"length": len(s["z"])} for s in posterior.samples)
    assert loaded.notes == (
        "The computed values 'own' were not saved: a value of type frozenset cannot be written as "
        "JSON.",
    )


def test_values_that_are_not_hashable_have_no_table() -> None:
    def model() -> dict[str, int]:
        z = lp.sample("z", lp.LMString(LM, "a", stop=".", min_tokens=0, max_tokens=2))
        lp.call("counts", lambda: {"a": z.count("a")})
        return {"a": 1}

    posterior = lp.infer(model, num_samples=6, progress=False)

    for name in ("counts", "_RETURN"):
        with pytest.raises(
            TypeError, match=f"'{name}' has values that are not hashable.*dict.*exp"
        ):
            posterior.probabilities(name)
    assert "not hashable (dict)" in str(posterior)
    assert posterior.expect(lambda s: s["counts"]["a"]) == pytest.approx(
        posterior.expect(lambda s: s["z"].count("a"))
    )


def test_a_list_of_a_tool_is_counted_by_its_content_and_belongs_to_its_sample() -> None:
    program = lp.compile(counted)
    posterior = lp.infer(program, num_samples=40, progress=False)
    before = posterior.probabilities("parts")
    assert ("A", ".") in before

    for computed in posterior.computed:
        computed["parts"].append("mine")

    assert lp.infer(program, num_samples=40, progress=False).probabilities("parts") == before


def test_an_execution_that_fails_keeps_what_it_computed_before() -> None:
    def model() -> int:
        z = lp.sample(
            "z", lp.LMString(LM, "a", stop=".", min_tokens=0, max_tokens=1, truncate="reject")
        )
        lp.deterministic("length", len(z))
        return 1 // int(z in ("", "."))

    posterior = lp.infer(model, num_samples=30, progress=False)
    assert 0.0 < posterior.impossible_share < 1.0
    assert posterior["length"] == [len(z) for z in posterior["z"]]
    assert posterior.probabilities("length") == pytest.approx(
        {float(len(z)): p for z, p in posterior.probabilities("z").items()}
    )


def test_em_keeps_them_too() -> None:
    (found,) = posteriors([lp.compile(counted)], None, "importance", 8, (0,), lambda n: None, {})
    assert found["length"] == [len(z) for z in found["z"]]


def test_a_guide_learns_from_draws_that_carry_computed_values() -> None:
    posterior = lp.infer(counted, num_samples=16, progress=False)
    guide = lp.GFlowNetGuide(LM, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide.fit(counted, given=posterior, objective="mle", steps=2, progress=False)
    assert guide.history.rows == 2


def test_prediction_takes_latents_alone_and_gives_computed_values() -> None:
    posterior = lp.infer(counted, num_samples=8, progress=False)

    def twice() -> int:
        z = lp.sample("z", lp.LMString(LM, "a", stop=".", min_tokens=0, max_tokens=2))
        return int(lp.deterministic("double", 2 * len(z)))

    for found in posterior.predict(twice, seed=1):
        assert found["double"] == found["_RETURN"]
        assert type(found["double"]) is int


def test_an_unknown_name_lists_what_is_computed() -> None:
    posterior = lp.infer(counted, method="exact", progress=False)
    with pytest.raises(UnknownSiteError) as caught:
        posterior.probabilities("lenght")
    computed = ", ".join(map(repr, posterior.computed_sites))
    assert sorted(posterior.computed_sites) == ["last", "length", "parts"]
    assert str(caught.value) == (
        "no sample has met a latent site 'lenght'; those met are: 'z'; "
        f"the computed values are: {computed}"
    )


def test_the_guide_itself_is_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fit = lp.GFlowNetGuide.fit

    def short_fit(self: lp.GFlowNetGuide, *args: Any, **kwargs: Any) -> Any:
        return fit(self, *args, **{**kwargs, "steps": 1})

    monkeypatch.setattr(lp.GFlowNetGuide, "fit", short_fit)
    posterior = lp.infer(counted, guide="gflownet", num_samples=4, progress=False)

    assert posterior.guide == "gflownet"
    trained = posterior.guide_object
    assert isinstance(trained, lp.GFlowNetGuide) and trained.history.rows == 1
    again = lp.infer(counted, guide=trained, num_samples=4, progress=False)
    assert again.guide_object is trained
    torch.testing.assert_close(torch.tensor(again.log_weights), torch.tensor(posterior.log_weights))
    for options in ({"method": "smc"}, {"method": "mh", "chains": 2}):
        found = lp.infer(counted, guide=trained, num_samples=4, progress=False, **options)
        assert found.guide_object is trained
    assert lp.infer(counted, method="exact", progress=False).guide_object is None
    posterior.save(tmp_path / "p.json")
    assert lp.Posterior.load(tmp_path / "p.json").guide_object is None


def test_numbers_and_truth_values_are_what_the_model_returned() -> None:
    """As keys True and 1.0 are equal, so their types are compared."""

    def model() -> Any:
        z = lp.sample("z", lp.LMString(LM, "a", max_tokens=2))
        lp.deterministic("array", np.int64(len(z)))
        lp.deterministic("tensor", torch.tensor(len(z) > 1))
        lp.deterministic("half", torch.tensor(0.5))
        return "a" in z, len(z)

    posterior = lp.infer(model, num_samples=16, progress=False)
    kinds = {
        name: {type(v) for v in posterior.probabilities(name)}
        for name in ("array", "tensor", "half")
    }
    assert kinds == {"array": {int}, "tensor": {bool}, "half": {float}}
    for returned in posterior.probabilities("_RETURN"):
        assert [type(v) for v in returned] == [bool, int]
