"""A trainable view: it is the LM under its own adapter, wherever a model stands on it."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

import langppl as lp
from langppl.lm import adapters, scoring
from langppl.lm.memo import Memo
from langppl.lm.requests import serve
from langppl.lm.trainable import TRAINABLE_FILE, TrainableLM
from langppl.program.templates import signature
from langppl.testing import check_distribution, check_guide, tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore::langppl.JoinWarning")


def shaken(view: TrainableLM, seed: int = 0, size: float = 0.3) -> TrainableLM:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in view.named_parameters.values():
            p.copy_(size * torch.randn(p.shape, generator=generator))
    return view


@pytest.fixture
def lm() -> lp.LM:
    return tiny_lm("ab.", merged=["ab", "b."], sharpness=0.3)


def story(lm, view, ending="ab."):
    z = lp.sample("z", lp.LMString(view, "ab", stop=".", max_tokens=3))
    lp.sample("mood", lp.LMChoice(view, f"b{z}", ["a", "b"]), obs="a")
    lp.sample("ending", lp.LMString(lm, f"ab{z}"), obs=ending)


def test_it_is_the_lm_until_it_is_fitted_and_the_lm_under_its_adapter_from_then_on(lm):
    view = lm.trainable("v", rank=3)
    plain, own = lp.LMString(lm, "a", max_tokens=3), lp.LMString(view, "a", max_tokens=3)
    assert float(own.log_prob("ab")) == pytest.approx(float(plain.log_prob("ab")), abs=1e-6)
    shaken(view)
    value = own.draw(("k",))[0]
    (request,) = plain.pending(value, adapter=view.adapter).requests
    (reply,) = scoring.score([request])
    assert float(own.log_prob(value)) == pytest.approx(reply.log_prob, abs=1e-5)
    assert abs(float(own.log_prob(value)) - float(plain.log_prob(value))) > 0.05
    choice = lp.LMChoice(view, "a", ["a", "b"])
    again = lp.LMChoice(lm, "a", ["a", "b"]).log_probs(adapter=view.adapter)
    np.testing.assert_allclose(choice.log_probs(), again, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda v: lp.LMString(v, "a", stop=".", max_tokens=3),
        lambda v: lp.LMChoice(v, "ab", ["a", "b", "."]),
    ],
)
def test_its_distributions_keep_their_promises(lm, make):
    check_distribution(make(shaken(lm.trainable("v", rank=2))), samples=1000)


def test_two_views_and_the_lm_are_three_distributions(lm):
    fns = [lp.LMString(v, "a", max_tokens=3) for v in (lm, lm.trainable("u"), lm.trainable("v"))]
    assert len({fn.fields() for fn in fns}) == 3
    assert all(fn.with_prompt("b").adapter == fn.adapter for fn in fns)
    assert all(fn.with_rules(fn.rules).adapter == fn.adapter for fn in fns)
    assert [repr(fn) for fn in fns] == [
        "LMString(tiny-0, 'a')",
        "LMString(tiny-0+u, 'a')",
        "LMString(tiny-0+v, 'a')",
    ]
    choices = [lp.LMChoice(v, "a", ["a", "b"]) for v in (lm, lm.trainable("u"))]
    assert choices[0].fields() != choices[1].fields()
    assert choices[1].with_prompt("b").adapter == choices[1].adapter


def test_asked_for_again_it_is_the_same_view(lm):
    view = lm.trainable("v", rank=3)
    assert lm.trainable("v") is view and lm.trainable("v", rank=3) is view
    assert lm.trainables == (view,)
    with pytest.raises(
        ValueError, match=r"'v' already, made with .*'rank': 3.*give it another name"
    ):
        lm.trainable("v", rank=4)


@pytest.mark.parametrize("name", ["", "a.b", "a b", None, "ü"])
def test_names_that_cannot_be_an_adapter_s_are_refused(lm, name):
    with pytest.raises(ValueError, match="made of letters, digits"):
        lm.trainable(name)


def test_a_rank_below_one_is_refused_and_leaves_nothing_behind(lm):
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, got 0"):
        lm.trainable("v", rank=0)
    assert lm.trainables == () and not adapters.names(lm.model)


def test_a_guide_is_made_for_the_lm_and_proposes_for_the_view(lm):
    view = shaken(lm.trainable("v", rank=2), size=0.1)
    with pytest.raises(TypeError, match="make it for the LM, not for its view"):
        lp.GFlowNetGuide(view)
    guide = lp.GFlowNetGuide(lm, rank=2)
    shaken_guide = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, p in lm.model.named_parameters():
            if f".{guide.adapter}." in n:
                p.copy_(0.1 * torch.randn(p.shape, generator=shaken_guide))
    check_guide(guide, story, lm, view, samples=1500)


@pytest.mark.parametrize("guide", [lp.PriorGuide(), lp.PromptedGuide()])
def test_guides_propose_with_the_site_s_own_adapter(lm, guide):
    check_guide(guide, story, lm, shaken(lm.trainable("v", rank=2)), samples=1500)


@pytest.mark.parametrize(
    ("method", "guide"),
    [
        ("importance", "prior"),
        ("smc", "prior"),
        ("smc", "prompted"),
        ("mh", "prior"),
    ],
)
def test_every_method_agrees_with_the_exact_posterior(lm, method, guide):
    view = shaken(lm.trainable("v", rank=2))
    exact = lp.infer(story, lm, view, method="exact")
    size = 800 if method == "mh" else 2000
    options = {"every": 1} if method == "smc" else {}
    found = lp.infer(story, lm, view, method=method, guide=guide, num_samples=size, **options)
    if found.log_evidence is not None:
        # The error is the estimate's own; 4 of them.
        assert abs(found.log_evidence - exact.log_evidence) < 4 * found.log_evidence_error
    for text, share in list(exact.probabilities("z").items())[:3]:
        # Four standard errors at the effective sample size.
        error = 4 * np.sqrt(share * (1 - share) / found.ess)
        assert abs(found.probabilities("z").get(text, 0.0) - share) < error


def test_a_compiled_program_follows_the_view(lm):
    view = lm.trainable("v", rank=2)
    program = lp.compile(story, lm, view)
    assert program.is_static
    before = lp.infer(program, method="exact").log_evidence
    shaken(view)
    after = lp.infer(program, method="exact").log_evidence
    assert abs(after - before) > 0.01
    assert after == pytest.approx(lp.infer(story, lm, view, method="exact").log_evidence, abs=1e-5)
    other = lp.compile(story, lm, lm.trainable("other"))
    assert signature(program.sites["mood"]) != signature(other.sites["mood"])


def test_what_is_simulated_comes_from_the_view(lm):
    view = shaken(lm.trainable("v", rank=2))

    def model(of):
        lp.sample("x", lp.LMString(of, "a"), obs="b")

    def share(of):
        drawn = lp.compile(model, of).simulate(1500, lengths={"x": 1})
        return np.mean([d["x"] == "b" for d in drawn])

    first = lp.LMString(view, "a", max_tokens=2)
    one = np.exp(float(first.log_prob(lp.Text("b", lm.encode_text("b"), lm.fingerprint))))
    assert share(view) != share(lm) and 0.0 <= one <= 1.0
    # Of one token that goes on: the draws in which the LM ended at once were drawn anew.
    (request,) = lp.LMString(view, "a").pending("b").requests
    ended = np.exp(scoring.score([request])[0].canonical[0])
    expected = np.exp(float(lp.LMString(view, "a").log_prob("b"))) / (1 - ended)
    error = np.sqrt(expected * (1 - expected) / 1500)
    assert abs(share(view) - expected) < 4 * error


# -- the memo ----------------------------------------------------------------------------------

asked = st.tuples(
    st.sampled_from(["lm", "u", "v"]),
    st.sampled_from(["a", "ab"]),
    st.sampled_from(["a", "b", "ab"]),
)
happens = st.one_of(
    st.lists(asked, min_size=1, max_size=5),
    st.tuples(st.sampled_from(["u", "v"]), st.integers(0, 9)),
)
SHARED = tiny_lm("ab.", merged=["ab"], sharpness=0.3, seed=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(happens, min_size=2, max_size=8))
def test_a_remembered_score_is_never_that_of_another_state(events):
    SHARED.memo = Memo()
    views = {"lm": SHARED, "u": SHARED.trainable("u", rank=2), "v": SHARED.trainable("v", rank=2)}
    for event in events:
        if isinstance(event, tuple):
            shaken(views[event[0]], seed=event[1])
            continue
        wanted = [lp.LMString(views[w], p, max_tokens=3).request(t) for w, p, t in event]
        for request, reply in zip(wanted, serve(wanted), strict=True):
            (fresh,) = scoring.score([request])
            np.testing.assert_allclose(reply.tokens, fresh.tokens, atol=2e-5)
            assert reply.log_prob == pytest.approx(fresh.log_prob, abs=5e-5)


def test_equal_weights_at_another_scale_are_another_state(lm):
    view = shaken(lm.trainable("v", rank=2))
    fn = lp.LMString(view, "a", max_tokens=3)
    before, known = float(fn.log_prob("ab")), adapters.digest(lm.model, view.adapter)
    for layer in adapters._layers(lm.model):
        layer.scaling[view.adapter] *= 3.0
    assert adapters.digest(lm.model, view.adapter) != known
    assert abs(float(fn.log_prob("ab")) - before) > 0.01


# -- keeping -----------------------------------------------------------------------------------


def evidence(lm, view):
    return lp.infer(story, lm, view, method="exact").log_evidence


def test_saved_and_loaded_it_is_the_same(lm, tmp_path):
    view = shaken(lm.trainable("v", rank=3))
    expected = evidence(lm, view)
    view.save(tmp_path / "v")
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainable.json",
    ]
    view.reset()
    assert evidence(lm, view) == pytest.approx(evidence(lm, lm), abs=1e-5)
    program = lp.compile(story, lm, view)
    assert view.load(tmp_path / "v") is view
    assert evidence(lm, view) == pytest.approx(expected, abs=1e-6)
    assert lp.infer(program, method="exact").log_evidence == pytest.approx(expected, abs=1e-6)
    other = tiny_lm("ab.", merged=["ab", "b."], sharpness=0.3)
    # The folder's rank is taken over.
    loaded = other.trainable("elsewhere", rank=7).load(tmp_path / "v")
    assert evidence(other, loaded) == pytest.approx(expected, abs=1e-5)
    assert all(p.requires_grad for p in loaded.named_parameters.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_peft_reads_what_it_saves(lm, tmp_path):
    view = shaken(lm.trainable("v", rank=3))
    view.save(tmp_path / "v")
    ids = torch.tensor([lm.encode_prompt("abab")])
    with torch.no_grad(), lm.adapter(view.adapter):
        expected = lm.model(input_ids=ids).logits
    plain = tiny_lm("ab.", merged=["ab", "b."], sharpness=0.3).model
    read = PeftModel.from_pretrained(plain, str(tmp_path / "v"))
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.filterwarnings("ignore:Could not find a config file in tiny-0")
def test_it_reads_what_peft_saves(lm, tmp_path):
    view = shaken(lm.trainable("v", rank=3))
    expected = evidence(lm, view)
    view.save(tmp_path / "v")
    read = PeftModel.from_pretrained(
        tiny_lm("ab.", merged=["ab", "b."], sharpness=0.3).model, str(tmp_path / "v")
    )
    read.save_pretrained(str(tmp_path / "again"))
    view.reset()
    assert evidence(lm, view.load(tmp_path / "again")) == pytest.approx(expected, abs=1e-5)


def test_a_load_that_fails_leaves_the_view_as_it_was(lm, tmp_path):
    view = shaken(lm.trainable("v", rank=3))
    view.save(tmp_path / "v")
    shaken(view, seed=1)
    expected, known = evidence(lm, view), adapters.names(lm.model)
    weights = tmp_path / "v" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="corrupt"):
        view.load(tmp_path / "v")
    with pytest.raises(ValueError, match="is no adapter folder"):
        view.load(tmp_path)
    weights.write_bytes(whole)
    record = tmp_path / "v" / TRAINABLE_FILE
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "base_fingerprint": "0"}))
    with pytest.raises(ValueError, match=r"was fitted on 'tiny-0' .* has other weights"):
        view.load(tmp_path / "v")
    record.write_text("{}")
    with pytest.raises(ValueError, match=r"trainable\.json is corrupt"):
        view.load(tmp_path / "v")
    assert evidence(lm, view) == pytest.approx(expected, abs=1e-6)
    assert adapters.names(lm.model) == known


# -- inference mode -------------------------------------------------------------------------------


def test_an_adapter_of_inference_mode_leaves_room_for_others(tmp_path: Path) -> None:
    lm = tiny_lm("ab.", seed=7)
    with torch.inference_mode():
        first = lm.trainable("first", rank=2)
        first.save(tmp_path)
        second = lm.trainable("second", rank=2).load(tmp_path)
    third = lm.trainable("third", rank=2)
    for view in (first, second, third):
        assert all(p.requires_grad and not p.is_inference() for p in view.named_parameters.values())


def test_a_model_of_inference_mode_is_refused() -> None:
    made = tiny_lm("ab.", seed=7)
    with torch.inference_mode():
        model = copy.deepcopy(made.model)
    with pytest.raises(ValueError, match=r"under torch\.inference_mode.*make it outside"):
        lp.LM.from_parts(model, made.tokenizer, "made")
    with torch.inference_mode():
        lp.LM.from_parts(made.model, made.tokenizer, "made").trainable("x", rank=2)
