"""The real LM: what its tokenizer makes of stops, and draws that score alike."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from langppl.distributions import LMString
from langppl.lm import LM, StringRules


@pytest.fixture(scope="module")
def lm(smollm2_path: Path) -> LM:
    return LM("smollm2-135m-instruct")


def test_special_tokens_are_masked(lm: LM) -> None:
    assert int(lm.vocabulary.special.sum()) == 17


def test_tokens_that_end_a_sentence(lm: LM) -> None:
    bound = LMString(lm, "", stop=".", max_tokens=5).bound
    step = bound.step(bound.advance(bound.start(5), lm.encode_text("a")[0]))
    texts = [lm.vocabulary.bytes[i] for i in step.kept]
    ending = sum(t.endswith(b".") and t.count(b".") == 1 for t in texts)
    print(f"{ending} tokens complete '.', {len(texts) - ending} run on past it")
    assert (ending, len(texts) - ending) == (64, 77)


def test_draws_score_alike(lm: LM) -> None:
    dist = LMString(lm, "The dog went to the", stop=".", max_tokens=8)
    for k in range(8):
        value, log_prob = dist.draw(("real", k))
        assert float(dist.log_prob(value)) == pytest.approx(log_prob, abs=1e-3), repr(value)


@pytest.mark.parametrize("answer", ["Sure, here", "Sure, ", " Sure", "", "a <|im_end|> b"])
def test_a_chat_goes_on_as_transformers_renders_it(lm: LM, answer: str) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a fish."},
        {"role": "assistant", "content": answer},
    ]
    tokenizer = lm.tokenizer
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    ids = lm.encode_prompt(chat)
    assert tokenizer.decode(list(ids)) == rendered
    assert rendered.endswith("assistant\n" + answer)
    if "<" not in answer:
        assert list(ids) == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    # The template's own: the two that end the first messages, and the three that begin one.
    names = tokenizer.convert_ids_to_tokens(list(ids))
    assert (names.count("<|im_end|>"), names.count("<|im_start|>")) == (2, 3)


@pytest.mark.parametrize("stop", ["a" * 200, "Now is the time. " * 50])
def test_a_long_stop_is_no_long_search(lm: LM, stop: str) -> None:
    lm.bind(StringRules(stop="."))  # what is made once
    began = time.process_time()
    lm.bind(StringRules(stop=stop))
    assert time.process_time() - began < 6.0
