"""`Posterior`: probabilities, expectations, printing and files, against values made by hand."""

from __future__ import annotations

import io
import json
import math
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from langppl.diagnostics import InferenceWarning, pareto_k
from langppl.distributions.text import Text
from langppl.parts import Part
from langppl.posterior import ABSENT, Posterior, UnknownSiteError

LOG3 = math.log(3.0)
INF = math.inf


def one_to_three(**kwargs: Any) -> Posterior:
    return Posterior([{"z": "cat"}, {"z": "dog"}], [0.0, LOG3], **kwargs)


def dead(**kwargs: Any) -> Posterior:
    with pytest.warns(InferenceWarning, match="no sample explains the observations"):
        return Posterior([{"z": "a"}, {"z": "b"}], [-INF, -INF], **kwargs)


def narrow(posterior: Posterior, width: int) -> str:
    console = rich.console.Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(posterior)
    return capture.get()


def lognormal(spread: float, n: int = 200, **kwargs: Any) -> Posterior:
    weights = np.random.default_rng(0).normal(-5.0, spread, n)
    return Posterior([{"z": str(i % 4)} for i in range(n)], weights, **kwargs)


# --- numbers ---


def test_weights_one_to_three() -> None:
    posterior = one_to_three()
    np.testing.assert_allclose(posterior.weights, [0.25, 0.75])
    assert posterior.log_weights.dtype == np.float64
    assert posterior.probabilities("z") == pytest.approx({"dog": 0.75, "cat": 0.25})
    assert list(posterior.probabilities("z")) == ["dog", "cat"]
    assert posterior.log_evidence == pytest.approx(math.log(2.0))
    assert posterior.log_evidence_error == pytest.approx(0.5)
    assert posterior.ess == pytest.approx(1.6)
    assert posterior.elbo == pytest.approx(LOG3 / 2.0)
    assert posterior.elbo_possible == pytest.approx(LOG3 / 2.0)
    assert posterior.impossible_share == 0.0
    assert posterior.num_samples == len(posterior) == 2
    assert math.isnan(posterior.pareto_k)
    assert not posterior.reliable


def test_impossible_samples() -> None:
    posterior = Posterior([{"z": "a"}, {"z": "b"}, {"z": "c"}, {"z": "d"}], [0.0, LOG3, -INF, -INF])
    assert posterior.elbo == -INF
    assert posterior.elbo_possible == pytest.approx(LOG3 / 2.0)
    assert posterior.impossible_share == 0.5
    assert posterior.log_evidence == pytest.approx(0.0, abs=1e-12)
    assert posterior.probabilities("z") == pytest.approx({"b": 0.75, "a": 0.25})


def test_strings_are_merged_by_text() -> None:
    samples = [
        {"z": Text("ab", ids=(1, 2), tokenizer="t")},
        {"z": Text("ab", ids=(3,), tokenizer="t")},
        {"z": "ab"},
        {"z": Text("ba", ids=(2, 1), tokenizer="t")},
    ]
    table = Posterior(samples, [0.0, 0.0, 0.0, 0.0]).probabilities("z")
    assert table == pytest.approx({"ab": 0.75, "ba": 0.25})
    assert [type(value) for value in table] == [str, str]


def test_equal_numbers_have_one_key_that_keeps_its_type() -> None:
    samples: list[dict[str, Any]] = [
        {"n": torch.tensor(2)},
        {"n": 2.0},
        {"n": np.float32(2.0)},
        {"n": torch.tensor(0.5)},
    ]
    table = Posterior(samples, [0.0] * 4).probabilities("n")
    assert table == {2.0: 0.75, 0.5: 0.25}
    assert [type(value) for value in table] == [int, float]


def test_tensors_are_keyed_by_tuples() -> None:
    samples = [{"v": torch.tensor([0.25, 0.75])}, {"v": torch.tensor([0.25, 0.75])}]
    assert Posterior(samples, [0.0, 0.0]).probabilities("v") == {(0.25, 0.75): 1.0}


def test_equal_probabilities_keep_the_order_of_the_samples() -> None:
    posterior = Posterior([{"z": "b"}, {"z": "a"}, {"z": "c"}], [0.0, 0.0, 0.0])
    assert list(posterior.probabilities("z")) == ["b", "a", "c"]


def test_a_latent_that_exists_in_some_executions_only() -> None:
    samples = [{"z": "yes", "why": "(absent)"}, {"z": "no"}, {"z": "no"}, {"z": "no"}]
    posterior = Posterior(samples, [0.0] * 4)
    assert posterior.sites == ("z", "why")
    table = posterior.probabilities("why")
    assert table == {ABSENT: 0.75, "(absent)": 0.25}
    assert str(ABSENT) == f"{ABSENT}" == "(absent)"
    assert ABSENT != "(absent)"
    assert pickle.loads(pickle.dumps(ABSENT)) is ABSENT
    printed = str(posterior)
    assert " (absent) " in printed  # the row of the absent ones
    assert "'(absent)'" in printed  # the row of the string


