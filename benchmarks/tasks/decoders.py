"""Decoding that is no sampling from a distribution: beams, diverse beams, nucleus.

All of it walks the rules of an `LMString`: a stop has the sum of the tokens that make it, and log p
of what is found is the string's own. The past is kept in a KV cache, all rows of a prompt at once.

References:
    Holtzman et al. 2020, *The curious case of neural text degeneration* (arXiv 1904.09751).
    Vijayakumar et al. 2018, *Diverse beam search* (arXiv 1610.02424).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from langppl.distributions import LMString, Text
from langppl.lm.rules import State, Step


@dataclass(frozen=True)
class Found:
    """A string that was found.

    Attributes:
        text: the string; unfinished if its log-probability is −inf.
        log_prob: log p of the string, nats.
    """

    text: Text
    log_prob: float


@dataclass
class _Row:
    state: State
    group: int
    ids: tuple[int, ...] = ()
    log_prob: float = 0.0


@dataclass(frozen=True)
class _Ended:
    row: _Row
    is_whole: bool


Choose = Callable[[list[_Row], torch.Tensor, torch.Tensor, list[_Ended]], list[tuple[int, int]]]
"""Rows, their actions' log-probabilities, their logits, and what has ended: rows and tokens."""


def action_log_probs(logits: torch.Tensor, steps: Sequence[Step], fn: LMString) -> torch.Tensor:
    """Log-probabilities of the actions, nats.

    An ending action's stands at the token that represents it, −inf at the others that make it.

    Args:
        logits: shape [rows, vocabulary].
        steps: the legal actions of each row.
        fn: the string's distribution.

    Returns:
        Shape [rows, vocabulary], float64.
    """
    found = logits.double()
    for step in {id(s): s for s in steps}.values():  # most rows stand alike
        rows = torch.tensor([k for k, s in enumerate(steps) if s is step], device=found.device)
        own = found[rows].masked_fill(~step.legal_on(found.device), -torch.inf).log_softmax(-1)
        groups = [
            (fn.bound.representative(kept, members.tolist()), members)
            for kept, members in step.groups.items()
        ]
        if len(step.end_ids):
            groups.append((int(step.end_ids[0]), step.end_ids))
        for at, members in groups:
            members = members.to(found.device)
            whole = own[:, members].logsumexp(-1)
            own[:, members] = -torch.inf
            own[:, at] = whole
        found[rows] = own
    return found


def decode(fn: LMString, groups: int, choose: Choose) -> tuple[list[_Ended], int]:
    """Grows rows until all have ended.

    Args:
        fn: the string's distribution.
        groups: rows to begin with.
        choose: takes actions: which row goes on with which token.

    Returns:
        What has ended, and how many tokens the LM read after the prompt.
    """
    lm, rules = fn.lm, fn.bound
    prompt = fn.prompt_ids()
    start = rules.start(fn.limit(len(prompt)))
    rows = [_Row(start, g) for g in range(groups)]
    ended: list[_Ended] = []
    count = 0
    with torch.no_grad(), lm.adapter(None):
        read = torch.tensor([prompt], device=lm.device)
        states, cache = lm.states(
            read,
            attention_mask=torch.ones_like(read),
            position_ids=torch.arange(len(prompt), device=lm.device)[None],
            use_cache=True,
        )
        logits = lm.logits_of(states[:, -1]).expand(groups, -1)
        parents = [0] * groups
        while rows:
            steps = [rules.step(row.state) for row in rows]
            actions = action_log_probs(logits, steps, fn)
            going: list[tuple[int, int]] = []
            following: list[_Row] = []
            for k, token in choose(rows, actions, logits, ended):
                row, step = rows[k], steps[k]
                log_prob = row.log_prob + float(actions[k, token])
                if token in lm.vocabulary.end_ids:
                    ended.append(_Ended(_Row(row.state, row.group, row.ids, log_prob), True))
                    continue
                ids = (*row.ids, token)
                if token in step.kept:
                    ended.append(_Ended(_Row(row.state, row.group, ids, log_prob), True))
                    continue
                after = _Row(rules.advance(row.state, token), row.group, ids, log_prob)
                if after.state.remaining == 0:
                    ended.append(_Ended(after, rules.rules.truncate == "keep"))
                else:
                    following.append(after)
                    going.append((parents[k], token))
            rows = following
            if not rows:
                break
            cache.batch_select_indices(torch.tensor([p for p, _ in going], device=lm.device))
            parents = list(range(len(rows)))
            count += len(rows)
            at = len(prompt) + len(rows[0].ids) - 1
            states, cache = lm.states(
                torch.tensor([[t] for _, t in going], device=lm.device),
                attention_mask=torch.ones(len(rows), at + 1, dtype=torch.long, device=lm.device),
                position_ids=torch.full((len(rows), 1), at, device=lm.device),
                past_key_values=cache,
                use_cache=True,
            )
            logits = lm.logits_of(states[:, -1])
    return ended, count


