"""Decoding: strings drawn token by token, many at once, with the past kept in a KV cache.

Strings with few and short prompts grow as one tree in a single row, whose KV cache holds every
token once; else each distinct prompt is encoded once and its cache row repeated. Rows that are
finished leave the batch. On cuda, steps of short strings are captured (`langppl.lm.captured`). Each
row walks its own rules. A token is drawn by inverse CDF from one uniform number that depends on the
row's key and the token's place alone, so the draws do not depend on the batch (up to rounding in
the model).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from langppl.lm import caches, captured, kept, packed, products
from langppl.lm.inverse_cdf import by_inverse_cdf
from langppl.lm.kept import Tree
from langppl.lm.reading import logit_bytes
from langppl.lm.requests import DrawReply, DrawRequest
from langppl.lm.rules import COLDEST, State, Step
from langppl.lm.seeds import generator
from langppl.lm.trie import Row, lay_out, shared

if TYPE_CHECKING:
    from langppl.lm.model import LM


PACKED_ROWS = 256
"""Most strings that grow in one tree, whose cache keeps the tokens of finished ones too."""

BLOCK = 8
"""Strings whose attention goes together: each looks through the tokens of all of them."""

PLANNED_LENGTH = 64
"""Tokens that a string is first expected to need; a longer one may be put off and drawn anew."""


def draw(requests: Sequence[DrawRequest]) -> list[DrawReply]:
    """Draws one string for each request.

    Args:
        requests: strings of one LM under one adapter.

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
    replies = {k: _Row(requests[k]).reply() for k in full}
    order = sorted(
        (k for k in range(len(requests)) if k not in replies),
        key=lambda k: (len(requests[k].read), requests[k].read),
    )
    planned = PLANNED_LENGTH
    with torch.no_grad(), lm.adapter(adapter), lm.tally.drawing(), products.unchanged():
        while order:
            unfinished: list[int] = []
            for batch, tree in _batches(lm, requests, order, planned):
                found = _draw(lm, [requests[k] for k in batch], tree)
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
            yield batch, None
        rest.difference_update(short)
    batch = []
    longest = 0
    for k in (k for k in order if k in rest):
        limit = requests[k].most_tokens
        length = len(requests[k].read) + (planned if limit is None else min(limit, planned))
        if batch and (len(batch) + 1) * max(longest, length) > lm.token_budget:
            yield batch, None
            batch, longest = [], 0
        batch.append(k)
        longest = max(longest, length)
    if batch:
        yield batch, None


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
    """Requests that grow as one tree: what their prompts share counts once.

    Args:
        lm: the LM.
        requests: of all strings.
        order: those that are short, sorted by what is read before them.
    """
    batch: list[int] = []
    nodes = drawn = 0
    for k in order:
        read, most = requests[k].read, requests[k].most_tokens or 0
        if batch:
            new = len(read) - shared(requests[batch[-1]].read, read)
            if nodes + new > _tree_room(lm) or drawn + most > lm.token_budget:
                yield batch
                batch = []
        if not batch:
            nodes, drawn, new = 0, 0, len(read)
        batch.append(k)
        nodes, drawn = nodes + new, drawn + most
    if batch:
        yield batch


def _tree_room(lm: LM) -> int:
    """Most nodes of the prompts in a tree, which are one row."""
    return min(lm.node_budget, lm.token_budget)


def _is_short(lm: LM, request: DrawRequest) -> bool:
    """Whether a string can grow in a tree.

    A tree cannot put off what outgrows the budget, nor hide what a narrow window would; and a long
    prompt is cheaper in a plain pass.
    """
    most = request.most_tokens
    return (
        lm.packs is not None
        and most is not None
        and most <= PLANNED_LENGTH
        and len(request.read) <= _tree_room(lm)
        and len(request.read) + most <= lm.packs.window
    )


