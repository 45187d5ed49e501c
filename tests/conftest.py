"""What every test stands on: offline, one thread, and the real model fetched once."""

from __future__ import annotations

import os

# Before transformers is imported anywhere: it reads these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

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
