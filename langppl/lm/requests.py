"""The door to the transformer: what a distribution asks for, and who answers.

A distribution never calls a model. It describes what it needs as requests and *performs* them.
Inside a scheduler, performing hands the requests over and waits, so that the requests of many
executions are served in one batch; anywhere else they are served at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from numpy.typing import NDArray

from langppl.lm import adapters
from langppl.lm.nested import opened, reset
from langppl.lm.rules import BoundRules, Path

if TYPE_CHECKING:
    from langppl.lm.model import LM

P = ParamSpec("P")
R = TypeVar("R")

Server = Callable[[Sequence["Request"]], list["Reply"]]

_alone: Any = threading.RLock()
_door = threading.RLock()
_last = threading.Lock()


def alone(fn: Callable[P, R]) -> Callable[P, R]:
    """A function that other threads wait for, if they call it or another such one.

    Pyro's handlers, an LM's active adapter and its caches are one for all threads of a process.
    Threads are let in in the order in which they came. What an interrupt leaves half undone is
    undone at the end (see `undone_after`).
    """

    @functools.wraps(fn)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        if _alone._is_owned():
            return fn(*args, **kwargs)
        # Each waits for the one before it and is waited for by the next. Blocks of Python's own
        # locks alone: no interrupt leaves one of them held. The order may suffer from an interrupt
        # of one that waits, so `_alone` is what keeps others out.
        mine = threading.Lock()
        with mine, _before(mine), _alone:
            return _undoing(fn, *args, **kwargs)

    return waiting


def _before(mine: threading.Lock) -> threading.Lock:
    """Stands in line; returns what the one before holds until it is done."""
    global _last
    with _door:
        before, _last = _last, mine
        return before


Undo = Callable[[], None]
_looks: list[Callable[[], Undo]] = []


def undone_after(look: Callable[[], Undo]) -> Callable[[], Undo]:
    """Has a function called at the beginning of the outermost function that is alone.

    What it returns is called at the end, once or twice, and takes back what is left over then.
    A block's own end is no sure place: an interrupt may come before its first line or within it.
    """
    _looks.append(look)
    return look


def _undoing(fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    undo = [look() for look in _looks]
    try:
        try:
            # Context variables that are not reset go with the context.
            return copy_context().run(fn, *args, **kwargs)
        finally:
            for each in undo:
                each()
    finally:
        # The first time may have been interrupted.
        for each in undo:
            each()


_orphaned: list[Callable[[], None]] = []


def when_orphaned(mend: Callable[[], None]) -> None:
    """Has a function called in a process that was forked while another thread was at work.

    That thread is not there, and what it would have undone is left as it was.
    """
    _orphaned.append(mend)


def _mend_fork() -> None:
    global _alone, _door, _last
    # Threads that stood in line are not there.
    _door, _last = threading.RLock(), threading.Lock()
    if _alone.acquire(blocking=False):
        _alone.release()
        return
    _alone = threading.RLock()
    for mend in _orphaned:
        mend()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mend_fork)


_server: ContextVar[Server | None] = ContextVar("langppl_server", default=None)


@dataclass(frozen=True)
class Beside:
    """What an LM reads beside the prompt of a string that is guided (see `langppl.lm.guided`).

    Attributes:
        base: the ids of the string's own prompt.
        without: the prompt's, without what the string is to be guided by.
        scale: how much the difference counts that this makes.
        adapter: name of the adapter on the LM under which it reads both, None for the LM itself.
    """

    base: tuple[int, ...]
    without: tuple[int, ...]
    scale: float
    adapter: str | None = None


@dataclass(frozen=True)
class Guided:
    """What a guide has an LM read in place of a string's own prompt, to be guided by it.

    Attributes:
        prompt: the ids.
        without: the same without what the string is to be guided by.
        scale: how much the difference counts.
    """

    prompt: tuple[int, ...]
    without: tuple[int, ...]
    scale: float

    def beside(self, base: tuple[int, ...], adapter: str | None) -> Beside:
        """What is read beside it for a string with a prompt and an adapter of its own."""
        return Beside(base, self.without, self.scale, adapter)


Reading = tuple[int, ...] | Guided
"""What a guide has an LM read in place of a string's own prompt."""


