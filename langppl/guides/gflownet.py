"""`GFlowNetGuide`: the LM with a LoRA adapter, trained so that its draws follow the posterior.

The policy reads a context made from the observations (see `langppl.guides.context`) and then
writes the latent, under the latent's own rules. It is trained until q(z | observations) is
proportional to the reward R(z), the program's joint density (Hu et al. 2024, arXiv 2310.04363).
What it proposes is weighted like any other guide's draws, so its training can only make inference
more or less efficient, never wrong.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from langppl.distributions import LMChoice, LMString
from langppl.guides import checkpoints, objectives
from langppl.guides.base import Guide, Key
from langppl.guides.context import ContextFunction, context_ids, default_context
from langppl.guides.replay import ReplayBuffer
from langppl.guides.trajectories import (
    Draw,
    covered,
    from_records,
    log_q,
    make_draws,
    policy_scores,
    to_record,
    trajectory,
)
from langppl.lm.decoding import generator
from langppl.lm.model import LM
from langppl.lm.requests import ScoreReply, perform
from langppl.posterior import Posterior
from langppl.program import Program, compile
from langppl.program.execution import Choice, Chooser, Execution, draw_prior, mixed
from langppl.program.execution import given as given_values
from langppl.progress import bar

OBJECTIVES = ("auto", "subtb", "db", "vargrad", "reverse_kl", "reward", "rws", "mle")
WITH_PREFIXES = ("subtb", "db")
ON_POLICY = ("reverse_kl", "reward", "rws")
GUIDE_FILE = "guide.json"
LEAST_NODES = 16
"""Rows of fewer nodes are no remedy for a lack of memory."""

T = TypeVar("T")
_numbers = itertools.count()


@dataclass(frozen=True)
class RewardSchedule:
    """How much of the reward counts during training.

    The target is p(latents)·(the rest of the joint)^power: at power 0 the prior, where an untrained
    policy stands, at 1 the posterior.

    Attributes:
        start: power at the first step, between 0 and 1.
        until: share of the steps after which it is 1.
    """

    start: float = 0.5
    until: float = 0.3

    def power(self, step: int, steps: int) -> float:
        """The power at a step, counted from 0."""
        done = step / max(self.until * steps, 1.0)
        return min(1.0, self.start + (1.0 - self.start) * done)


class GFlowNetGuide(Guide):
    """An amortised posterior: draws from it are (nearly) posterior samples.

    Args:
        lm: the LM; latents under another LM are drawn from the prior.
        context: makes what the policy reads before a latent; the default shows the observations
            that depend on it (see `langppl.guides.context.ContextInfo`).
        rank: of the LoRA adapter.
        alpha: LoRA's scale; the rank if None.
        objective: `"subtb"` (sub-trajectory balance with the reward at every prefix; programs with
            one latent string), `"db"` (the same between neighbouring prefixes alone), `"vargrad"`
            (trajectory balance with the batch's own log Z), or `"auto"`: subtb where it can be,
            vargrad otherwise. Others to compare with: `"reverse_kl"` (policy gradient on the ELBO),
            `"reward"` (on the reward alone, which collapses onto a mode), `"rws"` (reweighted
            wake-sleep) and `"mle"` (maximum likelihood of given latents). See
            `langppl.guides.objectives`.
        defensive: share of the proposals for each latent that inference draws from the prior
            instead (a defensive mixture, Hesterberg 1995). It bounds the weights by the likelihood
            over this share, once for each latent, so that what the guide has lost cannot spoil the
            evidence; the ELBO falls a little. Training and `sample` are without it.
        seed: of the adapter's initial weights and of all random numbers of training.

    Attributes:
        defensive: as above; may be changed at any time.
        history: what training reported, one list for each figure; `log_reward`, `elbo` and
            `impossible` are of the guide's own draws, NaN at steps that have none.

    Example:
        >>> guide = GFlowNetGuide(lm)  # doctest: +SKIP
        >>> guide.fit(story, data=[("The cat was hungry.", " Now it sleeps.")])  # doctest: +SKIP
    """

    name = "gflownet"

    def __init__(
        self,
        lm: LM,
        *,
        context: ContextFunction | None = None,
        rank: int = 16,
        alpha: int | None = None,
        objective: str = "auto",
        defensive: float = 0.0,
        seed: int = 0,
    ) -> None:
        from peft import LoraConfig

        if objective not in OBJECTIVES:
            raise ValueError(
                f"unknown objective {objective!r}; objectives are: {', '.join(OBJECTIVES)}"
            )
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        config = LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,
            target_modules="all-linear",
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
            base_model_name_or_path=lm.name,
        )
        self._setup(lm, context, objective, seed)
        self.defensive = defensive
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lm.add_adapter(self.adapter, config)

    def _setup(self, lm: LM, context: ContextFunction | None, objective: str, seed: int) -> None:
        self.lm = lm
        self.context = context or default_context
        self.objective = objective
        self.seed = seed
        self._defensive = 0.0
        self.adapter = f"guide{next(_numbers)}"
        self.history: dict[str, list[float]] = {}
        self._latents: tuple[str, ...] | None = None
        weakref.finalize(self, _remove, lm, self.adapter)

    @property
    def defensive(self) -> float:
        """Share of the prior in what inference proposes, at least 0 and below 1."""
        return self._defensive

    @defensive.setter
    def defensive(self, share: float) -> None:
        if not 0.0 <= share < 1.0:
            raise ValueError(f"defensive must be at least 0 and below 1, got {share}")
        self._defensive = share

    def check(self, program: Program) -> None:
        """Raises ValueError if the guide's LM draws none of the program's latent strings."""
        strings = {n: program.sites[n] for n in program.latents if program.sites[n].is_string}
        if strings and not any(covered(s.fn, self.lm) for s in strings.values()):
            name, site = next(iter(strings.items()))
            raise ValueError(
                f"this guide was made for {self.lm!r}, but latent {name!r} is under "
                f"{site.fn.lm!r}; make a guide for that LM (or use the same LM object)"
            )

    def chooser(self, program: Program, key: Key) -> Chooser:
        """See `Guide.chooser`."""
        return _Policy(self, program, key, 1.0, defensive=self.defensive)

    # -- training -----------------------------------------------------------------------------

    def fit(
        self,
        model: Callable[..., Any] | Program,
        data: Sequence[Any] | None = None,
        *,
        steps: int = 60,
        batch: int = 16,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: int = 5,
        clip: float = 1.0,
        lam: float = 1.0,
        schedule: RewardSchedule | None = None,
        tempered_share: float = 0.125,
        sampling_temperature: float = 1.2,
        replay_share: float = 0.25,
        replay_size: int = 256,
        draw_ahead: int = 1,
        every: int = 1,
        given: Posterior | Sequence[Mapping[str, Any]] = (),
        given_share: float = 1.0,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 10,
        progress: bool = True,
    ) -> GFlowNetGuide:
        """Trains the adapter; called again, it goes on from where it was.

        Args:
            model: a model function, or a compiled `Program` (then without data).
            data: the observations, each a tuple of the model's arguments; steps take them in turn.
            steps: gradient steps.
            batch: trajectories of one observation in a step, at least 2.
            learning_rate: AdamW's highest; it falls to a tenth by the last step (cosine).
            betas: AdamW's; training of few steps gains from a shorter memory, such as (0.8, 0.95),
                which forgets the large gradients of the beginning.
            warmup: steps over which it rises.
            clip: largest norm of the gradient.
            lam: SubTB's λ.
            schedule: how much of the reward counts when.
            tempered_share: share of the batch drawn at `sampling_temperature`. For `reverse_kl`,
                `reward` and `rws`, which hold for the policy's own draws alone, this and
                `replay_share` are 0 and `draw_ahead` is 1, whatever is given here.
            sampling_temperature: divides the policy's logits for those draws.
            replay_share: share of the batch taken from the draws so far, in proportion to their
                importance weights.
            replay_size: how many of those are kept for each observation.
            draw_ahead: for how many steps to draw at once: large batches are drawn faster, and
                their last draws are a few steps off-policy.
            every: for SubTB, take the reward at prefixes of a multiple of so many tokens only,
                which is cheaper; the whole string always counts.
            given: latents (site → value) to learn from, in the place of the guide's own draws;
                with a single observation only. A posterior's log joints are not computed anew
                where they suffice. With `mle` they are all that is learned from, as often as
                there are steps.
            given_share: share of a batch's new draws that are given ones, while these last. With
                1 the guide learns from them first; a small share spreads them over the training.
            checkpoint: a folder to which the state of the training is written every so many
                steps. Called again with the same arguments, on a guide made like this one, `fit`
                goes on from there; on the CPU the result is, bit for bit, that of a run which was
                never killed.
            checkpoint_every: how many steps.
            progress: whether to show a bar on a terminal.

        Returns:
            The guide itself. Interrupted (Ctrl-C), it keeps what it has learned.

        Raises:
            ValueError: for empty data, a program without a latent string of the guide's LM, given
                latents with several observations, or a given posterior of another program.
            FloatingPointError: if a loss or reward is NaN; names the step and the site.
            OSError: if a checkpoint cannot be written, before the first step.
        """
        settings = {
            k: v
            for k, v in locals().items()
            if k not in ("self", "model", "data", "given", "progress", "checkpoint")
        }
        programs = _programs(model, data)
        for program in programs:
            self.check(program)
        if steps < 1 or batch < 2:
            raise ValueError(f"need steps >= 1 and batch >= 2, got steps={steps}, batch={batch}")
        if not all(0.0 <= b < 1.0 for b in betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {betas}")
        if not 0.0 < given_share <= 1.0:
            raise ValueError(f"given_share must be above 0 and at most 1, got {given_share}")
        if draw_ahead < 1:
            raise ValueError(f"draw_ahead must be at least 1, got {draw_ahead}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
        if self.objective in ON_POLICY:
            tempered_share, replay_share, draw_ahead = 0.0, 0.0, 1
        elif self.objective == "mle":
            replay_share, given_share = 0.0, 1.0
        schedule = schedule or RewardSchedule()
        # Adding an adapter injects new tensors; those of this guide are found by its name.
        named = [(n, p) for n, p in self.lm.model.named_parameters() if f".{self.adapter}." in n]
        parameters = [p for _, p in named]
        optimiser = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=0.0)
        feeds = [_Feed(p, ReplayBuffer(replay_size)) for p in programs]
        rows = given.samples if isinstance(given, Posterior) else given
        run: _Run | None = None
        first = 0
        if checkpoint is not None:
            latents = [sorted((k, str(v)) for k, v in row.items()) for row in rows]
            digest = hashlib.sha256(repr(latents).encode()).hexdigest()[:16]
            settings = {**settings, "schedule": repr(schedule), "given": digest}
            run = _Run(self, Path(checkpoint), settings, named, optimiser, feeds)
            first = run.resume()
        if len(rows) and not first:
            if len(programs) > 1:
                raise ValueError(
                    f"given latents belong to one observation, and data has {len(programs)}; "
                    "fit them one after the other"
                )
            if self.objective in ON_POLICY:
                raise ValueError(
                    f"objective={self.objective!r} learns from the guide's own draws, and given "
                    'latents are none; use a balance loss, or "mle"'
                )
            feeds[0].given = self._given(programs[0], given, schedule.start == 1.0, every)
            feeds[0].again = list(feeds[0].given) if self.objective == "mle" else []
        elif self.objective == "mle" and not first:
            raise ValueError('objective="mle" learns from given latents: fit(..., given=...)')
        done = len(self.history.get("step", [])) - first
        if run is not None and not first:
            run.write(0)  # a folder that cannot be written to is found out now
        try:
            with bar("training", steps, progress) as advance:
                advance(first)
                for step in range(first, steps):
                    for group in optimiser.param_groups:
                        group["lr"] = learning_rate * _rate(step, steps, warmup)
                    optimiser.zero_grad(set_to_none=True)
                    figures = self._step(
                        feeds[step % len(feeds)],
                        done + step,
                        batch,
                        schedule.power(step, steps),
                        lam,
                        (tempered_share, sampling_temperature, replay_share, given_share),
                        draw_ahead,
                        every,
                    )
                    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
                    if not math.isfinite(norm):
                        raise FloatingPointError(
                            f"the gradient is {norm} at step {done + step}; nothing was changed "
                            "by this step; lower the learning rate"
                        )
                    optimiser.step()
                    for k, v in {"step": float(done + step), **figures, "grad": norm}.items():
                        self.history.setdefault(k, []).append(v)
                    shown = {k: v for k, v in figures.items() if not math.isnan(v)}
                    text = " ".join(f"{k} {v:.2f}" for k, v in shown.items())
                    advance(1, text=f"training {text}")
                    if run is not None and (
                        (step + 1) % checkpoint_every == 0 or step + 1 == steps
                    ):
                        run.write(step + 1)
        except KeyboardInterrupt:
            warnings.warn(
                f"training was interrupted after {len(self.history.get('step', [])) - done} of "
                f"{steps} steps; the guide keeps what it has learned",
                UserWarning,
                stacklevel=2,
            )
        return self

    def _given(
        self,
        program: Program,
        given: Posterior | Sequence[Mapping[str, Any]],
        untempered: bool,
        every: int,
    ) -> list[Draw]:
        """Latents from elsewhere as draws, scored unless the posterior knows enough."""
        rows = given.samples if isinstance(given, Posterior) else list(given)
        policies = [
            _Policy(self, program, (self.seed, "given", i), 1.0, row) for i, row in enumerate(rows)
        ]
        executions = program.run(policies)
        contexts = [p.contexts for p in policies]
        _check_contexts(contexts)
        prefixes = self._takes_prefixes(program, contexts)
        known: list[float] | None = None
        alone = all(set(c) == set(e.latents) for c, e in zip(contexts, executions, strict=True))
        if isinstance(given, Posterior) and untempered and alone and not prefixes:
            known = None if given.log_joint is None else [float(v) for v in given.log_joint]
            _check_same_program(program, rows, known)
        draws = make_draws(program, executions, contexts, prefixes, known, every)
        for d in draws:
            d.is_given = True
        return draws

    def _fresh(
        self,
        program: Program,
        count: int,
        step: int,
        tempered_share: float,
        temperature: float,
        every: int,
    ) -> list[Draw]:
        """The guide's own draws, some of them from the tempered policy, spread evenly."""
        tempered = [
            math.floor((i + 1) * tempered_share) > math.floor(i * tempered_share)
            for i in range(count)
        ]
        policies = [
            _Policy(self, program, (self.seed, "train", step, i), temperature if hot else 1.0)
            for i, hot in enumerate(tempered)
        ]
        try:
            executions = program.run(policies)
            contexts = [p.contexts for p in policies]
            _check_contexts(contexts)
            prefixes = self._takes_prefixes(program, contexts)
            draws = make_draws(program, executions, contexts, prefixes, every=every)
        except ValueError as error:
            if " is nan" in str(error):
                raise FloatingPointError(f"at training step {step}, {error}") from error
            raise
        for d, hot in zip(draws, tempered, strict=True):
            d.is_tempered = hot
        return draws

    def _step(
        self,
        feed: _Feed,
        step: int,
        batch: int,
        power: float,
        lam: float,
        shares: tuple[float, float, float, float],
        draw_ahead: int,
        every: int,
    ) -> dict[str, float]:
        """One loss and its backward pass; returns the figures to report."""
        tempered_share, temperature, replay_share, given_share = shares
        count = batch - min(int(batch * replay_share), len(feed.buffer))
        while feed.again and len(feed.given) < count:
            rng = generator((self.seed, "again", step, len(feed.given)))
            feed.given += [feed.again[k] for k in rng.permutation(len(feed.again))]
        taken = min(len(feed.given), math.ceil(count * given_share))
        given, feed.given = feed.given[:taken], feed.given[taken:]
        own = count - taken
        if len(feed.ready) < own:
            feed.ready += self._fresh(
                feed.program, own * draw_ahead, step, tempered_share, temperature, every
            )
        fresh, feed.ready = feed.ready[:own], feed.ready[own:]
        replayed = feed.buffer.sample(
            batch - count, generator((self.seed, "replay", step)), {d.key for d in (*fresh, *given)}
        )
        # Those that log Z is estimated from come first.
        if not fresh:
            fresh, given = given, []
        fresh, given = (
            [d for d in draws if all(p.requests(None) for p in d.parts)] for draws in (fresh, given)
        )
        everything = [*fresh, *given, *replayed]
        if len(everything) < 2:
            raise ValueError(f"at training step {step}, no draw follows the latents' own rules")
        loss, log_qs = self._within_memory(
            lambda: self._descend(feed, everything, len(fresh), step, power, lam)
        )
        for d, q in zip(everything, log_qs, strict=True):
            feed.buffer.add(d.key, d.log_reward - q, d)
        untempered = [
            (d.log_reward, q)
            for d, q in zip(fresh, log_qs[: len(fresh)], strict=True)
            if not (d.is_tempered or d.is_given)
        ]
        possible = [(r, q) for r, q in untempered if r > -math.inf]
        return {
            "loss": loss,
            "log_reward": float(np.mean([r for r, _ in possible])) if possible else math.nan,
            "elbo": float(np.mean([r - q for r, q in possible])) if possible else math.nan,
            "impossible": 1.0 - len(possible) / len(untempered) if untempered else math.nan,
        }

    def _within_memory(self, descend: Callable[[], T]) -> T:
        """Runs a forward and backward pass, in smaller rows if the memory does not suffice."""
        while True:
            try:
                return descend()
            except RuntimeError as error:
                budget = self.lm.node_budget // 2
                if not _is_out_of_memory(error) or budget < LEAST_NODES:
                    raise
            self.lm.node_budget = budget
            for name, parameter in self.lm.model.named_parameters():
                if f".{self.adapter}." in name:
                    parameter.grad = None
            warnings.warn(
                f"out of memory: training goes on with lm.node_budget = {budget}, half of what it "
                "was",
                UserWarning,
                stacklevel=4,
            )

    def _descend(
        self,
        feed: _Feed,
        everything: Sequence[Draw],
        fresh: int,
        step: int,
        power: float,
        lam: float,
    ) -> tuple[float, list[float]]:
        """The loss, whose gradients are left with the adapter, and log q of each draw.

        Args:
            feed: where the draws come from.
            everything: the draws.
            fresh: how many of the first of them log Z is estimated from.
            step: the training's step.
            power: of the reward.
            lam: SubTB's λ.
        """
        found = policy_scores(everything, self.adapter)
        total = torch.stack([log_q(d, f) for d, f in zip(everything, found, strict=True)])
        reward = total.new_tensor(
            [
                d.log_prior + power * d.log_rest if d.log_reward > -math.inf else -math.inf
                for d in everything
            ]
        )
        is_given = any(d.is_given for d in everything[:fresh])
        if self.objective == "mle":
            loss = objectives.likelihood(total)
        elif self.objective in ON_POLICY:
            ways = {
                "reverse_kl": objectives.reverse_kl,
                "reward": objectives.reward,
                "rws": objectives.wake,
            }
            loss = ways[self.objective](reward, total)
        elif everything[0].ends:
            paths = [trajectory(d, f[0][0], power) for d, f in zip(everything, found, strict=True)]
            log_z = feed.estimate(
                objectives.root_gaps(paths[:fresh] or paths),
                objectives.root_gaps(paths),
                power,
                is_given,
            )
            if self.objective == "db":
                loss = objectives.detailed_balance(paths, log_z)
            else:
                loss = objectives.subtb(paths, lam, log_z)
        else:
            gap = reward - total
            log_z = feed.estimate(gap[:fresh], gap, power, is_given)
            loss = objectives.trajectory_balance(reward, total, log_z)
        if not bool(torch.isfinite(loss)):
            sites = ", ".join(sorted(p.site.name for p in everything[0].parts))
            raise FloatingPointError(f"the loss is {float(loss)} at step {step}, sites {sites}")
        loss.backward()
        return float(loss.detach()), total.detach().tolist()

    def _takes_prefixes(
        self, program: Program, contexts: Sequence[dict[str, tuple[int, ...]]]
    ) -> bool:
        """Whether the objective is SubTB: one latent, and it is a string of this guide's LM."""
        names = {n for c in contexts for n in c}
        single = (
            len(names) == 1
            and set(program.latents) == names
            and all(isinstance(program.sites[n].fn, LMString) for n in names)
        )
        if self.objective in WITH_PREFIXES and not single:
            raise ValueError(
                f'objective="{self.objective}" needs a program with one latent, an LMString; '
                f'this one has {", ".join(program.latents)}; use "vargrad" or "auto"'
            )
        return single and self.objective in ("auto", *WITH_PREFIXES)

    # -- using --------------------------------------------------------------------------------

    def sample(
        self, model: Callable[..., Any] | Program, *args: Any, n: int = 1, seed: int = 0
    ) -> list[dict[str, Any]]:
        """Raw draws from the guide, unweighted.

        Args:
            model: a model function, or a compiled `Program`.
            *args: the model's arguments.
            n: how many draws.
            seed: equal seeds give equal draws.

        Returns:
            For each draw, site → value of its latents.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        program = model if isinstance(model, Program) else compile(model, *args)
        self.check(program)
        choosers = [_Policy(self, program, (seed, "guide", i), 1.0) for i in range(n)]
        return [e.latents for e in program.run(choosers)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a standard PEFT adapter folder, and `guide.json` beside it.

        A context function is code and is not saved: give it again to `load`.
        """
        self.lm.save_adapter(self.adapter, folder)
        packages = ("langppl", "torch", "transformers", "peft")
        record = {
            "format": "langppl-guide",
            "version": 1,
            "base_model": self.lm.name,
            "base_fingerprint": self.lm.weights_fingerprint,
            "objective": self.objective,
            "default_context": self.context is default_context,
            "defensive": self.defensive,
            "seed": self.seed,
            "steps": len(self.history.get("step", [])),
            "versions": {p: importlib.metadata.version(p) for p in packages},
        }
        path = Path(folder) / GUIDE_FILE
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        lm: LM,
        *,
        context: ContextFunction | None = None,
    ) -> GFlowNetGuide:
        """Reads a guide that `save` wrote.

        Args:
            folder: where it was saved.
            lm: the LM that it was trained on.
            context: the context function, if the guide was made with one.

        Raises:
            ValueError: if a file is missing or corrupt, the guide was trained on another LM, or
                its context function is missing.
        """
        path = Path(folder) / GUIDE_FILE
        if not path.is_file():
            raise ValueError(f"{folder} is no guide folder: {GUIDE_FILE} is missing")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != "langppl-guide":
                raise KeyError("format")
            base, fingerprint = record["base_model"], record["base_fingerprint"]
            objective, seed = record["objective"], record["seed"]
            plain = record["default_context"]
            defensive = float(record.get("defensive", 0.0))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is corrupt: {error}") from error
        if fingerprint != lm.weights_fingerprint:
            raise ValueError(
                f"the guide in {folder} was trained on {base!r} (fingerprint {fingerprint}), and "
                f"{lm!r} has other weights (fingerprint {lm.weights_fingerprint})"
            )
        if not plain and context is None:
            raise ValueError(
                f"the guide in {folder} was trained with its own context function; give it to load"
            )
        self = cls.__new__(cls)
        self._setup(lm, context, objective, seed)
        self.defensive = defensive
        lm.load_adapter(self.adapter, folder)
        return self


