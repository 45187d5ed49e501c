"""The LM itself: adapters, prompts, special tokens."""

from __future__ import annotations

import copy
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tokenizers import AddedToken

import langppl as lp
from langppl.lm import LM
from langppl.lm.prompts import KnownPrompts, PromptWarning
from langppl.testing import tiny_lm

IDS = torch.tensor([[0, 3, 4, 5]])


def logits(lm: LM) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm.model(input_ids=IDS).logits
    return found


def config(**options: object) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)  # type: ignore[arg-type]


def adapted(seed: int = 0, **options: object) -> LM:
    lm = tiny_lm(seed=1)
    generator = torch.Generator().manual_seed(seed)
    for p in lm.add_adapter("guide", config(**options)):
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return lm


def trainable(lm: LM) -> set[str]:
    return {n for n, p in lm.model.named_parameters() if p.requires_grad}


def test_adapter_switches_and_restores() -> None:
    plain, lm = logits(tiny_lm(seed=1)), adapted()
    lm.add_adapter("other", config())
    before = trainable(lm)
    assert before and all(".lora_" in n for n in before)
    assert torch.equal(logits(lm), plain)
    with lm.adapter("guide"):
        on = logits(lm)
        assert not torch.allclose(on, plain)
        with lm.adapter(None):
            assert torch.equal(logits(lm), plain)
        with pytest.raises(RuntimeError), lm.adapter("other"):
            raise RuntimeError
        assert torch.equal(logits(lm), on)
    assert torch.equal(logits(lm), plain)
    assert trainable(lm) == before
    with pytest.raises(KeyError, match="has no adapter 'none'; it has: guide, other"):
        lm.adapter("none").__enter__()
    with pytest.raises(ValueError, match="adapter 'guide' already"):
        lm.add_adapter("guide", config())
    lm.remove_adapter("other")
    assert not any(".other." in n for n, _ in lm.model.named_parameters())
    with lm.adapter("guide"):
        assert torch.equal(logits(lm), on)


def test_dropout_never_makes_an_answer_random() -> None:
    lm = adapted(lora_dropout=0.5)
    with lm.adapter("guide"):
        assert torch.equal(logits(lm), logits(lm))


def test_in_half_precision_an_adapter_keeps_its_own(tmp_path: Path) -> None:
    whole = tiny_lm(seed=1)
    lm = LM.from_parts(whole.model.to(torch.bfloat16), whole.tokenizer, "half")
    for parameter in lm.add_adapter("guide", config()):
        assert parameter.dtype == torch.float32
        torch.nn.init.normal_(parameter, std=0.1)
    lm.save_adapter("guide", tmp_path)
    lm.load_adapter("again", tmp_path)
    with lm.adapter("guide"):
        expected = logits(lm)
    with lm.adapter("again"):
        assert torch.equal(logits(lm), expected)
    assert expected.dtype == torch.bfloat16 and not torch.equal(logits(lm), expected)
    named = lm.model.named_parameters()
    assert {p.dtype for n, p in named if ".again." in n} == {torch.float32}


# peft asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_save_and_load(tmp_path: Path) -> None:
    lm = adapted()
    lm.save_adapter("guide", tmp_path)
    with lm.adapter("guide"):
        expected = logits(lm)
    with torch.no_grad():
        found = PeftModel.from_pretrained(tiny_lm(seed=1).model, str(tmp_path))(input_ids=IDS)
    assert torch.allclose(found.logits, expected, atol=1e-6)
    fresh = tiny_lm(seed=1)
    plain = logits(fresh)
    fresh.load_adapter("again", tmp_path)
    assert torch.equal(logits(fresh), plain)
    with fresh.adapter("again"):
        assert torch.allclose(logits(fresh), expected, atol=1e-6)
    assert (
        fresh.weights_fingerprint == lm.weights_fingerprint == tiny_lm(seed=1).weights_fingerprint
    )
    assert tiny_lm(seed=2).weights_fingerprint != lm.weights_fingerprint