def test_latents_that_no_sample_met_have_one_line() -> None:
    never = [f"never {k}" for k in range(7)]
    printed = str(Posterior([{"z": "yes"}, {"z": "no"}], [0.0, 0.0], sites=["z", *never]))
    line = "'never 0', 'never 1', 'never 2', 'never 3', 'never 4' and 2 more"
    assert line in " ".join(printed.split())
    assert "(absent)" not in printed and "0.500" in printed
    # One that only an impossible sample met is like them.
    samples = [{"z": "yes"}, {"z": "no", "why": "b"}]
    printed = str(Posterior(samples, [0.0, -math.inf], failed_sites={"z": 1}))
    assert "met by no sample of weight: 'why'\n" in printed


def test_sites_come_in_the_given_order_and_may_be_absent_everywhere() -> None:
    posterior = Posterior([{"b": "1", "a": "2"}], [0.0], sites=["a", "never"])
    assert posterior.sites == ("a", "never", "b")
    assert posterior.probabilities("never") == {ABSENT: 1.0}


def test_an_unknown_site() -> None:
    with pytest.raises(UnknownSiteError) as caught:
        Posterior([{"z": "a", "y": "b"}], [0.0]).probabilities("x")
    assert isinstance(caught.value, KeyError)
    assert str(caught.value) == "no sample has met a latent site 'x'; those met are: 'z', 'y'"


def test_exact() -> None:
    # Joints 0.1 and 0.3 of two points, a third one impossible: evidence 0.4.
    joint = [math.log(0.1), math.log(0.3), -INF]
    posterior = Posterior([{"z": "a"}, {"z": "b"}, {"z": "c"}], joint, method="exact")
    assert posterior.log_evidence == pytest.approx(math.log(0.4))
    assert posterior.log_evidence_error == 0.0
    assert posterior.probabilities("z") == pytest.approx({"b": 0.75, "a": 0.25})
    assert posterior.reliable
    assert posterior.elbo == posterior.elbo_possible == posterior.log_evidence
    assert (posterior.ess, posterior.pareto_k, posterior.impossible_share) == (INF, -INF, 0.0)
    assert "log evidence -0.916 nats (exact)" in str(posterior)


def test_given_evidence() -> None:
    posterior = one_to_three(log_evidence=-3.0, method="smc")
    assert posterior.log_evidence == -3.0
    assert math.isnan(posterior.log_evidence_error)
    assert "log evidence -3.000 nats (its error is not known)" in " ".join(str(posterior).split())
    assert one_to_three(log_evidence=-3.0, log_evidence_error=0.1).log_evidence_error == 0.1
    unknown = one_to_three(log_evidence=math.nan, method="mh")
    assert unknown.log_evidence is None and unknown.log_evidence_error is None
    assert "log evidence is not estimated by method mh" in str(unknown)


def test_reliable_follows_the_threshold() -> None:
    assert lognormal(0.1).reliable
    assert not lognormal(4.0).reliable
    assert lognormal(4.0).pareto_k > 0.7


def test_reliable_follows_the_threshold_of_so_many_samples() -> None:
    # Of 100 samples it is 1 − 1/log₁₀ 100 = 0.5, below the 0.7 of thousands.
    spreads = np.random.default_rng(0).normal(0.0, 1.4, (200, 100))
    between = next(w for w in spreads if 0.52 < pareto_k(w) < 0.68)
    posterior = Posterior([{"z": "a"}] * 100, between)
    assert 0.5 < posterior.pareto_k < 0.7 and not posterior.reliable


def test_descendants_of_one_particle_are_one_weight_of_the_tail() -> None:
    n = 400
    # Equal weights, but some families are large: their sums have a heavy tail.
    sizes = np.random.default_rng(0).pareto(1.2, n)
    ancestors = np.minimum((3.0 * sizes).astype(int), n - 1).tolist()
    posterior = Posterior(
        [{"z": "a"}] * n, np.zeros(n), method="smc", ancestors=ancestors, resampled=1
    )
    with np.errstate(divide="ignore"):
        families = np.log(np.bincount(ancestors, minlength=n))
    assert math.isfinite(posterior.pareto_k)
    assert posterior.pareto_k == pytest.approx(pareto_k(families))


def test_resampled_weights_have_no_mean_that_a_guide_is_told_by() -> None:
    options: dict[str, Any] = {"method": "smc", "ancestors": [0, 1]}
    for weights in ([0.0, LOG3], [-INF, 0.0]):
        posterior = Posterior([{"z": "a"}] * 2, weights, **options)
        assert posterior.elbo is None and posterior.elbo_possible is None


def test_a_draw_is_possible_if_all_its_parts_are() -> None:
    parts = [Part((site,), -1.0, 0.1, 5.0, 0.1, -1.5, 0.5) for site in "zw"]
    posterior = Posterior(
        [{"z": "a", "w": "b"}] * 4,
        [-2.0] * 4,
        log_evidence=-2.0,
        log_evidence_error=0.1,
        parts=parts,
    )
    assert posterior.impossible_share == pytest.approx(0.75)  # 1 − 0.5²


# --- expectations and draws ---


