"""Scoring: log-probabilities of the actions of strings, with and without gradients.

Requests go to the transformer by one of two routes, which give the same numbers: *packed*, where
no common prefix is computed twice (`langppl.lm.packed`), or in *padded* batches
(`langppl.lm.padded`), the plain route, for models that refuse the mask that packing needs. Either
yields the states at the positions that are asked for; what is read from them is decided here: a
float32 log-softmax over the legal tokens of each action's state of the rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from langppl.lm import guided, packed, padded
from langppl.lm.reading import Wanted, log_probs
from langppl.lm.requests import Beside, ScoreReply, ScoreRequest, StateReply, StateRequest
from langppl.lm.rules import Path, Step
from langppl.lm.trie import Ids

if TYPE_CHECKING:
    from langppl.lm.model import LM


@dataclass(frozen=True)
class PathLogProbs:
    """Log-probabilities of the actions of one string, as tensors that carry gradients.

    Attributes:
        tokens: shape [T], nats; of each token that goes on.
        ending: scalar, nats; of the ending action, 0 where it is forced or open.
        canonical: shape [T + 1], nats; of the canonical ending action before each token and at
            the end, −inf where no string may end.
        state: shape [width] (see `LM.states`); after the prompt, None if nothing was read there.
        states: shape [actions, width]; before each action, if they were asked for; of a guided
            string they are mixed.
    """

    tokens: torch.Tensor
    ending: torch.Tensor
    canonical: torch.Tensor
    state: torch.Tensor | None = None
    states: torch.Tensor | None = None

    @property
    def total(self) -> torch.Tensor:
        """Log-probability of the whole string, a scalar."""
        return self.tokens.sum() + self.ending


def score(requests: Sequence[ScoreRequest]) -> list[ScoreReply]:
    """Scores strings without gradients.

    Args:
        requests: strings of one LM under one adapter.

    Returns:
        One reply for each request, in their order.
    """
    replies: dict[int, ScoreReply] = {}
    with torch.no_grad():
        for members, tokens, ends, _, _ in _score(requests):
            numbers, sums = tokens.double().cpu().numpy(), ends.double().cpu().numpy()
            for m in members:
                ending = float(sums[m.ending]) if m.ending is not None else 0.0
                own = numbers[m.first : m.first + m.count].copy()
                replies[m.request] = ScoreReply(own, ending, sums[m.canonical])
    return [replies[at] for at in range(len(requests))]


def states(requests: Sequence[StateRequest]) -> list[StateReply]:
    """States after some texts, without gradients.

    Args:
        requests: texts of one LM under one adapter.

    Returns:
        One reply for each request, in their order.
    """
    with torch.no_grad():
        found = [r.state for r in score_with_gradients(requests)]
    return [StateReply(s.float().cpu().numpy()) for s in found if s is not None]


def score_with_gradients(
    requests: Sequence[ScoreRequest] | Sequence[ScoreRequest | StateRequest],
    with_states: bool = False,
) -> list[PathLogProbs]:
    """Scores strings, with gradients to the adapter's weights where torch records them.

    Args:
        requests: strings of one LM under one adapter; of a text alone the state is given.
        with_states: whether to give the state before each action as well.

    Returns:
        One result for each request, in their order; float32.
    """
    results: dict[int, PathLogProbs] = {}
    for members, tokens, ends, read, found in _score(requests):
        device = tokens.device
        pieces = tokens.split([m.count for m in members])
        forced = tokens.new_zeros(())
        for m, own in zip(members, pieces, strict=True):
            ending = forced if m.ending is None else ends[m.ending]
            canonical = ends[torch.tensor(m.canonical, dtype=torch.long, device=device)]
            state = None if m.state is None else found[m.state]
            # A text alone has no actions: an empty list would be of floats.
            rows = torch.tensor(m.rows, dtype=torch.long, device=device)
            states = read[rows] if with_states else None
            results[m.request] = PathLogProbs(own, ending, canonical, state, states)
    return [results[at] for at in range(len(requests))]


@dataclass(frozen=True)
class _Member:
    """Where the numbers of one string stand among those of its batch.

    Attributes:
        request: its number.
        first: place of its first token.
        count: how many tokens it has.
        ending: place of its ending among the ends, None where that is forced or open.
        canonical: places of the canonical ending actions; the last end is −inf.
        state: row of the state after the prompt, None if it was not asked for, among those of a
            pass.
        rows: of the state before each action, among those that are read.
    """

    request: int
    first: int
    count: int
    ending: int | None
    canonical: list[int]
    state: int | None
    rows: list[int]


def _score(
    requests: Sequence[ScoreRequest] | Sequence[ScoreRequest | StateRequest],
) -> Iterator[tuple[list[_Member], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For some strings at a time, log-probabilities of tokens and of sets of them, and states.

    The states are those that the numbers are of, then those after the prompts: of a guided string,
    others.
    """
    if not requests:
        return
    lm, adapter = requests[0].lm, requests[0].adapter
    paths = [r.path if isinstance(r, ScoreRequest) else None for r in requests]
    besides = [r.beside if isinstance(r, ScoreRequest) else None for r in requests]
    others = _states_beside(lm, paths, besides)
    for found, rows in _pass(lm, adapter, [r.prompt for r in requests], paths):
        states, at = guided.blend(found, rows, besides, others)
        yield (*_read(lm, requests, rows, at, states), states, found)


