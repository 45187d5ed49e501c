"""Compiled products and layers give torch's numbers, and step aside where they cannot."""

import contextlib
import ctypes
import itertools
import os
import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_lean import FORMS, as_drawn, whole
from test_packed import other, requests

import langppl as lp
from langppl.lm import compiling, native, products
from langppl.lm.decoding import draw
from langppl.lm.scoring import score

has_compiled = pytest.mark.skipif(
    native.library() is None, reason=f"nothing compiled here: {native.reason()}"
)


@contextlib.contextmanager
def every_product_frozen():
    """Within the block, the smallest weights are laid out too."""
    smallest, products.SMALLEST = products.SMALLEST, 1
    try:
        yield
    finally:
        products.SMALLEST = smallest


def compiled(family, **changes):
    with every_product_frozen():
        return other(family, **changes)


LESS = {"AVX2": "-mno-avx512f", "no products of bfloat16": "-mno-avx512bf16"}


def without(instructions):
    """The library without some of the machine's instructions."""
    return native._declared(
        ctypes.CDLL(str(compiling.built((*compiling.OPTIONS, LESS[instructions]))))
    )


@pytest.fixture(params=["own", "AVX2"])
def instructions(request, monkeypatch):
    """The machine's own instructions, and AVX2 alone."""
    if request.param == "AVX2":
        found = without("AVX2")
        assert found.langppl_lanes() == 8
        monkeypatch.setattr(native, "library", lambda: found)


@pytest.fixture(params=["own", *LESS])
def of_bfloat16(request, monkeypatch):
    """Each way in which bfloat16 is multiplied."""
    if request.param in LESS:
        found = without(request.param)
        assert not found.langppl_has_brief()
        monkeypatch.setattr(native, "library", lambda: found)
    return request.param


def layer(inputs, outputs, bias, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@has_compiled
@pytest.mark.parametrize("rows", [1, 2, 7, 12, 13, 24, 25, 255, 256, 257, 600])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 1), (3, 31), (64, 33), (40, 160), (256, 16), (257, 70), (1024, 16)]
)
def test_products_are_those_of_torch(instructions, rows, inputs, outputs):
    plain = layer(inputs, outputs, bias=True)
    laid = native.lay_out(plain.weight)
    x = torch.randn(rows, inputs)
    for bias in (plain.bias, None, 2.0 * plain.bias):
        expected = torch.nn.functional.linear(
            x.double(), plain.weight.double(), None if bias is None else bias.double()
        )
        found = native.multiply(x, laid, bias)
        # What rounding may make of sums over so many terms, 256 at a time.
        terms = min(inputs, 256) + inputs // 256 + 2
        sizes = x.abs() @ plain.weight.abs().T + (0 if bias is None else bias.abs())
        assert bool(((found - expected).abs() <= terms * 2**-24 * sizes).all())


@has_compiled
@pytest.mark.parametrize("rows", [1, 7, 12, 25, 256, 257])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 1), (3, 31), (64, 33), (257, 70), (1024, 16), (600, 65)]
)
def test_products_of_bfloat16(of_bfloat16, rows, inputs, outputs):
    plain = layer(inputs, outputs, bias=True).bfloat16()
    laid = native.lay_out(plain.weight)
    x, ends = torch.randn(rows, inputs), torch.randn(rows, outputs)
    found = native.multiply(x, laid, plain.bias)
    # What is multiplied is rounded; sums are float32's.
    rounded, weight = x.bfloat16().double(), plain.weight.double()
    expected = rounded @ weight.T + plain.bias.double()
    terms = min(inputs, 256) + inputs // 256 + 2
    sizes = rounded.abs() @ weight.abs().T + plain.bias.double().abs()
    assert found.dtype == torch.float32
    assert bool(((found - expected).abs() <= terms * 2**-24 * sizes).all())
    torch.testing.assert_close(native.multiply(x.bfloat16(), laid, plain.bias), found.bfloat16())

    start, of_low = torch.randn(rows, inputs), torch.randn(rows, 5)
    down = torch.randn(5, inputs)
    into = native.multiply_back(ends, plain.weight, of_low, down, start.clone())
    rounded = ends.bfloat16().double()
    expected = start.double() + rounded @ weight + of_low.double() @ down.double()
    sizes = start.abs() + rounded.abs() @ weight.abs() + of_low.abs().double() @ down.abs().double()
    terms = min(outputs, 256) + outputs // 256 + 8
    assert bool(((into - expected).abs() <= terms * 2**-24 * sizes).all())
    found = native.multiply_back(ends, plain.weight)
    assert bool(((found - rounded @ weight).abs() <= terms * 2**-24 * sizes).all())


