"""What instances, and the processes around them, take from each other on one host's cores.

Instances of a CPU host compute on one core each, several on the same one if there are more of them
than cores (`processes.divide_cpus`). Tokenizers, detokenizers, the router and the clients of a
benchmark run on whatever is free, and slow instances down once nothing is.
"""

from __future__ import annotations

import math
from collections import Counter

from kunserve_sglang.simulation.cluster_profile import HostCost

_MEMORY_S = 0.5
"""Seconds over which the work of frontends is averaged: several steps, and less than a burst."""

_MIN_SPEED = 0.1
"""Frontends never take all of a core: an operating system shares it."""


class SimulatedHost:
    """Who computes, and how much frontends have to do. Instance `i` has core `i % cores`.

    Without `cores`, every instance has processors of its own: a GPU, or cores to spare.
    """

    def __init__(self, cost: HostCost) -> None:
        self._cores = cost.cores
        self._request_s = cost.request_ms / 1e3
        self._token_s = cost.token_ms / 1e3
        self._contention = cost.contention
        self._computing: Counter[int] = Counter()
        self._frontends = 0.0
        self._averaged = 0.0

    @property
    def shared(self) -> bool:
        """Whether how long a step lasts depends on what others do."""
        return self._cores > 0

    def arrived(self, now: float) -> None:
        """Frontends take in a request."""
        self._work(now, self._request_s)

    def delivered(self, now: float, tokens: int) -> None:
        """Frontends send `tokens` tokens to clients."""
        self._work(now, tokens * self._token_s)

    def begin(self, number: int, now: float, seconds: float) -> float:
        """How long work that takes a core `seconds` lasts on instance `number`, if it starts now.

        As the host is at this moment: what begins or ends meanwhile counts from the next step on.
        """
        if not self.shared:
            return seconds
        core = number % self._cores
        self._computing[core] += 1
        busy = len(self._computing)
        # Frontends take idle cores first, and then of all others the same.
        of_each = max(0.0, self._load(now) - (self._cores - busy)) / busy
        speed = max(_MIN_SPEED, 1.0 - of_each) / self._computing[core]
        neighbours = (busy - 1) / max(1, self._cores - 1)
        return seconds * (1.0 + self._contention * neighbours) / speed

    def end(self, number: int) -> None:
        """What it began is done."""
        if not self.shared:
            return
        core = number % self._cores
        self._computing[core] -= 1
        if not self._computing[core]:
            del self._computing[core]

    def _work(self, now: float, seconds: float) -> None:
        if not self.shared:
            return
        self._frontends = self._load(now) + seconds / _MEMORY_S
        self._averaged = now

    def _load(self, now: float) -> float:
        """Cores that frontends keep busy."""
        return self._frontends * math.exp((self._averaged - now) / _MEMORY_S)
