"""`native.cpp` as a library of the machine's own, compiled once and kept.

It takes a second, by the GCC of the machine (`$CXX`, or `g++`), for the machine's own instructions,
AVX2 or AVX-512. What is kept in the cache folder is run by whoever finds it there, so it must be
this user's alone.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from langppl.lm.weights import cache_dir

SOURCE = Path(__file__).with_name("native.cpp")

OPTIONS = ("-O3", "-std=c++17", "-march=native", "-fPIC", "-fno-math-errno")

PATIENCE = 120
"""Seconds that the compiler may take."""


def built(options: tuple[str, ...]) -> Path:
    """The library's file, compiled unless it is there.

    Args:
        options: of the compiler.

    Raises:
        OSError: if there is no compiler, or torch brings no threads to link.
        subprocess.SubprocessError: if the compiler fails, or takes longer than `PATIENCE`.
    """
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise OSError("no g++ was found")
    # A second pool of OpenMP's threads would fight with torch's, so its own is linked.
    threads = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not threads:
        raise OSError("torch brings no libgomp")
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=PATIENCE
    ).stdout
    digest = hashlib.sha256(SOURCE.read_bytes())
    digest.update(version)
    for part in (*options, str(threads[0]), processor()):
        digest.update(part.encode() + b"\n")
    name = f"{digest.hexdigest()[:32]}.so"
    folder = _folder()
    target = folder / name
    if target.is_file() and _is_own(target):
        return target
    with tempfile.TemporaryDirectory(dir=folder) as room:
        code, whole = Path(room, "native.o"), Path(room, name)
        own = [compiler, *options, "-fopenmp", "-c", str(SOURCE), "-o", str(code)]
        linked = [compiler, "-shared", str(code), str(threads[0]), "-o", str(whole)]
        linked += [f"-Wl,-rpath,{threads[0].parent}"]
        for command in (own, linked):
            subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
        whole.chmod(0o700)  # whatever the umask, or it would be compiled anew every time
        os.replace(whole, target)
    return target


def _folder() -> Path:
    """Where the library is kept: nobody else may write there what this process then runs."""
    try:
        folder = cache_dir() / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A link of somebody else's may lead to another folder later.
        if _is_own(folder):
            with tempfile.TemporaryFile(dir=folder):
                return folder
    except (OSError, RuntimeError):  # of a user without a home
        pass
    return _own_folder()


def _is_own(path: Path) -> bool:
    """Whether a file or folder is this user's, who alone may write to it; so no link is."""
    found = path.lstat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


@functools.cache
def _own_folder() -> Path:
    """A folder of this process alone."""
    folder = tempfile.TemporaryDirectory(prefix="langppl-native-")
    _held.append(folder)
    return Path(folder.name)


_held: list[Any] = []
"""Folders that are removed when the process ends."""


def processor() -> str:
    """What tells machines apart whose instructions differ."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return line
    raise OSError("/proc/cpuinfo names no instructions")
