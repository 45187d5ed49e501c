"""Inference: from a model and its observations to a posterior, and how far to believe it."""

from langppl.inference.bounds import EvidenceBounds, evidence_bounds
from langppl.inference.calibration import Calibration, calibrate
from langppl.inference.comparing import compare
from langppl.inference.comparison import Comparison
from langppl.inference.many import infer_many
from langppl.inference.methods import infer
from langppl.inference.pooled import pool_bounds

__all__ = [
    "Calibration",
    "Comparison",
    "EvidenceBounds",
    "calibrate",
    "compare",
    "evidence_bounds",
    "infer",
    "infer_many",
    "pool_bounds",
]
