"""Metropolis–Hastings: chains that move one latent at a time (see `langppl.inference.kernels`)."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from langppl.chains import Chains, agreement, chain_notes
from langppl.defaults import CHAINS, TAIL_SHARE
from langppl.diagnostics import Array, InferenceWarning
from langppl.distributions import LMChoice, LMString
from langppl.guides.base import Guide
from langppl.inference.failures import failures
from langppl.inference.kernels import move
from langppl.inference.settings import check_values
from langppl.inference.sites import kept_of
from langppl.posterior import Posterior
from langppl.program import Program
from langppl.program.execution import Execution, Site, score
from langppl.progress import bar
from langppl.warn import warn

STARTS = 100
"""Most draws of the guide in which a chain looks for a possible execution to begin at."""


def mh(
    program: Program,
    guide: Guide,
    num_samples: int,
    seed: int,
    progress: bool,
    *,
    chains: int = CHAINS,
    warmup: int | None = None,
    thin: int = 1,
    tail_share: float = TAIL_SHARE,
) -> Posterior:
    """Samples of Markov chains that all move at once.

    Args:
        program: the program.
        guide: proposes values.
        num_samples: samples of all chains together; rounded up so that all chains have as many.
        seed: equal seeds give equal chains.
        progress: whether to show a bar.
        chains: how many.
        warmup: steps of each chain to leave out first; None for as many as are sampled.
        thin: steps from one sample to the next.
        tail_share: probability that the move of an `LMString` redraws its tail.

    Returns:
        Equally weighted samples, chain after chain, with `.chains`. Interrupted (Ctrl-C), those
        that were finished, with a warning.

    Raises:
        ValueError: if the settings make no sense, the program has no latent, or no possible
            execution is found to begin at (the message names the site that fails).
        NotImplementedError: if the guide has no `scorer`.
    """
    started = time.monotonic()
    check_values(chains=chains, warmup=warmup, thin=thin, tail_share=tail_share)
    guide.check(program)
    guide.scorer(program, (seed, "mh"))
    draws = math.ceil(num_samples / chains)
    left_out = draws * thin if warmup is None else warmup
    states = _start(program, guide, chains, seed)
    kept: list[list[Execution]] = []
    counts: Counter[tuple[str, bool]] = Counter()
    steps = left_out + draws * thin
    try:
        with bar(f"moving {chains} chains", steps, progress) as advance:
            for step in range(steps):
                keys = [(seed, "mh", chain, step) for chain in range(chains)]
                moved = move(program, guide, states, keys, tail_share)
                states = [m.execution for m in moved]
                if step >= left_out:
                    counts.update((m.kind, m.accepted) for m in moved)
                    if (step - left_out) % thin == thin - 1:
                        kept.append(states)
                advance(1)
    except KeyboardInterrupt:
        if not kept:
            raise
        warn(
            f"interrupted: the posterior is of the first {len(kept)} samples of each chain, of "
            f"{draws}",
            InferenceWarning,
        )
    by_chain = [[row[chain] for row in kept] for chain in range(chains)]
    record = _record(by_chain, counts, left_out, thin)
    executions = [e for chain in by_chain for e in chain]
    return Posterior(
        log_weights=np.zeros(len(executions)),
        method="mh",
        elapsed=time.monotonic() - started,
        notes=chain_notes(record),
        chains=record,
        **kept_of(program, guide, executions),
    )


def _start(program: Program, guide: Guide, chains: int, seed: int) -> list[Execution]:
    """A possible execution for each chain, drawn from the guide."""
    found: dict[int, Execution] = {}
    failed: list[Execution] = []
    for attempt in range(STARTS):
        missing = [chain for chain in range(chains) if chain not in found]
        if not missing:
            break
        choosers = [guide.chooser(program, (seed, "mh", "start", c, attempt)) for c in missing]
        for chain, execution in zip(missing, program.run(choosers, score), strict=True):
            if not any(s.kind == "latent" for s in execution.sites.values()):
                raise ValueError("the program has no latent site, so there is nothing to move")
            if execution.log_joint > -math.inf:
                found[chain] = execution
            else:
                failed.append(execution)
    if len(found) < chains:
        counts, notes = failures(program, failed)
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        where = ", ".join(f"site {name!r} (in {count} draws)" for name, count in ordered)
        raise ValueError(
            f"{chains - len(found)} of {chains} chains found no possible execution to begin at in "
            f"{STARTS} draws of guide {guide.name!r}: the log probability is -inf at {where}. Use "
            'a guide that reads the observations ("prompted", "gflownet"), or check the rules of '
            "that site" + "".join(f"; {note}" for note in notes)
        )
    return [found[chain] for chain in range(chains)]


def _record(
    chains: Sequence[Sequence[Execution]],
    counts: Counter[tuple[str, bool]],
    warmup: int,
    thin: int,
) -> Chains:
    kinds = [k for k in ("site", "tail") if counts[k, True] + counts[k, False]]
    moves = {k: counts[k, True] + counts[k, False] for k in kinds}
    r_hat, ess_of = agreement(_summaries(chains))
    return Chains(
        number=len(chains),
        draws=len(chains[0]),
        warmup=warmup,
        thin=thin,
        moves=moves,
        acceptance={k: counts[k, True] / moves[k] for k in kinds},
        r_hat=r_hat,
        ess_of=ess_of,
    )


def _summaries(chains: Sequence[Sequence[Execution]]) -> dict[str, Array]:
    """Real-valued summaries of the samples, each of shape [chains, draws].

    The log joint; of each string its length in tokens, 0 where it is absent, and of each choice
    the number of its option; the numbers of each numeric latent that is never absent.
    """
    # A value that is drawn again is scored again: rounding is no movement.
    found = {"the log joint": np.round([[e.log_joint for e in row] for row in chains], 4)}
    executions = [e for row in chains for e in row]
    latents = (s.name for e in executions for s in e.sites.values() if s.kind == "latent")
    for name in dict.fromkeys(latents):
        sites = [e.sites.get(name) for e in executions]
        if any(s is not None and s.is_string for s in sites):
            is_choice = any(s is not None and isinstance(s.fn, LMChoice) for s in sites)
            label = f"the {'option' if is_choice else 'length'} of {name!r}"
            found[label] = np.array([_number_of(s) for s in sites], dtype=np.float64)
            continue
        values = [None if s is None else torch.as_tensor(s.value).flatten() for s in sites]
        sizes = {None if v is None else v.numel() for v in values}
        if None in sizes or len(sizes) > 1:
            continue
        columns = torch.stack([v.double() for v in values if v is not None]).numpy()
        for at, column in enumerate(columns.T):
            label = repr(name) if columns.shape[1] == 1 else f"{name!r}[{at}]"
            found[label] = column
    return {name: values.reshape(len(chains), -1) for name, values in found.items()}


def _number_of(site: Site | None) -> int:
    if site is not None and isinstance(site.fn, LMString):
        return len(site.fn.tokens_of(site.value))
    if site is not None and isinstance(site.fn, LMChoice):
        return 1 + site.fn.options.index(site.value)
    return 0
