"""Files are replaced in one step, and are otherwise what they were."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from langppl.lm.files import write_atomically


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


def test_new_files_have_new_folders(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b.bin", b"\x00", "guide")
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\x00"
