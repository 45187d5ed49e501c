"""Grammars: draws under a JSON schema and a regex, all checked, and what the masks cost.

python benchmarks/grammars.py --help
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import common

import langppl as lp
from langppl.lm.decoding import draw
from langppl.lm.requests import DrawRequest
from langppl.lm.rules import State, Step

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
SENTENCE = r" [A-Z][a-z]+( [a-z]+){0,8}\."


def is_person(text: str) -> bool:
    found = json.loads(text)
    return (
        list(found) == ["name", "age"]
        and isinstance(found["name"], str)
        and len(found["name"]) <= 12
        and isinstance(found["age"], int)
        and 0 <= found["age"] <= 120
    )


def is_sentence(text: str) -> bool:
    return re.fullmatch(SENTENCE, text) is not None


CASES: dict[str, tuple[str, lp.Grammar, int, Callable[[str], bool]]] = {
    "JSON": (
        "A hero of a story, as JSON with a name and an age: ",
        lp.json_schema(SCHEMA),
        24,
        is_person,
    ),
    "regex": ("The weather is nice.", lp.regex(SENTENCE), 16, is_sentence),
}


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--draws", type=int, default=1024, help="of each grammar")
    options.add_argument("--batch", type=int, default=32)
    args = options.parse_args()
    lm = lp.LM(args.lm)
    rows = [measure(lm, name, args.draws, args.batch) for name in CASES]
    columns = [
        "grammar",
        "draws",
        "whole",
        "broken",
        "decode s",
        "mask s",
        "mask %",
        "masks",
        "runs",
    ]
    common.report("grammars", columns, rows, args)


def measure(lm: lp.LM, name: str, draws: int, batch: int) -> dict[str, Any]:
    prompt, grammar, most, holds = CASES[name]
    dist = lp.LMString(lm, prompt, max_tokens=most, grammar=grammar)
    bound, masks = dist.bound, 0
    in_steps = 0.0
    plain, made = bound.step, bound._masked_step

    def timed(state: State) -> Step:
        nonlocal in_steps
        started = time.perf_counter()
        step = plain(state)
        in_steps += time.perf_counter() - started
        return step

    def counted(free: Step, state: State) -> Step:
        nonlocal masks
        masks += 1
        return made(free, state)

    ids = dist.prompt_ids()
    whole = broken = 0
    seconds = 0.0
    bound.step, bound._masked_step = timed, counted  # type: ignore[method-assign]
    for first in range(
        -batch, draws, batch
    ):  # the first batch is run twice, to warm up; it counts once
        keys = range(first, min(first + batch, draws)) if first >= 0 else range(batch)
        requests = [DrawRequest(lm, ids, bound, most, ("grammars", name, k)) for k in keys]
        if first <= 0:
            seconds = in_steps = 0.0
            masks = whole = broken = 0
            bound._recent.clear()
            bound._masks.texts = 0
        started = time.perf_counter()
        replies = draw(requests)
        seconds += time.perf_counter() - started
        for reply in replies:
            path = bound.parse(reply.ids, reply.text.encode(), most)
            if path.reason is None:
                whole += 1
                broken += not holds(reply.text)
    return {
        "grammar": name,
        "draws": draws,
        "whole": whole,
        "broken": broken,
        "decode s": seconds,
        "mask s": in_steps,
        "mask %": 100 * in_steps / seconds,
        "masks": masks,
        "runs": 1,
    }


if __name__ == "__main__":
    main()