def _text(fn: LMString, ended: _Ended) -> Found:
    """A row as a value, cut after its stop."""
    ids = ended.row.ids
    text = fn.lm.vocabulary.join(ids).decode("utf-8", errors="replace")
    stops = [text.find(s) + len(s) for s in fn.rules.stop if s in text]
    text = text[: min(stops, default=len(text))]
    log_prob = ended.row.log_prob if ended.is_whole else -math.inf
    return Found(Text(text, ids, fn.lm.fingerprint), log_prob)


def _likeliest(probs: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row, at least so many that they have a mass; and where they are."""
    count = 256  # sorting a whole vocabulary would cost more than the LM
    while True:
        ranked, order = probs.topk(min(count, probs.shape[-1]))
        if count >= probs.shape[-1] or float(ranked.sum(-1).min()) >= mass:
            return ranked, order
        count *= 8


def sample(
    fn: LMString, n: int, key: tuple[int, ...], *, temperature: float = 1.0, top_p: float = 1.0
) -> tuple[list[Found], int]:
    """Strings drawn with every token's distribution sharpened or cut.

    Args:
        fn: the string's distribution.
        n: how many.
        key: seed of the random numbers.
        temperature: divides the logits.
        top_p: keep the fewest likeliest actions that together have this probability.

    Returns:
        The strings, and the tokens that the LM read.
    """
    rng = np.random.default_rng(key)

    def choose(
        rows: list[_Row], actions: torch.Tensor, logits: torch.Tensor, ended: list[_Ended]
    ) -> list[tuple[int, int]]:
        if temperature != 1.0:
            steps = [fn.bound.step(row.state) for row in rows]
            actions = action_log_probs(logits / temperature, steps, fn)
        probs = actions.exp().cpu()
        if top_p < 1.0:
            ranked, order = _likeliest(probs, top_p)
            before = ranked.cumsum(-1) - ranked
            probs = torch.zeros_like(probs).scatter(-1, order, ranked * (before < top_p))
        cdf = probs.cumsum(-1)
        uniforms = torch.from_numpy(rng.random((len(rows), 1))) * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, uniforms, right=True)[:, 0].tolist()
        return list(enumerate(tokens))

    ended, count = decode(fn, n, choose)
    # Not in the order in which they ended: the first would be the shortest.
    ended.sort(key=lambda e: e.row.group)
    return [_text(fn, e) for e in ended], count


def beam(
    fn: LMString, width: int, *, groups: int = 1, penalty: float = 0.0
) -> tuple[list[Found], int]:
    """The likeliest strings that beam search finds; with groups, diverse beam search.

    Args:
        fn: the string's distribution.
        width: how many in all; 1 is greedy decoding.
        groups: each searches with an equal share of the width.
        penalty: taken from a token's log-probability (nats) for each row of the groups before
            that takes the same token at the same place.

    Returns:
        At most `width` strings that ended, likeliest first, and the tokens that the LM read.

    Raises:
        ValueError: if the width is no multiple of the number of groups.
    """
    if width < 1 or width % groups:
        raise ValueError(f"width must be a multiple of groups={groups}, got {width}")
    each = width // groups

    def choose(
        rows: list[_Row], actions: torch.Tensor, logits: torch.Tensor, ended: list[_Ended]
    ) -> list[tuple[int, int]]:
        picks: list[tuple[int, int]] = []
        taken = torch.zeros(actions.shape[1], dtype=actions.dtype, device=actions.device)
        for group in range(groups):
            own = [k for k, row in enumerate(rows) if row.group == group]
            if not own:
                continue
            before = torch.tensor([rows[k].log_prob for k in own], dtype=actions.dtype)
            scores = actions[own] + before.to(actions.device)[:, None] - penalty * taken
            best, at = scores.flatten().topk(min(each, scores.numel()))
            # Strings that have ended keep their places in the beam.
            done = [e.row.log_prob for e in ended if e.row.group == group and e.is_whole]
            for score, place in zip(best.tolist(), at.tolist(), strict=True):
                better = sum(d >= score for d in done)
                mine = sum(rows[k].group == group for k, _ in picks)
                if score == -math.inf or better + mine >= each:
                    break
                picks.append((own[place // scores.shape[1]], place % scores.shape[1]))
            for k, token in picks:
                if rows[k].group == group:
                    taken[token] += 1
        return picks

    ended, count = decode(fn, groups, choose)
    found: list[Found] = []
    for group in range(groups):
        whole = [e for e in ended if e.is_whole and e.row.group == group]
        whole.sort(key=lambda e: -e.row.log_prob)
        found += [_text(fn, e) for e in whole[:each]]
    return sorted(found, key=lambda f: -f.log_prob), count