class _Row:
    """One string as it grows."""

    def __init__(self, request: DrawRequest) -> None:
        self.request = request
        self.uniforms = generator(request.key)
        self.state: State = request.rules.start(request.limit)
        self.ids: list[int] = []
        self.log_prob = 0.0
        self.kept = b""
        self.is_dead = False
        self.is_ended = False
        self._begin(request.begun)

    def _begin(self, begun: tuple[int, ...]) -> None:
        """Takes the tokens that are there already, and leaves out their random numbers."""
        if not begun:
            return
        most = self.request.most_tokens
        if most is not None and most < 0:
            raise ValueError(f"the string has begun with {-most} more tokens than it may have")
        for at, token in enumerate(begun):
            step = self.step()
            goes_on = token not in step.kept and token not in self.request.rules.vocabulary.end_ids
            if not (0 <= token < len(step.legal) and step.legal[token] and goes_on):
                why = "is not legal there" if goes_on else "ends the string"
                raise ValueError(f"the string has begun with {begun}, whose token {at} {why}")
            self.state = self.request.rules.advance(self.state, token)
        self.ids = list(begun)
        self.uniforms.random(len(begun))

    def step(self) -> Step:
        return self.request.rules.step(self.state)

    def take(self, token: int, log_prob: float, step: Step, logits: torch.Tensor) -> bool:
        """Takes the drawn token; True while the string goes on."""
        rules = self.request.rules
        if token in step.kept:
            kept = step.kept[token]
            members = step.groups[kept]
            self.log_prob += float(logits.log_softmax(-1)[members].logsumexp(-1))
            self.ids.append(rules.representative(kept, members.tolist()))
            self.kept = kept
            self.is_ended = True
            return False
        if token in rules.vocabulary.end_ids:
            self.log_prob += float(logits.log_softmax(-1)[step.end_ids].logsumexp(-1))
            self.is_ended = True
            return False
        self.log_prob += log_prob
        self.ids.append(token)
        self.state = rules.advance(self.state, token)
        self.is_ended = self.state.remaining == 0
        return not self.is_ended and len(self.ids) != self.request.length

    @property
    def is_paused(self) -> bool:
        """Whether it has the length that was asked for, and goes on later."""
        return not self.is_ended and not self.is_dead and len(self.ids) == self.request.length

    def reply(self) -> DrawReply:
        join = self.request.rules.vocabulary.join
        data = join(self.ids[:-1]) + self.kept if self.kept else join(self.ids)
        text = data.decode("utf-8", errors="replace")
        return DrawReply(tuple(self.ids), text, self.log_prob, self.is_dead, self.is_ended)


def _draw(lm: LM, requests: Sequence[DrawRequest], tree: Tree | None) -> list[DrawReply | None]:
    """Draws strings together; None for those put off because the batch outgrew the budget.

    Args:
        lm: the LM.
        requests: the strings.
        tree: where they go on from.
    """
    if lm.packs is not None and tree is not None:
        return _draw_on(lm, lm.packs, requests, tree)
    if captured.takes(lm, requests):
        found = _draw_captured(lm, requests)
        if found is not None:
            return found
    if lm.packs is not None and len(requests) > 1 and all(_is_short(lm, r) for r in requests):
        prompts = sorted({r.read for r in requests})
        layout = lay_out(prompts, _tree_room(lm))
        if len(layout.rows) == 1:
            return _draw_packed(lm, lm.packs, requests, prompts, layout.rows[0])
    return _draw_padded(lm, requests)


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
    states = packed.run_row(lm, packing, row, 0, leaves, cache)
    logits = lm.logits_of(states)
    seen = row.mask(0)[leaves]
    keys = caches.keys_and_values(cache)
    replies: list[DrawReply | None] = []
    for first in range(0, len(requests), PACKED_ROWS):
        strings = [_Row(r) for r in requests[first : first + PACKED_ROWS]]
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
    strings = [_Row(r) for r in requests]
    reads = [r.read for r in requests]
    # If this is broken off, nodes without keys are in no tree that is kept.
    kept.forget(lm, tree)
    paths = {r: tree.path(r) for r in set(reads)}
    is_run = all(len(p) == len(r) and p[-1] in tree.places for r, p in paths.items())
    if not is_run:
        paths = {r: path[: len(r) - 1] for r, path in paths.items()}
    seen = np.zeros((len(requests), len(tree.parents)), dtype=bool)
    for line, read in enumerate(reads):
        seen[line, paths[read]] = True
    cache = caches.cache_of(tree.keys)
    last = [paths[read][-1] for read in reads]
    if is_run:
        states = tree.states(np.array([tree.places[node] for node in last]))
    else:
        states, seen, last = _run(lm, packing, [r[-1] for r in reads], seen, tree, last, cache)
    _grow(lm, packing, strings, lm.logits_of(states), seen, tree, last, cache)
    kept.keep(lm, tree, caches.keys_and_values(cache))
    return [s.reply() for s in strings]


