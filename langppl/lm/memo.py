"""Scores that are remembered, so that a factor that did not change is never scored again.

A score is a few numbers; what they depend on is all in the key: the ids of the prompt and of the
string, the legal actions before each of its tokens, the temperature, the state of the weights, an
adapter's included, and whether autocast is on, as it is at the moment of asking. The least recently
used are forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from langppl.lm import adapters
from langppl.lm.requests import ScoreReply, ScoreRequest, digest_of
from langppl.lm.rules import Step

if TYPE_CHECKING:
    from langppl.lm.model import LM

DEFAULT_BYTES = 64 * 2**20
_OVERHEAD = 512
"""Bytes of an entry besides its numbers and ids: objects and the dictionary's own."""
_ID = np.dtype(np.int32)
_STEP_BYTES = 48
"""Of a step in the key, a number or a name, and in what is kept alive."""


class Memo:
    """Remembers the scores of one LM.

    Args:
        capacity: most bytes to use, about; 0 remembers nothing.

    Attributes:
        hits: requests that were answered from memory, or by an equal one of the same batch.
        misses: requests that were scored.
    """

    def __init__(self, capacity: int = DEFAULT_BYTES) -> None:
        if capacity < 0:
            raise ValueError(f"a memo's capacity must be at least 0 bytes, got {capacity}")
        self.capacity = capacity
        self.hits = self.misses = self._bytes = 0
        self._state: tuple[object, ...] = ()
        self._found: OrderedDict[object, tuple[ScoreReply, tuple[Step, ...], int]] = OrderedDict()

    def __len__(self) -> int:
        """How many scores are remembered."""
        return len(self._found)

    def clear(self) -> None:
        """Forgets all scores."""
        self._found.clear()
        self._bytes = 0

    def answer(
        self,
        requests: Sequence[ScoreRequest],
        score: Callable[[Sequence[ScoreRequest]], list[ScoreReply]],
    ) -> list[ScoreReply]:
        """Answers requests, scoring those that are not remembered.

        Args:
            requests: of this LM, under one adapter; guided ones under one beside it as well.
            score: scores what is not known.
        """
        if not requests or self.capacity == 0:
            return score(requests)
        lm, beside = requests[0].lm, requests[0].beside
        state = state_of(lm, requests[0].adapter)
        if beside is not None and beside.adapter is not None:
            state = (*state, digest_of(lm, beside.adapter))
        # Equal ones are one object, which all keys hold.
        self._state = state = self._state if state == self._state else state
        keys = [(state, *_key(r)) for r in requests]
        new = {k: r for k, r in zip(keys, requests, strict=True) if k not in self._found}
        self.misses += len(new)
        self.hits += len(requests) - len(new)
        replies = {k: self._found[k][0] for k in keys if k in self._found}
        replies |= zip(new, score(list(new.values())), strict=True)
        for key, request in zip(keys, requests, strict=True):
            self._keep(key, request, replies[key])
        return [replies[k] for k in keys]

    def _keep(self, key: object, request: ScoreRequest, reply: ScoreReply) -> None:
        if key in self._found:
            self._found.move_to_end(key)
            return
        path = request.path
        ids = len(request.prompt) + len(path.tokens) + path.ending_ids.numel()
        if request.beside is not None:
            ids += len(request.beside.base) + len(request.beside.without)
        size = _OVERHEAD + _ID.itemsize * ids + _STEP_BYTES * len(path.steps)
        size += reply.tokens.nbytes + reply.canonical.nbytes
        for row in (reply.tokens, reply.canonical):
            row.setflags(write=False)
        # Steps whose identities are in the key are kept alive.
        alive = tuple(step for step in path.steps if step.name is None)
        self._found[key] = (reply, alive, size)
        self._bytes += size
        while self._bytes > self.capacity:
            _, (_, _, size) = self._found.popitem(last=False)
            self._bytes -= size


def _key(request: ScoreRequest) -> tuple[object, ...]:
    path, beside = request.path, request.beside
    return (
        _packed(request.prompt),
        _packed(path.tokens),
        tuple(step.name or id(step) for step in path.steps),
        path.ending,
        _packed(path.ending_ids.tolist()),
        request.temperature,
        None if beside is None else (_packed(beside.base), _packed(beside.without), beside.scale),
    )


def _packed(ids: Sequence[int]) -> bytes:
    # As Python's integers they would take nine times as much.
    return np.array(ids, _ID).tobytes()


def state_of(lm: LM, adapter: str | None) -> tuple[object, ...]:
    """What the weights are at this moment, and the float type they are used in, as a key.

    Of an adapter every number counts. An LM's own weights are frozen; that they were exchanged or
    written to is seen by their places, versions and one number of each.
    """
    weights = [tensor.detach() for _, tensor in adapters.base_tensors(lm.model)]
    places = tuple((w.data_ptr(), w._version) for w in weights)
    numbers = torch.stack([w.reshape(-1)[w.numel() // 2].float() for w in weights]).cpu()
    kind = lm.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    own = (hash(places), numbers.numpy().tobytes(), autocast)
    return own if adapter is None else (*own, digest_of(lm, adapter))
