"""The trained guide against enumerated posteriors."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyro.distributions import Beta

from langppl import (
    GFlowNetGuide,
    LMChoice,
    LMString,
    RewardSchedule,
    compile,
    factor,
    infer,
    sample,
)
from langppl.guides import drawing, objectives, training
from langppl.guides.context import context_ids
from langppl.guides.observations import Observation
from langppl.guides.replay import ReplayBuffer
from langppl.guides.training import Trainer
from langppl.lm import LM
from langppl.lm.requests import perform
from langppl.program import Program
from langppl.program.execution import Execution
from langppl.testing import check_guide, tiny_lm

QUICK: dict[str, Any] = {"steps": 3, "batch": 8, "progress": False}


def make_lm(seed: int = 1) -> LM:
    return tiny_lm("ab.", seed=seed, merged=["ab", "b."], sharpness=0.25)


def story(lm: LM, ending: str = "aab.") -> str:
    middle = sample("middle", LMString(lm, "ab", stop=".", max_tokens=3))
    sample("ending", LMString(lm, f"ab{middle}"), obs=ending)
    return middle


def chain(lm: LM) -> None:
    one = sample("one", LMString(lm, "a", max_tokens=2))
    two = sample("two", LMString(lm, f"b{one}", stop=".", max_tokens=2))
    sample("seen", LMString(lm, f"{one}{two}"), obs="bb")


def choice(lm: LM) -> None:
    kind = sample("kind", LMChoice(lm, "a", ["a", "b."]))
    text = sample("text", LMString(lm, f"b{kind}", max_tokens=2))
    sample("seen", LMString(lm, f"{kind}{text}"), obs="bb")


def divergences(program: Program, guide: GFlowNetGuide | None) -> tuple[float, float]:
    """KL(q‖p) and KL(p‖q) over all token sequences of the one latent; None: the prior's."""
    truth = infer(program, method="exact", progress=False)
    log_p = np.asarray(truth.log_weights) - truth.log_evidence
    (name,) = program.latents
    fn = program.sites[name].fn
    context = adapter = None
    if guide is not None:
        context = context_ids(program, name, fn, Execution(), guide.context, guide.lm)
        adapter = guide.adapter
    requests = [fn.request(s[name], prompt=context, adapter=adapter) for s in truth.samples]
    log_q = np.array([r.log_prob for r in perform(requests)])  # type: ignore[union-attr]
    assert np.exp(log_q).sum() == pytest.approx(1.0, abs=1e-4)
    gap = log_q - log_p
    return float((np.exp(log_q) * gap).sum()), float(-(np.exp(log_p) * gap).sum())


# The three named seeds: of the LM, of the guide, and an ending that the prior rarely leads to.
SEEDS = {1: "aab.", 2: "...", 5: "aab."}


@pytest.mark.parametrize(
    ("seed", "objective"), [(1, "subtb"), (2, "vargrad"), (5, "subtb"), (5, "vargrad")]
)
def test_a_trained_guide_is_the_posterior(seed: int, objective: str) -> None:
    program = compile(story, make_lm(seed), SEEDS[seed])
    assert min(divergences(program, None)) > 0.5
    guide = GFlowNetGuide(program.args[0], objective=objective, seed=seed)
    guide.fit(program, steps=250, batch=32, learning_rate=3e-3, progress=False)
    assert max(divergences(program, guide)) <= 0.05


def test_several_observations_share_a_guide() -> None:
    lm = make_lm(1)
    guide = GFlowNetGuide(lm, seed=0)
    rows = [(lm, "aab."), (lm, "...")]
    before = [divergences(compile(story, *row), guide)[1] for row in rows]
    guide.fit(story, rows, steps=100, batch=16, learning_rate=3e-3, progress=False)
    after = [divergences(compile(story, *row), guide)[1] for row in rows]
    assert all(a < 0.3 * b for a, b in zip(after, before, strict=True)), (before, after)


