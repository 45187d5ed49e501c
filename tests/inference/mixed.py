"""A program with a latent of every kind, for tests of several methods."""

from __future__ import annotations

import pyro.distributions as dist
import torch

from langppl import LMChoice, LMString, factor, sample
from langppl.distributions import Tempered
from langppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=5, merged=["ab", "b."])


def everything() -> None:
    """Numbers, choices, a tempered string and factors between strings."""
    p = sample("p", dist.Categorical(logits=torch.tensor([0.3, -0.2])))
    kind = sample("kind", LMChoice(LM, "a", ["a", "b."]))
    text = sample("text", Tempered(LMString(LM, f"b{kind}", max_tokens=2, allow=["a", "b"]), 2.0))
    factor("few", -0.5 * text.count("b") * float(p))
    more = sample("more", LMString(LM, f"{text}a" if p < 1 else "b", max_tokens=2))
    sample("seen", LMString(LM, f"{kind}{more}"), obs="bb")
