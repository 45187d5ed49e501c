"""What every test stands on: offline, one thread, and the real model fetched once."""

from __future__ import annotations

import os

# Before transformers is imported anywhere: it reads these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers.utils import logging as transformers_logging

from langppl.lm import weights

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct in the user's own cache, fetched and converted if it is not there.

    `fetch` locks, so of several xdist workers one converts and the others wait.
    """
    return weights.fetch("smollm2-135m-instruct", progress=False)


def _benchmark(name: str) -> ModuleType:
    folder = Path(__file__).parents[1] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up by name.
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def truth() -> ModuleType:
    """The grid of programs, guides and twists that SMC is held to."""
    return _benchmark("truth")


@pytest.fixture(scope="session")
def amortized() -> ModuleType:
    """The programs and objectives that amortized guides are held to."""
    return _benchmark("amortized")
