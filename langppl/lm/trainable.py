"""`TrainableLM`: a view of an LM with an adapter of its own, which a model may stand on."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from langppl.lm import adapters
from langppl.lm.counts import as_count
from langppl.lm.files import write_folder
from langppl.lm.formats import check_digests, check_format, digest, read_json, shown
from langppl.lm.requests import alone
from langppl.lm.seeds import as_seed, seeded

if TYPE_CHECKING:
    from langppl.lm.model import LM

TRAINABLE_FILE = "trainable.json"
DEFAULT_RANK = 16
_FORMAT = "langppl-trainable"
_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_-]+")

_numbers = itertools.count()


class TrainableLM:
    """An LM with a LoRA adapter that can be fitted, for the strings and choices of a model.

    Made by `LM.trainable`. It stands where an LM does in an `LMString` or an `LMChoice`, whose
    probabilities are then those of the LM under this adapter. To everything else it is the LM
    itself: the weights and the tokenizer are shared, strings keep their tokens, and a guide of the
    LM may propose for a latent of the view.

    Until it is fitted (see `langppl.em`) its probabilities are the LM's own: LoRA begins at zero.

    Args:
        lm: the LM.
        label: its name.
        rank: of the LoRA adapter.
        alpha: LoRA's scale.
        seed: of the adapter's first weights.

    Attributes:
        lm: the LM.
        label: its name.
        adapter: name of the adapter on the LM.

    Raises:
        ValueError: if the name is not made of letters, digits, "_" and "-", or the rank is below 1.
    """

    def __init__(self, lm: LM, label: str, rank: int, alpha: int, seed: int) -> None:
        if not isinstance(label, str) or not _NAME.fullmatch(label):
            raise ValueError(
                f'a trainable\'s name is made of letters, digits, "_" and "-", got {label!r}'
            )
        rank, alpha = as_count("rank", rank, 1), as_count("alpha", alpha, 1)
        self.lm = lm
        self.label = label
        self.adapter = f"trainable-{label}"
        self.options = {"rank": rank, "alpha": alpha, "seed": as_seed(seed)}
        self._add()

    @alone
    def _add(self) -> None:
        from peft import LoraConfig

        config = LoraConfig(
            r=self.options["rank"],
            lora_alpha=self.options["alpha"],
            target_modules="all-linear",
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.lm.name,
            revision=self.lm.revision,
        )
        with seeded(self.options["seed"]):
            self.lm.add_adapter(self.adapter, config)

    @property
    def name(self) -> str:
        """The LM's name and its own."""
        return f"{self.lm.name}+{self.label}"

    def __repr__(self) -> str:
        """Short, for prompts and error messages."""
        return f"TrainableLM({self.name!r})"

    @property
    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's weights by the names that they have without the adapter's, as they are now.

        They are others after `load` and `reset`.
        """
        mark = f".{self.adapter}."
        return {
            n.replace(mark, "."): p
            for n, p in self.lm.model.named_parameters()
            if mark in n and ".lora_" in n
        }

    def reset(self) -> None:
        """Puts the adapter back to its first weights, under which it is the LM itself."""
        self.lm.remove_adapter(self.adapter)
        self._add()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a standard PEFT adapter folder (safetensors), and beside it `trainable.json`.

        Raises:
            OSError: if the folder cannot be written to, or the disk is full; names the folder. A
                view that was there stays then.
        """
        files = self.lm.adapter_files(self.adapter)
        packages = ("langppl", "torch", "transformers", "peft")
        record = {
            "format": _FORMAT,
            "version": _VERSION,
            "label": self.label,
            "base_model": self.lm.name,
            "base_fingerprint": self.lm.weights_fingerprint,
            "versions": {p: importlib.metadata.version(p) for p in packages},
            # By which a saving that was cut off between two files is noticed.
            "sha256": {adapters.WEIGHTS: digest(files[adapters.WEIGHTS])},
        }
        text = json.dumps(record, indent=2) + "\n"
        write_folder(Path(folder).expanduser(), {**files, TRAINABLE_FILE: text}, "trainable view")

    def load(self, folder: str | os.PathLike[str]) -> TrainableLM:
        """Takes the weights of a folder that `save` wrote, or of any plain LoRA folder of PEFT's.

        Rank and scale are then the folder's. If that fails, the adapter is what it was.

        Args:
            folder: where it was saved.

        Returns:
            The view itself.

        Raises:
            ValueError: if a file is missing or corrupt, the adapter does not fit the LM, or
                `trainable.json` says that it was fitted on another LM.
        """
        path = Path(folder).expanduser() / TRAINABLE_FILE
        if path.is_file():
            self._check_base(path)
        # Tried under another name first: what fails to load must not cost the weights there are.
        trial = f"trial{next(_numbers)}"
        self.lm.load_adapter(trial, folder)
        self.lm.remove_adapter(trial)
        self.lm.remove_adapter(self.adapter)
        self.lm.load_adapter(self.adapter, folder)
        config = self.lm.model.peft_config[self.adapter]
        self.options.update(rank=config.r, alpha=config.lora_alpha)
        return self

    def _check_base(self, path: Path) -> None:
        record = read_json(path)
        check_format(path, record, _FORMAT, _VERSION)
        base, fingerprint = record.get("base_model"), record.get("base_fingerprint")
        if not isinstance(fingerprint, str):
            raise ValueError(f"{shown(path)} is corrupt: its base_fingerprint is {fingerprint!r}")
        if not self.lm.has_weights(fingerprint):
            raise ValueError(
                f"the adapter in {path.parent} was fitted on {base!r} (fingerprint {fingerprint}), "
                f"and {self.lm!r} has other weights (fingerprint {self.lm.weights_fingerprint})"
            )
        check_digests(path.parent, record.get("sha256"), [adapters.WEIGHTS])


def get_trainable(
    known: dict[str, TrainableLM],
    lm: LM,
    label: str,
    rank: int | None,
    alpha: int | None,
    seed: int | None,
) -> TrainableLM:
    """The view of that name: the one there is, else a new one; see `LM.trainable`."""
    asked = {"rank": rank, "alpha": alpha, "seed": seed}
    own = known.get(label) if isinstance(label, str) else None
    if own is not None and own.adapter in adapters.names(lm.model):
        other = {k: v for k, v in asked.items() if v is not None and v != own.options[k]}
        if other:
            raise ValueError(
                f"{lm!r} has a trainable {label!r} already, made with {own.options}; asked for "
                f"with {other} it would be another: give it another name"
            )
        return own
    rank = DEFAULT_RANK if rank is None else rank
    made = TrainableLM(lm, label, rank, rank if alpha is None else alpha, seed or 0)
    known[label] = made
    return made


def split(lm: Any) -> tuple[LM, str | None]:
    """An LM, or a view of one, as the LM and the name of the adapter that it answers under."""
    if isinstance(lm, TrainableLM):
        return lm.lm, lm.adapter
    check_lm(lm)
    return lm, None


def check_lm(lm: Any) -> None:
    """Raises TypeError for what is no LM, such as the name of one."""
    if isinstance(lm, type) or not hasattr(lm, "encode_prompt"):
        mend = f"; write LM({lm!r})" if isinstance(lm, str) else ""
        if isinstance(lm, type):
            mend = f"; give an instance: {lm.__name__}(name)"
        raise TypeError(f"lm must be a langppl.LM, got {lm!r}{mend}")
