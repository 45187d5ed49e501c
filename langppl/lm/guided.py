"""Guided strings: what a prompt adds to an LM's prediction, added to another prediction.

With l the logits after a text, the logits of a guided string are

    l(base) + scale · (l(prompt) − l(without)),

where the base is the string's own prompt, the prompt shows what the string is to be guided by, and
`without` is the same without it. What the form of the prompt changes drops out; what it shows
stays. That is classifier-free guidance of a language model (Sanchez et al. 2023, arXiv 2306.17806),
with a base of its own. An adapter that is trained acts on what is read after the prompt alone.

The factors add up to one and an output layer is linear, so it is states (see `LM.states`) that are
mixed, and the output layer is read once.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from langppl.lm import caches, kept, packed
from langppl.lm.growing import (
    Draft,
    choose,
    encode,
    most_nodes,
    run_tree,
    step_padded,
    tree_room,
)
from langppl.lm.kept import Tree
from langppl.lm.requests import Beside, DrawReply, DrawRequest
from langppl.lm.trie import Ids, distinct, row_of

if TYPE_CHECKING:
    from langppl.lm.model import LM

MOST_ROWS = 128
"""Most guided strings that are drawn together."""

LONG = 256
"""Tokens that a string without a limit is expected to need."""


def mixed(own: Tensor, base: Tensor, without: Tensor, scales: Tensor) -> Tensor:
    """The states of guided strings, with gradients to the first ones.

    Args:
        own: states after the prompt and what follows it, shape [n, width].
        base: the same after the string's own prompt.
        without: the same after the prompt without what guides.
        scales: how much their difference counts, shape [n].
    """
    kind = torch.promote_types(own.dtype, torch.float32)
    change = own.to(kind) - without.to(kind)
    return (base.to(kind) + scales[:, None].to(change) * change).to(own.dtype)


def check_head(lm: LM) -> None:
    """Raises ValueError if an adapter is on the LM's head: one head reads all states."""
    if lm.splits_head and getattr(lm.model.get_output_embeddings(), "scaling", None):
        raise ValueError(
            f"an adapter of {lm!r} is on its head, and what guides a string is read by one head "
            "with and without it; leave the head out of target_modules, or take no guidance"
        )


def blend(
    found: Tensor,
    rows: Mapping[int, NDArray[Any]],
    besides: Sequence[Beside | None],
    others: Mapping[int, tuple[Tensor, Tensor]],
) -> tuple[Tensor, Mapping[int, NDArray[Any]]]:
    """Mixes the states of strings that are guided; those of others stay as they are.

    Args:
        found: states after prompts and what follows them, shape [n, width].
        rows: for each request, which of them are its actions'.
        besides: for each request, what guides it.
        others: for each request that is guided, its actions' states after the base and after
            `without`, each [actions, width].

    Returns:
        The states, and for each request which of them are its actions'; equal ones are there once.
    """
    members = [k for k in rows if k in others]
    if not members:
        return found, rows
    at = {k: rows[k] for k in rows if k not in others}
    numbers: dict[Beside | None, int] = {}
    first: dict[tuple[int, int], int] = {}  # (what guides, row) → place among the mixed
    of_own: list[int] = []
    scales: list[float] = []
    picked: list[int] = []
    offset = 0
    for k in members:
        beside = besides[k]
        assert beside is not None
        guide = numbers.setdefault(beside, len(numbers))
        places = []
        for t, row in enumerate(rows[k].tolist()):
            place = first.setdefault((guide, row), len(first))
            if place == len(of_own):
                of_own.append(row)
                scales.append(beside.scale)
                picked.append(offset + t)
            places.append(place)
        at[k] = len(found) + np.array(places, dtype=np.int64)
        offset += len(rows[k])
    device = found.device
    base, without = (torch.cat([others[k][side] for k in members]) for side in (0, 1))
    pick = torch.tensor(picked, dtype=torch.long, device=device)
    own = found[torch.tensor(of_own, dtype=torch.long, device=device)]
    scale = torch.tensor(scales, dtype=torch.float32, device=device)
    made = mixed(own, base[pick], without[pick], scale)
    if len(at) == len(members):  # nothing reads the states as they were
        return made, {k: places - len(found) for k, places in at.items()}
    return torch.cat([found, made]), at


