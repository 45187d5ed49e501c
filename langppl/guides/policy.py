"""What a GFlowNet guide does in one execution: it decides the latents and keeps their contexts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from langppl.distributions import StringDistribution
from langppl.guides.base import Key, raw_log_prob
from langppl.guides.checks import check_number, check_run, name_of
from langppl.guides.guidance import Reader
from langppl.guides.heads import Heads, head_of
from langppl.guides.support import tell_left_out
from langppl.lm.model import LM
from langppl.lm.requests import Guided, Reading, StateReply, StateRequest, perform
from langppl.lm.seeds import generator, seeded
from langppl.program import Program
from langppl.program.apart import unseen
from langppl.program.densities import log_density
from langppl.program.execution import (
    Choice,
    Execution,
    Site,
    choice_of_number,
    draw_number,
    draw_prior,
    mixed,
    run_once,
)
from langppl.program.execution import given as given_values
from langppl.program.statements import as_value


@dataclass
class Proposer:
    """What a guide proposes with.

    Attributes:
        lm: the LM.
        adapter: name of the adapter on it.
        reader: makes what the policy reads.
        heads: for numeric latents; None to draw these from the prior.
        numeric: a Pyro guide that proposes them instead, a function of the model's arguments.
        told: the names of that guide's sites which a warning has said are no latents.
    """

    lm: LM
    adapter: str
    reader: Reader
    heads: Heads | None = None
    numeric: Callable[..., Any] | None = None
    told: set[str] = field(default_factory=set)

    def covers(self, fn: Any) -> bool:
        """Whether the policy proposes a latent of this distribution."""
        if isinstance(fn, StringDistribution):
            return fn.lm is self.lm
        return self.heads is not None and self.numeric is None and head_of(fn) is not None


class Policy:
    """Decides the latents of one execution.

    Args:
        proposer: the guide's means.
        program: the program.
        key: what the random numbers depend on.
        temperature: divides the logits of strings and choices.
        values: latents that are given; those that are not are an error.
        defensive: share of proposals that are drawn from the prior.

    Attributes:
        contexts: of each latent that the policy covers, what it read before it.
    """

    def __init__(
        self,
        proposer: Proposer,
        program: Program,
        key: Key,
        temperature: float = 1.0,
        values: Mapping[str, Any] | None = None,
        defensive: float = 0.0,
    ) -> None:
        self.proposer, self.program, self.key = proposer, program, key
        self.temperature, self.defensive = temperature, defensive
        self.values = values
        self.contexts: dict[str, Reading] = {}
        self._proposed: Mapping[str, Site] | None = None

    def __call__(self, name: str, fn: Any, execution: Execution) -> Choice:
        """See `langppl.program.execution.Chooser`."""
        own, key = self.proposer, (*self.key, name)
        covered = own.covers(fn)
        if covered:
            self.contexts[name] = own.reader.reading(self.program, name, fn, execution, own.lm)
        if self.values is not None:
            return given_values(self.values)(name, fn, execution)
        if not covered:
            return self._elsewhere(name, fn, key, execution)
        return self._propose(name, fn, key)

    def log_q(self, name: str, fn: Any, value: Any, execution: Execution) -> float:
        """See `langppl.guides.base.Scorer`; at temperature 1."""
        own = self.proposer
        if not own.covers(fn):
            site = self._site_elsewhere(name, fn, execution)
            return raw_log_prob(fn if site is None else site.fn, value)
        prompt = own.reader.reading(self.program, name, fn, execution, own.lm)
        if isinstance(fn, StringDistribution):
            log_q = raw_log_prob(fn, value, prompt, own.adapter)
        else:
            log_q = log_density(self._made(fn, prompt), value)
        if self.defensive:
            log_q = mixed(log_q, raw_log_prob(fn, value), self.defensive)
        return log_q

    def _propose(self, name: str, fn: Any, key: Key) -> Choice:
        own, prompt = self.proposer, self.contexts[name]
        if not isinstance(fn, StringDistribution):
            return self._number(fn, key, prompt)
        if not self.defensive:
            value, log_q = fn.draw(
                key, prompt=prompt, adapter=own.adapter, temperature=self.temperature
            )
            return Choice(value, log_q)
        if generator((*key, "defence")).random() < self.defensive:
            prior = draw_prior(fn, (*key, "prior"))
            log_q = raw_log_prob(fn, prior.value, prompt, own.adapter)
            assert prior.log_q is not None
            return replace(prior, log_q=mixed(log_q, prior.log_q, self.defensive))
        value, log_q = fn.draw(key, prompt=prompt, adapter=own.adapter)
        if fn.why_impossible(value) is None:
            return Choice(value, log_q, defence=self.defensive)
        # A string that is rejected has no log_prob, but the prior does propose it.
        return Choice(value, mixed(log_q, raw_log_prob(fn, value), self.defensive))

    def _number(self, fn: Any, key: Key, prompt: Reading) -> Choice:
        made = self._made(fn, prompt)
        if self.defensive and generator((*key, "defence")).random() < self.defensive:
            value = draw_number(fn, (*key, "prior"))
        else:
            value = draw_number(made, key)
        log_q = log_density(made, value)
        if self.defensive:
            log_q = mixed(log_q, log_density(fn, value), self.defensive)
        return choice_of_number(made, value, log_q)

    def _made(self, fn: Any, prompt: Reading) -> Any:
        """What the heads propose for a number after a context."""
        own = self.proposer
        assert own.heads is not None and not isinstance(prompt, Guided)
        (reply,) = perform([StateRequest(own.lm, prompt, own.adapter)])
        assert isinstance(reply, StateReply)
        with torch.no_grad():
            return own.heads.proposal(fn, torch.from_numpy(reply.state))

    def _elsewhere(self, name: str, fn: Any, key: Key, execution: Execution) -> Choice:
        """A latent that is not the policy's: from the user's guide, else from the prior."""
        site = self._site_elsewhere(name, fn, execution)
        if site is None:
            return draw_prior(fn, key)
        return choice_of_number(site.fn, site.value, log_density(site.fn, site.value))

    def _site_elsewhere(self, name: str, fn: Any, execution: Execution) -> Site | None:
        """A latent's site in the user's guide, None where the prior proposes it.

        The guide goes on from the numbers that the execution has already, be they its own or not.
        """
        if self.proposer.numeric is None or isinstance(fn, StringDistribution):
            return None
        if self._proposed is None:
            key = (*self.key, "pyro")
            self._proposed = self._run_numeric(key, _numbers(execution.latents))
        return self._proposed_at(name, fn)

    def _run_numeric(self, key: Key, known: Mapping[str, Any]) -> Mapping[str, Site]:
        own = self.proposer
        assert own.numeric is not None
        execution = run_pyro_guide(own.numeric, self.program.shown_args, key, known)
        check_run(name_of(own.numeric), self.program, execution, own.told)
        return {n: site for n, site in execution.sites.items() if site.kind == "latent"}

    def _proposed_at(self, name: str, fn: Any) -> Site | None:
        assert self._proposed is not None and self.proposer.numeric is not None
        site = self._proposed.get(name)
        if site is not None:
            guide = name_of(self.proposer.numeric)
            check_number(guide, name, fn, site.fn)
            tell_left_out(guide, self.program, name, fn, site.fn, self.proposer.told)
        return site


class RewardedPolicy(Policy):
    """Takes given latents, and of those that are not the policy's knows how they are proposed.

    Attributes:
        is_proposable: whether what proposes these latents can draw the values that were given.
    """

    is_proposable = True

    def __call__(self, name: str, fn: Any, execution: Execution) -> Choice:
        """See `langppl.program.execution.Chooser`."""
        choice = super().__call__(name, fn, execution)
        if self.proposer.covers(fn):
            return choice
        log_q = self._log_q_elsewhere(name, fn, choice.value)
        self.is_proposable &= log_q > -math.inf
        return replace(choice, log_q=log_q)

    def _log_q_elsewhere(self, name: str, fn: Any, value: Any) -> float:
        own = self.proposer
        if own.numeric is None or isinstance(fn, StringDistribution):
            return raw_log_prob(fn, value)
        if self._proposed is None:
            assert self.values is not None
            numbers = _numbers(self.values)
            self._proposed = self._run_numeric((), numbers)
            unknown = sorted(self._proposed.keys() - self.values.keys())
            if unknown:
                raise ValueError(
                    f"the Pyro guide draws {unknown[0]!r}, which the given latents "
                    f"({', '.join(self.values)}) lack, so it does not know their probability"
                )
        site = self._proposed_at(name, fn)
        return log_density(fn if site is None else site.fn, value)


class GivenPolicy(RewardedPolicy):
    """Takes given latents, and knows with which probability the policy would have drawn them.

    Args:
        proposer: the guide's means.
        program: the program.
        values: latent → value.
        defensive: share of proposals that are drawn from the prior.
    """

    def __init__(
        self, proposer: Proposer, program: Program, values: Mapping[str, Any], defensive: float
    ) -> None:
        super().__init__(proposer, program, (), values=values, defensive=defensive)

    def __call__(self, name: str, fn: Any, execution: Execution) -> Choice:
        """See `langppl.program.execution.Chooser`."""
        choice = super().__call__(name, fn, execution)
        if not self.proposer.covers(fn):
            return choice
        value, prompt = choice.value, self.contexts[name]
        if isinstance(fn, StringDistribution):
            log_q = raw_log_prob(fn, value, prompt, self.proposer.adapter)
        else:
            log_q = log_density(self._made(fn, prompt), value)
        if self.defensive:
            log_q = mixed(log_q, raw_log_prob(fn, value), self.defensive)
        return Choice(value, log_q)


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: as_value(v) for k, v in values.items() if not isinstance(v, str)}


def run_pyro_guide(
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    key: Key,
    values: Mapping[str, Any] | None = None,
) -> Execution:
    """One run of a Pyro guide, which no handler of the model sees.

    Args:
        guide: the Pyro guide.
        args: the model's arguments.
        key: what the random numbers depend on.
        values: of sites that are not drawn.
    """
    seed = int(generator(key).integers(2**62))
    choose = given_values(values or {}, otherwise=lambda name, fn, execution: Choice(fn()))
    with unseen(), seeded(seed), torch.no_grad():
        return run_once(guide, args, choose)