def _pass(
    lm: LM, adapter: str | None, prompts: Sequence[Ids], paths: Sequence[Path | None]
) -> Iterator[tuple[torch.Tensor, dict[int, NDArray[Any]]]]:
    """For some strings at a time, states, and which of them are before each string's actions."""
    first = [len(p) - 1 for p in prompts]
    count = [1 if p is None else len(p.steps) for p in paths]
    # Where a string does not end, nothing is read after its last token.
    sequences = [
        (prompt if path is None else prompt + path.tokens)[: max(f + c, 1)]
        for prompt, path, f, c in zip(prompts, paths, first, count, strict=True)
    ]
    fits = lm.packs is not None and max(map(len, sequences)) <= lm.packs.window
    route = packed.states if fits else padded.states
    with lm.adapter(adapter):
        yield from route(lm, sequences, first, count)


def _states_beside(
    lm: LM, paths: Sequence[Path | None], besides: Sequence[Beside | None]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Of each guided string, the states before its actions after the base and after `without`."""
    by_adapter: dict[str | None, list[tuple[int, Beside]]] = {}
    for k, beside in enumerate(besides):
        if beside is not None:
            by_adapter.setdefault(beside.adapter, []).append((k, beside))
    if by_adapter:
        guided.check_head(lm)
    states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for adapter, members in by_adapter.items():
        prompts = [p for _, b in members for p in (b.base, b.without)]
        twice = [paths[k] for k, _ in members for _ in range(2)]
        halves: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for found, rows in _pass(lm, adapter, prompts, twice):
                for n, own in rows.items():
                    halves[n] = found[torch.from_numpy(own).to(found.device)]
        for n, (k, _) in enumerate(members):
            states[k] = halves[2 * n], halves[2 * n + 1]
    return states


class _Asked:
    """What some strings ask of the states before their actions.

    What several ask of one state under the same rules is there once.
    """

    def __init__(self) -> None:
        # (row, step, temperature) → number: what tokens and endings are read from.
        self._slots: dict[tuple[int, int, float], int] = {}
        self._steps: dict[int, Step] = {}
        # (slot, ids of an ending action) → its place among the ends.
        self._ends: dict[tuple[int, int], int] = {}
        self._ids: dict[int, torch.Tensor] = {}
        self._token_slots: list[int] = []
        self._tokens: list[int] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked."""
        return not self._slots

    def add(
        self, at: int, request: ScoreRequest | StateRequest, rows: list[int], state: int | None
    ) -> _Member:
        """Adds a string.

        Args:
            at: its number.
            request: the string.
            rows: of the states before its actions.
            state: row of the state after its prompt, None if it was not asked for.
        """
        first = len(self._tokens)
        if isinstance(request, StateRequest):
            return _Member(at, first, 0, None, [-1], state, [])
        path = request.path
        mine = []
        for row, step in zip(rows, path.steps, strict=True):
            self._steps[id(step)] = step
            key = (row, id(step), request.temperature)
            mine.append(self._slots.setdefault(key, len(self._slots)))
        canonical = [
            self._end(slot, step.canonical) if len(step.canonical) else -1
            for slot, step in zip(mine, path.steps, strict=True)
        ]
        canonical += [-1] * (len(path.tokens) + 1 - len(canonical))
        ending = self._end(mine[-1], path.ending_ids) if path.ending in ("end", "stop") else None
        self._token_slots += mine[: len(path.tokens)]
        self._tokens += path.tokens
        return _Member(at, first, len(path.tokens), ending, canonical, state, rows)

    def _end(self, slot: int, ids: torch.Tensor) -> int:
        self._ids[id(ids)] = ids
        return self._ends.setdefault((slot, id(ids)), len(self._ends))

    def _by_set(self) -> dict[int, list[int]]:
        """For each set of ids, the places of its ends."""
        found: dict[int, list[int]] = {key: [] for key in self._ids}
        for place, (_, key) in enumerate(self._ends):
            found[key].append(place)
        return found

    def wanted(self, device: torch.device) -> Wanted:
        """All of it, as it is read."""

        def numbers(values: Sequence[float], kind: torch.dtype = torch.long) -> torch.Tensor:
            return torch.tensor(values, dtype=kind, device=device)

        number = {key: k for k, key in enumerate(self._steps)}
        of_end = [slot for slot, _ in self._ends]
        return Wanted(
            rows=numbers([row for row, _, _ in self._slots]),
            legal=torch.stack([s.legal_on(device) for s in self._steps.values()]),
            kinds=numbers([number[key] for _, key, _ in self._slots]),
            temperatures=numbers([t for _, _, t in self._slots], torch.float32),
            token_slots=numbers(self._token_slots),
            tokens=numbers(self._tokens),
            sets=[
                (self._ids[key].to(device), numbers([of_end[k] for k in places]))
                for key, places in self._by_set().items()
            ],
        )

    def in_order(self, of_sets: Sequence[torch.Tensor]) -> torch.Tensor:
        """The ends in the order of their places, of what was read for each set."""
        place = torch.empty(len(self._ends), dtype=torch.long)
        places = [k for own in self._by_set().values() for k in own]
        place[torch.tensor(places)] = torch.arange(len(self._ends))
        found = torch.cat(list(of_sets))
        return found[place.to(found.device)]


def _read(
    lm: LM,
    requests: Sequence[ScoreRequest] | Sequence[ScoreRequest | StateRequest],
    prompted: Mapping[int, NDArray[Any]],
    rows: Mapping[int, NDArray[Any]],
    states: torch.Tensor,
) -> tuple[list[_Member], torch.Tensor, torch.Tensor]:
    """Reads the actions of some strings from the states before them.

    Args:
        lm: the LM.
        requests: all strings.
        prompted: for some of them, the rows of their actions among the states of a pass.
        rows: the same among the states to read.
        states: shape [n, width].
    """
    asked = _Asked()
    members = [
        asked.add(at, requests[at], own.tolist(), int(prompted[at][0]) if len(own) else None)
        for at, own in rows.items()
    ]
    never = torch.full((1,), -torch.inf, dtype=torch.float32, device=states.device)
    if asked.is_empty:
        return members, never[:0], never
    of_tokens, of_sets = log_probs(lm, states, asked.wanted(states.device))
    if not of_sets:
        return members, of_tokens, never
    return members, of_tokens, torch.cat([asked.in_order(of_sets), never])