@has_compiled
def test_numbers_that_bfloat16_rounds(of_bfloat16):
    one = torch.nn.Linear(2, 1, bias=False).bfloat16().requires_grad_(False)
    one.weight.copy_(torch.tensor([[1.0, 0.0]]))
    ulp = 2.0**-7
    x = [1.0, 1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.51 * ulp, -1 - 0.49 * ulp, 1e-20, 3e38, torch.inf]
    given = torch.tensor([[v, 1.0] for v in [*x, torch.nan]])
    found = native.multiply(given, native.lay_out(one.weight), None)[:, 0]
    expected = [1.0, 1.0, 1 + 2 * ulp, 1 + ulp, -1.0, float(torch.tensor(1e-20).bfloat16())]
    assert found[:6].tolist() == expected
    assert found[6:8].tolist() == [float(torch.tensor(3e38).bfloat16()), torch.inf]
    assert found[8].isnan()


@has_compiled
@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(native.DTYPES),
)
def test_a_row_does_not_depend_on_the_others(rows, inputs, outputs, threads, has_bias, dtype):
    plain = layer(inputs, outputs, has_bias).to(dtype)
    laid = native.lay_out(plain.weight)
    x = torch.randn(rows, inputs)
    together = native.multiply(x, laid, plain.bias)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = torch.stack([native.multiply(own, laid, plain.bias) for own in x])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)


@has_compiled
def test_nan_and_infinity_pass_through():
    plain = layer(8, 5, bias=False)
    laid = native.lay_out(plain.weight)
    x = torch.ones(3, 8)
    x[0, 3], x[1, 2] = torch.nan, torch.inf
    found = native.multiply(x, laid, None)
    assert found[0].isnan().all() and found[1].isinf().all()
    torch.testing.assert_close(found[2], plain(x[2]))


@has_compiled
def test_shapes():
    plain = layer(6, 4, bias=True)
    laid = native.lay_out(plain.weight)
    x = torch.randn(2, 5, 12)[..., ::2]  # not in one piece
    torch.testing.assert_close(native.multiply(x, laid, plain.bias), plain(x))
    assert native.multiply(x[:, :0], laid, plain.bias).shape == (2, 0, 4)
    with pytest.raises(RuntimeError, match="6 inputs are needed"):
        native.multiply(torch.ones(2, 5), laid, None)


@has_compiled
@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 70),
    st.sampled_from([(1, 1), (4, 2), (9, 3), (16, 1)]),
    st.sampled_from([16, 32, 64]),
    st.integers(0, 99),
    st.sampled_from(native.DTYPES),
)
def test_attention_is_that_of_torch(rows, keys, heads, width, seed, dtype):
    heads, shared = heads
    generator = torch.Generator().manual_seed(seed)
    queries = 3.0 * torch.randn(heads, rows, width, generator=generator)
    room = torch.randn(2, shared, keys + 3, width, generator=generator).to(dtype)[:, :, :keys]
    seen = torch.rand(rows, keys, generator=generator) < 0.5
    seen[torch.arange(rows), torch.randint(keys, (rows,), generator=generator)] = True
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    starts[1:] = seen.sum(1).cumsum(0)
    places = torch.arange(keys).repeat(rows, 1)[seen]
    assert native.attends(width, heads // shared, keys)
    found = native.attend(queries, room[0], room[1], starts, places, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries.double()[None],
        *(x.double().repeat_interleave(heads // shared, 0)[None] for x in room),
        attn_mask=seen,
        scale=0.3,
    )
    expected = expected[0].transpose(0, 1).reshape(rows, -1)
    # What rounding may make of the scores, and of sums of weighted values.
    own = room[0].float().repeat_interleave(heads // shared, 0).abs()
    of_scores = 2 * 0.3 * (width + 8) * float((queries.abs() @ own.mT).max())
    most = 2**-24 * (of_scores + keys + 16) * float(room[1].abs().max())
    assert float((found - expected).abs().max()) <= most


@has_compiled
@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 64}, {"hidden_size": 40}])
def test_layers_are_those_of_transformers(instructions, family, sizes):
    changes = {**FORMS[family], "head_dim": 16} if sizes else FORMS[family]
    if family == "Qwen2" and sizes:  # its heads divide its width
        changes = FORMS[family]
    lm = compiled(family, **changes, **sizes)
    assert lm.lean is not None
    assert all(lm.lean._layer(k) is not None for k in range(2))
    texts = [("ab .a", "ab ab"), ("ab", "b"), ("ab .", ""), *(("a", "ab" * k) for k in range(12))]
    wanted = requests(lm, texts)
    found = score(wanted)
    lm.memo.clear()
    drawn = draw(as_drawn(lm, [p for p, _ in texts], 3, max_tokens=6))
    with whole(lm):
        expected = score(wanted)
        expected_draws = draw(as_drawn(lm, [p for p, _ in texts], 3, max_tokens=6))
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f.tokens, e.tokens, atol=2e-5)
        np.testing.assert_allclose(f.ending, e.ending, atol=2e-5)
    assert [d.ids for d in drawn] == [d.ids for d in expected_draws]


