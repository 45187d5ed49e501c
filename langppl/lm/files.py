"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, what: str) -> None:
    """Replaces a file in one step, so that a broken write never looks like a good file.

    Args:
        path: the file; missing folders are made.
        content: what it is to hold.
        what: what that is, for the error.

    Raises:
        OSError: if the file cannot be written; names the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(content, str):
                temporary.write_text(content, encoding="utf-8")
            else:
                temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        # Errors of the temporary file, or of a folder above, would not say what was to be written.
        mend = "give a file in a folder that can be written to"
        reason = f"the {what} cannot be saved ({error.strerror}); {mend}"
        raise OSError(error.errno, reason, str(path)) from error
