"""A guide that is a mixture of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from langppl.guides.base import Guide, Key, PriorGuide, Scorer
from langppl.guides.function import GuideLike, as_guide
from langppl.guides.gflownet import GFlowNetGuide
from langppl.guides.prompted import PromptedGuide
from langppl.guides.support import covered
from langppl.lm.requests import Reading
from langppl.lm.seeds import generator
from langppl.program import Program
from langppl.program.execution import Choice, Chooser, Execution

NAMES: Mapping[str, Callable[[], Guide]] = {"prior": PriorGuide, "prompted": PromptedGuide}


class MixtureGuide(Guide):
    """Draws all latents of an execution from one of several guides, and weights under all of them.

    q is the sum of the guides' q times their shares, so no weight is larger than any one guide's
    would be over its share: what one guide never proposes, another does, and each draw knows how
    likely all of them were to make it. A share of the prior bounds the weights by the likelihood
    over that share. The price is that each draw is scored under all guides.

    Args:
        guides: guides that know their `log_q`, functions, or `"prior"` and `"prompted"`.
        shares: how often each is drawn from; all equally often if None.

    Raises:
        TypeError: for what is no guide.
        ValueError: for fewer than two guides, shares that are not positive or do not sum to 1, or
            a guide whose numbers are proposed by a Pyro guide, which knows the density of its own
            draws alone.

    `method="smc"`, whose particles follow one law of tokens, does not take it.

    References:
        Owen and Zhou 2000, *Safe and effective importance sampling*. JASA 95(449).

    Example:
        >>> safe = MixtureGuide([guide, "prior"], shares=[0.8, 0.2])
        >>> posterior = infer(story, *pair, guide=safe, num_samples=32)
    """

    name = "mixture"
    is_sequential = False

    def __init__(self, guides: Sequence[GuideLike], shares: Sequence[float] | None = None) -> None:
        if isinstance(guides, str | Guide):
            raise TypeError(f"a mixture takes a list of guides, got {guides!r}")
        self.guides = tuple(_as_guide(g) for g in guides)
        if len(self.guides) < 2:
            raise ValueError(f"a mixture takes at least two guides, got {len(self.guides)}")
        if shares is None:
            shares = [1 / len(self.guides)] * len(self.guides)
        self.shares = tuple(float(s) for s in shares)
        if len(self.shares) != len(self.guides):
            raise ValueError(
                f"a mixture takes a share for each guide: {len(self.guides)} guides, and "
                f"{len(self.shares)} shares"
            )
        if not (all(s > 0.0 for s in self.shares) and abs(math.fsum(self.shares) - 1.0) <= 1e-6):
            raise ValueError(f"shares are above 0 and sum to 1, got {list(self.shares)}")

    def __repr__(self) -> str:
        """The guides and their shares."""
        return f"MixtureGuide({list(self.guides)}, {[round(s, 6) for s in self.shares]})"

    def identity(self) -> str:
        """See `Guide.identity`; of each guide, and the shares in full."""
        parts = [guide.identity() for guide in self.guides]
        return f"{super().identity()} {list(zip(parts, self.shares, strict=True))}"

    def chooser(self, program: Program, key: Key) -> Chooser:
        """See `Guide.chooser`."""
        place = generator((*key, "mixture")).random()
        bounds = np.cumsum(self.shares)
        chosen = min(int(np.searchsorted(bounds, place, side="right")), len(self.guides) - 1)
        with self._covered():
            own = self.guides[chosen].chooser(program, (*key, chosen))
        scorers = self._scorers(program, key)
        so_far = _SoFar(self.shares)

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            choice = own(name, fn, execution)
            # With a share of the prior that it does not count yet, its own log q is not known.
            known = None if choice.defence else choice.log_q
            found = [
                score(name, fn, choice.value, execution) if k != chosen or known is None else known
                for k, score in enumerate(scorers)
            ]
            return replace(choice, log_q=so_far.take(found), defence=0.0)

        return choose

    def given(self, program: Program, values: Mapping[str, Any]) -> Chooser:
        """See `Guide.given`."""
        takers = [guide.given(program, values) for guide in self.guides]
        so_far = _SoFar(self.shares)

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            choices = [take(name, fn, execution) for take in takers]
            return Choice(choices[0].value, so_far.take([_number(c.log_q) for c in choices]))

        return choose

    def scorer(self, program: Program, key: Key) -> Scorer:
        """See `Guide.scorer`; latents are to be asked for in the program's order."""
        scorers = self._scorers(program, key)
        so_far = _SoFar(self.shares)

        def log_q(name: str, fn: Any, value: Any, execution: Execution) -> float:
            return so_far.take([score(name, fn, value, execution) for score in scorers])

        return log_q

    def reads(
        self, program: Program, name: str, fn: Any, execution: Execution
    ) -> tuple[Reading | None, str | None]:
        """See `Guide.reads`; those of the guide with the largest share."""
        return self._largest.reads(program, name, fn, execution)

    def law(self, program: Program, name: str, fn: Any, execution: Execution) -> Any:
        """See `Guide.law`; that of the guide with the largest share."""
        return self._largest.law(program, name, fn, execution)

    @property
    def may_leave_out(self) -> bool:  # type: ignore[override]
        """See `Guide`; all of them may."""
        return all(guide.may_leave_out for guide in self.guides)

    @property
    def _largest(self) -> Guide:
        return self.guides[int(np.argmax(self.shares))]

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `Guide.remarks`; of all of them."""
        return tuple(dict.fromkeys(remark for guide in self.guides for remark in guide.remarks))

    def check(self, program: Program) -> None:
        """See `Guide.check`, of each guide."""
        with self._covered():
            for guide in self.guides:
                guide.check(program)

    def _covered(self) -> AbstractContextManager[None]:
        return covered(not self.may_leave_out)

    def _scorers(self, program: Program, key: Key) -> list[Scorer]:
        return [guide.scorer(program, (*key, k)) for k, guide in enumerate(self.guides)]


class _SoFar:
    """What the guides made of the latents so far: log share + log q of each, nats."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.log_q = np.log(shares)

    def take(self, log_q: Sequence[float]) -> float:
        """Log q (nats) of the next latent under the mixture, given those before it."""
        before = np.logaddexp.reduce(self.log_q)
        self.log_q = self.log_q + np.array(log_q)
        after = np.logaddexp.reduce(self.log_q)
        # What none of them draws stays so, whatever comes after it.
        return -math.inf if after == -math.inf else float(after - before)


def _number(log_q: float | None) -> float:
    assert log_q is not None
    return log_q


def _as_guide(guide: Any) -> Guide:
    if isinstance(guide, str):
        if guide not in NAMES:
            raise ValueError(
                f"unknown guide {guide!r}; a mixture takes {' and '.join(map(repr, NAMES))} by "
                "name, and guides that are trained as objects"
            )
        return NAMES[guide]()
    guide = as_guide(guide)
    assert isinstance(guide, Guide)
    if isinstance(guide, GFlowNetGuide) and callable(guide.numeric):
        raise ValueError(
            "a GFlowNetGuide with numeric=PYRO_GUIDE cannot be part of a mixture: the Pyro guide "
            "knows the density of its own draws alone; use the learned heads, or numeric='prior'"
        )
    return guide
