"""`Posterior`: weighted samples of a program's latents, and what can be said of them.

A posterior is a list of samples (site → value) with log weights in nats. Sample i stands for the
posterior with probability w_i / Σw; the mean weight estimates the evidence. Nothing is hidden in
the numbers: an impossible sample keeps its weight of zero, and where the spread of the weights is
too wide for the error of the evidence to mean anything, the printed table says so.

Example:
    >>> posterior = Posterior([{"z": "cat"}, {"z": "dog"}], [math.log(1.0), math.log(3.0)])
    >>> posterior.probabilities("z")
    {'dog': 0.75, 'cat': 0.25}
    >>> posterior.expect(lambda sample: sample["z"] == "dog")
    0.75
    >>> posterior["z"], posterior[-1], posterior.mode("z")
    (['cat', 'dog'], {'z': 'dog'}, 'dog')
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text
import torch

from langppl import diagnosis, diagnostics, posterior_files, prediction, summary
from langppl.chains import Chains
from langppl.diagnosis import Diagnosis
from langppl.diagnostics import Array, InferenceWarning, LogWeights
from langppl.lm.counts import as_count
from langppl.lm.files import write_atomically
from langppl.lm.seeds import as_seed
from langppl.parts import Part
from langppl.program import Program
from langppl.program.arguments import arguments_by_place
from langppl.program.lengths import as_lengths
from langppl.program.statements import Model
from langppl.tables import Report, pandas_for
from langppl.values import (
    ABSENT,
    RETURN,
    Absent,
    UnknownSiteError,
    hashable_key,
    plain,
)
from langppl.warn import warn

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["ABSENT", "Absent", "Posterior", "UnknownSiteError"]


class Posterior(Report):
    """Weighted samples from the posterior of a program.

    `len` is the number of samples; `posterior[i]` is the i-th, `posterior[:10]` are the first ten,
    and iteration goes over them, each a mapping of the latents and the computed values.
    `posterior[name]` is one of these in all samples.

    Args:
        samples: n dicts, latent site → value: `Text` or `str` for strings, 0-d tensors or floats
            for numbers. A site that an execution did not reach is missing from its dict.
        log_weights: shape [n], nats; −inf marks an impossible sample.
        log_evidence: nats; by default the log of the mean weight (of the sum for
            `method="exact"`). NaN says that the method does not estimate it, and so do chains.
        log_evidence_error: its standard error, nats; by default the delta method's, 0 for
            `method="exact"`, and NaN (unknown) where `log_evidence` is given without it.
        method: the inference method. With `"exact"` the samples are all points of the support and
            their log weights are log joints.
        guide: the name of the guide that proposed the samples.
        guide_object: that guide itself.
        sites: the latent sites in the order in which they are shown; others follow as they appear.
        returns: the model's n return values.
        computed: n dicts, name → value of a `deterministic` site or result of a `call`. What an
            execution did not reach is missing from its dict.
        log_joint: shape [n], nats: log p(latents, observations) of each sample.
        log_q: shape [n], nats: log probability under the guide.
        site_log_probs: site → shape [n], nats: the log probability of each sample at the sites of
            the model, observed ones and factors included; NaN where an execution did not reach
            the site.
        elapsed: seconds that the inference took.
        failed_sites: site → number of samples whose log probability there is −inf (or NaN).
        notes: sentences to be printed under the table.
        ancestors: shape [n], for samples that were resampled on the way: the number of the first
            particle that each descends from. ESS, Pareto k and the error of the evidence then
            count the descendants of one as one sample.
        resampled: how often they were resampled.
        moves: Metropolis–Hastings moves of all of them on the way, and how many were accepted.
        chains: what is known of the Markov chains behind the samples, which are then equally
            weighted.
        parts: independent parts of the program, whose draws were each resampled by their own
            weights and then put together; the samples are then equally weighted. ESS and Pareto k
            are those of the worst part.

    Raises:
        ValueError: if there are no samples, lengths differ, or a log weight is NaN or +inf.

    Warns:
        InferenceWarning: if no sample has weight.
    """

    samples: list[dict[str, Any]]
    """n dicts, latent site → value."""
    log_weights: Array
    """Shape [n], float64, nats."""
    sites: tuple[str, ...]
    """Names of the latent sites."""
    computed: tuple[dict[str, Any], ...]
    """n dicts, name → computed value: `deterministic` sites, and the results of `call`."""
    computed_sites: tuple[str, ...]
    """Names of the computed values."""
    guide_object: Any
    """The `langppl.guides.Guide` that proposed the samples, for `infer(guide="gflownet")` the one
    that it trained. None for `method="exact"`, and after `load`, pickling and copying."""
    log_evidence: float | None
    """Estimate of log p(observations), nats; None if the method does not estimate it."""
    log_evidence_error: float | None
    """Its standard error, nats; to be trusted where `.reliable`. None if there is no estimate."""
    chains: Chains | None
    """The Markov chains behind the samples, None if these are independent."""
    parts: tuple[Part, ...]
    """The independent parts of the program that were resampled each on its own, if any."""

    def __init__(
        self,
        samples: Sequence[Mapping[str, Any]],
        log_weights: LogWeights,
        *,
        log_evidence: float | None = None,
        log_evidence_error: float | None = None,
        method: str = "importance",
        guide: str = "prior",
        guide_object: Any = None,
        sites: Sequence[str] | None = None,
        returns: Sequence[Any] | None = None,
        computed: Sequence[Mapping[str, Any]] | None = None,
        log_joint: LogWeights | None = None,
        log_q: LogWeights | None = None,
        site_log_probs: Mapping[str, LogWeights] | None = None,
        elapsed: float | None = None,
        failed_sites: Mapping[str, int] | None = None,
        notes: Sequence[str] = (),
        ancestors: Sequence[int] | None = None,
        resampled: int = 0,
        moves: tuple[int, int] = (0, 0),
        chains: Chains | None = None,
        parts: Sequence[Part] = (),
    ) -> None:
        """Checks the arguments; see the class."""
        self.chains = chains
        self.parts = tuple(parts)
        self.samples = [dict(sample) for sample in samples]
        self.method = method
        self.guide = guide
        self.guide_object = guide_object
        self.elapsed = None if elapsed is None else float(elapsed)
        self.failed_sites = dict(failed_sites or {})
        self.notes = tuple(notes)
        seen = (site for sample in self.samples for site in sample)
        self.sites = tuple(dict.fromkeys([*(sites or ()), *seen]))
        if not self.samples:
            raise ValueError("a posterior needs at least one sample, got none")
        try:
            self.log_weights = diagnostics.as_log_weights(log_weights)
        except ValueError as error:
            if not self.failed_sites:
                raise
            where = summary.failed_at(self.failed_sites)
            raise ValueError(f"{error}; the log probability is not finite at {where}") from None
        self._check_length("log_weights", self.log_weights)
        self.returns = None if returns is None else list(returns)
        self._check_length("returns", self.returns)
        rows = [{}] * len(self.samples) if computed is None else computed
        self.computed = tuple(dict(row) for row in rows)
        self._check_length("computed", self.computed)
        self.computed_sites = tuple(dict.fromkeys(name for row in self.computed for name in row))
        self.log_joint = self._per_sample("log_joint", log_joint)
        self.log_q = self._per_sample("log_q", log_q)
        self.site_log_probs: dict[str, Array] = {}
        for site, values in (site_log_probs or {}).items():
            found = self._per_sample(f"site_log_probs[{site!r}]", values)
            assert found is not None
            self.site_log_probs[site] = found

        self.ancestors = None if ancestors is None else [int(a) for a in ancestors]
        self.resampled = resampled
        self.moves = moves
        self._check_length("ancestors", self.ancestors)
        self._possible = bool((self.log_weights > -np.inf).any())
        if chains is not None or (log_evidence is not None and math.isnan(log_evidence)):
            self.log_evidence = self.log_evidence_error = None
        elif log_evidence is not None:
            self.log_evidence = float(log_evidence)
            self.log_evidence_error = (
                math.nan if log_evidence_error is None else float(log_evidence_error)
            )
        else:
            self._estimate_evidence()
            if log_evidence_error is not None:
                self.log_evidence_error = float(log_evidence_error)
        if not self._possible:
            warn(summary.failure(self), InferenceWarning)

    def _estimate_evidence(self) -> None:
        evidence, spread = diagnostics.log_evidence(self.log_weights)
        if self._exact and self._possible:
            evidence, spread = evidence + math.log(self.num_samples), 0.0
        if self.ancestors is not None:
            spread = diagnostics.log_evidence_error(self.log_weights, self.ancestors)
        self.log_evidence, self.log_evidence_error = evidence, spread

    @property
    def num_samples(self) -> int:
        """The number of samples, impossible ones included."""
        return len(self.samples)

    @property
    def weights(self) -> Array:
        """The normalised weights, shape [n], float64, summing to one.

        Raises:
            ValueError: if no sample has weight.
        """
        self._require_weight()
        return diagnostics.normalized_weights(self.log_weights)

    @property
    def _independent(self) -> Array:
        """Log weights of what is independent: samples, or families of resampled ones."""
        if self.ancestors is None:
            return self.log_weights
        return diagnostics.by_ancestor(self.log_weights, self.ancestors)

    @functools.cached_property
    def ess(self) -> float:
        """Effective sample size, between 1 and n; 0 if no sample has weight.

        For `method="exact"`, whose points are not draws: inf. For chains: the smallest of
        `chains.ess_of`, NaN if it is not known.
        """
        if self._exact and self._possible:
            return math.inf
        if self.chains is not None:
            return self.chains.ess
        if self.parts:
            return min(part.ess for part in self.parts)
        return diagnostics.effective_sample_size(self._independent)

    @functools.cached_property
    def pareto_k(self) -> float:
        """The shape of the weights' tail, see `diagnostics.pareto_k`.

        −inf for `method="exact"`, NaN for chains, whose samples are not weighted.
        """
        if self._exact and self._possible:
            return -math.inf
        if self.chains is not None:
            return math.nan
        if self.parts:
            return float(np.max([part.pareto_k for part in self.parts]))
        return diagnostics.pareto_k(self._independent)

    @property
    def reliable(self) -> bool:
        """Whether the error of the evidence can be trusted; of chains, whether they agree.

        True if Pareto k is at most min(0.7, 1 − 1/log₁₀ n), and for `method="exact"`. False where k
        cannot be estimated (n ≤ 20) and where no sample has weight.
        """
        if not self._possible:
            return False
        if self.chains is not None:
            return self.chains.agree
        return self._exact or self.pareto_k <= diagnostics.pareto_k_threshold(self.num_samples)

    @property
    def elbo(self) -> float | None:
        """The mean log weight, nats: the guide's own lower bound on the log evidence.

        −inf if any draw is impossible. For `method="exact"`, where the proposal is the posterior
        itself, the log evidence. None for chains and for samples that were resampled, whose
        weights are not the guide's.
        """
        if self._exact or self.ancestors is not None or self.impossible_share == 0.0:
            return self.elbo_possible
        return -math.inf

    @property
    def elbo_possible(self) -> float | None:
        """The mean log weight of the possible draws, nats; −inf if there are none.

        Not a lower bound on the log evidence by itself: that takes
        log(1 − `impossible_share`) more. None where `elbo` is.
        """
        if self.chains is not None or self.ancestors is not None:
            return None
        if self._exact:
            return self.log_evidence
        if self.parts:
            assert self.log_evidence is not None
            return self.log_evidence + math.fsum(p.elbo - p.log_evidence for p in self.parts)
        possible = self.log_weights[self.log_weights > -np.inf]
        return float(possible.mean()) if possible.size else -math.inf

    @property
    def impossible_share(self) -> float:
        """The share of the draws that are impossible, between 0 and 1.

        For `method="exact"`, whose points are not draws: 0, or 1 if no point is possible.
        """
        if self._exact:
            return 0.0 if self._possible else 1.0
        if self.parts:
            return 1.0 - math.prod(1.0 - part.impossible_share for part in self.parts)
        return float((self.log_weights == -np.inf).mean())

    def probabilities(self, site: str) -> dict[Any, float]:
        """The posterior distribution of one latent, computed value or of the return value.

        Strings are compared by their text: samples that spell the same text with different tokens
        are one value here, with the sum of their probabilities. Values without any weight are
        left out.

        Args:
            site: the name of a latent or of a computed value, or `"_RETURN"` for what the model
                returned.

        Returns:
            Value → probability, likeliest first, summing to one. Strings are plain `str`, numbers
            Python floats, lists and tensors with dimensions nested tuples. Executions that did not
            reach the site are under the key `ABSENT`.

        Raises:
            UnknownSiteError: if there is no value of that name (a `KeyError`).
            TypeError: if a computed or returned value is not hashable.
            ValueError: if no sample has weight.
        """
        parts: dict[Any, list[float]] = {}
        for value, weight in zip(self._column(site, ABSENT), self.weights, strict=True):
            if weight > 0.0:
                parts.setdefault(hashable_key(site, value), []).append(float(weight))
        table = {value: math.fsum(weights) for value, weights in parts.items()}
        return dict(sorted(table.items(), key=lambda item: -item[1]))

    def mode(self, site: str) -> Any:
        """The likeliest value of one latent, computed value or of the return value.

        For continuous numbers, which hardly ever come twice, that is the value of the heaviest
        sample and says little.

        Args:
            site: as for `probabilities`.

        Returns:
            The first key of `probabilities`; of several that are equally likely the one that was
            sampled first. `ABSENT` if most executions do not reach the site.

        Raises:
            UnknownSiteError: if there is no value of that name (a `KeyError`).
            TypeError: if a computed or returned value is not hashable.
            ValueError: if no sample has weight.
        """
        return next(iter(self.probabilities(site)))

    @overload
    def expect(self, fn: str) -> Any: ...
    @overload
    def expect(self, fn: Callable[[dict[str, Any]], Any]) -> float: ...

    def expect(self, fn: Callable[[dict[str, Any]], Any] | str) -> Any:
        """The posterior mean of a function of the latents and the computed values.

        Args:
            fn: takes a sample (name → value; what the execution did not reach is missing) and
                returns a number, a bool or a tensor of one element. Called on samples that have
                weight, on no others. Or the name of a number or of an array of numbers, as for
                `probabilities`.

        Returns:
            Σ w·fn(sample), with normalised weights; of arrays an array, of their shape.

        Raises:
            UnknownSiteError: if there is no value of that name (a `KeyError`).
            ValueError: if no sample has weight, or `fn` returns NaN.
            TypeError: if `fn` returns something that is not one number, arrays differ in shape, or
                an execution that has weight did not reach the value that is named.
        """
        column = self._column(fn, ABSENT) if isinstance(fn, str) else None
        if column is not None and (found := self._mean_of_arrays(str(fn), column)) is not None:
            return found
        terms = []
        for i, weight in enumerate(self.weights):
            if weight == 0.0:
                continue
            value = column[i] if column is not None else fn(self[i])  # type: ignore[operator]
            try:
                number = float("" if isinstance(value, str) else value)
            except (TypeError, ValueError, RuntimeError):
                whose = "the function must return one number, but gave"
                if column is not None:
                    whose = f"the value {fn!r} must be one number, but is"
                raise TypeError(f"expect: {whose} {value!r} for sample {i}") from None
            if math.isnan(number):
                whose = "the function returned" if column is None else f"the value {fn!r} is"
                raise ValueError(f"expect: {whose} NaN for sample {i}")
            terms.append(float(weight) * number)
        return sum(terms) if any(map(math.isinf, terms)) else math.fsum(terms)

    def _mean_of_arrays(self, name: str, column: Sequence[Any]) -> Array | float | None:
        """The mean of arrays of several numbers; None of other values."""
        kept = [(w, column[i], i) for i, w in enumerate(self.weights) if w > 0.0]
        if not all(isinstance(value, torch.Tensor | np.ndarray) for _, value, _ in kept):
            return None
        arrays = [np.asarray(plain(value), dtype=float) for _, value, _ in kept]
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) > 1:
            raise TypeError(
                f"expect: the value {name!r} must have one shape, but has "
                f"{' and '.join(map(str, shapes))}; give a function of a sample that returns "
                "a number"
            )
        if arrays[0].ndim == 0:
            return None
        for array, (_, _, i) in zip(arrays, kept, strict=True):
            if np.isnan(array).any():
                raise ValueError(f"expect: the value {name!r} has NaN in it for sample {i}")
        mean: Array = sum(w * array for array, (w, _, _) in zip(arrays, kept, strict=True))
        return mean if mean.size > 1 else float(mean.sum())

    def resample(self, n: int, seed: int = 0) -> list[dict[str, Any]]:
        """Draws equally weighted samples.

        Multinomial: n independent draws with replacement, each sample i with probability w_i.

        Args:
            n: how many.
            seed: the same seed gives the same draws.

        Returns:
            n dicts, name → value of the latents and the computed values (copies; a sample may be
            drawn more than once).

        Raises:
            ValueError: if `n` is below 1, or no sample has weight.
        """
        return [self[i] for i in self._draw(as_count("n", n, 1), seed)]

    def _draw(self, n: int, seed: int) -> list[int]:
        """The numbers of n samples drawn by weight."""
        # numpy takes no negative ones.
        rng = np.random.default_rng(as_seed(seed) % 2**128)
        return [int(i) for i in rng.choice(self.num_samples, size=n, p=self.weights)]

    def predict(
        self,
        model: Model | Program,
        *args: Any,
        num_samples: int | None = None,
        seed: int = 0,
        lengths: Mapping[str, int] | None = None,
        **named: Any,
    ) -> list[dict[str, Any]]:
        """Runs a second model on posterior draws: Bayesian model averaging.

        Latents of the second model that have the name of one of this posterior's take the drawn
        values; its other latents are sampled, and a run in which one is rejected by its own rules
        (unfinished under a grammar, or with `truncate="reject"`) is done anew, on the same
        posterior draw. What it observes is not weighed.

        Args:
            model: a model function, or a compiled `Program` (then without `args`).
            *args: its arguments.
            num_samples: posterior draws to run it on; as many as there are samples if None.
            seed: equal seeds give equal predictions.
            lengths: tokens of each open string that is predicted. A run in which the LM ends it
                earlier is done anew, on the same posterior draw.
            **named: the model's arguments by their names.

        Returns:
            For each draw, site → value of the second model's sites that this posterior does not
            have, and `"_RETURN"`: what the model returned.

        Raises:
            ValueError: if no sample has weight, the model has none of this posterior's sites, an
                open string has no length, or every attempt of a run is rejected.
            TypeError: for a compiled program with arguments, arguments that do not fit the model,
                or a seed that is no integer.
        """
        if isinstance(model, Program) and (args or named):
            raise TypeError("a compiled Program has its arguments already; give none")
        if not isinstance(model, Program):
            args = arguments_by_place(model, args, named, ("num_samples", "seed", "lengths"))
        seed, known = as_seed(seed), as_lengths(lengths)
        count = self.num_samples if num_samples is None else num_samples
        chosen = self._draw(as_count("num_samples", count, 1), seed)
        draws = [self.samples[i] for i in chosen]
        return prediction.predict(model, args, draws, self.sites, seed, known)

    def diagnose(self, *others: Posterior) -> Diagnosis:
        """What these samples are worth, in words and figures, and what to do about it.

        Args:
            *others: posteriors of the same program and observations, to compare with.

        Returns:
            The report; print it. See `langppl.diagnosis`.

        Raises:
            ValueError: if another posterior has latents and none of them in common with this one.
            TypeError: for what is no posterior.
        """
        for other in others:
            if not isinstance(other, Posterior):
                raise TypeError(
                    f"diagnose takes posteriors, got a {type(other).__name__}; write "
                    "posterior.diagnose(other), and of a list posterior.diagnose(*others)"
                )
        return diagnosis.diagnose(self, others)

    def to_pandas(self) -> pandas.DataFrame:
        """The samples as a table, one row each, impossible ones included.

        Returns:
            A column for each latent and each computed value (None where it is absent), then
            `log_weight` (nats) and `weight` (normalised; 0 throughout if no sample has weight), and
            `log_q` and `log_joint` where they are known. Where a site has the name of one of these,
            the latter is followed by an underscore.

        Raises:
            ImportError: if pandas is not installed.
        """
        pd = pandas_for("Posterior.to_pandas")
        columns: dict[str, Any] = {
            name: [plain(value) for value in self._column(name, None)] for name in self._names
        }
        numbers = {
            "log_weight": self.log_weights,
            "weight": self.weights if self._possible else np.zeros(self.num_samples),
            "log_q": self.log_q,
            "log_joint": self.log_joint,
        }
        for name, values in numbers.items():
            if values is not None:
                while name in columns:
                    name += "_"
                columns[name] = values
        frame: pandas.DataFrame = pd.DataFrame(columns)
        return frame

    def summary(self) -> pandas.DataFrame:
        """The printed table: the likeliest values of each latent and each computed value.

        Returns:
            A row for each value, with its `site`, the `value` as it is printed, and its
            `probability`. The five likeliest of a site, then one row for the rest; numbers of more
            than five values have one row, their mean and standard deviation. What is not hashable
            has NaN for a probability.

        Raises:
            ImportError: if pandas is not installed.
            ValueError: if no sample has weight.
        """
        pd = pandas_for("Posterior.summary")
        self._require_weight()
        columns = ["site", "value", "probability"]
        frame: pandas.DataFrame = pd.DataFrame(summary.rows(self), columns=columns)
        return frame

    def plot(self, site: str | None = None) -> Figure:
        """Draws one latent, computed or return value, or all latents: see `langppl.plots`."""
        plots = importlib.import_module("langppl.plots")
        figure: Figure = plots.plot_posterior(self, site)
        return figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the posterior as strict JSON; strings keep their token ids.

        The file appears whole or not at all. Return values and computed values that JSON cannot
        hold are left out, and a note in the file says so. `guide_object` is not saved.

        Args:
            path: the file to write; missing folders are made.

        Raises:
            OSError: if the file cannot be written; names the path.
            TypeError: if a sample holds a value that is not a string, a number, a tensor, None or
                a list, tuple or dict of these.
        """
        text = json.dumps(posterior_files.content_of(self), allow_nan=False, indent=1) + "\n"
        write_atomically(Path(path).expanduser(), text, "posterior")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Posterior:
        """Reads a posterior that `save` wrote.

        Args:
            path: the file.

        Returns:
            The posterior, with the values, types and token ids that it was saved with.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a langppl posterior, is damaged, or was written by a
                later version.
        """
        return posterior_files.read(path, cls)

    def __len__(self) -> int:
        """The number of samples."""
        return self.num_samples

    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    @overload
    def __getitem__(self, key: SupportsIndex) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, key: str | SupportsIndex | slice) -> Any:
        """One value in all samples, or one sample, or several.

        Args:
            key: the name of a latent or of a computed value, or `"_RETURN"`; or the number of a
                sample, from the end if it is negative; or a slice of such numbers.

        Returns:
            For a name the n values, None where an execution did not reach it. For a number the
            sample: name → value of its latents and its computed values (a copy). For a slice a list
            of these.

        Raises:
            UnknownSiteError: if there is no value of that name (a `KeyError`).
            IndexError: if there is no sample of that number.
            TypeError: for other keys.
        """
        if isinstance(key, str):
            return self._column(key, None)
        if isinstance(key, slice):
            return [self[i] for i in range(self.num_samples)[key]]
        try:
            i = operator.index(key)
        except TypeError:
            raise TypeError(
                f"posterior[{key!r}]: give the name of a value, the number of a sample, or a slice"
            ) from None
        if not -self.num_samples <= i < self.num_samples:
            raise IndexError(f"there is no sample {i}: the posterior has {self.num_samples}")
        return {**self.samples[i], **self.computed[i]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The samples, as `posterior[i]` gives them."""
        return (self[i] for i in range(self.num_samples))

    def __contains__(self, name: object) -> bool:
        """Whether there is a latent or a computed value of that name."""
        return name in self._names

    def __getstate__(self) -> dict[str, Any]:
        """All but the guide, which may hold a whole LM."""
        return {**self.__dict__, "guide_object": None}

    def __repr__(self) -> str:
        """One line: method, guide, size, evidence."""
        evidence = "None" if self.log_evidence is None else f"{self.log_evidence:.3f}"
        return (
            f"Posterior(method={self.method!r}, guide={self.guide!r}, n={self.num_samples}, "
            f"sites={list(self.sites)!r}, log_evidence={evidence})"
        )

    def __rich__(self) -> rich.console.RenderableType:
        """A table of each site's likeliest values, and below it what they are worth."""
        return summary.report(self)

    @property
    def _exact(self) -> bool:
        return self.method == "exact"

    def _require_weight(self) -> None:
        if not self._possible:
            raise ValueError(summary.failure(self))

    @property
    def _names(self) -> tuple[str, ...]:
        """Names of the latents, then of the computed values."""
        return tuple(dict.fromkeys([*self.sites, *self.computed_sites]))

    def _column(self, name: str, absent: Any) -> list[Any]:
        """One value in all samples; `absent` where an execution did not reach it."""
        if name in self._names:
            rows = zip(self.samples, self.computed, strict=True)
            return [sample.get(name, computed.get(name, absent)) for sample, computed in rows]
        if name == RETURN and self.returns is not None:
            return list(self.returns)
        known = ", ".join(repr(name) for name in self.sites) or "none"
        message = f"no sample has met a latent site {name!r}; those met are: {known}"
        if self.computed_sites:
            message += f"; the computed values are: {', '.join(map(repr, self.computed_sites))}"
        if name == RETURN:
            message += "; the return values are not known"
        raise UnknownSiteError(message)

    def _check_length(self, name: str, values: Sequence[Any] | Array | None) -> None:
        if values is not None and len(values) != self.num_samples:
            raise ValueError(
                f"{name} has {len(values)} entries, but there are {self.num_samples} samples"
            )

    def _per_sample(self, name: str, values: LogWeights | None) -> Array | None:
        """An array of shape [n] in float64; unlike log weights, these may be infinite."""
        if values is None:
            return None
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu().double().numpy()
        array = np.array(values, dtype=np.float64)
        if array.ndim != 1:
            raise ValueError(f"{name} must have shape [n], got {array.shape}")
        self._check_length(name, array)
        return array
