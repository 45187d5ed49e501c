"""The fast route to an LM's states: a token trie in one row, in which each node sees its path.

Every node of the trie (`langppl.lm.trie`) is one token of the row; it sees its ancestors and
itself, and its position is its depth, so its state is that of its own sequence. The trie is cut
into rows of `lm.node_budget` nodes; what all rows share is run once and read through the KV cache,
with gradients too, and so is what a row carries from the one before. A pass with gradients takes
smaller rows (`lm.gradient_node_budget`), and keeps the inner states of the last one alone, which
the backward pass comes to first: each other row is run again when its turn comes, so that memory
stays that of a row, and of the keys and values that are carried.

Attention goes in blocks (`langppl.lm.attention`) or, where an architecture does not take these,
under a dense mask: bool, or numbers that are added to the scores (GPT-J). `probe` finds out once
for each LM which of these gives the logits of plain passes, by comparing them on a few made-up
tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from langppl.lm import attention, kept, lean, products
from langppl.lm.attention import Blocks
from langppl.lm.caches import cache_of, keys_and_values
from langppl.lm.kept import KeysAndValues, Tree
from langppl.lm.lean import Lean
from langppl.lm.recompute import elementwise_again
from langppl.lm.trie import Ids, Row, lay_out, shared
from langppl.warn import warn

if TYPE_CHECKING:
    from langppl.lm.model import LM

TOLERANCES = {"highest": 1e-3, "high": 1e-2, "medium": 0.1}
"""Largest difference between packed and plain logits, relative to the largest logit, by the digits
that torch leaves to float32 products on cuda: float32's, TensorFloat-32's or bfloat16's."""


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative difference between logits that are computed in two ways."""
    is_whole = dtype == torch.float32
    return TOLERANCES[torch.get_float32_matmul_precision() if is_whole else "medium"]


class NotFiniteError(ValueError):
    """An LM gives logits that are no numbers."""


def check_finite(lm: LM, logits: torch.Tensor) -> None:
    """Raises NotFiniteError for NaN and infinity; minus infinity may rule tokens out."""
    if not bool((logits < torch.inf).all()):
        raise NotFiniteError(
            f"{lm!r} ({type(lm.model).__name__}) gives logits that are not finite: some of its "
            f"weights are not, or {lm.model.dtype} is too narrow for it; its files may be damaged"
        )


SAME = 1e-5
"""Largest difference between float32 states that come of the same operations, relative to the
largest state."""

SPARED = 2048
"""Nodes of a row whose inner states an accelerator keeps whole: making some of them again takes
Python longer than the device needs for the row."""


@dataclass(frozen=True)
class Packing:
    """How an LM takes a packed row.

    Attributes:
        in_blocks: whether attention goes in blocks; else under a dense mask.
        mask_types: names under which the model expects its masks (Gemma 3), empty for one mask.
        window: longest sequence that is read as the LM reads it. Under a dense mask it is that of
            the narrowest layer, as a sliding window hides the start of longer ones and the mask
            does not; in blocks, layers that tell their window have it applied.
        is_added: whether a dense mask is one of numbers, added to the attention scores.
    """

    in_blocks: bool
    mask_types: tuple[str, ...]
    window: float
    is_added: bool = False


def states(
    lm: LM, sequences: Sequence[Ids], first: Sequence[int], count: Sequence[int]
) -> Iterator[tuple[torch.Tensor, dict[int, NDArray[Any]]]]:
    """States of an LM at some positions of token sequences.

    Args:
        lm: the LM, its adapter switched on.
        sequences: token ids, none empty.
        first: for each, the first position whose state is wanted.
        count: for each, how many.

    Yields:
        States [n, width] (see `LM.states`), and for some of the sequences (by their number; each
        comes once) the n-indices of what they want, shape [count].
    """
    trees = [] if torch.is_grad_enabled() else kept.trees_of(lm, lm.active_adapter)
    done: set[int] = set()
    for found, wanted in kept.computed(trees, sequences, first, count):
        done |= wanted.keys()
        yield found, wanted
    rest = [k for k in range(len(sequences)) if k not in done]
    if not rest:
        return
    ids = [sequences[k] for k in rest]
    at, many = [first[k] for k in rest], [count[k] for k in rest]
    for found, wanted in _new_states(lm, ids, at, many, trees):
        yield found, {rest[k]: own for k, own in wanted.items()}


def _new_states(
    lm: LM,
    sequences: Sequence[Ids],
    first: Sequence[int],
    count: Sequence[int],
    trees: Sequence[Tree],
) -> Iterator[tuple[torch.Tensor, dict[int, NDArray[Any]]]]:
    """As `states`, by passes over what trees do not know."""
    assert lm.packs is not None
    known = kept.known(trees, sequences, first)
    if known:
        yield from _after_trees(lm, lm.packs, sequences, first, count, known)
        return
    most_stem = min(first)
    budget = lm.node_budget
    if torch.is_grad_enabled():
        # The stem stands in none of the rows: a long one should not leave them without room.
        stem_length = min(shared(min(sequences), max(sequences)), most_stem)
        budget = min(budget, lm.gradient_node_budget + stem_length)
    layout = lay_out(sequences, budget, most_stem)
    stem: KeysAndValues | None = None
    if layout.stem:
        # The LM's own cache would drop what lies before a sliding window.
        ids = torch.tensor([layout.stem])
        stem = keys_and_values(lm.states(ids, past_key_values=cache_of([]), use_cache=True)[1])
    wanted = [
        {k: path[first[k] - len(layout.stem) :][: count[k]] for k, path in row.paths.items()}
        for row in layout.rows
    ]
    adapter, packing = lm.active_adapter, lm.packs

    def passed(row: Row, nodes: NDArray[Any], carried: Sequence[KeysAndValues]) -> _Passed:
        way = functools.partial(
            _row_states, lm, packing, row, layout.stem, nodes, stem, carried, adapter
        )
        if not torch.is_grad_enabled():
            return way()
        if row is not layout.rows[-1]:
            found: _Passed = checkpoint(way, use_reentrant=False)
            return found
        return way(spares=lm.device.type == "cpu" or len(row.ids) - row.carried > SPARED)

    yield from _in_turn(lm, layout.rows, wanted, passed)


_Passed = tuple[torch.Tensor, KeysAndValues]
"""The states of a row's nodes, and keys and values of what it hands on and did not get itself."""