def read_as(
    reading: Reading | None, own: tuple[int, ...], adapter: str | None
) -> tuple[tuple[int, ...], Beside | None, int]:
    """The prompt of a request, what is read beside it, and how long the longer of them is.

    Args:
        reading: what a guide has the LM read, None for the string's own prompt.
        own: the ids of that.
        adapter: the string's own adapter.
    """
    if isinstance(reading, Guided):
        longest = max(len(reading.prompt), len(reading.without))
        return reading.prompt, reading.beside(own, adapter), longest
    prompt = own if reading is None else reading
    return prompt, None, len(prompt)


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Ask for the log-probabilities of the actions of one string.

    Attributes:
        lm: the LM.
        prompt: ids before the string.
        path: the string's actions.
        temperature: divides the logits.
        adapter: name of the adapter on the LM, None for the LM itself.
        beside: what guides the string; None for the LM's own probabilities.
    """

    lm: LM
    prompt: tuple[int, ...]
    path: Path
    temperature: float = 1.0
    adapter: str | None = None
    beside: Beside | None = None


@dataclass(frozen=True)
class ScoreReply:
    """Log-probabilities in nats, float64.

    Attributes:
        tokens: shape [T]; of each token that goes on.
        ending: of the ending action; 0 where the ending has probability one or is open.
        canonical: shape [T + 1]; of the canonical ending action before each token and at the end,
            −inf where no string may end.
    """

    tokens: NDArray[Any]
    ending: float
    canonical: NDArray[Any]

    @property
    def log_prob(self) -> float:
        """Log-probability of the whole string."""
        return float(self.tokens.sum() + self.ending)


@dataclass(frozen=True, eq=False)
class DrawRequest:
    """Ask for one string drawn token by token.

    Attributes:
        lm: the LM.
        prompt: ids before the string.
        rules: what the string may be.
        limit: most actions (see `BoundRules.limit`), None for an open string.
        key: what the random numbers depend on; equal keys give equal strings.
        temperature: divides the logits.
        adapter: name of the adapter on the LM, None for the LM itself.
        length: stop after so many tokens, those begun with included, wherever the string stands.
        begun: ids of the string that are there already. The draw goes on after them; each token
            depends on its place in the whole string, so a string drawn in pieces is the string
            drawn at once.
        beside: what guides the string; None for the LM's own probabilities.
        candidates: how many actions to draw without replacement for the next place, of which none
            is taken; 0 to draw the string.
    """

    lm: LM
    prompt: tuple[int, ...]
    rules: BoundRules
    limit: int | None
    key: tuple[int | str, ...]
    temperature: float = 1.0
    adapter: str | None = None
    length: int | None = None
    begun: tuple[int, ...] = ()
    beside: Beside | None = None
    candidates: int = 0

    @property
    def read(self) -> tuple[int, ...]:
        """What the LM reads before the first token that is drawn."""
        return self.prompt + self.begun

    @property
    def most_tokens(self) -> int | None:
        """Most tokens that are drawn, None for no limit."""
        known = [n - len(self.begun) for n in (self.limit, self.length) if n is not None]
        return min(known, default=None)

    def scoring(self, path: Path) -> ScoreRequest:
        """Ask for the log-probabilities with which it draws the actions of a string."""
        temperature = self.rules.rules.temperature * self.temperature
        return ScoreRequest(self.lm, self.prompt, path, temperature, self.adapter, self.beside)


@dataclass(frozen=True)
class DrawReply:
    """A drawn string.

    Attributes:
        ids: its tokens, those begun with included; the last may run on past the stop that ends
            the text.
        text: its text.
        log_prob: log-probability of what was drawn, nats.
        is_dead: whether it stopped where no action was legal.
        is_ended: whether an ending action or its limit ended it, not the `length` asked for.
        candidates: what may come next, where that was asked for.
    """

    ids: tuple[int, ...]
    text: str
    log_prob: float
    is_dead: bool = False
    is_ended: bool = False
    candidates: Candidates | None = None


@dataclass(frozen=True)
class Candidates:
    """The next actions of a string, in the order in which they are drawn without replacement.

    Attributes:
        log_probs: shape [n], nats; with which each is the next action.
        left: shape [n + 1]; the probability of all actions but the first k.
        take: the string after one of them, by its number; its `log_prob` is the action's own.
    """

    log_probs: NDArray[Any]
    left: NDArray[Any]
    take: Callable[[int], DrawReply]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.log_probs)


@dataclass(frozen=True, eq=False)
class StateRequest:
    """Ask for what an LM makes of a text: its state after the last token.

    Attributes:
        lm: the LM.
        prompt: the ids.
        adapter: name of the adapter on the LM, None for the LM itself.
    """

    lm: LM
    prompt: tuple[int, ...]
    adapter: str | None = None


@dataclass(frozen=True)
class StateReply:
    """A state.

    Attributes:
        state: shape [width], float32 (see `LM.states`).
    """

    state: NDArray[Any]


Request = ScoreRequest | DrawRequest | StateRequest
Reply = ScoreReply | DrawReply | StateReply


def perform(requests: Sequence[Request]) -> list[Reply]:
    """Has requests answered, by the scheduler if there is one, else at once.

    Args:
        requests: any mix of requests, for any LMs.

    Returns:
        One reply for each request, in their order.
    """
    if not requests:
        return []
    server = _server.get()
    return serve(requests) if server is None else server(requests)


@alone
def serve(requests: Sequence[Request]) -> list[Reply]:
    """Answers requests in batches, grouped by kind, LM and adapter; scores may be remembered."""
    from langppl.lm.decoding import draw
    from langppl.lm.scoring import score, states

    groups: dict[tuple[Any, ...], list[int]] = {}
    for at, request in enumerate(requests):
        groups.setdefault((type(request), id(request.lm), *_passes_of(request)), []).append(at)
    replies: dict[int, Reply] = {}
    for indices in groups.values():
        batch = [requests[at] for at in indices]
        answers: Sequence[Reply]
        if scores := [r for r in batch if isinstance(r, ScoreRequest)]:
            answers = scores[0].lm.memo.answer(scores, score)
        elif draws := [r for r in batch if isinstance(r, DrawRequest)]:
            answers = draw(draws)
        else:
            answers = states([r for r in batch if isinstance(r, StateRequest)])
        replies.update(zip(indices, answers, strict=True))
    return [replies[at] for at in range(len(requests))]


def _passes_of(request: Request) -> tuple[str | None, ...]:
    """The adapters of the passes that a request takes: guided ones take more than one."""
    beside = None if isinstance(request, StateRequest) else request.beside
    return (request.adapter,) if beside is None else (request.adapter, beside.adapter)


@contextlib.contextmanager
def served_by(server: Server | None) -> Iterator[None]:
    """Within the block, `perform` hands its requests to `server`."""
    token = _server.set(server)
    try:
        yield
    finally:
        reset(_server, token)


def wait() -> None:
    """Within a scheduler, lets its other executions go on."""
    server = _server.get()
    assert server is not None
    server([])


@contextlib.contextmanager
def watched_by(watch: Callable[[Sequence[Request]], None]) -> Iterator[None]:
    """Within the block, `watch` sees what is asked for before it is answered; it may raise.

    It does not see what inferences within the block ask for.
    """
    outer = _server.get()

    def server(requests: Sequence[Request]) -> list[Reply]:
        watch(requests)
        return serve(requests) if outer is None else outer(requests)

    with served_by(server):
        yield


Asked = tuple["LM", str | None]
"""An LM, and the adapter under which it was asked."""

Note = Callable[[Iterable[Asked]], None]
_notes: ContextVar[tuple[Note, ...]] = ContextVar("langppl_notes", default=())


@contextlib.contextmanager
def noted_by(note: Note) -> Iterator[None]:
    """Within the block, `note` sees which LMs are asked, before they answer; it may raise.

    What inferences within the block ask counts, and what led to results that are remembered.
    """
    token = _notes.set((*_notes.get(), note))
    try:
        with watched_by(lambda requests: note((r.lm, a) for r in requests for a in _passes_of(r))):
            yield
    finally:
        reset(_notes, token)


def tell(asked: Iterable[Asked]) -> None:
    """Shows the LMs that are asked to whoever takes note."""
    if notes := _notes.get():
        every = list(asked)
        for note in notes:
            note(every)


_states: ContextVar[dict[tuple[int, str | None], tuple[Any, object]] | None] = ContextVar(
    "langppl_states", default=None
)
_digests: ContextVar[dict[tuple[int, str], tuple[Any, object, bytes]] | None] = ContextVar(
    "langppl_digests", default=None
)


@contextlib.contextmanager
def same_weights() -> Iterator[None]:
    """Within the block the state of an LM's weights is looked at once, until they are trained."""
    with opened(_states), opened(_digests):
        yield


def weights_changed() -> None:
    """Forgets what the states of weights were."""
    for known in (_states.get(), _digests.get()):
        if known is not None:
            known.clear()


def digest_of(lm: LM, adapter: str) -> bytes:
    """Tells an adapter as it is from any other (see `langppl.lm.adapters.digest`).

    It is kept within `same_weights`, for as long as nothing is seen to write to the weights.
    """
    known = _digests.get()
    if known is None:
        return adapters.digest(lm.model, adapter)
    versions = adapters.versions(lm.model, adapter)
    found = known.get((id(lm), adapter))
    if found is None or found[0]() is not lm or found[1] != versions:
        found = (weakref.ref(lm), versions, adapters.digest(lm.model, adapter))
        known[id(lm), adapter] = found
    return found[2]


def weights_of(lm: LM, adapter: str | None) -> object:
    """What tells an LM's weights under an adapter from others."""
    from langppl.lm.memo import state_of  # which imports this module

    known = _states.get()
    if known is None:
        return state_of(lm, adapter)
    found = known.get((id(lm), adapter))
    if found is None or found[0]() is not lm:
        found = (weakref.ref(lm), state_of(lm, adapter))
        known[id(lm), adapter] = found
    return found[1]
