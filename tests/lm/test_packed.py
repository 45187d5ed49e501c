"""Packed scores equal padded ones, with gradients, for several architectures."""

import contextlib
import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

import langppl as lp
from langppl.lm import attention, kept, packed
from langppl.lm.decoding import draw
from langppl.lm.requests import DrawRequest, ScoreRequest
from langppl.lm.rules import StringRules
from langppl.lm.scoring import score, score_with_gradients
from langppl.testing import tiny_lm


def small(seed):
    return tiny_lm(["a", "b", ".", " "], seed=seed, merged=["ab", "b.", ".a"])


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
}


def other(family, **changes):
    """A tiny LM of another architecture, with the tokenizer of `tiny_lm`."""
    import transformers

    base = small(3)
    config_class = getattr(transformers, f"{family}Config")
    sizes = {**SIZES, "vocab_size": base.vocabulary.size, **changes}
    if family == "GPT2":
        sizes = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 96,
            "vocab_size": base.vocabulary.size,
            "initializer_range": 0.2,
        }
    if family in ("GPTNeoX",):
        sizes.pop("num_key_value_heads")
    if family == "GPTNeo":
        sizes = {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": base.vocabulary.size,
            "initializer_range": 0.2,
        }
    if family == "GPTJ":
        sizes = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 96,
            "rotary_dim": 4,
            "vocab_size": base.vocabulary.size,
            "initializer_range": 0.2,
        }
    config = config_class(**sizes, eos_token_id=base.model.config.eos_token_id, bos_token_id=None)
    torch.manual_seed(0)
    name = f"{family.removesuffix('Text')}ForCausalLM"
    if family == "GPT2":
        name = "GPT2LMHeadModel"
    model = getattr(transformers, name)(config)
    return lp.LM.from_parts(model, base.tokenizer, family)


FAMILIES = {
    "Llama": {},
    "GPT2": {},
    "GPTNeoX": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"head_dim": 8, "sliding_window": None},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 64},
}


def requests(lm, texts, rules=None, adapter=None):
    bound = lm.bind(rules or StringRules(max_tokens=24, stop=(".",), min_tokens=0))
    found = []
    for prompt, text in texts:
        ids = lm.encode_text(text)
        path = bound.parse(ids, text.encode(), 24)
        found.append(ScoreRequest(lm, lm.encode_prompt(prompt), path, 1.0, adapter))
    return found


def without_packing(lm, ask, wanted):
    packs, lm.packs = lm.packs, None
    try:
        return ask(wanted)
    finally:
        lm.packs = packs


def assert_equal(found, expected, atol):
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f.tokens, e.tokens, atol=atol)
        np.testing.assert_allclose(f.ending, e.ending, atol=atol)
        np.testing.assert_allclose(f.canonical, e.canonical, atol=atol)


MANY = [
    (prompt, text)
    for prompt in ["", "ab", "aab a", "bb bb bb bb bb bb"]
    for text in ["", "a", "ab", "abba", "ab a.", "b", "bab b", "."]
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [512, 24, 3])
@pytest.mark.parametrize("in_blocks", [True, False])
def test_packed_scores_are_the_padded_ones(family, budget, in_blocks, monkeypatch):
    monkeypatch.setattr("langppl.lm.attention.BLOCK", 16)
    lm = other(family, **FAMILIES[family])
    assert lm.packs is not None and lm.packs.in_blocks and lm.splits_head
    lm.packs = replace(lm.packs, in_blocks=in_blocks)
    lm.node_budget = budget
    wanted = requests(lm, MANY)
    assert_equal(score(wanted), without_packing(lm, score, wanted), 2e-5)


