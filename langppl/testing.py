"""Tiny language models whose posteriors are known exactly, and contracts to check against them.

`tiny_lm` makes a real transformer over a handful of tokens. Its strings are short enough to
enumerate, so every distribution, guide and method can be held to exact answers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from langppl.distributions import LMChoice, LMString, StringDistribution, Text
from langppl.guides.base import Guide
from langppl.inference.sites import log_weight
from langppl.lm import enumeration
from langppl.lm.model import LM
from langppl.lm.requests import ScoreReply, perform
from langppl.program import Program, compile
from langppl.program.execution import Choice, Execution, run_many, score
from langppl.program.scheduler import run

__all__ = [
    "check_distribution",
    "check_guide",
    "check_log_q",
    "enumerate_strings",
    "tiny_lm",
]

DEFAULT_ALPHABET = ("a", "b", ".", " ")


@torch.inference_mode(False)
def tiny_lm(
    alphabet: Sequence[str] = DEFAULT_ALPHABET,
    seed: int = 0,
    *,
    merged: Sequence[str] = (),
    split: Sequence[str] = (),
    hidden_size: int = 32,
    window: int = 256,
    sharpness: float = 0.2,
) -> LM:
    """A small random transformer with a small tokenizer.

    Two layers of transformers' own Llama, with seeded random weights that are large enough for
    posteriors to differ from priors.

    Args:
        alphabet: single ASCII characters, one token each.
        seed: of the weights.
        merged: further tokens put together from two earlier ones, such as "ab", "b.", "..".
        split: characters of several UTF-8 bytes whose bytes are one token each, such as "é".
        hidden_size: width of the model.
        window: context window, tokens.
        sharpness: standard deviation of the weights; at transformers' default 0.02 every
            distribution is almost uniform.

    Returns:
        An LM with a begin token, an end token and one more special token.

    Raises:
        ValueError: if the alphabet is not of single ASCII characters, or a merged token cannot be
            made of two others.

    Example:
        >>> lm = tiny_lm("ab.", merged=["ab", ".."], split=["é"])
        >>> sorted(lm.vocabulary.text(i) for i in lm.encode_text("ab.."))
        ['..', 'ab']
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from langppl.lm.vocabulary import _BYTE_LEVEL

    if any(len(c) != 1 or ord(c) > 127 for c in alphabet) or len(set(alphabet)) < len(alphabet):
        raise ValueError(f"alphabet must be different single ASCII characters, got {alphabet!r}")
    printable = {byte: char for char, byte in _BYTE_LEVEL.items()}

    def shown(data: bytes) -> str:
        return "".join(printable[b] for b in data)

    tokens = ["<s>", "</s>", "<unused>"]
    tokens += [shown(c.encode()) for c in alphabet]
    for character in split:
        tokens += [shown(bytes([b])) for b in character.encode() if shown(bytes([b])) not in tokens]
    merges: list[tuple[str, str]] = []
    for text in merged:
        whole = shown(text.encode())
        cuts = [(whole[:k], whole[k:]) for k in range(1, len(whole))]
        pair = next((cut for cut in cuts if cut[0] in tokens and cut[1] in tokens), None)
        if pair is None or whole in tokens:
            raise ValueError(f"merged token {text!r} must be new and made of two earlier tokens")
        merges.append(pair)
        tokens.append(whole)

    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<unused>"],
    )
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=window,
        initializer_range=sharpness,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return LM.from_parts(model, tokenizer, f"tiny-{seed}")


def enumerate_strings(
    dist: LMString, limit: int | None = None, most: int = 1_000_000
) -> Iterator[tuple[Text, bool]]:
    """All token sequences that a distribution's rules allow.

    Args:
        dist: an `LMString` with `max_tokens`, or a `limit`.
        limit: most actions, if not the distribution's own.
        most: strings to list before giving up.

    Yields:
        Each string, and whether it is rejected for being unfinished.

    Raises:
        ValueError: if there are more than `most`.
    """
    if limit is None:
        limit = dist.limit(len(dist.prompt_ids()))
    if limit is None:
        raise ValueError("an open string has no end, so its strings cannot be listed")
    for count, (ids, text, rejected) in enumerate(enumeration.strings(dist.bound, limit)):
        if count >= most:
            raise ValueError(f"more than {most} strings")
        yield Text(text, ids, dist.lm.fingerprint), rejected


# -- contracts -----------------------------------------------------------------------------------

_LOG_PROB_TOLERANCE = 1e-3
_LARGEST_DEVIATION = 5.0


