"""The router's choice of an instance, made for thousands of instances and millions of requests."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from kunserve_sglang.core.choices import DispatchPolicy
from kunserve_sglang.policy.dispatch import POLICIES, Candidate, Pool

_FEW = 32
"""The most candidates that the policy itself looks at; with more, columns do the same."""

Column = np.ndarray[tuple[int], np.dtype[np.float64]]


class Dispatch:
    """Candidates as columns; every choice is the one that `policy.dispatch` would make.

    Traces say nothing of what prompts have in common, so a request is as new to one instance as to
    any other, and of `lmetric` the batch size remains.
    """

    def __init__(self, policy: DispatchPolicy, instances: int) -> None:
        self._policy = POLICIES[policy]
        self._columns = policy is not DispatchPolicy.ROUND_ROBIN and instances > _FEW
        self._by_batch = policy is DispatchPolicy.LMETRIC
        self._turn = 0
        self._candidates = [Candidate(in_flight=0, demand=0, capacity=1, new_tokens=1)] * instances
        self._groups: list[tuple[int, ...]] = [(number,) for number in range(instances)]
        self._batch, self._load, self._own, self._in_flight = np.zeros((4, instances))

    def regroup(self, members: tuple[int, ...]) -> None:
        """These instances cooperate from now on; one alone is a group of one."""
        for number in members:
            self._groups[number] = members
        for number in members:
            known = self._candidates[number]
            self._set(number, msgspec.structs.replace(known, group=members[0]))

    def update(self, number: int, requests: int, demand: int, capacity: int) -> None:
        """What the router knows of an instance from now on."""
        candidate = Candidate(
            in_flight=requests,
            batch=requests,
            demand=demand,
            capacity=capacity,
            new_tokens=1,
            group=self._groups[number][0],
        )
        self._set(number, candidate)

    def choose(self) -> int:
        turn, self._turn = self._turn, self._turn + 1
        if not self._columns:
            return self._policy(self._candidates, turn)
        batch = (self._batch,) if self._by_batch else ()
        return least((*batch, self._load, self._own, self._in_flight), turn)

    def _set(self, number: int, candidate: Candidate) -> None:
        self._candidates[number] = candidate
        if not self._columns:
            return
        self._own[number] = candidate.demand / max(1, candidate.capacity)
        self._in_flight[number] = candidate.in_flight
        group = self._groups[number]
        pool = Pool()
        for member in group:
            pool.add(self._candidates[member])
        for member in group:
            self._batch[member] = pool.mean_batch
            self._load[member] = pool.load


def least(columns: Sequence[Column], turn: int) -> int:
    """The row with the least value in the first column, then in the next; then whose turn it is."""
    count = len(columns[0])
    tied = np.flatnonzero(columns[0] == columns[0].min())
    for column in columns[1:]:
        if len(tied) == 1:
            break
        values = column[tied]
        tied = tied[values == values.min()]
    return int(tied[((tied - turn) % count).argmin()])