def test_expect() -> None:
    posterior = Posterior([{"n": 1.0}, {"n": 5.0}], [0.0, LOG3])
    assert posterior.expect(lambda s: s["n"]) == pytest.approx(4.0)  # 0.25·1 + 0.75·5
    assert posterior.expect(lambda s: s["n"] > 2.0) == pytest.approx(0.75)
    assert posterior.expect(lambda s: torch.tensor([s["n"]])) == pytest.approx(4.0)
    assert posterior.expect(lambda s: np.float64(s["n"])) == pytest.approx(4.0)
    assert posterior.expect(lambda s: INF) == INF


def test_expect_leaves_impossible_samples_alone() -> None:
    posterior = Posterior([{"n": "3"}, {"n": "not a number"}], [0.0, -INF])
    assert posterior.expect(lambda s: int(s["n"])) == 3.0


def test_expect_cannot_change_the_samples() -> None:
    posterior = one_to_three()
    posterior.expect(lambda s: s.pop("z") == "cat")
    assert posterior.samples == [{"z": "cat"}, {"z": "dog"}]


def test_expect_refuses_nan_and_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="NaN for sample 0"):
        one_to_three().expect(lambda s: math.nan)
    for value in ("1.0", None, torch.zeros(2)):
        with pytest.raises(TypeError, match="must return one number, but gave"):
            one_to_three().expect(lambda s, value=value: value)


def test_resample() -> None:
    posterior = Posterior([{"z": "a"}, {"z": "b"}, {"z": "c"}], [0.0, LOG3, -INF])
    draws = posterior.resample(4_000, seed=1)
    share = sum(draw["z"] == "b" for draw in draws) / 4_000
    assert share == pytest.approx(0.75, abs=0.03)  # four standard errors
    assert {draw["z"] for draw in draws} == {"a", "b"}
    assert draws == posterior.resample(4_000, seed=1)
    assert draws != posterior.resample(4_000, seed=2)
    draws[0]["z"] = "changed"
    assert [sample["z"] for sample in posterior.samples] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        posterior.resample(0)
    with pytest.raises(ValueError, match=r"n must be an integer of at least 1, got 2\.5"):
        posterior.resample(2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got 0"):
        posterior.predict(lambda: None, num_samples=0)


def test_many_parts_that_are_seldom_possible_are_possible() -> None:
    """The share of impossible draws, one less a product over parts, rounds to 1."""
    names = [f"z{k}" for k in range(6)]
    parts = [Part((n,), -1.0, 0.1, 5.0, 0.1, -1.5, 0.999) for n in names]
    posterior = Posterior(
        [dict.fromkeys(names, "a")] * 4,
        np.full(4, -6.0),
        log_evidence=-6.0,
        log_evidence_error=0.1,
        parts=parts,
    )
    assert posterior.impossible_share == 1.0
    assert "weight zero" not in str(posterior)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.text(max_size=3), st.floats(-20.0, 20.0)), min_size=1, max_size=20),
    st.floats(-500.0, 500.0),
)
def test_a_constant_factor_on_the_weights_leaves_the_probabilities(
    drawn: list[tuple[str, float]], shift: float
) -> None:
    samples = [{"z": text} for text, _ in drawn]
    weights = np.array([weight for _, weight in drawn])
    table = Posterior(samples, weights).probabilities("z")
    assert Posterior(samples, weights + shift).probabilities("z") == pytest.approx(table, rel=1e-9)
    assert math.fsum(table.values()) == pytest.approx(1.0)
    assert sorted(table.values(), reverse=True) == list(table.values())
    assert set(table) == {text for text, _ in drawn}


# --- computed values and return values ---


def with_computed(**kwargs: Any) -> Posterior:
    return Posterior(
        [{"z": "a"}, {"z": "bb"}, {}],
        [0.0, LOG3, -INF],
        computed=[{"n": 1}, {"n": 2, "why": ["b"]}, {}],
        returns=[True, (1, "x"), None],
        **kwargs,
    )


def test_computed_values_are_read_by_name() -> None:
    posterior = with_computed()
    assert posterior.sites == ("z",)
    assert posterior.computed_sites == ("n", "why")
    assert posterior.computed == ({"n": 1}, {"n": 2, "why": ["b"]}, {})
    assert posterior.samples == [{"z": "a"}, {"z": "bb"}, {}]
    assert posterior.probabilities("n") == pytest.approx({2.0: 0.75, 1.0: 0.25})
    assert posterior.probabilities("why") == pytest.approx({("b",): 0.75, ABSENT: 0.25})
    assert posterior.probabilities("_RETURN") == pytest.approx({(1.0, "x"): 0.75, 1.0: 0.25})
    assert posterior.expect("n") == pytest.approx(1.75)  # 0.25·1 + 0.75·2
    assert posterior.expect(lambda s: s["n"] * len(s["z"])) == pytest.approx(3.25)
    assert all(set(draw) == {"z", "n", "why"} for draw in posterior.resample(9) if draw["n"] == 2)
    frame = posterior.to_pandas()
    assert list(frame.columns) == ["z", "n", "why", "log_weight", "weight"]
    assert list(frame["n"][:2]) == [1, 2] and frame["n"].isna()[2]


