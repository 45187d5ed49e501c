"""Decoders of the sentence benchmark, against all strings of a tiny LM."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import langppl as lp
from langppl.testing import tiny_lm


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "tasks"))
    return importlib.import_module("decoders")


@pytest.fixture(scope="module")
def string() -> lp.LMString:
    lm = tiny_lm("ab.", seed=1, merged=["ab", "b."])
    return lp.LMString(lm, "ba", stop=".", max_tokens=4, truncate="reject")


def exact(string: lp.LMString) -> dict[tuple[int, ...], float]:
    """Token ids → log p, of all strings."""

    def model() -> None:
        lp.sample("z", string)

    posterior = lp.infer(model, method="exact", progress=False)
    return {
        tuple(s["z"].ids): float(w)
        for s, w in zip(posterior.samples, posterior.log_weights, strict=True)
    }


def test_a_wide_beam_finds_the_likeliest_strings(decoders: ModuleType, string: lp.LMString) -> None:
    known = sorted(exact(string).values(), reverse=True)
    found, count = decoders.beam(string, 600)
    assert count > 0
    assert [f.log_prob for f in found] == pytest.approx(
        [w for w in known if w > -math.inf], abs=1e-4
    )
    narrow, _ = decoders.beam(string, 4)
    assert len(narrow) == 4 and len({f.text.ids for f in narrow}) == 4
    for f in [*narrow, *found[:20]]:  # what was summed on the way is the string's log p
        assert f.log_prob == pytest.approx(float(string.log_prob(f.text)), abs=1e-4)


def test_a_beam_of_one_is_greedy(decoders: ModuleType, string: lp.LMString) -> None:
    (found,), _ = decoders.beam(string, 1)
    (near,), _ = decoders.sample(string, 1, (0,), temperature=1e-3)
    assert found.text.ids == near.text.ids
    (nucleus,), _ = decoders.sample(string, 1, (0,), top_p=1e-6)
    assert nucleus.text.ids == near.text.ids


def test_samples_follow_the_string(decoders: ModuleType, string: lp.LMString) -> None:
    known = exact(string)
    n = 4000
    found, _ = decoders.sample(string, n, (3,))
    counts = Counter(f.text.ids for f in found if f.log_prob > -math.inf)
    for ids, log_prob in sorted(known.items(), key=lambda r: -r[1])[:8]:
        p = math.exp(log_prob)
        assert counts[ids] / n == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / n))
    rejected = 1 - sum(math.exp(w) for w in known.values())
    share = sum(f.log_prob == -math.inf for f in found) / n
    assert share == pytest.approx(rejected, abs=4.5 * math.sqrt(rejected * (1 - rejected) / n))


def test_nucleus_keeps_the_fewest_likeliest_actions(
    decoders: ModuleType, string: lp.LMString
) -> None:
    first = lp.LMString(string.lm, string.prompt, max_tokens=1)
    known = sorted(exact(first).items(), key=lambda r: -r[1])
    mass, nucleus = 0.0, set()
    for ids, log_prob in known:
        if mass < 0.6:
            nucleus.add(ids)
        mass += math.exp(log_prob)
    found, _ = decoders.sample(first, 400, (5,), top_p=0.6)
    assert {f.text.ids for f in found} == nucleus and len(nucleus) < len(known)


def test_groups_differ_where_they_are_held_to_it(decoders: ModuleType, string: lp.LMString) -> None:
    same, _ = decoders.beam(string, 3, groups=3)
    assert len({f.text.ids for f in same}) == 1
    apart, _ = decoders.beam(string, 3, groups=3, penalty=50.0)
    assert len({f.text.ids[0] for f in apart}) == 3
    with pytest.raises(ValueError, match="multiple of groups=2, got 3"):
        decoders.beam(string, 3, groups=2)
