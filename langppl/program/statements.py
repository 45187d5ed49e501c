"""The statements of a program: `sample`, `factor`, `potential`, and what changes a model.

A site is a Pyro site. This module is the one typed door between strings and Pyro, whose types
speak of tensors only, and completes what Pyro cannot do with text.
"""

from __future__ import annotations

import copy
import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.distribution import Distribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK

from langppl.distributions import StringDistribution, Tempered, Text
from langppl.distributions.sites import naming
from langppl.distributions.tempered import TemperedFactor
from langppl.lm.texts import plain_text
from langppl.program.keys import MUTABLE

P = ParamSpec("P")
R = TypeVar("R")
Model = Callable[..., Any]

Number = float | np.floating[Any] | np.integer[Any]
Numbers = torch.Tensor | npt.NDArray[Any] | Number | np.bool_ | Sequence["Numbers"]
"""What a site that is not over strings may be observed as."""


class BadNumber(ValueError):
    """A log-probability or log weight that is NaN or +inf; names the site."""


# Pyro's come first: their mixin has a base without types, by which a checker takes them for any
# class that is asked for, strings' too.
@overload
def sample(name: str, dist: TorchDistributionMixin, obs: Numbers | None = None) -> torch.Tensor: ...
@overload
def sample(name: str, dist: StringDistribution | Tempered, obs: str | None = None) -> Text: ...
@overload
def sample(name: str, dist: Distribution, obs: str | Numbers | None = None) -> Any: ...


def sample(
    name: str, dist: Distribution, obs: str | Numbers | None = None
) -> Text | str | torch.Tensor:
    """Draws from a distribution, or observes a value.

    Args:
        name: the site's name, unique within an execution.
        dist: an `LMString`, `LMChoice` or `Tempered`, or one of Pyro's distributions.
        obs: the observed value: a string at a string site, else a tensor, a number, or an array
            or a list of numbers.

    Returns:
        The site's value; a `Text`, which is a `str`, at a string site that is drawn.

    Raises:
        TypeError: if the name, the distribution or an observation is of the wrong type.
        ValueError: for a string site in a vectorised plate, or a NaN that is observed.
    """
    check_name(name)
    with naming(name):
        if isinstance(dist, Tempered):
            return _sample_tempered(name, dist, obs)
        if isinstance(dist, StringDistribution):
            check_string_site(name, obs)
            obs = as_value(obs)
            for handler in _PYRO_STACK:
                if isinstance(handler, IndepMessenger) and handler._vectorized:
                    raise plate_error(name, handler.name)
        else:
            _check_distribution(name, dist)
            obs = as_value(obs, dist)
            if obs is not None:
                check_observation(name, dist, obs)
        if isinstance(obs, torch.Tensor) and bool(torch.isnan(obs).any()):
            raise ValueError(f"site {name!r}: the observation {obs!r} has NaN in it")
        value = pyro.sample(name, cast(Any, dist), obs=cast(Any, obs))
        if isinstance(dist, StringDistribution):
            check_string_site(name, value)
        return value


def check_name(name: object) -> None:
    """Raises TypeError for what is no site's name."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"a site's name must be a non-empty string, got {name!r}; it comes first")


def _check_distribution(name: str, fn: Any) -> None:
    """Raises TypeError unless Pyro can sample from it."""
    if callable(fn) and callable(getattr(fn, "log_prob", None)):
        return
    kind = type(fn).__name__
    if isinstance(fn, torch.distributions.Distribution):
        mend = f"that is torch's own; write pyro.distributions.{kind}"
    else:
        mend = "give an LMString, LMChoice or Tempered, or one of pyro.distributions"
    raise TypeError(f"site {name!r} needs a distribution, got {fn!r} ({kind}); {mend}")


def check_string_site(name: str, value: object) -> None:
    """Raises TypeError unless a string site's value is a string (or None: to be drawn)."""
    if value is not None and not isinstance(value, str):
        is_missing = type(value).__name__ == "NAType" or (
            isinstance(value, float) and math.isnan(value)
        )
        mend = "a missing value? give None, and the site is latent" if is_missing else "give a str"
        raise TypeError(
            f"site {name!r} is a string site, but its value is {value!r} "
            f"({type(value).__name__}); {mend}"
        )


def check_observation(name: str, fn: Any, value: object) -> None:
    """Raises TypeError unless a value is of the kind that a site's distribution has."""
    if isinstance(fn, StringDistribution):
        if value is None:
            raise TypeError(f"site {name!r} is a string site, and its observation is None")
        check_string_site(name, value)
    elif not isinstance(value, torch.Tensor):
        raise TypeError(
            f"site {name!r} is no string site ({type(fn).__name__}), but its value is "
            f"{value!r} ({type(value).__name__}); give a number, a tensor or an array"
        )


