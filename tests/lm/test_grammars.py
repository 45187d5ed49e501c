"""Grammars against Python's own `re` and `json`, and strings under them against a plain forward.

The reference knows a grammar as a finite list of texts, found by trying all short ones, and an LM
as the logits of one forward pass.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections import UserList
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import langppl as lp
from langppl.distributions import Text
from langppl.lm import enumeration, grammars, matcher, rules
from langppl.lm.matcher import Tokenizer, bytes_only, tokenizer_of
from langppl.testing import check_distribution, enumerate_strings, tiny_lm

BEGIN, END = 0, 1
PROMPT = "ab"
LM = tiny_lm("ab.", seed=3, merged=["ab", "b.", ".."])
JSON_LM = tiny_lm("[]1,", seed=5, merged=["[1", "1]"])
SCHEMA = {"type": "array", "items": {"enum": [1, 11]}, "minItems": 1, "maxItems": 2}


def is_list(text: str) -> bool:
    """What SCHEMA says."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(found, list) and 1 <= len(found) <= 2 and all(x in (1, 11) for x in found)


@dataclass(frozen=True)
class Case:
    name: str
    lm: lp.LM
    grammar: lp.Grammar
    holds: Callable[[str], bool]
    alphabet: str
    prompt: str
    max_tokens: int
    longest: int
    """Characters of the longest text that so many tokens spell."""

    @property
    def language(self) -> set[str]:
        texts = ("".join(t) for n in range(self.longest + 1) for t in self.letters(n))
        return {t for t in texts if self.holds(t)}

    def letters(self, n: int) -> Any:
        return itertools.product(self.alphabet, repeat=n)


CASES = [
    Case(
        "regex",
        LM,
        lp.regex(r"(a|ab){1,2}b?\.?"),
        lambda t: re.fullmatch(r"(a|ab){1,2}b?\.?", t) is not None,
        "ab.",
        PROMPT,
        4,
        6,
    ),
    Case("json", JSON_LM, lp.json_schema(SCHEMA), is_list, "[]1,", "1", 4, 7),
]
each = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def next_log_probs(lm: lp.LM, ids: tuple[int, ...]) -> np.ndarray:
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0, -1]
    found: np.ndarray = logits.double().log_softmax(-1).numpy()
    return found


def by_hand(case: Case, masked: bool, truncate: str = "keep") -> dict[tuple[int, ...], Any]:
    """Tokens → (text, probability, is cut) of every string, renormalised step by step."""
    lm, language = case.lm, case.language
    texts = {i: lm.tokenizer.convert_ids_to_tokens(i) for i in range(3, lm.vocabulary.size)}
    beginnings = {t[:k] for t in language for k in range(len(t) + 1)}
    prompt = tuple(lm.tokenizer(case.prompt)["input_ids"])
    found: dict[tuple[int, ...], Any] = {}
    pending: list[tuple[tuple[int, ...], str, float]] = [((), "", 0.0)]
    while pending:
        ids, text, so_far = pending.pop()
        if len(ids) == case.max_tokens:
            found[ids] = (text, math.exp(so_far), True)
            continue
        log_probs = next_log_probs(lm, prompt + ids)
        legal = {i for i, t in texts.items() if not masked or text + t in beginnings}
        if ids and (not masked or text in language):
            legal.add(END)
        total = math.log(sum(math.exp(log_probs[i]) for i in legal))
        for i in legal:
            here = so_far + log_probs[i] - total
            if i == END:
                found[ids] = (text, math.exp(here), False)
            else:
                pending.append(((*ids, i), text + texts[i], here))
    return found


# -- the two meanings --------------------------------------------------------------------------


@each
def test_a_masked_string_is_renormalised_at_each_token(case: Case) -> None:
    dist = lp.LMString(case.lm, case.prompt, max_tokens=case.max_tokens, grammar=case.grammar)
    expected = by_hand(case, masked=True)
    found = {t.ids: (t, cut) for t, cut in enumerate_strings(dist)}
    assert {k: (str(t), cut) for k, (t, cut) in found.items()} == {
        k: (text, cut) for k, (text, _, cut) in expected.items()
    }
    assert sum(p for _, p, _ in expected.values()) == pytest.approx(1.0, abs=1e-9)
    for ids, (text, probability, cut) in expected.items():
        value = found[ids][0]
        log_prob = float(dist.log_prob(value))
        if cut:
            assert log_prob == -math.inf
            assert "rejected" in str(dist.why_impossible(value))
        else:
            assert log_prob == pytest.approx(math.log(probability), abs=1e-4)
            assert case.holds(text)


