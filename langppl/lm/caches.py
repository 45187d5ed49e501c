"""KV caches of one pass after another, each of which goes on from what another held."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from langppl.lm.kept import KeysAndValues


def keys_and_values(cache: Any) -> KeysAndValues:
    """What a KV cache holds, layer by layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(found: KeysAndValues) -> Any:
    """A new KV cache that begins with what another held, and keeps every position."""
    if torch.is_grad_enabled():
        from transformers import DynamicCache

        # Without a config it has no windows.
        cache: Any = DynamicCache()
    else:
        cache = _growing()()
    for layer, (keys, values) in enumerate(found):
        cache.update(keys, values, layer)
    return cache


@functools.cache
def _growing() -> Any:
    from transformers.cache_utils import Cache, DynamicLayer  # takes a second to import

    class Growing(DynamicLayer):
        """Writes behind what it holds, in room for more, so that few tokens cost few copies."""

        room: Tensor | None = None

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                # Another's, perhaps, who may write behind it too: room of its own is made later.
                self.keys, self.values = key_states, value_states
                return key_states, value_states
            keys, values = self.keys, self.values
            assert keys is not None and values is not None
            *outer, held, width = keys.shape
            whole = held + key_states.shape[-2]
            if self.room is None or self.room.shape[-2] < whole:
                self.room = keys.new_empty(2, *outer, 3 * whole // 2, width)
                self.room[0, ..., :held, :] = keys
                self.room[1, ..., :held, :] = values
            self.room[0, ..., held:whole, :] = key_states
            self.room[1, ..., held:whole, :] = value_states
            keys, values = self.room[0, ..., :whole, :], self.room[1, ..., :whole, :]
            self.keys, self.values = keys, values
            return keys, values

    return functools.partial(Cache, layer_class_to_replicate=Growing)
