"""A posterior knows what each sample's log-probability is at each site."""

import math

import numpy as np
import pytest

from langppl import LMChoice, LMString, Posterior, factor, infer, sample
from langppl.testing import tiny_lm


@pytest.fixture(scope="module")
def lm():
    return tiny_lm("ab.", seed=2)


def test_importance_keeps_every_site(lm):
    def model():
        z = sample("z", LMString(lm, "a", stop=".", max_tokens=3))
        sample("y", LMString(lm, f"a{z}"), obs="ab")
        factor("short", -0.5 * len(z))

    posterior = infer(model, guide="prompted", num_samples=16, progress=False)
    found = posterior.site_log_probs
    assert list(found) == ["z", "y", "short"]
    for i, s in enumerate(posterior.samples):
        assert found["z"][i] == pytest.approx(
            LMString(lm, "a", stop=".", max_tokens=3).log_prob(s["z"]).item()
        )
        assert found["y"][i] == pytest.approx(
            LMString(lm, f"a{s['z']}").log_prob("ab").item(), abs=1e-5
        )
        assert found["short"][i] == pytest.approx(-0.5 * len(s["z"]))
    np.testing.assert_allclose(sum(found.values()), posterior.log_joint)


def test_a_site_that_is_not_reached_is_nan_and_survives_the_file(lm, tmp_path):
    def model():
        if sample("c", LMChoice(lm, "a", ["a", "b"])) == "a":
            sample("z", LMString(lm, "a", stop=".", max_tokens=2))
        sample("y", LMString(lm, "b"), obs="b")

    posterior = infer(model, method="exact", progress=False)
    z = posterior.site_log_probs["z"]
    assert [math.isnan(v) for v in z] == ["z" not in s for s in posterior.samples]
    assert 0 < np.isnan(z).sum() < len(z)
    posterior.save(tmp_path / "p.json")
    loaded = Posterior.load(tmp_path / "p.json").site_log_probs
    assert list(loaded) == list(posterior.site_log_probs)
    for name, row in loaded.items():
        np.testing.assert_array_equal(row, posterior.site_log_probs[name])