@pytest.mark.parametrize("model", [chain, choice])
def test_vargrad_narrows_the_gap_with_two_latents(model: Any) -> None:
    lm = make_lm(1)
    program = compile(model, lm)
    truth = infer(program, method="exact", progress=False).log_evidence
    guide = GFlowNetGuide(lm, seed=0)
    before = infer(program, guide=guide, num_samples=256, progress=False).elbo_possible
    guide.fit(program, steps=120, batch=16, learning_rate=3e-3, progress=False)
    after = infer(program, guide=guide, num_samples=256, progress=False).elbo_possible
    assert truth - after < 0.25 * (truth - before)
    check_guide(guide, program, samples=200)


def adapter_of(guide: GFlowNetGuide) -> list[torch.Tensor]:
    named = guide.lm.model.named_parameters()
    return [p.detach().clone() for n, p in named if f".{guide.adapter}." in n]


def test_a_seed_repeats_a_run_bitwise() -> None:
    found = []
    for _ in range(2):
        guide = GFlowNetGuide(make_lm(), seed=3)
        guide.fit(story, [(guide.lm,)], **QUICK)
        found.append((adapter_of(guide), guide.history))
    (first, history), (second, again) = found
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert history == again
    assert any(bool(p.abs().sum() > 0) for p in first)
    other = GFlowNetGuide(make_lm(), seed=4)
    assert not all(torch.equal(a, b) for a, b in zip(first, adapter_of(other), strict=True))


def test_the_lm_itself_is_not_changed() -> None:
    lm = make_lm()
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    score = float(LMString(lm, "a").log_prob("ab."))
    GFlowNetGuide(lm).fit(story, [(lm,)], **QUICK)
    after = {n.replace(".base_layer", ""): p for n, p in lm.model.named_parameters()}
    assert all(torch.equal(p, after[n]) for n, p in before.items())
    assert float(LMString(lm, "a").log_prob("ab.")) == pytest.approx(score, abs=1e-6)


def test_saved_and_loaded_it_draws_the_same(tmp_path: Path) -> None:
    lm = make_lm()
    guide = GFlowNetGuide(lm, seed=1, objective="vargrad", rank=4)
    guide.fit(story, [(lm,)], learning_rate=1e-2, **QUICK)
    guide.save(tmp_path)
    loaded = GFlowNetGuide.load(tmp_path, make_lm())
    one = infer(story, lm, guide=guide, num_samples=32, progress=False)
    two = infer(story, loaded.lm, guide=loaded, num_samples=32, progress=False)
    assert [s["middle"].ids for s in one.samples] == [s["middle"].ids for s in two.samples]
    assert one.log_q is not None
    assert two.log_q is not None
    np.testing.assert_array_equal(one.log_q, two.log_q)
    assert loaded.objective == "vargrad"

    from peft import PeftConfig
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(tmp_path))
    assert config.r == 4  # type: ignore[attr-defined]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in weights)
    record = json.loads((tmp_path / "guide.json").read_text())
    assert record["steps"] == 3


def test_what_load_refuses(tmp_path: Path) -> None:
    guide = GFlowNetGuide(make_lm(), context=lambda info: "a")
    guide.save(tmp_path)
    with pytest.raises(ValueError, match="a context function of its own"):
        GFlowNetGuide.load(tmp_path, make_lm())
    with pytest.raises(ValueError, match="other weights"):
        GFlowNetGuide.load(tmp_path, make_lm(2), context=guide.context)
    (tmp_path / "guide.json").write_text("{")
    with pytest.raises(ValueError, match="is corrupt"):
        GFlowNetGuide.load(tmp_path, make_lm(), context=guide.context)
    with pytest.raises(ValueError, match="no guide folder"):
        GFlowNetGuide.load(tmp_path / "nowhere", make_lm())


def test_interrupted_it_keeps_what_it_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = GFlowNetGuide(make_lm(), seed=0)
    whole = GFlowNetGuide(make_lm(), seed=0)
    plain = Trainer.step

    def interrupted(self: Trainer, step: int) -> dict[str, float]:
        if step == 2:
            raise KeyboardInterrupt
        return plain(self, step)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.warns(UserWarning, match="interrupted after 2 of 3 steps"):
        guide.fit(story, [(guide.lm,)], **QUICK)
    assert guide.history["step"] == [0.0, 1.0]
    monkeypatch.undo()
    whole.fit(story, [(whole.lm,)], **QUICK)
    assert whole.history["loss"][:2] == guide.history["loss"]
    assert any(bool(p.abs().sum() > 0) for p in adapter_of(guide))