@pytest.mark.parametrize("budget", [512, 24, 3])
def test_gpt_j_has_its_mask_added_to_the_scores(budget):
    lm = other("GPTJ")
    assert lm.packs is not None and lm.packs.is_added and not lm.packs.in_blocks and lm.splits_head
    with torch.no_grad():
        lm.model.lm_head.bias.normal_()
    lm.node_budget = budget
    wanted = requests(lm, MANY)
    assert_equal(score(wanted), without_packing(lm, score, wanted), 2e-5)
    parameters = lm.add_adapter("a", LoraConfig(r=2, target_modules=["q_proj", "fc_out"]))
    adapted = requests(lm, MANY[:6], adapter="a")

    def gradients(found):
        return torch.autograd.grad(sum(f.total for f in found), parameters)

    packed = gradients(score_with_gradients(adapted))
    padded = gradients(without_packing(lm, score_with_gradients, adapted))
    assert any(float(p.abs().max()) > 0.1 for p in padded)
    for p, q in zip(packed, padded, strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


LONG = [("ab ab ab ab ab ab ab ab", "ab a."), ("ab ab ab ab ab ab ab ab", "b"), ("a", "ab")]


def longest(wanted):
    return max(len(r.prompt) + len(r.path.tokens) for r in wanted)


@pytest.mark.parametrize("family", ["Mistral", "Gemma3Text", "Qwen3"])
@pytest.mark.parametrize("budget", [512, 3])
def test_a_sliding_window_is_applied_by_depth(family, budget):
    changes = {"use_sliding_window": True, "max_window_layers": 1} if family == "Qwen3" else {}
    lm = other(family, head_dim=8, sliding_window=6, **changes)
    assert lm.packs is not None and lm.packs.in_blocks and lm.packs.window == float("inf")
    lm.node_budget = budget
    wanted = requests(lm, LONG)
    assert longest(wanted) > 16
    truth = without_packing(lm, score, wanted)
    assert_equal(score(wanted), truth, 2e-5)
    wide = other(family, head_dim=8, sliding_window=64, **changes)
    assert abs(score(requests(wide, LONG))[0].log_prob - truth[0].log_prob) > 1e-3


@pytest.mark.parametrize("family", ["Mistral", "Gemma3Text"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_stem_beyond_a_sliding_window_serves_many_rows(family, gradients):
    """The LM's own cache would have dropped the stem's first tokens."""
    lm = other(family, head_dim=8, sliding_window=6)
    prompt = "ab a. " * 5
    texts = ["".join(p) + "." for p in itertools.product("ab ", repeat=3)]
    wanted = requests(lm, [(prompt, text) for text in texts])
    truth = without_packing(lm, score, wanted)
    lm.node_budget = 24
    with torch.set_grad_enabled(gradients):
        assert_equal(score(wanted), truth, 2e-5)


def test_a_mask_by_the_place_in_a_row_is_found_out():
    """GPT-Neo's is not met by the probe's short strings."""
    with pytest.warns(UserWarning, match="it masks by the place in a row"):
        lm = other("GPTNeo")
    assert lm.packs is None


def test_strings_beyond_a_chunk_go_by_padded_batches():
    lm = other(
        "Llama4Text",
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=16,
        no_rope_layers=[1, 1],
        moe_layers=[],
        layer_types=["chunked_attention"] * 2,
    )
    assert lm.packs is None or lm.packs.window == 16
    wanted = requests(lm, LONG)
    assert longest(wanted) > 16
    assert_equal(score(wanted), without_packing(lm, score, wanted), 2e-5)


def test_where_rope_changes_with_length_an_lm_reads_as_far_as_it_does_not():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 24,
    }
    lm = other("Phi3", rope_parameters=rope, original_max_position_embeddings=24, pad_token_id=None)
    assert lm.window == 24
    with pytest.raises(ValueError, match="reads at most 24; shorten the prompt or max_tokens"):
        lp.LMString(lm, "a" * 20, max_tokens=8).log_prob("ab")


def test_under_a_dense_mask_strings_beyond_a_sliding_window_go_by_padded_batches(monkeypatch):
    monkeypatch.setattr("langppl.lm.attention.in_blocks", without_blocks)
    lm = other("Mistral", head_dim=8, sliding_window=16)
    assert lm.packs is not None and not lm.packs.in_blocks and lm.packs.window == 16
    wanted = requests(lm, LONG)
    assert longest(wanted) > 16
    truth = without_packing(lm, score, wanted)
    assert_equal(score(wanted), truth, 2e-5)
    # Packed all the same, the long string would be read past its window.
    lm.packs = replace(lm.packs, window=float("inf"))
    wrong = score(wanted)
    assert abs(wrong[0].log_prob - truth[0].log_prob) > 1e-3
    assert wrong[2].log_prob == pytest.approx(truth[2].log_prob, abs=2e-5)


def without_blocks(model, blocks):
    """An architecture that does not ask transformers for its attention function."""
    return contextlib.nullcontext()


def test_an_architecture_that_ignores_the_mask_is_found_out(monkeypatch):
    lm = small(1)
    base = type(lm.model.base_model)
    plain = base.forward

    def forward(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = None
        return plain(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr("langppl.lm.attention.in_blocks", without_blocks)
    monkeypatch.setattr(base, "forward", forward)
    with pytest.warns(UserWarning, match="does not take a tree attention mask"):
        found = lp.LM.from_parts(lm.model, lm.tokenizer, "deaf")
    assert found.packs is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(requests(found, MANY[:4]))


@pytest.mark.filterwarnings("ignore:.*does not take a tree attention mask")
def test_an_lm_that_reads_otherwise_in_a_padded_batch_is_refused():
    """RoBERTa counts positions by itself, from behind the padding's id."""
    with pytest.raises(ValueError, match=r"LM.'Roberta'. .RobertaForCausalLM. reads a text in a p"):
        other("Roberta", is_decoder=True, pad_token_id=1)


@pytest.mark.filterwarnings("ignore:.*does not take a tree attention mask")
def test_an_lm_that_looks_at_what_follows_is_refused(monkeypatch):
    lm = small(1)
    base = type(lm.model.base_model)
    plain = base.forward

    def forward(self, *args, **kwargs):
        found = plain(self, *args, **kwargs)
        found.last_hidden_state = found.last_hidden_state + found.last_hidden_state[:, -1:]
        return found

    monkeypatch.setattr(base, "forward", forward)
    with pytest.raises(ValueError, match=r"LM.'ahead'. .* reads a token otherwise when others fol"):
        lp.LM.from_parts(lm.model, lm.tokenizer, "ahead")


@pytest.mark.filterwarnings("ignore:.*does not take a tree attention mask")
def test_layers_may_share_keys_and_values():
    lm = other(
        "Gemma3nText",
        head_dim=8,
        sliding_window=8,
        vocab_size_per_layer_input=small(3).vocabulary.size,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=4,
        num_hidden_layers=4,
    )
    assert lm.packs is None
    wanted = requests(lm, MANY[:4])
    for request, reply in zip(wanted, score(wanted), strict=True):
        ids, start = [*request.prompt, *request.path.tokens], len(request.prompt)
        rows = lm.model(input_ids=torch.tensor([ids])).logits[0, start - 1 :].detach()
        for step, token, row, own in zip(
            request.path.steps, request.path.tokens, rows, reply.tokens, strict=False
        ):
            allowed = row.masked_fill(~step.legal_on(row.device), -torch.inf).log_softmax(-1)
            assert float(own) == pytest.approx(float(allowed[token]), abs=2e-5)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.filterwarnings("ignore:.*does not take a tree attention mask")
def test_weights_that_are_no_numbers_are_named(packs, monkeypatch):
    lm = small(1)
    lm.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    if not packs:
        monkeypatch.setattr("langppl.lm.model.probe", lambda lm: None)
    with pytest.raises(ValueError, match=r"LM.'nan'. .* logits that are not finite"):
        lp.LM.from_parts(lm.model, lm.tokenizer, "nan")


def test_a_head_that_does_more_than_multiply_is_not_split_off():
    lm = other("Gemma3Text", head_dim=8, sliding_window=64, final_logit_softcapping=5.0)
    assert not lm.splits_head and lm.packs is not None and lm.packs.in_blocks
    parameters = lm.add_adapter("a", LoraConfig(r=2, target_modules="all-linear"))
    wanted = requests(lm, MANY)
    assert_equal(score(wanted), without_packing(lm, score, wanted), 2e-5)
    ids = torch.tensor([[*wanted[3].prompt, *wanted[3].path.tokens]])
    logits = lm.model(input_ids=ids).logits[0, len(wanted[3].prompt) - 1 :]
    assert float(logits.abs().max()) <= 5.0
    step = wanted[3].path.steps[0]
    expected = logits[0].masked_fill(~step.legal_on(logits.device), -torch.inf).log_softmax(-1)
    assert score(wanted)[3].tokens[0] == pytest.approx(
        float(expected[wanted[3].path.tokens[0]]), abs=2e-5
    )
    adapted = requests(lm, MANY[:6], adapter="a")
    sum(f.total for f in score_with_gradients(adapted)).backward()
    assert any(float(p.grad.abs().max()) > 0 for p in parameters)


words = st.text(alphabet="ab. ", max_size=10)


@given(
    st.lists(st.tuples(words, words), min_size=1, max_size=12),
    st.sampled_from([3, 16, 512]),
    st.sampled_from([1, 5, 64]),
)
@settings(max_examples=500, deadline=None)
def test_any_texts_score_alike_packed_and_padded(texts, budget, block):
    lm = LM
    lm.node_budget = budget
    attention.BLOCK = block
    bound = lm.bind(StringRules())
    wanted = [
        ScoreRequest(lm, lm.encode_prompt(p), bound.parse(lm.encode_text(t), t.encode(), None))
        for p, t in texts
    ]
    try:
        assert_equal(score(wanted), without_packing(lm, score, wanted), 2e-5)
    finally:
        attention.BLOCK = 64


LM = small(2)


@pytest.mark.parametrize("budget", [512, 24, 3])
@pytest.mark.parametrize("target", ["all-linear", ["lm_head", "q_proj"]])
def test_gradients_are_the_padded_ones(budget, target):
    lm = small(4)
    config = LoraConfig(r=4, target_modules=target, init_lora_weights=False)
    parameters = lm.add_adapter("a", config)
    lm.node_budget = budget
    wanted = requests(lm, MANY, adapter="a")

    def gradients(found):
        loss = sum(f.total**2 + f.canonical[torch.isfinite(f.canonical)].sum() for f in found)
        return [g.clone() for g in torch.autograd.grad(loss, parameters)]

    packed = gradients(score_with_gradients(wanted))
    padded = gradients(without_packing(lm, score_with_gradients, wanted))
    size = max(float(g.abs().max()) for g in padded)
    assert size > 1.0
    for p, q in zip(packed, padded, strict=True):
        torch.testing.assert_close(p, q, atol=2e-5 * size, rtol=1e-4)


def passes_of(lm, wanted):
    """What happens, in turn: passes of the LM (tokens), and gradients that have gone through."""
    events = []

    def ran(layer, inputs, outputs):
        events.append(("pass", outputs.shape[1]))
        if outputs.requires_grad:
            # Of the first layer's states: nothing of the pass but that layer is left to do.
            outputs.register_hook(lambda g: events.append(("through", g.shape[1])))

    hook = lm.model.base_model.layers[0].register_forward_hook(ran)
    sum(f.total for f in score_with_gradients(wanted)).backward()
    hook.remove()
    return events


def test_all_rows_but_the_last_are_run_again_each_after_the_one_before_has_gone():
    lm = small(4)
    lm.add_adapter("a", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    start = "bb bb bb bb bb bb"
    texts = ["aaaa", "aba", "aab", "baba", "bbb", "a a a"]
    wanted = requests(lm, [(start, t) for t in texts], adapter="a")
    stem = len(wanted[0].prompt) - 1
    lm.gradient_node_budget = 8  # far fewer than the start has
    assert stem > 8
    (_, first), *rest = passes_of(lm, wanted)
    rows = [size for _, size in itertools.takewhile(lambda e: e[0] == "pass", rest)]
    assert first == stem and len(rows) == 4 and max(rows) <= 8
    again = [(kind, size) for size in rows[-2::-1] for kind in ("pass", "through")]
    expected = [("pass", size) for size in rows]
    assert rest == [*expected, ("through", rows[-1]), *again, ("through", stem)]


def test_rows_with_gradients_have_a_budget_of_their_own_within_that_of_all():
    lm = small(4)
    lm.add_adapter("a", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert (lm.gradient_node_budget, lm.node_budget) == (1024, 1024)
    wanted = requests(lm, MANY, adapter="a")

    def most(events):
        return max(size for kind, size in events if kind == "pass")

    whole = most(passes_of(lm, wanted))
    lm.gradient_node_budget = 40
    assert 24 < most(passes_of(lm, wanted)) <= 40 < whole
    lm.node_budget = 24
    assert most(passes_of(lm, wanted)) <= 24


@pytest.mark.parametrize("budget", [24, 8])
def test_gradients_do_not_depend_on_the_rows(budget):
    lm = small(4)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    parameters = lm.add_adapter("a", config)
    wanted = requests(lm, [*MANY, *LONG], adapter="a")

    def gradients():
        return torch.autograd.grad(
            sum(f.total**2 for f in score_with_gradients(wanted)), parameters
        )

    whole = gradients()
    lm.gradient_node_budget = budget
    size = max(float(g.abs().max()) for g in whole)
    for p, q in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(p, q, atol=2e-5 * size, rtol=1e-4)


def distinct(wanted):
    """Prefixes of all strings, as far as they are read."""
    read = [(*r.prompt, *r.path.tokens)[: len(r.prompt) - 1 + len(r.path.steps)] for r in wanted]
    return {ids[:n] for ids in read for n in range(1, len(ids) + 1)}


FAR = small(2)
FAR.add_adapter("a", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("budget", [64, 30])
def test_long_prompts_are_run_once_whatever_the_budget(budget, in_blocks, monkeypatch):
    starts = ["ab. b a" * 10, "ab. b a" * 10 + "b", "bb a." * 13]
    ends = ["ab", "aa", "b.", "ba b", ""]
    wanted = requests(FAR, [(s, e) for s in starts for e in ends], adapter="a")
    monkeypatch.setattr(FAR, "packs", replace(FAR.packs, in_blocks=in_blocks))
    parameters = [p for n, p in FAR.model.named_parameters() if ".a." in n]

    def found():
        scores = score(wanted)
        read = FAR.tally.copy()
        results = score_with_gradients(wanted)
        forward = FAR.tally - read
        grads = torch.autograd.grad(sum(f.total**2 for f in results), parameters)
        return scores, grads, forward.scored, (FAR.tally - read).scored

    scores, grads, _, _ = found()
    monkeypatch.setattr(FAR, "node_budget", budget)
    before = FAR.tally.copy()
    own, own_grads, forward, whole = found()
    assert forward == len(distinct(wanted)) > 100
    # Rows but the last are run again.
    assert len(distinct(wanted)) < whole - forward + budget + 1 <= len(distinct(wanted)) + budget
    assert (FAR.tally - before).scored == forward + whole
    assert_equal(own, scores, 2e-5)
    size = max(float(g.abs().max()) for g in grads)
    for p, q in zip(own_grads, grads, strict=True):
        torch.testing.assert_close(p, q, atol=2e-5 * size, rtol=1e-4)


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.text("ab", max_size=3), st.integers(0, 9)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 40),
    st.sampled_from([3, 64]),
)
@settings(max_examples=120, deadline=None)
def test_states_of_rows_that_go_on_are_those_of_one_row(asked, budget, block):
    base = LM.encode_text("ab.b a ba. bb" * 3)
    sequences = [(*base[:cut], *LM.encode_text(end)) or base[:1] for cut, end, _ in asked]
    first = [min(at, len(s) - 1) for (_, _, at), s in zip(asked, sequences, strict=True)]
    count = [len(s) - at for s, at in zip(sequences, first, strict=True)]

    def found(grad):
        states = {}
        with torch.set_grad_enabled(grad):
            for rows, wanted in packed.states(LM, sequences, first, count):
                assert not states.keys() & wanted.keys()
                states |= {k: rows[torch.from_numpy(own)] for k, own in wanted.items()}
        return [states[k].detach() for k in range(len(sequences))]

    whole = found(False)
    was, LM.node_budget, attention.BLOCK = LM.node_budget, budget, block
    try:
        for own in (found(False), found(True)):
            for f, w in zip(own, whole, strict=True):
                torch.testing.assert_close(f, w, atol=2e-5, rtol=1e-4)
    finally:
        LM.node_budget, attention.BLOCK = was, 64


def test_an_ending_after_a_long_text_that_no_draw_has_read(monkeypatch):
    lm = small(2)
    rules = lm.bind(StringRules(max_tokens=3))
    begun = lm.encode_prompt("ab")
    wanted = requests(lm, [("ab. b a" * 10, e) for e in ("ab", "aa", "b.", "ba", "bb")])
    expected = score(wanted)
    monkeypatch.setattr(lm, "node_budget", 30)
    with kept.keeping():
        draw([DrawRequest(lm, begun, rules, 3, ("far", k)) for k in range(3)])
        trees = kept.trees_of(lm, None)
        assert trees and len(trees[0].path(wanted[0].prompt)) >= len(begun)
        known = {trees[0].path(r.prompt)[-1] for r in wanted}
        assert len(known) == 1
        before = lm.tally.copy()
        found = score(wanted)
        read = len(trees[0].path(wanted[0].prompt))
        assert (lm.tally - before).scored == len(distinct(wanted)) - read
    assert_equal(found, expected, 2e-5)
