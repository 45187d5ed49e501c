"""The LM floor: everything that touches a transformer."""

from langppl.lm.model import LM
from langppl.lm.requests import DrawRequest, ScoreRequest, perform
from langppl.lm.rules import StringRules

__all__ = ["LM", "DrawRequest", "ScoreRequest", "StringRules", "perform"]
