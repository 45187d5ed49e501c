"""Guidance: proposals that add to the prior what the observations change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyro.distributions import Beta

from langppl import (
    GFlowNetGuide,
    Guidance,
    LMChoice,
    LMString,
    MixtureGuide,
    PromptedGuide,
    compile,
    infer,
    sample,
)
from langppl.guides import PriorGuide
from langppl.guides.context import ContextInfo, context_ids, observations_first
from langppl.guides.guidance import Reader
from langppl.guides.training import Trainer
from langppl.guides.trajectories import Draw, Part, from_records, key_of, to_record
from langppl.lm import LM
from langppl.lm.requests import Guided, perform
from langppl.lm.scoring import score_with_gradients
from langppl.program import Program
from langppl.program.execution import Execution
from langppl.testing import check_guide, tiny_lm


def make_lm(seed: int = 1) -> LM:
    return tiny_lm("ab._\n", seed=seed, merged=["ab", "b."], sharpness=0.25)


LM_ = make_lm()


def story(lm: LM, ending: str = "aab.") -> str:
    middle = sample("middle", LMString(lm, "ab", stop=".", max_tokens=3))
    sample("ending", LMString(lm, f"ab{middle}"), obs=ending)
    return middle


def chain(lm: LM) -> None:
    kind = sample("kind", LMChoice(lm, "a", ["a", "b."]))
    text = sample("text", LMString(lm, f"b{kind}", max_tokens=2, stop="."))
    sample("seen", LMString(lm, f"{kind}{text}"), obs="bb")


def own(info: ContextInfo) -> str:
    return f"{info.args[1]}\n{info.prompt}"


def without(info: ContextInfo) -> str:
    return f"\n{info.prompt}"


def reading(program: Program, name: str, reader: Reader) -> Any:
    fn = program.sites[name].fn
    return reader.reading(program, name, fn, Execution(), fn.lm)


def test_by_default_the_context_is_asked_again_without_observations() -> None:
    program = compile(story, LM_, "aab.")
    for context in (observations_first, PromptedGuide().context):
        found = reading(program, "middle", Reader(context, Guidance(0.7)))
        fn = program.sites["middle"].fn
        seen = context_ids(program, "middle", fn, Execution(), context, LM_)
        assert found == Guided(seen, fn.prompt_ids(), 0.7)
    found = reading(program, "middle", Reader(own, Guidance(0.7, without)))
    assert found == Guided(LM_.encode_prompt("aab.\nab"), LM_.encode_prompt("\nab"), 0.7)


def test_a_context_that_shows_them_anyway_is_an_error() -> None:
    program = compile(story, LM_, "aab.")
    with pytest.raises(ValueError, match=r"'middle' is the same without.*own takes.*without="):
        infer(program, guide=PromptedGuide(own, guidance=Guidance(0.5)), progress=False)

    def free() -> None:
        sample("middle", LMString(LM_, "ab", stop=".", max_tokens=3))

    # There is nothing to be guided by here.
    guide = PromptedGuide(guidance=Guidance(0.5))
    assert np.isfinite(infer(free, guide=guide, num_samples=4, progress=False).log_weights).all()

    lm = tiny_lm("ab", seed=1)

    def copied() -> None:
        z = sample("z", LMString(lm, "a", max_tokens=1))
        sample("copy", LMString(lm, z), obs=z)

    # Blanks are all that the default context could show of it, and this LM has no token for them.
    program = compile(copied)
    found = infer(program, guide=guide, num_samples=4, progress=False)
    assert found.log_q == pytest.approx(PriorGuide().log_q(program, found.samples), abs=1e-5)


@pytest.mark.parametrize("scale", [0.5, 1.8])
@pytest.mark.parametrize("model", [story, chain])
def test_the_prompted_guide_knows_its_probabilities(model: Any, scale: float) -> None:
    check_guide(PromptedGuide(guidance=Guidance(scale)), model, LM_, samples=300)
    if model is story:
        check_guide(PromptedGuide(own, guidance=Guidance(scale, without)), model, LM_, "bb.")


def trained(lm: LM, program: Program, objective: str, **options: Any) -> GFlowNetGuide:
    guide = GFlowNetGuide(lm, guidance=Guidance(0.8), rank=4, seed=2)
    settings = {"steps": 4, "batch": 8, "learning_rate": 1e-2, "progress": False, **options}
    return guide.fit(program, objective=objective, **settings)


@pytest.mark.parametrize("objective", ["subtb", "vargrad", "tb", "rao_blackwell", "forward_kl"])
@pytest.mark.parametrize("model", [story, chain])
def test_a_trained_one_knows_its_probabilities(model: Any, objective: str) -> None:
    lm = make_lm(4)
    program = compile(model, lm)
    options = {"lengths": {"ending": 4, "seen": 2}} if objective == "forward_kl" else {}
    options = {k: {n: c for n, c in v.items() if n in program.sites} for k, v in options.items()}
    guide = trained(lm, program, objective, **options)
    check_guide(guide, program, samples=100)
    if objective == "subtb":
        mixture = MixtureGuide([guide, PromptedGuide(guidance=Guidance(0.5))])
        check_guide(mixture, program, samples=100)
        guide.defensive = 0.2
        check_guide(guide, program, samples=100)


def kl(program: Program, guide: GFlowNetGuide) -> float:
    """KL(q‖p) over all token sequences of the one latent."""
    truth = infer(program, method="exact", progress=False)
    log_p = np.asarray(truth.log_weights) - truth.log_evidence
    fn = program.sites["middle"].fn
    read, adapter = guide.reads(program, "middle", fn, Execution())
    requests = [fn.request(s["middle"], prompt=read, adapter=adapter) for s in truth.samples]
    log_q = np.array([r.log_prob for r in perform(requests)])  # type: ignore[union-attr]
    assert np.exp(log_q).sum() == pytest.approx(1.0, abs=1e-4)
    return float((np.exp(log_q) * (log_q - log_p)).sum())


def test_guided_by_its_own_context_alone_an_untrained_guide_is_the_prior() -> None:
    program = compile(story, LM_, "aab.")
    guide = GFlowNetGuide(LM_, rank=2, context=own, guidance=Guidance(1.0, without=own))
    found = infer(program, guide=guide, num_samples=16, progress=False)
    assert found.log_q is not None
    for sample_, log_q in zip(found.samples, found.log_q, strict=True):
        prior = program.sites["middle"].fn.log_prob(sample_["middle"])
        assert log_q == pytest.approx(float(prior), abs=1e-5)
    check_guide(guide, program)


@pytest.mark.parametrize("objective", ["subtb", "vargrad"])
def test_training_leads_to_the_posterior(objective: str) -> None:
    lm = make_lm(5)
    program = compile(story, lm, "aab.")
    guide = GFlowNetGuide(lm, guidance=Guidance(0.8), seed=5)
    before = kl(program, guide)
    guide.fit(program, objective=objective, steps=150, batch=32, learning_rate=6e-3, progress=False)
    assert before > 0.3 and kl(program, guide) < 0.06


def test_exact_divergences_have_the_gradient_of_the_elbo() -> None:
    """The gradient of `rao_blackwell` over very many draws, beside that of the enumerated ELBO."""
    lm = make_lm(6)
    program = compile(story, lm, "ba.")
    guide = trained(lm, program, "rao_blackwell", steps=6, tempered_share=0.0, replay_share=0.0)
    named = [p for n, p in lm.model.named_parameters() if f".{guide.adapter}." in n]
    truth = infer(program, method="exact", progress=False)
    fn = program.sites["middle"].fn
    read, adapter = guide.reads(program, "middle", fn, Execution())
    requests = [fn.request(s["middle"], prompt=read, adapter=adapter) for s in truth.samples]
    log_q = torch.stack([f.total for f in score_with_gradients(requests)])  # type: ignore[arg-type]
    log_joint = torch.tensor(np.asarray(truth.log_weights), dtype=torch.float32)
    loss = (log_q.exp() * (log_q - log_joint)).sum()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, named)])

    found: list[torch.Tensor] = []
    plain = torch.nn.utils.clip_grad_norm_

    def watched(parameters: Any, most: float) -> Any:
        own = list(parameters)
        if own and own[0] is named[0]:
            found.append(torch.cat([p.grad.detach().flatten() for p in own]))
        return plain(own, most)

    torch.nn.utils.clip_grad_norm_, kept = watched, plain  # type: ignore[assignment]
    try:
        options = {"learning_rate": 1e-12, "tempered_share": 0.0, "replay_share": 0.0}
        guide.fit(program, objective="rao_blackwell", steps=24, batch=64, progress=False, **options)
    finally:
        torch.nn.utils.clip_grad_norm_ = kept
    rows = torch.stack(found)
    mean, error = rows.mean(0), rows.std(0) / len(rows) ** 0.5
    # Seeds are fixed; 24 steps of 64 draws. The whole vector, by its component along the truth.
    along = exact / exact.norm()
    deviation = (rows @ along).std() / len(rows) ** 0.5
    assert float((mean @ along - exact.norm()).abs()) < 4 * float(deviation)
    assert float(deviation) < 0.25 * float(exact.norm())
    assert float(((mean - exact).abs() > 5 * error + 1e-6).float().mean()) < 0.01


def test_smc_and_mh_follow_it() -> None:
    program = compile(story, LM_, "aab.")
    truth = infer(program, method="exact", progress=False)
    guide = PromptedGuide(guidance=Guidance(0.8))
    for twist in (None, "lookahead", "flow"):
        found = [
            infer(
                program, method="smc", guide=guide, twist=twist, num_samples=16, every=1, seed=k,
                progress=False,
            ).log_evidence
            for k in range(24)
        ]  # fmt: skip
        ratio = np.exp(np.array(found) - truth.log_evidence)
        assert abs(ratio.mean() - 1.0) < 4 * ratio.std(ddof=1) / 24**0.5, twist
    chains = infer(program, method="mh", guide=guide, num_samples=600, seed=3, progress=False)
    share = np.mean([s["middle"] == "." for s in chains.samples])
    expected = sum(
        float(w) for s, w in zip(truth.samples, truth.weights, strict=True) if s["middle"] == "."
    )
    assert abs(share - expected) < 0.1


def test_numbers_have_their_heads_beside_it() -> None:
    lm = make_lm(7)

    def rated() -> None:
        p = sample("p", Beta(2.0, 3.0))
        z = sample("z", LMString(lm, "ab", max_tokens=2))
        sample("y", LMString(lm, f"a{z}"), obs="b" if float(p) < 2 else "a")

    guide = GFlowNetGuide(lm, guidance=Guidance(0.7), rank=2, seed=3)
    guide.fit(rated, steps=3, batch=4, progress=False)
    found = infer(rated, guide=guide, num_samples=32, progress=False)
    assert np.isfinite(found.log_evidence)
    contexts = guide.chooser(compile(rated), ("k",))
    program = compile(rated)
    (execution,) = program.run([contexts])
    assert isinstance(contexts.contexts["z"], Guided)  # type: ignore[attr-defined]
    assert isinstance(contexts.contexts["p"], tuple)  # type: ignore[attr-defined]
    assert set(execution.latents) == {"p", "z"}


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    lm = make_lm(8)
    program = compile(story, lm, "aab.")
    guide = trained(lm, program, "subtb")
    guide.save(tmp_path / "default")
    again = GFlowNetGuide.load(tmp_path / "default", lm)
    assert again.guidance == Guidance(0.8) and again.identity() == guide.identity()
    rows = infer(program, num_samples=8, progress=False).samples
    assert again.log_q(program, rows) == pytest.approx(guide.log_q(program, rows), abs=1e-5)
    with pytest.raises(ValueError, match="by its context function"):
        GFlowNetGuide.load(tmp_path / "default", lm, without=without)

    other = GFlowNetGuide(lm, context=own, guidance=Guidance(1.2, without), seed=1)
    other.fit(program, steps=1, batch=4, progress=False)
    other.save(tmp_path / "own")
    with pytest.raises(ValueError, match=r"by a function of its own.*as without"):
        GFlowNetGuide.load(tmp_path / "own", lm, context=own)
    again = GFlowNetGuide.load(tmp_path / "own", lm, context=own, without=without)
    assert again.identity() == other.identity()
    with pytest.warns(UserWarning, match="context without observations"):
        GFlowNetGuide.load(tmp_path / "own", lm, context=own, without=own)

    plain = GFlowNetGuide(lm, seed=1)
    plain.save(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no guidance"):
        GFlowNetGuide.load(tmp_path / "plain", lm, without=without)
    record = json.loads((tmp_path / "default" / "guide.json").read_text())
    record["guidance"] = -1.0
    (tmp_path / "default" / "guide.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="corrupt: the scale"):
        GFlowNetGuide.load(tmp_path / "default", lm)


def test_a_guide_of_the_version_before_loads(tmp_path: Path) -> None:
    guide = GFlowNetGuide(LM_, seed=1)
    guide.save(tmp_path)
    record = json.loads((tmp_path / "guide.json").read_text())
    record["version"] = 2
    del record["guidance"], record["without"]
    (tmp_path / "guide.json").write_text(json.dumps(record))
    assert GFlowNetGuide.load(tmp_path, LM_).guidance is None


def test_a_training_that_was_cut_off_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"steps": 7, "checkpoint_every": 2, "draw_ahead": 2}

    def run(folder: Path) -> GFlowNetGuide:
        lm = make_lm(9)
        return trained(lm, compile(story, lm), "subtb", checkpoint=folder, **options)

    whole = run(tmp_path / "whole")
    step = Trainer.step

    def failing(self: Trainer, at: int) -> dict[str, float]:
        if at == 5:
            raise RuntimeError("power cut")
        return step(self, at)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path / "cut")
    resumed = run(tmp_path / "cut")
    assert resumed.history == whole.history
    assert resumed.identity() == whole.identity()
    with pytest.raises(ValueError, match="guidance"):
        lm = make_lm(9)
        other = GFlowNetGuide(lm, guidance=Guidance(0.9), rank=4, seed=2)
        other.fit(
            compile(story, lm), objective="subtb", batch=8, learning_rate=1e-2, progress=False,
            checkpoint=tmp_path / "whole", **options,
        )  # fmt: skip


def test_draws_keep_what_they_were_guided_by() -> None:
    program = compile(story, LM_, "aab.")
    guide = GFlowNetGuide(LM_, guidance=Guidance(0.8), seed=1)
    policy: Any = guide.chooser(program, ("k",))
    (execution,) = program.run([policy])
    parts = [Part(execution.sites["middle"], policy.contexts["middle"])]
    draw = Draw(key_of(parts, execution), parts, -1.0, -2.0, latents=execution.latents)
    record = json.loads(json.dumps(to_record(draw)))
    (again,) = from_records(program, [record])
    assert again.parts[0].context == parts[0].context and isinstance(parts[0].context, Guided)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_out_of_range(scale: float) -> None:
    with pytest.raises(ValueError, match="scale"):
        Guidance(scale)


def test_what_is_no_guidance() -> None:
    with pytest.raises(TypeError, match=r"Guidance\(0.8\), got 0.8"):
        PromptedGuide(guidance=0.8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Guidance\(0.8\), got 0.8"):
        GFlowNetGuide(LM_, guidance=0.8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="without must be a function"):
        Guidance(0.5, "ab")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale must be a number"):
        Guidance("much")  # type: ignore[arg-type]


def test_guides_with_another_guidance_are_others() -> None:
    words = {
        PromptedGuide(guidance=g).identity()
        for g in (None, Guidance(0.5), Guidance(0.6), Guidance(0.5, without))
    }
    assert len(words) == 4
    assert repr(PromptedGuide(own, guidance=Guidance(0.5))) == "PromptedGuide(own, guidance=0.5)"
