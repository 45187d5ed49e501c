"""Training that survives being killed: folders that are either whole or not there.

A checkpoint is a folder `step-…` with tensors (safetensors) and a record (JSON). It is written
under another name, flushed to the disk and renamed, and only then is the one before it removed; so
whenever a process dies, the newest whole folder is the state after some step, nothing missing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from langppl.distributions import LMChoice, LMString
from langppl.lm.counts import as_count
from langppl.lm.formats import check_format, read_json
from langppl.lm.tensors import check_like, packed, unpacked
from langppl.program import Program

RECORD = "record.json"
TENSORS = "tensors.safetensors"
_FORMAT = "langppl-checkpoint"
_VERSION = 6
_NAME = re.compile(r"step-\d{8,}")
_LOCK = ".lock"
_OF_ADAM = ("step", "exp_avg", "exp_avg_sq")


def place(folder: str | os.PathLike[str]) -> Path:
    """A folder's own place: a training may change the working directory."""
    return Path(folder).expanduser().absolute()


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
    whole = folder / _folder_of(step)
    partial = folder / f"{whole.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            _discard(partial)
        partial.mkdir()
        (partial / TENSORS).write_bytes(packed(tensors))
        content = {"format": _FORMAT, "version": _VERSION, "step": step, **record}
        (partial / RECORD).write_text(json.dumps(content) + "\n", encoding="utf-8")
        for path in (partial / TENSORS, partial / RECORD, partial):
            _flush(path)
        if whole.exists():
            _discard(whole)
        os.replace(partial, whole)
        _flush(folder)
    except OSError as error:
        raise OSError(f"cannot write a checkpoint to {folder}: {error}") from error
    for other, done in _kept_in(folder):
        # Later steps are none of this training's.
        if done < step:
            _discard(other)


def clear(folder: Path) -> None:
    """Removes a folder of checkpoints, as far as it holds nothing else."""
    for path, _ in _kept_in(folder):
        _discard(path)
    with contextlib.suppress(OSError):
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _kept_in(folder: Path) -> list[tuple[Path, int]]:
    """The checkpoints in a folder, parts of such too, with their steps."""
    found = [(p, p.name.removesuffix(".partial")) for p in folder.glob("step-*")]
    return [(p, int(n.removeprefix("step-"))) for p, n in found if _NAME.fullmatch(n)]


def _discard(path: Path) -> None:
    """Removes a checkpoint; what else somebody put there stays, and the folder with it."""
    with contextlib.suppress(OSError):
        for name in (RECORD, TENSORS):
            (path / name).unlink(missing_ok=True)
        path.rmdir()


class Claim:
    """The right of one training to a folder, which ends with it or with the process.

    Two that write to one folder would remove each other's checkpoints.

    Args:
        folder: of checkpoints; made if it is not there. Where it cannot be written to there is
            nothing to claim.

    Raises:
        OSError: if another training has it; names the folder.
    """

    def __init__(self, folder: Path) -> None:
        from filelock import FileLock, Timeout

        self._lock: Any = None
        self._folder, self._is_new = folder, not folder.exists()
        path = folder / _LOCK
        lock = FileLock(path, thread_local=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            # Whoever ends removes the file, which may be the one that was just opened.
            if not path.exists():
                lock.release()
                raise Timeout(str(path))
        except Timeout:
            raise OSError(
                errno.EBUSY,
                "another training writes its checkpoints here; wait until it ends, or give "
                f"another folder (if there is none any more, remove {path.name} in it)",
                str(folder),
            ) from None
        except (OSError, NotImplementedError):
            return
        self._lock = lock

    def release(self) -> None:
        """Leaves the folder to others."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            (self._folder / _LOCK).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None
        if self._is_new:
            # Nothing was written to it.
            with contextlib.suppress(OSError):
                self._folder.rmdir()


def _folder_of(step: int) -> str:
    return f"step-{step:08d}"


def check_room(folder: Path, size: int) -> None:
    """Looks whether the disk has room for checkpoints of a size.

    A new one is whole before the old one is removed, so it takes room for two.

    Args:
        folder: where they are to be kept; it need not be there.
        size: bytes of one.

    Raises:
        OSError: if there is less, with `errno.ENOSPC`; names the folder.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    disk = shutil.disk_usage(there)
    kept = sum(
        file.stat().st_size
        for path in folder.glob("step-*")
        if _NAME.fullmatch(path.name)
        for file in path.glob("*")
    )
    needed = 2 * size - kept
    # Some network folders tell nothing.
    if disk.total and disk.free < needed:
        raise OSError(
            errno.ENOSPC,
            f"checkpoints in {folder} need {needed / 1e6:.1f} MB, as one is kept until the next is "
            f"written, and {disk.free / 1e6:.1f} MB are free; give a folder on another disk",
        )


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
    found = sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir())
    if not found:
        return None
    path = max(found, key=lambda p: int(p.name.removeprefix("step-")))
    try:
        record = read_json(path / RECORD)
    except ValueError as error:
        raise ValueError(f"the checkpoint {path} is damaged: {error}") from error
    check_format(path / RECORD, record, _FORMAT, _VERSION, reads_older=False)
    try:
        step = as_count("step", record.get("step"), 0)
        if path.name != _folder_of(step):
            raise ValueError(f"its record is of step {step}")
        return step, record, unpacked(path / TENSORS)
    except ValueError as error:
        raise ValueError(f"the checkpoint {path} is damaged: {error}") from error