def draw(lm: LM, requests: Sequence[DrawRequest]) -> list[DrawReply]:
    """Draws guided strings, without gradients.

    Args:
        lm: the LM, under the adapter of the requests' prompts.
        requests: they have adapters in common, and each is to grow by a token at least.
    """
    check_head(lm)
    replies: dict[int, DrawReply] = {}
    order = sorted(range(len(requests)), key=lambda k: requests[k].read)
    for batch in _batches(lm, requests, order):
        found = _draw(lm, [requests[k] for k in batch])
        replies.update(zip(batch, found, strict=True))
    return [replies[k] for k in range(len(requests))]


def _batches(lm: LM, requests: Sequence[DrawRequest], order: Sequence[int]) -> Iterator[list[int]]:
    """Strings that are drawn together: three rows each, which fit the token budget.

    Of trees, which hold what is read before the strings once, it is what is drawn that has to fit.
    """
    batch: list[int] = []
    longest = 0
    for k in order:
        length = max(map(len, _reads(requests[k]))) + _ahead(requests[k])
        width = max(longest, length)
        fits = 3 * (len(batch) + 1) * width <= lm.token_budget
        if batch and not (
            len(batch) < MOST_ROWS and (fits or _in_trees(lm, [requests[j] for j in (*batch, k)]))
        ):
            yield batch
            batch, width = [], length
        batch.append(k)
        longest = width
    if batch:
        yield batch


def _ahead(request: DrawRequest) -> int:
    """Tokens that a string is expected to need."""
    return LONG if request.most_tokens is None else request.most_tokens


def _in_trees(lm: LM, requests: Sequence[DrawRequest]) -> bool:
    """Whether strings are drawn in trees, whose drawn tokens fit the token budget."""
    longest = max(map(_ahead, requests))
    own, base, without = zip(*map(_reads, requests), strict=True)
    return (
        3 * len(requests) * longest <= lm.token_budget
        and _takes_tree(lm, (own,), longest)
        and _takes_tree(lm, (base, without), longest)
    )


def _takes_tree(lm: LM, kinds: Sequence[Sequence[Ids]], longest: int) -> bool:
    """Whether texts of some kinds, each of which may have a long prompt of its own, are a tree."""
    lengths = [max(map(len, reads)) for reads in kinds]
    if lm.packs is None or max(lengths) + longest > lm.packs.window:
        return False
    return distinct(itertools.chain(*kinds)) <= most_nodes(lm, sum(lengths))


def _reads(request: DrawRequest) -> tuple[Ids, Ids, Ids]:
    """What is read before a string: after its prompt, after the base and after `without`."""
    beside = request.beside
    assert beside is not None
    return request.read, beside.base + request.begun, beside.without + request.begun


def _draw(lm: LM, requests: Sequence[DrawRequest]) -> list[DrawReply]:
    drafts = [Draft(r) for r in requests]
    own, base, without = zip(*map(_reads, requests), strict=True)
    besides = [r.beside for r in requests]
    adapter = next(b.adapter for b in besides if b is not None)
    scales = torch.tensor([b.scale for b in besides if b is not None], device=lm.device)
    longest = max(map(_ahead, requests))
    after_prompt = _lines(lm, (own,), longest, lm.active_adapter)
    after_others = _lines(lm, (base, without), longest, adapter)
    alive = list(range(len(drafts)))
    while True:
        count = len(alive)
        others = after_others.states
        states = mixed(after_prompt.states, others[:count], others[count:], scales)
        chosen = choose([drafts[k] for k in alive], lm.logits_of(states))
        going = [line for line, token in enumerate(chosen) if token is not None]
        if not going:
            break
        if len(going) < count:
            after_prompt.keep(going)
            after_others.keep([*going, *(line + count for line in going)])
            scales = scales[torch.tensor(going, device=lm.device)]
            alive = [alive[line] for line in going]
        tokens = [drafts[k].ids[-1] for k in alive]
        after_prompt.read(tokens)
        after_others.read(tokens * 2)
    after_others.leave()
    return [draft.reply() for draft in drafts]


