"""The LM floor: everything that touches a transformer."""

from langppl.lm.grammars import Grammar, json_schema, lark, log_matches, one_of, regex
from langppl.lm.model import LM
from langppl.lm.requests import DrawRequest, ScoreRequest, perform
from langppl.lm.rules import StringRules

__all__ = [
    "LM",
    "DrawRequest",
    "Grammar",
    "ScoreRequest",
    "StringRules",
    "json_schema",
    "lark",
    "log_matches",
    "one_of",
    "perform",
    "regex",
]
