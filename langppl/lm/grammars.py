"""Grammars: sets of texts that a string must belong to.

A grammar is about text alone, whatever the LM and its tokens. It is used in two ways, which
differ: `LMString(..., grammar=g)` masks and renormalises at each token, which makes another prior;
`factor("g", log_matches(z, g))` conditions on the whole string belonging to the grammar.

    >>> date = regex(r"[0-9]{4}-[0-9]{2}")
    >>> log_matches("2024-05", date), log_matches("May 2024", date)
    (0.0, -inf)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

from langppl.lm.matcher import EXACT, Matcher, Tokenizer, bytes_only
from langppl.lm.texts import plain_text
from langppl.warn import warn

_SHOWN = 80
_TOO_DEEP = (
    "the schema is nested too deeply, or within itself; give one that is not, and name what recurs "
    'by {"$ref": "#/$defs/NAME"}'
)
_TEXT_OF_LARK = re.compile(
    r'"(?:\\.|[^"\\])*"|//[^\n]*|#[^\n]*|/(?:\\.|\[(?:\\.|[^\]\\])*\]|[^/\\\n\[])+/', re.DOTALL
)


@dataclass(frozen=True)
class Grammar:
    """A set of texts. Made by `regex`, `json_schema`, `lark` or `one_of`.

    Attributes:
        kind: the function that made it.
        source: what it was made from.
        compiled: the same in llguidance's own notation.
    """

    kind: str
    source: str | tuple[str, ...]
    compiled: str = field(repr=False, compare=False)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of `one_of`; of others, whose texts are not listed, none."""
        return self.source if self.kind == "one_of" and isinstance(self.source, tuple) else ()

    def __post_init__(self) -> None:
        """Compiles it once, to have errors early."""
        for message in _remarks(self.compiled, self.shown):
            warn(f"{self.shown}: {message}")

    def __repr__(self) -> str:
        """The call that made it."""
        source = list(self.source) if isinstance(self.source, tuple) else self.source
        return f"{self.kind}({source!r})"

    @property
    def shown(self) -> str:
        """The same, shortened, for messages."""
        text = repr(self)
        return text if len(text) <= _SHOWN else text[: _SHOWN - 2] + "…)"

    def matcher(self, tokenizer: Tokenizer) -> Matcher:
        """The grammar as something that can be walked, over some tokens."""
        return Matcher(self.compiled, f"the grammar {self.shown}", tokenizer)


@lru_cache(maxsize=64)
def _remarks(compiled: str, shown: str) -> tuple[str, ...]:
    """What llguidance remarks on a grammar that it takes, made once: a model may be run often.

    Raises:
        ValueError: if it does not take it, or the grammar has no text.
    """
    failed, messages = LLMatcher.validate_grammar_with_warnings(compiled, bytes_only().made)
    if failed:
        # The line that is added to every grammar is none of the user's.
        lines = [line for line in messages[0].splitlines() if EXACT.strip() not in line]
        raise ValueError(f"{shown} does not compile: " + "\n".join(lines).strip())
    start = Matcher(compiled, f"the grammar {shown}", bytes_only())
    if not start.accepts(b"") and not any(start.begins(bytes([b])) for b in range(256)):
        raise ValueError(f"{shown} has no text at all")
    return tuple(messages)


def _check_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r} ({type(value).__name__})")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid Unicode (a lone surrogate): {value!r}") from None
    return plain_text(value)


def regex(pattern: str) -> Grammar:
    """The texts that a regular expression matches as a whole.

    Args:
        pattern: in the syntax of Rust's regex crate: no look-around, no back-references; `.` is
            any character but a newline, and character classes are Unicode's.

    Raises:
        ValueError: with llguidance's message, if it does not compile or matches nothing.
        TypeError: for what is no string, such as a pattern that Python has compiled.

    Example:
        >>> regex(r"[0-9]{4}-[0-9]{2}")
        regex('[0-9]{4}-[0-9]{2}')
    """
    if isinstance(pattern, re.Pattern):
        raise TypeError(
            "a regex is a string, in the syntax of Rust's regex crate, and got one that Python "
            f"compiled, {pattern!r}; give its .pattern, without flags: write (?i) and such into it"
        )
    pattern = _check_text("a regex", pattern)
    return Grammar("regex", pattern, _regex(pattern))


@lru_cache(maxsize=64)
def _regex(pattern: str) -> str:
    (made,) = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"]
    return str(made["lark_grammar"]) + EXACT


