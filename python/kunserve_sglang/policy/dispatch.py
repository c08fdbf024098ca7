"""Which instance gets a request. Pure: a policy sees candidates, and says which one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec


class DispatchPolicy(StrEnum):
    LEAST_LOAD = "least-load"
    ROUND_ROBIN = "round-robin"


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One instance as a policy sees it; `demand` and `capacity` are token slots."""

    in_flight: int
    demand: int
    capacity: int


Policy = Callable[[Sequence[Candidate], int], int]
"""Position of the chosen candidate; the number counts the choices made so far."""


def least_load(candidates: Sequence[Candidate], turn: int) -> int:
    """The smallest share of its slots in demand; then fewest requests, then whose turn it is."""
    count = len(candidates)

    def cost(position: int) -> tuple[float, int, int]:
        candidate = candidates[position]
        load = candidate.demand / max(1, candidate.capacity)
        return load, candidate.in_flight, (position - turn) % count

    return min(range(count), key=cost)


def round_robin(candidates: Sequence[Candidate], turn: int) -> int:
    return turn % len(candidates)


def first(candidates: Sequence[Candidate], turn: int) -> int:  # noqa: ARG001 (a Policy)
    """For questions that every instance answers alike: the same one each time."""
    return 0


POLICIES: dict[DispatchPolicy, Policy] = {
    DispatchPolicy.LEAST_LOAD: least_load,
    DispatchPolicy.ROUND_ROBIN: round_robin,
}
