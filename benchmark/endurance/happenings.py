"""What happens to the cluster, and when. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from enum import StrEnum


class Happening(StrEnum):
    """One thing that an operator, a policy or bad luck does."""

    CHANGE = "drop or restore"
    """Whichever there can be."""

    RENEW = "renew"
    """The instances of a host leave in good order, and others join."""

    KILL_INSTANCE = "kill an instance"
    KILL_ROUTER = "kill the router"

    @property
    def needs_all(self) -> bool:
        """Whether it comes only when the one before is over: two at once may cost a request."""
        return self is not Happening.CHANGE


EVERY_S: Mapping[Happening, float] = {
    Happening.CHANGE: 10.0,
    Happening.RENEW: 240.0,
    Happening.KILL_INSTANCE: 100.0,
    Happening.KILL_ROUTER: 300.0,
}
"""How often each comes on average: in 20 minutes some 120 transitions, and more deaths than in a
week."""

APART_S = 2.0
"""How far apart two are at least."""


def happenings(seconds: float, chance: random.Random) -> Iterator[tuple[float, Happening]]:
    """In order of time, in seconds from the start.

    Each kind comes at random; the first of each comes within its mean time, so that a short run has
    one of each.
    """
    due = {kind: chance.uniform(0.3, 1.0) * EVERY_S[kind] for kind in Happening}
    last = 0.0
    while True:
        kind = min(due, key=lambda each: due[each])
        at = max(due[kind], last + APART_S)
        if at > seconds:
            return
        yield at, kind
        last = at
        due[kind] = at + max(APART_S, chance.expovariate(1 / EVERY_S[kind]))