@contextlib.contextmanager
def checking(folder: Path, what: str) -> Iterator[None]:
    """Within the block, whatever a record's content leads to is said to be the folder's fault.

    Args:
        folder: of the checkpoint.
        what: "training" or "run".
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"the checkpoint in {folder} is of another {what}, or damaged: {error}; give another "
            "folder"
        ) from error


def check_whole(folder: Path, record: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raises ValueError if a record lacks something."""
    missing = [k for k in keys if k not in record]
    if missing:
        raise ValueError(f"the checkpoint in {folder} is damaged: it lacks {', '.join(missing)}")


def check_same(folder: Path, known: Any, described: Mapping[str, Any], what: str) -> None:
    """Raises ValueError if a record's settings are not those of the training or run (`what`)."""
    if not isinstance(known, Mapping):
        raise ValueError(f"the checkpoint in {folder} is damaged: its settings are {known!r}")
    other = [k for k in {**described, **known} if described.get(k) != known.get(k)]
    if other:
        raise ValueError(
            f"{folder} holds a checkpoint of a {what} with other {', '.join(other)}; give the same "
            "arguments to go on with it, or another folder"
        )


def state_of(
    named: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Weights and what Adam knows of them, as tensors to write."""
    tensors: dict[str, torch.Tensor] = {}
    for name, p in named.items():
        tensors[f"weight {name}"] = p.detach()
        for key, value in optimiser.state.get(p, {}).items():
            tensors[f"{key} {name}"] = value
    return tensors


def check_tensors(
    tensors: Mapping[str, torch.Tensor],
    named: Mapping[str, torch.Tensor],
    more: Mapping[str, torch.Tensor],
) -> None:
    """Checks what `state_of` gave, before `restore` takes it over.

    Args:
        tensors: those of the checkpoint.
        named: the weights in whose places they are to be, or their shapes alone.
        more: whatever else the checkpoint must have, by its names there.

    Raises:
        ValueError: if a tensor is missing, unknown, of another shape or kind, or not finite, or
            Adam could not go on with it.
    """
    expected = {f"weight {name}": p for name, p in named.items()} | dict(more)
    for name, p in named.items():
        # Adam knows nothing yet of weights that had no gradient.
        if any(f"{key} {name}" in tensors for key in _OF_ADAM):
            expected |= {f"{key} {name}": p for key in _OF_ADAM[1:]}
            expected[f"step {name}"] = torch.zeros((), dtype=torch.float32)
    check_like("it", tensors, expected, "does not fit")
    for key in (f"{kind} {name}" for name in named for kind in ("step", "exp_avg_sq")):
        if key in tensors and bool((tensors[key] < 0).any()):
            raise ValueError(f"{key!r} is below 0")


def restore(
    named: Mapping[str, torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Takes over what `state_of` gave."""
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(tensors[f"weight {name}"])
            kept = {k: tensors[f"{k} {name}"] for k in _OF_ADAM if f"{k} {name}" in tensors}
            optimiser.state.pop(p, None)
            if kept:
                # Adam counts its steps on the CPU, wherever the weights are.
                optimiser.state[p] = {
                    k: v if k == "step" else v.to(p.device) for k, v in kept.items()
                }


def digest(content: Any) -> str:
    """A short name of what looks the same in every process."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """A value as something whose repr is the same in every process; of others the type alone."""
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, torch.Tensor):
        return [tuple(value.shape), value.detach().cpu().flatten().tolist()]
    if isinstance(value, np.ndarray | np.generic):
        return [value.shape, plain(value.flatten().tolist())]
    if isinstance(value, Mapping):
        return [(plain(k), plain(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(plain(v)) for v in value)
    return name_of(value)


def name_of(value: Any) -> str:
    """The name of a function or a class, or of an object's class."""
    own = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(own, '__module__', '')}.{own.__qualname__}"


def form_of(program: Program) -> list[Any]:
    """What a program is made of, as far as no latent has a hand in it."""
    found: list[Any] = []
    for name, site in sorted(program.sites.items()):
        fn: Any = site.fn
        own: list[Any] = [name, site.kind, type(fn).__name__]
        if name in program.graph and not program.graph.latents_above(name):
            if isinstance(fn, LMString):
                rules = {k: getattr(fn.rules, k) for k in fn.rules.__dataclass_fields__}
                shown = [(k, plain(v) if k != "grammar" else str(v)) for k, v in rules.items()]
                own += [plain(fn.prompt), shown]
            elif isinstance(fn, LMChoice):
                own += [plain(fn.prompt), list(map(str, fn.options))]
        found.append(own)
    return found
