"""What the training loop needs to know of one draw: its actions, contexts and rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from langppl.distributions import LMChoice, LMString, StringDistribution, Text
from langppl.guides.objectives import Trajectory
from langppl.lm.requests import ScoreReply, ScoreRequest, perform
from langppl.lm.rules import Path
from langppl.lm.scoring import PathLogProbs, score_with_gradients
from langppl.posterior import decode, encode
from langppl.program import Program
from langppl.program.execution import Execution, Site, given, score_all
from langppl.program.scheduler import run


@dataclass
class Part:
    """One latent that the guide covers.

    Attributes:
        site: the latent, with its distribution and value.
        context: ids that the policy reads before it.
    """

    site: Site
    context: tuple[int, ...]

    def requests(self, adapter: str | None) -> list[ScoreRequest]:
        """What to ask the policy for; empty if the value is not the policy's to make."""
        fn, value = self.site.fn, self.site.value
        if isinstance(fn, LMString):
            request = fn.request(value, prompt=self.context, adapter=adapter)
            return [] if request is None else [request]
        assert isinstance(fn, LMChoice)
        return fn.requests(prompt=self.context, adapter=adapter)

    def log_q(self, found: Sequence[PathLogProbs]) -> torch.Tensor:
        """The policy's log-probability of the value, a scalar with gradients."""
        if isinstance(self.site.fn, LMString):
            return found[0].total
        at = self.site.fn.options.index(self.site.value)
        return torch.stack([f.total for f in found]).log_softmax(0)[at]


@dataclass
class Draw:
    """One draw of all latents.

    Attributes:
        key: equal for equal draws.
        parts: the latents that the guide covers.
        log_prior: nats; of those latents under the model.
        log_rest: nats; of all other factors, what the guide does not cover cancelled.
        ends: for SubTB, the end points (position, log prior, log rest), the real one last.
        is_tempered: whether it was drawn from a tempered policy.
        is_given: whether it was not drawn by the guide at all.
        latents: values of all latents, those that the guide does not cover included.
    """

    key: object
    parts: list[Part]
    log_prior: float
    log_rest: float
    ends: list[tuple[int, float, float]] = field(default_factory=list)
    is_tempered: bool = False
    is_given: bool = False
    latents: Mapping[str, Any] = field(default_factory=dict)

    @property
    def log_reward(self) -> float:
        """Log R of the whole draw, nats, untempered."""
        return _plus(self.log_prior, self.log_rest)


def _plus(log_prior: float, log_rest: float, power: float = 1.0) -> float:
    if -math.inf in (log_prior, log_rest):
        return -math.inf
    return log_prior + power * log_rest


def key_of(parts: Sequence[Part], execution: Execution) -> object:
    """What tells one draw from another: tokens of strings, numbers of the rest."""
    covered = {p.site.name for p in parts}
    texts = tuple(
        (
            p.site.name,
            p.site.fn.lm.encode_text(p.site.value)
            if getattr(p.site.value, "ids", None) is None
            else p.site.value.ids,
        )
        for p in parts
    )
    rest = tuple((k, str(v)) for k, v in execution.latents.items() if k not in covered)
    return (texts, rest)


def make_draws(
    program: Program,
    executions: Sequence[Execution],
    contexts: Sequence[Mapping[str, tuple[int, ...]]],
    prefixes: bool,
    log_joints: Sequence[float] | None = None,
    every: int = 1,
) -> list[Draw]:
    """Rewards of executions that a policy proposed.

    Args:
        program: the program.
        executions: unscored runs.
        contexts: for each, the ids that the policy read before each latent it covers.
        prefixes: whether to score every prefix of the (one) latent string as well.
        log_joints: where the log joints are known and need not be told apart (the guide covers
            all latents, and the rewards are not tempered), nats.
        every: which prefixes are scored: those of a multiple of so many tokens.
    """
    if prefixes:
        draws = _draws_with_prefixes(program, executions, contexts, every)
    else:
        draws = _whole_draws(executions, contexts, log_joints)
    for draw, execution in zip(draws, executions, strict=True):
        draw.latents = execution.latents
    return draws


def _whole_draws(
    executions: Sequence[Execution],
    contexts: Sequence[Mapping[str, tuple[int, ...]]],
    log_joints: Sequence[float] | None,
) -> list[Draw]:
    if log_joints is None:
        score_all(executions)
    draws = []
    for at, (execution, context) in enumerate(zip(executions, contexts, strict=True)):
        parts = [Part(execution.sites[name], ids) for name, ids in context.items()]
        if log_joints is not None:
            known = float(log_joints[at])
            draws.append(Draw(key_of(parts, execution), parts, 0.0, known))
            continue
        log_prior = sum(p.site.log_prob or 0.0 for p in parts)
        rest = 0.0
        for site in execution.sites.values():
            if site.name not in context:
                own = site.log_prob or 0.0
                # A latent that the guide does not cover counts as drawn from the prior.
                proposed = own if site.kind == "latent" and site.log_q is None else site.log_q
                rest = -math.inf if own == -math.inf else rest + own - (proposed or 0.0)
        if any(s.log_prob == -math.inf for s in execution.sites.values()):
            log_prior = rest = -math.inf
        draws.append(Draw(key_of(parts, execution), parts, log_prior, rest))
    return draws


def to_record(draw: Draw) -> dict[str, Any]:
    """A draw as JSON can hold it."""
    return {
        "latents": {site: encode(value) for site, value in draw.latents.items()},
        "contexts": {p.site.name: list(p.context) for p in draw.parts},
        "log_prior": draw.log_prior,
        "log_rest": draw.log_rest,
        "ends": [list(end) for end in draw.ends],
        "is_tempered": draw.is_tempered,
        "is_given": draw.is_given,
    }