@dataclass
class _Feed:
    """Where the trajectories of one program come from.

    Attributes:
        program: the program.
        buffer: what may be replayed.
        ready: the guide's own draws that wait for their step.
        given: draws from elsewhere that do.
        again: draws that are given once more when these are used up.
        anchor: power of the reward and the estimate of log Z (nats) that given draws are held to.
    """

    program: Program
    buffer: ReplayBuffer[Draw]
    ready: list[Draw] = field(default_factory=list)
    given: list[Draw] = field(default_factory=list)
    again: list[Draw] = field(default_factory=list)
    anchor: tuple[float, torch.Tensor] | None = None

    def estimate(
        self, fresh: torch.Tensor, everything: torch.Tensor, power: float, is_given: bool
    ) -> torch.Tensor:
        """Log Z of a batch, detached.

        Args:
            fresh: log R − log q of the guide's own draws, or of given ones where there are none;
                replayed ones are replayed because theirs is high.
            everything: of all draws, for a batch in which no fresh one is possible.
            power: of the reward.
            is_given: whether these are given draws. The guide leaves them behind as it
                learns from them, and log Z must not follow: it stays what the first batch said.
        """
        if is_given and self.anchor is not None and self.anchor[0] == power:
            return self.anchor[1]
        has_possible = bool(torch.isfinite(fresh).any())
        log_z = objectives.log_evidence(fresh if has_possible else everything)
        if is_given and has_possible:
            self.anchor = (power, log_z)
        return log_z