def plate_error(site: str, plate: str) -> ValueError:
    """What is raised for a string site in a vectorised plate."""
    return ValueError(
        f"string site {site!r} is inside the vectorised plate {plate!r}, and strings are drawn one "
        f'by one; use a sequential plate: for i in pyro.plate("{plate}", n): '
        f'lp.sample(f"{site}_{{i}}", ...)'
    )


def _sample_tempered(name: str, tempered: Tempered, obs: Any) -> Text:
    value: Text = sample(name, tempered.base, obs)
    # A site that `do` removed has no density, and so no tempered one.
    removed = any(isinstance(h, _Do) and name in h.data for h in _PYRO_STACK)
    if _PYRO_STACK and not removed and not _is_hidden(name, tempered.base, value, obs):
        factor_of_tempered(name, tempered, value)
    return value


def factor_of_tempered(name: str, tempered: Tempered, value: str) -> None:
    """The factor that makes a site tempered.

    Args:
        name: of the site.
        tempered: its distribution.
        value: its value.
    """
    fn: Any = TemperedFactor(tempered.base, 1.0 / tempered.temperature - 1.0, value)
    pyro.sample(f"{name}/tempered", fn, obs=torch.empty(0), infer={"is_auxiliary": True})


def _is_hidden(name: str, fn: Any, value: Any, obs: Any) -> bool:
    """Whether Pyro's `block` hides a site from langppl's handler, which stands outside."""
    seen: Any = {
        "type": "sample",
        "name": name,
        "fn": fn,
        "value": value,
        "is_observed": obs is not None,
        "infer": {},
    }
    return any(isinstance(h, BlockMessenger) and h.hide_fn(seen) for h in _PYRO_STACK)


def factor(name: str, log_weight: torch.Tensor | Number) -> None:
    """Multiplies an execution's weight by exp(log_weight).

    Args:
        name: the site's name.
        log_weight: nats, a scalar; −inf makes the execution impossible.

    Raises:
        ValueError: if the weight is NaN, +inf, or not a scalar.
    """
    check_name(name)
    pyro.factor(name, _log_weight(f"factor {name!r}", log_weight))


class Potential(dist.Unit):
    """A factor whose value on a part of a string says how promising that part is.

    Attributes:
        has_prefix: whether it came with a `prefix`, whose −inf is final.
    """

    has_prefix: bool = False


class Unfinished(Messenger):
    """Around a run of a model on a string that still grows; it tells `potential` so.

    A handler, and no variable of the context, as a model may infer within itself: the strings of
    executions that it starts, whose stacks of handlers are their own, are whole.

    Args:
        evaluates: whether potentials are wanted at all.

    Attributes:
        error: what a `prefix` raised, or would not do as one; a model may catch it, and whoever
            tries it on unfinished texts passes over all other errors.
    """

    def __init__(self, evaluates: bool) -> None:
        super().__init__()
        self.evaluates = evaluates
        self.error: Exception | None = None

    def weigh(
        self, name: str, fn: Callable[[str], Any], prefix: Callable[[str], Any] | None, text: str
    ) -> torch.Tensor:
        """Log weight (nats) of a text so far; −inf where a plain function breaks on it."""
        if not self.evaluates:
            return torch.zeros((), dtype=torch.float64)
        if prefix is None:
            try:
                return _log_weight(f"potential {name!r}", fn(text))
            except Exception:  # whatever a function of whole texts makes of an unfinished one
                return torch.tensor(-math.inf, dtype=torch.float64)
        try:
            return _log_weight(f"prefix of potential {name!r}", prefix(text))
        except Exception as error:
            self.error = error
            raise