def spoil(folder: Path, how: str) -> None:
    from safetensors.torch import load_file, save_file

    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, options = load_file(weights), json.loads(settings.read_text())
    first = sorted(tensors)[0]
    if how in ("missing key", "NaN", "shape"):
        if how == "missing key":
            del tensors[first]
        elif how == "NaN":
            tensors[first][0, 0] = float("nan")
        else:
            tensors[first] = tensors[first][:1].clone()
        save_file(tensors, weights)
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        settings.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no folder":
        shutil.rmtree(folder)
    elif how == "config is no JSON":
        settings.write_text("{")
    elif how == "modules nowhere":
        settings.write_text(json.dumps({**options, "target_modules": ["nowhere"]}))
    elif how == "whole modules":
        settings.write_text(json.dumps({**options, "modules_to_save": ["lm_head"]}))
    elif how == "invoked":
        invoked = {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}
        settings.write_text(json.dumps({**options, **invoked}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing key", "does not fit this LM: 1 tensors differ"),
        ("shape", "does not fit this LM"),
        ("NaN", "is corrupt: it holds NaN"),
        ("no weights", "adapter_model.safetensors is missing"),
        ("no config", "adapter_config.json is missing"),
        ("no folder", "is no adapter folder"),
        ("truncated", "is corrupt"),
        ("config is no JSON", "is corrupt"),
        ("modules nowhere", "nowhere"),
        ("whole modules", "modules_to_save"),
        ("invoked", "alora_invocation_tokens is not plain LoRA"),
    ],
)
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, how: str, message: str) -> None:
    adapted().save_adapter("guide", tmp_path / "a")
    spoil(tmp_path / "a", how)
    lm = adapted(seed=3)
    before = {n for n, _ in lm.model.named_parameters()}
    plain, flags = logits(lm), trainable(lm)
    with lm.adapter("guide"):
        on = logits(lm)
    with pytest.raises(ValueError) as error:
        lm.load_adapter("new", tmp_path / "a")
    assert message in str(error.value)
    assert {n for n, _ in lm.model.named_parameters()} == before and trainable(lm) == flags
    assert set(lm.model.peft_config) == {"guide"}
    assert torch.equal(logits(lm), plain)
    with lm.adapter("guide"):
        assert torch.equal(logits(lm), on)


def test_prompts() -> None:
    lm = tiny_lm(["a", "b", "<", "/", "s", ">"])
    assert lm.encode_prompt("") == (0,)
    assert lm.encode_prompt("ab") == (3, 4)
    with pytest.warns(PromptWarning, match=r"spells the special token '</s>'.*list of messages"):
        special = lm.encode_prompt("a</s>")
    assert 1 not in special and lm.vocabulary.join(special) == b"a</s>"
    assert 1 not in lm.encode_text("</s>")
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        lm.encode_prompt([{"role": "user", "content": "a"}])


def test_a_stop_that_no_string_contains() -> None:
    lm = tiny_lm(["a", "b", "<", "/", "s", ">"])
    with pytest.warns(PromptWarning, match=r"the stop '</s>' spells the special token '</s>'"):
        found = lp.LMString(lm, "a", stop=["b", "</s>"], max_tokens=3).log_prob("ab")
    assert found > -math.inf
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lp.LMString(lm, "a", stop="</s>", max_tokens=3, grammar=lp.regex("[ab]+"))
    assert len(told) == 1


def test_known_prompts_are_bounded_in_bytes() -> None:
    known = KnownPrompts(capacity=10_000)
    for k in range(1000):
        known.keep(f"{k:03d}" + "a" * 100, (k,) * 50)
        if k >= 2:
            assert known.get("002" + "a" * 100) == (2,) * 50
    assert known._bytes <= 10_000
    kept = [k for k in range(1000) if known.get(f"{k:03d}" + "a" * 100) is not None]
    assert kept == [2, 996, 997, 998, 999]
    known.keep("b" * 20_000, (1,))
    assert known.get("b" * 20_000) is None and known._bytes == 0


def test_the_prompts_of_an_lm_are_bounded() -> None:
    lm = tiny_lm()
    lm._prompts.capacity = 10_000
    for k in range(100):
        assert lm.encode_prompt("a" * k + "b" * 200)[k] == 4
    assert len(lm._prompts._found) < 5


def test_chats_go_through_the_template() -> None:
    lm = tiny_lm(["a", "b", "<", "/", "s", ">", "u", "e", "r"])
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    lm = LM.from_parts(lm.model, tokenizer, "chat")
    ids = lm.encode_prompt([{"role": "user", "content": "ab"}])
    user = lm.encode_text("user")
    assert ids == (0, *user, *lm.encode_text("ab"), 1, 0)
    ids = lm.encode_prompt([{"role": "user", "content": "a</s><s>b"}])
    assert ids == (0, *user, *lm.encode_text("a</s><s>b"), 1, 0)