def test_a_name_that_is_drawn_in_some_executions_and_computed_in_others() -> None:
    posterior = Posterior([{"z": "a"}, {}], [0.0, LOG3], computed=[{}, {"z": "b"}])
    assert posterior["z"] == ["a", "b"]
    assert posterior.probabilities("z") == pytest.approx({"b": 0.75, "a": 0.25})
    assert list(posterior.to_pandas().columns) == ["z", "log_weight", "weight"]
    assert str(posterior).count("z ") == 1


def test_the_computed_values_of_another_number_of_samples() -> None:
    with pytest.raises(ValueError, match="computed has 1 entries, but there are 2 samples"):
        one_to_three(computed=[{}])


def test_names_that_are_not_known() -> None:
    with pytest.raises(UnknownSiteError) as caught:
        with_computed().probabilities("x")
    assert str(caught.value) == (
        "no sample has met a latent site 'x'; those met are: 'z'; "
        "the computed values are: 'n', 'why'"
    )
    with pytest.raises(UnknownSiteError, match="are: 'z'; the return values are not known"):
        one_to_three().probabilities("_RETURN")
    with pytest.raises(UnknownSiteError, match="has met a latent site 'x'"):
        one_to_three().expect("x")


def vectors(*values: list[float], kind: Any = torch.tensor) -> Posterior:
    return Posterior([{"theta": kind(v)} for v in values], [0.0] * len(values))


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_expect_by_name_of_a_vector_is_the_mean_vector(kind: Any) -> None:
    weighted = Posterior(
        [{"theta": kind([1.0, -2.0])}, {"theta": kind([5.0, 2.0])}, {"theta": kind([0.0])}],
        [0.0, LOG3, -INF],
    )
    np.testing.assert_allclose(weighted.expect("theta"), [4.0, 1.0])
    np.testing.assert_allclose(vectors([[1.0, 2.0]], [[3.0, 6.0]]).expect("theta"), [[2.0, 4.0]])
    assert vectors([1.0], [3.0], kind=kind).expect("theta") == 2.0
    with pytest.raises(TypeError, match=r"'theta' must have one shape, but has \(1,\) and \(2,\)"):
        vectors([1.0], [1.0, 2.0], kind=kind).expect("theta")
    with pytest.raises(ValueError, match="'theta' has NaN in it for sample 1"):
        vectors([1.0, 2.0], [1.0, math.nan], kind=kind).expect("theta")


def test_the_table_has_the_moments_of_each_component() -> None:
    shown = str(vectors(*([float(k), 2.0 * k] for k in range(7))))
    assert "[0] mean 3, sd 2 (7 values)" in shown and "[1] mean 6, sd 4 (7 values)" in shown
    assert "tensor" not in shown and "more" not in shown
    # Few values are shown as they are, and of long vectors the first components.
    assert "(1.0, 2.0)" in str(vectors([1.0, 2.0], [1.0, 3.0]))
    long = str(vectors(*([float(k)] * 10 for k in range(7))))
    assert "[7] mean 3" in long and "[8]" not in long and "2 more components" in long


def test_expect_by_name_refuses_what_is_no_number() -> None:
    with pytest.raises(
        TypeError, match="the value 'z' must be one number, but is 'a' for sample 0"
    ):
        with_computed().expect("z")
    with pytest.raises(TypeError, match=r"the value 'why' must be .* is \(absent\) for sample 0"):
        with_computed().expect("why")
    with pytest.raises(ValueError, match="the value 'n' is NaN for sample 1"):
        Posterior([{"n": 0.0}, {"n": math.nan}], [0.0, 0.0]).expect("n")


def test_values_without_a_table() -> None:
    posterior = Posterior([{"z": "a"}] * 2, [0.0, 0.0], computed=[{"d": {"k": 1}}, {}])
    with pytest.raises(TypeError, match=r"'d' has values .* such as \{'k': 1\} \(dict\)"):
        posterior.probabilities("d")
    assert "not hashable (dict)" in str(posterior)
    assert posterior["d"] == [{"k": 1}, None]


def test_integers_that_no_float_equals_stay_themselves() -> None:
    numbers = [2**60, 2**60 + 1, 10**400, 3]
    posterior = Posterior([{"z": "a"}] * 4, [0.0] * 4, computed=[{"n": n} for n in numbers])
    table = posterior.probabilities("n")
    assert list(table) == numbers and set(table.values()) == {0.25}
    assert [type(key) for key in table] == [int, int, int, int]


def test_numbers_that_are_far_apart_are_printed() -> None:
    numbers = [1e300, -1e300, 1.0, 2.0, 3.0, 4.0, math.inf, -math.inf, math.nan]
    posterior = Posterior([{"z": "a"}] * 9, [0.0] * 9, computed=[{"n": n} for n in numbers])
    printed = str(posterior)
    assert "sd inf (6 values)" in printed
    assert all(f"{value} " in printed for value in ("inf", "-inf", "nan"))


def test_numbers_that_are_computed_are_summarised() -> None:
    computed = [{"n": i} for i in range(8)]
    printed = str(Posterior([{"z": "a"}] * 8, [0.0] * 8, computed=computed))
    # Of 0 … 7: mean 3.5, variance (8² − 1)/12 = 5.25.
    assert "mean 3.5, sd 2.291 (8 values)" in printed


