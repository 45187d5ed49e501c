"""A guide whose strings keep to grammars, for programs that are conditioned on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langppl.diagnostics import InferenceWarning
from langppl.distributions import LMString
from langppl.guides.base import Guide, Key, raw_log_prob
from langppl.guides.support import MEND, is_conditioned, is_covered
from langppl.lm.grammars import Grammar
from langppl.program import Program
from langppl.program.execution import Choice, Chooser, Execution, draw_prior
from langppl.program.execution import given as given_values
from langppl.warn import warn


class MaskedGuide(Guide):
    """Proposes with the site's own LM, prompt and rules, masked by a grammar.

    The model's own strings stay unmasked: where a `factor` of `log_matches` conditions one on the
    grammar, this proposes only what the factor allows, and the weights carry the mask's mass. All
    other latents are drawn from the prior.

    A grammar that leaves out strings of the posterior, as where the model does not condition on it,
    leaves them out of evidence and posterior, and no weight shows it;
    `MixtureGuide([guide, "prior"])` mends that.

    Args:
        grammars: site → grammar.

    Raises:
        TypeError: if a value is not a grammar.

    Example:
        >>> yes_or_no = one_of([" yes", " no"])
        >>> def answer():
        ...     z = sample("z", LMString(lm, "Is it raining?", max_tokens=4))
        ...     factor("form", log_matches(z, yes_or_no))
        >>> posterior = infer(answer, guide=MaskedGuide({"z": yes_or_no}))
        >>> sorted(posterior.probabilities("z"))
        [' no', ' yes']
    """

    name = "masked"
    may_leave_out = True

    def __init__(self, grammars: Mapping[str, Grammar]) -> None:
        if not isinstance(grammars, Mapping):
            raise TypeError(
                f"MaskedGuide takes a mapping from sites to grammars, got {grammars!r}; write "
                'MaskedGuide({"z": grammar})'
            )
        for site, grammar in grammars.items():
            if not isinstance(grammar, Grammar):
                raise TypeError(
                    "a grammar is made by lp.regex, lp.json_schema, lp.lark or lp.one_of; for "
                    f"site {site!r} got {grammar!r}"
                )
        self.grammars = dict(grammars)
        self._told: set[str] = set()

    def __repr__(self) -> str:
        """The sites and their grammars, shortened."""
        shown = ", ".join(f"{site!r}: {g.shown}" for site, g in self.grammars.items())
        return f"MaskedGuide({{{shown}}})"

    def identity(self) -> str:
        """See `Guide.identity`; the grammars in full."""
        return f"{super().identity()} {sorted(self.grammars.items(), key=lambda item: item[0])}"

    def chooser(self, program: Program, key: Key) -> Chooser:
        """See `Guide.chooser`."""

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            if name not in self.grammars:
                return draw_prior(fn, (*key, name))
            value, log_q = self._masked(name, fn).draw((*key, name))
            return Choice(value, log_q)

        return choose

    def given(self, program: Program, values: Mapping[str, Any]) -> Chooser:
        """See `Guide.given`."""
        take = given_values(values)

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            value = take(name, fn, execution).value
            own = self._masked(name, fn) if name in self.grammars else fn
            return Choice(value, raw_log_prob(own, value))

        return choose

    def law(self, program: Program, name: str, fn: Any, execution: Execution) -> Any:
        """See `Guide.law`."""
        return self._masked(name, fn) if name in self.grammars else fn

    def check(self, program: Program) -> None:
        """Raises ValueError if a named site is no latent `LMString`, or no string can be drawn."""
        for name in self.grammars:
            site = program.sites.get(name)
            if site is None:
                problem = (
                    f"MaskedGuide names the site {name!r}, and no run has met it; latents are: "
                    + (", ".join(program.latents) or "none")
                )
                if program.is_static:
                    raise ValueError(problem)
                warn(problem, InferenceWarning)
            elif site.kind != "latent":
                raise ValueError(f"MaskedGuide names the site {name!r}, which is {site.kind}")
            else:
                self._masked(name, site.fn)
                self._tell_left_out(program, name, site.fn)

    def _tell_left_out(self, program: Program, name: str, fn: LMString) -> None:
        grammar = self.grammars[name]
        if name in self._told or fn.is_open or fn.rules.grammar is not None or is_covered():
            return
        if not is_conditioned(program, name):
            self._told.add(name)
            shown = f"lp.factor({'is ' + name!r}, lp.log_matches({name}, grammar))"
            warn(
                f"MaskedGuide keeps site {name!r} to {grammar.shown}, and nothing in the program "
                f"conditions it on that; {MEND}. Condition it in the model, {shown}, give its "
                'LMString the grammar, or mix the guide: lp.MixtureGuide([guide, "prior"])',
                InferenceWarning,
            )

    def _masked(self, name: str, fn: Any) -> LMString:
        if not isinstance(fn, LMString):
            raise ValueError(
                f"MaskedGuide names the site {name!r}, which is no LMString but {fn!r}"
            )
        grammar = self.grammars[name]
        if fn.rules.grammar not in (None, grammar):
            raise ValueError(
                f"site {name!r} has the grammar {fn.rules.grammar.shown} of its own, and "
                f"MaskedGuide gives it {grammar.shown}"
            )
        # An open string has no end to propose; its own draw says so.
        if fn.is_open:
            return fn
        masked = fn.with_rules(replace(fn.rules, grammar=grammar))
        try:
            fn.lm.bind(masked.rules)
        except ValueError as error:
            raise ValueError(f"site {name!r}: {error}") from error
        return masked