@pytest.mark.parametrize("content", ["{{ m['content'] | trim }}", "{{ m['content'] }}"])
def test_a_chat_template_may_trim_and_repeat(content: str) -> None:
    lm = tiny_lm(["a", "b", "<", "/", "s", ">", " "])
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<s>" + 2 * content + "{% endfor %}"
    lm = LM.from_parts(lm.model, tokenizer, "chat")
    said = " a</s> "
    kept = said.strip() if "trim" in content else said
    ids = lm.encode_prompt([{"role": "user", "content": said}])
    assert ids == (0, *lm.encode_text(kept), *lm.encode_text(kept))


def test_a_chat_template_that_changes_a_message_with_a_special_token() -> None:
    lm = tiny_lm(["a", "b", "<", "/", "s", ">", "A", "S"])
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] | upper }}{% endfor %}"
    lm = LM.from_parts(lm.model, tokenizer, "chat")
    assert lm.encode_prompt([{"role": "user", "content": "a"}]) == (0, *lm.encode_text("A"))
    with pytest.raises(ValueError, match="'a</s>' spells a special token, and the chat template"):
        lm.encode_prompt([{"role": "user", "content": "a</s>"}])


@pytest.mark.parametrize("trim", ["", " | trim"])
def test_an_assistants_message_at_the_end_goes_on(trim: str) -> None:
    lm = tiny_lm(["a", "b", "<", "/", "s", ">", " "])
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['content']TRIM }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    ).replace("TRIM", trim)
    lm = LM.from_parts(lm.model, tokenizer, "chat")

    def after(answer: str) -> tuple[int, ...]:
        chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": answer}]
        return lm.encode_prompt(chat)

    asked = (0, *lm.encode_text("ab"), 1, 0)
    assert after("ba") == (*asked, *lm.encode_text("ba"))
    assert after("") == asked
    assert after("b</s> ") == (*asked, *lm.encode_text("b</s>" if trim else "b</s> "))


def test_a_word_glued_to_an_assistants_message_is_seen() -> None:
    lm = tiny_lm(["a", "b"])
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    lm = LM.from_parts(lm.model, tokenizer, "chat")
    with pytest.warns(lp.JoinWarning, match="right after 'ba'"):
        chat = [{"role": "assistant", "content": "ba"}]
        lp.LMString(lm, chat, max_tokens=2).log_prob("ab")


def test_an_assistants_message_that_the_template_changes_cannot_go_on() -> None:
    lm = tiny_lm(["a", "A"])
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] | upper }}{% endfor %}"
    lm = LM.from_parts(lm.model, tokenizer, "chat")
    with pytest.raises(ValueError, match=r"changes the assistant's message 'a'.*end the chat with"):
        lm.encode_prompt([{"role": "assistant", "content": "a"}])


def test_a_chat_that_the_template_refuses_is_named() -> None:
    lm = tiny_lm(["a", "b"])
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    )
    lm = LM.from_parts(lm.model, tokenizer, "chat")
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError, match="template refuses the chat: System role not supported"):
        lm.encode_prompt(chat)
    assert lm.encode_prompt(chat[1:]) == (0, *lm.encode_text("b"))


def test_single_letters_among_the_special_tokens_spell_nothing() -> None:
    lm = tiny_lm(["a", "b", "A", "B"])
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unused>", "b"]})
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] | upper }}{% endfor %}"
    lm = LM.from_parts(lm.model, tokenizer, "chat")
    assert lm.encode_prompt([{"role": "user", "content": "ab"}]) == (0, *lm.encode_text("AB"))


def test_a_misspelt_role_is_an_error() -> None:
    lm = tiny_lm(["a", "b"])
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] in ('tool', \"critic\") %}<s>{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    lm = LM.from_parts(lm.model, tokenizer, "chat")
    message = "has the role 'usr'.*roles are: system, user, assistant, tool$"
    with pytest.raises(ValueError, match=message):
        lm.encode_prompt([{"role": "usr", "content": "a"}])
    for role in ("tool", "critic"):
        assert lm.encode_prompt([{"role": role, "content": "a"}]) == (0, *lm.encode_text("a"))


def chatty(added: Any = ()) -> LM:
    """A tiny LM whose template puts tokens around each message and names a role of its own."""
    lm = tiny_lm([*"abceghilmopru<>|_/ts "])
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>' }}{% if m.role == 'critic' %}{{ '<call>' }}{% endif %}"
        "{{ m.role }} {{ m.name }}{{ m['content'] }}{{ '</s>' }}{% endfor %}"
    )
    model = copy.deepcopy(lm.model)
    model.resize_token_embeddings(len(tokenizer))
    return LM.from_parts(model, tokenizer, "chat")


