"""langppl: probabilistic programming in which strings are random variables."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from langppl import testing
    from langppl.distributions import JoinWarning, LMChoice, LMString, Tempered, Text
    from langppl.guides import (
        GFlowNetGuide,
        Guide,
        MaskedGuide,
        MixtureGuide,
        PriorGuide,
        PromptedGuide,
        RewardSchedule,
    )
    from langppl.inference import (
        calibrate,
        compare,
        evidence_bounds,
        infer,
        infer_many,
        pool_bounds,
    )
    from langppl.learning import EMResult, em
    from langppl.lm import LM, Grammar, TrainableLM, json_schema, lark, log_matches, one_of, regex
    from langppl.posterior import ABSENT, Posterior
    from langppl.program import (
        Program,
        call,
        compile,
        condition,
        deterministic,
        do,
        factor,
        potential,
        sample,
    )

_HOMES = {
    "langppl.distributions": ("JoinWarning", "LMChoice", "LMString", "Tempered", "Text"),
    "langppl.guides": (
        "GFlowNetGuide",
        "Guide",
        "MaskedGuide",
        "MixtureGuide",
        "PriorGuide",
        "PromptedGuide",
        "RewardSchedule",
    ),
    "langppl.inference": (
        "calibrate",
        "compare",
        "evidence_bounds",
        "infer",
        "infer_many",
        "pool_bounds",
    ),
    "langppl.learning": ("EMResult", "em"),
    "langppl.lm": (
        "LM",
        "Grammar",
        "TrainableLM",
        "json_schema",
        "lark",
        "log_matches",
        "one_of",
        "regex",
    ),
    "langppl.posterior": ("ABSENT", "Posterior"),
    "langppl.program": (
        "Program",
        "call",
        "compile",
        "condition",
        "deterministic",
        "do",
        "factor",
        "potential",
        "sample",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ABSENT",
    "LM",
    "EMResult",
    "GFlowNetGuide",
    "Grammar",
    "Guide",
    "JoinWarning",
    "LMChoice",
    "LMString",
    "MaskedGuide",
    "MixtureGuide",
    "Posterior",
    "PriorGuide",
    "Program",
    "PromptedGuide",
    "RewardSchedule",
    "Tempered",
    "Text",
    "TrainableLM",
    "calibrate",
    "call",
    "compare",
    "compile",
    "condition",
    "deterministic",
    "do",
    "em",
    "evidence_bounds",
    "factor",
    "infer",
    "infer_many",
    "json_schema",
    "lark",
    "log_matches",
    "one_of",
    "pool_bounds",
    "potential",
    "regex",
    "sample",
    "testing",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the command line needs none of torch.
    if name == "testing":
        return importlib.import_module("langppl.testing")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'langppl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