def unmasked(case: Case) -> Callable[[], None]:
    def model() -> None:
        z = lp.sample("z", lp.LMString(case.lm, case.prompt, max_tokens=case.max_tokens))
        lp.factor("form", lp.log_matches(z, case.grammar))

    return model


@each
def test_a_conditioned_string_has_the_unmasked_probabilities(case: Case) -> None:
    whole = by_hand(case, masked=False)
    inside = {k: p for k, (text, p, _) in whole.items() if case.holds(text)}
    evidence = sum(inside.values())
    expected: dict[str, float] = {}
    for ids, p in inside.items():
        text = whole[ids][0]
        expected[text] = expected.get(text, 0.0) + p / evidence
    exact = lp.infer(unmasked(case), method="exact")
    assert exact.log_evidence == pytest.approx(math.log(evidence), abs=1e-4)
    assert exact.probabilities("z") == pytest.approx(
        {**dict.fromkeys(exact.probabilities("z"), 0.0), **expected}, abs=1e-5
    )

    # The masked proposal's evidence is unbiased; the standard errors are exact, by hand too.
    n = 1000
    q = {ids: p for ids, (_, p, _) in by_hand(case, masked=True).items()}
    weight = {ids: inside.get(ids, 0.0) / q[ids] for ids in q}
    error = math.sqrt(sum(q[ids] * (w - evidence) ** 2 for ids, w in weight.items()) / n)
    guide = lp.MaskedGuide({"z": case.grammar})
    drawn = lp.infer(unmasked(case), guide=guide, num_samples=n, progress=False)
    for sample, log_weight in zip(drawn.samples, drawn.log_weights, strict=True):
        assert math.exp(log_weight) == pytest.approx(weight[sample["z"].ids], rel=1e-3)
    assert abs(math.exp(drawn.log_evidence) - evidence) < 3 * error
    for text, p in expected.items():
        terms = (q[i] * (w * ((whole[i][0] == text) - p)) ** 2 for i, w in weight.items() if w)
        spread = math.sqrt(sum(terms) / n) / evidence
        assert abs(drawn.probabilities("z").get(text, 0.0) - p) < 4 * spread
    # It spreads less than the prior's draws, whose weights are 0 or 1.
    assert error < math.sqrt(evidence * (1 - evidence) / n)


def test_the_two_meanings_differ_as_the_docs_say() -> None:
    lm = tiny_lm("ab")
    form = lp.one_of(["a", "bbb"])

    def masked() -> None:
        lp.sample("z", lp.LMString(lm, "a", max_tokens=4, grammar=form))

    def conditioned() -> None:
        z = lp.sample("z", lp.LMString(lm, "a", max_tokens=4))
        lp.factor("form", lp.log_matches(z, form))

    prompt = tuple(lm.tokenizer("a")["input_ids"])
    a, b = 3, 4

    def step(ids: tuple[int, ...], token: int) -> float:
        p = np.exp(next_log_probs(lm, prompt + ids))
        p[[0, 2] if ids else [0, 2, END]] = 0.0
        return float(p[token] / p.sum())

    # Masked, only the first token is a choice, and what follows is forced.
    first = lp.infer(masked, method="exact").probabilities("z")
    assert first == pytest.approx({"a": step((), a), "bbb": step((), b)}, abs=1e-5)
    one = step((), a) * step((a,), END)
    two = step((), b) * step((b,), b) * step((b, b), b) * step((b, b, b), END)
    exact = lp.infer(conditioned, method="exact")
    second = exact.probabilities("z")
    assert second == pytest.approx({"a": one / (one + two), "bbb": two / (one + two)}, abs=1e-5)
    assert math.exp(exact.log_evidence) == pytest.approx(one + two, abs=1e-5)
    # The numbers in docs/strings.md.
    assert {k: round(v, 3) for k, v in first.items()} == {"a": 0.336, "bbb": 0.664}
    assert {k: round(v, 3) for k, v in second.items()} == {"a": 0.992, "bbb": 0.008}
    guide = lp.MaskedGuide({"z": form})
    found = lp.infer(conditioned, guide=guide, num_samples=1000, progress=False)
    assert round(found.log_evidence, 2) == -1.23 and round(exact.log_evidence, 2) == -1.21
    assert round(found.ess) == 333


