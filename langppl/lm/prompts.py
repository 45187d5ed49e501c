"""Prompts: plain text, or a chat through the tokenizer's template."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from langppl.lm.texts import plain_text
from langppl.warn import warn

Chat = Sequence[Mapping[str, Any]]
Prompt = str | Chat

PROMPT_BYTES = 64 * 2**20
_ROLES = ("system", "user", "assistant")
_MORE_ROLES = ("tool", "developer", "function", "ipython", "model")
_MARK = re.compile("\ue000(\\d+)\ue001")


class PromptWarning(UserWarning):
    """A prompt or a stop is read otherwise than one may think: what it spells, what is after it."""


def special_in(tokenizer: Any, text: str) -> str | None:
    """The first special token of a tokenizer that a text spells; None if it spells none."""
    spelled = [c for c in _marks(tokenizer) if c in text]
    return min(spelled, key=text.index, default=None)


def _marks(tokenizer: Any) -> list[str]:
    """The special tokens of a tokenizer that a text may spell."""
    contents = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    # Some tokenizers have single letters or spaces among them, which spell nothing.
    return [c for c in contents if len(c) > 2]


def is_chat(prompt: object) -> TypeGuard[Chat]:
    """Whether a prompt is a list of role/content messages."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str)


def check_prompt(prompt: object) -> Prompt:
    """Returns a prompt that is a string or a well-formed chat.

    Raises:
        TypeError: if it is anything else.
    """
    if isinstance(prompt, str):
        return plain_text(prompt)
    if (
        is_chat(prompt)
        and prompt
        and all(
            isinstance(m, Mapping)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in prompt
        )
    ):
        return [
            {k: plain_text(v) if isinstance(v, str) else v for k, v in m.items()} for m in prompt
        ]
    raise TypeError(
        "a prompt must be a string or a non-empty list of messages such as "
        f'{{"role": "user", "content": "Hello"}}, got {prompt!r}'
    )


def begun_answer(prompt: Prompt) -> str | None:
    """The text that a string goes on with at once; None if a chat has the answer still to begin."""
    if not is_chat(prompt):
        return plain_text(prompt)
    return plain_text(prompt[-1]["content"]) if prompt[-1]["role"] == "assistant" else None


def _check_texts(tokenizer: Any, messages: Chat) -> None:
    """Raises ValueError for what a message, apart from its content, would do to the template.

    Raises:
        ValueError: for a text that is not Unicode, or a special token in another field.
    """
    marks = _marks(tokenizer)
    for message in messages:
        for name, value in message.items():
            # Fields that a template may write have any form; their texts are within what they show.
            shown = value if isinstance(value, str) else str(value)
            try:
                shown.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"a message's {name} must be valid Unicode, got {value!r}, which has a lone "
                    "surrogate"
                ) from None
            if name == "content":
                continue
            if spelled := [m for m in marks if m in shown]:
                raise ValueError(
                    f"a message's {name} spells the special token {spelled[0]!r}: {value!r}; only "
                    "in its content are such read as plain text"
                )


def _warn_of_control(tokenizer: Any, messages: Chat) -> None:
    """Warns of tokens in a message that the template writes too, though they are not special.

    Such mark a chat's parts (`<tool_call>`), and as the tokenizer has them among the ordinary ones
    they are read as what they mean there. An assistant's message has them of right.
    """
    template = str(tokenizer.chat_template)
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if not t.special]
    control = [c for c in added if len(c) > 2 and c.strip() and c in template]
    for message in messages if control else ():
        spelled = [c for c in control if c in message["content"]]
        if spelled and message["role"] != "assistant":
            warn(
                f"a message of the role {message['role']!r} spells {spelled[0]!r}, which the chat "
                "template writes too and the tokenizer reads as one token, not as plain text; "
                "take it out of texts that you do not trust",
                PromptWarning,
            )


def _check_roles(template: str, messages: Chat) -> None:
    """Raises ValueError for a role that is none of the usual ones and not in the template."""

    def is_named(role: str) -> bool:
        # A template quotes more than roles, such as the tokens that it puts around a message.
        is_plain = re.fullmatch(r"[\w-]+", role) is not None
        return is_plain and (f"'{role}'" in template or f'"{role}"' in template)

    for message in messages:
        role = message["role"]
        if role not in _ROLES and not is_named(role):
            known = [*_ROLES, *(r for r in _MORE_ROLES if is_named(r))]
            raise ValueError(
                f"a message has the role {role!r}, which the tokenizer's chat template does not "
                f"name; roles are: {', '.join(known)}"
            )


