"""langppl: probabilistic programming in which strings are random variables."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from langppl import (
        diagnostics,
        distributions,
        guides,
        inference,
        learning,
        lm,
        plots,
        posterior,
        program,
        testing,
    )
    from langppl.diagnostics import InferenceWarning
    from langppl.distributions import JoinWarning, LMChoice, LMString, Tempered, Text
    from langppl.guides import (
        ContextInfo,
        FunctionGuide,
        GFlowNetGuide,
        Guidance,
        Guide,
        History,
        MaskedGuide,
        MixtureGuide,
        PriorGuide,
        PromptedGuide,
        RewardSchedule,
        observations_first,
    )
    from langppl.inference import (
        Calibration,
        Comparison,
        EvidenceBounds,
        calibrate,
        compare,
        evidence_bounds,
        infer,
        infer_many,
        pool_bounds,
    )
    from langppl.learning import EMResult, em
    from langppl.lm import LM, Grammar, TrainableLM, json_schema, lark, log_matches, one_of, regex
    from langppl.lm.prompts import Prompt, PromptWarning
    from langppl.lm.weights import FetchError
    from langppl.posterior import ABSENT, Posterior, UnknownSiteError
    from langppl.program import (
        Program,
        RandomnessWarning,
        StaticMismatchWarning,
        call,
        compile,
        condition,
        deterministic,
        do,
        factor,
        potential,
        sample,
    )

_MODULES = (
    "diagnostics",
    "distributions",
    "guides",
    "inference",
    "learning",
    "lm",
    "plots",
    "posterior",
    "program",
    "testing",
)
_HOMES = {
    "langppl.diagnostics": ("InferenceWarning",),
    "langppl.distributions": ("JoinWarning", "LMChoice", "LMString", "Tempered", "Text"),
    "langppl.guides": (
        "ContextInfo",
        "FunctionGuide",
        "GFlowNetGuide",
        "Guidance",
        "Guide",
        "History",
        "MaskedGuide",
        "MixtureGuide",
        "PriorGuide",
        "PromptedGuide",
        "RewardSchedule",
        "observations_first",
    ),
    "langppl.inference": (
        "Calibration",
        "Comparison",
        "EvidenceBounds",
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
    "langppl.lm.prompts": ("Prompt", "PromptWarning"),
    "langppl.lm.weights": ("FetchError",),
    "langppl.posterior": ("ABSENT", "Posterior", "UnknownSiteError"),
    "langppl.program": (
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
        "sample",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ABSENT",
    "LM",
    "Calibration",
    "Comparison",
    "ContextInfo",
    "EMResult",
    "EvidenceBounds",
    "FetchError",
    "FunctionGuide",
    "GFlowNetGuide",
    "Grammar",
    "Guidance",
    "Guide",
    "History",
    "InferenceWarning",
    "JoinWarning",
    "LMChoice",
    "LMString",
    "MaskedGuide",
    "MixtureGuide",
    "Posterior",
    "PriorGuide",
    "Program",
    "Prompt",
    "PromptWarning",
    "PromptedGuide",
    "RandomnessWarning",
    "RewardSchedule",
    "StaticMismatchWarning",
    "Tempered",
    "Text",
    "TrainableLM",
    "UnknownSiteError",
    "calibrate",
    "call",
    "compare",
    "compile",
    "condition",
    "deterministic",
    "diagnostics",
    "distributions",
    "do",
    "em",
    "evidence_bounds",
    "factor",
    "guides",
    "infer",
    "infer_many",
    "inference",
    "json_schema",
    "lark",
    "learning",
    "lm",
    "log_matches",
    "observations_first",
    "one_of",
    "plots",
    "pool_bounds",
    "posterior",
    "potential",
    "program",
    "regex",
    "sample",
    "testing",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the command line needs none of torch.
    if name in _MODULES:
        return importlib.import_module(f"langppl.{name}")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    # With these Python itself adds what may have been meant.
    module = sys.modules[__name__]
    raise AttributeError(f"module 'langppl' has no attribute {name!r}", name=name, obj=module)


def __dir__() -> list[str]:
    # Completion offers what is for users, not this file's imports or what others have loaded.
    return sorted([*(name for name in globals() if name.startswith("__")), *__all__])
