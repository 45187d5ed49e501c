"""The automaton against an oracle that knows only Python's bytes and a plain forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from langppl.distributions import LMString, Text
from langppl.lm import LM, DrawRequest, StringRules, perform
from langppl.lm.layouts import Layout, _short
from langppl.lm.vocabulary import utf8_fragment
from langppl.testing import enumerate_strings, tiny_lm

BEGIN, END = 0, 1
PROMPT = "ab"


@dataclass(frozen=True)
class Case:
    name: str
    rules: dict[str, Any]
    alphabet: str = "ab."
    merged: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    total: float | None = 1.0

    @property
    def lm(self) -> LM:
        return tiny_lm(self.alphabet, seed=3, merged=self.merged, split=self.split)

    @property
    def tokens(self) -> dict[int, bytes]:
        """Id and bytes of each ordinary token, as `tiny_lm` promises to lay them out."""
        data = [c.encode() for c in self.alphabet]
        for character in self.split:
            data += [bytes([b]) for b in character.encode() if bytes([b]) not in data]
        data += [text.encode() for text in self.merged]
        return dict(enumerate(data, start=3))


CASES = [
    Case("end token only", {"max_tokens": 4}),
    Case("one stop", {"max_tokens": 4, "stop": "."}),
    Case("two stops of different lengths", {"max_tokens": 5, "stop": [".", "ba"]}),
    Case("stops that overlap", {"max_tokens": 5, "stop": ["aab", "ab.", "b.b"]}),
    Case(
        "a stop inside longer tokens",
        {"max_tokens": 4, "stop": "."},
        merged=("b.", ".a", "..", "..a"),
    ),
    Case(
        "a long stop across and inside tokens",
        {"max_tokens": 4, "stop": ["a.b", ".."]},
        merged=("b.", ".a", "..", ".b", "a.", "a.b", "a.ba"),
    ),
    Case("max of one", {"max_tokens": 1, "stop": "."}),
    Case("max", {"max_tokens": 3, "stop": ["b"]}),
    Case("min", {"max_tokens": 4, "min_tokens": 2, "stop": "."}, merged=("b.",)),
    Case("min of zero", {"max_tokens": 3, "min_tokens": 0, "stop": "."}),
    Case("fixed length", {"max_tokens": 3, "min_tokens": 3, "stop": "."}),
    Case("ban", {"max_tokens": 4, "stop": ".", "ban": "b"}, merged=("ab", "..")),
    Case("allow", {"max_tokens": 4, "stop": ".", "allow": ["a", "."]}, merged=("ab", "aa", "a.")),
    Case(
        "ban by a predicate", {"max_tokens": 4, "ban": lambda text: len(text) > 1}, merged=("ab",)
    ),
    Case("temperature", {"max_tokens": 4, "stop": ".", "temperature": 0.6}),
    Case(
        "reject",
        {"max_tokens": 3, "stop": "b", "temperature": 2.0, "truncate": "reject"},
        total=None,
    ),
    Case("split bytes", {"max_tokens": 4, "stop": "."}, alphabet="a.", split=("é",)),
    Case(
        "split bytes of several lengths",
        {"max_tokens": 4},
        alphabet="a",
        split=("é", "è", "€"),
    ),
    Case(
        "a stop of split bytes",
        {"max_tokens": 4, "min_tokens": 0, "stop": ["é", "a."]},
        alphabet="a.",
        split=("é", "è"),
    ),
    Case("two spellings", {"max_tokens": 4, "stop": "."}, merged=("ab",)),
    Case(
        "all at once",
        {
            "max_tokens": 4,
            "min_tokens": 2,
            "stop": ["b.", "."],
            "ban": "aa",
            "temperature": 1.3,
            "truncate": "reject",
        },
        split=("é",),
        merged=("ab", "b.", "aa", ".a"),
        total=None,
    ),
]


@dataclass(frozen=True)
class Outcome:
    """One ending action: every way to write its token ids, its text and its probability."""

    spellings: tuple[tuple[int, ...], ...]
    text: str
    log_prob: float
    is_cut: bool


def decodes(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def can_finish(data: bytes, actions: int, tokens: dict[int, bytes]) -> bool:
    """Whether at most `actions` further tokens make `data` valid UTF-8, by trying them all."""
    if decodes(data):
        return True
    return actions > 0 and any(can_finish(data + t, actions - 1, tokens) for t in tokens.values())


def oracle(case: Case) -> list[Outcome]:
    lm, rules = case.lm, case.rules
    limit, least = rules["max_tokens"], rules.get("min_tokens", 1)
    stop = rules.get("stop", ())
    stops = [s.encode() for s in ([stop] if isinstance(stop, str) else stop)]
    tokens = {i: data for i, data in case.tokens.items() if is_allowed(data, rules)}
    prompt = lm.tokenizer(PROMPT)["input_ids"]

    found: list[Outcome] = []
    level: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for count in range(limit):
        if not level:
            break
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([[*prompt, *ids] for ids, _ in level])).logits
        logits = logits[:, -1].double() / rules.get("temperature", 1.0)
        below = []
        for (ids, log_prob), row in zip(level, logits, strict=True):
            text = b"".join(case.tokens[i] for i in ids)
            going: list[int] = []
            endings: dict[bytes, list[int]] = {}
            for token, data in tokens.items():
                ends = [(text + data).index(s) + len(s) for s in stops if s in text + data]
                if ends:
                    cut = (text + data)[: min(ends)]
                    if count >= least and decodes(cut):
                        endings.setdefault(cut, []).append(token)
                elif can_finish(text + data, limit - count - 1, tokens):
                    going.append(token)
            may_end = count >= least and decodes(text)
            legal = [*going, *(i for m in endings.values() for i in m), *([END] if may_end else [])]
            normaliser = row[legal].logsumexp(0)
            if may_end:
                end = log_prob + float(row[END] - normaliser)
                found.append(Outcome((ids,), text.decode(), end, False))
            for cut, members in endings.items():
                total = log_prob + float(row[members].logsumexp(0) - normaliser)
                spellings = tuple((*ids, m) for m in members)
                found.append(Outcome(spellings, cut.decode(), total, False))
            below += [((*ids, i), log_prob + float(row[i] - normaliser)) for i in going]
        level = below
    for ids, log_prob in level:
        text = b"".join(case.tokens[i] for i in ids)
        found.append(Outcome((ids,), text.decode(), log_prob, True))
    return found


def is_allowed(data: bytes, rules: dict[str, Any]) -> bool:
    text = data.decode("utf-8", errors="replace")
    if callable(ban := rules.get("ban")):
        return not ban(text)
    if ban is not None and ban in text:
        return False
    # Every `allow` here is of single characters.
    return "allow" not in rules or all(c in rules["allow"] for c in text)


def log_probs(dist: LMString, values: list[Text]) -> list[float]:
    """As `dist.log_prob`, in one batch."""
    waiting = [dist.pending(value) for value in values]
    replies: Iterator[Any] = iter(perform([r for w in waiting for r in w.requests]))
    return [w.finish([next(replies) for _ in w.requests]) for w in waiting]


@pytest.fixture(params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def test_probabilities_are_the_oracles_and_sum_to_one(case: Case) -> None:
    lm, outcomes = case.lm, oracle(case)
    dist = LMString(lm, PROMPT, **case.rules)
    is_rejecting = case.rules.get("truncate") == "reject"
    values = [[Text(o.text, ids, lm.fingerprint) for ids in o.spellings] for o in outcomes]
    scores = iter(log_probs(dist, [v for spellings in values for v in spellings]))
    for outcome, spellings in zip(outcomes, values, strict=True):
        for value in spellings:
            if outcome.is_cut and is_rejecting:
                assert next(scores) == -np.inf
                assert "truncate" in (dist.why_impossible(value) or "")
            else:
                assert next(scores) == pytest.approx(outcome.log_prob, abs=1e-4), repr(value)
                assert dist.why_impossible(value) is None

    # The strings that testing.py lists: their scores alone, rejected mass added back.
    listed = list(enumerate_strings(dist))
    assert len(listed) == len(outcomes)
    truth = {ids: o for o in outcomes for ids in o.spellings}
    for text, is_rejected in listed:
        assert truth[text.ids or ()].text == text
        assert is_rejected == (truth[text.ids or ()].is_cut and is_rejecting)
    kept = [text for text, is_rejected in listed if not is_rejected]
    lost = [text for text, is_rejected in listed if is_rejected]
    total = np.exp(log_probs(dist, kept)).sum()
    if case.total is not None:
        assert not lost and total == pytest.approx(case.total, abs=1e-5)
    else:
        mass = np.exp([truth[text.ids or ()].log_prob for text in lost]).sum()
        requests = [dist.request(text) for text in lost]
        added = np.exp([r.log_prob for r in perform([r for r in requests if r])]).sum()
        assert len(requests) == len(lost) and added == pytest.approx(mass, abs=1e-4)
        assert 0.01 < added < 0.99
        assert total + added == pytest.approx(1, abs=1e-5)


def test_draws_follow_the_probabilities(case: Case) -> None:
    draws = 2000
    lm, outcomes = case.lm, oracle(case)
    dist = LMString(lm, PROMPT, **case.rules)
    cell = {ids: k for k, o in enumerate(outcomes) for ids in o.spellings}
    prompt = dist.prompt_ids()
    requests = [
        DrawRequest(lm, prompt, dist.bound, case.rules["max_tokens"], ("draws", k))
        for k in range(draws)
    ]
    counts: Counter[int] = Counter()
    for reply in perform(requests):
        outcome = outcomes[cell[reply.ids]]
        assert reply.text == outcome.text
        assert reply.log_prob == pytest.approx(outcome.log_prob, abs=1e-4)
        assert not reply.is_dead
        counts[cell[reply.ids]] += 1
    expected = draws * np.exp([o.log_prob for o in outcomes])
    observed = np.array([counts[k] for k in range(len(outcomes))])
    rare = expected < 5
    cells = [(observed[~rare], expected[~rare])]
    if rare.any():
        cells.append((observed[rare].sum(keepdims=True), expected[rare].sum(keepdims=True)))
    seen, due = (np.concatenate(c) for c in zip(*cells, strict=True))
    if len(due) > 1:
        assert chisquare(seen, due * seen.sum() / due.sum()).pvalue > 1e-4


def test_a_stop_groups_the_tokens_that_run_on() -> None:
    lm = tiny_lm("ab.", merged=["b.", ".a", ".."])
    ids = {lm.vocabulary.text(i): i for i in range(3, lm.vocabulary.size)}
    bound = lm.bind(StringRules(stop=(".",), max_tokens=5))
    step = bound.step(bound.advance(bound.start(5), ids["a"]))
    assert sorted(step.groups[b"."].tolist()) == sorted([ids["."], ids[".a"], ids[".."]])
    assert step.groups[b"b."].tolist() == [ids["b."]]
    assert step.canonical_token == ids["."]
    assert bound.representative(b".", [ids[".."], ids["."]]) == ids["."]


def test_a_token_with_two_stops_ends_at_the_first_in_its_text() -> None:
    lm = tiny_lm("ab.!", merged=[".!"])
    ids = {lm.vocabulary.text(i): i for i in range(3, lm.vocabulary.size)}
    # The stops are given in the other order.
    dist = LMString(lm, "a", stop=["!", "."], max_tokens=3, min_tokens=0)
    with torch.no_grad():
        row = lm.model(input_ids=torch.tensor([lm.encode_text("a")])).logits[0, -1]
    legal = torch.cat([row[END : END + 1], row[3:]])
    expected = float(row[[ids["."], ids[".!"]]].logsumexp(0) - legal.logsumexp(0))
    assert float(dist.log_prob(".")) == pytest.approx(expected, abs=1e-5)
    assert all(sum(str(t).count(s) for s in "!.") <= 1 for t, _ in enumerate_strings(dist))


def test_end_ids_add_up() -> None:
    lm = tiny_lm("ab")
    lm.model.generation_config.eos_token_id = [1, 2]
    two = LM.from_parts(lm.model, lm.tokenizer, "two ends")
    assert two.vocabulary.end_ids == (1, 2)
    dist = LMString(two, "a", max_tokens=3, min_tokens=0)
    with torch.no_grad():
        row = lm.model(input_ids=torch.tensor([lm.encode_text("a")])).logits[0, -1]
    kept = torch.cat([row[1:3], row[3:]])
    expected = float(row[1:3].logsumexp(0) - kept.logsumexp(0))
    assert float(dist.log_prob("")) == pytest.approx(expected, abs=1e-5)
    total = np.exp(log_probs(dist, [t for t, _ in enumerate_strings(dist)])).sum()
    assert total == pytest.approx(1, abs=1e-5)


def test_stop_without_max_tokens_is_bounded_by_the_window() -> None:
    lm = tiny_lm("a.", window=5)
    dist = LMString(lm, "aa", stop=".")
    assert dist.limit(2) == 3
    total = np.exp(log_probs(dist, [t for t, _ in enumerate_strings(dist)])).sum()
    assert total == pytest.approx(1, abs=1e-5)
    assert "do not fit the context window" in (dist.why_impossible("aaaa.") or "")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"max_tokens": -3}, "max_tokens must be an integer of at least 1, got -3"),
        ({"max_tokens": 2.5}, "max_tokens must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"min_tokens": -1}, "min_tokens must be an integer of at least 0, got -1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is above max_tokens=4"),
        ({"stop": ("",)}, "a stop must be a non-empty string"),
        ({"stop": (".", "")}, "a stop must be a non-empty string"),
        ({"stop": (3,)}, "a stop must be a non-empty string"),
        ({"stop": ".", "truncate": "drop"}, 'truncate must be "keep" or "reject"'),
        ({"truncate": "reject"}, "an open string never ends"),
        (
            {"max_tokens": 3, "min_tokens": 3, "truncate": "reject"},
            "leaves no room for an ending action",
        ),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": -1.0}, "temperature must be above 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
        ({"temperature": float("inf")}, "temperature must be finite"),
        ({"temperature": "hot"}, "temperature must be above 0"),
        ({"ban": ()}, "ban must be non-empty strings or a predicate"),
        ({"ban": ("",)}, "ban must be non-empty strings or a predicate"),
        ({"allow": (1,)}, "allow must be non-empty strings or a predicate"),
    ],
)
def test_rules_that_make_no_sense(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        StringRules(**rules)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"stop": "x"}, "stop='x' can never be produced"),
        ({"stop": ".", "ban": "."}, "stop='.' can never be produced"),
        ({"stop": "xa"}, "stop='xa' can never be produced"),
        ({"stop": "axb"}, "stop='axb' can never be produced"),
        ({"ban": "ab"}, "ban='ab' is in no single token"),
        ({"allow": "x"}, "leaves no token"),
        ({"ban": lambda text: True}, "leaves no token"),
    ],
)
def test_rules_that_this_vocabulary_cannot_follow(rules: dict[str, Any], message: str) -> None:
    lm = tiny_lm("ab.")
    with pytest.raises(ValueError) as error:
        lm.bind(StringRules(max_tokens=4, **rules))
    assert message in str(error.value)


SPELLING = tiny_lm("abc", merged=("aa", "ab", "ba", "bb", "aab", "bba", "abab", "cab")).vocabulary


@settings(max_examples=400, deadline=None)
@given(
    st.text("abcd", min_size=1, max_size=9),
    st.sets(st.sampled_from([d.decode() for d in SPELLING.sorted_bytes]), min_size=1),
)
def test_a_stop_is_spelled_as_a_search_through_all_tokens_says(stop: str, kept: set[str]) -> None:
    allowed = np.zeros(SPELLING.size, dtype=bool)
    allowed[[SPELLING.exact[text.encode()] for text in kept]] = True
    # A text that contains the stop needs no more tokens than letters, and one before and after.
    begun, possible = {""}, any(stop in text for text in kept)
    for _ in stop:
        grown = {text + more for text in begun for more in kept}
        possible = possible or any(stop in text for text in grown)
        # What matters of a text is the longest end of it that begins the stop, and shorter ones.
        begun = {t[-k:] for t in grown for k in range(1, len(t) + 1) if stop.startswith(t[-k:])}
    if possible:
        Layout((stop.encode(),), SPELLING, allowed)
    else:
        with pytest.raises(ValueError, match="can never be produced"):
            Layout((stop.encode(),), SPELLING, allowed)


def test_a_stop_has_a_longest_length() -> None:
    with pytest.raises(ValueError, match=r"at most 1000 bytes, and 'ééé.*… has 1002; give the be"):
        StringRules(stop="é" * 501)


def test_every_byte_a_token_of_its_own_is_no_long_search() -> None:
    lm = tiny_lm("ab", split=["é", "€", "😀", "\U00010348", "\U0010fffd"])
    bound = lm.bind(StringRules(max_tokens=5))
    for char in ("é", "€", "😀", "\U00010348", "\U0010fffd"):
        data = char.encode()
        for k in range(1, len(data)):
            assert bound.layout.tokens_to_finish(data[:k]) == len(data) - k
    # However many first bytes there are, few fragments are told apart.
    assert len(bound.layout._cost) <= 10


def test_a_short_fragment_is_finished_by_the_same_bytes() -> None:
    rng = np.random.default_rng(0)
    for char in map(chr, rng.choice(np.r_[0x80:0xD800, 0xE000:0x110000], 300)):
        data = char.encode()
        for k in range(1, len(data)):
            short = _short(data[:k])
            for _ in range(20):
                more = bytes(rng.integers(0x70, 0xD0, rng.integers(1, 4)).tolist())
                left, expected = utf8_fragment(short + more), utf8_fragment(data[:k] + more)
                assert (left is None) == (expected is None)
                assert left is None or (left == b"") == (expected == b"")


@pytest.mark.parametrize("one", [np.array, torch.tensor])
def test_numbers_of_no_dimensions_are_numbers(one: Callable[[Any], Any]) -> None:
    rules = StringRules(max_tokens=one(8), temperature=one(0.5))
    assert (rules.max_tokens, rules.temperature) == (8, 0.5)
    assert rules == StringRules(max_tokens=8, temperature=0.5)
    for wrong in (one(True), one([8])):
        with pytest.raises(ValueError, match="max_tokens must be an integer"):
            StringRules(max_tokens=wrong)
