"""Small networks on the policy's hidden state: proposals for numbers, and learned flows.

A head reads the LM's state after a latent's context. For a numeric latent it gives the parameters
of a distribution of the site's own family, relative to the prior's: untrained, it proposes the
prior itself. The flow head gives log F of a state of the program, nats; at the root that is log Z,
which trajectory balance learns (Malkin et al. 2022, arXiv 2201.13259).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from langppl.lm.counts import as_count
from langppl.lm.formats import shown
from langppl.lm.seeds import seeded
from langppl.lm.tensors import check_like, packed, unpacked

FLOW = "flow"
HEADS_FILE = "heads.safetensors"
HIDDEN = 64
"""Width of a head's one hidden layer."""
_FAMILIES: dict[type, tuple[str, int]] = {
    dist.Beta: ("beta", 2),
    dist.Gamma: ("gamma", 2),
    dist.Normal: ("normal", 2),
}
_NAME = re.compile(rf"{FLOW}|[a-z]+-\d+(x\d+)?")
_MOST = 2**31
_SAME = 1e-5
"""Spread of normalised states below which they count as one and the same."""
_WIDEST = 6.0
"""Most nats by which a head multiplies or divides a prior's shape, rate or scale."""


def head_of(fn: Any) -> tuple[str, int] | None:
    """The head that proposes for a distribution: its name and how many numbers it gives.

    Heads are shared by the sites of one family and size; the context tells them apart.

    Returns:
        None if there is no head for it: it is then drawn from the prior.
    """
    base = _base(fn)
    if type(base) is dist.Categorical:
        size, options = base.batch_shape.numel(), int(base.logits.shape[-1])
        return f"categorical-{size}x{options}", size * options
    if type(base) in _FAMILIES:
        family, count = _FAMILIES[type(base)]
        size = base.batch_shape.numel()
        return f"{family}-{size}", count * size
    return None


def _base(fn: Any) -> Any:
    return fn.base_dist if isinstance(fn, dist.Independent) else fn


