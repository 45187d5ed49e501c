"""Whether an LM that is scored in padded batches reads in them as it reads alone.

Some architectures count positions by themselves (RoBERTa's begin behind the padding's id), or look
at the tokens that follow. Packed passes are compared when `langppl.lm.packed` looks for one that
agrees; here those are that all other LMs are left with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from langppl.lm import growing
from langppl.lm.packed import check_finite, tolerance

if TYPE_CHECKING:
    from langppl.lm.model import LM

LENGTHS = (56, 33, 9)
"""Longer than tiny windows, and different, so that there is padding."""

PREFIX = 5


def check_padded(lm: LM) -> None:
    """Raises ValueError unless padded passes give the logits of a text that is read alone."""
    with torch.no_grad(), lm.adapter(None):
        texts = _made_up(lm)
        alone = [_alone(lm, ids) for ids in texts]
        for ids, whole in zip(texts, alone, strict=True):
            cut = 2 * len(ids) // 3
            if not _agree(_alone(lm, ids[:cut]), whole[:cut], whole):
                raise ValueError(
                    f"{lm!r} ({type(lm.model).__name__}) reads a token otherwise when others "
                    "follow it, so it is no causal LM; some are only where their config says so "
                    "(is_decoder)"
                )
        for prefix in ((), texts[0][:PREFIX]):
            _check(lm, _padded(lm, texts, prefix), alone)
        _check(lm, _stepped(lm, texts), alone)


def _made_up(lm: LM) -> list[tuple[int, ...]]:
    """Texts of different lengths, all of which begin alike."""
    rng = np.random.default_rng(0)
    ordinary = np.flatnonzero(~lm.vocabulary.special)
    most = lm.window or max(LENGTHS)
    lengths = [max(2, min(n, most - 3 * k)) for k, n in enumerate(LENGTHS)]
    drawn = [tuple(int(t) for t in rng.choice(ordinary, n)) for n in lengths]
    return [drawn[0][:PREFIX] + ids[PREFIX:] for ids in drawn]


def _alone(lm: LM, ids: tuple[int, ...]) -> torch.Tensor:
    """Logits [length, vocabulary] of a text that is the only one."""
    found: torch.Tensor = lm.model(
        input_ids=torch.tensor([ids], device=lm.device), use_cache=False
    ).logits[0]
    check_finite(lm, found)
    return found


def _padded(lm: LM, texts: list[tuple[int, ...]], prefix: tuple[int, ...]) -> list[torch.Tensor]:
    """The logits of texts, behind the prefix, in a batch that is padded on the right."""
    rest = [ids[len(prefix) :] for ids in texts if len(ids) > len(prefix)]
    longest = max(map(len, rest))
    ids = torch.tensor([[*own, *[0] * (longest - len(own))] for own in rest])
    mask = torch.tensor([[1] * len(own) + [0] * (longest - len(own)) for own in rest])
    found = lm.padded_states(ids, mask, torch.arange(longest), prefix)
    return [lm.logits_of(found[k, : len(own)]) for k, own in enumerate(rest)]


def _stepped(lm: LM, texts: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """The last logits of texts in a batch that is padded on the left, their last token a step."""
    _, cache, mask, owner = growing.encode(lm, [ids[:-1] for ids in texts])
    cache.batch_select_indices(owner)
    last = torch.tensor([ids[-1:] for ids in texts], device=lm.device)
    states, _, _ = growing.step_padded(lm, last, mask[owner], cache)
    return list(lm.logits_of(states)[:, None])


def _check(lm: LM, found: list[torch.Tensor], alone: list[torch.Tensor]) -> None:
    for own, expected in zip(found, alone, strict=False):
        if not _agree(own, expected[-len(own) :], expected):
            raise ValueError(
                f"{lm!r} ({type(lm.model).__name__}) reads a text in a padded batch otherwise than "
                "alone, and takes no tree attention mask either, so its strings cannot be scored; "
                "take an LM of another architecture"
            )


def _agree(one: torch.Tensor, other: torch.Tensor, whole: torch.Tensor) -> bool:
    most = tolerance(one.dtype) * float(whole.float().abs().max())
    return float((one.float() - other.float()).abs().max()) <= most
