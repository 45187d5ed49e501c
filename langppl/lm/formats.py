"""What the files that langppl writes say of themselves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def check_format(
    path: str | os.PathLike[str],
    record: Any,
    form: str,
    version: int,
    *,
    reads_older: bool = True,
) -> None:
    """Checks that a file is what it is taken for, and of a version that is understood.

    Args:
        path: the file.
        record: what was read from it.
        form: the format's name.
        version: the newest.
        reads_older: whether older versions are read too.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(record, Mapping) or record.get("format") != form:
        raise ValueError(f"{shown(path)} is corrupt, or no {form}: it does not say so")
    found = record.get("version")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"{shown(path)} is corrupt: its version is {found!r}")
    if found > version or (found < version and not reads_older):
        reads = f"up to version {version}" if reads_older else f"version {version} alone"
        raise ValueError(
            f"{shown(path)} is of version {found} of the format, and this langppl reads {reads}; "
            "use the langppl that wrote it"
        )


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: if it cannot be read, or is no JSON; names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    # Lists within lists end Python's stack.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)} is corrupt: {error}") from error


def unreadable(path: str | os.PathLike[str], error: OSError) -> ValueError:
    """The error for a file that may well be whole, had one been let read it."""
    return ValueError(f"{shown(path)} cannot be read: {error.strerror or error}")


def check_digests(folder: Path, digests: Any, names: Iterable[str]) -> None:
    """Checks that files are those that were written together with a record.

    Args:
        folder: where they are.
        digests: the sha256 of files by name, as the record has them; None in those of old.
        names: the files.

    Raises:
        ValueError: if one is another.
    """
    if digests is None:
        return
    if not isinstance(digests, Mapping):
        raise ValueError(f"the record in {shown(folder)} is corrupt: its digests are no mapping")
    for name in names:
        path = folder / name
        if path.is_file() and digests.get(name) != digest(path.read_bytes()):
            raise ValueError(
                f"{shown(path)} is corrupt: it is not what was saved there last, as the saving was "
                "cut off or the file was changed since; save it again"
            )


def digest(content: bytes) -> str:
    """What tells a file's content from any other."""
    return hashlib.sha256(content).hexdigest()


def shown(path: str | os.PathLike[str]) -> str:
    """A path that any file or terminal takes: names need not be Unicode on the disk."""
    return os.fspath(path).encode(errors="backslashreplace").decode()