def test_a_role_is_no_token_of_the_template() -> None:
    lm = chatty()
    assert lm.encode_prompt([{"role": "critic", "content": "a"}])[0] == 0
    for role in ("</s>", "<s>", "critic</s>", "<call>", "messages %}{{ "):
        with pytest.raises(ValueError, match="role"):
            lm.encode_prompt([{"role": role, "content": "a"}])
    with pytest.raises(ValueError, match=r"a message's role spells the special token '</s>'"):
        lm.encode_prompt([{"role": "</s>", "content": "a"}])
    with pytest.raises(
        ValueError, match=r"a message's name spells the special token '</s>': 'a</s"
    ):
        lm.encode_prompt([{"role": "user", "content": "a", "name": "a</s>b"}])
    with pytest.raises(ValueError, match=r"a message's calls spells the special token '</s>'"):
        lm.encode_prompt([{"role": "user", "content": "a", "calls": [{"a": "</s>"}]}])


def test_a_surrogate_in_a_chat_is_named() -> None:
    for chat in ({"content": "a\ud800"}, {"content": "a", "name": "\ud800"}):
        with pytest.raises(
            ValueError, match=r"a message's \w+ must be valid Unicode, .*'a?.ud800'"
        ):
            chatty().encode_prompt([{"role": "user", **chat}])


def test_tokens_of_the_template_that_are_not_special_warn() -> None:
    lm = chatty([AddedToken("<call>", special=False, normalized=False), AddedToken("   ")])
    assert not any(
        t.special for t in lm.tokenizer.added_tokens_decoder.values() if t.content == "   "
    )
    with pytest.warns(
        PromptWarning, match=r"role 'user' spells '<call>'.*not as plain text"
    ) as seen:
        lm.encode_prompt([{"role": "user", "content": "a<call>"}])
    assert len(seen) == 1
    # A run of spaces is text, and so is what the assistant is given to go on from.
    lm.encode_prompt(
        [{"role": "user", "content": "a   b"}, {"role": "assistant", "content": "<call>"}]
    )


def test_token_budget_must_be_positive() -> None:
    lm = tiny_lm()
    with pytest.raises(ValueError, match="token_budget must be at least 1"):
        LM.from_parts(lm.model, lm.tokenizer, "x", token_budget=0)