def check_distribution(
    dist: StringDistribution,
    *,
    samples: int = 2000,
    seed: int = 0,
    tolerance: float = 1e-4,
    most: int = 20_000,
) -> None:
    """Checks that a distribution over strings keeps its promises, by listing all its values.

    The probabilities of all values, rejected ones included, sum to one; draws are values, are
    drawn as often as `log_prob` says, and come with that log-probability; what the rules could not
    have produced has `log_prob` −inf and raises nothing.

    Args:
        dist: an `LMChoice`, or an `LMString` with `max_tokens`, small enough to list.
        samples: draws.
        seed: of the draws; a correct distribution fails for about one seed in a million.
        tolerance: on the sum of the probabilities.
        most: values to list before giving up.

    Raises:
        AssertionError: naming the promise that is broken.
        ValueError: if the values cannot be listed.
        TypeError: for anything but an `LMString` or `LMChoice`.

    Example:
        >>> check_distribution(LMString(tiny_lm(), "a", stop=".", max_tokens=2), samples=200)
    """
    values = list(_values(dist, most))
    requests = [dist.pending(value) for value, _ in values]
    replies = iter(perform([r for pending in requests for r in pending.requests]))
    log_probs = [p.finish([next(replies) for _ in p.requests]) for p in requests]
    known: dict[object, float] = {}
    for (value, rejected), log_prob in zip(values, log_probs, strict=True):
        if math.isnan(log_prob):
            raise AssertionError(f"log_prob of {value!r} is nan")
        if rejected and log_prob != -math.inf:
            raise AssertionError(
                f"{value!r} is unfinished and rejected, but its log_prob is {log_prob:.4f}"
            )
        known[value.ids] = log_prob
    cut = [value for value, rejected in values if rejected]
    if isinstance(dist, LMString):
        asked = [r for r in map(dist.request, cut) if r is not None]
        for value, reply in zip(cut, perform(asked), strict=True):
            assert isinstance(reply, ScoreReply)
            known[value.ids] = reply.log_prob
    total = math.fsum(math.exp(v) for v in known.values())
    if abs(total - 1.0) > tolerance:
        raise AssertionError(
            f"the probabilities of all {len(known)} values sum to {total:.6f}, not to 1"
        )
    tasks = [functools.partial(dist.draw, (seed, "check", i)) for i in range(samples)]
    drawn = [(text.ids, log_q) for text, log_q in run(tasks)]
    _check_draws(known, drawn, dict.fromkeys(known, ""))
    for impossible in (*cut, *_impossible(dist)):
        found = float(dist.log_prob(impossible))
        if found != -math.inf:
            raise AssertionError(f"{impossible!r} is impossible, but its log_prob is {found}")
        if dist.why_impossible(impossible) is None:
            raise AssertionError(f"{impossible!r} is impossible, but why_impossible gives no rule")


def check_guide(
    guide: Guide,
    model: Callable[..., Any] | Program,
    *args: Any,
    samples: int = 1000,
    seed: int = 0,
    tolerance: float = 1e-4,
    most: int = 20_000,
) -> None:
    """Checks that a guide knows with which probability it proposes, by listing all it could.

    The probabilities q of all latents sum to one; draws come with the log q of their value and as
    often as it says; every possible value can be proposed; the evidence from `samples` importance
    weights is within 5 standard errors of the exact one; and `Guide.log_q`, where the guide has it,
    says the same of all latents as its draws do.

    Args:
        guide: the guide. It must draw strings by their distribution's `draw`, as all of langppl's
            guides do: that is where this check puts in the value that it asks about.
        model: a model function, or a compiled `Program`, whose latents are strings with
            `max_tokens` or choices.
        *args: the model's arguments.
        samples: draws.
        seed: of the draws.
        tolerance: on the sum of q.
        most: executions to list before giving up.

    Raises:
        AssertionError: naming the promise that is broken.
        ValueError: if the latents cannot be listed.
        TypeError: if a latent is not a string.

    Example:
        >>> from langppl import PromptedGuide, sample
        >>> lm = tiny_lm()
        >>> def story():
        ...     word = sample("word", LMString(lm, "a", max_tokens=2))
        ...     sample("end", LMString(lm, f"a{word}"), obs=".")
        >>> check_guide(PromptedGuide(), story, samples=100)
    """
    program = model if isinstance(model, Program) else compile(model, *args)
    guide.check(program)
    listed = _list_executions(guide, program, most)
    log_q = {_identity(e): e.log_q for e in listed}
    total = math.fsum(math.exp(v) for v in log_q.values())
    if not abs(total - 1.0) <= tolerance:
        raise AssertionError(
            f"q of all {len(listed)} values of the latents sums to {total:.6f}, not to 1"
        )
    weights = {_identity(e): log_weight(e) for e in listed}
    for execution in listed:
        if execution.log_q == -math.inf and execution.log_joint > -math.inf:
            raise AssertionError(f"the guide never proposes {execution.latents}, which is possible")
    choosers = [guide.chooser(program, (seed, "check", i)) for i in range(samples)]
    drawn = program.run(choosers, score)
    _check_draws(
        log_q,
        [(_identity(e), e.log_q) for e in drawn],
        {_identity(e): f" ({e.latents})" for e in listed},
    )
    evidence = math.fsum(math.exp(e.log_joint) for e in listed)
    square = math.fsum(math.exp(v + 2 * weights[k]) for k, v in log_q.items() if v > -math.inf)
    error = math.sqrt(max(square - evidence**2, 0.0) / samples)
    estimate = math.fsum(math.exp(log_weight(e)) for e in drawn) / samples
    if not abs(estimate - evidence) <= _LARGEST_DEVIATION * error + 1e-3 * evidence:
        raise AssertionError(
            f"the evidence from {samples} draws is {estimate:.4g}, and exactly it is "
            f"{evidence:.4g}: {abs(estimate - evidence) / max(error, 1e-300):.1f} standard errors"
        )
    # A guide without `log_q` is a guide all the same.
    if type(guide).log_q is not Guide.log_q or type(guide).given is not Guide.given:
        _check_log_q(guide, program, [*listed, *drawn])


