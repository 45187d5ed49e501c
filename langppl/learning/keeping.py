"""Rounds that survive being killed: the folder that `em` goes on from."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from langppl.guides import GFlowNetGuide, Guide, History, RewardSchedule, checkpoints
from langppl.guides.checkpoints import plain
from langppl.guides.heads import specification_of
from langppl.guides.identity import of_guidance
from langppl.inference.methods import infer
from langppl.inference.settings import options_in_words
from langppl.learning.maximiser import Maximiser
from langppl.learning.settings import Settings
from langppl.lm import LM
from langppl.lm.counts import as_count
from langppl.program import Program
from langppl.program.arguments import pairs_of

_NO_SETTINGS = ("callback", "tensorboard", "validation")
"""Options that watch a guide's training, and its data, which are compared apart."""


_OF_GUIDE = re.compile(r"guide-\d+")


@dataclasses.dataclass(frozen=True)
class _OfGuide:
    """What a run's checkpoint has of its guide, but tensors."""

    heads: dict[str, int]
    history: History
    learned: set[str]
    flows: set[str]


class Keeper:
    """Writes rounds, and reads the last one.

    A round is written as a whole (`langppl.guides.checkpoints`); within it, a GFlowNet guide's
    training has a folder of its own. All random numbers depend on the seed and the round alone.

    Args:
        folder: where, None for nowhere.
        maximiser: whose weights are kept.
        guide: kept too if it is a `GFlowNetGuide`.
        lms: the LMs that the model stands on.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        maximiser: Maximiser,
        guide: Guide | None,
        lms: Sequence[LM],
    ) -> None:
        self.folder = None if folder is None else checkpoints.place(folder)
        self.maximiser = maximiser
        self.guide = guide if isinstance(guide, GFlowNetGuide) else None
        self.guide_name = None if guide is None else guide.name
        self.lms = lms
        self._claim: checkpoints.Claim | None = None
        self.has_begun = False
        """Whether `resume` found what an earlier run has written."""

    def of_guide(self, number: int) -> Path | None:
        """Where the guide's training of a round is written."""
        return None if self.folder is None else self.folder / f"guide-{number}"

    def described(
        self,
        settings: Settings,
        seed: int,
        fitting: Mapping[str, Any] | None,
        programs: Sequence[Program],
        held_out: Sequence[Program],
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """All that two runs must have in common for one to go on with the other."""
        rows, validation = ([_row_of(p) for p in own] for own in (programs, held_out))
        more: dict[str, Any] = {}
        if words := options_in_words(options, infer):
            more["options of the method"] = words
        guide = self.guide
        if guide is not None:
            config = guide.lm.model.peft_config[guide.adapter]
            more["guide's settings"] = [guide.objective, guide.seed, guide.defensive]
            more["guide's adapter"] = [config.r, config.lora_alpha]
            more["context"] = checkpoints.name_of(guide.context)
            if guide.guidance is not None:
                more["guidance"] = of_guidance(guide.guidance)
            more["numeric"] = plain(guide.numeric)
        shown = {k: _shown(v) for k, v in (fitting or {}).items() if k not in _NO_SETTINGS}
        if (fitting or {}).get("validation") is not None:
            shown["validation"] = checkpoints.digest(_rows_of((fitting or {})["validation"]))
        content = {
            **dataclasses.asdict(settings),
            "seed": seed,
            "guide": self.guide_name,
            "fit": repr(sorted(shown.items())),
            "base": [lm.weights_fingerprint for lm in self.lms],
            "data": checkpoints.digest(rows),
            "validation": checkpoints.digest(validation),
            "model": checkpoints.digest(checkpoints.form_of(programs[0])),
            "views": {v.label: v.options for v in self.maximiser.views.values()},
            **more,
            "tensors": {n: list(p.shape) for n, p in self.maximiser.named.items()},
        }
        found: dict[str, Any] = json.loads(json.dumps(content))
        return found

    def write(self, done: int, history: History, described: Mapping[str, Any]) -> None:
        """Writes the state after so many rounds.

        Raises:
            OSError: if the folder cannot be written to.
        """
        if self.folder is None:
            return
        self._forget_scores()
        tensors = checkpoints.state_of(self.maximiser.named, self.maximiser.optimiser)
        record: dict[str, Any] = {
            "settings": described,
            "history": dict(history),
            "steps": self.maximiser.done,
        }
        guide = self.guide
        if guide is not None:
            tensors.update({f"guide {n}": p.detach() for n, p in _adapter_of(guide).items()})
            tensors.update({f"heads {n}": t for n, t in guide.heads.state_dict().items()})
            record["guide"] = {
                "heads": guide.heads.specification,
                "history": dict(guide.history),
                "learned": sorted(guide.learned),
                "flows": sorted(guide.flows),
            }
        checkpoints.write(self.folder, done, record, tensors)
        for other in self.folder.glob("guide-*"):
            # Others of such a name are the user's, as is what they put into these.
            if _OF_GUIDE.fullmatch(other.name) and not other.is_symlink():
                checkpoints.clear(other)

    def resume(self, described: Mapping[str, Any]) -> History:
        """Reads the newest checkpoint, if there is one; returns the history so far.

        Raises:
            ValueError: if it is of another run, or damaged; nothing has changed then.
            OSError: if another run is writing to the folder.
        """
        if self.folder is None:
            return History()
        self._claim = checkpoints.Claim(self.folder)
        found = checkpoints.read(self.folder)
        self._forget_scores()
        if found is None:
            return History()
        step, record, tensors = found
        checkpoints.check_whole(self.folder, record, ("settings", "history", "steps"))
        checkpoints.check_same(self.folder, record["settings"], described, "run")
        with checkpoints.checking(self.folder, "run"):
            history, own = self._check(step, record, tensors)
        self.has_begun = True
        checkpoints.restore(self.maximiser.named, self.maximiser.optimiser, tensors)
        self.maximiser.done = record["steps"]
        if self.guide is not None and own is not None:
            self._restore_guide(self.guide, own, tensors)
        return history

    def close(self) -> None:
        """Leaves the folder to others."""
        if self._claim is not None:
            self._claim.release()

    def _check(
        self, step: int, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> tuple[History, _OfGuide | None]:
        """Checks all that a resumed run takes over; returns the histories and what is a guide's.

        Raises:
            Exception: of the kinds that `checkpoints.checking` knows, if something cannot be so.
        """
        as_count("steps", record["steps"], 0)
        history = History(record["history"])
        if history.rows != step or step > record["settings"]["rounds"] + 1:
            raise ValueError(f"its history has {history.rows} rounds after round {step}")
        own: _OfGuide | None = None
        more: dict[str, torch.Tensor] = {}
        if self.guide is not None:
            found = record["guide"]
            names = (found["learned"], found.get("flows", []))
            if not all(isinstance(n, list) and all(isinstance(s, str) for s in n) for n in names):
                raise ValueError(f"the guide's latents must be lists of names, got {names!r}")
            own = _OfGuide(
                specification_of(found["heads"]),
                History(found["history"]),
                set(names[0]),
                set(names[1]),
            )
            more = {f"guide {n}": p for n, p in _adapter_of(self.guide).items()}
            heads = self.guide.heads.expected(own.heads)
            more |= {f"heads {n}": t for n, t in heads.items()}
        checkpoints.check_tensors(tensors, self.maximiser.named, more)
        return history, own

    def _restore_guide(
        self, guide: GFlowNetGuide, own: _OfGuide, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        guide.heads.keep_only(own.heads)
        for name, count in own.heads.items():
            guide.heads.ensure(name, count)
        guide.heads.load_state_dict(
            {n.removeprefix("heads "): t for n, t in tensors.items() if n.startswith("heads ")}
        )
        guide.heads.to(guide.lm.device)
        with torch.no_grad():
            for name, p in _adapter_of(guide).items():
                p.copy_(tensors[f"guide {name}"])
        guide.history = own.history
        guide.learned = own.learned
        guide.flows = own.flows

    def _forget_scores(self) -> None:
        # A resumed run remembers no scores, and a batch's others move a score's last bits.
        for lm in self.lms:
            lm.memo.clear()


def _shown(value: Any) -> Any:
    """An option of the guide's training as it looks in every process."""
    return repr(value) if isinstance(value, RewardSchedule) else plain(value)


def _row_of(program: Program) -> Any:
    return plain((program.shown_args, {n: program.sites[n].value for n in program.observed}))


def _rows_of(validation: Any) -> list[Any]:
    """The guide's held-out data, (model, data) pairs, as they look in every process."""
    return [
        [_row_of(m)] if isinstance(m, Program) else [plain(m), plain(rows)]
        for m, rows in pairs_of(validation, None)
    ]


def _adapter_of(guide: GFlowNetGuide) -> dict[str, torch.nn.Parameter]:
    mark = f".{guide.adapter}."
    named = guide.lm.model.named_parameters()
    return {n.replace(mark, "."): p for n, p in named if mark in n}