def _in_turn(
    lm: LM,
    rows: Sequence[Row],
    wanted: Sequence[dict[int, NDArray[Any]]],
    passed: Callable[[Row, NDArray[Any], Sequence[KeysAndValues]], _Passed],
) -> Iterator[tuple[torch.Tensor, dict[int, NDArray[Any]]]]:
    """The states of rows that may go on from each other.

    Args:
        lm: the LM.
        rows: the rows.
        wanted: for each, of its sequences, the nodes whose states are wanted.
        passed: runs a row, given those of its nodes whose states are wanted and keys and values of
            the nodes that it carries, in stretches.

    Yields:
        As `states`.
    """
    needed: list[NDArray[Any]] = []
    later = np.zeros(0, dtype=np.int64)
    for row, own in zip(reversed(rows), reversed(wanted), strict=True):
        later = np.unique(np.concatenate([row.handed[later], *own.values()])).astype(np.int64)
        needed.append(later)
        later = later[later < row.carried]
    needed.reverse()

    # Stretches are views of what one row made: rows whose graphs are kept share them.
    carried: list[KeysAndValues] = []
    known: torch.Tensor | None = None
    for number, (row, nodes, own) in enumerate(zip(rows, needed, wanted, strict=True)):
        if not len(nodes) and not len(row.handed):  # nothing but strings of no actions
            yield torch.zeros(0, 1, dtype=torch.float32, device=lm.device), own
            carried, known = [], None
            continue
        fresh = nodes[nodes >= row.carried]
        found, made = passed(row, fresh, carried)
        if known is not None and len(fresh) < len(nodes):
            found = torch.cat([known, found]) if len(fresh) else known
        if own:
            yield found, {k: np.searchsorted(nodes, w) for k, w in own.items()}
        # Nodes that stand for those of a tree have no keys and values of their own.
        on = row.handed[row.handed < row.carried]
        carried = _handed(carried, made, int((row.ids[on] >= 0).sum()))
        if number + 1 < len(rows):
            on = needed[number + 1]
            on = row.handed[on[on < rows[number + 1].carried]]
            known = found[torch.from_numpy(np.searchsorted(nodes, on)).to(found.device)]