def test_a_nan_reward_names_step_and_site() -> None:
    lm = make_lm()

    class Nan(LMString):
        def pending(self, value: str, **how: Any) -> Any:
            honest = super().pending(value, **how)
            return type(honest)((), lambda replies: math.nan)

    def model() -> None:
        middle = sample("middle", LMString(lm, "ab", max_tokens=2))
        sample("ending", Nan(lm, f"a{middle}"), obs="b")

    with pytest.raises(FloatingPointError, match=r"at training step 0, .*'ending' is nan"):
        GFlowNetGuide(lm).fit(model, [()], **QUICK)


def good_or_not(seen: str) -> None:
    sample("middle", LMString(NAN_LM, "ab", max_tokens=2))
    factor("form", math.nan if seen == "bad" else 0.0)


NAN_LM = make_lm()


@pytest.mark.parametrize(
    "options",
    [
        {"data": [("bad",)], "given": [{"middle": "a"}] * 8},
        {"data": [("good",)], "validation": [("bad",)], "validate_every": 1},
    ],
)
def test_a_nan_reward_is_named_wherever_it_comes_from(options: dict[str, Any]) -> None:
    with pytest.raises(FloatingPointError, match="at training step 0, factor 'form' is nan"):
        GFlowNetGuide(NAN_LM).fit(good_or_not, **options, **QUICK)


