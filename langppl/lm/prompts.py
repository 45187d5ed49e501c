"""Prompts: plain text, or a chat through the tokenizer's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

Chat = Sequence[Mapping[str, str]]
Prompt = str | Chat


class PromptWarning(UserWarning):
    """A prompt spells a special token, which is read as plain text."""


def special_in(tokenizer: Any, text: str) -> str | None:
    """The first special token of a tokenizer that a text spells; None if it spells none."""
    contents = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    # Some tokenizers have single letters or spaces among them, which spell nothing.
    spelled = [c for c in contents if len(c) > 2 and c in text]
    return min(spelled, key=text.index, default=None)


def is_chat(prompt: object) -> TypeGuard[Chat]:
    """Whether a prompt is a list of role/content messages."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str)


def check_prompt(prompt: object) -> Prompt:
    """Returns a prompt that is a string or a well-formed chat.

    Raises:
        TypeError: if it is anything else.
    """
    if isinstance(prompt, str):
        return prompt
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
        return [dict(m) for m in prompt]
    raise TypeError(
        "a prompt must be a string or a non-empty list of messages such as "
        f'{{"role": "user", "content": "Hello"}}, got {prompt!r}'
    )


def encode_chat(tokenizer: Any, messages: Chat) -> tuple[int, ...]:
    """Token ids of a chat, ready for the assistant's answer.

    Special tokens come from the template alone: a message that spells one is tokenised as plain
    text.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "a chat prompt needs a tokenizer with a chat template, and this one has none; "
            "give the prompt as a string"
        )
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]

    def render(contents: Sequence[str]) -> str:
        chat = [{**m, "content": c} for m, c in zip(messages, contents, strict=True)]
        text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return text

    def encode(text: str, split: bool) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=split)[
            "input_ids"
        ]
        return ids

    contents = [m["content"] for m in messages]
    if not any(s in c for s in special for c in contents):
        return tuple(encode(render(contents), split=False))
    marks = [f"\ue000{k}\ue001" for k in range(len(contents))]
    rendered, ids = render(marks), []
    for mark, content in zip(marks, contents, strict=True):
        before, found, rendered = rendered.partition(mark)
        if not found:
            raise ValueError(f"the chat template drops the message {content!r}")
        ids += encode(before, split=False) + encode(content, split=True)
    return tuple(ids + encode(rendered, split=False))