# -- contracts ---------------------------------------------------------------------------------

SPLIT = tiny_lm("a.", split=["é"], seed=1)
RULES: dict[str, tuple[lp.LM, dict[str, Any]]] = {
    "regex": (LM, {"max_tokens": 4, "grammar": lp.regex(r"a(b|ab)*\.?")}),
    "may be empty": (LM, {"max_tokens": 3, "min_tokens": 0, "grammar": lp.regex("(ab)*")}),
    "stop": (LM, {"max_tokens": 4, "stop": ".", "grammar": lp.regex(r"[ab]*\.")}),
    "stop that the grammar wants longer": (
        LM,
        {"max_tokens": 4, "stop": ["b", ".."], "grammar": lp.regex(r"a+b|\.\.|a\.")},
    ),
    "min": (LM, {"max_tokens": 5, "min_tokens": 3, "stop": "b.", "grammar": lp.regex(r"[ab]+\.?")}),
    "ban and temperature": (
        LM,
        {"max_tokens": 4, "ban": "..", "temperature": 0.7, "grammar": lp.regex(r"(ab|\.)*")},
    ),
    "allow": (LM, {"max_tokens": 4, "allow": ["a", "b"], "grammar": lp.regex(r"(ab)*a?\.?")}),
    "one of": (LM, {"max_tokens": 4, "grammar": lp.one_of(["ab.", "a", "b..b"])}),
    "lark": (LM, {"max_tokens": 6, "grammar": lp.lark('start: "a" start "b" | "."')}),
    "json": (JSON_LM, {"max_tokens": 6, "grammar": lp.json_schema(SCHEMA)}),
    "split bytes": (SPLIT, {"max_tokens": 4, "grammar": lp.regex("é?a*é")}),
    # After the first byte of é only its second could follow, and that one is banned with é.
    "dead ends": (
        tiny_lm("a.", split=["é"]),
        {"max_tokens": 4, "grammar": lp.regex("a*(è|a)"), "min_tokens": 2},
    ),
    "dead ends by a ban": (
        LM,
        {"max_tokens": 4, "ban": lambda t: t == "b", "grammar": lp.one_of(["ab", "abb", "a.b"])},
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_sampler_and_scorer_agree(name: str) -> None:
    lm, options = RULES[name]
    dist = lp.LMString(lm, "a", **options)
    check_distribution(dist, samples=400)
    limit = dist.limit(1)
    assert limit is not None
    assert enumeration.count(dist.bound, limit) == len(list(enumerate_strings(dist)))


def test_dead_ends_occur_and_have_weight_zero() -> None:
    for name in ("dead ends", "dead ends by a ban"):
        lm, options = RULES[name]
        dist = lp.LMString(lm, "a", **options)
        dead = [t for t, rejected in enumerate_strings(dist) if rejected and len(t.ids or ()) < 4]
        assert dead
        for value in dead:
            assert float(dist.log_prob(value)) == -math.inf
            assert str(options["grammar"]) in str(dist.why_impossible(value))
            drawn = dist.request(value)
            assert drawn is not None and drawn.path.ending == "dead"


# -- any regex, against Python's ---------------------------------------------------------------

atoms = st.sampled_from(["a", "b", r"\.", "[ab]", "."])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda t: f"(?:{t[0]}|{t[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}"])).map(
            lambda t: f"(?:{t[0]}){t[1]}"
        ),
    ),
    max_leaves=5,
)
SHORT = ["".join(t) for n in range(5) for t in itertools.product("ab.", repeat=n)]
settings.register_profile("grammars", max_examples=40, deadline=None, derandomize=True)


