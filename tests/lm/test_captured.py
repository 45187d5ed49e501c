"""Steps of one shape give the strings of plain ones; here they run plainly, on cuda as graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from test_decoding import PROMPTS, draw, family, request

from langppl.distributions import LMString
from langppl.lm import LM, captured, packed
from langppl.lm.requests import DrawRequest
from langppl.testing import tiny_lm

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
RULES: list[dict[str, Any]] = [
    {"max_tokens": 9},
    {"stop": ["a.", "."], "max_tokens": 7, "min_tokens": 2},
    {"ban": "b", "max_tokens": 8, "temperature": 2.0},
]


def anywhere(lm: LM, wanted: list[DrawRequest]) -> bool:
    return lm.captures and captured.suits(lm, wanted)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "takes", anywhere)


def make_lm(device: str = "cpu") -> LM:
    lm = tiny_lm("ab. ", merged=["b.", "ab"])
    torch.manual_seed(0)
    lm.add_adapter("a", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return LM.from_parts(lm.model.to(device), lm.tokenizer, "tiny")


def assert_alike(lm: LM, wanted: list[DrawRequest]) -> None:
    """Draws are those of the plain way, which is taken afterwards."""
    own = draw(wanted)
    assert lm.captured
    lm.captures = False
    try:
        expected = draw(wanted)
    finally:
        lm.captures = True
    assert [r.ids for r in own] == [r.ids for r in expected]
    np.testing.assert_allclose([r.log_prob for r in own], [r.log_prob for r in expected], atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.parametrize("is_added", [False, True])
def test_strings_are_those_of_plain_steps(
    device: str, adapter: str | None, is_added: bool, captures: None
) -> None:
    lm = make_lm(device)
    assert lm.packs is not None
    lm.packs = replace(lm.packs, is_added=is_added, in_blocks=not is_added)
    wanted = [
        request(LMString(lm, prompt, **rules), ("k", k), adapter=adapter)
        for k in range(5)
        for prompt in PROMPTS
        for rules in RULES
    ]
    assert_alike(lm, wanted)


LM_OF_ANY = make_lm()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.integers(0, 9), st.sampled_from(range(3))),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([None, "a"]),
)
def test_any_batch_of_strings(wanted: list[tuple[str, int, int]], adapter: str | None) -> None:
    lm = LM_OF_ANY
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "takes", anywhere)
        assert_alike(
            lm,
            [
                request(LMString(lm, prompt, **RULES[rules]), (prompt, key), adapter=adapter)
                for prompt, key, rules in wanted
            ],
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX", "Qwen3"])
def test_families(device: str, name: str, captures: None) -> None:
    plain = family(name)
    lm = LM.from_parts(plain.model.to(device), plain.tokenizer, name)
    assert_alike(
        lm, [request(LMString(lm, p, **RULES[0]), ("k", k)) for k in range(3) for p in PROMPTS]
    )


@pytest.mark.parametrize("device", DEVICES)
def test_new_weights_are_seen(device: str, captures: None) -> None:
    lm = make_lm(device)
    wanted = [request(LMString(lm, "ab", max_tokens=9), ("k", k), adapter="a") for k in range(6)]
    assert_alike(lm, wanted)
    before = [r.log_prob for r in draw(wanted)]
    (steps,) = lm.captured.values()
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if ".lora_B." in name:
                weight.mul_(3.0)  # as the optimiser does, in place
    assert_alike(lm, wanted)
    (same,) = lm.captured.values()
    assert same is steps
    assert [r.log_prob for r in draw(wanted)] != pytest.approx(before, abs=1e-3)
    # Another adapter of that name lies elsewhere in memory, or has another scale.
    lm.remove_adapter("a")
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", init_lora_weights=False)
    lm.add_adapter("a", config)
    lm.model.to(device)
    assert_alike(lm, wanted)
    (other,) = lm.captured.values()
    assert other is not steps
    # Products of fewer digits are other kernels.
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        draw(wanted)
    finally:
        torch.set_float32_matmul_precision(precision)
    (coarse,) = lm.captured.values()
    assert coarse is not other
    for layer in lm.model.modules():
        if isinstance(layer, LoraLayer):
            layer.merge(adapter_names=["a"])
    assert_alike(lm, wanted)
    (whole,) = lm.captured.values()
    assert whole is not coarse


@pytest.mark.parametrize("device", DEVICES)
def test_many_prompts(device: str, captures: None) -> None:
    lm = make_lm(device)
    prompts = [a * 9 + b + c for a in "ab" for b in "ab." for c in ["", "a", "ba", "bab"]]
    assert_alike(
        lm, [request(LMString(lm, p, **RULES[0]), ("k", k)) for k in range(3) for p in prompts]
    )


def test_what_is_kept_is_bounded(captures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    for rows in (1, 9, 17, 33, 65):
        draw([request(LMString(lm, "a", max_tokens=3), ("k", k)) for k in range(rows)])
    assert [rows for _, rows, _ in lm.captured] == [16, 32, 64, 128]
    monkeypatch.setattr(captured, "KEPT_BYTES", 1)
    draw([request(LMString(lm, "a", max_tokens=3), ("k", 0))])
    assert [rows for _, rows, _ in lm.captured] == [8]


def test_a_step_that_differs_is_not_used(captures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    step = captured.Steps.step
    monkeypatch.setattr(captured.Steps, "step", lambda own, tokens: 1.1 * step(own, tokens))
    wanted = [request(LMString(lm, "ab", max_tokens=9), ("k", k)) for k in range(6)]
    with pytest.warns(UserWarning, match="cannot decode in captured steps.*logits differ"):
        found = draw(wanted)
    assert not lm.captures and not lm.captured
    assert [r.ids for r in found] == [r.ids for r in draw(wanted)]


@pytest.mark.parametrize(
    "options", [{"length": 3}, {"begun": (3,)}, {"limit": None}, {"limit": 65}]
)
def test_long_strings_and_pieces_go_the_plain_way(options: dict[str, Any]) -> None:
    lm = make_lm()
    one = request(LMString(lm, "ab", max_tokens=100), ("k", 0))
    assert captured.suits(lm, [replace(one, limit=64)])
    assert not captured.suits(lm, [replace(one, **{"limit": 64, **options})])


def test_a_sliding_window_that_hides_a_past_is_no_step(captures: None) -> None:
    lm = family("Mistral")  # which sees four tokens
    draw([request(LMString(lm, "ab.ab", max_tokens=9), ("k", k)) for k in range(3)])
    assert not lm.captured


def test_tokens_are_counted_once(captures: None) -> None:
    lm = make_lm()
    wanted = [request(LMString(lm, "ab", min_tokens=5, max_tokens=5), ("k", k)) for k in range(3)]
    draw(wanted)  # with the comparison of the new steps
    before = lm.tally.copy()
    draw(wanted)
    prompt = len(wanted[0].prompt)
    assert (lm.tally - before).drawn == prompt + 4 * 3  # the fifth token is not read


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ("highest", torch.float32, 1e-3),
        ("high", torch.float32, 1e-2),
        ("medium", torch.float32, 0.1),
        ("highest", torch.bfloat16, 0.1),
    ],
)
def test_logits_are_compared_by_the_digits_of_their_products(
    precision: str, dtype: torch.dtype, expected: float
) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert packed.tolerance(dtype) == expected
    finally:
        torch.set_float32_matmul_precision(before)
