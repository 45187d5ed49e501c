"""The grid of programs, guides and twists that SMC is held to."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def truth() -> ModuleType:
    folder = Path(__file__).parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("truth", folder / "truth.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up by name.
        sys.modules["truth"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(folder))