@settings(settings.get_profile("grammars"))
@given(pattern=patterns)
def test_log_matches_is_fullmatch(pattern: str) -> None:
    grammar = lp.regex(pattern)
    for text in SHORT:
        expected = 0.0 if re.fullmatch(pattern, text) else -math.inf
        assert lp.log_matches(text, grammar) == expected, (pattern, text)


@settings(settings.get_profile("grammars"), max_examples=25)
@given(
    pattern=patterns,
    stop=st.sampled_from([None, ".", "b.", ["ab", "."]]),
    min_tokens=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_draws_keep_to_any_regex(pattern: str, stop: Any, min_tokens: int, seed: int) -> None:
    options: dict[str, Any] = {"stop": stop, "min_tokens": min_tokens, "max_tokens": 5}
    try:
        dist = lp.LMString(LM, "a", grammar=lp.regex(pattern), **options)
    except ValueError as error:
        assert "no string of the grammar" in str(error)
        listed = enumerate_strings(lp.LMString(LM, "a", truncate="reject", **options))
        assert not any(re.fullmatch(pattern, t) for t, rejected in listed if not rejected)
        return
    free = lp.LMString(LM, "a", truncate="reject", **options)
    for k in range(4):
        value, log_q = dist.draw((seed, k))
        log_prob = float(dist.log_prob(value))
        if dist.why_impossible(value) is None:
            assert re.fullmatch(pattern, value)
            assert log_prob == pytest.approx(log_q, abs=1e-4)
            # What the grammar masks only makes the rest likelier.
            assert log_prob >= float(free.log_prob(value)) - 1e-4
        else:
            assert log_prob == -math.inf


@settings(settings.get_profile("grammars"), max_examples=25)
@given(pattern=patterns, walk=st.lists(st.sampled_from(SHORT), min_size=1, max_size=6))
def test_one_matcher_goes_back_and_forth(pattern: str, walk: list[str]) -> None:
    grammar, tokens = lp.regex(pattern), LM.vocabulary.bytes
    moving = grammar.matcher(tokenizer_of(LM.vocabulary))
    texts = [t for t in SHORT if re.fullmatch(pattern, t)]
    for text in map(str.encode, walk):
        fresh = grammar.matcher(bytes_only())
        legal = moving.legal(text)
        assert legal.tolist() == [bool(t) and fresh.begins(text + t) for t in tokens]
        assert moving.accepts(text) == (text.decode() in texts)


# -- tokens ------------------------------------------------------------------------------------


def test_every_spelling_of_a_text_is_legal() -> None:
    dist = lp.LMString(LM, "a", max_tokens=4, grammar=lp.one_of(["ab."]))
    spellings = {t.ids: p for t, _ in enumerate_strings(dist) for p in [float(dist.log_prob(t))]}
    letters = {t: i for i, t in enumerate(LM.vocabulary.bytes) if t}
    a, b, dot, ab, b_dot = (letters[t] for t in (b"a", b"b", b".", b"ab", b"b."))
    assert set(spellings) == {(a, b, dot), (ab, dot), (a, b_dot)}
    assert sum(math.exp(p) for p in spellings.values()) == pytest.approx(1.0, abs=1e-5)


def test_a_grammar_that_can_only_stop_leaves_the_end_alone() -> None:
    dist = lp.LMString(LM, "a", max_tokens=3, grammar=lp.one_of(["a"]))
    value, log_q = dist.draw((0,))
    assert (str(value), log_q) == ("a", 0.0)
    request = dist.request(value)
    assert request is not None
    assert request.path.steps[-1].legal.nonzero()[:, 0].tolist() == [END]


def test_steps_are_forgotten_and_come_back_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "STEP_BYTES", 4096)
    lm = tiny_lm("ab.", seed=3, merged=["ab", "b.", ".."])
    dist = lp.LMString(lm, "a", max_tokens=4, grammar=lp.regex(r"a(b|ab)*\.?"))
    check_distribution(dist, samples=100)
    assert len(dist.bound._recent) <= 4
    # Scores are remembered by what was legal, so they are found again.
    value = Text("ab", lm.encode_text("ab"), lm.fingerprint)
    dist.log_prob(value)
    dist.bound._recent.clear()
    hits = lm.memo.hits
    dist.log_prob(value)
    assert lm.memo.hits == hits + 1