@has_compiled
def test_more_rows_or_keys_than_compiled_attention_takes(monkeypatch):
    lm = compiled("Llama", head_dim=16, max_position_embeddings=4096)
    long = "ab a b" * 300
    many = map("".join, itertools.product("ab ", repeat=5))
    texts = [(long, "ab"), (long, "b"), *(("a", word) for word in many)]
    wanted = requests(lm, texts)
    used = []
    own = native.attend
    monkeypatch.setattr(native, "attend", lambda *args: used.append(args) or own(*args))
    found = score(wanted[:2])
    assert not used
    found += score(wanted[2:])
    assert not used
    score(requests(lm, [("b", "ab")]))
    assert used
    with whole(lm):
        lm.memo.clear()
        expected = score(wanted)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f.tokens, e.tokens, atol=5e-5)


WORDS = [("b a ab", "aba"), ("ab a", "bb")]


@has_compiled
def test_layers_follow_their_weights_adapters_and_hooks():
    lm = compiled("Llama")
    torch.manual_seed(0)

    def scored(adapter=None):
        lm.memo.clear()
        return score(requests(lm, WORDS, adapter=adapter))[0].tokens

    def expected(adapter=None):
        with whole(lm):
            return scored(adapter)

    before = scored()
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    lm.add_adapter("own", config)
    assert lm.lean._layer(0) is not None
    np.testing.assert_allclose(scored(), before, atol=1e-6)
    np.testing.assert_allclose(scored("own"), expected("own"), atol=1e-5)
    assert np.abs(scored("own") - before).max() > 1e-3
    parts = lm.lean.layers[0]
    for module in (parts.self_attn.q_proj, parts.self_attn.q_proj.base_layer, parts.mlp.up_proj):
        handle = module.register_forward_hook(lambda module, args, out: out + 1.0)
        assert lm.lean._layer(0) is None and lm.lean._layer(1) is not None
        np.testing.assert_allclose(scored(), expected(), atol=1e-5)
        assert np.abs(scored() - before).max() > 1e-3
        handle.remove()
    with torch.no_grad():
        parts.mlp.gate_proj.weight.mul_(2.0)
        parts.self_attn.q_proj.base_layer.weight.data += 0.1
    np.testing.assert_allclose(scored(), expected(), atol=1e-5)
    assert np.abs(scored() - before).max() > 1e-3
    last = scored()
    with torch.no_grad():
        parts.input_layernorm.weight = torch.nn.Parameter(1.5 * parts.input_layernorm.weight)
    np.testing.assert_allclose(scored(), expected(), atol=1e-5)
    assert np.abs(scored() - last).max() > 1e-3