def json_schema(schema: Mapping[str, Any] | str) -> Grammar:
    """The JSON texts that a schema allows, as llguidance writes them.

    Properties come in the schema's order, and `additionalProperties` is true unless it is said
    otherwise. Whitespace may stand between all parts, without bound; a schema with
    `"x-guidance": {"whitespace_flexible": False}` has none.

    Args:
        schema: a JSON schema, as a mapping or as JSON.

    Raises:
        ValueError: with llguidance's message, if the schema cannot be satisfied or uses keywords
            that it does not know.
        TypeError: for what is neither, such as a model of Pydantic.

    Example:
        >>> yes = json_schema({"type": "array", "items": {"type": "boolean"}})
        >>> log_matches("[true, false]", yes)
        0.0
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(f"the schema is not JSON: {error}") from error
        except RecursionError:
            raise ValueError(_TOO_DEEP) from None
    if hasattr(schema, "model_json_schema"):
        shown = schema.__name__ if isinstance(schema, type) else repr(schema)
        raise TypeError(
            f"a schema must be a mapping or JSON of one, and {shown} is a model of Pydantic; write "
            f"json_schema({shown}.model_json_schema())"
        )
    if not isinstance(schema, Mapping):
        raise TypeError(f"a schema must be a mapping or JSON of one, got {schema!r}")
    try:
        source = json.dumps(_plain(schema), allow_nan=False)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"the schema cannot be written as JSON: {error}") from error
    return Grammar("json_schema", source, f"start: %json {source}{EXACT}")


def _plain(part: Any) -> Any:
    """A schema's part in types that JSON knows, whatever mappings and sequences it is made of."""
    if isinstance(part, Mapping):
        return {key: _plain(value) for key, value in part.items()}
    if isinstance(part, Sequence) and not isinstance(part, str | bytes):
        return [_plain(value) for value in part]
    return part


def lark(source: str) -> Grammar:
    """The texts of a context-free grammar in llguidance's Lark syntax.

    Args:
        source: the rules; the first to be matched is `start`. Terminals are matched as
            llguidance's lexer does. What speaks of tokens (`<|name|>`, `<[id]>`, `max_tokens=`)
            is refused: a grammar is about text.

    Raises:
        ValueError: with llguidance's message, if it does not compile, or if it speaks of tokens.
        TypeError: for what is no string.

    Example:
        >>> lark('start: "(" start ")" | "x"')
        lark('start: "(" start ")" | "x"')
    """
    source = _check_text("a Lark grammar", source)
    bare = _TEXT_OF_LARK.sub('""', source)
    for pattern in (r"<[|\[][^<>]*>", r"\bmax_tokens\s*="):
        if found := re.search(pattern, bare):
            raise ValueError(
                f"{found[0]!r} in the Lark grammar speaks of an LM's tokens, and a grammar is "
                "about text alone; for a limit use LMString's max_tokens"
            )
    return Grammar("lark", source, source + EXACT)


def one_of(strings: Sequence[str]) -> Grammar:
    """Some given texts.

    Args:
        strings: the texts, at least one, all different.

    Raises:
        ValueError: if there are none, or one is given twice.
        TypeError: if one is not a string.

    Example:
        >>> one_of([" yes", " no"])
        one_of([' yes', ' no'])
    """
    if isinstance(strings, str):
        raise TypeError(f"one_of takes a list of strings, got the string {strings!r}")
    given = tuple(_check_text("each of one_of's strings", s) for s in strings)
    if not given:
        raise ValueError("one_of needs at least one string")
    if len(set(given)) < len(given):
        twice = next(s for k, s in enumerate(given) if s in given[:k])
        raise ValueError(f"one_of was given {twice!r} twice")
    escaped = ("".join(f"\\x{{{ord(c):x}}}" for c in s) for s in given)
    return Grammar("one_of", given, _regex(f"(?:{'|'.join(escaped)})"))


@lru_cache(maxsize=256)
def _by_bytes(grammar: Grammar) -> Matcher:
    return grammar.matcher(bytes_only())


def log_matches(text: str, grammar: Grammar) -> float:
    """Log of whether a text belongs to a grammar, by the text alone, for `factor`.

    Args:
        text: the whole text.
        grammar: the grammar.

    Returns:
        0.0 nats if it does, −inf if it does not.

    Raises:
        TypeError: if `text` is not a string or `grammar` not a grammar.

    Example:
        >>> log_matches("yes", one_of(["yes", "no"]))
        0.0
    """
    if not isinstance(text, str):
        raise TypeError(f"log_matches takes a string, got {text!r} ({type(text).__name__})")
    if not isinstance(grammar, Grammar):
        raise TypeError(
            "log_matches takes a grammar made by regex, json_schema, lark or one_of, "
            f"got {grammar!r}"
        )
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return -math.inf
    return 0.0 if _by_bytes(grammar).accepts(data) else -math.inf