def _handed(
    carried: Sequence[KeysAndValues], made: KeysAndValues, count: int
) -> list[KeysAndValues]:
    """The first keys and values, so many, of what a row carries, and those that it adds."""
    found: list[KeysAndValues] = []
    for part in carried:
        most = min(count, part[0][0].shape[-2])
        if most:
            found.append([(k.narrow(-2, 0, most), v.narrow(-2, 0, most)) for k, v in part])
        count -= most
    return [*found, made] if made else found


def _cache_of_all(parts: Sequence[KeysAndValues]) -> Any:
    """A KV cache that holds these, one after the other."""
    if len(parts) < 2:
        return cache_of(parts[0] if parts else [])
    return cache_of(
        [
            (torch.cat([k for k, _ in layer], dim=-2), torch.cat([v for _, v in layer], dim=-2))
            for layer in zip(*parts, strict=True)
        ]
    )


def _made(cache: Any, places: NDArray[Any]) -> KeysAndValues:
    """Keys and values at some places of a cache; empty for none."""
    if not len(places):
        return []
    at = torch.from_numpy(places)
    return [
        (k.index_select(-2, at.to(k.device)), v.index_select(-2, at.to(v.device)))
        for k, v in keys_and_values(cache)
    ]


def _after_trees(
    lm: LM,
    packing: Packing,
    sequences: Sequence[Ids],
    first: Sequence[int],
    count: Sequence[int],
    known: Sequence[tuple[Tree, list[int]]],
) -> Iterator[tuple[torch.Tensor, dict[int, NDArray[Any]]]]:
    """The states of sequences that begin with nodes of trees whose keys and values are kept."""
    groups: dict[int, tuple[Tree, list[int]]] = {}
    for k, (tree, _) in enumerate(known):
        groups.setdefault(id(tree), (tree, []))[1].append(k)
    for tree, members in groups.values():
        # A node of the tree takes the place of all tokens that lead to it.
        paths = [known[k][1] for k in members]
        rest = [
            (-1 - path[-1], *sequences[k][len(path) :]) if path else sequences[k]
            for k, path in zip(members, paths, strict=True)
        ]
        skipped = [len(path) - 1 if path else 0 for path in paths]
        rows = lay_out(rest, lm.node_budget, 0).rows
        wanted = [
            {
                members[m]: path[first[members[m]] - skipped[m] :][: count[members[m]]]
                for m, path in row.paths.items()
            }
            for row in rows
        ]
        yield from _in_turn(lm, rows, wanted, functools.partial(_row_after, lm, packing, tree))


def _row_after(
    lm: LM,
    packing: Packing,
    tree: Tree,
    row: Row,
    nodes: NDArray[Any],
    carried: Sequence[KeysAndValues],
) -> _Passed:
    """Runs a row whose sequences begin with nodes of a tree, see `_in_turn`."""
    new = kept.branches(tree, row)
    held, before = len(tree.parents), new.carried
    if len(new.ids) == before:  # nodes of the tree alone
        return torch.zeros(0, 1, dtype=torch.float32, device=lm.device), []
    depth = np.concatenate([tree.depth, new.depth])
    seen = seen_by(lm, packing, new.seen[before:], new.depth[before:], depth, attention.BLOCK)
    keep = new.place[nodes] - before
    ids, at, keep = (torch.from_numpy(a) for a in (new.ids[before:], new.depth[before:], keep))
    cache = _cache_of_all([tree.keys, *carried])
    found = run(lm, packing, ids, at, seen, keep, cache)
    handed = row.handed[(row.handed >= row.carried) & (row.ids[row.handed] >= 0)]
    return found, _made(cache, held + new.place[handed])


def seen_by(
    lm: LM,
    packing: Packing,
    seen: NDArray[Any],
    query_depth: NDArray[Any],
    key_depth: NDArray[Any],
    size: int,
) -> Blocks | torch.Tensor:
    """What nodes in any order see, bool [n, cached + n], as `run` takes it."""
    if packing.in_blocks:
        return attention.of_mask(seen, query_depth, key_depth, lm.device, size)
    return torch.from_numpy(seen)


