"""Files are replaced in one step, and are otherwise what they were."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from langppl.lm.files import write_atomically, write_folder


@pytest.mark.skipif(os.name == "nt", reason="links and modes of Unix")
def test_links_and_modes_stay(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "whole.json", tmp_path / "link.json"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)

    write_atomically(link, "néw\n", "posterior")

    assert link.is_symlink() and target.read_bytes() == "néw\n".encode()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert os.listdir(target.parent) == ["whole.json"]


@pytest.mark.skipif(os.name == "nt", reason="pipes of Unix")
def test_pipes_are_written_on() -> None:
    reading, writing = os.pipe()
    write_atomically(Path(f"/dev/fd/{writing}"), "ab", "comparison")
    assert os.read(reading, 9) == b"ab"
    os.close(reading)
    os.close(writing)


def test_file_systems_without_modes_or_flushing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_modes(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def no_flushing(handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(Path, "chmod", no_modes)
    monkeypatch.setattr(os, "fsync", no_flushing)
    write_atomically(tmp_path / "whole.json", "ab", "posterior")
    write_folder(tmp_path / "guide", {"one": "a", "two": b"b"}, "guide")
    assert (tmp_path / "whole.json").read_text() == "ab"
    assert (tmp_path / "guide" / "two").read_bytes() == b"b"


def test_an_interrupt_leaves_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(one: Path, two: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "whole.json", "ab", "posterior")
    assert not os.listdir(tmp_path)


def test_new_files_have_new_folders(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b.bin", b"\x00", "guide")
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\x00"


def test_threads_that_write_one_file_leave_a_whole_one(tmp_path: Path) -> None:
    path, errors = tmp_path / "a.json", []

    def write(letter: str) -> None:
        try:
            for _ in range(8):
                write_atomically(path, letter * 100_000, "posterior")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            found = path.read_text()
            assert len(found) == 100_000 and len(set(found)) == 1
    assert not errors
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(os.name == "nt", reason="names and modes of Unix")
def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 255)
    before = os.umask(0o027)
    try:
        write_atomically(path, "b", "posterior")
    finally:
        os.umask(before)
    assert path.read_text() == "b" and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_several_files_stay_the_old_ones_until_all_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "new", {"a": "1", "b": b"2", "c": "3"}, "guide")
    plain, count = os.fsync, [0]

    def full(handle: int) -> None:
        count[0] += 1
        if count[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"the guide cannot be saved \(No space left.*new"):
            write_folder(tmp_path / "new", {"a": "x", "b": "y", "c": None}, "guide")
    found = {p.name: p.read_text() for p in (tmp_path / "new").iterdir()}
    assert found == {"a": "1", "b": "2", "c": "3"}
    write_folder(tmp_path / "new", {"a": "x", "b": "y", "c": None}, "guide")
    found = {p.name: p.read_text() for p in (tmp_path / "new").iterdir()}
    assert found == {"a": "x", "b": "y"}
