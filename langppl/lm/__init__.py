"""The LM floor: everything that touches a transformer."""

from langppl.lm.grammars import Grammar, json_schema, lark, log_matches, one_of, regex
from langppl.lm.model import LM
from langppl.lm.requests import DrawRequest, ScoreRequest, perform
from langppl.lm.rules import StringRules
from langppl.lm.trainable import TrainableLM

__all__ = [
    "LM",
    "DrawRequest",
    "Grammar",
    "ScoreRequest",
    "StringRules",
    "TrainableLM",
    "json_schema",
    "lark",
    "log_matches",
    "one_of",
    "perform",
    "regex",
]