# --- as a container ---


def test_by_name_number_and_in_turn() -> None:
    posterior = with_computed()
    assert posterior["z"] == ["a", "bb", None]
    assert posterior["why"] == [None, ["b"], None]
    assert posterior["_RETURN"] == [True, (1, "x"), None]
    assert posterior[1] == posterior[-2] == posterior[np.int64(1)] == posterior[torch.tensor(1)]
    assert posterior[1] == {"z": "bb", "n": 2, "why": ["b"]}
    assert posterior[-1] == {}
    assert list(posterior) == [posterior[0], posterior[1], posterior[2]]
    assert list(reversed(posterior)) == [posterior[2], posterior[1], posterior[0]]
    assert ("z" in posterior, "n" in posterior, "x" in posterior) == (True, True, False)
    posterior[0]["z"] = "changed"
    next(iter(posterior))["z"] = "changed"
    assert posterior.samples[0] == {"z": "a"}


def test_strings_keep_their_tokens_in_a_column() -> None:
    posterior = Posterior([{"z": Text("ab", ids=(1, 2), tokenizer="t")}], [0.0])
    assert posterior["z"][0].ids == (1, 2)


def test_keys_that_are_none() -> None:
    posterior = with_computed()
    for i in (3, -4):
        with pytest.raises(IndexError, match=f"there is no sample {i}: the posterior has 3"):
            posterior[i]
    with pytest.raises(UnknownSiteError, match=r"a latent site 'x'; .* are: 'z'; .* 'n', 'why'"):
        posterior["x"]
    for key in (1.0, None, ("z", "n")):
        with pytest.raises(TypeError, match="the name of a value, the number of a sample, or a sl"):
            posterior[key]  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="slice indices must be integers"):
        posterior["z":"n"]  # type: ignore[misc]


def test_slices_are_lists_of_samples() -> None:
    posterior = with_computed()
    one, two, three = posterior
    assert one == {"z": "a", **posterior.computed[0]}
    assert posterior[:2] == posterior[-3:-1] == posterior[0:2:1] == [one, two]
    assert posterior[::-1] == [three, two, one]
    assert posterior[:] == posterior[:10] == [one, two, three]
    assert posterior[3:] == []
    posterior[:1][0]["z"] = "changed"
    assert posterior.samples[0] == {"z": "a"}


def test_the_mode() -> None:
    assert one_to_three().mode("z") == "dog"
    # 0.3 of "a" together, though no single sample is heavier than that of "b".
    weights = np.log([0.15, 0.15, 0.25, 0.45])
    samples: list[dict[str, Any]] = [{"z": "a"}, {"z": "a"}, {"z": "b"}, {}]
    assert Posterior(samples, weights).mode("z") is ABSENT
    assert Posterior(samples[:3], weights[:3]).mode("z") == "a"
    assert Posterior([{"z": "b"}, {"z": "a"}], [0.0, 0.0]).mode("z") == "b"
    with pytest.raises(UnknownSiteError):
        one_to_three().mode("x")


# --- bad input ---


