"""What the training loop needs to know of one draw: its actions, contexts and rewards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from langppl.distributions import LMChoice, LMString, Text
from langppl.guides.heads import Heads
from langppl.guides.objectives import Actions, Trajectory
from langppl.lm.divergence import step_divergences
from langppl.lm.model import LM
from langppl.lm.requests import (
    Guided,
    Reading,
    ScoreReply,
    ScoreRequest,
    StateRequest,
    perform,
)
from langppl.lm.rules import Path
from langppl.lm.scoring import PathLogProbs, score_with_gradients
from langppl.program import Program
from langppl.program.densities import log_density
from langppl.program.execution import (
    Choice,
    Execution,
    Pause,
    Site,
    given,
    is_plain,
    score_all,
)
from langppl.program.keys import hashable
from langppl.program.scheduler import run
from langppl.records import decode, encode


@dataclass
class Part:
    """One latent that the guide covers.

    Attributes:
        site: the latent, with its distribution and value.
        context: what the policy reads before it.
    """

    site: Site
    context: Reading

    def requests(self, lm: LM, adapter: str | None) -> list[ScoreRequest | StateRequest]:
        """What to ask the policy for; empty if the value is not the policy's to make."""
        fn, value = self.site.fn, self.site.value
        if isinstance(fn, LMString):
            request = fn.request(value, prompt=self.context, adapter=adapter)
            return [] if request is None else [request]
        if isinstance(fn, LMChoice):
            is_option = value in fn.options
            return list(fn.requests(prompt=self.context, adapter=adapter)) if is_option else []
        assert not isinstance(self.context, Guided)
        return [StateRequest(lm, self.context, adapter)]

    def is_drawable(self, lm: LM) -> bool:
        """Whether the value is the policy's to make: it keeps the rules, or has a density."""
        if self.site.is_string:
            return bool(self.requests(lm, None))
        return math.isfinite(log_density(self.site.fn, self.site.value))

    def log_q(self, found: Sequence[PathLogProbs], heads: Heads | None) -> torch.Tensor:
        """The policy's log-probability of the value, a scalar with gradients."""
        fn = self.site.fn
        if isinstance(fn, LMString):
            return found[0].total
        if isinstance(fn, LMChoice):
            at = fn.options.index(self.site.value)
            return torch.stack([f.total for f in found]).log_softmax(0)[at]
        state = found[0].state
        assert heads is not None and state is not None
        log_prob: torch.Tensor = heads.proposal(fn, state).log_prob(self.site.value)
        # Of any type by now; the parts of a draw are in one, and not every device knows float64.
        return log_prob.sum().to(state.device, torch.float32)


@dataclass
class Piece:
    """Latents that are independent of all others given the observations.

    Attributes:
        parts: which of a draw's parts they are.
        log_prior: nats; of those latents under the model; of what else the guide does not cover and
            depends on them, over what proposes it.
        log_rest: nats; of all other factors that depend on them.
    """

    parts: list[int]
    log_prior: float
    log_rest: float