def test_states_in_which_the_same_is_legal_share_a_step() -> None:
    dist = lp.LMString(LM, "a", max_tokens=20, grammar=lp.regex("[ab]*"))
    bound, state = dist.bound, dist.bound.start(20)
    (a, b) = LM.encode_text("a") + LM.encode_text("b")
    one = bound.step(bound.advance(bound.advance(state, a), b))
    two = bound.step(bound.advance(bound.advance(state, b), b))
    assert one is two


def test_states_in_which_the_same_is_legal_may_end_otherwise() -> None:
    """After "b" the stop "b." is one token away; elsewhere that token only goes on."""
    options: dict[str, Any] = {"stop": "b.", "max_tokens": 4}
    lm = tiny_lm("ab.", seed=3)
    # A grammar of all texts changes nothing.
    masked = lp.LMString(lm, "a", grammar=lp.regex("[ab.]*"), **options)
    free = lp.LMString(lm, "a", truncate="reject", **options)
    found, expected = (
        {str(t): float(fn.log_prob(t)) for t, _ in enumerate_strings(fn)} for fn in (masked, free)
    )
    assert found == pytest.approx(expected, abs=1e-4)
    assert "b." in found and not any("b." in text[:-1] for text in found)


def test_grammars_without_end_are_forgotten() -> None:
    lm = tiny_lm("ab.", seed=3)
    free = lp.LMString(lm, "a", max_tokens=4).bound
    first = lp.LMString(lm, "a", max_tokens=4, grammar=lp.regex("a"))
    bound = first.bound
    assert first.bound is bound
    for k in range(40):
        made = lp.LMString(lm, "a", max_tokens=4, grammar=lp.one_of(["a", f"b{k}"]))
        assert made.bound._free is free
    assert len(lm._masked) == 32
    assert first.bound is not bound
    assert float(first.log_prob("a")) == pytest.approx(0.0, abs=1e-6)


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: lp.regex("a("), ValueError, r"regex\('a\('\) does not compile.*unclosed group"),
        (lambda: lp.regex("(?=a)a"), ValueError, "look-around"),
        (lambda: lp.regex(3), TypeError, "a regex must be a string, got 3"),
        (lambda: lp.json_schema("{"), ValueError, "the schema is not JSON"),
        (lambda: lp.json_schema({"type": "objekt"}), ValueError, "Invalid type: objekt"),
        (lambda: lp.json_schema({"not": {}}), ValueError, "Unimplemented keys"),
        (lambda: lp.json_schema(3), TypeError, "a schema must be a mapping"),
        (lambda: lp.json_schema({"a": math.nan}), ValueError, "cannot be written as JSON"),
        (lambda: lp.lark("start: x"), ValueError, 'unknown name: "x"'),
        (lambda: lp.lark('start: "a" <[3]>'), ValueError, "speaks of an LM's tokens"),
        (lambda: lp.lark('start: "a" <|end|>'), ValueError, "speaks of an LM's tokens"),
        (lambda: lp.lark("start: x\nx[max_tokens=3]: /a/"), ValueError, "LMString's max_tokens"),
        (lambda: lp.lark('start: A\nA: "x" & "y"'), ValueError, "has no text at all"),
        (lambda: lp.one_of([]), ValueError, "at least one string"),
        (lambda: lp.one_of("ab"), TypeError, "a list of strings"),
        (lambda: lp.one_of(["a", 1]), TypeError, "must be a string, got 1"),
        (lambda: lp.one_of(["a", "b", "a"]), ValueError, "was given 'a' twice"),
        (lambda: lp.log_matches(b"a", lp.one_of(["a"])), TypeError, "takes a string, got b'a'"),
        (lambda: lp.log_matches("a", "a"), TypeError, "takes a grammar made by"),
    ],
)
def test_bad_grammars(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        make()
    assert "%llguidance" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grammar": lp.regex("c")}, r"grammar regex\('c'\).*no first token is legal"),
        ({"grammar": lp.regex("aaa")}, r"grammar regex\('aaa'\) fits the other rules"),
        ({"grammar": lp.regex("a+"), "ban": "a"}, "no first token is legal"),
        ({"grammar": lp.one_of([""])}, r"has the empty text, and min_tokens=1 leaves it out"),
        ({"grammar": lp.one_of(["b", ""])}, r"one_of\(\['b', ''\]\) has the empty text"),
        ({"grammar": lp.one_of(["b", ""]), "min_tokens": 0}, None),
        ({"grammar": lp.regex("a*"), "min_tokens": 3}, "no room for an ending action"),
        ({"grammar": lp.regex("a*"), "stop": "."}, None),
        ({"grammar": lp.regex("b*[.]a"), "stop": "."}, "fits the other rules"),
    ],
)
def test_constraints_that_no_string_fits(options: dict[str, Any], message: str | None) -> None:
    if message is None:
        lp.LMString(LM, "a", max_tokens=3, **options)
        return
    with pytest.raises(ValueError, match=message):
        lp.LMString(LM, "a", max_tokens=3, **options)


