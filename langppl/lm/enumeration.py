"""All strings that rules allow: counted without listing them, and listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from langppl.lm.rules import BoundRules, State, Step


def count(rules: BoundRules, limit: int, most: int | None = None) -> int:
    """How many token sequences the rules allow, rejected ones and dead ends included.

    Prefixes are counted level by level, all that stand alike together, so the work does not grow
    with the number of strings. Under a grammar prefixes stand alike only if their texts are equal.

    Args:
        rules: the rules.
        limit: most actions of a string.
        most: under a grammar, where to give up: a larger result says only that there are more
            strings than this, or more texts that strings begin with.
    """
    onwards: dict[tuple[Step, bytes], Counter[tuple[bytes, bytes, bytes]]] = {}
    standing = Counter({(b"", b"", b""): 1})
    bound = most if rules.rules.grammar is not None else None
    total = 0
    for used in range(limit):
        following: Counter[tuple[bytes, bytes, bytes]] = Counter()
        for (tail, fragment, text), prefixes in standing.items():
            state = State(used, limit - used, tail, fragment, text)
            step = rules.step(state)
            total += prefixes * (len(step.groups) + bool(len(step.end_ids)) + step.is_dead)
            if (step, text) not in onwards:
                after = (rules.advance(state, token) for token in _going_on(rules, state))
                onwards[step, text] = Counter((s.tail, s.fragment, s.text) for s in after)
            for then, tokens in onwards[step, text].items():
                following[then] += prefixes * tokens
            if bound is not None and max(total, len(following)) > bound:
                return max(total, len(following))
        standing = following
    return total + sum(standing.values())


def _going_on(rules: BoundRules, state: State) -> list[int]:
    step = rules.step(state)
    ends = set(rules.vocabulary.end_ids)
    return [
        int(t) for t in np.flatnonzero(step.legal.numpy()) if t not in step.kept and t not in ends
    ]


def strings(rules: BoundRules, limit: int) -> Iterator[tuple[tuple[int, ...], str, bool]]:
    """Lists the token sequences that the rules allow.

    Args:
        rules: the rules.
        limit: most actions of a string.

    Yields:
        Ids, text, and whether the string is rejected for being unfinished: cut, or a dead end.
    """
    join = rules.vocabulary.join
    pending: list[tuple[State, tuple[int, ...]]] = [(rules.start(limit), ())]
    while pending:
        state, ids = pending.pop()
        if state.remaining == 0:
            yield ids, join(ids).decode("utf-8"), rules.rules.truncate == "reject"
            continue
        step = rules.step(state)
        if step.is_dead:
            yield ids, join(ids).decode("utf-8", errors="replace"), True
        if len(step.end_ids):
            yield ids, join(ids).decode("utf-8"), False
        for kept, members in step.groups.items():
            last = rules.representative(kept, members.tolist())
            yield (*ids, last), (join(ids) + kept).decode("utf-8"), False
        for token in _going_on(rules, state):
            pending.append((rules.advance(state, token), (*ids, token)))
