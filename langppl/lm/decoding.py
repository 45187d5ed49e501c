"""Decoding: strings drawn token by token, many at once, with the past kept in a KV cache.

Short strings grow as one tree in a single row, whose KV cache holds every token once; else each
distinct prompt is encoded once and its cache row repeated. Rows that are finished leave the batch.
On cuda, steps of short strings are captured (`langppl.lm.captured`). Each row walks its own rules.
A token is drawn by inverse CDF from one uniform number that depends on the row's key and the
token's place alone, so the draws do not depend on the batch (up to rounding in the model).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from langppl.lm import caches, captured, guided, kept, packed, products
from langppl.lm.growing import (
    Draft,
    Encoded,
    choose,
    most_nodes,
    run_tree,
    step_padded,
    tree_room,
)
from langppl.lm.kept import Tree
from langppl.lm.reading import logit_bytes
from langppl.lm.requests import DrawReply, DrawRequest
from langppl.lm.trie import Row, row_of, shared

if TYPE_CHECKING:
    from langppl.lm.model import LM


PACKED_ROWS = 256
"""Most strings that grow in one tree, whose cache keeps the tokens of finished ones too."""

PLANNED_LENGTH = 64
"""Tokens that a string is first expected to need; a longer one may be put off and drawn anew."""

LONG_PROMPT = 256
"""Tokens of a prompt from which on strings that take several batches share these with no others:
reading it again would cost more than a batch that is not full."""


def draw(requests: Sequence[DrawRequest]) -> list[DrawReply]:
    """Draws one string for each request.

    Args:
        requests: strings of one LM under one adapter, all of them guided (those with one adapter
            beside) or none.

    Returns:
        One reply for each request, in their order.

    Raises:
        ValueError: if what a string has begun with is longer than it may be, breaks its rules or
            ends it.
    """
    if not requests:
        return []
    lm, adapter = requests[0].lm, requests[0].adapter
    full = [k for k, r in enumerate(requests) if r.most_tokens is not None and r.most_tokens < 1]
    replies = {k: Draft(requests[k]).reply() for k in full}
    order = sorted(
        (k for k in range(len(requests)) if k not in replies),
        key=lambda k: (len(requests[k].read), requests[k].read),
    )
    planned, known = PLANNED_LENGTH, Encoded(lm)
    with torch.no_grad(), lm.adapter(adapter), lm.tally.drawing(), products.unchanged():
        if requests[0].beside is not None and order:
            drawn = guided.draw(lm, [requests[k] for k in order])
            replies.update(zip(order, drawn, strict=True))
            order = []
        while order:
            unfinished: list[int] = []
            for batch, tree in _batches(lm, requests, order, planned):
                found = _draw(lm, [requests[k] for k in batch], tree, known)
                for k, reply in zip(batch, found, strict=True):
                    if reply is None:
                        unfinished.append(k)
                    else:
                        replies[k] = reply
            order, planned = unfinished, 4 * planned
    return [replies[k] for k in range(len(requests))]


def _batches(
    lm: LM, requests: Sequence[DrawRequest], order: Sequence[int], planned: int
) -> Iterator[tuple[list[int], Tree | None]]:
    """Requests that are drawn together, and the kept tree from which they go on, if any.

    They fit the token budget if no string is longer than planned.
    """
    rest = set(order)
    for tree, members in _kept_trees(lm, requests, order):
        most = max(requests[k].most_tokens or 1 for k in members)
        rows = max(1, min(PACKED_ROWS, lm.token_budget // most))
        yield from ((members[at : at + rows], tree) for at in range(0, len(members), rows))
        rest.difference_update(members)
    if lm.packs is not None and lm.device.type == "cpu":
        short = [k for k in rest if _is_short(lm, requests[k])]
        for batch in _tree_batches(lm, requests, sorted(short, key=lambda k: requests[k].read)):
            # A long prompt of one string is cheaper in a plain pass.
            if len(batch) > 1 or len(requests[batch[0]].read) <= tree_room(lm):
                yield batch, None
                rest.difference_update(batch)
    padded = [k for k in order if k in rest]
    for batch in _padded_batches(lm, requests, padded, planned):
        yield batch, None


def _padded_batches(
    lm: LM, requests: Sequence[DrawRequest], order: Sequence[int], planned: int
) -> Iterator[list[int]]:
    """Requests whose rows, padded, fit the token budget; those of a long prompt stay together."""
    lengths = {
        k: len(requests[k].read) + min(planned, requests[k].most_tokens or planned) for k in order
    }
    batch: list[int] = []
    longest = 0
    for read, group in itertools.groupby(order, key=lambda k: requests[k].read):
        members = list(group)
        width = max(lengths[k] for k in members)
        is_long = len(read) >= LONG_PROMPT
        together = (len(batch) + len(members)) * max(longest, width)
        if batch and is_long and together > lm.token_budget:
            yield batch
            batch, longest = [], 0
        for k in members:
            if batch and (len(batch) + 1) * max(longest, lengths[k]) > lm.token_budget:
                yield batch
                batch, longest = [], 0
            batch.append(k)
            longest = max(longest, lengths[k])
        if is_long and len(members) * width > lm.token_budget:
            yield batch
            batch, longest = [], 0
    if batch:
        yield batch


def _kept_trees(
    lm: LM, requests: Sequence[DrawRequest], order: Sequence[int]
) -> list[tuple[Tree, list[int]]]:
    """Strings that have begun, by the kept tree that holds what they read, but perhaps its end."""
    begun = [k for k in order if requests[k].begun and _is_short(lm, requests[k])]
    reads = [requests[k].read for k in begun]
    groups: dict[tuple[int, bool], tuple[Tree, list[int]]] = {}
    trees = kept.trees_of(lm, lm.active_adapter)
    known = kept.known(trees, reads, [len(r) for r in reads])
    for k, read, (tree, path) in zip(begun, reads, known, strict=bool(known)):
        # Strings whose last token has to be run would have all others' run with them.
        if len(path) >= max(len(read) - 1, 1):
            key = (id(tree), len(path) == len(read))
            groups.setdefault(key, (tree, []))[1].append(k)
    return list(groups.values())


def _tree_batches(
    lm: LM, requests: Sequence[DrawRequest], order: Sequence[int]
) -> Iterator[list[int]]:
    """Requests whose prompts grow as one tree: what these share counts once.

    Args:
        lm: the LM.
        requests: of all strings.
        order: those that are short, sorted by what is read before them.
    """
    batch: list[int] = []
    nodes = longest = 0
    for k in order:
        read = requests[k].read
        new = len(read)
        if batch:
            new -= shared(requests[batch[-1]].read, read)
            if nodes + new > most_nodes(lm, max(longest, len(read))):
                yield batch
                batch, nodes, longest, new = [], 0, 0, len(read)
        batch.append(k)
        nodes, longest = nodes + new, max(longest, len(read))
    if batch:
        yield batch


def _is_short(lm: LM, request: DrawRequest) -> bool:
    """Whether a string can grow in a tree.

    A tree cannot put off what outgrows the budget, nor hide what a narrow window would.
    """
    most = request.most_tokens
    return (
        lm.packs is not None
        and most is not None
        and most <= PLANNED_LENGTH
        and len(request.read) + most <= lm.packs.window
    )


def _draw(
    lm: LM, requests: Sequence[DrawRequest], tree: Tree | None, known: Encoded
) -> list[DrawReply | None]:
    """Draws strings together; None for those put off because the batch outgrew the budget.

    Args:
        lm: the LM.
        requests: the strings.
        tree: where they go on from.
        known: the last prompt that was encoded by itself.
    """
    if lm.packs is not None and tree is not None:
        return _draw_on(lm, lm.packs, requests, tree)
    if captured.takes(lm, requests):
        found = _draw_captured(lm, requests, known)
        if found is not None:
            return found
    if lm.packs is not None and len(requests) > 1 and all(_is_short(lm, r) for r in requests):
        prompts = sorted({r.read for r in requests})
        row = row_of(prompts)
        if len(row.ids) <= most_nodes(lm, max(map(len, prompts))):
            return _draw_packed(lm, lm.packs, requests, prompts, row)
    return _draw_padded(lm, requests, known)


def _draw_packed(
    lm: LM,
    packing: packed.Packing,
    requests: Sequence[DrawRequest],
    prompts: Sequence[tuple[int, ...]],
    row: Row,
) -> list[DrawReply | None]:
    """Draws strings as one growing tree: the prompts' KV cache is kept once, never repeated.

    Args:
        lm: the LM.
        packing: how it takes the tree's mask.
        requests: the strings.
        prompts: their different prompts, with what they have begun with.
        row: the trie of these.
    """
    leaves = np.unique([path[-1] for path in row.paths.values()])
    place = {prompts[k]: int(np.searchsorted(leaves, p[-1])) for k, p in row.paths.items()}
    cache = caches.cache_of([])
    states = packed.run_in_pieces(lm, packing, row, leaves, cache, tree_room(lm))
    logits = lm.logits_of(states)
    seen = row.seen_by(leaves)
    keys = caches.keys_and_values(cache)
    replies: list[DrawReply | None] = []
    for part in _parts(lm, requests):
        strings = [Draft(r) for r in part]
        at = np.array([place[s.request.read] for s in strings])
        of_first = logits[torch.from_numpy(at).to(lm.device)]
        tree = Tree.of_row(row)
        tree.note(lm, leaves.tolist(), states)
        own = caches.cache_of(keys)
        _grow(lm, packing, strings, of_first, seen[at], tree, leaves[at].tolist(), own)
        # Of a guide's draws, those that are to go on from where they stop.
        if lm.active_adapter is None or any(s.request.length is not None for s in strings):
            kept.keep(lm, tree, caches.keys_and_values(own))
        replies += [s.reply() for s in strings]
    return replies


def _parts(lm: LM, requests: Sequence[DrawRequest]) -> Iterator[list[DrawRequest]]:
    """Strings whose tokens are in a tree together: they fit the token budget."""
    part: list[DrawRequest] = []
    drawn = 0
    for request in requests:
        most = request.most_tokens or 0
        if part and (len(part) == PACKED_ROWS or drawn + most > lm.token_budget):
            yield part
            part, drawn = [], 0
        part.append(request)
        drawn += most
    yield part


def _draw_on(
    lm: LM, packing: packed.Packing, requests: Sequence[DrawRequest], tree: Tree
) -> list[DrawReply | None]:
    """Draws strings on from where a tree's stopped, beginning with the states that it left there.

    Strings that have begun with the same tokens share these by reference.

    Args:
        lm: the LM.
        packing: how it takes the tree's mask.
        requests: the strings.
        tree: it holds all that the LM reads before them, or all but the last tokens, which are then
            run first; it grows with them.
    """
    strings = [Draft(r) for r in requests]
    reads = [r.read for r in requests]
    # If this is broken off, nodes without keys are in no tree that is kept.
    kept.forget(lm, tree)
    paths = {r: tree.path(r) for r in set(reads)}
    is_run = all(len(p) == len(r) and p[-1] in tree.places for r, p in paths.items())
    if not is_run:
        paths = {r: path[: len(r) - 1] for r, path in paths.items()}
    seen: NDArray[Any] = np.zeros((len(requests), len(tree.parents)), dtype=bool)
    for line, read in enumerate(reads):
        seen[line, paths[read]] = True
    cache = caches.cache_of(tree.keys)
    last = [paths[read][-1] for read in reads]
    if is_run:
        states = tree.states(np.array([tree.places[node] for node in last]))
    else:
        states, seen, last = run_tree(lm, packing, [r[-1] for r in reads], seen, tree, last, cache)
    _grow(lm, packing, strings, lm.logits_of(states), seen, tree, last, cache)
    kept.keep(lm, tree, caches.keys_and_values(cache))
    return [s.reply() for s in strings]


def _grow(
    lm: LM,
    packing: packed.Packing,
    rows: Sequence[Draft],
    logits: torch.Tensor,
    seen: NDArray[Any],
    tree: Tree,
    last: list[int],
    cache: Any,
) -> None:
    """Draws rows to their ends.

    Of a row that is to go on later the last token is run too, where its state can be kept: what
    comes next is drawn, or asked for, from that.

    Args:
        lm: the LM.
        packing: how it takes the tree's mask.
        rows: the rows.
        logits: of each row's first token, shape [rows, vocabulary].
        seen: what of the cache each row sees, bool [rows, cached].
        tree: what is in the cache; it grows with it.
        last: the node of each row's last token.
        cache: the KV cache of one batch row, which all rows share.
    """
    alive = list(rows)
    of_next: Iterable[torch.Tensor] = [logits]
    most = max(1, logit_bytes(lm.device) // (4 * lm.vocabulary.size))
    while True:
        chosen: list[int | None] = []
        for part in of_next:
            chosen += choose(alive[len(chosen) :][: len(part)], part)
        going = [
            line
            for line, (row, token) in enumerate(zip(alive, chosen, strict=True))
            if token is not None or (row.is_paused and lm.splits_head)
        ]
        if not going:
            return
        if len(going) < len(alive):
            seen = seen[going]
            alive = [alive[line] for line in going]
        before = [last[line] for line in going]
        tokens = [row.ids[-1] for row in alive]
        states, seen, last = run_tree(lm, packing, tokens, seen, tree, before, cache)
        going = [line for line, row in enumerate(alive) if not row.is_paused]
        if not going:
            return
        if len(going) < len(alive):
            states, seen = states[torch.tensor(going, device=lm.device)], seen[going]
            last = [last[line] for line in going]
            alive = [alive[line] for line in going]
        of_next = map(lm.logits_of, states.split(most))


def _draw_captured(
    lm: LM, requests: Sequence[DrawRequest], known: Encoded
) -> list[DrawReply | None] | None:
    """Draws strings in captured steps; None if the LM does not take these."""
    replies: list[DrawReply | None] = []
    for first in range(0, len(requests), captured.MOST_ROWS):
        rows = [Draft(r) for r in requests[first : first + captured.MOST_ROWS]]
        states, cache, mask, owner = known.encode([r.request.read for r in rows])
        most = max(r.request.most_tokens or 0 for r in rows)
        found = caches.keys_and_values(cache)
        steps = captured.steps_of(lm, most, found, mask, owner)
        if steps is None:
            return None
        logits = lm.logits_of(states)[owner]
        alive = list(range(len(rows)))
        tokens = [0] * len(rows)
        while True:
            of_alive = logits
            if len(alive) < len(rows):
                of_alive = logits[torch.tensor(alive, device=lm.device)]
            chosen = choose([rows[k] for k in alive], of_alive)
            for k, token in zip(alive, chosen, strict=True):
                tokens[k] = token or 0
            alive = [k for k, token in zip(alive, chosen, strict=True) if token is not None]
            if not alive:
                break
            logits = steps.step(tokens)
        replies += [row.reply() for row in rows]
    return replies


def _draw_padded(lm: LM, requests: Sequence[DrawRequest], known: Encoded) -> list[DrawReply | None]:
    """Draws strings as rows of a batch, each with a cache of its own."""
    rows = [Draft(r) for r in requests]
    states, cache, mask, owner = known.encode([r.read for r in requests])
    cache.batch_select_indices(owner)
    logits, mask = lm.logits_of(states)[owner], mask[owner]

    put_off: set[int] = set()
    alive = list(range(len(rows)))  # row of each line of the batch
    while True:
        chosen = choose([rows[k] for k in alive], logits)
        going = [line for line, token in enumerate(chosen) if token is not None]
        # Draws depend on their keys alone, so one put off comes out the same when drawn anew.
        room = max(1, lm.token_budget // (mask.shape[1] + 1))
        put_off.update(alive[line] for line in going[room:])
        going = going[:room]
        if not going:
            return [None if k in put_off else row.reply() for k, row in enumerate(rows)]
        if len(going) < len(alive):
            lines = torch.tensor(going, device=lm.device)
            cache.batch_select_indices(lines)
            mask = mask[lines]
            alive = [alive[line] for line in going]
        tokens = torch.tensor([[chosen[line]] for line in going], device=lm.device)
        states, mask, cache = step_padded(lm, tokens, mask, cache)
        logits = lm.logits_of(states)
