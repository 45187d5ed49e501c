"""How many tokens went through an LM: the work of a method, whatever the machine.

Every forward pass goes through `LM.states` or `langppl.lm.packed.run`, which count what they are
given: each node of a packed trie once, each token of a prompt or a prefix once however many strings
go on from it, and no padding. So it is what was computed, not what was asked for; scores that are
remembered (`langppl.lm.memo`) count nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Tokens that an LM has read.

    Attributes:
        drawn: while strings were drawn, their prompts included.
        scored: for anything else: strings that were scored, states, and training. A backward pass
            counts nothing, but a row that is run again for it counts again.

    Example:
        >>> before = lm.tally.copy()
        >>> posterior = infer(story, *pair, num_samples=8)
        >>> used = lm.tally - before
        >>> used.drawn > 0 and used.scored > 0
        True
    """

    drawn: int = 0
    scored: int = 0
    _draws: bool = field(default=False, init=False, repr=False, compare=False)

    @property
    def total(self) -> int:
        """All tokens."""
        return self.drawn + self.scored

    def add(self, tokens: int) -> None:
        """Counts the tokens of one forward pass."""
        if self._draws:
            self.drawn += tokens
        else:
            self.scored += tokens

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Within the block, tokens count as drawn."""
        before, self._draws = self._draws, True
        try:
            yield
        finally:
            self._draws = before

    def copy(self) -> Tally:
        """The counts of this moment."""
        return Tally(self.drawn, self.scored)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.drawn + other.drawn, self.scored + other.scored)

    def __sub__(self, other: Tally) -> Tally:
        return Tally(self.drawn - other.drawn, self.scored - other.scored)
