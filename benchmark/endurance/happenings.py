"""What happens to the cluster, and when. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Times:
    """How often things happen on average, in seconds, and how far apart at least.

    By default 20 minutes have some 120 drops and restores, and more deaths than a week.
    """

    change_s: float = 10.0
    apart_s: float = 2.0
    renew_s: float = 240.0
    kill_instance_s: float = 100.0
    kill_router_s: float = 300.0

    def every(self, kind: Happening) -> float:
        return {
            Happening.CHANGE: self.change_s,
            Happening.RENEW: self.renew_s,
            Happening.KILL_INSTANCE: self.kill_instance_s,
            Happening.KILL_ROUTER: self.kill_router_s,
        }[kind]


def happenings(
    times: Times, seconds: float, chance: random.Random
) -> Iterator[tuple[float, Happening]]:
    """In order of time, in seconds from the start.

    Each kind comes at random; the first of each comes within its mean time, so that a short run has
    one of each.
    """
    due = {kind: chance.uniform(0.3, 1.0) * times.every(kind) for kind in Happening}
    last = 0.0
    while True:
        kind = min(due, key=lambda each: due[each])
        at = max(due[kind], last + times.apart_s)
        if at > seconds:
            return
        yield at, kind
        last = at
        due[kind] = at + max(times.apart_s, chance.expovariate(1 / times.every(kind)))