def check_log_q(
    guide: Guide,
    model: Callable[..., Any] | Program,
    *args: Any,
    samples: int = 100,
    seed: int = 0,
) -> None:
    """Checks that a guide's `log_q` agrees with what its own draws record.

    Latents of any kind will do, and any that depend on one another. What a string's rules forbid
    must have a log q of −inf.

    Args:
        guide: the guide.
        model: a model function, or a compiled `Program`.
        *args: the model's arguments.
        samples: draws.
        seed: of the draws.

    Raises:
        AssertionError: naming the draw for which they differ.
        NotImplementedError: if the guide has no `log_q`.

    Example:
        >>> from langppl import PromptedGuide, sample
        >>> lm = tiny_lm()
        >>> def story():
        ...     word = sample("word", LMString(lm, "a", max_tokens=2))
        ...     sample("end", LMString(lm, f"a{word}"), obs=".")
        >>> check_log_q(PromptedGuide(), story, samples=10)
    """
    program = model if isinstance(model, Program) else compile(model, *args)
    guide.check(program)
    choosers = [guide.chooser(program, (seed, "check", i)) for i in range(samples)]
    drawn = program.run(choosers, score)
    _check_log_q(guide, program, drawn)
    for name in program.latents:
        fn = program.sites[name].fn
        if isinstance(fn, StringDistribution):
            for value in _impossible(fn):
                found = float(guide.log_q(program, [{**drawn[0].latents, name: value}])[0])
                if name in drawn[0].sites and found != -math.inf:
                    raise AssertionError(
                        f"{value!r} cannot be drawn at {name!r}, but log_q gives it {found:.4f}"
                    )


def _check_log_q(guide: Guide, program: Program, executions: Sequence[Execution]) -> None:
    found = guide.log_q(program, [e.latents for e in executions])
    if found.shape != (len(executions),):
        raise AssertionError(
            f"log_q of {len(executions)} rows has shape {found.shape}, not ({len(executions)},)"
        )
    for execution, own in zip(executions, found, strict=True):
        recorded = execution.log_q
        # Of equal infinities there is no difference.
        if not (own == recorded or abs(own - recorded) <= _LOG_PROB_TOLERANCE):
            raise AssertionError(
                f"log_q of {execution.latents} is {own:.4f}, but the guide drew it with "
                f"{recorded:.4f}"
            )


def _values(dist: Any, most: int) -> Iterator[tuple[Text, bool]]:
    """All values of a string distribution, and whether each is rejected."""
    if isinstance(dist, LMString):
        yield from enumerate_strings(dist, most=most)
    elif isinstance(dist, LMChoice):
        yield from ((dist.text(k), False) for k in range(len(dist.options)))
    else:
        raise TypeError(f"only an LMString or an LMChoice can be listed, got {dist!r}")


def _impossible(dist: StringDistribution) -> list[str]:
    """Values that no rules allow."""
    if isinstance(dist, LMChoice):
        return ["".join(dist.options) + "?", "\ud800"]
    special = int(np.flatnonzero(dist.lm.vocabulary.special)[0])
    return ["\ud800", Text("", (special,), dist.lm.fingerprint)]


