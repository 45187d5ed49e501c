"""What the files that langppl writes say of themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
        raise ValueError(f"{path} is corrupt, or no {form}: it does not say so")
    found = record.get("version")
    if isinstance(found, bool) or not isinstance(found, int):
        raise ValueError(f"{path} is corrupt: its version is {found!r}")
    if found > version or (found < version and not reads_older):
        reads = f"up to version {version}" if reads_older else f"version {version} alone"
        raise ValueError(
            f"{path} is of version {found} of the format, and this langppl reads {reads}; use the "
            "langppl that wrote it"
        )
