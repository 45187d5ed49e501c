"""Decoding in steps of one shape, each captured once as a CUDA graph and replayed.

A step of a small batch is hundreds of small kernels, each launched by itself from Python. A graph
launches them all at once. It wants shapes and addresses that never change, so the KV cache is a
block of memory with room for so many rows and tokens, prompts are padded on the left, and rows that
are finished stay, unread. A graph stands for the weights that it was captured with: it is used
while these, adapter included, are where they were, and the first step after each capture is
compared with a plain one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from langppl.lm import adapters, caches, packed
from langppl.lm.kept import KeysAndValues
from langppl.lm.requests import DrawRequest
from langppl.warn import warn

if TYPE_CHECKING:
    from langppl.lm.model import LM

MOST_TOKENS = 64
"""Longest strings that are drawn so: a finished row costs as much as one that goes on."""

MOST_ROWS = 512
"""Most strings at once."""

MOST_KEPT = 4
"""Captured steps that are kept of one LM."""

ROOM = 64
"""Room for tokens comes in multiples of this, so that prompts of like lengths share a graph."""

KEPT_BYTES = 8 * 2**30
"""Most bytes of the caches of kept steps, unless one alone has more."""

_COMPARED = 8
"""Prompts on which a new capture is compared with a plain step."""

WARM_UP = 2
"""Plain steps before a capture: libraries set themselves up in the first."""


def takes(lm: LM, requests: Sequence[DrawRequest]) -> bool:
    """Whether strings are drawn in captured steps."""
    return lm.device.type == "cuda" and lm.captures and suits(lm, requests)


def suits(lm: LM, requests: Sequence[DrawRequest]) -> bool:
    """Whether strings could be drawn in steps of one shape."""
    if lm.packs is None:  # it may not take the mask that a row's padding is hidden by
        return False
    most = 0
    for request in requests:
        # What is drawn in pieces goes on from trees that are kept.
        if request.begun or request.length is not None or request.most_tokens is None:
            return False
        most = max(most, request.most_tokens)
    longest = max(len(r.read) for r in requests)
    return most <= MOST_TOKENS and longest + most <= _narrowest(lm)


def _narrowest(lm: LM) -> float:
    """Most tokens that every layer sees: the mask of a step hides nothing of a row's past."""
    config = lm.model.config.get_text_config()
    limits = (getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size"))
    return min(lm.window or float("inf"), *(limit or float("inf") for limit in limits))


def steps_of(
    lm: LM, most: int, found: KeysAndValues, mask: torch.Tensor, owner: torch.Tensor
) -> Steps | None:
    """Steps that go on from prompts; None, with a warning, if they cannot be captured.

    Args:
        lm: the LM, its adapter switched on.
        most: tokens of a string.
        found: keys and values of the prompts, each [prompts, heads, longest, width].
        mask: 1 for tokens, 0 for padding on the left, shape [prompts, longest].
        owner: the prompt of each string, shape [strings].
    """
    rows = max(8, 1 << (len(owner) - 1).bit_length())
    room = -(-(mask.shape[1] + most) // ROOM) * ROOM
    key = (lm.active_adapter, rows, room)
    weights = _weights(lm)
    kept = lm.captured.pop(key, None)
    if kept is not None and kept.weights == weights:
        lm.captured[key] = kept
        kept.load(found, mask, owner)
        return kept
    kept = None  # its memory goes before the next takes its own
    try:
        steps = Steps(lm, rows, room, found)
        steps.weights = weights
        steps.load(found, mask, owner)
        if not _agrees(steps, found, mask, owner):
            raise RuntimeError("its logits differ from those of a plain step")
    except torch.OutOfMemoryError:
        lm.captured.clear()
        return None
    except Exception as error:  # whatever an architecture does that cannot be captured
        lm.captures = False
        warn(
            f"{lm!r} ({type(lm.model).__name__}) cannot decode in captured steps, so its strings "
            f"are drawn in plain ones, which are slower ({type(error).__name__}: "
            f"{str(error)[:200]})",
        )
        return None
    lm.captured[key] = steps
    while len(lm.captured) > 1 and (
        len(lm.captured) > MOST_KEPT or sum(s.bytes for s in lm.captured.values()) > KEPT_BYTES
    ):
        lm.captured.popitem(last=False)
    steps.load(found, mask, owner)
    return steps


def _weights(lm: LM) -> tuple[object, ...]:
    """Where the weights are, and what else is fixed in a graph."""
    return (
        tuple(p.data_ptr() for p in lm.model.parameters()),
        adapters.scales(lm.model, lm.active_adapter),
        adapters.merged(lm.model),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled(lm.device.type),
    )


def _agrees(steps: Steps, found: KeysAndValues, mask: torch.Tensor, owner: torch.Tensor) -> bool:
    """Whether a step's logits are those of a plain pass."""
    lm = steps.lm
    of_string = owner.tolist()
    compared = sorted(set(of_string))[:_COMPARED]
    # Any tokens do, as long as strings of one prompt take the same.
    own = steps.step([p % lm.vocabulary.size for p in of_string])
    lines = torch.tensor([of_string.index(p) for p in compared], device=lm.device)
    used = torch.tensor(compared, device=lm.device)
    ordinary = used % lm.vocabulary.size
    cache = caches.cache_of([(k[used], v[used]) for k, v in found])
    seen = torch.cat([mask[used], mask.new_ones(len(used), 1)], dim=1)
    states, _ = lm.states(
        ordinary[:, None],
        attention_mask=seen,
        position_ids=seen.sum(1, keepdim=True) - 1,
        past_key_values=cache,
        use_cache=True,
    )
    expected = lm.logits_of(states[:, -1]).float()
    most = packed.tolerance(lm.model.dtype)
    gap = (own[lines].float() - expected).abs().max()
    return bool(gap <= most * expected.abs().max())


class Steps:
    """Decoding steps of one shape.

    Args:
        lm: the LM, its adapter switched on.
        rows: strings at once.
        room: tokens of each, prompt included.
        like: keys and values of any pass, whose shapes and types the cache takes.

    Attributes:
        graph: the captured step; None where it runs plainly (not on cuda).
        weights: where the LM's weights were when it was captured.
    """

    def __init__(self, lm: LM, rows: int, room: int, like: KeysAndValues) -> None:
        self.lm, self.rows, self.room = lm, rows, room
        device = lm.device
        self._cache = _cache_type()(
            [tuple(x.new_zeros(rows, x.shape[1], room, x.shape[3]) for x in pair) for pair in like],
            torch.zeros(1, dtype=torch.long, device=device),
        )
        self._ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        assert lm.packs is not None
        self._types = lm.packs.mask_types
        if lm.packs.is_added:
            self._seen, self._unseen = 0.0, torch.finfo(lm.model.dtype).min
            self._mask = torch.full(
                (rows, 1, 1, room), self._unseen, dtype=lm.model.dtype, device=device
            )
        else:
            self._seen, self._unseen = True, False
            self._mask = torch.zeros(rows, 1, 1, room, dtype=torch.bool, device=device)
        self.graph: Any = None
        self.weights: tuple[object, ...] = ()
        self._logits = torch.empty(0)
        if device.type == "cuda":
            self._capture()

    @property
    def bytes(self) -> int:
        """Of the cache."""
        return sum(x.nbytes for pair in self._cache.pairs for x in pair)

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self.lm.device)
        stream.wait_stream(torch.cuda.current_stream(self.lm.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream(self.lm.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A stream of torch's own choice would be the current device's, which need not be the LM's.
        # Other threads may go on with what a capture forbids its own.
        here = torch.cuda.device(self.lm.device)
        with here, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._logits = self._run()
        self.graph = graph

    def load(self, found: KeysAndValues, mask: torch.Tensor, owner: torch.Tensor) -> None:
        """Begins with prompts.

        Args:
            found: their keys and values, each [prompts, heads, longest, width].
            mask: 1 for tokens, 0 for padding on the left, shape [prompts, longest].
            owner: the prompt of each string, shape [strings]; rows beyond take the first prompt.
        """
        longest = mask.shape[1]
        owner = torch.cat([owner, owner.new_zeros(self.rows - len(owner))])
        for kept, new in zip(self._cache.pairs, found, strict=True):
            for buffer, values in zip(kept, new, strict=True):
                buffer[:, :, :longest] = values[owner]
        own = mask[owner].bool()
        self._mask.fill_(self._unseen)
        self._mask[:, 0, 0, :longest].masked_fill_(own, self._seen)
        self._positions.copy_(own.sum(1, keepdim=True) - 1)
        self._cache.place.fill_(longest - 1)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [strings, vocabulary] after one more token each, good until the next step."""
        ids = torch.tensor([[*tokens, *[0] * (self.rows - len(tokens))]]).T
        self._ids.copy_(ids)
        self.lm.tally.add(len(tokens))
        if self.graph is None:
            self._logits = self._run()
        else:
            self.graph.replay()
        return self._logits[: len(tokens)]

    def _run(self) -> torch.Tensor:
        self._positions.add_(1)
        self._cache.place.add_(1)
        self._mask.index_fill_(3, self._cache.place, self._seen)
        mask = dict.fromkeys(self._types, self._mask) if self._types else self._mask
        found, _ = self.lm.states(
            self._ids,
            padding=self.rows,  # counted by `step`
            attention_mask=mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return self.lm.logits_of(found[:, -1])


@functools.cache
def _cache_type() -> type:
    from transformers import DynamicCache  # takes a second to import

    class Fixed(DynamicCache):
        """A KV cache whose tensors stay where they are.

        Args:
            pairs: keys and values of each layer, [rows, heads, room, width].
            place: where the next token goes, shape [1].
        """

        def __init__(
            self, pairs: list[tuple[torch.Tensor, torch.Tensor]], place: torch.Tensor
        ) -> None:
            super().__init__()
            self.pairs, self.place = pairs, place

        def update(
            self,
            key_states: torch.Tensor,
            value_states: torch.Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Writes a token, and gives all there is room for."""
            keys, values = self.pairs[layer_idx]
            keys.index_copy_(2, self.place, key_states)
            values.index_copy_(2, self.place, value_states)
            return keys, values

        def get_seq_length(self, layer_idx: int = 0) -> int:
            """As if there were a single place left."""
            return int(self.pairs[layer_idx][0].shape[2]) - 1

    return Fixed
