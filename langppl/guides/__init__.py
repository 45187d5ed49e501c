"""Guides: what proposes values for the latents."""

from langppl.guides.base import Guide, Key, PriorGuide, raw_log_prob
from langppl.guides.context import ContextInfo, default_context, observations_first
from langppl.guides.function import FunctionGuide
from langppl.guides.gflownet import GFlowNetGuide
from langppl.guides.guidance import Guidance
from langppl.guides.history import History
from langppl.guides.masked import MaskedGuide
from langppl.guides.mixture import MixtureGuide
from langppl.guides.prompted import PromptedGuide
from langppl.guides.schedules import RewardSchedule
from langppl.program.execution import Choice, Chooser, Execution, draw_prior

__all__ = [
    "Choice",
    "Chooser",
    "ContextInfo",
    "Execution",
    "FunctionGuide",
    "GFlowNetGuide",
    "Guidance",
    "Guide",
    "History",
    "Key",
    "MaskedGuide",
    "MixtureGuide",
    "PriorGuide",
    "PromptedGuide",
    "RewardSchedule",
    "default_context",
    "draw_prior",
    "observations_first",
    "raw_log_prob",
]
