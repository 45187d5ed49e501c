"""Texts, of whatever class of strings, as they are given to langppl."""

from __future__ import annotations

from typing import Any


def plain_text(text: Any) -> str:
    """A string's own characters, whatever its class prints; of anything else what it prints.

    Example:
        >>> import enum
        >>> Mood = enum.Enum("Mood", {"GOOD": "good"}, type=str)
        >>> str(Mood.GOOD), plain_text(Mood.GOOD)
        ('Mood.GOOD', 'good')
    """
    return str.__str__(text) if isinstance(text, str) else str(text)