def from_records(program: Program, records: Sequence[Mapping[str, Any]]) -> list[Draw]:
    """The draws that `to_record` wrote; the program is run for their sites, and nothing scored."""
    rows = [{site: decode(v) for site, v in r["latents"].items()} for r in records]
    executions = program.run([given(row) for row in rows])
    draws = []
    for record, execution in zip(records, executions, strict=True):
        parts = [
            Part(execution.sites[name], tuple(ids)) for name, ids in record["contexts"].items()
        ]
        draws.append(
            Draw(
                key=key_of(parts, execution),
                parts=parts,
                log_prior=record["log_prior"],
                log_rest=record["log_rest"],
                ends=[(int(t), float(p), float(r)) for t, p, r in record["ends"]],
                is_tempered=record["is_tempered"],
                is_given=record["is_given"],
                latents=execution.latents,
            )
        )
    return draws


def _draws_with_prefixes(
    program: Program,
    executions: Sequence[Execution],
    contexts: Sequence[Mapping[str, tuple[int, ...]]],
    every: int,
) -> list[Draw]:
    (name,) = contexts[0]
    parts = [Part(e.sites[name], c[name]) for e, c in zip(executions, contexts, strict=True)]
    requests = [p.site.fn.request(p.site.value) for p in parts]
    # Each distinct prefix is scored once, whatever number of draws begins with it.
    values: dict[object, Text] = {}
    plans: list[list[tuple[int, object]]] = []
    for part, request in zip(parts, requests, strict=True):
        plan: list[tuple[int, object]] = []
        if request is not None:
            path = request.path
            for t in range(0, len(path.tokens), every):
                if len(path.steps[t].canonical):
                    value = prefix_value(part.site.fn, path, t)
                    values.setdefault(value.ids, value)
                    plan.append((t, value.ids))
            key: object = (part.site.fn.tokens_of(part.site.value), "whole")
            if not path.rejected:
                values.setdefault(key, part.site.value)
            plan.append((len(path.tokens), key))
        plans.append(plan)

    def prior() -> Sequence[Any]:
        return perform([r for r in requests if r is not None])

    def rest() -> Sequence[Any]:
        assignments = [{name: v} for v in values.values()]
        return program.executions(assignments, lambda s: s.name != name)

    # Tasks of one scheduler: both ask the LM about the same prefixes, in one pass.
    replies, scored = run([prior, rest])
    log_rest: dict[object, float] = {}
    for key, execution in zip(values, scored, strict=True):
        terms = [s.log_prob for s in execution.sites.values() if s.name != name]
        log_rest[key] = float(sum(t for t in terms if t is not None))
    found = iter(replies)
    draws = []
    for execution, part, request, plan in zip(executions, parts, requests, plans, strict=True):
        ends: list[tuple[int, float, float]] = []
        if request is not None:
            reply: ScoreReply = next(found)
            before = np.concatenate([[0.0], reply.tokens.cumsum()])
            log_priors = [float(before[t] + reply.canonical[t]) for t, _ in plan]
            log_priors[-1] = -math.inf if request.path.rejected else reply.log_prob
            ends = [
                (t, log_prior, log_rest.get(key, -math.inf))
                for (t, key), log_prior in zip(plan, log_priors, strict=True)
            ]
        _, log_prior, last = ends[-1] if ends else (0, -math.inf, -math.inf)
        draws.append(Draw(key_of([part], execution), [part], log_prior, last, ends))
    return draws


def prefix_value(fn: LMString, path: Path, length: int) -> Text:
    """A string cut after some tokens and ended by the canonical ending action there."""
    ids, step = path.tokens[:length], path.steps[length]
    token = step.canonical_token
    data = fn.lm.vocabulary.join(ids)
    if token is not None:
        ids, data = (*ids, token), data + step.kept[token]
    return Text(data.decode("utf-8"), ids, fn.lm.fingerprint)


def policy_scores(draws: Sequence[Draw], adapter: str | None) -> list[list[list[PathLogProbs]]]:
    """The policy's log-probabilities: for each draw, for each part, for each of its requests."""
    requests = [[p.requests(adapter) for p in d.parts] for d in draws]
    flat = iter(score_with_gradients([r for d in requests for p in d for r in p]))
    return [[[next(flat) for _ in p] for p in d] for d in requests]


def log_q(draw: Draw, found: Sequence[Sequence[PathLogProbs]]) -> torch.Tensor:
    """The policy's log-probability of a whole draw, a scalar with gradients."""
    terms = [part.log_q(f) for part, f in zip(draw.parts, found, strict=True)]
    return torch.stack(terms).sum()


def trajectory(draw: Draw, found: PathLogProbs, power: float) -> Trajectory:
    """A draw of one string as SubTB sees it, its reward tempered."""
    device = found.tokens.device
    positions = [t for t, _, _ in draw.ends]
    inner = found.canonical[torch.tensor(positions[:-1], dtype=torch.long, device=device)]
    rewards = [_plus(prior, rest, power) for _, prior, rest in draw.ends]
    return Trajectory(
        log_q=found.tokens,
        ends=torch.tensor(positions, dtype=torch.long, device=device),
        log_q_end=torch.cat([inner, found.ending[None]]),
        log_reward=torch.tensor(rewards, dtype=found.tokens.dtype, device=device),
    )


def covered(fn: Any, lm: Any) -> bool:
    """Whether a guide on an LM proposes a latent of this distribution."""
    return isinstance(fn, StringDistribution) and fn.lm is lm