def potential(
    name: str,
    fn: Callable[[str], torch.Tensor | Number],
    text: str,
    *,
    prefix: Callable[[str], torch.Tensor | Number] | bool | None = None,
) -> None:
    """Multiplies an execution's weight by exp(fn(text)), and steers strings as they grow.

    To the posterior it is `factor(name, fn(text))`, counted once, of the whole text. Particles of
    `method="smc"` are also weighed while the string is not finished, by `prefix` if there is one,
    else by `fn`: their values telescope, so how often they are weighed never changes the posterior.

    Args:
        name: the site's name.
        fn: log weight (nats) of a whole text. On an unfinished text −inf, and an error, are passed
            over, for it may still become one of weight: what must not happen needs a `prefix`.
        text: the latent string, or a text made of it.
        prefix: log weight (nats) of the text so far, in the place of `fn`. Its −inf is final: it
            promises that no text that goes on so has weight, and the particle is dead. True for
            `fn` itself. Other methods than `"smc"` weigh by `fn` alone. All of them ask a
            `prefix` of its own too, wherever `fn` gives weight to a whole text, to hold it to its
            promise.

    Raises:
        ValueError: if a weight is NaN, +inf, or not a scalar, or if `fn` gives weight to a whole
            text that `prefix` promises has none.
        TypeError: if a weight is no number, or `prefix` no function.

    Example:
        >>> def letter():
        ...     z = sample("z", LMString(lm, "Dear", max_tokens=20))
        ...     potential("no z", lambda text: -math.inf if "z" in text else 0.0, z, prefix=True)
        >>> posterior = infer(letter, method="smc", num_samples=8)
    """
    check_name(name)
    if prefix is not None and not isinstance(prefix, bool) and not callable(prefix):
        raise TypeError(
            f"potential {name!r}: prefix must be a function of the text so far, or True for "
            f"the potential's own, got {prefix!r}"
        )
    own = fn if prefix else None
    early = prefix if callable(prefix) else own
    reading = next((h for h in reversed(_PYRO_STACK) if isinstance(h, Unfinished)), None)
    if reading is not None:
        value = reading.weigh(name, fn, early, text)
    else:
        value = _log_weight(f"potential {name!r}", fn(text))
        if early is not None and early is not fn and value > -math.inf:
            _check_promise(name, early, text, float(value))
    unit: Any = Potential(value)  # type: ignore[no-untyped-call]
    unit.has_prefix = early is not None
    pyro.sample(name, unit, obs=unit.sample(), infer={"is_auxiliary": True})


def _check_promise(name: str, prefix: Callable[[str], Any], text: str, value: float) -> None:
    """Raises ValueError where particles die that the posterior has."""
    if _log_weight(f"prefix of potential {name!r}", prefix(text)) == -math.inf:
        raise ValueError(
            f"potential {name!r}: of the whole text {str(text)!r} prefix gives -inf, which "
            f"promises that nothing that begins so has weight, and fn gives {value:g}; let fn be "
            "-inf there too, or prefix finite"
        )


def _log_weight(what: str, log_weight: torch.Tensor | Number) -> torch.Tensor:
    is_truth = isinstance(log_weight, bool | np.bool_) or (
        isinstance(log_weight, torch.Tensor) and log_weight.dtype == torch.bool
    )
    if is_truth:
        raise TypeError(
            f"{what} must be a log weight in nats, got {log_weight!r}; for a condition that must "
            "hold give `0.0 if condition else -math.inf`"
        )
    try:
        value = torch.as_tensor(log_weight, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} must be one number, got {log_weight!r}") from error
    if value.numel() != 1:
        raise ValueError(f"{what} must be one number, got shape {tuple(value.shape)}")
    if math.isnan(float(value)) or float(value) == math.inf:
        raise BadNumber(f"{what} is {float(value)}; a log weight must be below infinity")
    return value.reshape(())


class Boxed:
    """The value of a tool call or of a deterministic site; Pyro takes no None."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


class Known(dist.Distribution):
    """A site that is a function of others: it has a value and no density.

    Attributes:
        evaluate: makes the value.
        inputs: what it is made of, for the graph.
        family: `"call"` or `"deterministic"`.
    """

    def __init__(self, evaluate: Callable[[], Any], inputs: tuple[Any, ...], family: str) -> None:
        self.evaluate = evaluate
        self.inputs = inputs
        self.family = family

    def __call__(self, *args: Any, **kwargs: Any) -> Boxed:
        """The value, boxed."""
        return self.sample()

    def sample(self, *args: Any, **kwargs: Any) -> Boxed:
        """Evaluates."""
        return Boxed(self.evaluate())

    def log_prob(self, x: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """0 nats: nothing is random here."""
        return torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Constant:
    """Evaluates to a value that is there already; unlike a lambda it can be pickled."""

    value: Any

    def __call__(self) -> Any:
        """The value."""
        return self.value


def deterministic(name: str, value: R) -> R:
    """Records a value that is computed from others, text included, as a site of the trace.

    `Posterior.computed` keeps it for each sample, so `probabilities(name)` has its distribution.

    Args:
        name: the site's name.
        value: the value. A list, dict or set that the model changes afterwards is kept as it is at
            the end.

    Returns:
        The value.
    """
    check_name(name)
    return cast(R, meet_known(name, Known(Constant(value), (value,), "deterministic")))


def meet_known(name: str, fn: Known) -> Any:
    """The value of a site that is a function of others."""
    # Drawn, not observed, so that a replay takes the recorded result and runs no tool.
    result: Any = pyro.sample(name, cast(Any, fn), infer={"is_auxiliary": True})
    return result.value if isinstance(result, Boxed) else result


def unboxed(value: Any) -> Any:
    """What a tool call or a deterministic site came to, for whoever may change it."""
    return own_copy(value.value if isinstance(value, Boxed) else value)


def own_copy(result: Any) -> Any:
    """A tool's result for one execution, which may change it: others get the same result."""
    if isinstance(result, MUTABLE):
        try:
            return copy.deepcopy(result)
        except Exception:  # whatever does not let itself be copied
            return result
    return result