def test_nan_names_the_indices_and_the_site() -> None:
    with pytest.raises(ValueError, match=r"^log_weights is NaN at index 1 of 2$"):
        Posterior([{"z": "a"}, {"z": "b"}], [0.0, math.nan])
    with pytest.raises(ValueError, match=r"index 1 of 2; .* at site 'ending' \(in 1 samples\)"):
        Posterior([{"z": "a"}, {"z": "b"}], [0.0, math.nan], failed_sites={"ending": 1})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"log_weights": [0.0]}, "log_weights has 1 entries, but there are 2 samples"),
        ({"log_q": [0.0]}, "log_q has 1 entries"),
        ({"log_joint": [[0.0, 0.0]]}, r"log_joint must have shape \[n\], got \(1, 2\)"),
        ({"returns": [1, 2, 3]}, "returns has 3 entries"),
        ({"samples": [], "log_weights": []}, "at least one sample, got none"),
        ({"log_weights": [0.0, INF]}, r"\+inf at index 1"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    arguments = {"samples": [{"z": "a"}, {"z": "b"}], "log_weights": [0.0, 0.0], **kwargs}
    with pytest.raises(ValueError, match=message):
        Posterior(**arguments)


def test_no_sample_explains_the_observations() -> None:
    posterior = dead(failed_sites={"x": 1, "ending": 2})
    assert posterior.log_evidence == posterior.elbo == posterior.elbo_possible == -INF
    assert (posterior.ess, posterior.impossible_share, posterior.reliable) == (0.0, 1.0, False)
    message = r"no sample explains .* 'ending' \(in 2 samples\), site 'x' .* Try: "
    for ask in (
        lambda: posterior.weights,
        lambda: posterior.probabilities("z"),
        lambda: posterior.expect(lambda s: 1.0),
        lambda: posterior.resample(3),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    printed = " ".join(str(posterior).split())
    assert "no sample explains the observations: all 2 have weight zero" in printed
    assert '("prompted", "gflownet")' in printed
    assert list(posterior.to_pandas()["weight"]) == [0.0, 0.0]
    assert "log_evidence=-inf" in repr(posterior)


def test_no_point_explains_the_observations() -> None:
    with pytest.warns(InferenceWarning, match=r"no point of the support explains .* not recorded"):
        posterior = Posterior([{"z": "a"}], [-INF], method="exact")
    assert posterior.log_evidence == posterior.elbo == -INF
    assert posterior.impossible_share == 1.0
    assert not posterior.reliable


# --- printing ---


def test_the_printed_table() -> None:
    posterior = Posterior(
        [{"z": " cat"}, {"z": "dog"}],
        [0.0, LOG3],
        elapsed=1.25,
        guide="prompted",
        notes=["A note."],
    )
    lines = [line.rstrip() for line in narrow(posterior, 80).splitlines()]
    assert lines[0].split() == ["site", "value", "probability"]
    assert lines[2].split() == ["z", "'dog'", "0.750"]
    assert lines[3].split() == ["'", "cat'", "0.250"]
    assert "' cat'" in lines[3]
    text = " ".join("\n".join(lines).split())
    assert "log evidence 0.693 ± 0.500 nats: this error cannot be trusted" in text
    assert "too few weighted samples" in text
    assert "ESS 1.6 of 2 samples, Pareto k unknown" in text
    assert "method importance, guide prompted, 2 samples, 1.2 s" in text
    assert text.endswith("A note.")


def test_the_evidence_line_says_whether_its_error_can_be_trusted() -> None:
    assert "cannot be trusted" not in str(lognormal(0.1))
    bad = lognormal(4.0)
    # n = 200: the threshold is 1 − 1/log₁₀ 200 = 0.565.
    expected = f"cannot be trusted, Pareto k {bad.pareto_k:.2f} is above 0.57"
    assert expected in " ".join(str(bad).split())


def test_markup_in_strings_is_printed_as_it_is() -> None:
    samples = [{"a[b]": "[bold]x[/bold] :smile: [/]"}, {"a[b]": "\n\x1b[31m"}]
    posterior = Posterior(samples, [0.0, -1.0], guide="g[i]", notes=["[red]"])
    printed = narrow(posterior, 100)
    for literal in (
        "'[bold]x[/bold] :smile: [/]'",
        r"'\n\x1b[31m'",
        "a[b]",
        "guide g[i]",
        "[red]",
    ):
        assert literal in printed


def test_a_narrow_terminal() -> None:
    posterior = Posterior([{"middle": " She ate a whole fish."}] * 2, [0.0, -1.0])
    lines = narrow(posterior, 30).splitlines()
    assert max(map(len, lines)) <= 30
    joined = "".join(line[8:19].strip() for line in lines[2:6]).replace(" ", "")
    assert "'Sheateawholefish.'" in joined


def test_long_tables_are_shortened() -> None:
    samples: list[dict[str, Any]] = [
        {"z": f"string {i}", "n": torch.tensor(float(i)), "long": "x" * 1000} for i in range(8)
    ]
    printed = str(Posterior(samples, [0.0] * 8))
    assert "string 4" in printed and "string 5" not in printed
    assert "3 more" in printed and "0.375" in printed
    # Of 0 … 7: mean 3.5, variance (8² − 1)/12 = 5.25.
    assert "mean 3.5, sd 2.291 (8 values)" in printed
    assert printed.count("x") < 200


def test_small_probabilities_are_not_printed_as_zero() -> None:
    assert "<0.001" in str(Posterior([{"z": "a"}, {"z": "b"}], [0.0, -20.0]))


def test_repr_is_one_line() -> None:
    assert repr(one_to_three()) == (
        "Posterior(method='importance', guide='prior', n=2, sites=['z'], log_evidence=0.693)"
    )


# --- pandas ---


def test_to_pandas() -> None:
    samples: list[dict[str, Any]] = [{"z": Text("a", ids=(1,)), "n": torch.tensor(0.5)}, {"z": "b"}]
    posterior = Posterior(samples, [0.0, LOG3], log_q=[-1.0, -2.0], log_joint=torch.tensor([1, 2]))
    frame = posterior.to_pandas()
    assert list(frame.columns) == ["z", "n", "log_weight", "weight", "log_q", "log_joint"]
    assert list(frame["z"]) == ["a", "b"]
    assert frame["n"][0] == 0.5 and frame["n"].isna()[1]
    np.testing.assert_allclose(frame["weight"], [0.25, 0.75])
    np.testing.assert_allclose(frame["log_q"], [-1.0, -2.0])
    np.testing.assert_allclose(frame["log_joint"], [1.0, 2.0])


def test_to_pandas_keeps_a_site_called_weight() -> None:
    frame = Posterior([{"weight": 3.0}], [0.0]).to_pandas()
    assert list(frame.columns) == ["weight", "log_weight", "weight_"]
    assert frame["weight"][0] == 3.0


def test_to_pandas_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'langppl\[plots\]'"):
        one_to_three().to_pandas()


def test_the_summary_has_the_rows_of_the_printed_table() -> None:
    n = 8
    samples: list[dict[str, Any]] = [{"z": "abcdefgh"[i], "x": float(i)} for i in range(n)]
    computed: list[dict[str, Any]] = [{"long": i > 5, "d": {}} for i in range(n)]
    weights = [1e-6, *[1.0] * (n - 1)]
    posterior = Posterior(samples, np.log(weights), computed=computed)
    frame = posterior.summary()
    assert list(frame.columns) == ["site", "value", "probability"]
    assert list(frame["site"]) == ["z"] * 6 + ["x"] + ["long"] * 2 + ["d"]
    assert list(frame["value"][:6]) == ["'b'", "'c'", "'d'", "'e'", "'f'", "3 more"]
    assert list(frame["value"][6:]) == [
        "mean 4, sd 2 (8 values)",
        "False",
        "True",
        "not hashable (dict)",
    ]
    np.testing.assert_allclose(
        frame["probability"], [1 / 7] * 5 + [2 / 7, 1.0, 5 / 7, 2 / 7, np.nan], atol=1e-6
    )
    printed = str(posterior)
    for value in frame["value"]:
        assert value in printed


def test_a_summary_needs_weight_and_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(Posterior([{}], [0.0]).summary()) == 0
    with pytest.raises(ValueError, match="no sample explains the observations"):
        dead().summary()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"Posterior.summary needs .*'langppl\[plots\]'"):
        one_to_three().summary()


# --- files ---


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "posterior.json"
    samples: list[dict[str, Any]] = [
        {"z": Text(" a\ud800ü", ids=(5, 7), tokenizer="abc"), "p": torch.tensor(0.1)},
        {"z": Text("plain"), "p": torch.tensor(3), "v": torch.tensor([[0.5, -INF]])},
        {"z": "-inf", "p": -INF, "n": 7, "b": True, "none": None, "t": (1, [2.5, "x"], {"k": ()})},
    ]
    posterior = Posterior(
        samples,
        [0.1, -2.0 / 3.0, -INF],
        method="smc",
        guide="prompted",
        log_evidence=-1.5,
        sites=["p", "z"],
        returns=["a", ("b", 1), None],
        log_joint=[-1.0, -2.0, -INF],
        log_q=torch.tensor([-0.5, -0.25, -1.0]),
        elapsed=2.5,
        failed_sites={"z": 1},
        notes=["one", "two"],
    )
    posterior.save(path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert (content["format"], content["version"]) == ("langppl-posterior", 1)
    assert content["log_weights"][2] == "-inf"
    assert content["samples"][0]["z"] == {"text": " a\ud800ü", "ids": [5, 7], "tokenizer": "abc"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["posterior.json"]

    loaded = Posterior.load(path)
    for name in ("method", "guide", "sites", "returns", "elapsed", "failed_sites", "notes"):
        assert getattr(loaded, name) == getattr(posterior, name), name
    assert loaded.log_evidence == -1.5
    assert math.isnan(loaded.log_evidence_error)
    for name in ("log_weights", "log_joint", "log_q"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(posterior, name))
    for before, after in zip(samples, loaded.samples, strict=True):
        assert before.keys() == after.keys()
        for site, value in before.items():
            assert type(after[site]) is type(value), site
            if isinstance(value, torch.Tensor):
                assert after[site].dtype == value.dtype
                assert torch.equal(after[site], value)
            else:
                assert after[site] == value
    first = loaded.samples[0]["z"]
    assert (first.ids, first.tokenizer) == ((5, 7), "abc")
    assert loaded.samples[1]["z"].ids is None


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(), st.lists(st.integers(0, 50_000)), st.floats(-1e6, 1e6)),
        min_size=1,
        max_size=5,
    )
)
def test_files_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, list[int], float]]
) -> None:
    path = tmp_path_factory.mktemp("posterior") / "p.json"
    samples = [{"z": Text(text, ids, "t")} for text, ids, _ in drawn]
    posterior = Posterior(samples, [weight for *_, weight in drawn])
    posterior.save(path)
    loaded = Posterior.load(path)
    assert loaded.samples == posterior.samples
    assert [s["z"].ids for s in loaded.samples] == [s["z"].ids for s in samples]
    np.testing.assert_array_equal(loaded.log_weights, posterior.log_weights)
    assert loaded.log_evidence == posterior.log_evidence
    assert loaded.log_evidence_error == posterior.log_evidence_error