@has_compiled
@pytest.mark.parametrize(
    ("targets", "rank"),
    [("all-linear", 3), (["k_proj", "down_proj"], 40), (["o_proj", "gate_proj"], 1)],
)
def test_adapters_are_those_of_peft(instructions, targets, rank):
    lm = compiled("Llama", head_dim=16, attention_bias=True)
    torch.manual_seed(1)
    for name, scale in (("one", 1.0), ("two", 3.0)):
        config = LoraConfig(
            r=rank, lora_alpha=scale * rank, target_modules=targets, init_lora_weights=False
        )
        lm.add_adapter(name, config)
    texts = [("b a ab", "ab ab"), ("ab a", "b"), *(("a b", "ab" * k) for k in range(12))]
    found = {}
    for adapter in (None, "one", "two"):
        lm.memo.clear()
        wanted = requests(lm, texts, adapter=adapter)
        found[adapter] = score(wanted)
        with lm.adapter(adapter):
            assert all(lm.lean._layer(k) is not None for k in range(2))
        draws = [
            replace(r, adapter=adapter)
            for r in as_drawn(lm, [p for p, _ in texts], 3, max_tokens=6)
        ]
        drawn = draw(draws)
        with whole(lm):
            lm.memo.clear()
            expected = score(wanted)
            assert [d.ids for d in draw(draws)] == [d.ids for d in drawn]
        for f, e in zip(found[adapter], expected, strict=True):
            np.testing.assert_allclose(f.tokens, e.tokens, atol=2e-5)
            np.testing.assert_allclose(f.ending, e.ending, atol=2e-5)
    for one, two in itertools.combinations(found.values(), 2):
        assert np.abs(one[0].tokens - two[0].tokens).max() > 1e-3


@has_compiled
def test_an_adapter_that_is_trained_is_read_anew():
    lm = compiled("Llama", head_dim=16)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    parameters = lm.add_adapter("own", config)
    draws = [replace(r, adapter="own") for r in as_drawn(lm, ["a b"] * 8, 3, max_tokens=6)]
    wanted = requests(lm, WORDS, adapter="own")
    last = None
    for step in range(4):
        found = [d.log_prob for d in draw(draws)], score(wanted)[0].tokens
        with whole(lm):
            lm.memo.clear()
            expected = [d.log_prob for d in draw(draws)], score(wanted)[0].tokens
        for f, e in zip(found, expected, strict=True):
            np.testing.assert_allclose(f, e, atol=5e-5)
        assert last is None or np.abs(found[1] - last).max() > 1e-3
        last = found[1]
        with torch.no_grad():
            for parameter in parameters:  # seen by torch, and not
                (parameter if step % 2 else parameter.data).mul_(1.2)
        lm.memo.clear()
    for module in lm.model.modules():
        scales = getattr(module, "scaling", None)
        if isinstance(scales, dict) and "own" in scales:
            scales["own"] *= 2.0
    changed = score(wanted)[0].tokens
    with whole(lm):
        lm.memo.clear()
        np.testing.assert_allclose(changed, score(wanted)[0].tokens, atol=5e-5)


@has_compiled
@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_adapters_that_are_more_than_two_products_are_left_to_peft(options):
    lm = compiled("Llama", head_dim=16)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
    lm.add_adapter("own", config)
    part = lm.lean.layers[0].self_attn.q_proj
    with lm.adapter("own"):
        part.train("lora_dropout" in options)
        assert lm.lean._layer(0) is None
        part.eval()
        handle = part.lora_B["own"].register_forward_hook(lambda module, args, out: out)
        assert lm.lean._layer(0) is None
        handle.remove()
        assert (lm.lean._layer(0) is None) == ("use_dora" in options)
        part.merge()
        assert lm.lean._layer(0) is None
        part.unmerge()


@has_compiled
def test_other_activations_and_float_types_are_left_to_torch():
    lm = compiled("Llama", hidden_act="gelu")
    assert lm.lean is not None and lm.lean._layer(0) is None
    lm = compiled("Llama")
    lm.lean.layers[1].post_attention_layernorm.double()
    assert lm.lean._layer(0) is not None and lm.lean._layer(1) is None
    lm = compiled("Llama")
    lm.lean.layers[0].input_layernorm.bfloat16()
    assert lm.lean._layer(0) is None and lm.lean._layer(1) is not None
    with every_product_frozen():
        base = other("Llama")
        halved = lp.LM.from_parts(base.model.half(), base.tokenizer, "half")
    assert halved.lean is None or halved.lean._layer(0) is None
    assert np.isfinite(score(requests(halved, [("ab", "aba")]))[0].tokens).all()


@has_compiled
def test_a_hook_on_the_activation_is_heeded():
    lm = compiled("Llama")
    act = lm.lean.layers[0].mlp.act_fn
    handle = act.register_forward_hook(lambda module, args, out: out + 1.0)
    assert lm.lean._layer(0) is None
    handle.remove()
    assert lm.lean._layer(0) is not None


@has_compiled
def test_under_autocast_scores_are_those_of_whole_layers():
    with every_product_frozen():
        products.SMALLEST = 32 * 40  # not of keys and values
        lm = other("Llama", head_dim=16, num_key_value_heads=2)
    assert lm.lean is not None and lm.lean._layer(0) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = score(requests(lm, WORDS[:1]))
        with whole(lm):
            lm.memo.clear()
            (expected,) = score(requests(lm, WORDS[:1]))
    np.testing.assert_allclose(found.tokens, expected.tokens, atol=0.05)


