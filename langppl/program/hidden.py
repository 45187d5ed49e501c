"""The latents that Pyro's `block` hides from langppl's handler, which stands outside of it."""

from __future__ import annotations

from typing import Any

from pyro.poutine.block_messenger import BlockMessenger

_seen: dict[str, None] = {}

_process = BlockMessenger._process_message


def _noted(self: Any, msg: Any) -> None:
    _process(self, msg)
    is_drawn = msg["type"] == "sample" and not msg["is_observed"] and msg["value"] is None
    if is_drawn and msg["stop"]:
        _seen[str(msg["name"])] = None


# What is hidden reaches no handler that could say so.
BlockMessenger._process_message = _noted  # type: ignore[method-assign]


def forget_hidden() -> None:
    """Begins anew to note what is hidden."""
    _seen.clear()


def told_of_hidden() -> str:
    """The end of a message about randomness: which latents `block` has hidden, if any."""
    if not _seen:
        return ""
    names = ", ".join(map(repr, _seen))
    what, it = (f"site {names} is", "it") if len(_seen) == 1 else (f"sites {names} are", "them")
    return f"; {what} hidden by poutine.block, so nothing can weigh {it}: leave {it} visible"