def _row_states(
    lm: LM,
    packing: Packing,
    row: Row,
    stem: Ids,
    nodes: NDArray[Any],
    known: KeysAndValues | None,
    carried: Sequence[KeysAndValues],
    adapter: str | None,
    spares: bool = False,
) -> _Passed:
    # Run again in a backward pass, it finds the LM without its adapter.
    with lm.adapter(adapter), products.unchanged(), contextlib.ExitStack() as stack:
        # Compiled layers keep little already.
        if spares and not (packing.in_blocks and _is_lean(lm)):
            stack.enter_context(elementwise_again(lm.model))
        parts = [part for part in (known, *carried) if part is not None]
        cache = _cache_of_all(parts) if parts or len(row.handed) else None
        found = run_row(lm, packing, row, len(stem), nodes, cache)
        handed = row.handed[row.handed >= row.carried]
        return found, _made(cache, len(stem) + handed)


def _is_lean(lm: LM) -> bool:
    """Whether a pass in blocks runs layers taken apart (`langppl.lm.lean`)."""
    if lm.lean is None or not lm.splits_head:
        return False
    return lm.lean.trains() if torch.is_grad_enabled() else lm.lean.suits()


def run(
    lm: LM,
    packing: Packing,
    ids: torch.Tensor,
    depth: torch.Tensor,
    seen: Blocks | torch.Tensor,
    keep: torch.Tensor,
    cache: Any = None,
) -> torch.Tensor:
    """One pass over the nodes of a tree.

    Args:
        lm: the LM, its adapter switched on.
        packing: how it takes the mask.
        ids: token of each node, shape [n].
        depth: position of each, shape [n].
        seen: what each sees of the cache and of the nodes: blocks, or bool [n, cached + n].
        keep: the nodes whose states are wanted, shape [kept].
        cache: the KV cache, which grows by the nodes; None to keep none.

    Returns:
        States, shape [kept, width].
    """
    if isinstance(seen, Blocks):
        if lm.lean is not None and _is_lean(lm):
            lm.tally.add(len(ids))
            return lm.lean.states(ids, depth, seen, keep, cache)
        # No layer reads this mask, but with it transformers makes none of its own.
        mask: Any = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=lm.device)
        way: contextlib.AbstractContextManager[None] = attention.in_blocks(lm.model, seen)
    else:
        mask, way = seen.to(lm.device)[None, None], contextlib.nullcontext()
        if packing.is_added:
            unseen = torch.finfo(lm.model.dtype).min
            mask = torch.zeros_like(mask, dtype=lm.model.dtype).masked_fill_(~mask, unseen)
    with way:
        found, _ = lm.states(
            ids[None],
            keep,
            attention_mask=dict.fromkeys(packing.mask_types, mask) if packing.mask_types else mask,
            position_ids=depth.to(lm.device)[None],
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return found[0]


def run_row(
    lm: LM, packing: Packing, row: Row, stem: int, nodes: NDArray[Any], cache: Any = None
) -> torch.Tensor:
    """States [nodes, width] of a row whose stem, so many tokens, and what it carries are cached."""
    if packing.in_blocks:
        seen: Blocks | torch.Tensor = attention.of_row(row, stem, lm.device)
    else:
        seen = torch.from_numpy(row.mask(stem))
    at = row.carried
    arrays = (row.ids[at:], row.depth[at:], nodes - at)
    ids, depth, keep = (torch.from_numpy(a) for a in arrays)
    return run(lm, packing, ids, depth, seen, keep, cache)


def run_in_pieces(
    lm: LM, packing: Packing, row: Row, nodes: NDArray[Any], cache: Any, most: int
) -> torch.Tensor:
    """States [nodes, width] of a row that is run in passes of so many nodes, and put in a cache.

    Args:
        lm: the LM, its adapter switched on.
        packing: how it takes the mask.
        row: the row.
        nodes: those whose states are wanted, sorted.
        cache: the KV cache, empty; it grows by all nodes.
        most: nodes of a pass.
    """
    found = []
    for piece in row.pieces(most):
        own = nodes[(nodes >= piece.carried) & (nodes < len(piece.ids))]
        found.append(run_row(lm, packing, piece, 0, own, cache))
    return torch.cat(found)


def probe(lm: LM) -> Packing | None:
    """How an LM takes packed rows; None, with a warning, if it does not.

    Compares the logits of a small trie, with and without a stem, with those of its sequences run
    one by one.
    """
    config = lm.model.config.get_text_config()
    types = tuple(sorted(set(getattr(config, "layer_types", None) or ())))
    sliding = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", True)
    narrowest = int(sliding) if sliding and uses else None
    # Chunks are no windows: the blocks do not know them, so what is longer than one is padded.
    chunk = getattr(config, "attention_chunk_size", None)
    reason = "its logits differ"
    if any(b.dtype == torch.bool and b.ndim == 4 for b in lm.model.buffers()):
        _warn(lm, "it masks by the place in a row")
        return None
    for in_blocks, is_added in ((True, False), (False, False), (False, True)):
        for mask_types in ((), types) if types else ((),):
            window = min(float(narrowest or "inf"), float(chunk or "inf"))
            packing = Packing(in_blocks, mask_types, window, is_added)
            try:
                windows = _agrees(lm, packing)
            except NotFiniteError:
                raise
            except Exception as error:  # whatever an architecture makes of what it does not know
                reason = f"{type(error).__name__}: {error}"
                continue
            if windows is None:
                continue
            found = narrowest in windows
            return replace(packing, window=float(chunk or "inf")) if found else packing
    _warn(lm, reason)
    return None


def _warn(lm: LM, reason: str) -> None:
    warn(
        f"{lm!r} ({type(lm.model).__name__}) does not take a tree attention mask, so its strings "
        f"are scored in padded batches, which are slower ({reason[:200]})",
    )


def lean_of(lm: LM) -> Lean | None:
    """A model's layers taken apart (`langppl.lm.lean`), if these give the same states."""
    found = lean.of_model(lm.model)
    if found is None or lm.packs is None or not (lm.packs.in_blocks and lm.splits_head):
        return None
    stem, sequences = _made_up(lm, lm.packs)
    (row,) = lay_out([s[len(stem) :] for s in sequences], 10**6).rows
    row = Row(row.ids, row.depth + len(stem), row.below, row.paths)
    passes = []
    try:
        with torch.no_grad(), lm.adapter(None):
            keys = keys_and_values(lm.states(torch.tensor([stem]), use_cache=True)[1])
            for way in (None, found):
                lm.lean = way
                cache = cache_of(keys)
                states = run_row(lm, lm.packs, row, len(stem), np.arange(len(row.ids)), cache)
                passes.append([states, *(x for pair in keys_and_values(cache) for x in pair)])
    except Exception:  # whatever a model makes of it: its own layers do
        return None
    finally:
        lm.lean = None
    most = SAME if lm.model.dtype == torch.float32 else tolerance(lm.model.dtype)
    same = all(
        bool((own - of_model).abs().max() <= most * of_model.abs().max())
        for of_model, own in zip(*passes, strict=True)
    )
    return found if same else None


def _made_up(lm: LM, packing: Packing) -> tuple[Ids, list[Ids]]:
    """A stem of tokens, and three sequences that begin with it, all of one length."""
    rng = np.random.default_rng(0)
    ordinary = np.flatnonzero(~lm.vocabulary.special)
    length = int(min(lm.window or 14, packing.window, 14))
    stem = tuple(int(t) for t in rng.choice(ordinary, max(length - 4, 1)))
    ends = [tuple(int(t) for t in rng.choice(ordinary, 4)) for _ in range(3)]
    sequences = [stem + e for e in [ends[0], ends[1], ends[0][:2] + ends[2][:2]]]
    return stem, [s[:length] for s in sequences]


def _agrees(lm: LM, packing: Packing) -> set[int] | None:
    """The sliding windows that were applied; None if packed and plain logits differ."""
    stem, sequences = _made_up(lm, packing)  # of one length: a batch without padding
    windows: set[int] = set()
    with torch.no_grad(), lm.adapter(None):
        plain = lm.model(input_ids=torch.tensor(sequences, device=lm.device), use_cache=False)
        check_finite(lm, plain.logits)
        expected = plain.logits[:, -2:].float()
        keys = keys_and_values(lm.states(torch.tensor([stem]), use_cache=True)[1])
        for known in (0, len(stem)):
            (row,) = lay_out([s[known:] for s in sequences], 10**6).rows
            row = Row(row.ids, row.depth + known, row.below, row.paths)
            cache = cache_of(keys) if known else None
            with attention.watched(windows):
                own = run_row(lm, packing, row, known, np.arange(len(row.ids)), cache)
            found = lm.logits_of(own)
            most = tolerance(found.dtype)
            for k, path in row.paths.items():
                last = found[torch.from_numpy(path).to(lm.device)][-2:].float()
                if not bool((last - expected[k]).abs().max() <= most * expected[k].abs().max()):
                    return None
    return windows