def _run(
    lm: LM,
    packing: packed.Packing,
    tokens: Sequence[int],
    seen: np.ndarray,
    tree: Tree,
    last: Sequence[int],
    cache: Any,
) -> tuple[torch.Tensor, np.ndarray, list[int]]:
    """One step of a tree: a token for each row, after the row's last node.

    Returns:
        States after the tokens, what of the cache each row sees by then, and the new last nodes.
    """
    # Rows that have come the same way go on as one.
    steps = list(zip((tree.first[node] for node in last), tokens, strict=True))
    lines = list({step: line for line, step in reversed([*enumerate(steps)])}.values())
    lines.sort()
    number = {steps[line]: k for k, line in enumerate(lines)}
    of_step = np.array([number[step] for step in steps])
    nodes = [tree.add(last[line], tokens[line]) for line in lines]
    seen = np.concatenate([seen, np.eye(len(nodes), dtype=bool)[of_step]], axis=1)
    depth = np.array(tree.depth)
    sees = packed.seen_by(lm, packing, seen[lines], depth[nodes], depth, BLOCK)
    ids = torch.tensor([tokens[line] for line in lines])
    at, everyone = torch.from_numpy(depth[nodes]), torch.arange(len(nodes))
    found = packed.run(lm, packing, ids, at, sees, everyone, cache)
    tree.note(lm, nodes, found)
    if len(nodes) < len(tokens):
        found = found[torch.from_numpy(of_step).to(lm.device)]
    return found, seen, [nodes[k] for k in of_step]