@dataclass
class Draw:
    """One draw of all latents.

    Attributes:
        key: equal for equal draws.
        parts: the latents that the guide covers.
        log_prior: nats; of the latents under the model, those that the guide does not cover over
            what proposes them, so that they cancel if that is the prior.
        log_rest: nats; of all other factors, which a reward's power is of.
        ends: for SubTB over prefixes, the end points (position, log prior, log rest) of the first
            part, the real one last; latents that are met after it belong to that one.
        stages: after each part, log prior and log rest so far: of the factors that are known by
            then, without those that are independent of all parts.
        pieces: the independent pieces with a part of it, if others are independent of them.
        is_tempered: whether it was drawn from a tempered policy.
        is_given: whether it was not drawn by the guide at all.
        latents: values of all latents, those that the guide does not cover included.
    """

    key: object
    parts: list[Part]
    log_prior: float
    log_rest: float
    ends: list[tuple[int, float, float]] = field(default_factory=list)
    stages: list[tuple[float, float]] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    is_tempered: bool = False
    is_given: bool = False
    latents: Mapping[str, Any] = field(default_factory=dict)

    @property
    def log_reward(self) -> float:
        """Log R of the whole draw, nats, untempered."""
        return plus(self.log_prior, self.log_rest)

    @property
    def balanced(self) -> tuple[float, float]:
        """Log prior and log rest, nats, of what is not independent of all parts."""
        return self.stages[-1] if self.stages else (self.log_prior, self.log_rest)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids of its strings, −1 between them; none if it has other latents as well."""
        if len(self.latents) > sum(isinstance(p.site.value, str) for p in self.parts):
            return ()
        return tuple(t for p in self.parts for t in (*_tokens(p), -1))


def plus(log_prior: float, log_rest: float, power: float = 1.0) -> float:
    """Log R (nats) at a power of the reward; −inf if either is."""
    if -math.inf in (log_prior, log_rest):
        return -math.inf
    return log_prior + power * log_rest


def _tokens(part: Part) -> tuple[int, ...]:
    value = part.site.value
    if not isinstance(value, str):
        return ()
    ids = getattr(value, "ids", None)
    return part.site.fn.lm.encode_text(value) if ids is None else ids  # type: ignore[no-any-return]


def key_of(parts: Sequence[Part], execution: Execution) -> object:
    """What tells one draw from another: tokens of strings, numbers of the rest."""
    strings = {p.site.name: _tokens(p) for p in parts if isinstance(p.site.value, str)}
    rest = tuple((k, hashable(v)) for k, v in execution.latents.items() if k not in strings)
    return (tuple(strings.items()), rest)


Contexts = Mapping[str, Reading]


@dataclass
class Batch:
    """Executions of one program that await their rewards.

    Attributes:
        program: the program.
        executions: unscored runs.
        contexts: for each, what the policy read before each latent it covers.
        prefixes: whether to score every prefix of the first latent, a string, as well: of the one
            that the program is known to have.
        log_joints: where the log joints are known and need not be told apart (the guide covers
            all latents, and the rewards are not tempered), nats.
        every: which prefixes are scored: those of a multiple of so many tokens.
    """

    program: Program
    executions: Sequence[Execution]
    contexts: Sequence[Contexts]
    prefixes: bool = False
    log_joints: Sequence[float] | None = None
    every: int = 1


def make_draws(batches: Sequence[Batch]) -> list[list[Draw]]:
    """Rewards of what a policy proposed, of all programs in one go.

    Args:
        batches: executions of one program each.

    Returns:
        The draws of each batch.
    """
    plain = [b for b in batches if not b.prefixes and b.log_joints is None]
    # Where parts of a program are balanced apart, an impossible one leaves the others theirs.
    several = [
        b
        for b in plain
        if any(len(c) > 1 for c in b.contexts) or len(b.program.graph.independent()) > 1
    ]
    score_all([e for b in several for e in b.executions], whole=True)
    score_all([e for b in plain for e in b.executions])
    plans = [_Prefixes(b) if b.prefixes else None for b in batches]
    # Tasks of one scheduler: all ask the LM about the same prefixes, in one pass.
    answers = iter(run([task for p in plans if p is not None for task in (p.prior, p.rest)]))
    found = []
    for batch, plan in zip(batches, plans, strict=True):
        if plan is None:
            draws = _whole_draws(batch)
        else:
            replies, scored = next(answers), next(answers)
            draws = plan.draws(replies, scored)
        for draw, execution in zip(draws, batch.executions, strict=True):
            draw.latents = execution.latents
        found.append(draws)
    return found


def _whole_draws(batch: Batch) -> list[Draw]:
    draws = []
    graph = batch.program.graph
    above = {name: graph.latents_above(name) for name in graph}
    independent = graph.independent()
    for at, (execution, context) in enumerate(zip(batch.executions, batch.contexts, strict=True)):
        parts = [Part(execution.sites[name], ids) for name, ids in context.items()]
        if batch.log_joints is not None:
            known = float(batch.log_joints[at])
            draws.append(Draw(key_of(parts, execution), parts, 0.0, known))
            continue
        terms = _terms(above, execution, parts)
        total = _sums(terms.values())
        draw = Draw(key_of(parts, execution), parts, *total)
        groups = [g for g in independent if any(p.site.name in g for p in parts)]
        balanced = list(terms.values())
        # Sites that the graph misses, as in a loop longer than any before, may depend on all.
        if groups and len(independent) > 1 and terms.keys() <= above.keys():
            for k, group in enumerate(groups):
                own = (t for t in terms.values() if t.of & group or (k == 0 and not t.of))
                members = [n for n, p in enumerate(parts) if p.site.name in group]
                draw.pieces.append(Piece(members, *_sums(own)))
            # What is independent of all that the policy proposes is noise to it.
            balanced = [t for t in balanced if not t.of or any(t.of & g for g in groups)]
        draw.stages = [_sums(t for t in balanced if t.stage <= k) for k in range(len(parts))]
        draws.append(draw)
    return draws


@dataclass
class _Term:
    """One factor of a joint density.

    Attributes:
        log_prior: nats, if it is a latent; of one that the guide does not cover, over what
            proposes it.
        log_rest: nats, if it is none.
        stage: number of the part with which it is known.
        of: the latents that it depends on, itself included.
    """

    log_prior: float
    log_rest: float
    stage: int
    of: set[str]


def _terms(
    above: Mapping[str, set[str]], execution: Execution, parts: Sequence[Part]
) -> dict[str, _Term]:
    """The factors of an execution, by site; `above`: the latents that each site depends on."""
    number = {p.site.name: k for k, p in enumerate(parts)}
    terms = {}
    latest = 0
    for name, site in execution.sites.items():
        own = site.log_prob or 0.0
        latest = number.get(name, latest)
        if name in above:
            of = above[name] | ({name} if site.kind == "latent" else set())
            stage = max((number[n] for n in of if n in number), default=0)
        else:  # a site that no earlier run had met is known when it is met
            of, stage = set(execution.latents), latest
        if name in number:
            terms[name] = _Term(own, 0.0, number[name], of)
            continue
        if site.kind != "latent":
            terms[name] = _Term(0.0, own, stage, of)
            continue
        # A latent that the guide does not cover counts as drawn from the prior.
        proposed = _log_prior(site) if site.log_q is None else site.log_q
        ratio = -math.inf if -math.inf in (own, proposed) else own - proposed
        terms[name] = _Term(ratio, 0.0, stage, of)
    return terms


def _log_prior(site: Site) -> float:
    """Log-probability (nats) with which the prior draws a latent's value."""
    return site.log_prob or 0.0 if site.is_string else log_density(site.fn, site.value)


