"""Mutated raw HTTP against the router: every connection gets an answer, and nobody gets in."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

from benchmark.hostile.raw_http import End, Outcome, exchange, mutated
from benchmark.hostile.scene import Scene

_AT_ONCE = 64
_SHOWN = 5
_EXPECTED_5XX = frozenset((501, 505))
"""What a server says to a method or a version that it does not know."""


async def run(scene: Scene, count: int, seed: int) -> dict[str, Any]:
    """`count` exchanges; those with number i are the same for every run with this seed."""
    ends: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    odd: list[str] = []
    numbers = iter(range(count))

    async def strangers() -> None:
        for number in numbers:
            outcome = await exchange(scene.port, mutated(random.Random(f"{seed}/{number}")))
            ends[outcome.end] += 1
            statuses.update(outcome.statuses)
            if is_odd(outcome) and len(odd) < _SHOWN:
                odd.append(f"{seed}/{number}: {outcome.end} {outcome.statuses}: {outcome.sent!r}")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(_AT_ONCE):
            tasks.create_task(strangers())
    return {
        "exchanges": count,
        **{end: ends[end] for end in End},
        "statuses": {str(status): n for status, n in sorted(statuses.items())},
        "server_errors": sum(n for s, n in statuses.items() if _is_error(s)),
        "odd": odd,
    }


def is_odd(outcome: Outcome) -> bool:
    """Whether a server that is as it should be would have done that to nobody."""
    failed = outcome.end in (End.HUNG, End.UNANSWERED)
    return failed or any(_is_error(status) for status in outcome.statuses)


def _is_error(status: int) -> bool:
    return status >= 500 and status not in _EXPECTED_5XX
