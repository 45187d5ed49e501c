"""All strings that rules allow: counted without listing them, and listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from langppl.lm.rules import BoundRules, State, Step


def count(rules: BoundRules, limit: int) -> int:
    """How many token sequences the rules allow, rejected ones included.

    Prefixes are counted level by level, all that stand alike together, so the work does not grow
    with the number of strings.

    Args:
        rules: the rules.
        limit: most actions of a string.
    """
    onwards: dict[Step, Counter[tuple[bytes, bytes]]] = {}
    standing = Counter({(b"", b""): 1})
    total = 0
    for used in range(limit):
        following: Counter[tuple[bytes, bytes]] = Counter()
        for (tail, fragment), prefixes in standing.items():
            state = State(used, limit - used, tail, fragment)
            step = rules.step(state)
            total += prefixes * (len(step.groups) + bool(len(step.end_ids)))
            if step not in onwards:
                after = (rules.advance(state, token) for token in _going_on(rules, state))
                onwards[step] = Counter((then.tail, then.fragment) for then in after)
            for then, tokens in onwards[step].items():
                following[then] += prefixes * tokens
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
        Ids, text, and whether the string is rejected for being unfinished.
    """
    join = rules.vocabulary.join
    pending: list[tuple[State, tuple[int, ...]]] = [(rules.start(limit), ())]
    while pending:
        state, ids = pending.pop()
        if state.remaining == 0:
            yield ids, join(ids).decode("utf-8"), rules.rules.truncate == "reject"
            continue
        step = rules.step(state)
        if len(step.end_ids):
            yield ids, join(ids).decode("utf-8"), False
        for kept, members in step.groups.items():
            last = rules.representative(kept, members.tolist())
            yield (*ids, last), (join(ids) + kept).decode("utf-8"), False
        for token in _going_on(rules, state):
            pending.append((rules.advance(state, token), (*ids, token)))
