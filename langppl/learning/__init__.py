"""Learning: fitting a model's own adapters to data."""

from langppl.learning.rounds import EMResult, em

__all__ = ["EMResult", "em"]