def _grow(
    lm: LM,
    packing: packed.Packing,
    rows: Sequence[_Row],
    logits: torch.Tensor,
    seen: np.ndarray,
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
            chosen += _choose(alive[len(chosen) :][: len(part)], part)
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
        states, seen, last = _run(lm, packing, tokens, seen, tree, before, cache)
        going = [line for line, row in enumerate(alive) if not row.is_paused]
        if not going:
            return
        if len(going) < len(alive):
            states, seen = states[torch.tensor(going, device=lm.device)], seen[going]
            last = [last[line] for line in going]
            alive = [alive[line] for line in going]
        of_next = map(lm.logits_of, states.split(most))


def _draw_captured(lm: LM, requests: Sequence[DrawRequest]) -> list[DrawReply | None] | None:
    """Draws strings in captured steps; None if the LM does not take these."""
    replies: list[DrawReply | None] = []
    for first in range(0, len(requests), captured.MOST_ROWS):
        rows = [_Row(r) for r in requests[first : first + captured.MOST_ROWS]]
        logits, cache, mask, owner = encode(lm, [r.request.read for r in rows])
        most = max(r.request.most_tokens or 0 for r in rows)
        found = caches.keys_and_values(cache)
        steps = captured.steps_of(lm, most, found, mask, owner)
        if steps is None:
            return None
        logits = logits[owner]
        alive = list(range(len(rows)))
        tokens = [0] * len(rows)
        while True:
            of_alive = logits
            if len(alive) < len(rows):
                of_alive = logits[torch.tensor(alive, device=lm.device)]
            chosen = _choose([rows[k] for k in alive], of_alive)
            for k, token in zip(alive, chosen, strict=True):
                tokens[k] = token or 0
            alive = [k for k, token in zip(alive, chosen, strict=True) if token is not None]
            if not alive:
                break
            logits = steps.step(tokens)
        replies += [row.reply() for row in rows]
    return replies


def _draw_padded(lm: LM, requests: Sequence[DrawRequest]) -> list[DrawReply | None]:
    """Draws strings as rows of a batch, each with a cache of its own."""
    rows = [_Row(r) for r in requests]
    logits, cache, mask, owner = encode(lm, [r.read for r in requests])
    cache.batch_select_indices(owner)
    logits, mask = logits[owner], mask[owner]

    put_off: set[int] = set()
    alive = list(range(len(rows)))  # row of each line of the batch
    while True:
        chosen = _choose([rows[k] for k in alive], logits)
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
        logits, mask, cache = step_padded(lm, tokens, mask, cache)


def step_padded(
    lm: LM, tokens: torch.Tensor, mask: torch.Tensor, cache: Any
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Reads one more token of each row of a batch padded on the left, shape [rows, 1].

    Returns:
        The logits after them, the mask that shows them too, and the cache.
    """
    mask = torch.cat([mask, mask.new_ones(len(tokens), 1)], dim=1)
    found, cache = lm.states(
        tokens,
        attention_mask=mask,
        position_ids=mask.sum(1, keepdim=True) - 1,
        past_key_values=cache,
        use_cache=True,
    )
    return lm.logits_of(found[:, -1]), mask, cache


def encode(
    lm: LM, reads: Sequence[tuple[int, ...]]
) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
    """What is read before strings, each different prompt once, padded on the left.

    Returns:
        Last logits, KV cache and mask of the different prompts, and which of them is each string's.
    """
    prompts = sorted(set(reads))
    number = {prompt: k for k, prompt in enumerate(prompts)}
    owner = torch.tensor([number[r] for r in reads], device=lm.device)
    longest = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for k, prompt in enumerate(prompts):
        ids[k, longest - len(prompt) :] = torch.tensor(prompt)
        mask[k, longest - len(prompt) :] = 1
    padding = mask.numel() - int(mask.sum())
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    found, cache = lm.states(
        ids,
        padding=padding,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
    )
    return lm.logits_of(found[:, -1]), cache, mask, owner


def _choose(rows: Sequence[_Row], logits: torch.Tensor) -> list[int | None]:
    """Draws the next token of each row and takes it; None for rows that are finished.

    Args:
        rows: the rows.
        logits: of their next tokens, shape [rows, vocabulary]; they are written over.
    """
    device = logits.device
    steps = [row.step() for row in rows]
    kinds = {id(step): step for step in steps}
    illegal = ~torch.stack([step.legal_on(device) for step in kinds.values()])
    if len(kinds) > 1:
        number = {key: k for k, key in enumerate(kinds)}
        illegal = illegal[torch.tensor([number[id(step)] for step in steps], device=device)]
    scales = [
        max(row.request.rules.rules.temperature * row.request.temperature, COLDEST) for row in rows
    ]
    scaled = logits.float()
    if any(scale != 1.0 for scale in scales):
        scaled = scaled / torch.tensor(scales, dtype=scaled.dtype, device=device)[:, None]
    # On the CPU every pass over a large new tensor counts.
    shares = scaled.masked_fill_(illegal, -torch.inf).softmax(-1)
    uniforms = [[row.uniforms.random()] for row in rows]  # below 1, which float32 may round to 1
    drawn = by_inverse_cdf(shares, torch.tensor(uniforms, dtype=torch.float64, device=device))
    of_drawn = shares.gather(1, drawn)[:, 0].log()
    # Read for all rows at once: on an accelerator each read waits for it.
    tokens, numbers = drawn[:, 0].tolist(), of_drawn.tolist()
    chosen: list[int | None] = []
    for row, step, token, log_prob, line in zip(rows, steps, tokens, numbers, scaled, strict=True):
        if step.is_dead:
            row.is_dead = True
            chosen.append(None)
        elif math.isnan(log_prob):
            raise FloatingPointError(
                f"{row.request.lm!r} gives logits that are not numbers (NaN), so nothing can be "
                "drawn from it: its weights or its adapter's are not finite, or overflow"
            )
        elif row.take(token, log_prob, step, line):
            chosen.append(token)
        else:
            chosen.append(None)
    return chosen