def _sums(terms: Iterable[_Term]) -> tuple[float, float]:
    """Log prior and log rest of some factors together; both −inf if one is impossible."""
    log_prior = log_rest = 0.0
    for term in terms:
        log_prior, log_rest = log_prior + term.log_prior, log_rest + term.log_rest
    if -math.inf in (log_prior, log_rest):
        return -math.inf, -math.inf
    return log_prior, log_rest


def to_record(draw: Draw) -> dict[str, Any]:
    """A draw as JSON can hold it."""
    return {
        "latents": {site: encode(value) for site, value in draw.latents.items()},
        "contexts": {p.site.name: _context_to_record(p.context) for p in draw.parts},
        "log_prior": draw.log_prior,
        "log_rest": draw.log_rest,
        "ends": [list(end) for end in draw.ends],
        "stages": [list(stage) for stage in draw.stages],
        "pieces": [[p.parts, p.log_prior, p.log_rest] for p in draw.pieces],
        "is_tempered": draw.is_tempered,
        "is_given": draw.is_given,
    }


def _context_to_record(context: Reading) -> Any:
    if isinstance(context, Guided):
        return {
            "prompt": list(context.prompt),
            "without": list(context.without),
            "scale": context.scale,
        }
    return list(context)


def _context_from_record(record: Any) -> Reading:
    if isinstance(record, Mapping):
        return Guided(tuple(record["prompt"]), tuple(record["without"]), float(record["scale"]))
    return tuple(record)