def _lines(lm: LM, kinds: Sequence[Sequence[Ids]], longest: int, adapter: str | None) -> _Lines:
    """Texts that are read on, in a tree if the LM takes one and they fit."""
    reads = [read for own in kinds for read in own]
    if lm.packs is not None and _takes_tree(lm, kinds, longest):
        return _TreeLines(lm, reads, adapter, lm.packs)
    return _PaddedLines(lm, reads, adapter)


class _Lines(ABC):
    """Texts that are read together, token by token.

    Attributes:
        states: after each text, shape [texts, width].
    """

    states: Tensor

    @abstractmethod
    def keep(self, lines: Sequence[int]) -> None:
        """Goes on with some of the texts alone."""

    @abstractmethod
    def read(self, tokens: Sequence[int]) -> None:
        """Reads one more token of each text."""

    def leave(self) -> None:  # noqa: B027 - a batch has nothing to leave
        """Leaves what was read to the scoring that follows."""


class _TreeLines(_Lines):
    """Texts as one tree, whose KV cache holds every token once."""

    def __init__(
        self,
        lm: LM,
        reads: Sequence[Ids],
        adapter: str | None,
        packing: packed.Packing,
    ) -> None:
        self.lm, self.adapter, self.packing = lm, adapter, packing
        prompts = sorted(set(reads))
        row = row_of(prompts)
        leaves = np.unique([path[-1] for path in row.paths.values()])
        place = {prompts[k]: int(np.searchsorted(leaves, p[-1])) for k, p in row.paths.items()}
        self.cache = caches.cache_of([])
        with lm.adapter(adapter):
            states = packed.run_in_pieces(lm, packing, row, leaves, self.cache, tree_room(lm))
        at = np.array([place[r] for r in reads])
        self.tree = Tree.of_row(row)
        self.tree.note(lm, leaves.tolist(), states)
        self.seen, self.last = row.seen_by(leaves)[at], leaves[at].tolist()
        self.states = states[torch.from_numpy(at).to(lm.device)]

    def keep(self, lines: Sequence[int]) -> None:
        """See `_Lines.keep`."""
        self.seen = self.seen[list(lines)]
        self.last = [self.last[line] for line in lines]

    def read(self, tokens: Sequence[int]) -> None:
        """See `_Lines.read`."""
        with self.lm.adapter(self.adapter):
            self.states, self.seen, self.last = run_tree(
                self.lm, self.packing, tokens, self.seen, self.tree, self.last, self.cache
            )

    def leave(self) -> None:
        """See `_Lines.leave`; strings are scored under the LM itself."""
        if self.adapter is None:
            with self.lm.adapter(None):
                kept.keep(self.lm, self.tree, caches.keys_and_values(self.cache))


class _PaddedLines(_Lines):
    """Texts as rows of a batch, each with a cache of its own."""

    def __init__(self, lm: LM, reads: Sequence[Ids], adapter: str | None) -> None:
        self.lm, self.adapter = lm, adapter
        with lm.adapter(adapter):
            states, self.cache, mask, owner = encode(lm, reads)
        self.cache.batch_select_indices(owner)
        self.states, self.mask = states[owner], mask[owner]

    def keep(self, lines: Sequence[int]) -> None:
        """See `_Lines.keep`."""
        at = torch.tensor(lines, device=self.lm.device)
        self.cache.batch_select_indices(at)
        self.mask = self.mask[at]

    def read(self, tokens: Sequence[int]) -> None:
        """See `_Lines.read`."""
        ids = torch.tensor([[token] for token in tokens], device=self.lm.device)
        with self.lm.adapter(self.adapter):
            self.states, self.mask, self.cache = step_padded(self.lm, ids, self.mask, self.cache)
