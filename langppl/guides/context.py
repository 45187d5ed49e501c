"""What a guide reads before it proposes a latent: the observations that depend on it.

The default is made from the program's graph: each observation downstream of the latent, after the
prompt that it is scored under, with the latent itself left blank; then the site's own prompt.
Latents that are drawn already show their values, those still to come are blank too. Where a
program is no template, or a number flows into it, the observation is shown without its prompt, and
what is drawn already by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from langppl.distributions import StringDistribution
from langppl.lm import LM
from langppl.lm.prompts import Chat, Prompt, check_prompt, is_chat
from langppl.program import Program
from langppl.program.execution import Execution, Site
from langppl.program.placeholders import MARKER, fill

BLANK = " ___"


@dataclass(frozen=True)
class ContextInfo:
    """What a context can be made of.

    Attributes:
        site: the latent's name.
        prompt: its own prompt; of a number, its name.
        observations: for each observation that depends on the latent, the prompt that it is
            scored under (the latent and later ones blank) and the observation as text.
        values: the latents that are drawn already.
        args: the model's arguments.
        observed: the same observations by their sites: name → text.
        known: of these latents, those that neither the observations nor the prompt show: numbers,
            and strings of programs that are no templates; as pairs of name and text.
    """

    site: str
    prompt: Prompt
    observations: tuple[tuple[str, str], ...]
    values: Mapping[str, Any]
    args: tuple[Any, ...]
    known: tuple[tuple[str, str], ...] = ()
    observed: Mapping[str, str] = field(default_factory=dict)


ContextFunction = Callable[[ContextInfo], Prompt]


def default_context(info: ContextInfo) -> Prompt:
    """The observations with the latent left blank, then the site's own prompt."""
    return _before_prompt(info, [prompt + text for prompt, text in info.observations])


def observations_first(info: ContextInfo) -> Prompt:
    """The observations alone, without what they are scored under; then the site's own prompt.

    A text that is not told twice is not taken for one to repeat, so a guide begins nearer to the
    prior than with `default_context`; but it does not read where the latent stands in an
    observation.
    """
    return _before_prompt(info, [text.strip() for _, text in info.observations])


OWN_CONTEXTS: tuple[ContextFunction, ...] = (default_context, observations_first)
"""Of langppl; an observation that these show nothing of has nothing to show."""


def _before_prompt(info: ContextInfo, lines: list[str]) -> Prompt:
    shown = "\n".join([*lines, *(f"{name} = {text}" for name, text in info.known)])
    if not shown:
        return info.prompt
    if is_chat(info.prompt):
        return _before_user(info.prompt, shown)
    return f"{shown}\n\n{info.prompt}"


def _before_user(chat: Chat, shown: str) -> Chat:
    """A chat whose first message of the user begins with a text.

    Many templates have no role for the system, and a chat may have such a message of its own.
    """
    first = next((k for k, m in enumerate(chat) if m["role"] != "system"), len(chat))
    if first < len(chat) and chat[first]["role"] == "user":
        message = {**chat[first], "content": f"{shown}\n\n{chat[first]['content']}"}
        return [*chat[:first], message, *chat[first + 1 :]]
    return [*chat[:first], {"role": "user", "content": shown}, *chat[first:]]


def context_info(program: Program, site: str, fn: Any, execution: Execution) -> ContextInfo:
    """What the context of a latent can be made of, in one execution."""
    values = {k: v for k, v in execution.latents.items() if k != site}
    graph = program.graph
    by_name = {t.name: t for t in program.templates or ()}
    if site in graph:
        below = graph.below(site, ("observed",))
    else:  # a turn of a loop that no run had met: whatever is observed may depend on it
        below = [n for n, s in program.sites.items() if s.kind == "observed"]
    observations = []
    for name in below:
        found = by_name.get(name, program.sites[name])
        is_template = name in by_name and all(
            program.sites[a].is_string for a in graph.latents_above(name)
        )
        observations.append(_shown(found, values, is_template))
    prompt = fn.prompt if isinstance(fn, StringDistribution) else f"{site} ="
    known = []
    for name, value in values.items():
        if not isinstance(value, str):
            known.append((name, _number(value)))
        elif not by_name and str(value) not in _as_text(prompt):
            known.append((name, str(value)))
    return ContextInfo(
        site=site,
        prompt=prompt,
        observations=tuple(observations),
        values=values,
        args=program.shown_args,
        known=tuple(known),
        observed={name: text for name, (_, text) in zip(below, observations, strict=True)},
    )


def _shown(site: Site, values: Mapping[str, Any], is_template: bool) -> tuple[str, str]:
    """The prompt and the value of an observation, as text."""
    if not isinstance(site.fn, StringDistribution):
        return "", f"{site.name} = {_number(site.value)}"
    if not is_template:
        return "", str(site.value)
    shown = {k: str(v) for k, v in values.items()}
    prompt = _as_text(fill(site.fn.prompt, shown))
    return _blank(prompt), _blank(fill(str(site.value), shown))


def _number(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    numbers = [f"{float(v):.3g}" for v in value.flatten()]
    return numbers[0] if value.ndim == 0 else f"[{', '.join(numbers)}]"


def _as_text(prompt: Prompt) -> str:
    if is_chat(prompt):
        return "\n".join(m["content"] for m in prompt)
    return str(prompt)


def _blank(text: str) -> str:
    return MARKER.sub(BLANK, text)


def context_ids(
    program: Program,
    site: str,
    fn: Any,
    execution: Execution,
    context: ContextFunction,
    lm: LM,
) -> tuple[int, ...]:
    """Token ids of a latent's context."""
    return encode_context(context(context_info(program, site, fn, execution)), site, lm)


def encode_context(context: Prompt, site: str, lm: LM) -> tuple[int, ...]:
    """Token ids of what a context function made for a latent.

    Raises:
        TypeError: if that is no prompt.
    """
    try:
        return lm.encode_prompt(check_prompt(context))
    except TypeError as error:
        raise TypeError(f"the guide's context for site {site!r}: {error}") from None