def test_a_posterior_without_weight_survives_a_file(tmp_path: Path) -> None:
    dead(failed_sites={"ending": 2}).save(tmp_path / "dead.json")
    with pytest.warns(InferenceWarning, match="'ending'"):
        loaded = Posterior.load(tmp_path / "dead.json")
    assert (loaded.log_evidence, loaded.log_evidence_error) == (-INF, INF)


def test_return_values_that_json_cannot_hold_are_left_out_with_a_note(tmp_path: Path) -> None:
    one_to_three(returns=[object(), object()]).save(tmp_path / "p.json")
    loaded = Posterior.load(tmp_path / "p.json")
    assert loaded.returns is None
    assert loaded.notes[0].startswith("The return values were not saved: a value of type object")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    one_to_three().save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="type set cannot be written as JSON"):
        Posterior([{"z": {1}}], [0.0]).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_computed_values_survive_a_file(tmp_path: Path) -> None:
    with_computed().save(tmp_path / "p.json")
    loaded = Posterior.load(tmp_path / "p.json")
    assert loaded.computed == with_computed().computed
    assert loaded.returns == with_computed().returns


def test_files_without_computed_values_are_as_before(tmp_path: Path) -> None:
    one_to_three().save(tmp_path / "p.json")
    assert "computed" not in json.loads((tmp_path / "p.json").read_text())
    assert Posterior.load(tmp_path / "p.json").computed == ({}, {})


