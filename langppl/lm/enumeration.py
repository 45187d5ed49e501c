"""All strings that rules allow: counted without listing them, and listed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from langppl.lm.rules import BoundRules, State


def count(rules: BoundRules, limit: int) -> int:
    """How many token sequences the rules allow, rejected ones included.

    Args:
        rules: the rules.
        limit: most actions of a string.
    """
    known: dict[tuple[bool, int | None, bytes, bytes], int] = {}

    def below(state: State) -> int:
        if state.remaining == 0:
            return 1
        floor = min(state.count, rules.rules.min_tokens)
        key = (floor >= rules.rules.min_tokens, state.remaining, state.tail, state.fragment)
        if rules.rules.min_tokens > state.count or key not in known:
            step = rules.step(state)
            total = len(step.groups) + (1 if len(step.end_ids) else 0)
            following: dict[State, int] = {}
            for token in _going_on(rules, state):
                then = rules.advance(state, token)
                following[then] = following.get(then, 0) + 1
            total += sum(n * below(then) for then, n in following.items())
            known[key] = total
        return known[key]

    return below(rules.start(limit))


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
