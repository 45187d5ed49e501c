"""The part of a log joint that depends on trainable adapters, with gradients to them.

For latents z drawn from the posterior under the weights as they are, Fisher's identity says

    ∇ log p(x) = E[∇ log p(x, z) | x],

and of log p(x, z) only the factors that stand on a trainable view have a gradient. They are found
by running the program with the latents given, and scored in one packed pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask

from langppl.distributions import LMChoice, LMString, StringDistribution
from langppl.distributions.sites import naming
from langppl.distributions.tempered import TemperedFactor
from langppl.lm.requests import Asked, ScoreReply, ScoreRequest, noted_by, perform
from langppl.lm.scoring import score_with_gradients
from langppl.lm.trainable import TrainableLM
from langppl.program import Program
from langppl.program.execution import Execution, Site, given, run_many

TOGETHER = 512
"""Strings that are scored with gradients before their graph is let go."""

Views = Mapping[tuple[int, str], TrainableLM]
"""Trainable views by the identity of their LM and the name of their adapter."""


@dataclass(frozen=True)
class Factor:
    """A weighted factor of a log joint that depends on an adapter.

    Attributes:
        site: the site's name.
        requests: what must be scored; none that is impossible.
        at: of a choice, the option's number: the factor is its log-softmax. None for a string.
        weight: what the factor is multiplied by.
    """

    site: str
    requests: tuple[ScoreRequest, ...]
    at: int | None
    weight: float

    def log_prob(self, totals: torch.Tensor) -> torch.Tensor:
        """The weighted factor (nats) from its requests' log-probabilities, shape [requests]."""
        own = totals[0] if self.at is None else totals.log_softmax(0)[self.at]
        return self.weight * own


def factors(
    program: Program,
    rows: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    views: Views,
    *,
    only_known: bool = False,
) -> list[Factor]:
    """The factors of a program that depend on trainable adapters, for weighted latents.

    Args:
        program: the program.
        rows: latent → value, one mapping for each draw, all of them possible.
        weights: of each draw.
        views: the views that are fitted.
        only_known: whether it is an error to meet another trainable view than these.

    Raises:
        ValueError: if the model asks for probabilities under such an adapter outside of its
            sites, which would be without gradients; or if it meets an unknown view.
    """
    tasks = [partial(_watched, program, row, views) for row in rows]
    found = []
    for execution, weight in zip(run_many(tasks, program.memo), weights, strict=True):
        if only_known:
            _check_known(execution, views)
        for site in execution.sites.values():
            factor = _factor(site, weight, views)
            if factor is not None:
                found.append(factor)
    return found


def _watched(program: Program, row: Mapping[str, Any], views: Views) -> Execution:
    def note(asked: Iterable[Asked]) -> None:
        for lm, adapter in asked:
            view = views.get((id(lm), adapter or ""))
            if view is not None:
                raise ValueError(
                    f"the model asks for probabilities under the trainable {view.label!r} outside "
                    "of its sample statements, where they would count in the joint but have no "
                    "gradient; make what it asks for a site (lp.sample(..., obs=...)), or leave "
                    "this view out: em(trainable=[...])"
                )

    with noted_by(note):
        return program.run_once(given(row))


def _check_known(execution: Execution, views: Views) -> None:
    for key, view in views_of(execution.sites).items():
        if key not in views:
            raise ValueError(
                f"a run met the trainable {view.label!r}, which no earlier run of the model stood "
                "on; name the views to fit: em(trainable=[...])"
            )


def _factor(site: Site, weight: float, views: Views) -> Factor | None:
    fn: Any = site.fn
    value, power = site.value, 1.0
    if isinstance(fn, TemperedFactor):
        fn, value, power = fn.base, fn.value, fn.power
    if not isinstance(fn, LMString | LMChoice):
        return None
    if (id(fn.lm), fn.adapter or "") not in views:
        return None
    unit = scale_and_mask(torch.ones((), dtype=torch.float64), site.scale, site.mask)
    power *= weight * float(unit.sum())
    if power == 0.0:
        return None
    with naming(site.name):
        if isinstance(fn, LMChoice):
            requests, at = tuple(fn.requests()), fn.options.index(value)
            return Factor(site.name, requests, at, power)
        request = fn.request(value)
        if request is None or request.path.rejected:
            raise ValueError(f"site {site.name!r}: {str(value)!r} is impossible there")
        return Factor(site.name, (request,), None, power)


def expected(every: Sequence[Factor]) -> float:
    """The sum of weighted factors, nats, without gradients; scores may be remembered."""
    replies = perform([r for f in every for r in f.requests])
    values = [r.log_prob for r in replies if isinstance(r, ScoreReply)]
    return float(sum(_each(every, torch.tensor(values, dtype=torch.float64))))


def ascend(every: Sequence[Factor], share: float) -> float:
    """Adds the gradient of −share · (the sum of weighted factors) to the adapters' gradients.

    Args:
        every: the factors.
        share: what the sum is multiplied by.

    Returns:
        The sum itself, nats.
    """
    total = 0.0
    for some in _groups(every):
        paths = score_with_gradients([r for f in some for r in f.requests])
        values = torch.stack([p.total for p in paths])
        own = torch.stack(list(_each(some, values))).sum()
        (-share * own).backward()
        total += float(own.detach())
    return total


def _each(every: Sequence[Factor], values: torch.Tensor) -> Iterator[torch.Tensor]:
    at = 0
    for factor in every:
        yield factor.log_prob(values[at : at + len(factor.requests)])
        at += len(factor.requests)


def _groups(every: Sequence[Factor]) -> Iterator[list[Factor]]:
    """Factors of one LM under one adapter, so many that their graph fits into memory."""
    by_adapter: dict[tuple[int, str | None], list[Factor]] = {}
    for factor in every:
        first = factor.requests[0]
        by_adapter.setdefault((id(first.lm), first.adapter), []).append(factor)
    for own in by_adapter.values():
        group: list[Factor] = []
        size = 0
        for factor in own:
            if group and size + len(factor.requests) > TOGETHER:
                yield group
                group, size = [], 0
            group.append(factor)
            size += len(factor.requests)
        yield group


def views_of(sites: Mapping[str, Site]) -> dict[tuple[int, str], TrainableLM]:
    """The trainable views that sites stand on."""
    found = {}
    for site in sites.values():
        fn = site.fn.base if isinstance(site.fn, TemperedFactor) else site.fn
        if isinstance(fn, StringDistribution) and fn.adapter is not None:
            for view in fn.lm.trainables:
                if view.adapter == fn.adapter:
                    found[id(fn.lm), fn.adapter] = view
    return found
