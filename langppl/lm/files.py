"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

_PREFIX = ".langppl-"
"""Of files that are being written; short, as a file's own name may be as long as names can be."""


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
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _written_beside(target, data)
        try:
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        # Errors of the temporary file, or of a folder above, would not say what was to be written.
        mend = "give a file in a folder that can be written to"
        reason = f"the {what} cannot be saved ({error.strerror}); {mend}"
        raise OSError(error.errno, reason, str(path)) from error


def write_folder(folder: Path, files: Mapping[str, str | bytes | None], what: str) -> None:
    """Replaces several files of a folder, which keeps the old ones until all new ones are whole.

    A process that is killed among the last renames leaves new ones beside old ones. They are put
    in their places in the order given, so the last one may tell by digests whether they belong
    together.

    Args:
        folder: the folder; made if it is not there.
        files: what each file is to hold, by its name; None for a file that is to be gone.
        what: what that is, for the error.

    Raises:
        OSError: if they cannot be written; names the folder.
    """
    temporary: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        targets = {name: Path(os.path.realpath(folder / name)) for name in files}
        for name, content in files.items():
            if content is not None:
                data = content.encode() if isinstance(content, str) else content
                temporary[name] = _written_beside(targets[name], data)
        for name, target in targets.items():
            if name in temporary:
                os.replace(temporary[name], target)
                del temporary[name]
            else:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        mend = "give a folder on a disk with room, which need not be there yet"
        reason = f"the {what} cannot be saved ({error.strerror}); {mend}"
        raise OSError(error.errno, reason, str(folder)) from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _written_beside(target: Path, data: bytes) -> Path:
    """A new file in the folder of another that holds the data, on the disk."""
    handle, name = tempfile.mkstemp(prefix=_PREFIX, dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            # Before there is anything in it that others must not read. Not every file system has
            # modes; what `mkstemp` gave is the safe side.
            with contextlib.suppress(PermissionError, NotImplementedError):
                temporary.chmod(_mode_for(target))
            file.write(data)
            file.flush()
            _flush(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _flush(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:  # of a file system that has no such thing
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def _mode_for(target: Path) -> int:
    """The mode of a file that is there, else what the user's mask leaves of a new file's."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    return 0o666 & ~_mask()


def _mask() -> int:
    # It can only be asked for by setting it, in which threads would see each other's; Linux tells.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except (OSError, ValueError):
        pass
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