def _check_changeable(model: Any, by: str, instead: str) -> None:
    if not callable(model):
        raise TypeError(
            f"{by} changes a model, a function, and got {model!r}; of a compiled program {instead}"
        )


def condition(model: Callable[P, R], data: Mapping[str, Any]) -> Callable[P, R]:
    """The same model with some sites observed.

    Args:
        model: a langppl (or Pyro) model.
        data: site → value.

    Returns:
        A model of the same arguments.
    """
    _check_changeable(model, "condition", "give the model, or take program.observing(...)")
    return _changed(model, dict(data), Named("condition", frozenset(data)), _Condition)


def do(model: Callable[P, R], data: Mapping[str, Any]) -> Callable[P, R]:
    """The same model with some sites set from outside: no density, no LM call.

    Args:
        model: a langppl (or Pyro) model.
        data: site → value.

    Returns:
        A model of the same arguments, in which those sites do not exist.
    """
    _check_changeable(model, "do", "give the model")
    return _changed(model, dict(data), Named("do", frozenset(data)), _Do)


def _changed(
    model: Callable[P, R],
    data: dict[str, Any],
    named: Named,
    handler: Callable[[dict[str, Any]], Messenger],
) -> Callable[P, R]:
    """A model under a handler of its own in each run."""

    @functools.wraps(model)
    def changed(*args: P.args, **kwargs: P.kwargs) -> R:
        with handler(data), _Meeting(named):
            return model(*args, **kwargs)

    changed.langppl_named = (named, *named_in(model))  # type: ignore[attr-defined]
    return changed


@dataclass(frozen=True)
class Named:
    """The sites that `condition` or `do` names, and which of them a run has met.

    Attributes:
        by: which of the two.
        names: of the sites.
        met: of these.
    """

    by: str
    names: frozenset[str]
    met: set[str] = field(default_factory=set)


class _Meeting(Messenger):
    """Notes which named sites are met."""

    def __init__(self, named: Named) -> None:
        super().__init__()
        self.named = named

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.named.names:
            self.named.met.add(msg["name"])


def named_in(model: Model) -> tuple[Named, ...]:
    """What `condition` and `do` name in a model that they have changed."""
    found: tuple[Named, ...] = getattr(model, "langppl_named", ())
    return found


def as_value(value: Any, fn: Any = None) -> Any:
    """A site's value as Pyro takes it: a number becomes a tensor, of floats for integers too.

    A string of whatever class becomes a plain one; a `Text` stays as it is.

    Args:
        value: a string, a number, or an array of numbers; anything else stays as it is.
        fn: the site's distribution if it is not over strings: lists of numbers are then taken too,
            and numbers get the precision of its parameters.
    """
    if isinstance(value, str):
        return value if isinstance(value, Text) else plain_text(value)
    if isinstance(value, numbers.Real | np.bool_):
        return torch.tensor(float(value), dtype=_precision(fn))
    if isinstance(value, np.ndarray if fn is None else np.ndarray | list | tuple):
        try:
            return torch.tensor(value, dtype=_precision(fn))
        except (TypeError, ValueError, RuntimeError):  # of no numbers, or of no shape
            return value
    return value


def _precision(fn: Any) -> torch.dtype:
    """The type of a distribution's parameters; torch's default if it has none of floats."""
    while fn is not None:
        for name in getattr(fn, "arg_constraints", None) or ():
            parameter = getattr(fn, name, None)
            if isinstance(parameter, torch.Tensor) and parameter.dtype.is_floating_point:
                return parameter.dtype
        fn = getattr(fn, "base_dist", None)
    return torch.get_default_dtype()


def _valued(value: Any, fn: Any) -> Any:
    """A value that a site of any kind is given."""
    return as_value(value, None if isinstance(fn, StringDistribution | Known) else fn)


class _Condition(ConditionMessenger):
    """Pyro's, which takes numbers as `obs=` does."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.data:
            msg["value"] = _valued(msg["value"], msg["fn"])


class _Do(Messenger):
    """Answers some sites with given values and hides them from every outer handler."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__()
        self.data = data

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.data:
            value = self.data[msg["name"]]
            # What a tool returns may be anything; what is drawn is a string or a tensor.
            msg["value"] = value if isinstance(msg["fn"], Known) else _valued(value, msg["fn"])
            msg["done"] = msg["stop"] = True
