"""Training that survives being killed: folders that are either whole or not there.

A checkpoint is a folder `step-…` with tensors (safetensors) and a record (JSON). It is written
under another name, flushed to the disk and renamed, and only then is the one before it removed; so
whenever a process dies, the newest whole folder is the state after some step, nothing missing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

RECORD = "record.json"
TENSORS = "tensors.safetensors"
_FORMAT = "langppl-checkpoint"
_VERSION = 2


def write(
    folder: Path, step: int, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes the state after so many steps, in the place of earlier ones.

    Args:
        folder: where checkpoints are kept; made if it is not there.
        step: steps done.
        record: what JSON can hold; NaN and infinities too.
        tensors: the rest.

    Raises:
        OSError: if the folder cannot be written to, or the disk is full; names the folder.
    """
    from safetensors.torch import save_file

    whole = folder / f"step-{step:08d}"
    partial = folder / f"{whole.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(partial / TENSORS)
        )
        content = {"format": _FORMAT, "version": _VERSION, "step": step, **record}
        (partial / RECORD).write_text(json.dumps(content) + "\n", encoding="utf-8")
        for path in (partial / TENSORS, partial / RECORD, partial):
            _flush(path)
        if whole.exists():
            shutil.rmtree(whole)
        os.replace(partial, whole)
        _flush(folder)
    except Exception as error:  # safetensors has errors of its own for a full disk
        raise OSError(f"cannot write a checkpoint to {folder}: {error}") from error
    for other in folder.glob("step-*"):
        if other != whole:
            shutil.rmtree(other, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(folder: Path) -> tuple[int, dict[str, Any], dict[str, torch.Tensor]] | None:
    """The newest checkpoint: steps done, record and tensors; None if there is none.

    Raises:
        ValueError: if it is damaged, or of another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = sorted(p for p in folder.glob("step-*") if p.suffix != ".partial")
    if not found:
        return None
    path = found[-1]
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        if record["format"] != _FORMAT or record["version"] != _VERSION:
            raise ValueError(f"format {record['format']}, version {record['version']}")
        return int(record["step"]), record, load_file(str(path / TENSORS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {path} is damaged: {error}") from error
