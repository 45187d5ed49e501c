"""The paper's procedure written plainly with transformers and peft, to be measured beside langppl.

Tokens are sampled one by one with gradients kept through the cache, the prompt is repeated over the
batch, and the reward of each prefix takes a full forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache


def sequence_log_probs(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    counts: Sequence[int],
    batch: int,
    stops: Sequence[int] = (),
    never: Sequence[int] = (),
) -> list[Tensor]:
    """Log-probabilities of the last tokens of each sequence, in padded batches.

    Args:
        model: a causal LM.
        sequences: token ids.
        counts: how many of the last tokens of each to score.
        batch: sequences in a batch.
        stops: tokens that spell the stop; where the first of them is scored, all are summed.
        never: tokens that no text holds, to be left out of the normaliser.
    """
    found: list[Tensor] = []
    device = getattr(model, "device", None)
    for first in range(0, len(sequences), batch):
        rows = sequences[first : first + batch]
        longest = max(map(len, rows))
        ids = torch.tensor([[*r, *[0] * (longest - len(r))] for r in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=device)
        start = min(len(r) - c for r, c in zip(rows, counts[first:], strict=False)) - 1
        # Logits of the continuation alone, which is as far as a careful script would go.
        out = model(
            input_ids=ids, attention_mask=mask, logits_to_keep=longest - start, use_cache=False
        )
        if never:
            out.logits[..., list(never)] = -torch.inf
        log_probs = out.logits.float().log_softmax(-1)
        for k, row in enumerate(rows):
            count = counts[first + k]
            at = torch.arange(len(row) - count - 1, len(row) - 1, device=device) - start
            targets = torch.tensor(row[len(row) - count :], device=device)
            scored = log_probs[k, at, targets]
            if stops:
                every = log_probs[k, at][:, list(stops)].logsumexp(-1)
                scored = torch.where(targets == stops[0], every, scored)
            found.append(scored)
    return found


def prefix_log_rewards(
    model: torch.nn.Module,
    prompt: Sequence[int],
    samples: Sequence[Sequence[int]],
    stops: Sequence[int],
    ending: Sequence[int],
    batch: int = 32,
    never: Sequence[int] = (),
) -> Tensor:
    """log p(z₁..t, stop, ending) for every t, by a full forward pass of every prefix.

    Returns:
        Shape [samples, length + 1], nats; the last entry ends without the stop.
    """
    sequences, counts = [], []
    for z in samples:
        for t in range(len(z) + 1):
            tail = [*z[:t], *(stops[:1] if t < len(z) else []), *ending]
            sequences.append([*prompt, *tail])
            counts.append(len(tail))
    with torch.no_grad():
        found = sequence_log_probs(model, sequences, counts, batch, stops, never)
    return torch.stack([f.sum() for f in found]).reshape(len(samples), -1)


def sample_with_gradients(
    model: torch.nn.Module,
    prompt: Sequence[int],
    n: int,
    length: int,
    stops: Sequence[int],
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Strings token by token, the graph kept.

    Returns:
        Tokens [n, length], their log q [n, length], and log q of the stop [n, length + 1].
    """
    device = getattr(model, "device", torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    cache = DynamicCache()
    ids = torch.tensor([list(prompt)] * n, device=device)
    tokens, log_q, log_stop = [], [], []
    for _ in range(length):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        log_probs = out.logits[:, -1].float().log_softmax(-1)
        log_stop.append(log_probs[:, list(stops)].logsumexp(-1))
        chances = log_probs.detach().exp()
        chances[:, list(stops)] = 0.0
        ids = torch.multinomial(chances, 1, generator=generator)
        tokens.append(ids[:, 0])
        log_q.append(log_probs.gather(1, ids)[:, 0])
    stops = pad(torch.stack(log_stop, 1), (0, 1))
    return torch.stack(tokens, 1), torch.stack(log_q, 1), stops


def subtb_loss(log_rewards: Tensor, log_q: Tensor, log_stop: Tensor) -> Tensor:
    """Modified sub-trajectory balance over all pairs of prefixes."""
    u = log_rewards - log_stop
    reached = pad(log_q.cumsum(1), (1, 0))
    i, j = torch.triu_indices(u.shape[1], u.shape[1], 1, device=u.device)
    residual = u[:, i] + reached[:, j] - reached[:, i] - u[:, j]
    return (residual**2).mean()