def test_a_grammar_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"grammar must be made by lp\.regex"):
        lp.LMString(LM, "a", max_tokens=3, grammar="a*")  # type: ignore[arg-type]


def test_a_matcher_that_gives_up_is_no_answer() -> None:
    # More states than llguidance's lexer takes: an error, neither 0 nor −inf.
    own = lp.regex("a*").matcher(bytes_only())
    assert own.accepts(b"aa")
    own._places[b"aa"].consume_token(bytes_only().encode(b"b")[0])
    with pytest.raises(ValueError, match=r"llguidance gave up on the grammar regex\('a\*'\)"):
        own.accepts(b"aa")
    assert own.accepts(b"aaa") and not own.accepts(b"b")


def test_texts_count_among_the_bytes_of_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "STEP_BYTES", 200_000)
    lm = tiny_lm("ab.", seed=3, merged=["ab" * 2**k for k in range(9)])
    dist = lp.LMString(lm, "a", max_tokens=400, grammar=lp.regex("[ab]*"))
    bound = dist.bound
    (long,) = (i for i, data in enumerate(lm.vocabulary.bytes) if len(data) == 512)
    state = bound.start(400)
    for _ in range(100):
        bound.step(state)
        state = bound.advance(state, long)
        assert bound._masks.texts == sum(len(key[-1]) for key in bound._recent)
    # The last texts have some 50 thousand bytes each.
    assert len(bound._recent) == 3 and bound._masks.bytes <= 200_000


def test_strings_side_by_side_do_not_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    encode = Tokenizer.encode

    def counted(self: Tokenizer, text: bytes) -> list[int]:
        read.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    moving = lp.regex("([abc][abcd ]*[.])*").matcher(bytes_only())
    rng = np.random.default_rng(0)
    texts = [b"a" for _ in range(50)]
    for _ in range(60):
        texts = [t + bytes(rng.choice(list(b"abcd "), size=3).tolist()) for t in texts]
        for text in texts:
            assert moving.begins(text) and not moving.accepts(text)
    assert sum(read) <= 50 * 60 * 4
    for text in texts:
        assert moving.accepts(text + b".") and not moving.begins(text + b"..x")


def test_a_matcher_keeps_as_much_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "KEPT_BYTES", 100_000)
    own = lp.regex("[ab]*").matcher(bytes_only())
    for k in range(100):
        assert own.accepts(b"a" * k) and own.accepts(b"b" * k)
    assert own._bytes == sum(matcher._bytes(text) for text in own._places) <= 100_000
    assert len(own._places) >= 8
    # One place is always kept, whatever it takes.
    assert own.accepts(b"ab" * 5000) and len(own._places) == 1
    assert not own.accepts(b"ab" * 5000 + b"c") and own.accepts(b"")


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=40))
def test_what_two_texts_share(common: bytes, first: bytes, second: bytes) -> None:
    one, other = common + first, common + second
    expected = max(k for k in range(len(one) + 1) if other.startswith(one[:k]))
    assert matcher._shared(one, other) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab.", max_size=12), max_size=25), st.integers(1, 60_000))
