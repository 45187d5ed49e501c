"""KV caches of one pass after another, each of which goes on from what another held."""

from __future__ import annotations

import copy
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


def twin(cache: Any) -> Any:
    """A cache of the same keys and values, which goes its own way.

    Layers put new tensors in the place of those they hold, so these need no copies.
    """
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found


@functools.cache
def _growing() -> Any:
    from transformers.cache_utils import Cache, DynamicLayer  # takes a second to import

    class Growing(DynamicLayer):
        """Writes behind what it holds, in room for more, so that few tokens cost few copies."""

        rooms: tuple[Tensor, Tensor] | None = None

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.dtype, self.device = key_states.dtype, key_states.device
                self.is_initialized = True
                # Another's, perhaps, who may write behind it too: room of its own is made later.
                self.keys, self.values = _alone(key_states), _alone(value_states)
                return self.keys, self.values
            new = key_states.shape[-2]
            keys, values, held = self.room(new)
            keys.narrow(-2, held, new).copy_(key_states)
            values.narrow(-2, held, new).copy_(value_states)
            return self.grow(new)

        def room(self, new: int) -> tuple[Tensor, Tensor, int]:
            """Keys and values with room for so many more tokens behind those that it holds.

            Returns:
                Keys and values, and how many tokens of them it holds.
            """
            assert self.keys is not None and self.values is not None
            held = self.keys.shape[-2]
            if self.rooms is None or self.rooms[0].shape[-2] < held + new:
                self.rooms = (
                    _roomier(self.keys, 3 * (held + new) // 2),
                    _roomier(self.values, 3 * (held + new) // 2),
                )
            return *self.rooms, held

        def grow(self, new: int) -> tuple[Tensor, Tensor]:
            """All that it holds, now that so many tokens more have been written."""
            assert self.rooms is not None and self.keys is not None
            keys, values = (x.narrow(-2, 0, self.keys.shape[-2] + new) for x in self.rooms)
            self.keys, self.values = keys, values
            return keys, values

    return functools.partial(Cache, layer_class_to_replicate=Growing)


def _alone(held: Tensor) -> Tensor:
    """A copy of what is a small part of something larger, which would live as long as it does."""
    is_small = 2 * held.numel() * held.element_size() < held.untyped_storage().nbytes()
    return held.clone(memory_format=torch.contiguous_format) if is_small else held


def _roomier(held: Tensor, length: int) -> Tensor:
    room = held.new_empty(*held.shape[:-2], length, held.shape[-1])
    room.narrow(-2, 0, held.shape[-2]).copy_(held)
    return room