@has_compiled
def test_other_float_types_are_refused():
    plain = layer(8, 5, bias=True)
    laid = native.lay_out(plain.weight)
    x = torch.ones(2, 8)
    with pytest.raises(TypeError, match="float32"):
        native.multiply(x.bfloat16(), laid, None)
    with pytest.raises(TypeError, match="float32"):
        native.multiply(x, laid, plain.bias.double())
    with pytest.raises(TypeError, match="bfloat16"):
        native.multiply(x, native.lay_out(plain.weight.bfloat16()), plain.bias)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        native.lay_out(plain.weight.half())
    with pytest.raises(TypeError, match="float32"):
        native.multiply_back(torch.ones(2, 5).half(), plain.weight)


def test_the_check_of_a_library_does_not_depend_on_defaults():
    code = (
        "import torch; torch.set_default_dtype(torch.bfloat16); "
        "torch.set_default_device('meta'); from langppl.lm import native; "
        "print(native.reason())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == native.reason()


@has_compiled
def test_what_a_hook_keeps_of_the_embeddings_stays():
    lm = compiled("Llama", head_dim=16)
    embed = lm.model.get_input_embeddings()
    kept = []
    handle = embed.register_forward_hook(lambda module, args, out: kept.append((args[0], out)))
    score(requests(lm, WORDS))
    draw(as_drawn(lm, ["ab", "b a"], 3, max_tokens=6))
    handle.remove()
    assert len(kept) > 3
    for ids, out in kept:
        torch.testing.assert_close(out, embed(ids))


@has_compiled
def test_a_pass_of_many_nodes_and_one_of_few_agree_to_the_last_digit():
    lm = compiled("Llama", head_dim=16)
    words = [("ab", "ab" * k + "a" * j) for k in range(5) for j in range(3)]
    together = score(requests(lm, words))
    for word, own in zip(words, together, strict=True):
        lm.memo.clear()
        (alone,) = score(requests(lm, [word]))
        np.testing.assert_array_equal(alone.tokens, own.tokens)


def loaded(**environment):
    """What another process says of its compiled functions."""
    code = "from langppl.lm import native; print(native.library() is None, native.reason())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if k != "LANGPPL_NATIVE"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="nothing is compiled elsewhere",
)
def test_without_a_compiler_torch_multiplies(tmp_path):
    assert loaded(LANGPPL_NATIVE="0") == "True LANGPPL_NATIVE=0"
    assert loaded(CXX=str(tmp_path / "none")) == "True OSError: no g++ was found"
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && echo 1 && exit\necho no room >&2\nexit 1\n")
    broken.chmod(0o755)
    assert loaded(CXX=str(broken)) == "True the compiler failed: no room"
    assert not list((tmp_path / "cache").rglob("*.so"))


@has_compiled
def test_a_folder_that_others_write_to_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("LANGPPL_CACHE", str(tmp_path))
    folder = tmp_path / "native"
    assert compiling.built(compiling.OPTIONS).parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    before = compiling.built(compiling.OPTIONS).stat().st_mtime_ns
    assert compiling.built(compiling.OPTIONS).stat().st_mtime_ns == before  # compiled once
    folder.chmod(0o777)
    assert compiling.built(compiling.OPTIONS).parent != folder


@has_compiled
def test_a_library_that_others_may_have_written_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("LANGPPL_CACHE", str(tmp_path))
    before = os.umask(0o002)
    try:
        built = compiling.built(compiling.OPTIONS)
    finally:
        os.umask(before)
    assert not built.stat().st_mode & 0o022
    for harm in (lambda: built.chmod(0o777), lambda: built.symlink_to(tmp_path / "evil.so")):
        (tmp_path / "evil.so").write_bytes(b"evil")
        harm()
        assert compiling.built(compiling.OPTIONS) == built
        assert built.read_bytes() != b"evil" and not built.is_symlink()
        assert not built.stat().st_mode & 0o022
        built.unlink()


@has_compiled
def test_a_link_to_a_folder_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("LANGPPL_CACHE", str(tmp_path))
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "native").symlink_to(tmp_path / "elsewhere")
    assert compiling._folder().resolve() != tmp_path / "elsewhere"