class _Run:
    """The state of one call of `fit`, written to and read from a folder of checkpoints.

    What it does not hold depends on the seed and the step alone: random numbers are counter-based.
    """

    def __init__(
        self,
        guide: GFlowNetGuide,
        folder: Path,
        settings: Mapping[str, Any],
        named: Sequence[tuple[str, torch.nn.Parameter]],
        optimiser: torch.optim.Optimizer,
        feeds: Sequence[_Feed],
    ) -> None:
        self.guide, self.folder, self.optimiser, self.feeds = guide, folder, optimiser, feeds
        self.parameters = {n.replace(f".{guide.adapter}.", "."): p for n, p in named}
        observations = [
            [(n, str(s.value)) for n, s in f.program.sites.items() if s.kind == "observed"]
            for f in feeds
        ]
        described = {
            **settings,
            "objective": guide.objective,
            "seed": guide.seed,
            "base": guide.lm.weights_fingerprint,
            "observations": observations,
            "sites": [list(f.program.sites) for f in feeds],
            "tensors": {n: list(p.shape) for n, p in self.parameters.items()},
        }
        self.settings = json.loads(json.dumps(described))

    def write(self, step: int) -> None:
        """Writes the state after so many steps."""
        # A resumed run remembers no scores, and a batch's others move a score's last bits.
        self.guide.lm.memo.clear()
        tensors = {f"weight {n}": p.detach() for n, p in self.parameters.items()}
        for n, p in self.parameters.items():
            for key, value in self.optimiser.state.get(p, {}).items():
                tensors[f"{key} {n}"] = value
        record = {
            "settings": self.settings,
            "history": self.guide.history,
            "feeds": [
                {
                    "buffer": [[w, to_record(d)] for w, d in feed.buffer.items()],
                    "ready": [to_record(d) for d in feed.ready],
                    "given": [to_record(d) for d in feed.given],
                    "again": [to_record(d) for d in feed.again],
                    "anchor": None
                    if feed.anchor is None
                    else [feed.anchor[0], float(feed.anchor[1])],
                }
                for feed in self.feeds
            ],
        }
        checkpoints.write(self.folder, step, record, tensors)

    def resume(self) -> int:
        """Reads the newest checkpoint, if there is one; returns the steps done."""
        found = checkpoints.read(self.folder)
        self.guide.lm.memo.clear()
        if found is None:
            return 0
        step, record, tensors = found
        other = [
            k
            for k in {**self.settings, **record["settings"]}
            if self.settings.get(k) != record["settings"].get(k)
        ]
        if other:
            raise ValueError(
                f"{self.folder} holds a checkpoint of a training with other {', '.join(other)}; "
                "give the same arguments to go on with it, or another folder"
            )
        with torch.no_grad():
            for n, p in self.parameters.items():
                p.copy_(tensors[f"weight {n}"])
                kept = {
                    key: tensors[f"{key} {n}"]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key} {n}" in tensors
                }
                if kept:
                    self.optimiser.state[p] = {
                        k: v if k == "step" else v.to(p.device) for k, v in kept.items()
                    }
        self.guide.history = record["history"]
        for feed, known in zip(self.feeds, record["feeds"], strict=True):
            for (weight, _), draw in zip(
                known["buffer"],
                from_records(feed.program, [d for _, d in known["buffer"]]),
                strict=True,
            ):
                feed.buffer.add(draw.key, weight, draw)
            feed.ready = from_records(feed.program, known["ready"])
            feed.given = from_records(feed.program, known["given"])
            feed.again = from_records(feed.program, known["again"])
            if known["anchor"] is not None:
                power, log_z = known["anchor"]
                feed.anchor = (power, torch.tensor(log_z, device=self.guide.lm.device))
        return step