def _check_draws(
    log_q: Mapping[Any, float], drawn: Sequence[tuple[Any, float]], shown: Mapping[Any, str]
) -> None:
    """Draws are among the listed values, know their log-probability, and are as frequent."""
    for key, own in drawn:
        if key not in log_q:
            raise AssertionError(f"{key} was drawn, but the rules do not allow it")
        if not abs(own - log_q[key]) <= _LOG_PROB_TOLERANCE:
            raise AssertionError(
                f"{key}{shown[key]} was drawn with log-probability {own:.4f} recorded, but its "
                f"log-probability is {log_q[key]:.4f}"
            )
    counts = Counter(key for key, _ in drawn)
    cells: list[tuple[float, float]] = []
    expected = found = 0.0
    # Rare values are counted together, so that the chi-square approximation holds in each cell.
    for key, value in sorted(log_q.items(), key=lambda item: item[1]):
        expected += len(drawn) * math.exp(value)
        found += counts[key]
        if expected >= 5.0:
            cells.append((expected, found))
            expected = found = 0.0
    if cells:
        last = cells.pop()
        cells.append((last[0] + expected, last[1] + found))
    freedom = len(cells) - 1
    if freedom < 1:
        return
    statistic = sum((f - e) ** 2 / e for e, f in cells)
    # Wilson and Hilferty 1931: the cube root of chi-square over its freedom is nearly normal.
    spread = 2.0 / (9.0 * freedom)
    deviation = ((statistic / freedom) ** (1 / 3) - (1.0 - spread)) / math.sqrt(spread)
    if deviation > _LARGEST_DEVIATION:
        raise AssertionError(
            f"draws are not as frequent as their log-probabilities say: chi-square "
            f"{statistic:.1f} with {freedom} degrees of freedom, {deviation:.1f} deviations"
        )


class _Unlisted(BaseException):
    """An execution met a latent that has no value yet."""

    def __init__(self, name: str, fn: Any) -> None:
        super().__init__(name)
        self.name, self.fn = name, fn


class _Forced:
    """Mixed into a distribution: what is "drawn" is a given value, with its log-probability."""

    forced: Text

    def draw(
        self,
        key: Any,
        *,
        prompt: tuple[int, ...] | None = None,
        adapter: str | None = None,
        temperature: float = 1.0,
    ) -> tuple[Text, float]:
        fn: Any = self
        if isinstance(fn, LMChoice):
            scaled = fn.log_probs(prompt=prompt, adapter=adapter) / temperature
            at = fn.options.index(self.forced)
            return self.forced, float(scaled[at] - np.logaddexp.reduce(scaled))
        request = fn.request(self.forced, prompt=prompt, adapter=adapter)
        if request is None:  # a guide that masks more than the model
            return self.forced, -math.inf
        request = dataclasses.replace(request, temperature=request.temperature * temperature)
        (reply,) = perform([request])
        assert isinstance(reply, ScoreReply)
        return self.forced, reply.log_prob


def _forced(fn: StringDistribution, value: Text) -> Any:
    made: Any = copy.copy(fn)
    made.__class__ = type("Forced", (_Forced, type(fn)), {})
    made.forced = value
    return made


def _list_executions(guide: Guide, program: Program, most: int) -> list[Execution]:
    """All executions, scored, each latent with the log q that the guide gives it."""

    def task(values: Mapping[str, Text]) -> Execution | _Unlisted:
        inner = guide.chooser(program, (0, "list"))

        def choose(name: str, fn: Any, execution: Execution) -> Choice:
            if name not in values:
                raise _Unlisted(name, fn)
            choice = inner(name, _forced(fn, values[name]), execution)
            return Choice(choice.value, choice.log_q, defence=choice.defence)

        try:
            return score(program.run_once(choose))
        except _Unlisted as stop:
            return stop

    done: list[Execution] = []
    pending: list[dict[str, Text]] = [{}]
    while pending:
        batch, pending = pending[-1024:], pending[:-1024]
        found = run_many([functools.partial(task, values) for values in batch], program.memo)
        for at, (values, result) in enumerate(zip(batch, found, strict=True)):
            if isinstance(result, Execution):
                done.append(result)
                continue
            pending += [{**values, result.name: v} for v, _ in _values(result.fn, most)]
            # The rest of the batch, each at least one execution, is in no list yet.
            if len(pending) + len(done) + len(batch) - at - 1 > most:
                raise ValueError(f"more than {most} executions")
    return done


def _identity(execution: Execution) -> object:
    return tuple((name, value.ids) for name, value in execution.latents.items())
