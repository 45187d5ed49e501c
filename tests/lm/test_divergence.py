"""The divergence of two states against sums over all actions and over all strings."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from langppl import LM
from langppl.distributions import LMString, Text
from langppl.lm.divergence import step_divergences
from langppl.lm.enumeration import strings
from langppl.lm.requests import ScoreRequest
from langppl.lm.scoring import PathLogProbs, score_with_gradients
from langppl.testing import tiny_lm


@pytest.fixture(scope="module")
def lm() -> LM:
    found = tiny_lm("ab.", seed=5, merged=["ab", "b.", "..", ".a"])
    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found.add_adapter("q", config)
    return found


def requests(fn: LMString, prompt: str, adapter: str | None) -> list[ScoreRequest]:
    assert fn.rules.max_tokens is not None
    found = []
    for ids, text, _ in strings(fn.bound, fn.rules.max_tokens):
        value = Text(text, ids, fn.lm.fingerprint)
        request = fn.request(value, prompt=fn.lm.encode_prompt(prompt), adapter=adapter)
        assert request is not None
        found.append(request)
    return found


def kls_of(lm: LM, of_q: list[ScoreRequest], of_p: list[ScoreRequest]) -> list[torch.Tensor]:
    with torch.no_grad():
        ps = score_with_gradients(of_p, with_states=True)
    qs = score_with_gradients(of_q, with_states=True)
    steps = [step for r in of_q for step in r.path.steps]
    own, other = (
        torch.cat([f.states for f in found if f.states is not None]) for found in (qs, ps)
    )
    found = step_divergences(lm, steps, own, other, of_q[0].temperature)
    return list(found.split([len(r.path.steps) for r in of_q]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("stop", [".", ()])
def test_summed_over_a_string_it_is_the_divergence_of_strings(
    lm: LM, stop: str | tuple[str, ...], temperature: float
) -> None:
    fn = LMString(lm, "ab", stop=stop, min_tokens=1, max_tokens=3, temperature=temperature)
    of_q, of_p = requests(fn, "ba", "q"), requests(fn, "ab", None)
    with torch.no_grad():
        log_q = torch.stack([f.total for f in score_with_gradients(of_q)]).double()
        log_p = torch.stack([f.total for f in score_with_gradients(of_p)]).double()
        kls = torch.stack([k.double().sum() for k in kls_of(lm, of_q, of_p)])
    assert float(log_q.logsumexp(0)) == pytest.approx(0.0, abs=1e-5)
    exact = float((log_q.exp() * (log_q - log_p)).sum())
    assert exact > 0.05
    # The chain rule: E[Σ KL of the actions] = KL of the strings, endings alike as one action.
    assert float((log_q.exp() * kls).sum()) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("splits_head", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("stop", [".", ()])
def test_its_gradient_is_that_of_the_sum_over_actions(
    lm: LM,
    monkeypatch: pytest.MonkeyPatch,
    stop: str | tuple[str, ...],
    temperature: float,
    splits_head: bool,
) -> None:
    monkeypatch.setattr(lm, "splits_head", splits_head)
    fn = LMString(lm, "ab", stop=stop, min_tokens=1, max_tokens=3, temperature=temperature)
    (of_q,) = [r for r in requests(fn, "ba", "q") if r.path.tokens == lm.encode_text("aa")][:1]
    (of_p,) = [r for r in requests(fn, "ab", None) if r.path.tokens == lm.encode_text("aa")][:1]
    weights = [p for n, p in lm.model.named_parameters() if ".q." in n]
    for p in weights:
        p.requires_grad_(True)
    (kls,) = kls_of(lm, [of_q], [of_p])
    found = torch.autograd.grad(kls.sum(), weights)

    def logits(request: ScoreRequest) -> torch.Tensor:
        ids = torch.tensor([request.prompt + request.path.tokens])
        with lm.adapter(request.adapter):
            found: torch.Tensor = lm.model(input_ids=ids).logits[0, len(request.prompt) - 1 :]
        return found / temperature

    expected = kls.new_zeros(())
    sizes = set()
    for q, p, step in zip(logits(of_q), logits(of_p).detach(), of_q.path.steps, strict=False):
        endings = [ids.tolist() for ids in (step.end_ids, *step.groups.values()) if len(ids)]
        ending = {token for ids in endings for token in ids}
        others = [[t] for t in step.legal.nonzero()[:, 0].tolist() if t not in ending]
        sizes |= {len(ids) for ids in endings}
        log_q, log_p = q[step.legal].logsumexp(0), p[step.legal].logsumexp(0)
        for ids in [*endings, *others]:
            of_action, by_p = q[ids].logsumexp(0) - log_q, p[ids].logsumexp(0) - log_p
            expected = expected + of_action.exp() * (of_action - by_p)
    assert (max(sizes) > 1) == bool(stop)  # with a stop, several tokens are one action
    torch.testing.assert_close(kls.sum(), expected, rtol=1e-4, atol=1e-5)
    for own, other in zip(found, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


def test_of_no_states_there_is_none(lm: LM) -> None:
    none = torch.zeros(0, 4)
    assert step_divergences(lm, [], none, none).shape == (0,)


def test_states_are_those_before_each_action(lm: LM) -> None:
    fn = LMString(lm, "ab", stop=".", max_tokens=3)
    found: list[PathLogProbs] = score_with_gradients(requests(fn, "ba", None), with_states=True)
    for request, own in zip(requests(fn, "ba", None), found, strict=True):
        assert own.states is not None and len(own.states) == len(request.path.steps)
        if len(own.states):
            torch.testing.assert_close(own.states[0], own.state)
    assert score_with_gradients(requests(fn, "ba", None))[0].states is None


def test_an_adapter_on_the_head_is_an_error() -> None:
    """Both states would be read by one head."""
    lm = tiny_lm("ab.", seed=5)
    lm.add_adapter("q", LoraConfig(r=2, target_modules=["lm_head"]))
    states = torch.zeros(1, lm.state_width)
    step = lm.bind(LMString(lm, "a", max_tokens=2).rules).step(
        lm.bind(LMString(lm, "a", max_tokens=2).rules).start(2)
    )
    with pytest.raises(ValueError, match="is on its head"):
        step_divergences(lm, [step], states, states)