def test_computed_values_that_json_cannot_hold_are_left_out_with_a_note(tmp_path: Path) -> None:
    rows = [{"n": 1, "own": {1}}, {"own": {2}}]
    one_to_three(computed=rows).save(tmp_path / "p.json")
    loaded = Posterior.load(tmp_path / "p.json")
    assert loaded.computed == ({"n": 1}, {})
    assert loaded.notes == (
        "The computed values 'own' were not saved: a value of type set cannot be written as JSON.",
    )


def test_saving_makes_missing_folders(tmp_path: Path) -> None:
    one_to_three().save(tmp_path / "new" / "deep" / "p.json")
    assert Posterior.load(tmp_path / "new" / "deep" / "p.json").samples == one_to_three().samples


@pytest.mark.parametrize("place", ["file/p.json", "file/deep/p.json", "folder"])
def test_what_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="the posterior cannot be saved") as caught:
        one_to_three().save(tmp_path / place)
    assert caught.value.filename == str(tmp_path / place)
    assert ".tmp" not in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_that_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(**options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(options["dir"]))

    # Nobody forbids root anything.
    monkeypatch.setattr(tempfile, "mkstemp", denied)
    path = tmp_path / "p.json"
    with pytest.raises(PermissionError) as caught:
        one_to_three().save(path)
    assert str(caught.value) == (
        "[Errno 13] the posterior cannot be saved (Permission denied); give a file in a folder "
        f"that can be written to: {str(path)!r}"
    )


def test_the_guide_is_not_pickled() -> None:
    guide = object()
    posterior = one_to_three(guide_object=guide)
    assert posterior.guide_object is guide
    loaded = pickle.loads(pickle.dumps(posterior))
    assert (loaded.guide_object, loaded.samples) == (None, posterior.samples)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is not a langppl posterior: not JSON"),
        ("[1, 2]", "is not a langppl posterior: no"),
        ('{"format": "other"}', "is not a langppl posterior: no"),
        ('{"format": "langppl-posterior", "version": 2}', "has version 2 .* reads version 1"),
        ('{"format": "langppl-posterior", "version": 1}', "damaged .*KeyError"),
    ],
)
def test_loading_another_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Posterior.load(path)


def test_loading_a_binary_file_and_none(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a langppl posterior"):
        Posterior.load(tmp_path / "p.json")
    with pytest.raises(FileNotFoundError):
        Posterior.load(tmp_path / "missing.json")


def test_making_a_posterior_loads_no_plotting() -> None:
    code = (
        "import sys\n"
        "from langppl.posterior import Posterior\n"
        "Posterior([{'z': 'a'}], [0.0]).probabilities('z')\n"
        "print([m for m in ('matplotlib', 'pandas', 'arviz') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ancestors", "[Infinity, 0]", "ancestors is .*numbers of samples"),
        ("ancestors", "[99, 0]", r"ancestors is \[99, 0\]"),
        ("ancestors", "[0]", "ancestors is"),
        ("notes", "[1]", r"notes is \[1\], and should be a list of texts"),
        ("sites", "[5]", "sites is"),
        ("sites", '"z"', "sites is"),
        ("moves", "[1]", "moves is .*two counts"),
        ("resampled", "1.5", "resampled is"),
        ("failed_sites", '{"z": "x"}', "failed_sites is"),
        ("guide", "3", "guide is"),
        ("returns", '[{"text": "a", "ids": [1e400], "tokenizer": "x"}, "b"]', "OverflowError"),
        (
            "returns",
            '[{"tensor": [1], "dtype": "quint8"}, "b"]',
            "RuntimeError|TypeError|ValueError",
        ),
        ("samples", "[" * 99999, "not JSON"),
        ("samples", '[{"z": ' + "[" * 990 + "]" * 990 + "}, {}]", "RecursionError|not JSON"),
    ],
)
def test_a_file_whose_fields_are_of_another_form(
    tmp_path: Path, field: str, value: str, message: str
) -> None:
    path = tmp_path / "posterior.json"
    Posterior([{"z": "a"}, {"z": "b"}], [0.0, 0.0], ancestors=[0, 1]).save(path)
    Posterior.load(path)
    content = {**json.loads(path.read_text()), field: None}
    path.write_text(json.dumps(content).replace(f'"{field}": null', f'"{field}": {value}'))
    with pytest.raises(ValueError, match=f"posterior.json is .*langppl posterior: .*({message})"):
        Posterior.load(path)