def from_records(program: Program, records: Sequence[Mapping[str, Any]]) -> list[Draw]:
    """The draws that `to_record` wrote; the program is run for their sites, and nothing scored."""
    rows = [{site: decode(v) for site, v in r["latents"].items()} for r in records]
    executions = program.run([given(row) for row in rows])
    draws = []
    for record, execution in zip(records, executions, strict=True):
        parts = [
            Part(execution.sites[name], _context_from_record(context))
            for name, context in record["contexts"].items()
        ]
        draws.append(
            Draw(
                key=key_of(parts, execution),
                parts=parts,
                log_prior=record["log_prior"],
                log_rest=record["log_rest"],
                ends=[(int(t), float(p), float(r)) for t, p, r in record["ends"]],
                stages=[(float(p), float(r)) for p, r in record["stages"]],
                pieces=[Piece(list(k), float(p), float(r)) for k, p, r in record["pieces"]],
                is_tempered=record["is_tempered"],
                is_given=record["is_given"],
                latents=execution.latents,
            )
        )
    return draws


class _Prefixes:
    """What is to be scored for the rewards at every prefix of one latent string.

    A rare string may lead to latents that the program was not known to have. What a prefix that
    leads there is worth depends on their values, so it is no end point; a whole draw has them.
    """

    def __init__(self, batch: Batch) -> None:
        (self.name,) = batch.program.latents
        self.batch = batch
        self.parts = [
            Part(e.sites[self.name], c[self.name])
            for e, c in zip(batch.executions, batch.contexts, strict=True)
        ]
        self.further = [e for e in batch.executions if len(e.latents) > 1]
        self.requests = [p.site.fn.request(p.site.value) for p in self.parts]
        # Each distinct prefix is scored once, whatever number of draws begins with it.
        self.values: dict[object, Text] = {}
        self.plans: list[list[tuple[int, object]]] = []
        for execution, part, request in zip(
            batch.executions, self.parts, self.requests, strict=True
        ):
            plan: list[tuple[int, object]] = []
            if request is not None:
                path = request.path
                for t in range(0, len(path.tokens), batch.every):
                    if len(path.steps[t].canonical):
                        value = prefix_value(part.site.fn, path, t)
                        self.values.setdefault(value.ids, value)
                        plan.append((t, value.ids))
                key: object = (part.site.fn.tokens_of(part.site.value), "whole")
                if not path.rejected and len(execution.latents) == 1:
                    self.values.setdefault(key, part.site.value)
                plan.append((len(path.tokens), key))
            self.plans.append(plan)

    def prior(self) -> Sequence[Any]:
        return perform([r for r in self.requests if r is not None])

    def rest(self) -> Sequence[Any]:
        def pause(name: str, fn: Any, _: Execution) -> Choice:
            raise Pause(name, fn)

        assignments = [{self.name: v} for v in self.values.values()]
        score_all(self.further)
        return self.batch.program.executions(assignments, lambda s: s.name != self.name, pause)

    def draws(self, replies: Sequence[Any], scored: Sequence[Any]) -> list[Draw]:
        log_rest: dict[object, float | None] = {}
        for key, execution in zip(self.values, scored, strict=True):
            terms = [s.log_prob for s in execution.sites.values() if s.name != self.name]
            known = float(sum(t for t in terms if t is not None))
            log_rest[key] = known if execution.pause is None else None
        found = iter(replies)
        draws = []
        graph = self.batch.program.graph
        above = {name: graph.latents_above(name) for name in graph}
        for execution, context, part, request, plan in zip(
            self.batch.executions,
            self.batch.contexts,
            self.parts,
            self.requests,
            self.plans,
            strict=True,
        ):
            parts = [Part(execution.sites[name], ids) for name, ids in context.items()]
            ends: list[tuple[int, float, float]] = []
            if request is not None:
                reply: ScoreReply = next(found)
                before = np.concatenate([[0.0], reply.tokens.cumsum()])
                log_priors = [float(before[t] + reply.canonical[t]) for t, _ in plan]
                log_priors[-1] = -math.inf if request.path.rejected else reply.log_prob
                log_priors = [part.site.counted(p) for p in log_priors]
                rests = [log_rest.get(key, -math.inf) for _, key in plan]
                if len(execution.latents) > 1:
                    whole = _sums(_terms(above, execution, parts).values())
                    log_priors[-1], rests[-1] = whole
                ends = [
                    (t, log_prior, rest)
                    for (t, _), log_prior, rest in zip(plan, log_priors, rests, strict=True)
                    if rest is not None
                ]
            _, log_prior, last = ends[-1] if ends else (0, -math.inf, -math.inf)
            draws.append(Draw(key_of(parts, execution), parts, log_prior, last, ends))
        return draws


