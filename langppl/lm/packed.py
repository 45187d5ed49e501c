"""The fast route to logits: a token trie in one row, under a mask that shows each node its path.

Every node of the trie (`langppl.lm.trie`) is one token of the row; it sees its ancestors and
itself, and its position is its depth, so its logits are those of its own sequence. The trie is cut
into rows of `lm.node_budget` nodes; what all rows share is run once and read through the KV cache,
with gradients too. Logits are taken only at the nodes that are asked for.

Not every architecture takes such a mask. `probe` finds out once for each LM, by comparing packed
with plain logits on a few made-up tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from langppl.lm.trie import Ids, Row, lay_out

if TYPE_CHECKING:
    from langppl.lm.model import LM

TOLERANCE = 1e-3
"""Largest difference between packed and plain logits, relative to the largest logit."""


@dataclass(frozen=True)
class Packing:
    """How an LM takes a packed row.

    Attributes:
        mask_types: names under which the model expects its masks (Gemma 3), empty for one mask.
        window: longest sequence that every layer reads whole (a sliding window hides the start of
            longer ones, and the mask here does not).
    """

    mask_types: tuple[str, ...]
    window: float


def logits(
    lm: LM, sequences: Sequence[Ids], first: Sequence[int], count: Sequence[int]
) -> Iterator[tuple[torch.Tensor, dict[int, np.ndarray]]]:
    """Logits of an LM at some positions of token sequences.

    Args:
        lm: the LM, its adapter switched on.
        sequences: token ids, none empty.
        first: for each, the first position whose logits are wanted.
        count: for each, how many.

    Yields:
        Logits [n, vocabulary] in the model's float type, and for some of the sequences (by their
        number; each comes once) the n-indices of what they want, shape [count].
    """
    assert lm.packs is not None
    layout = lay_out(sequences, lm.node_budget, min(first))
    stem = None
    if layout.stem:
        stem = keys_and_values(
            lm._call(torch.tensor([layout.stem]), use_cache=True).past_key_values
        )
    for row in layout.rows:
        wanted = {
            k: path[first[k] - len(layout.stem) :][: count[k]] for k, path in row.paths.items()
        }
        nodes = np.unique(np.concatenate(list(wanted.values())))
        if not len(nodes):  # nothing but strings of no actions
            yield torch.zeros(0, lm.vocabulary.size, device=lm.device), wanted
            continue
        cache = None if stem is None else cache_of(stem)
        found = run_row(lm, lm.packs, row, len(layout.stem), nodes, cache)
        yield found, {k: np.searchsorted(nodes, w) for k, w in wanted.items()}


KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]


def keys_and_values(cache: Any) -> KeysAndValues:
    """What a KV cache holds, layer by layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(found: KeysAndValues) -> Any:
    """A new KV cache that begins with what another held."""
    from transformers import DynamicCache

    # Without a config it keeps every position, whatever the layers' own windows.
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(found):
        cache.update(keys, values, layer)
    return cache


def run(
    lm: LM,
    packing: Packing,
    ids: torch.Tensor,
    depth: torch.Tensor,
    seen: torch.Tensor,
    keep: torch.Tensor,
    cache: Any = None,
) -> torch.Tensor:
    """One pass over the nodes of a tree.

    Args:
        lm: the LM, its adapter switched on.
        packing: how it takes the mask.
        ids: token of each node, shape [n].
        depth: position of each, shape [n].
        seen: what each sees of the cache and of the nodes, bool [n, cached + n].
        keep: the nodes whose logits are wanted, shape [kept].
        cache: the KV cache, which grows by the nodes; None to keep none.

    Returns:
        Shape [kept, vocabulary], in the model's float type.
    """
    mask: Any = seen.to(lm.device)[None, None]
    keep = keep.to(lm.device)
    out = lm._call(
        ids[None],
        keep,
        attention_mask=dict.fromkeys(packing.mask_types, mask) if packing.mask_types else mask,
        position_ids=depth.to(lm.device)[None],
        past_key_values=cache,
        use_cache=cache is not None,
    )
    found: torch.Tensor = out.logits[0]
    return found if lm.takes_keep else found[keep]


def run_row(
    lm: LM, packing: Packing, row: Row, stem: int, nodes: np.ndarray, cache: Any = None
) -> torch.Tensor:
    """Logits [nodes, vocabulary] of a row whose stem, so many tokens, is in the cache."""
    ids, depth, seen, keep = (
        torch.from_numpy(a) for a in (row.ids, row.depth, row.mask(stem), nodes)
    )
    return run(lm, packing, ids, depth, seen, keep, cache)


def probe(lm: LM) -> Packing | None:
    """How an LM takes packed rows; None, with a warning, if it does not.

    Compares the logits of a small trie, with and without a stem, with those of its sequences run
    one by one.
    """
    config = lm.model.config.get_text_config()
    types = tuple(sorted(set(getattr(config, "layer_types", None) or ())))
    sliding = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", True)
    window = float(sliding) if sliding and uses else float("inf")
    reason = "its logits differ"
    for mask_types in ((), types) if types else ((),):
        packing = Packing(mask_types, window)
        try:
            if _agrees(lm, packing):
                return packing
        except Exception as error:  # whatever an architecture makes of a mask it does not know
            reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"{lm!r} ({type(lm.model).__name__}) does not take a tree attention mask, so its strings "
        f"are scored in padded batches, which are slower ({reason[:200]})",
        UserWarning,
        stacklevel=4,
    )
    return None


def _agrees(lm: LM, packing: Packing) -> bool:
    rng = np.random.default_rng(0)
    ordinary = np.flatnonzero(~lm.vocabulary.special)
    length = int(min(lm.window or 14, packing.window, 14))
    stem = tuple(int(t) for t in rng.choice(ordinary, max(length - 4, 1)))
    ends = [tuple(int(t) for t in rng.choice(ordinary, 4)) for _ in range(3)]
    sequences = [stem + e for e in [ends[0], ends[1], ends[0][:2] + ends[2][:2]]]
    sequences = [s[:length] for s in sequences]  # all of one length: a batch without padding
    with torch.no_grad(), lm.adapter(None):
        plain = lm._call(torch.tensor(sequences), length).logits[:, -2:].float()
        keys = keys_and_values(lm._call(torch.tensor([stem]), use_cache=True).past_key_values)
        for known in (0, len(stem)):
            (row,) = lay_out([s[known:] for s in sequences], 10**6).rows
            row = Row(row.ids, row.depth + known, row.below, row.paths)
            cache = cache_of(keys) if known else None
            found = run_row(lm, packing, row, known, np.arange(len(row.ids)), cache)
            most = TOLERANCE if found.dtype == torch.float32 else 0.1
            for k, path in row.paths.items():
                own = found[torch.from_numpy(path).to(lm.device)][-2:].float()
                if not bool((own - plain[k]).abs().max() <= most * plain[k].abs().max()):
                    return False
    return True
