"""Strings as they grow: the rules that each walks, the draw of its next token, and a step of all.

A token is drawn by inverse CDF from one uniform number that depends on the row's key and the
token's place alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from langppl.lm import caches, packed
from langppl.lm.inverse_cdf import by_inverse_cdf
from langppl.lm.kept import Tree
from langppl.lm.requests import Candidates, DrawReply, DrawRequest
from langppl.lm.rules import COLDEST, State, Step
from langppl.lm.seeds import generator

if TYPE_CHECKING:
    from langppl.lm.model import LM

BLOCK = 8
"""Strings whose attention goes together: each looks through the tokens of all of them."""


class Draft:
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
        self.candidates: Candidates | None = None
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
            is_legal = 0 <= token < len(step.legal) and step.legal_array[token]
            if not (is_legal and goes_on):
                why = "is not legal there" if goes_on else "ends the string"
                raise ValueError(f"the string has begun with {begun}, whose token {at} {why}")
            self.state = self.request.rules.advance(self.state, token)
        self.ids = list(begun)
        self.uniforms.random(len(begun))

    def step(self) -> Step:
        """The actions that are legal next."""
        return self.request.rules.step(self.state)

    def log_prob_of(self, token: int, log_prob: float, step: Step, logits: torch.Tensor) -> float:
        """Log-probability (nats) of the action that a token, with its own, stands for."""
        if token in step.kept:
            members = step.groups[step.kept[token]]
        elif token in self.request.rules.vocabulary.end_ids:
            members = step.end_ids
        else:
            return log_prob
        return float(logits.log_softmax(-1)[members].logsumexp(-1))

    def take(self, token: int, log_prob: float, step: Step) -> bool:
        """Takes an action, which a token of it stands for; True while the string goes on."""
        rules = self.request.rules
        self.log_prob += log_prob
        if token in step.kept:
            kept = step.kept[token]
            self.ids.append(rules.representative(kept, step.groups[kept].tolist()))
            self.kept = kept
            self.is_ended = True
            return False
        if token in rules.vocabulary.end_ids:
            self.is_ended = True
            return False
        self.ids.append(token)
        self.state = rules.advance(self.state, token)
        self.is_ended = self.state.remaining == 0
        return not self.is_ended and len(self.ids) != self.request.length

    def line_up(self, shares: torch.Tensor, step: Step) -> None:
        """Draws the actions that may come next without replacement, and takes none of them.

        Args:
            shares: probability of each token, shape [vocabulary].
            step: the actions that are legal next.
        """
        masses = shares.double().cpu().numpy()
        # One action of several tokens goes by the first.
        endings = [ids.numpy() for ids in (*step.groups.values(), step.end_ids) if len(ids)]
        for ids in endings:
            whole = masses[ids].sum()
            masses[ids] = 0.0
            masses[ids[0]] = whole
        masses /= masses.sum()
        # The first of independent exponential times is that of each with its share.
        # Of 2^23 such times in float32 one is 0, and a token with it is first whatever its share.
        times = self.uniforms.standard_exponential(len(masses))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            times = np.where(masses > 0.0, times / masses, np.inf)
        most = min(self.request.candidates, len(times))
        first = np.argpartition(times, most - 1)[:most]
        first = first[np.argsort(times[first], kind="stable")]
        first = first[np.isfinite(times[first])]
        lined_up = masses[first]
        masses[first] = 0.0
        left = np.append(lined_up, masses.sum())[::-1].cumsum()[::-1]
        log_probs = np.log(lined_up)

        def take(k: int) -> DrawReply:
            return self._after(int(first[k]), float(log_probs[k]), step)

        self.candidates = Candidates(log_probs, left, take)

    def _after(self, token: int, log_prob: float, step: Step) -> DrawReply:
        """The string after one more action, which is not taken."""
        draft = copy.copy(self)
        draft.ids, draft.log_prob, draft.candidates = list(self.ids), 0.0, None
        draft.take(token, log_prob, step)
        return draft.reply()

    @property
    def is_paused(self) -> bool:
        """Whether it has the length that was asked for, and goes on later."""
        return not self.is_ended and not self.is_dead and len(self.ids) == self.request.length

    def reply(self) -> DrawReply:
        """The string as it stands."""
        join = self.request.rules.vocabulary.join
        data = join(self.ids[:-1]) + self.kept if self.kept else join(self.ids)
        text = data.decode("utf-8", errors="replace")
        return DrawReply(
            tuple(self.ids), text, self.log_prob, self.is_dead, self.is_ended, self.candidates
        )


def choose(rows: Sequence[Draft], logits: torch.Tensor) -> list[int | None]:
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
    found = zip(rows, steps, tokens, numbers, scaled, shares, strict=True)
    for row, step, token, log_prob, line, share in found:
        if step.is_dead:
            row.is_dead = True
            chosen.append(None)
        elif math.isnan(log_prob):
            raise FloatingPointError(
                f"{row.request.lm!r} gives logits that are not numbers (NaN), so nothing can be "
                "drawn from it: its weights or its adapter's are not finite, or overflow"
            )
        elif row.request.candidates:
            row.line_up(share, step)
            chosen.append(None)
        elif row.take(token, row.log_prob_of(token, log_prob, step, line), step):
            chosen.append(token)
        else:
            chosen.append(None)
    return chosen


def tree_room(lm: LM) -> int:
    """Most nodes of the prompts of a tree that are run in one pass."""
    return min(lm.node_budget, lm.token_budget)


def most_nodes(lm: LM, longest: int) -> int:
    """Most nodes of all prompts of a tree, whose keys and values are in one cache.

    Args:
        lm: the LM.
        longest: tokens of the longest prompt; of what others have besides, where it alone is more
            than a pass, a tree takes a little.
    """
    room = tree_room(lm)
    return room if longest <= room else longest + room // 4


def run_tree(
    lm: LM,
    packing: packed.Packing,
    tokens: Sequence[int],
    seen: NDArray[Any],
    tree: Tree,
    last: Sequence[int],
    cache: Any,
) -> tuple[torch.Tensor, NDArray[Any], list[int]]:
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


def step_padded(
    lm: LM, tokens: torch.Tensor, mask: torch.Tensor, cache: Any
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Reads one more token of each row of a batch padded on the left, shape [rows, 1].

    Returns:
        The states after them (see `LM.states`), the mask that shows them too, and the cache.
    """
    mask = torch.cat([mask, mask.new_ones(len(tokens), 1)], dim=1)
    found, cache = lm.states(
        tokens,
        attention_mask=mask,
        position_ids=mask.sum(1, keepdim=True) - 1,
        past_key_values=cache,
        use_cache=True,
    )
    return found[:, -1], mask, cache


def encode(
    lm: LM, reads: Sequence[tuple[int, ...]]
) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
    """What is read before strings, each different prompt once, padded on the left.

    Returns:
        Last states, KV cache and mask of the different prompts, and which of them is each string's.
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
    return found[:, -1], cache, mask, owner


class Encoded:
    """Encodes what is read before strings, and keeps the last prompt that was alone in its batch.

    The strings of a long prompt take several batches, each of which would read it again.

    Args:
        lm: the LM, whose adapter does not change meanwhile.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self._prompt: tuple[int, ...] | None = None
        self._found: tuple[torch.Tensor, Any, torch.Tensor] | None = None

    def encode(
        self, reads: Sequence[tuple[int, ...]]
    ) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
        """See `encode`; the cache may be changed."""
        if any(read != reads[0] for read in reads):
            return encode(self.lm, reads)
        if self._found is None or self._prompt != reads[0]:
            self._found = None  # its memory goes before the next takes its own
            self._found = encode(self.lm, reads[:1])[:3]
            self._prompt = reads[0]
        states, cache, mask = self._found
        owner = torch.zeros(len(reads), dtype=torch.long, device=self.lm.device)
        return states, caches.twin(cache), mask, owner