def _check_contexts(contexts: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    if not all(contexts):
        raise ValueError("some executions meet no latent string of this guide's LM")


def _check_same_program(
    program: Program, rows: Sequence[Mapping[str, Any]], log_joints: Sequence[float] | None
) -> None:
    """Raises ValueError if the first possible row has another log joint under the program."""
    for row, known in zip(rows, log_joints or (), strict=bool(log_joints)):
        if known > -math.inf:
            found = float(program.log_joint(row))
            # Wide enough for half precision in batches of another shape.
            if not abs(found - known) <= 0.5 + 0.01 * abs(known):
                raise ValueError(
                    f"the given posterior is of another program or other observations: its sample "
                    f"{ {k: str(v) for k, v in row.items()} } has log joint {known:.3f} there and "
                    f"{found:.3f} here; give its samples instead, to have them scored"
                )
            return


class _Policy:
    """Decides the latents of one execution with the guide's adapter, and keeps their contexts."""

    def __init__(
        self,
        guide: GFlowNetGuide,
        program: Program,
        key: Key,
        temperature: float,
        values: Mapping[str, Any] | None = None,
        defensive: float = 0.0,
    ) -> None:
        self.guide, self.program, self.key = guide, program, key
        self.temperature, self.defensive = temperature, defensive
        self.values = values
        self.contexts: dict[str, tuple[int, ...]] = {}

    def __call__(self, name: str, fn: Any, execution: Execution) -> Choice:
        guide, key = self.guide, (*self.key, name)
        is_covered = covered(fn, guide.lm)
        if is_covered:
            prompt = context_ids(self.program, name, fn, execution, guide.context)
            self.contexts[name] = prompt
        if self.values is not None:
            return given_values(self.values)(name, fn, execution)
        if not is_covered:
            return draw_prior(fn, key)
        if not self.defensive:
            value, log_q = fn.draw(
                key, prompt=prompt, adapter=guide.adapter, temperature=self.temperature
            )
            return Choice(value, log_q)
        if generator((*key, "defence")).random() < self.defensive:
            prior = draw_prior(fn, (*key, "prior"))
            log_q = _raw_log_prob(fn, prior.value, prompt, guide.adapter)
            assert prior.log_q is not None
            return replace(prior, log_q=mixed(log_q, prior.log_q, self.defensive))
        value, log_q = fn.draw(key, prompt=prompt, adapter=guide.adapter)
        if fn.why_impossible(value) is None:
            return Choice(value, log_q, defence=self.defensive)
        # A string that is rejected has no log_prob, but the prior does propose it.
        return Choice(value, mixed(log_q, _raw_log_prob(fn, value), self.defensive))


def _raw_log_prob(
    fn: Any, value: Any, prompt: tuple[int, ...] | None = None, adapter: str | None = None
) -> float:
    """Log-probability (nats) with which a latent is drawn, rejected strings included."""
    if isinstance(fn, LMChoice):
        return float(fn.log_probs(prompt=prompt, adapter=adapter)[fn.options.index(value)])
    request = fn.request(value, prompt=prompt, adapter=adapter)
    (reply,) = perform([request])
    assert isinstance(reply, ScoreReply)
    return reply.log_prob


def _programs(model: Callable[..., Any] | Program, data: Sequence[Any] | None) -> list[Program]:
    if isinstance(model, Program):
        if data is not None:
            raise TypeError("a compiled Program has its arguments already; give no data")
        return [model]
    if data is None:
        data = [()]
    rows = list(data)
    if not rows:
        raise ValueError("data is empty: give at least one tuple of the model's arguments")
    for row in rows:
        if not isinstance(row, tuple | list):
            raise TypeError(
                f"each observation must be a tuple of the model's arguments, got {row!r}"
            )
    return [compile(model, *row) for row in rows]


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator has no error type of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _rate(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))


def _remove(lm: LM, adapter: str) -> None:
    if adapter in getattr(lm.model, "peft_config", {}):
        lm.remove_adapter(adapter)
