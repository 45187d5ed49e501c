"""What a guide is: it proposes values for the latents and knows their log q."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from langppl.diagnostics import Array
from langppl.distributions import LMChoice, StringDistribution
from langppl.guides import identity
from langppl.lm.counts import as_count
from langppl.lm.requests import Reading, ScoreReply, perform
from langppl.lm.seeds import as_seed, row_seed
from langppl.program import Program, run_together
from langppl.program.arguments import pairs_of
from langppl.program.densities import log_density
from langppl.program.execution import Choice, Chooser, Execution, check_number, draw_prior
from langppl.program.execution import given as given_values
from langppl.program.program import as_program, programs_of
from langppl.progress import bar

Key = tuple[int | str, ...]
"""What the random numbers of an execution depend on; a site's are those of (*key, name)."""

_TOGETHER = 256
"""Raw draws that are made at once."""

Scorer = Callable[[str, Any, Any, Execution], float]
"""Log-probability (nats) with which a guide proposes a value.

Takes the latent's name, its distribution, the value, and the execution before it.
"""


class Guide(ABC):
    """Proposes values for a program's latents.

    A guide of your own needs `chooser`; with `given` it also has `log_q`, by which the bounds of
    `langppl.evidence_bounds` are made.

    Attributes:
        name: shown in tables.
        flows: the latents before which `log_flow` is known, by name, with "#" for numbers.
        is_sequential: whether a string's log q is that of the law that draws its tokens, so that
            `method="smc"` can follow it.
        may_leave_out: whether it may have rules that leave out what a program allows.
    """

    name: str = "guide"
    is_sequential: bool = True
    may_leave_out: bool = False
    flows: Collection[str] = ()

    @abstractmethod
    def chooser(self, program: Program, key: Key) -> Chooser:
        """What decides the latents of one execution.

        Each `Choice` it makes carries `log_q`, the log-probability (nats) with which the value
        was drawn. A latent that the guide does not cover is drawn from the prior.

        Args:
            program: the program.
            key: what the random numbers of this execution depend on.
        """

    def sample(
        self,
        model: Callable[..., Any] | Program,
        *args: Any,
        n: int = 1,
        seed: int = 0,
        **named: Any,
    ) -> list[dict[str, Any]]:
        """Raw draws from the guide, unweighted; a `GFlowNetGuide`'s without its `defensive` share.

        A string that its rules reject (unfinished under a grammar, or with `truncate="reject"`) is
        there as it was drawn; `infer` would give it weight zero.

        A learned prediction is one of these, under a model that does not observe what is to be
        predicted. `infer` weights them.

        Args:
            model: a model function, or a compiled `Program`.
            *args: the model's arguments.
            n: how many draws.
            seed: equal seeds give equal draws.
            **named: the model's arguments by their names.

        Returns:
            For each draw, site → value of its latents and of what is computed, and under
            `"_RETURN"` what the model returned.

        Raises:
            ValueError: if n is below 1, or the guide does not fit the program.
            TypeError: for arguments that do not fit the model.

        Example:
            >>> draws = guide.sample(story, *pair, n=4)
            >>> sorted(draws[0])
            ['_RETURN', 'middle']
        """
        n, seed = as_count("n", n, 1), as_seed(seed)
        program = as_program(model, args, named=named, options=("n", "seed"))
        (draws,) = self._draw([program], [seed], n, progress=False)
        return draws

    def sample_many(
        self, model: Any, data: Any = None, *, n: int = 1, seed: int = 0, progress: bool = True
    ) -> list[list[dict[str, Any]]]:
        """Raw draws for each row of data, in full batches; see `sample`.

        Args:
            model: a model function, or a list of compiled programs and of (model, data) pairs.
            data: the rows, as `infer_many` takes them.
            n: how many draws for each row.
            seed: equal seeds give equal draws. Each row has random numbers of its own: those of
                `sample` with `langppl.lm.seeds.row_seed(seed, k)`.
            progress: whether to report progress.

        Returns:
            A list of draws for each row, in order.

        Raises:
            ValueError: as `sample`; or for no data.
            TypeError: for rows that do not fit the model.

        Example:
            >>> found = guide.sample_many(story, [pair, pair], n=3)
            >>> [len(draws) for draws in found]
            [3, 3]
        """
        n, seed = as_count("n", n, 1), as_seed(seed)
        programs = programs_of(pairs_of(model, data))
        seeds = [row_seed(seed, k) for k in range(len(programs))]
        return self._draw(programs, seeds, n, progress)

    def _draw(
        self, programs: Sequence[Program], seeds: Sequence[int], n: int, progress: bool
    ) -> list[list[dict[str, Any]]]:
        for program in programs:
            self.check(program)
        todo = [
            (p, (s, "guide", i)) for p, s in zip(programs, seeds, strict=True) for i in range(n)
        ]
        found: list[dict[str, Any]] = []
        with bar(f"drawing from {self.name}", len(todo), progress) as advance:
            for first in range(0, len(todo), _TOGETHER):
                part = todo[first : first + _TOGETHER]
                done = run_together([(p, self._raw_chooser(p, key)) for p, key in part])
                found += [{**e.latents, **e.computed, "_RETURN": e.returned} for e in done]
                advance(len(part))
        return [found[k : k + n] for k in range(0, len(found), n)]

    def _raw_chooser(self, program: Program, key: Key) -> Chooser:
        """What decides the latents of a raw draw."""
        return self.chooser(program, key)

    def log_flow(self, program: Program, name: str, fn: Any, execution: Execution) -> float | None:
        """How much is to come, by what was learned: an estimate of the log evidence that is left.

        That is the log of the sum, over all that may follow, of the joint density's factors that
        are not known yet. Called within the scheduler.

        Args:
            program: the program.
            name: the latent that comes next.
            fn: its distribution.
            execution: the sites before it.

        Returns:
            Nats; None if nothing was learned of it.
        """
        return None

    def given(self, program: Program, values: Mapping[str, Any]) -> Chooser:
        """What takes given latents instead of drawing them.

        Each `Choice` it makes carries `log_q`, the log-probability (nats) with which `chooser`
        would have drawn the value: −inf if it cannot.

        Args:
            program: the program.
            values: latent → value.

        Raises:
            NotImplementedError: if the guide does not know it.
        """
        raise NotImplementedError(
            f"guide {self.name!r} ({type(self).__name__}) does not say with which probability it "
            "draws given latents; implement its `given`, or `log_q`"
        )

    def log_q(self, program: Program, rows: Sequence[Mapping[str, Any]]) -> Array:
        """Log-probability with which the guide draws given latents.

        Args:
            program: the program.
            rows: latent → value, one mapping for each draw; a `Text` counts by its tokens.

        Returns:
            Shape [n], nats; −inf for what the guide cannot draw. A string that is drawn unfinished
            and rejected by the program has a finite one. A `defensive` share of the prior counts.

        Raises:
            NotImplementedError: if the guide implements neither this nor `given`.
            ValueError: if a latent has no value, or a log-probability is NaN or +inf.
            TypeError: for a single mapping.

        Example:
            >>> program = compile(story, *pair)
            >>> guide.log_q(program, infer(program, num_samples=8).samples).shape
            (8,)
        """
        if isinstance(rows, Mapping):
            raise TypeError("log_q takes a list of mappings (latent → value), got one mapping")
        if not isinstance(program, Program):
            raise TypeError(
                "log_q takes a compiled Program, as lp.compile(model, *args) makes it, got "
                f"{program!r}"
            )
        self.check(program)
        return log_q_together(self, [(program, row) for row in rows])

    def scorer(self, program: Program, key: Key) -> Scorer:
        """What tells how likely the chooser of the same key is to propose a value.

        Metropolis–Hastings asks it for the way back, from the value proposed to the one before.

        Args:
            program: the program.
            key: the chooser's key; a guide that draws random numbers to make its proposal makes it
                with the same ones here.

        Raises:
            NotImplementedError: when asked, if the guide implements neither this nor `given`.
        """

        def log_q(name: str, fn: Any, value: Any, execution: Execution) -> float:
            values = {**execution.latents, name: value}
            found = self.given(program, values)(name, fn, execution).log_q
            assert found is not None
            return found

        return log_q

    def reads(
        self, program: Program, name: str, fn: Any, execution: Execution
    ) -> tuple[Reading | None, str | None]:
        """What the guide's LM reads where it goes on with a string that has begun.

        Args:
            program: the program.
            name: the latent.
            fn: its distribution.
            execution: the execution before it.

        Returns:
            What to read in place of the site's own prompt, and the adapter; None for the
            prompt, and for the site's own adapter (none but for a trainable view's). The default
            is the model's own law.
        """
        return None, None

    def law(self, program: Program, name: str, fn: Any, execution: Execution) -> Any:
        """From which distribution the guide goes on with a string that has begun.

        Args:
            program: the program.
            name: the latent.
            fn: its distribution, an `LMString`.
            execution: the execution before it.

        Returns:
            An `LMString` of the same LM; the default is the latent's own. What it reads is a
            matter of `reads`.
        """
        return fn

    def __repr__(self) -> str:
        """The type, and what tells it from others of it."""
        return f"{type(self).__name__}()"

    def identity(self) -> str:
        """What tells the guide, as it is now, from others that draw by other laws.

        The random numbers of `evidence_bounds` depend on it. Guides that share it cannot be pooled
        by `pool_bounds`, so a guide of your own shows its settings in its `repr`, or here.

        Returns:
            Words that are the same in every process; by default of type, name, repr and adapter.
        """
        return identity.of_object(self)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences about the guide that belong under what it has drawn."""
        return ()

    def check(self, program: Program) -> None:  # noqa: B027 - most guides fit every program
        """Raises ValueError if the guide does not fit a program."""


def not_a_guide(guide: Any) -> TypeError:
    """What is raised for what is neither a name nor a guide nor a function."""
    mend = ""
    if isinstance(guide, type) and issubclass(guide, Guide):
        mend = f", the class; make one: {guide.__name__}(...)"
    return TypeError(f"a guide is a name, a Guide or a function, got {guide!r}{mend}")


class PriorGuide(Guide):
    """Draws latents from the model itself: weights are the likelihood of what is observed."""

    name = "prior"

    def identity(self) -> str:
        """See `Guide.identity`."""
        return self.name if type(self) is PriorGuide else super().identity()

    def chooser(self, program: Program, key: Key) -> Chooser:
        """See `Guide.chooser`."""
        return lambda name, fn, execution: draw_prior(fn, (*key, name))

    def given(self, program: Program, values: Mapping[str, Any]) -> Chooser:
        """See `Guide.given`."""
        take = given_values(values)

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            value = take(name, fn, execution).value
            return Choice(value, raw_log_prob(fn, value))

        return choose


def log_q_together(guide: Guide, pairs: Sequence[tuple[Program, Mapping[str, Any]]]) -> Array:
    """Log q of latents of several programs, all at once where the guide has `given`.

    Args:
        guide: the guide.
        pairs: a program, and latent → value.

    Returns:
        Shape [n], nats; see `Guide.log_q`.
    """
    if type(guide).log_q is not Guide.log_q:
        return np.array([guide.log_q(p, [row])[0] for p, row in pairs], dtype=np.float64)
    executions = run_together([(p, guide.given(p, row)) for p, row in pairs])
    for execution in executions:
        for site in execution.sites.values():
            check_number(site.name, site.log_q)
    return np.array([e.log_q for e in executions], dtype=np.float64)


def raw_log_prob(
    fn: Any, value: Any, prompt: Reading | None = None, adapter: str | None = None
) -> float:
    """Log-probability with which a value is drawn, rejected strings included.

    Args:
        fn: a site's distribution.
        value: the value.
        prompt: what is read in place of a string's own prompt.
        adapter: adapter on the LM in place of the distribution's own.

    Returns:
        Nats; −inf for a value that is never drawn.
    """
    if not isinstance(fn, StringDistribution):
        return log_density(fn, value)
    if isinstance(fn, LMChoice):
        if value not in fn.options:
            return -math.inf
        return float(fn.log_probs(prompt=prompt, adapter=adapter)[fn.options.index(value)])
    request = fn.request(value, prompt=prompt, adapter=adapter)  # type: ignore[attr-defined]
    if request is None:
        return -math.inf
    (reply,) = perform([request])
    assert isinstance(reply, ScoreReply)
    return reply.log_prob
