"""What a guide reads before it proposes a latent: the observations that depend on it.

The default is made from the program's graph: each observation downstream of the latent, after the
prompt that it is scored under, with the latent itself left blank; then the site's own prompt.
Latents that are drawn already show their values, those still to come are blank too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from langppl.distributions import StringDistribution
from langppl.lm.prompts import Prompt, is_chat
from langppl.program import Program
from langppl.program.execution import Execution
from langppl.program.placeholders import MARKER, fill

BLANK = " ___"


@dataclass(frozen=True)
class ContextInfo:
    """What a context can be made of.

    Attributes:
        site: the latent's name.
        prompt: its own prompt.
        observations: for each observation that depends on the latent, the prompt that it is
            scored under (the latent and later ones blank) and the observation as text.
        values: the latents that are drawn already.
        args: the model's arguments.
    """

    site: str
    prompt: Prompt
    observations: tuple[tuple[str, str], ...]
    values: Mapping[str, Any]
    args: tuple[Any, ...]


ContextFunction = Callable[[ContextInfo], Prompt]


def default_context(info: ContextInfo) -> Prompt:
    """The observations with the latent left blank, then the site's own prompt."""
    shown = "\n".join(prompt + text for prompt, text in info.observations)
    if not shown:
        return info.prompt
    if is_chat(info.prompt):
        return [{"role": "system", "content": shown}, *info.prompt]
    return f"{shown}\n\n{info.prompt}"


def context_info(
    program: Program, site: str, fn: StringDistribution, execution: Execution
) -> ContextInfo:
    """What the context of a latent can be made of, in one execution."""
    values = {k: v for k, v in execution.latents.items() if k != site}
    shown = {k: str(v) for k, v in values.items()}
    by_name = {t.name: t for t in program.templates or ()}
    below = program.graph.below(site, ("observed",)) if site in program.graph else []
    observations = []
    for name in below:
        template = by_name.get(name)
        if template is None:
            continue
        text = template.value
        if isinstance(template.fn, StringDistribution):
            prompt = _as_text(fill(template.fn.prompt, shown))
            observations.append((_blank(prompt), _blank(fill(str(text), shown))))
        else:
            number = text.tolist() if hasattr(text, "tolist") else text
            observations.append(("", f"{name} = {number}"))
    return ContextInfo(site, fn.prompt, tuple(observations), values, program.args)


def _as_text(prompt: Prompt) -> str:
    if is_chat(prompt):
        return "\n".join(m["content"] for m in prompt)
    return str(prompt)


def _blank(text: str) -> str:
    return MARKER.sub(BLANK, text)


def context_ids(
    program: Program,
    site: str,
    fn: StringDistribution,
    execution: Execution,
    context: ContextFunction,
) -> tuple[int, ...]:
    """Token ids of a latent's context."""
    return fn.lm.encode_prompt(context(context_info(program, site, fn, execution)))