def test_adapters_that_peft_added_by_itself_are_switched_off_too() -> None:
    lm = tiny_lm(seed=1)
    base = lm.model(input_ids=IDS).logits
    own = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    lm.add_adapter("own", own)
    with lm.adapter("own"):
        assert not torch.equal(lm.model(input_ids=IDS).logits, base)
    other = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(other, lm.model, adapter_name="other")
    lm.model.eval()
    with lm.adapter(None):
        torch.testing.assert_close(lm.model(input_ids=IDS).logits, base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa' rewrites the LM's own weights"),
        ({"init_lora_weights": "olora"}, "'olora' rewrites the LM's own weights"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "'new' is on the LM's embeddings"),
    ],
)
def test_an_adapter_that_changes_more_than_the_layers_leaves_nothing(
    options: dict[str, Any], message: str
) -> None:
    lm = tiny_lm("ab.", seed=1)
    string = lp.LMString(lm, "a", max_tokens=3)
    before, weights = string.log_prob("ab"), lm.weights_fingerprint
    config = LoraConfig(**{"r": 2, "target_modules": "all-linear", **options})
    with pytest.raises(ValueError, match=message):
        lm.add_adapter("new", config)
    lm.memo.clear()
    assert string.log_prob("ab") == before and lm.weights_fingerprint == weights
    for name in ("new", "0"):  # layers are numbered too
        ours = lm.add_adapter(name, LoraConfig(r=2, target_modules="all-linear"))
        assert len(ours) == 28
    with pytest.raises(ValueError, match="one without dots"):
        lm.add_adapter("a.b", LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(KeyError, match="has no adapter 'zz'; it has: 0, new"):
        lm.remove_adapter("zz")


def test_a_token_that_the_lm_has_no_embedding_of() -> None:
    base = tiny_lm("ab.", seed=1)
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.add_tokens(["Q"])
    lm = lp.LM.from_parts(base.model, tokenizer, "short")
    assert lp.LMString(lm, "a", max_tokens=3).log_prob("aQ") == -math.inf
    with pytest.raises(ValueError, match=r"of the prompt 'Qa', and LM\('short'\) has embeddings"):
        lp.LMString(lm, "Qa", max_tokens=3).log_prob("a")


def test_a_string_that_does_not_end_within_what_is_read_after_a_context() -> None:
    lm = tiny_lm("ab.", seed=1)
    lm.window = 12
    string = lp.LMString(lm, "a", stop="...")
    read = lm.encode_prompt("abababab")
    found, ended = [], 0
    for i in range(200):
        try:
            found.append(string.draw(("draw", i), prompt=read)[0])
        except ValueError as error:
            assert "did not end within the 4 tokens" in str(error)
            ended += 1
    assert ended and found and all(len(z.ids or ()) <= 4 for z in found)


def test_rules_that_come_and_go_are_forgotten() -> None:
    lm = tiny_lm("ab.", seed=1)
    first = lp.LMString(lm, "a", max_tokens=3)
    expected = first.log_prob("ab")
    for i in range(300):
        lp.LMString(lm, "a", max_tokens=4 + i // 2, min_tokens=i % 2).log_prob("a.")
    assert len(lm._rules) <= 256
    assert first.log_prob("ab") == expected


def test_models_that_are_no_causal_lms_with_attention() -> None:
    from transformers import (
        Lfm2Config,
        Lfm2ForCausalLM,
        MambaConfig,
        MambaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    known = tiny_lm("ab.", seed=1)
    size = known.vocabulary.size
    recurrent = MambaForCausalLM(
        MambaConfig(vocab_size=size, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(
        ValueError, match=r"'m' .MambaForCausalLM. has layers that keep more, or else"
    ):
        LM.from_parts(recurrent, known.tokenizer, "m")
    mixed = Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
        )
    )
    with pytest.raises(
        ValueError, match=r"'l' .Lfm2ForCausalLM. has layers that keep more, or else"
    ):
        LM.from_parts(mixed, known.tokenizer, "l")
    encoder = T5ForConditionalGeneration(
        T5Config(vocab_size=size, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    with pytest.raises(ValueError, match=r"'t' .T5ForConditionalGeneration. has an encoder"):
        LM.from_parts(encoder, known.tokenizer, "t")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("kind", ["model", "layers", "merged"])
def test_an_adapter_that_is_on_the_model_already_is_no_part_of_it(kind: str) -> None:
    own = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    base = tiny_lm("ab.", seed=1)
    plain = logits(base)
    given: Any = copy.deepcopy(base.model)
    if kind == "layers":
        inject_adapter_in_model(own, given)
    else:
        given = get_peft_model(given, own)
    if kind == "merged":
        lm = LM.from_parts(given.merge_and_unload(), base.tokenizer, "tuned")
        assert not torch.allclose(logits(lm), plain)
        return
    with pytest.raises(ValueError, match=r"'tuned' .*has a PEFT adapter on it.*merge_and_unload"):
        LM.from_parts(given, base.tokenizer, "tuned")


def test_another_lm_is_made_of_the_model_of_an_lm_with_adapters() -> None:
    lm = adapted()
    again = LM.from_parts(copy.deepcopy(lm.model), lm.tokenizer, "again")
    with lm.adapter("guide"), again.adapter("guide"):
        torch.testing.assert_close(logits(again), logits(lm))


def test_models_and_tokenizers_that_are_no_lms_are_named() -> None:
    lm = tiny_lm("ab.", seed=1)
    with pytest.raises(ValueError, match=r"'body' .LlamaModel. has no output embeddings"):
        LM.from_parts(lm.model.model, lm.tokenizer, "body")
    with pytest.raises(ValueError, match=r"'mute' .LlamaForCausalLM. needs its tokenizer"):
        LM.from_parts(lm.model, None, "mute")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("how", ["use_cache", "checkpointing"])
def test_a_model_that_was_trained_without_a_cache_is_taken(how: str) -> None:
    lm = tiny_lm("ab.", seed=1)
    expected = float(lp.LMString(lm, "a", max_tokens=3).log_prob("ab"))
    model = copy.deepcopy(lm.model)
    if how == "use_cache":
        model.config.use_cache = False
    else:
        model.train().gradient_checkpointing_enable()
    own = LM.from_parts(model, lm.tokenizer, "tuned")
    assert lp.LMString(own, "a", max_tokens=3).log_prob("ab") == pytest.approx(expected, abs=1e-5)


def test_a_model_that_gives_no_cache_is_named() -> None:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    lm = tiny_lm("ab.", seed=1)
    config = OpenAIGPTConfig(vocab_size=lm.vocabulary.size, n_embd=16, n_head=2, n_layer=1)
    with pytest.raises(ValueError, match=r"'old' .OpenAIGPTLMHeadModel. gives no KV cache"):
        LM.from_parts(OpenAIGPTLMHeadModel(config), lm.tokenizer, "old")