def encode_chat(tokenizer: Any, messages: Chat) -> tuple[int, ...]:
    """Token ids of a chat, ready for the assistant's answer.

    An assistant's message at its end is the beginning of that answer, which goes on from there.
    Special tokens come from the template alone: a message that spells one is tokenised as plain
    text.

    Raises:
        ValueError: if the tokenizer has no chat template, a role is not known, a text is not
            Unicode, anything but a content spells a special token, or the template refuses the
            chat or changes the message that is to go on.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "a chat prompt needs a tokenizer with a chat template, and this one has none; "
            "give the prompt as a string"
        )
    _check_texts(tokenizer, messages)
    _check_roles(str(tokenizer.chat_template), messages)
    _warn_of_control(tokenizer, messages)
    contents = [m["content"] for m in messages]
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    if not any(s in c for s in special for c in contents):
        return _encoded(tokenizer, _rendered(tokenizer, messages, contents), split=False)
    return _encoded_apart(tokenizer, messages, contents)


def _encoded(tokenizer: Any, text: str, split: bool) -> tuple[int, ...]:
    """Token ids of a text; `split` reads special tokens that it spells as plain text."""
    found = tokenizer(text, add_special_tokens=False, split_special_tokens=split)
    return tuple(found["input_ids"])


def _rendered(tokenizer: Any, messages: Chat, contents: Sequence[str]) -> str:
    """What the chat template makes of messages with other contents.

    Raises:
        ValueError: if it refuses them, or changes the message that is to go on.
    """
    from jinja2 import TemplateError  # as of transformers' chat templates

    goes_on = messages[-1]["role"] == "assistant"
    chat = [{**m, "content": c} for m, c in zip(messages, contents, strict=True)]
    try:
        text: str = tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
        )
    except TemplateError as error:
        said = error.message or type(error).__name__
        raise ValueError(f"the tokenizer's chat template refuses the chat: {said}") from error
    except ValueError as error:
        if not goes_on:
            raise
        raise ValueError(
            f"the chat template changes the assistant's message {messages[-1]['content']!r}, "
            "so the string cannot go on from it; end the chat with the user's message"
        ) from error
    return text


def _encoded_apart(tokenizer: Any, messages: Chat, contents: Sequence[str]) -> tuple[int, ...]:
    """Token ids of a chat, each message tokenised apart from the template, as plain text.

    Raises:
        ValueError: if the template drops a message, or changes one that spells a special token.
    """
    # Rendered with marks in their place, the messages are told from what stands around them.
    marked = [f"\ue000{k}\ue001" for k in range(len(contents))]
    parts = _MARK.split(_rendered(tokenizer, messages, marked))
    places = [int(k) for k in parts[1::2]]
    dropped = set(range(len(contents))).difference(places)
    if dropped:
        raise ValueError(f"the chat template drops the message {contents[min(dropped)]!r}")
    whole = _rendered(tokenizer, messages, contents)
    for shown in (contents, [c.strip() for c in contents]):
        pieces = [p if i % 2 == 0 else shown[int(p)] for i, p in enumerate(parts)]
        if "".join(pieces) == whole:
            return tuple(
                i for k, p in enumerate(pieces) for i in _encoded(tokenizer, p, split=k % 2 == 1)
            )
    marks = _marks(tokenizer)
    spelled = next((c for c in contents if any(s in c for s in marks)), None)
    if spelled is None:
        return _encoded(tokenizer, whole, split=False)
    raise ValueError(
        f"the message {spelled!r} spells a special token, and the chat template changes messages, "
        "so it cannot be told which part of the prompt is its text; leave the token out"
    )


class KnownPrompts:
    """The ids of the latest prompts.

    Args:
        capacity: most bytes to use, about.
    """

    def __init__(self, capacity: int = PROMPT_BYTES) -> None:
        self.capacity = capacity
        self._bytes = 0
        self._found: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    def get(self, text: str) -> tuple[int, ...] | None:
        """A prompt's ids, None if it is not known."""
        found = self._found.get(text)
        if found is not None:
            # Another thread may have dropped it since.
            with contextlib.suppress(KeyError):
                self._found.move_to_end(text)
        return found

    def keep(self, text: str, ids: tuple[int, ...]) -> None:
        """Keeps a prompt, in the place of those least recently used."""
        if text in self._found:  # another thread was faster
            return
        self._found[text] = ids
        self._bytes += _size(text, ids)
        while self._bytes > self.capacity and self._found:
            self._bytes -= _size(*self._found.popitem(last=False))


def _size(text: str, ids: tuple[int, ...]) -> int:
    # An id takes its place in the tuple and, but for the smallest, an object of its own.
    return sys.getsizeof(text) + 36 * len(ids)
