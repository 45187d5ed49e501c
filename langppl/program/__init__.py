"""A model as a mathematical object: statements, executions, graph, log joint."""

from langppl.program.calls import call
from langppl.program.program import Program, StaticMismatchWarning, compile, run_together
from langppl.program.randomness import RandomnessWarning
from langppl.program.statements import (
    condition,
    deterministic,
    do,
    factor,
    potential,
    sample,
)

__all__ = [
    "Program",
    "RandomnessWarning",
    "StaticMismatchWarning",
    "call",
    "compile",
    "condition",
    "deterministic",
    "do",
    "factor",
    "potential",
    "run_together",
    "sample",
]
