"""`GFlowNetGuide`: the LM with a LoRA adapter, trained so that its draws follow the posterior.

The policy reads a context made from the observations (see `langppl.guides.context`) and then
writes the latent, under the latent's own rules. It is trained until q(z | observations) is
proportional to the reward R(z), the program's joint density (Hu et al. 2024, arXiv 2310.04363).
What it proposes is weighted like any other guide's draws, and it can draw all that a site's rules
allow, so its training makes inference more or less efficient and not wrong. What it has come to
draw hardly ever is another matter: see `docs/guides.md`, what a guide has lost.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from langppl.distributions.sites import pattern
from langppl.guides import saved
from langppl.guides.base import Guide, Key, Scorer
from langppl.guides.context import ContextFunction, context_ids, default_context
from langppl.guides.data import (
    given_latents,
    held_out_rows,
    observations_in_a_step,
    rows_of,
    shares_of,
)
from langppl.guides.guidance import Guidance, Reader, check_guidance
from langppl.guides.heads import FLOW, HEADS_FILE, Heads
from langppl.guides.history import History
from langppl.guides.identity import of_adapter, of_function, of_guidance, of_tensors
from langppl.guides.keeping import Keeper
from langppl.guides.policy import GivenPolicy, Policy, Proposer
from langppl.guides.replay import REPLAYED, ReplayBuffer
from langppl.guides.schedules import RewardSchedule
from langppl.guides.settings import Objective, Settings, as_temperature, check_objective
from langppl.guides.training import Callback, Trainer
from langppl.guides.workers import Workers
from langppl.keywords import named, with_rows
from langppl.lm import adapters
from langppl.lm.counts import as_betas, as_count, as_part
from langppl.lm.files import write_folder
from langppl.lm.formats import check_digests, digest
from langppl.lm.model import LM
from langppl.lm.requests import Reading, StateReply, StateRequest, alone, perform
from langppl.lm.seeds import as_seed, seeded
from langppl.lm.trainable import TrainableLM, check_lm
from langppl.program import Program, compile
from langppl.program.arguments import pairs_of
from langppl.program.execution import Chooser, Execution
from langppl.program.lengths import check_lengths
from langppl.records import numbers

GUIDE_FILE = "guide.json"
_numbers = itertools.count()


class GFlowNetGuide(Guide):
    """An amortised posterior: draws from it are (nearly) posterior samples.

    Args:
        lm: the LM; latent strings under another LM are drawn from the prior. Those under a
            trainable view of it are the guide's to propose.
        context: makes what the policy reads before a latent; the default shows the observations
            that depend on it (see `langppl.guides.context.ContextInfo`).
        guidance: has the guide propose strings from the prior, changed by what the context shows
            (see `Guidance`); training changes what it makes of the context. None proposes after the
            context as it is.
        rank: of the LoRA adapter.
        alpha: LoRA's scale; the rank if None.
        objective: what it is trained with:

            - `"subtb"`, sub-trajectory balance. For programs with one latent string: over its
              prefixes, with the reward at each. For others: over their sites, with what is known
              of the reward by then and a learned flow for the rest.
            - `"db"`, the same between neighbouring end points alone.
            - `"vargrad"`, trajectory balance with the batch's own log Z.
            - `"tb"`, with log Z learned by a head on the LM's state after the context.
            - `"auto"`: subtb for one latent string, vargrad otherwise.
            - `"forward_kl"`: maximum likelihood of latents and data drawn from the model itself;
              needs neither rewards nor posterior samples, but a program that can be simulated.
            - `"rao_blackwell"`: policy gradient on the ELBO, the divergence from the prior exact at
              each state; for strings whose prior is this guide's LM (see `docs/guides.md`).
            - others to compare with: `"reverse_kl"` (the same by log q − log p of the draws, as
              reinforcement learning with a KL penalty has it), `"reward"` (on the reward alone,
              which collapses onto a mode), `"rws"` (reweighted wake-sleep) and `"mle"` (maximum
              likelihood of given latents).

            See `langppl.guides.objectives`. `fit` may take another than this.
        numeric: what proposes numeric latents: `"head"`, a small network on the LM's state (Beta,
            Gamma, Normal and Categorical sites; others from the prior), `"prior"`, or a Pyro guide,
            a function of the model's arguments. A Pyro guide is used as it is, not trained.
        defensive: share of the proposals for each latent that inference draws from the prior
            instead (a defensive mixture, Hesterberg 1995). It bounds the weights by the likelihood
            over this share, once for each latent, so that what the guide has lost cannot spoil the
            evidence; the ELBO falls a little. Training and `sample` are without it, and
            `method="smc"`, which follows a single law token by token, does not take it.
        seed: of the adapter's initial weights and of all random numbers of training.

    Attributes:
        defensive: as above; may be changed at any time.
        history: what training reported, see `History`; `log_reward`, `elbo` and `impossible` are
            of the guide's own draws, NaN at steps that have none.
        heads: the small networks (see `langppl.guides.heads`).
        learned: the latents that it was trained on, by name, with "#" for numbers.
        flows: those before which a flow was learned, by `subtb` or `db` over sites.
        was_interrupted: whether the last training was ended by Ctrl-C.

    Raises:
        ValueError: for an unknown objective or `numeric`, or a number out of its range.
        TypeError: for what is no `LM` (such as a trainable view of one), context or guidance.

    Example:
        >>> guide = GFlowNetGuide(lm)
        >>> guide.fit(story, data=[pair], steps=2)  # two show how; hundreds teach
        GFlowNetGuide(LM('tiny-1'), 2 steps on middle)
    """

    name = "gflownet"

    @alone
    def __init__(
        self,
        lm: LM,
        *,
        context: ContextFunction | None = None,
        guidance: Guidance | None = None,
        rank: int = 16,
        alpha: int | None = None,
        objective: Objective = "auto",
        numeric: Literal["head", "prior"] | Callable[..., Any] = "head",
        defensive: float = 0.0,
        seed: int = 0,
    ) -> None:
        from peft import LoraConfig

        check_objective(objective)
        seed = as_seed(seed)
        if isinstance(lm, TrainableLM):
            raise TypeError(
                f"a guide has an adapter of its own: make it for the LM, not for its view {lm!r}; "
                "it proposes for latents of the view too"
            )
        check_lm(lm)
        if context is not None and not callable(context):
            raise TypeError(f"context must be a function of a ContextInfo, got {context!r}")
        check_guidance(guidance)
        if not callable(numeric) and numeric not in ("head", "prior"):
            raise ValueError(f'numeric must be "head", "prior" or a Pyro guide, got {numeric!r}')
        rank = as_count("rank", rank, 1)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else as_count("alpha", alpha, 1),
            target_modules="all-linear",
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
            base_model_name_or_path=lm.name,
            revision=lm.revision,
        )
        self._setup(lm, context, guidance, objective, numeric, seed)
        self.defensive = defensive
        with seeded(seed):
            lm.add_adapter(self.adapter, config)

    # What is made in inference mode can never be trained.
    @torch.inference_mode(False)
    def _setup(
        self,
        lm: LM,
        context: ContextFunction | None,
        guidance: Guidance | None,
        objective: str,
        numeric: Any,
        seed: int,
    ) -> None:
        self.lm = lm
        self.context = context or default_context
        self.guidance = guidance
        self.objective = objective
        self.numeric = numeric
        self._told: set[str] = set()
        self.seed = seed
        self._defensive = 0.0
        # An LM that was pickled in another process has the names of that one.
        taken = adapters.names(lm.model)
        self.adapter = next(n for n in map("guide{}".format, _numbers) if n not in taken)
        self.heads = Heads(lm.state_width, seed)
        self.history = History()
        self.learned: set[str] = set()
        self.flows: set[str] = set()
        self.was_interrupted = False
        weakref.finalize(self, lm.abandon_adapter, self.adapter)

    def __repr__(self) -> str:
        """The LM, what was learned and for how long."""
        learned = ", ".join(sorted(self.learned))
        said = f"{self.history.rows} steps on {learned}" if learned else "untrained"
        return f"GFlowNetGuide({self.lm!r}, {said})"

    def identity(self) -> str:
        """See `Guide.identity`; of what it proposes with, not of what it learned that by."""
        own = f"{self.name} {of_adapter(self.lm, self.adapter)}"
        if type(self) is not GFlowNetGuide:
            own = f"{super().identity()} {own}"
        if self.context is not default_context:
            own += f" context {of_function(self.context)}"
        if self.guidance is not None:
            own += f" {of_guidance(self.guidance)}"
        if self._defensive:
            own += f" defensive {self._defensive!r}"
        if callable(self.numeric):
            own += f" numeric {of_function(self.numeric)}"
        elif self.numeric == "head" and set(self.heads.made) - {FLOW}:
            own += f" heads {of_tensors(self.heads.state_dict())}"
        return own

    @property
    def proposer(self) -> Proposer:
        """What it proposes with."""
        return Proposer(
            self.lm,
            self.adapter,
            Reader(self.context, self.guidance),
            None if self.numeric == "prior" else self.heads,
            self.numeric if callable(self.numeric) else None,
            self._told,
        )

    @property
    def defensive(self) -> float:
        """Share of the prior in what inference proposes, at least 0 and below 1."""
        return self._defensive

    @defensive.setter
    def defensive(self, share: float) -> None:
        self._defensive = as_part("defensive", share)

    @property
    def is_sequential(self) -> bool:  # type: ignore[override]
        """See `Guide`; a string with a share of the prior comes from one of two laws."""
        return not self._defensive

    def sites_of(self, program: Program) -> set[str]:
        """The latents of a program that this guide covers, by name, with "#" for numbers."""
        covers = self.proposer.covers
        return {pattern(n) for n in program.latents if covers(program.sites[n].fn)}

    def check_lm(self, program: Program) -> None:
        """Raises ValueError if the guide's LM draws none of the program's latent strings."""
        strings = {n: program.sites[n] for n in program.latents if program.sites[n].is_string}
        if strings and not any(s.fn.lm is self.lm for s in strings.values()):
            name, site = next(iter(strings.items()))
            other = repr(site.fn.lm)
            if other == repr(self.lm):
                other = "another LM object of that name"
            raise ValueError(
                f"this guide was made for {self.lm!r}, but latent {name!r} is under {other}; "
                "make a guide for that LM (or use the same LM object)"
            )

    def check(self, program: Program) -> None:
        """See `Guide.check`.

        Raises:
            ValueError: if the guide's LM draws none of the program's latent strings, or the guide
                was trained on latents of other names.
        """
        self.check_lm(program)
        unknown = sorted(self.sites_of(program) - self.learned)
        if self.learned and unknown:
            raise ValueError(
                f"this guide was trained on the latents {', '.join(sorted(self.learned))} and "
                f"knows nothing of {', '.join(unknown)}; train it on this program, or name the "
                "latents as they were"
            )

    def chooser(self, program: Program, key: Key) -> Chooser:
        """See `Guide.chooser`."""
        return Policy(self.proposer, program, key, defensive=self.defensive)

    def given(self, program: Program, values: Mapping[str, Any]) -> Chooser:
        """See `Guide.given`.

        Raises:
            ValueError: when run, if a Pyro guide draws something that is no given latent.
        """
        return GivenPolicy(self.proposer, program, values, self.defensive)

    def scorer(self, program: Program, key: Key) -> Scorer:
        """See `Guide.scorer`."""
        return Policy(self.proposer, program, key, defensive=self.defensive).log_q

    def reads(
        self, program: Program, name: str, fn: Any, execution: Execution
    ) -> tuple[Reading | None, str | None]:
        """See `Guide.reads`; without the share of the prior that `defensive` mixes in."""
        own = self.proposer
        if not own.covers(fn):
            return None, None
        return own.reader.reading(program, name, fn, execution, own.lm), own.adapter

    def log_flow(self, program: Program, name: str, fn: Any, execution: Execution) -> float | None:
        """See `Guide.log_flow`."""
        own = self.proposer
        if pattern(name) not in self.flows or not own.covers(fn):
            return None
        # What it learned reads the context itself, guidance or none.
        prompt = context_ids(program, name, fn, execution, self.context, own.lm)
        (reply,) = perform([StateRequest(own.lm, prompt, own.adapter)])
        assert isinstance(reply, StateReply)
        with torch.no_grad():
            return float(self.heads.flow(torch.from_numpy(reply.state)))

    # -- training -----------------------------------------------------------------------------

    @with_rows
    @named
    def fit(
        self,
        model: Callable[..., Any] | Program | Sequence[Any],
        data: Any = None,
        *,
        steps: int = 60,
        observations: int | None = None,
        batch: int = 16,
        objective: Objective | None = None,
        learning_rate: float = 1e-3,
        head_rate: float = 10.0,
        betas: Sequence[float] = (0.9, 0.999),
        warmup: int = 5,
        clip: float = 1.0,
        lam: float = 1.0,
        schedule: RewardSchedule | None = None,
        tempered_share: float = 0.125,
        sampling_temperature: float | Sequence[float] = 1.2,
        replay_share: float = 0.25,
        replay_size: int = 256,
        replay_distance: float = 0.1,
        draw_ahead: int = 1,
        every: int = 1,
        given: Any = (),
        given_share: float = 1.0,
        simulated_share: float = 0.0,
        lengths: Mapping[str, int] | None = None,
        weights: Sequence[float] | None = None,
        validation: Any = None,
        validate_every: int = 50,
        validation_samples: int = 16,
        patience: int | None = None,
        keep_best: bool = True,
        average: float = 0.0,
        accumulate: int = 1,
        accelerator: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 10,
        tensorboard: str | os.PathLike[str] | None = None,
        callback: Callback | None = None,
        progress: bool = True,
    ) -> GFlowNetGuide:
        """Trains the adapter; called again, it goes on with the weights that it has.

        The history and the order in which rows are taken go on too. The optimiser, the replay
        buffers, the warm-up of the learning rate and the reward schedule begin anew; a second
        training has no use for tempering as a rule: `schedule=RewardSchedule(start=1.0)`.

        The arguments come in groups: what is learned from (`model`, `data`); how long, on how much
        and by what (`steps` to `objective`); the optimiser (`learning_rate` to `clip`); the loss
        (`lam`, `schedule`); where the guide's own draws come from (`tempered_share` to `every`);
        what else is learned from, and how often (`given` to `weights`); when it ends, and with
        which weights (`validation` to `average`); machines (`accumulate`, `accelerator`); and what
        is written and told meanwhile (`checkpoint` to `progress`).

        Args:
            model: a model function, a compiled `Program` (then without data), or, for a guide that
                several programs share, a list of programs and of (model, data) pairs.
            data: the observations, each a tuple of the model's arguments or a mapping from their
                names: a sequence, another iterable, a `Dataset` of torch or Hugging Face, or a
                `DataFrame`. A program is compiled when its observation is first taken.
            steps: gradient steps.
            observations: how many observations a step takes, all in one packed pass; 4, or all if
                there are fewer, if None. Each counts as much as the others: it is taken as often,
                in an order of its own for every round, or, where their number is no multiple of
                this, nearly as often, with a weight that makes up for it.
            batch: trajectories of each observation in a step, at least 2.
            objective: another than the guide's own, as for a warm start with `"forward_kl"`.
            learning_rate: AdamW's highest; after the warm-up it falls towards a tenth (cosine).
            head_rate: factor on it for the heads.
            betas: AdamW's; training of few steps gains from a shorter memory, such as (0.8, 0.95),
                which forgets the large gradients of the beginning.
            warmup: steps over which the learning rate rises.
            clip: largest norm of the gradient, of the adapter and of the heads each.
            lam: SubTB's λ.
            schedule: how much of the reward counts when. None for `RewardSchedule()`: a power of
                0.5 at the first step, rising to 1 over the first 30 % of the steps.
            tempered_share: share of the batch drawn at `sampling_temperature`. For `reverse_kl`,
                `rao_blackwell`, `reward` and `rws`, which hold for the policy's own draws alone,
                this and `replay_share` are 0 and `draw_ahead` is 1, whatever is given here.
            sampling_temperature: divides the policy's logits for those draws; a range (low, high)
                to draw one for each (log-uniformly).
            replay_share: share of the batch taken from the draws so far, in proportion to their
                importance weights; at least two of the others are new.
            replay_size: how many of those are kept for each observation; where there are many
                rows no more than 16,384 // rows, or `batch` if that is more; then the rows that
                were not taken for longest lose theirs, so that all have 16,384 together.
            replay_distance: two of them differ in more than this share of their tokens (edit
                distance over the longer one's length); 0 to refuse equal ones alone.
            draw_ahead: for how many steps to draw at once: large batches are drawn faster, and
                their last draws are a few steps off-policy.
            every: for SubTB, take the reward at prefixes of a multiple of so many tokens only,
                which is cheaper; the whole string always counts.
            given: latents (site → value) to learn from, in the place of the guide's own draws: a
                list or a posterior of a single observation; of several, a list of such, one for
                each; none if it is empty or None. A posterior's log joints are not computed anew
                where they suffice. With
                `mle` they are all that is learned from, as often as there are steps; those of a
                posterior count by their weights.
            given_share: share of a batch's new draws that are given ones, while these last. With
                1 the guide learns from them first; a small share spreads them over the training.
            simulated_share: share of the batch that are latents and data drawn from the model,
                learned by maximum likelihood beside the objective; two of the others must be left
                (one under `mle`).
            lengths: tokens of each open string that is simulated; as long as what is observed by
                default.
            weights: for several programs, how often each is taken, relative to the others; needs
                at least two rows of data for each of the `observations` of a step.
            validation: held-out observations, given as `model` and `data` are: a sequence of
                arguments, or of (model, data) pairs.
            validate_every: steps between two validations; the last step is followed by one too.
            validation_samples: draws for each of them.
            patience: validations without a better ELBO after which training ends; None for never.
            keep_best: whether the guide ends with the weights of the best validation.
            average: share of the steps, the last ones, whose weights' mean the guide ends with, in
                the place of the best or the last: less noise where steps are few and large. 0 for
                none, and a training that ends before them has none.
            accumulate: backward passes over which the observations of a step are spread: less
                memory, the same gradient.
            accelerator: accelerate's `Accelerator`; made if None under `accelerate launch`. It says
                which process this is and adds gradients up; of its own settings, mixed precision
                and gradient accumulation have no effect, with a warning.
            checkpoint: a folder to which the state of the training is written every so many
                steps. Called again with the same arguments, on a guide made like this one, `fit`
                goes on from there; on the CPU the result is, bit for bit, that of a run which was
                never killed.
            checkpoint_every: steps from one such writing to the next.
            tensorboard: a folder for TensorBoard's scalars.
            callback: called after each step with its row of the history, as for another logger; if
                it returns True, the training ends there, also for a checkpoint that is gone on
                with. Under `accelerate` each process calls its own, and they must agree.
            progress: whether to show a bar, on a terminal or in a notebook; elsewhere the logger
                `langppl` gets a line every ten seconds.

        Returns:
            The guide itself. Interrupted (Ctrl-C), it keeps what it has learned.

        Raises:
            ValueError: for empty data, a program without a latent of this guide's, given latents
                that do not belong to the observations, a given posterior of another program,
                a setting out of range, a length of what is no open string, or an accelerator on
                another device than the LM's.
            TypeError: for data that do not fit the model, or a schedule that is none.
            FloatingPointError: if a loss or reward is NaN, or a reward infinite; names the step and
                the site. If a gradient is not finite; names the step.
            OSError: if a checkpoint cannot be written, or the disk has no room for two, before the
                first step.
            torch.OutOfMemoryError: if memory does not suffice for the smallest passes; before
                that the LM's token budgets are halved, with one warning.
        """
        objective = self.objective if objective is None else objective
        check_objective(objective)
        if schedule is not None and not isinstance(schedule, RewardSchedule):
            raise TypeError(f"schedule must be a RewardSchedule, got {schedule!r}")
        pairs = pairs_of(model, data)
        rows = [row for _, own in pairs for row in own]
        workers = Workers(accelerator)
        workers.check(self.lm.device)
        settings = Settings(
            steps=steps,
            batch=batch,
            observations=(
                observations_in_a_step(len(rows), weights) if observations is None else observations
            ),
            objective=objective,
            learning_rate=learning_rate,
            head_rate=head_rate,
            betas=as_betas(betas),
            warmup=warmup,
            clip=clip,
            lam=lam,
            schedule=schedule or RewardSchedule(),
            tempered_share=tempered_share,
            sampling_temperature=as_temperature(sampling_temperature),
            replay_share=replay_share,
            replay_size=replay_size,
            replay_distance=replay_distance,
            draw_ahead=draw_ahead,
            every=every,
            given_share=given_share,
            simulated_share=simulated_share,
            lengths=lengths,
            validate_every=validate_every,
            validation_samples=validation_samples,
            patience=patience,
            keep_best=keep_best,
            average=average,
            accumulate=accumulate,
            checkpoint_every=checkpoint_every,
        ).as_used()
        if min(settings.observations, len(rows)) < workers.count:
            raise ValueError(
                f"each of the {workers.count} processes needs an observation in every step, got "
                f"observations={settings.observations} of {len(rows)}"
            )
        if weights is not None and len(rows) < 2 * settings.observations:
            raise ValueError(
                f"weights need at least two rows for each of observations={settings.observations}, "
                f"got {len(rows)} rows; take fewer observations in a step"
            )
        latents = given_latents(given, objective, len(rows))
        if settings.lengths:
            firsts = [m if isinstance(m, Program) else compile(m, *own[0]) for m, own in pairs]
            check_lengths(firsts, settings.lengths, loosely=len(rows) > len(pairs))
        capacity = min(settings.replay_size, max(settings.batch, REPLAYED // len(rows)))
        prepared = rows_of(pairs, lambda: ReplayBuffer(capacity, settings.replay_distance), latents)
        if patience is not None and validation is None:
            raise ValueError(f"patience={patience} counts validations, and validation is None")
        held_out = held_out_rows(pairs, validation)
        trainer = Trainer(self, prepared, shares_of(pairs, weights), settings, workers, held_out)
        trainer.run(Keeper(checkpoint, tensorboard, workers.is_first), progress, callback)
        return self

    # -- using --------------------------------------------------------------------------------

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `Guide.remarks`."""
        if self.learned:
            return ()
        return ("the guide is untrained, so it draws as the prompted LM does; fit it first",)

    def _raw_chooser(self, program: Program, key: Key) -> Chooser:
        return Policy(self.proposer, program, key)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a standard PEFT adapter folder, and beside it `guide.json` and the heads.

        A context function, that of a guidance or a Pyro guide is code and is not saved: give it
        again to `load`.

        Raises:
            OSError: if the folder cannot be written to, or the disk is full; names the folder. A
                guide that was there stays then.
        """
        files = {**self.lm.adapter_files(self.adapter), HEADS_FILE: self.heads.packed()}
        packages = ("langppl", "torch", "transformers", "peft")
        without = None if self.guidance is None else self.guidance.without
        record = {
            "format": saved.FORMAT,
            "version": saved.VERSION,
            "base_model": self.lm.name,
            "base_fingerprint": self.lm.weights_fingerprint,
            "objective": self.objective,
            "context": saved.name_of(self.context),
            "default_context": self.context is default_context,
            "guidance": None if self.guidance is None else self.guidance.scale,
            "without": saved.name_of(without) if without is not None else None,
            "numeric": self.numeric if isinstance(self.numeric, str) else "pyro",
            "sites": sorted(self.learned),
            "flows": sorted(self.flows),
            "heads": self.heads.specification,
            "defensive": self.defensive,
            "seed": self.seed,
            "steps": self.history.rows,
            "history": {figure: numbers(values) for figure, values in self.history.items()},
            "versions": {p: importlib.metadata.version(p) for p in packages},
            # By which a saving that was cut off between two files is noticed.
            "sha256": {
                name: digest(content)
                for name, content in files.items()
                if content is not None and name in (adapters.WEIGHTS, HEADS_FILE)
            },
        }
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        write_folder(Path(folder).expanduser(), {**files, GUIDE_FILE: text}, "guide")

    @classmethod
    @torch.inference_mode(False)
    def load(
        cls,
        folder: str | os.PathLike[str],
        lm: LM,
        *,
        context: ContextFunction | None = None,
        without: ContextFunction | None = None,
        numeric: Callable[..., Any] | None = None,
    ) -> GFlowNetGuide:
        """Reads a guide that `save` wrote.

        Args:
            folder: where it was saved.
            lm: the LM that it was trained on.
            context: the context function, if the guide was made with one; langppl's own are found
                by themselves. One of another name than it was trained with is a warning.
            without: the function of its guidance, if that had one of its own; likewise.
            numeric: the Pyro guide of numeric latents, if it was made with one.

        Returns:
            The guide, which goes on with its history where it is trained further.

        Raises:
            ValueError: if a file is missing or corrupt, the guide was trained on another LM, or
                a function of its own or its Pyro guide is missing.
            TypeError: for a folder that is no path, or an LM that is none.
        """
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"the folder comes first, load(folder, lm), got {folder!r}")
        check_lm(lm)
        path = Path(folder).expanduser() / GUIDE_FILE
        if not path.is_file():
            raise ValueError(f"{folder} is no guide folder: {GUIDE_FILE} is missing")
        own = saved.read(path)
        if not lm.has_weights(own.fingerprint):
            raise ValueError(
                f"the guide in {folder} was trained on {own.base!r} (fingerprint "
                f"{own.fingerprint}), and {lm!r} has other weights (fingerprint "
                f"{lm.weights_fingerprint})"
            )
        used = (adapters.WEIGHTS, *([HEADS_FILE] if own.heads else []))
        check_digests(path.parent, own.digests, used)
        context = saved.context_of(folder, own.context, own.is_default, context)
        guidance = saved.guidance_of(path, own.scale, own.without, without)
        if own.numeric == "pyro" and numeric is None:
            raise ValueError(
                f"the guide in {folder} was made with a Pyro guide for numbers; give it to load"
            )
        self = cls.__new__(cls)
        how_numbers = own.numeric if numeric is None else numeric
        self._setup(lm, context, guidance, own.objective, how_numbers, own.seed)
        self.defensive = own.defensive
        self.history = own.history
        self.learned, self.flows = own.learned, own.flows
        self.heads.load(folder, own.heads)
        self.heads.to(lm.device)
        lm.load_adapter(self.adapter, folder)
        return self