def test_a_gradient_that_is_no_number_says_of_what(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = GFlowNetGuide(NAN_LM, objective="tb")
    plain = Trainer._descend

    def descend(self: Trainer, *args: Any) -> Any:
        found = plain(self, *args)
        for p in self.guide.heads.parameters():
            assert p.grad is not None
            p.grad.fill_(math.inf)
        return found

    monkeypatch.setattr(Trainer, "_descend", descend)
    said = r"norm of the gradient is \S+ of the adapter and (inf|nan) of the heads at step 0;"
    with pytest.raises(FloatingPointError, match=said):
        guide.fit(good_or_not, [("good",)], **QUICK)


def test_a_latent_under_another_lm_is_drawn_from_the_prior() -> None:
    lm, other = make_lm(1), make_lm(2)

    def model() -> None:
        one = sample("one", LMString(other, "a", max_tokens=2))
        two = sample("two", LMString(lm, f"b{one}", max_tokens=2))
        sample("seen", LMString(lm, f"{one}{two}"), obs="bb")

    guide = GFlowNetGuide(lm, seed=0)
    guide.fit(model, [()], **QUICK)
    check_guide(guide, model, samples=200)
    drawn = infer(model, guide=guide, num_samples=16, progress=False)
    assert drawn.log_q is not None
    plain = infer(model, guide="prior", num_samples=16, progress=False)
    assert [s["one"].ids for s in drawn.samples] == [s["one"].ids for s in plain.samples]
    with pytest.raises(ValueError, match="was made for"):
        GFlowNetGuide(make_lm(3)).sample(model)


def test_sample_gives_raw_draws() -> None:
    lm = make_lm()
    guide = GFlowNetGuide(lm)
    draws = guide.sample(story, lm, n=5, seed=2)
    assert [set(d) for d in draws] == [{"middle", "_RETURN"}] * 5
    assert draws == guide.sample(story, lm, n=5, seed=2)
    assert draws != guide.sample(story, lm, n=5, seed=3)
    with pytest.raises(ValueError, match="n must be an integer of at least 1"):
        guide.sample(story, lm, n=0)


def test_impossible_draws_are_counted_and_survived() -> None:
    lm = make_lm()

    def model() -> None:
        middle = sample("middle", LMString(lm, "ab", max_tokens=2))
        factor("no b", 0.0 if "b" not in middle else -math.inf)

    guide = GFlowNetGuide(lm)
    guide.fit(model, [()], steps=40, batch=16, learning_rate=3e-3, progress=False)
    shares = guide.history["impossible"]
    assert max(shares[:5]) > 0.0
    assert np.mean(shares[-10:]) < np.mean(shares[:10])


@pytest.mark.parametrize("objective", ["reverse_kl", "rao_blackwell", "rws"])
def test_baselines_learn_too(objective: str) -> None:
    program = compile(story, make_lm(1), SEEDS[1])
    guide = GFlowNetGuide(
        program.args[0], context=lambda info: info.prompt, objective=objective, seed=1
    )
    before = divergences(program, guide)[0]
    guide.fit(program, steps=80, batch=32, learning_rate=3e-3, progress=False)
    assert divergences(program, guide)[0] < 0.3 * before


def test_maximum_likelihood_of_posterior_samples_is_the_posterior() -> None:
    program = compile(story, make_lm(1), SEEDS[1])
    truth = infer(program, method="exact", progress=False).resample(256, seed=1)
    guide = fit_given(program, truth, 60, objective="mle", learning_rate=3e-3)
    forward = divergences(program, guide)[1]
    # 256 draws over about 20 likely strings: the sampling error alone is some 20 / 512 nats.
    assert forward < 0.15 < divergences(program, None)[1]


def test_baselines_refuse_what_they_cannot_learn_from() -> None:
    lm = make_lm()
    with pytest.raises(ValueError, match="learns from the guide's own draws"):
        GFlowNetGuide(lm, objective="rws").fit(story, [(lm,)], given=[{"middle": "a."}])
    with pytest.raises(ValueError, match='"mle" learns from given latents'):
        GFlowNetGuide(lm, objective="mle").fit(story, [(lm,)])


def test_what_fit_refuses() -> None:
    lm = make_lm()
    guide = GFlowNetGuide(lm, objective="subtb")
    with pytest.raises(ValueError, match="data is empty"):
        guide.fit(story, [])
    with pytest.raises(ValueError, match="batch must be an integer of at least 2, got 1"):
        guide.fit(story, [(lm,)], steps=1, batch=1)
    with pytest.raises(ValueError, match="betas must be at least 0 and below 1"):
        guide.fit(story, [(lm,)], betas=(0.9, 1.0))
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="given_share must be above 0"):
            guide.fit(story, [(lm,)], given_share=share)
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        guide.fit(story, [(lm,)], every=0)
    with pytest.raises(TypeError, match="tuple of the model's arguments"):
        guide.fit(story, ["ab"])
    with pytest.raises(ValueError, match="unknown objective"):
        GFlowNetGuide(lm, objective="best")


def fit_given(program: Program, given: Any, steps: int, **changes: Any) -> GFlowNetGuide:
    """A guide that begins as the prior and learns from given draws, 32 a step."""
    objective = changes.pop("objective", "vargrad")
    guide = GFlowNetGuide(
        program.args[0], context=lambda info: info.prompt, objective=objective, seed=1
    )
    options = {"schedule": RewardSchedule(start=1.0), "replay_share": 0.0, "progress": False}
    return guide.fit(program, given=given, steps=steps, batch=32, **{**options, **changes})


@pytest.mark.parametrize(
    ("given", "rows", "said"),
    [
        ({"middle": "a."}, 1, r"given is \{'middle': 'a.'\}; given must be a list of mappings"),
        ("a.", 1, "given is 'a.'; given must be"),
        (5, 1, "given is 5; given must be"),
        ([["a."]], 1, r"given\[0\]\[0\] is 'a.'; given must be"),
        (["a."], 1, r"given\[0\] is 'a.'; given must be"),
        ([[{"middle": "a."}], [{"middle": "a."}, 3]], 2, r"given\[1\]\[1\] is 3; given must be"),
    ],
)
def test_given_latents_of_another_form(given: Any, rows: int, said: str) -> None:
    guide = GFlowNetGuide(make_lm())
    with pytest.raises(TypeError, match=said):
        guide.fit(story, [(guide.lm,)] * rows, given=given, **QUICK)


def test_given_may_be_none() -> None:
    one, two = (GFlowNetGuide(make_lm()) for _ in range(2))
    one.fit(story, [(one.lm,)], given=None, **QUICK)
    assert one.history == two.fit(story, [(two.lm,)], **QUICK).history


