"""Files that are whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def is_stream(path: Path) -> bool:
    """Whether a path is of what can only be written on, such as a pipe or /dev/stdout."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_atomically(path: Path, content: str | bytes, what: str) -> None:
    """Replaces a file in one step, so that a broken write never looks like a good file.

    Links stay, and so does the mode of a file that is there.

    Args:
        path: the file; missing folders are made.
        content: what it is to hold.
        what: what that is, for the error.

    Raises:
        OSError: if the file cannot be written; names the path.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if is_stream(path):
            path.write_bytes(data)
            return
        # Of a link the file behind it is replaced, and not the link.
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                # Before there is anything in it that others must not read.
                if target.exists():
                    shutil.copymode(target, temporary)
                file.write(data)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        # Errors of the temporary file, or of a folder above, would not say what was to be written.
        mend = "give a file in a folder that can be written to"
        reason = f"the {what} cannot be saved ({error.strerror}); {mend}"
        raise OSError(error.errno, reason, str(path)) from error