class Heads(nn.Module):
    """The heads of one guide.

    Args:
        width: numbers in the LM's state.
        seed: of their first weights.
    """

    centre: Tensor
    spread: Tensor
    is_centred: Tensor

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.width, self.seed = width, seed
        self.made = nn.ModuleDict()
        self.register_buffer("centre", torch.zeros(width, dtype=torch.float32))
        self.register_buffer("spread", torch.ones(width, dtype=torch.float32))
        self.register_buffer("is_centred", torch.zeros((), dtype=torch.bool))

    # What is made in inference mode can never be trained.
    @torch.inference_mode(False)
    def ensure(self, name: str, count: int) -> bool:
        """Makes a head if there is none of this name; whether it did."""
        if name in self.made:
            return False
        with seeded(self.seed):
            inner = nn.Linear(self.width, HIDDEN, dtype=torch.float32)
            outer = nn.Linear(HIDDEN, count, dtype=torch.float32)
        nn.init.zeros_(outer.weight)
        nn.init.zeros_(outer.bias)
        self.made[name] = nn.Sequential(inner, nn.GELU(), outer)
        return True

    def keep_only(self, names: Iterable[str]) -> None:
        """Drops all heads but some."""
        for name in set(self.made) - set(names):
            del self.made[name]

    def centre_on(self, states: Tensor) -> None:
        """Fixes what heads see of a state: how it differs from the others of a first batch.

        A state says mostly what all states of an LM have in common, and of what tells one context
        from another some hundredths.

        Args:
            states: shape [n, width].
        """
        seen = self._normed(states.detach())
        spread = seen.std(0, correction=0)
        with torch.no_grad():
            self.is_centred.fill_(True)
            if float(spread.mean()) > _SAME:
                self.centre.copy_(seen.mean(0))
                self.spread.copy_(spread.clamp_min(0.1 * float(spread.mean())))

    def _normed(self, states: Tensor) -> Tensor:
        # A state's size varies by orders of magnitude between LMs.
        own = states.to(self.centre.device, torch.float32)
        return nn.functional.layer_norm(own, (self.width,))

    def numbers(self, name: str, states: Tensor) -> Tensor:
        """What a head makes of states [..., width]: shape [..., count], float32."""
        found: Tensor = self.made[name]((self._normed(states) - self.centre) / self.spread)
        return found

    def flow(self, state: Tensor) -> Tensor:
        """Log F of a program's state, nats, a scalar."""
        return self.numbers(FLOW, state)[..., 0]

    def start_flow(self, log_z: float) -> None:
        """Lets an untrained flow begin at a first estimate of log Z, nats."""
        layer: Any = self.made[FLOW][-1]  # type: ignore[index]
        with torch.no_grad():
            layer.bias.fill_(log_z)

    def proposal(self, fn: Any, state: Tensor) -> Any:
        """What is proposed for a numeric site, a distribution like the site's own.

        Args:
            fn: the site's distribution.
            state: shape [width].
        """
        found = head_of(fn)
        assert found is not None
        if found[0] not in self.made:
            return fn
        base = _base(fn)
        # The LM may be elsewhere; what is proposed lives where the site's own distribution does.
        # Its numbers go up to the site's precision: draws of a coarser grid have no density there.
        own = self.numbers(found[0], state)
        for parameter in _parameters(base):
            own = own.to(parameter.device, torch.promote_types(parameter.dtype, own.dtype))
        shape = (*base.batch_shape, -1)
        own = own.reshape(shape)
        made: Any
        if isinstance(base, dist.Categorical):
            made = dist.Categorical(logits=base.logits.to(own) + own)
        else:
            first, second = own.unbind(-1)
            if isinstance(base, dist.Beta):
                made = dist.Beta(
                    base.concentration1.to(own) * _factor(first),
                    base.concentration0.to(own) * _factor(second),
                )
            elif isinstance(base, dist.Gamma):
                made = dist.Gamma(
                    base.concentration.to(own) * _factor(first),
                    base.rate.to(own) * _factor(second),
                )
            else:
                scale = base.scale.to(own)
                made = dist.Normal(base.loc.to(own) + scale * first, scale * _factor(second))
        return made.to_event(len(fn.event_shape)) if made.event_shape != fn.event_shape else made

    # -- keeping ------------------------------------------------------------------------------

    @property
    def specification(self) -> dict[str, int]:
        """Name and count of each head, by which they can be made again."""
        return {n: m[-1].out_features for n, m in self.made.items()}  # type: ignore[index]

    def packed(self) -> bytes | None:
        """The content of the heads' file; None if there are none, and so no file."""
        return packed(self.state_dict()) if self.made else None

    def load(self, folder: str | os.PathLike[str], specification: Mapping[str, int]) -> None:
        """Reads a file of what `packed` gave.

        Args:
            folder: where it is.
            specification: the heads that it is to have (`specification_of`).

        Raises:
            ValueError: if the file is missing, corrupt or of other heads.
        """
        if not specification:
            return
        path = Path(folder).expanduser() / HEADS_FILE
        if not path.is_file():
            raise ValueError(f"{shown(folder)} is no whole guide folder: {HEADS_FILE} is missing")
        tensors = unpacked(path)
        check_like(shown(path), tensors, self.expected(specification))
        for name, count in specification.items():
            self.ensure(name, count)
        self.load_state_dict(tensors)

    def expected(self, specification: Mapping[str, int]) -> dict[str, Tensor]:
        """What heads would have for tensors, by shape alone: they take no memory."""
        with torch.device("meta"):
            hollow = Heads(self.width, self.seed)
            for name, count in specification.items():
                hollow.ensure(name, count)
        return hollow.state_dict()


def specification_of(record: Any) -> dict[str, int]:
    """Name and count of each head, as a file has them.

    Raises:
        ValueError: if these are none.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"heads must be counts by names, got {record!r}")
    for name, count in record.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"there is no head {name!r}")
        if as_count(f"the count of head {name!r}", count, 1) >= _MOST:
            raise ValueError(f"the count of head {name!r} must be below {_MOST}, got {count}")
    return dict(record)


def _parameters(base: Any) -> list[Tensor]:
    return [getattr(base, name) for name in base.arg_constraints]


def _factor(number: Tensor) -> Tensor:
    return (_WIDEST * torch.tanh(number / _WIDEST)).exp()