def test_given_draws_come_first_and_teach_the_guide() -> None:
    program = compile(story, make_lm(1), SEEDS[1])
    prior = infer(program, num_samples=128, seed=5, progress=False)
    before = max(divergences(program, None))
    found = []
    for given in (prior, prior.samples):
        guide = fit_given(program, given, 5, learning_rate=1e-2)
        found.append(adapter_of(guide))
        assert max(divergences(program, guide)) < 0.8 * before
        # Four steps of given draws, of which the guide's own figures say nothing; one of its own.
        assert [math.isnan(x) for x in guide.history["elbo"]] == [True] * 4 + [False]
    # Log joints that are taken from the posterior are those that scoring gives.
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def test_a_small_share_spreads_given_draws_over_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    program = compile(story, make_lm(1), SEEDS[1])
    prior = infer(program, num_samples=40, seed=5, progress=False)
    batches = []
    plain = training.policy_scores

    def scores(draws: Any, lm: LM, adapter: Any, with_states: bool) -> Any:
        batches.append([d.is_given for d in draws])
        return plain(draws, lm, adapter, with_states)

    monkeypatch.setattr(training, "policy_scores", scores)
    guide = fit_given(program, prior, 6, given_share=0.25)
    # A quarter of 32 in each step while the 40 last, the guide's own first; then none.
    assert [sum(b) for b in batches] == [8, 8, 8, 8, 8, 0]
    assert all(b == sorted(b) and len(b) == 32 for b in batches)
    assert not any(math.isnan(x) for x in guide.history["elbo"])


def test_a_given_posterior_of_other_observations_is_an_error() -> None:
    lm = make_lm(1)
    other = infer(story, lm, "...", num_samples=32, progress=False)
    with pytest.raises(ValueError, match="of another program or other observations"):
        fit_given(compile(story, lm, "aab."), other, 1)
    fit_given(compile(story, lm, "aab."), other.samples, 1)  # bare latents are scored


def test_given_draws_of_a_chain_show_no_later_latent() -> None:
    program = compile(chain, make_lm(1))
    prior = infer(program, num_samples=16, progress=False)
    shown = []

    def context(info: Any) -> Any:
        shown.append((info.site, set(info.values)))
        return info.prompt

    guide = GFlowNetGuide(program.args[0], context=context, seed=0)
    guide.fit(program, given=prior, steps=1, batch=16, progress=False)
    assert set((site, *values) for site, values in shown) == {("one",), ("two", "one")}


def test_given_draws_may_be_a_table_of_latents_alone() -> None:
    pytest.importorskip("pandas")
    shown = []
    for as_table in (False, True):
        program = compile(chain, make_lm(1))
        prior = infer(program, num_samples=16, progress=False)
        table = prior.to_pandas()
        guide = GFlowNetGuide(program.args[0], rank=2, seed=0)
        with pytest.raises(TypeError, match="give the posterior itself, whose weights count"):
            guide.fit(program, given=table, steps=1, progress=False)
        # In a table a string is its text, and not the tokens that it was drawn as.
        texts = [{name: str(text) for name, text in row.items()} for row in prior.samples]
        given: Any = table[list(program.latents)] if as_table else texts
        guide.fit(program, given=given, steps=2, batch=8, progress=False)
        shown.append(guide.history)
    assert shown[0] == shown[1]


def test_given_draws_with_several_observations_are_an_error() -> None:
    lm = make_lm()
    with pytest.raises(ValueError, match="given latents belong to one observation"):
        GFlowNetGuide(lm).fit(story, [(lm, "aab."), (lm, "...")], given=[{"middle": "a"}], **QUICK)


def test_drawing_ahead_draws_once_for_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    plain = drawing.run_together

    def run(pairs: Any) -> Any:
        drawn.append(len(pairs))
        return plain(pairs)

    program = compile(story, make_lm())
    monkeypatch.setattr(drawing, "run_together", run)
    guide = GFlowNetGuide(program.args[0], objective="vargrad")
    guide.fit(program, steps=6, batch=8, draw_ahead=3, replay_share=0.0, progress=False)
    assert drawn == [24, 24]
    assert len(guide.history["step"]) == 6