def test_a_matcher_among_many_texts_is_a_new_one(walk: list[str], most: int) -> None:
    grammar = lp.regex(r"(ab|ba)*b?\.?")
    own = grammar.matcher(bytes_only())
    before = matcher.KEPT_BYTES
    matcher.KEPT_BYTES = most
    try:
        for text in walk:
            data = text.encode()
            assert own.begins(data) == grammar.matcher(bytes_only()).begins(data)
            assert own.accepts(data) == bool(re.fullmatch(r"(ab|ba)*b?\.?", text))
    finally:
        matcher.KEPT_BYTES = before


def test_values_that_break_a_grammar_say_so() -> None:
    dist = lp.LMString(LM, "a", max_tokens=4, grammar=lp.regex("ab*"))
    for value, reason in [
        ("ba", "breaks the grammar regex('ab*')"),
        ("abbbb", "it is unfinished after 4 tokens"),
    ]:
        assert float(dist.log_prob(value)) == -math.inf
        assert reason in str(dist.why_impossible(value))
    short = lp.LMString(LM, "a", max_tokens=4, grammar=lp.regex("ab+"))
    assert short.why_impossible("a") == "it is not a whole text of the grammar regex('ab+')"

    def model() -> None:
        lp.sample("x", dist, obs="ba")

    with pytest.warns(UserWarning):
        posterior = lp.infer(model, num_samples=1, progress=False)
    assert any("breaks the grammar regex('ab*')" in note for note in posterior.notes)


def test_repr_and_equality() -> None:
    assert repr(lp.regex("a+")) == "regex('a+')"
    assert repr(lp.one_of(["a", "b"])) == "one_of(['a', 'b'])"
    assert repr(lp.json_schema('{"type": "null"}')) == 'json_schema(\'{"type": "null"}\')'
    assert lp.regex("a+") == lp.regex("a+") != lp.one_of(["a+"])
    assert len({lp.json_schema({"type": "null"}), lp.json_schema('{"type": "null"}')}) == 1


@pytest.mark.parametrize("text", ["", "a\n", "é/", 'ab"\\', "€", "(a|b)*", "%llguidance", "x y"])
def test_one_of_takes_any_text(text: str) -> None:
    grammar = lp.one_of([text, "other"])
    assert lp.log_matches(text, grammar) == 0.0
    assert lp.log_matches(text + "z", grammar) == -math.inf
    assert lp.log_matches("\ud800", grammar) == -math.inf


def test_angle_brackets_in_the_text_of_a_lark_grammar() -> None:
    grammar = lp.lark('// <[1]>\nstart: /<[a-z]+>/ "<|a|>" # max_tokens=3')
    assert lp.log_matches("<b><|a|>", grammar) == 0.0


def test_equal_grammars_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may make its grammar anew in every run."""
    made = []

    class Counting(matcher.Matcher):
        def __init__(self, *args: Any) -> None:
            made.append(args[1])
            super().__init__(*args)

    monkeypatch.setattr(grammars, "Matcher", Counting)
    forms = [lp.regex("(never|seen)-(before|since)") for _ in range(3)]
    assert len(set(forms)) == 1 and made == [f"the grammar {forms[0].shown}"]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"regex\('x\{2\}\(\?P<'\) does not compile"):
            lp.regex("x{2}(?P<")


def test_a_schema_of_mappings_and_sequences_of_any_kind() -> None:
    plain = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    made = MappingProxyType(
        {
            "type": "object",
            "properties": MappingProxyType({"a": MappingProxyType({"enum": ("x", "y")})}),
            "required": UserList(["a"]),
        }
    )
    assert lp.json_schema(made) == lp.json_schema(plain)


def test_a_lark_regex_that_is_never_closed_is_no_long_search() -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match="does not compile"):
        lp.lark('start: "x"\nA: /' + "[a]" * 60)
    assert time.process_time() - began < 20.0  # each class had doubled it, from 8.6 s at 24
    # A class may hold what would end the regex, or speak of tokens.
    assert lp.log_matches("/", lp.lark("start: /[<[1]>\\/]/")) == 0.0


def test_schemas_without_end_are_named() -> None:
    endless: dict[str, Any] = {"type": "object"}
    endless["properties"] = {"a": endless}
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"type": "array", "items": deep}
    for schema in (endless, deep, '{"items":' * 99999):
        with pytest.raises(ValueError, match=r"nested too deeply, or within itself; .*\$ref"):
            lp.json_schema(schema)
