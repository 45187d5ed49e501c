"""Inference: from a model and its observations to a posterior."""

from langppl.inference.compare import Comparison, compare
from langppl.inference.infer import infer

__all__ = ["Comparison", "compare", "infer"]