@pytest.mark.parametrize("objective", ["vargrad", "subtb"])
def test_log_z_does_not_follow_given_draws(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    name = "trajectory_balance" if objective == "vargrad" else "subtb"
    plain = getattr(objectives, name)

    def loss(first: Any, second: Any, log_z: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(float(log_z))
        return plain(first, second, log_z, *rest)  # type: ignore[no-any-return]

    program = compile(story, make_lm(1), SEEDS[1])
    prior = infer(program, num_samples=96, progress=False)
    monkeypatch.setattr(objectives, name, loss)
    fit_given(program, prior, 5, objective=objective, learning_rate=1e-2)
    # Three steps of given draws keep the estimate of the first; the guide's own make theirs.
    assert seen[:3] == [seen[0]] * 3
    assert seen[3] != seen[0] and seen[4] != seen[3]
    if objective == "vargrad":  # untrained, the guide is the prior
        assert seen[0] == pytest.approx(prior.log_weights[:32].mean(), abs=1e-4)


def test_log_z_is_of_draws_that_are_not_replayed_unless_none_is_possible() -> None:
    own = Observation(compile(story, make_lm()), (), ReplayBuffer(4))
    never, fresh = torch.tensor([-math.inf] * 2), torch.tensor([-math.inf, -3.0])
    replayed = torch.tensor([-1.0, -2.0])
    assert float(own.estimate(0, fresh, torch.cat([fresh, replayed]), 1.0, False)) == -3.0
    assert float(own.estimate(0, never, torch.cat([never, replayed]), 1.0, True)) == -1.5
    # What given draws are held to is never such a makeshift, and holds for one power alone.
    assert float(own.estimate(0, fresh, fresh, 0.5, True)) == -3.0
    assert float(own.estimate(0, replayed, replayed, 0.5, True)) == -3.0
    assert float(own.estimate(0, replayed, replayed, 1.0, True)) == -1.5


def perturbed(program: Program, seed: int, defensive: float) -> GFlowNetGuide:
    """An untrained guide whose adapter is random, so that it proposes badly."""
    guide = GFlowNetGuide(program.args[0], rank=4, defensive=defensive, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in guide.lm.model.named_parameters():
            if f".{guide.adapter}." in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return guide


def rejecting(lm: LM) -> None:
    middle = sample("middle", LMString(lm, "ab", stop=".", max_tokens=3, truncate="reject"))
    sample("ending", LMString(lm, f"ab{middle}", max_tokens=4), obs="aab.")


@pytest.mark.parametrize("model", [story, chain, choice, rejecting], ids=lambda m: m.__name__)
@pytest.mark.parametrize("defensive", [0.05, 0.4])
def test_a_defensive_guide_knows_what_it_proposes(model: Any, defensive: float) -> None:
    program = compile(model, make_lm(2))
    check_guide(perturbed(program, 3, defensive), program, samples=1500, seed=1)


def test_the_prior_bounds_the_weights_of_a_defensive_guide() -> None:
    program = compile(story, make_lm(2), SEEDS[1])
    prior = infer(program, method="exact", progress=False)
    likelihood = np.exp(prior.site_log_probs["ending"].max())
    bad = infer(program, guide=perturbed(program, 3, 0.0), num_samples=600, progress=False)
    safe = infer(program, guide=perturbed(program, 3, 0.2), num_samples=600, progress=False)
    assert np.exp(bad.log_weights.max()) > 2 * likelihood / 0.2
    assert np.exp(safe.log_weights.max()) <= likelihood / 0.2 * (1 + 1e-4)
    error = safe.log_evidence_error
    assert abs(safe.log_evidence - prior.log_evidence) < 4 * error and error < 0.2


def test_training_and_raw_draws_are_without_the_defence(tmp_path: Path) -> None:
    program = compile(story, make_lm(2), SEEDS[1])
    guides = [perturbed(program, 3, share) for share in (0.0, 0.9)]
    one, two = (g.sample(program, n=20, seed=4) for g in guides)
    assert [str(s) for s in one] == [str(s) for s in two]
    guides[1].save(tmp_path)
    assert GFlowNetGuide.load(tmp_path, program.args[0]).defensive == 0.9
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="defensive must be at least 0 and below 1"):
            guides[0].defensive = share
    with pytest.raises(ValueError, match=r"defensive must be a number, got '0.1'"):
        guides[0].defensive = "0.1"


def test_maximum_likelihood_heeds_a_posteriors_weights() -> None:
    lm = tiny_lm(["a", "b", "."], seed=2)

    def one_way(end: str) -> None:
        z = sample("z", LMString(lm, "ab", max_tokens=1))
        sample("y", LMString(lm, f"ab{z}"), obs=end)

    program = compile(one_way, "aab")
    exact = infer(program, method="exact")
    prior = infer(program, num_samples=400, seed=1, progress=False)
    rows = [dict(s) for s in exact.samples]
    gaps = []
    for given in (exact, prior, prior.samples):
        guide = GFlowNetGuide(lm, rank=8, objective="mle", seed=1, context=lambda i: i.prompt)
        guide.fit(program, given=given, steps=80, batch=32, learning_rate=5e-3, progress=False)
        log_q = guide.log_q(program, rows)
        log_posterior = np.array(exact.log_joint) - exact.log_evidence
        gaps.append(float((np.exp(log_posterior) * (log_posterior - log_q)).sum()))
    assert gaps[0] < 0.03 and gaps[1] < 0.06
    assert gaps[2] > 0.15  # the prior's own draws, all alike


def test_given_draws_under_a_schedule_that_ends_elsewhere() -> None:
    lm = tiny_lm(["a", "b", "."], seed=2)

    def two(end: str) -> None:
        z = sample("z", LMString(lm, "ab", max_tokens=1))
        w = sample("w", LMString(lm, f"ab{z}", max_tokens=1))
        sample("y", LMString(lm, f"ab{z}{w}"), obs=end)

    program = compile(two, "aab")
    prior = infer(program, num_samples=64, seed=1, progress=False)
    ends = []
    for given in (prior, prior.samples):
        guide = GFlowNetGuide(lm, rank=4, objective="vargrad", seed=1)
        schedule = RewardSchedule(start=1.0, end=2.0, until=0.1)
        guide.fit(program, given=given, steps=3, batch=16, schedule=schedule, progress=False)
        ends.append(guide.history["loss"])
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


def test_a_guide_that_is_gone_leaves_the_lm_before_the_next_pass() -> None:
    lm = make_lm()
    guide = GFlowNetGuide(lm, seed=1).fit(story, [(lm,)], **QUICK)
    name, gone = guide.adapter, weakref.ref(guide)
    before = {n for n, _ in lm.model.named_parameters()}
    walk = lm.model.named_parameters()
    next(walk)
    del guide
    gc.collect()
    assert gone() is None
    # A collection may come in the middle of a walk, which a removal would end with an error.
    assert before > {n for n, _ in walk}
    assert any(f".{name}." in n for n in before) and name in lm.model.peft_config
    infer(story, lm, num_samples=4, progress=False)
    assert name not in lm.model.peft_config
    assert not any(f".{name}." in n for n, _ in lm.model.named_parameters())


def test_guides_of_inference_mode_are_trained_outside(tmp_path: Path) -> None:
    lm = tiny_lm("ab.", seed=3)

    def story() -> None:
        p = sample("p", Beta(2.0, 2.0))
        z = sample("z", LMString(lm, "a" if p > 0.5 else "b", stop=".", max_tokens=3))
        sample("seen", LMString(lm, f"a{z}"), obs="ab")

    settings = {"steps": 2, "batch": 4, "progress": False}
    with torch.inference_mode():
        made = GFlowNetGuide(lm, rank=2, numeric="head")
    made.fit(story, **settings).save(tmp_path)
    with torch.inference_mode():
        loaded = GFlowNetGuide.load(tmp_path, lm)
    loaded.fit(story, **settings)
    GFlowNetGuide(lm, rank=2).fit(story, **settings)
