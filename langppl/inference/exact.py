"""Exact inference by listing every value of every latent."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import torch

from langppl.distributions import LMChoice, LMString, Text
from langppl.distributions.sites import naming
from langppl.inference.failures import failures
from langppl.inference.sites import site_log_probs
from langppl.lm import enumeration
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.program.execution import Choice, Execution, Pause, counted, given, score_all
from langppl.progress import bar

BATCH = 4096
_FORKS, _ROOM_OF_A_FORK = 256, 256
"""Latents of one execution that may have several values, at least; and one more for so many of the
limit. Each turn of a loop without a last one adds one, and runs all that were before it again."""


def exact(program: Program, limit: int, progress: bool) -> Posterior:
    """The posterior over all latents that are possible under the prior's rules, or masked.

    Args:
        program: a program whose latents are strings with `max_tokens`, choices, or discrete
            numbers.
        limit: most executions to list.
        progress: whether to show a bar.

    Raises:
        ValueError: if there are more executions than `limit` (the message gives the count of the
            site that goes beyond it), one goes on and on, or a latent cannot be listed.
    """
    started = time.monotonic()
    done: list[Execution] = []
    pending: list[tuple[dict[str, Any], int]] = [({}, 0)]
    most = max(_FORKS, limit // _ROOM_OF_A_FORK)
    with bar("enumerating", limit, progress) as advance:
        while pending:
            batch, pending = pending[-BATCH:], pending[:-BATCH]
            ran = _run(program, [values for values, _ in batch])
            for at, ((values, forks), found) in enumerate(zip(batch, ran, strict=True)):
                latent = found.pause
                if latent is None:
                    done.append(found)
                    advance(1)
                    continue
                # The rest of the batch, each at least one execution, is in no list yet.
                room = limit - len(done) - len(pending) - (len(batch) - at - 1)
                support = _support(latent, room, limit)
                now = forks + (len(support) > 1)
                if now > most:
                    raise ValueError(
                        f"exact inference met site {latent.name!r} after {forks} latents of one "
                        "execution that each have several values, and it may go on for ever; end "
                        "the loop or recursion after a number of turns, raise the limit, to "
                        f"{_ROOM_OF_A_FORK} for each such latent, or use another method"
                    )
                pending += [({**values, latent.name: v}, now) for v in support]
    for first in range(0, len(done), BATCH):
        score_all(done[first : first + BATCH])
    failed, notes = failures(program, done)
    return Posterior(
        [e.latents for e in done],
        [e.log_joint for e in done],
        method="exact",
        guide="enumeration",
        sites=program.latents,
        returns=[e.returned for e in done],
        computed=[e.computed for e in done],
        log_joint=[e.log_joint for e in done],
        site_log_probs=site_log_probs(done),
        elapsed=time.monotonic() - started,
        failed_sites=failed,
        notes=notes,
    )


def _run(program: Program, batch: Sequence[Mapping[str, Any]]) -> list[Execution]:
    """Runs that stop before the first latent without a value."""

    def undecided(name: str, fn: Any, execution: Execution) -> Choice:
        raise Pause(name, fn)

    return program.run([given(values, undecided) for values in batch])


def _support(latent: Pause, room: int, limit: int) -> list[Any]:
    """All values of a latent, if there is room for them."""
    name, fn = latent.name, latent.fn
    if isinstance(fn, LMChoice):
        found: list[Any] = [fn.text(k) for k in range(len(fn.options))]
    elif isinstance(fn, LMString):
        found = _strings(latent, fn, room, limit)
    elif getattr(fn, "has_enumerate_support", False):
        found = _numbers(name, fn, room, limit)
    else:
        raise ValueError(
            f"site {name!r} is {type(fn).__name__}, which has no list of values; exact inference "
            "takes strings, choices and discrete numbers"
        )
    if len(found) > room:
        raise ValueError(
            f"exact inference would list more than {limit} executions: site {name!r} adds "
            f"{len(found)}; raise the limit, shorten the strings, or use another method"
        )
    return found


def _strings(latent: Pause, fn: LMString, room: int, limit: int) -> list[Text]:
    """All strings, counted before they are listed."""
    name = latent.name
    with naming(name):
        most = None if fn.is_open else fn.limit(len(fn.prompt_ids()))
    if most is None or fn.rules.max_tokens is None:
        raise ValueError(f"site {name!r} has no max_tokens, so its strings cannot be listed")
    number = enumeration.count(fn.bound, most, room)
    if number > room:
        has = f"{Decimal(number):.4g} strings"
        if fn.rules.grammar is not None:
            has = f"more than {room} strings, or texts that they begin with"
        left = "" if room == limit else f", of which {limit - room} are there already"
        raise ValueError(
            f"site {name!r} alone has {has}, and the limit of exact inference is {limit} "
            f"executions{left}; shorten it, raise the limit, or use another method"
        )
    # Under a mask a rejected string counts as any other does.
    with_rejected = counted(-math.inf, latent.scale, latent.mask) > -math.inf
    found, first = [], None
    for ids, text, rejected in enumeration.strings(fn.bound, most):
        value = Text(text, ids, fn.lm.fingerprint)
        if with_rejected or not rejected:
            found.append(value)
        else:
            first = first or value
    # Where nothing is possible, one of them tells why.
    return [first] if not found and first is not None else found


def _numbers(name: str, fn: Any, room: int, limit: int) -> list[torch.Tensor]:
    """All values of a discrete distribution, each of its places having any."""
    each = fn.enumerate_support(expand=False)
    each = each.reshape(len(each), *fn.event_shape)
    cells = fn.batch_shape.numel()
    if len(each) ** cells > room:
        raise ValueError(
            f"exact inference would list more than {limit} executions: site {name!r} has "
            f"{len(each)} values in each of {cells} places; raise the limit, or use another "
            "method"
        )
    return [
        torch.stack(cell).reshape(fn.batch_shape + fn.event_shape)
        for cell in itertools.product(each, repeat=cells)
    ]
