"""Inference: from a model and its observations to a posterior."""

from langppl.inference.comparison import Comparison, compare
from langppl.inference.methods import infer

__all__ = ["Comparison", "compare", "infer"]
