"""A saved guide's folder may come from anywhere, and saving over one must not cost it."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file, save_file

import langppl as lp
from langppl.lm import adapters
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=2)
WEIGHTS, HEADS = "adapter_model.safetensors", "heads.safetensors"


def story() -> None:
    p = lp.sample("p", dist.Beta(2.0, 3.0))
    z = lp.sample("z", lp.LMString(LM, "ab", max_tokens=2))
    lp.sample("n", dist.Normal(p + len(z), 1.0), obs=torch.tensor(3.0))


def trained(seed: int = 0) -> lp.GFlowNetGuide:
    guide = lp.GFlowNetGuide(LM, rank=2, seed=seed)
    return guide.fit(story, steps=1, batch=4, progress=False)


def change(folder: Path, **options: Any) -> None:
    path = folder / "guide.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def check_refused(folder: Path, message: str) -> None:
    known = adapters.names(LM.model)
    with pytest.raises(ValueError, match=message):
        lp.GFlowNetGuide.load(folder, LM)
    LM.trainable("other", rank=1).reset()  # with it abandoned ones are removed
    assert adapters.names(LM.model) <= known | {"trainable-other"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": math.inf}, "heads must be counts by names"),
        ({"heads": {"flow": math.inf}}, "the count of head 'flow' must be an integer"),
        ({"heads": {"flow": -1}}, "the count of head 'flow' must be an integer of at least 1"),
        ({"heads": {"flow": 10**400}}, "the count of head 'flow' must be below"),
        ({"heads": {"a.b": 1}}, "there is no head 'a.b'"),
        ({"heads": {"keys": 1}}, "there is no head 'keys'"),
        (
            {"heads": {"beta-1": 10**9}},
            r"heads\.safetensors is corrupt: .* differ",
        ),
        ({"heads": {"beta-1": 2, "flow": 1}}, r"heads\.safetensors is corrupt: .* differ in name"),
        ({"seed": "x"}, "is corrupt: .*seed"),
        ({"numeric": "zzz"}, "numeric must be"),
        ({"version": -5}, "its version is -5"),
        ({"sites": "abc"}, "sites must be a list"),
        ({"flows": [3]}, "each of flows must be a text"),
        ({"history": "x"}, "history must have a list"),
        ({"history": {"loss": "12"}}, "history must have a list"),
        ({"history": {"loss": [10**400]}}, "is corrupt"),
        ({"history": {"loss": [[]]}}, "is corrupt"),
        ({"defensive": math.nan}, "defensive must be at least 0"),
        ({"defensive": "0.5"}, "defensive must be a number"),
        ({"objective": ["tb"]}, "is corrupt: unknown objective"),
        ({"base_fingerprint": 3}, "base_fingerprint must be a text"),
        ({"default_context": "yes"}, "default_context must be true or false"),
        ({"sha256": 3}, "its digests are no mapping"),
    ],
)
def test_a_record_that_no_guide_has(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    trained().save(tmp_path)
    change(tmp_path, **options)
    check_refused(tmp_path, message)


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a": "\xff"}', b"null", b""])
def test_a_record_that_is_none(tmp_path: Path, content: bytes) -> None:
    trained().save(tmp_path)
    (tmp_path / "guide.json").write_bytes(content)
    check_refused(tmp_path, r"guide\.json is corrupt")


def test_a_saving_that_was_cut_off_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = trained(), trained(seed=1)
    old.save(tmp_path / "whole")
    plain = os.replace
    for done in range(4):
        folder = tmp_path / str(done)
        old.save(folder)
        left = [done]

        def killed(one: Any, two: Any, left: list[int] = left) -> None:
            if not left[0]:
                raise SystemExit
            left[0] -= 1
            plain(one, two)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", killed)
            with pytest.raises(SystemExit):
                new.save(folder)
        if not done:
            assert contents(folder) == contents(tmp_path / "whole")
        else:
            check_refused(folder, f"{WEIGHTS} is corrupt: .* saved there last.*save it again")
        new.save(folder)
        assert lp.GFlowNetGuide.load(folder, LM).identity() == new.identity()


def test_heads_of_another_guide_are_noticed(tmp_path: Path) -> None:
    trained().save(tmp_path / "a")
    trained(seed=1).save(tmp_path / "b")
    (tmp_path / "a" / HEADS).write_bytes((tmp_path / "b" / HEADS).read_bytes())
    check_refused(tmp_path / "a", "heads.safetensors is corrupt: it is not what was saved")


def test_a_guide_without_digests_is_loaded(tmp_path: Path) -> None:
    guide = trained()
    guide.save(tmp_path)
    record = json.loads((tmp_path / "guide.json").read_text())
    del record["sha256"]
    (tmp_path / "guide.json").write_text(json.dumps(record))
    assert lp.GFlowNetGuide.load(tmp_path, LM).identity() == guide.identity()


def test_a_full_disk_leaves_the_old_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained().save(tmp_path / "guide")
    view = LM.trainable("full", rank=2)
    view.save(tmp_path / "view")
    before = [contents(tmp_path / n) for n in ("guide", "view")]
    new = trained(seed=1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"the guide cannot be saved \(No space.*guide'"):
            new.save(tmp_path / "guide")
        with pytest.raises(OSError, match=r"the trainable view cannot be saved \(No space"):
            view.save(tmp_path / "view")
    assert [contents(tmp_path / n) for n in ("guide", "view")] == before


@pytest.mark.skipif(os.name == "nt", reason="modes of Unix")
def test_all_files_have_the_mode_of_the_users_mask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        trained().save(tmp_path)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["guide.json", WEIGHTS, "adapter_config.json", HEADS], 0o640)


def test_a_view_with_the_weights_of_another_is_noticed(tmp_path: Path) -> None:
    view = LM.trainable("whose", rank=2)
    view.save(tmp_path)
    path = tmp_path / WEIGHTS
    save_file({k: v + 1.0 for k, v in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="is not what was saved there last"):
        view.load(tmp_path)
    (tmp_path / "trainable.json").write_bytes(b"[" * 200_000)
    with pytest.raises(ValueError, match=r"trainable\.json is corrupt"):
        view.load(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="names of Unix")
def test_a_guide_in_a_folder_whose_name_is_no_unicode(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff"))
    guide = trained()
    guide.save(folder)
    assert lp.GFlowNetGuide.load(folder, LM).identity() == guide.identity()