def prefix_value(fn: LMString, path: Path, length: int) -> Text:
    """A string cut after some tokens and ended by the canonical ending action there."""
    ids, step = path.tokens[:length], path.steps[length]
    token = step.canonical_token
    data = fn.lm.vocabulary.join(ids)
    if token is not None:
        ids, data = (*ids, token), data + step.kept[token]
    return Text(data.decode("utf-8"), ids, fn.lm.fingerprint)


Found = list[list[PathLogProbs]]
"""For each part of a draw, for each of its requests, what the policy said."""


def policy_scores(
    draws: Sequence[Draw], lm: LM, adapter: str | None, with_states: bool = False
) -> list[Found]:
    """The policy's log-probabilities and states of some draws, from one packed pass.

    Args:
        draws: the draws.
        lm: the guide's LM.
        adapter: the guide's adapter.
        with_states: whether the state before each action is wanted too.
    """
    requests = [[p.requests(lm, adapter) for p in d.parts] for d in draws]
    flat = iter(score_with_gradients([r for d in requests for p in d for r in p], with_states))
    return [[[next(flat) for _ in p] for p in d] for d in requests]


def actions_of(
    draws: Sequence[Draw], scores: Sequence[Found], log_qs: Sequence[torch.Tensor], lm: LM
) -> list[Actions]:
    """Draws action by action, with the policy's divergence from the prior at every state.

    It is known of strings whose prior is the guide's own LM and counts once; any other part is one
    action.

    Args:
        draws: the draws.
        scores: what the policy said of each, with states.
        log_qs: log q of each one's parts, shape [parts].
        lm: the guide's LM.
    """
    known: list[tuple[PathLogProbs, ScoreRequest]] = []
    at: dict[tuple[int, int], int] = {}
    for k, (draw, found) in enumerate(zip(draws, scores, strict=True)):
        for n, part in enumerate(draw.parts):
            fn = part.site.fn
            counts_once = is_plain(part.site.scale, part.site.mask)
            if isinstance(fn, LMString) and fn.lm is lm and counts_once:
                request = fn.request(part.site.value)
                assert request is not None  # the policy drew it under the same rules
                at[k, n] = len(known)
                known.append((found[n][0], request))
    of_strings = _actions_of_strings(known, lm)
    actions = []
    for k, (draw, own_log_q) in enumerate(zip(draws, log_qs, strict=True)):
        parts = [
            of_strings[at[k, n]] if (k, n) in at else _action_of(part, own_log_q[n : n + 1])
            for n, part in enumerate(draw.parts)
        ]
        actions.append(Actions(*(torch.cat(rows) for rows in zip(*parts, strict=True))))
    return actions


_Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""What `Actions` has of a part of a draw, in its order."""


def _action_of(part: Part, log_q: torch.Tensor) -> _Rows:
    """A part that is one action, of which only the draw tells how far it is from the prior."""
    sampled = log_q.detach() - (part.site.log_prob or 0.0)
    return log_q, torch.zeros_like(log_q), sampled, sampled


def _actions_of_strings(known: Sequence[tuple[PathLogProbs, ScoreRequest]], lm: LM) -> list[_Rows]:
    """Strings action by action.

    Args:
        known: of each, what the policy said of it, with states, and what to ask the prior.
        lm: the guide's LM.
    """
    priors: dict[int, PathLogProbs] = {}
    for adapter in {r.adapter for _, r in known}:  # a view's strings have a prior of their own
        own_prior = [i for i, (_, r) in enumerate(known) if r.adapter == adapter]
        with torch.no_grad():
            scored = score_with_gradients([known[i][1] for i in own_prior], with_states=True)
        priors.update(zip(own_prior, scored, strict=True))
    divergences: list[torch.Tensor] = [torch.empty(0)] * len(known)
    # Strings of one temperature at a time, whatever sites they are of.
    for temperature in {r.temperature for _, r in known}:
        members = [i for i, (_, r) in enumerate(known) if r.temperature == temperature]
        steps = [s for i in members for s in known[i][1].path.steps]
        own = [s for i in members if (s := known[i][0].states) is not None]
        other = [s for i in members if (s := priors[i].states) is not None]
        kls = step_divergences(lm, steps, torch.cat(own), torch.cat(other), temperature)
        pieces = kls.split([len(known[i][1].path.steps) for i in members])
        for i, piece in zip(members, pieces, strict=True):
            divergences[i] = piece
    found = []
    for i, ((path, _), divergence) in enumerate(zip(known, divergences, strict=True)):
        ends = len(divergence) > len(path.tokens)
        of_q, of_p = (
            torch.cat([p.tokens, *([p.ending[None]] if ends else [])]) for p in (path, priors[i])
        )
        found.append((of_q, divergence, torch.zeros_like(divergence), of_q.detach() - of_p))
    return found


def log_q(draw: Draw, found: Found, heads: Heads | None) -> torch.Tensor:
    """The policy's log-probability of each part of a draw, shape [parts], with gradients."""
    if not draw.parts:
        return torch.zeros(0)
    return torch.stack([p.log_q(f, heads) for p, f in zip(draw.parts, found, strict=True)])


def trajectory(
    draw: Draw,
    found: PathLogProbs,
    power: float,
    further: torch.Tensor | float = 0.0,
    offset: float = 0.0,
) -> Trajectory:
    """A draw of one string as SubTB over prefixes sees it, its reward tempered.

    Args:
        draw: the draw.
        found: what the policy said of the string.
        power: of the reward.
        further: log q of latents that this string led to, nats.
        offset: taken off every log reward, nats.
    """
    device = found.tokens.device
    positions = [t for t, _, _ in draw.ends]
    inner = found.canonical[torch.tensor(positions[:-1], dtype=torch.long, device=device)]
    rewards = [plus(prior, rest, power) - offset for _, prior, rest in draw.ends]
    return Trajectory(
        log_q=found.tokens,
        ends=torch.tensor(positions, dtype=torch.long, device=device),
        log_q_end=torch.cat([inner, (found.ending + further)[None]]),
        log_reward=torch.tensor(rewards, dtype=found.tokens.dtype, device=device),
    )


def site_trajectory(
    draw: Draw, log_q: torch.Tensor, flows: torch.Tensor, power: float
) -> Trajectory:
    """A draw of several latents as SubTB over sites sees it: what is known counts, the rest flows.

    The flow after some latents is exp(learned flow) times the factors that are known by then
    (forward-looking: Pan et al. 2023, arXiv 2302.01687).

    Args:
        draw: the draw.
        log_q: of each of its parts, shape [parts].
        flows: learned, nats, of the state before each part but the first, shape [parts − 1].
        power: of the reward.
    """
    known = log_q.new_tensor([plus(prior, rest, power) for prior, rest in draw.stages[:-1]])
    last = log_q.new_tensor([plus(*draw.balanced, power)])
    return Trajectory(
        log_q=log_q,
        ends=torch.arange(1, len(draw.parts) + 1, device=log_q.device),
        log_q_end=torch.zeros_like(log_q),
        log_reward=torch.cat([known + flows, last]),
    )
