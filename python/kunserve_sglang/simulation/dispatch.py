"""The router's choice of an instance, made for thousands of instances and millions of requests."""

from __future__ import annotations

import numpy as np

from kunserve_sglang.policy.dispatch import POLICIES, Candidate, DispatchPolicy

_FEW = 32
"""Up to so many candidates the policy itself looks at each; beyond, columns do the same."""


class Dispatch:
    """Candidates as columns; every choice is the one that `policy.dispatch` would make."""

    def __init__(self, policy: DispatchPolicy, instances: int) -> None:
        self._policy = POLICIES[policy]
        self._columns = policy is DispatchPolicy.LEAST_LOAD and instances > _FEW
        self._turn = 0
        self._candidates = [Candidate(in_flight=0, demand=0, capacity=1)] * instances
        self._load = np.zeros(instances)
        self._in_flight = np.zeros(instances, dtype=np.int64)

    def update(self, number: int, in_flight: int, demand: int, capacity: int) -> None:
        """What the router knows of an instance from now on."""
        if self._columns:
            self._load[number] = demand / max(1, capacity)
            self._in_flight[number] = in_flight
        else:
            self._candidates[number] = Candidate(
                in_flight=in_flight, demand=demand, capacity=capacity
            )

    def choose(self) -> int:
        turn, self._turn = self._turn, self._turn + 1
        if self._columns:
            return least_load_of_many(self._load, self._in_flight, turn)
        return self._policy(self._candidates, turn)


def least_load_of_many(
    load: np.ndarray[tuple[int], np.dtype[np.float64]],
    in_flight: np.ndarray[tuple[int], np.dtype[np.int64]],
    turn: int,
) -> int:
    """`policy.dispatch.least_load` on columns of equal length."""
    least = np.flatnonzero(load == load.min())
    if len(least) == 1:
        return int(least[0])
    fewest = in_flight[least]
    tied = least[fewest == fewest.min()]
    return int(tied[((tied - turn) % len(load)).argmin()])
