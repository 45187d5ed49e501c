"""What an LM read, against a count of its own at the embedding layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from langppl import LM, GFlowNetGuide, LMString, compile, infer, sample
from langppl.lm import ScoreRequest, StringRules
from langppl.lm.decoding import draw
from langppl.lm.requests import DrawRequest, serve
from langppl.lm.scoring import score
from langppl.lm.tally import Tally
from langppl.testing import tiny_lm


@contextlib.contextmanager
def embedded(lm: LM) -> Iterator[list[int]]:
    """How many ids each forward pass embeds."""
    seen: list[int] = []
    layer = lm.model.get_input_embeddings()
    handle = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    try:
        yield seen
    finally:
        handle.remove()


def requests(lm: LM, texts: list[str], prompt: str = "ab.a") -> list[ScoreRequest]:
    rules = lm.bind(StringRules(max_tokens=6))
    paths = [rules.parse(lm.encode_text(t), t.encode(), 6) for t in texts]
    return [ScoreRequest(lm, lm.encode_prompt(prompt), path) for path in paths]


def test_a_new_lm_has_read_nothing() -> None:
    assert tiny_lm("ab.").tally == Tally(0, 0)


def test_packed_scoring_counts_each_node_once() -> None:
    lm = tiny_lm("ab.", seed=3)
    assert lm.packs is not None
    with embedded(lm) as seen:
        score(requests(lm, ["abab", "abba", "abab"]))
    # The prompt, "ab" once, and "ab" and "ba" after it.
    assert lm.tally == Tally(drawn=0, scored=4 + 2 + 2 + 2)
    assert sum(seen) == lm.tally.total


def test_padding_is_not_counted() -> None:
    lm = tiny_lm("ab.", seed=3)
    lm.packs = None
    with embedded(lm) as seen:
        score(requests(lm, ["a", "abab"]))
    # "a" begins the other string, so it has no row of its own: no padding either.
    assert lm.tally.scored == 4 + 4 == sum(seen)
    with embedded(lm) as seen:
        score(requests(lm, ["b", "abab"], prompt="a"))
    assert sum(seen) == 10  # two rows of five
    assert lm.tally.scored - 8 == 7  # of two and of five tokens


@pytest.mark.parametrize("packed", [True, False])
def test_drawing_counts_the_prompt_once_and_each_token_that_is_read(packed: bool) -> None:
    lm = tiny_lm("ab.", seed=3)
    if not packed:
        lm.packs = None
    rules = lm.bind(StringRules(max_tokens=5))
    prompts = ["ab.a", "ab.a", "ab.a", "b"]
    wanted = [DrawRequest(lm, lm.encode_prompt(p), rules, 5, (0, i)) for i, p in enumerate(prompts)]
    with embedded(lm) as seen:
        replies = draw(wanted)
    # Nothing is asked for after a string that its limit ended.
    read = [
        (prompt, reply.ids[:n])
        for prompt, reply in zip(prompts, replies, strict=True)
        for n in range(1, min(len(reply.ids), 4) + 1)
    ]
    # In a tree, strings that have come the same way go on as one.
    assert lm.tally == Tally(drawn=4 + 1 + len(set(read) if packed else read), scored=0)
    assert len(set(read)) < len(read)
    assert sum(seen) == lm.tally.drawn + (0 if packed else 3)  # the short prompt's padding


def test_remembered_scores_count_nothing() -> None:
    lm = tiny_lm("ab.", seed=3)
    wanted = requests(lm, ["abab"])
    serve(wanted)
    before = lm.tally.copy()
    serve(wanted)
    assert (lm.tally - before).total == 0


def test_an_inference_counts_both_kinds_and_training_counts_too() -> None:
    lm = tiny_lm("ab.", seed=3)

    def story() -> None:
        z = sample("z", LMString(lm, "ab", stop=".", max_tokens=3))
        sample("y", LMString(lm, f"b{z}"), obs="ab")

    program = compile(story)
    before = lm.tally.copy()
    with embedded(lm) as seen:
        infer(program, num_samples=8, progress=False)
    found = lm.tally - before
    assert found.drawn > 0 and found.scored > 0 and found.total == sum(seen)
    before = lm.tally.copy()
    lm.gradient_node_budget = 4  # so that rows are run again for their gradients
    with embedded(lm) as seen, torch.random.fork_rng():
        GFlowNetGuide(lm, rank=2).fit(program, steps=2, batch=4, progress=False)
    found = lm.tally - before
    assert found.drawn > 0 and found.scored > 0 and found.total == sum(seen)


def test_tallies_add_up() -> None:
    assert Tally(1, 2) + Tally(3, 4) == Tally(4, 6)
    assert (Tally(4, 6) - Tally(1, 2)).total == 7
