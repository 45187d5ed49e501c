"""Distributions over strings."""

from langppl.distributions.base import StringDistribution
from langppl.distributions.lmchoice import LMChoice
from langppl.distributions.lmstring import JoinWarning, LMString
from langppl.distributions.tempered import Tempered
from langppl.distributions.text import Text

__all__ = ["JoinWarning", "LMChoice", "LMString", "StringDistribution", "Tempered", "Text"]
