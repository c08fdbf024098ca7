"""Which instance gets a request. Pure: a policy sees candidates, and says which one.

The members of a cooperative group hold one copy of the model between them, so a member is as loaded
as its group, whoever owns the requests:

- *Capacity.* Slots follow demand inside a group (`policy.shares`): what one owner cannot use is
  mapped to another. So demand and capacity count for the group as one pool.
- *Batch size.* Every stage runs its share of the layers for the micro-batches of all owners. A
  request that goes through k stages of 1/k of the layers each, with the requests of k owners on its
  way, meets as much work as in an instance with the mean batch of the members. So the batch size of
  a member is that mean, and neither its own batch (its peers' work would not count) nor the sum (k
  stages work at the same time).
- *Prefixes* are the owner's own: each has its own radix tree. So of equal groups it is the member
  that counts, by its own prefix, and then by its own share of the load, since slots that have to be
  mapped over from a peer come later than those that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from kunserve_sglang.core.choices import DispatchPolicy


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One instance as a policy sees it; `demand` and `capacity` are token slots.

    `batch` counts the requests that it runs or is about to run, `new_tokens` the tokens of the
    request in question that it would have to prefill, and `ahead` those that it prefills before
    these, where that is asked for. Candidates of one `group` cooperate; without
    a number it stands alone.
    """

    in_flight: int
    demand: int
    capacity: int
    batch: int = 0
    new_tokens: int = 0
    ahead: int = 0
    group: int | None = None

    @property
    def load(self) -> float:
        """Demand as a share of the slots."""
        return self.demand / (self.capacity or 1)

    @property
    def mean_batch(self) -> float:
        return self.batch


class Pool(msgspec.Struct):
    """What the members of a group have in common."""

    members: int = 0
    batch: int = 0
    demand: int = 0
    capacity: int = 0

    def add(self, candidate: Candidate) -> None:
        self.members += 1
        self.batch += candidate.batch
        self.demand += candidate.demand
        self.capacity += candidate.capacity

    @property
    def load(self) -> float:
        """Demand as a share of the slots."""
        return self.demand / (self.capacity or 1)

    @property
    def mean_batch(self) -> float:
        return self.batch / self.members


Policy = Callable[[Sequence[Candidate], int], int]
"""Position of the chosen candidate; the number counts the choices made so far."""


def round_robin(candidates: Sequence[Candidate], turn: int) -> int:
    return turn % len(candidates)


def least_load(candidates: Sequence[Candidate], turn: int) -> int:
    """The smallest share of its slots in demand; then fewest requests, then whose turn it is."""
    count = len(candidates)
    costs = []
    for position, pool in enumerate(_pools(candidates)):
        candidate = candidates[position]
        load = candidate.load
        shared = load if pool is candidate else pool.load
        costs.append((shared, load, candidate.in_flight, (position - turn) % count, position))
    return min(costs)[-1]


def lmetric(candidates: Sequence[Candidate], turn: int) -> int:
    """The smallest product of new prefill tokens and batch size (Zhang et al. 2026, "LMetric").

    One factor asks for the longest prefix, the other for the shortest queue, and a product needs no
    weights between them. Prompts that are ahead count as its own, since it waits for them. The
    batch includes the request, or any idle instance would do; equal scores go where less is to be
    computed, then to the least load.
    """
    count = len(candidates)
    costs = [
        (
            (candidate.new_tokens + candidate.ahead) * (pool.mean_batch + 1),
            candidate.new_tokens + candidate.ahead,
            pool.load,
            candidate.load,
            candidate.in_flight,
            (position - turn) % count,
            position,
        )
        for position, (candidate, pool) in enumerate(
            zip(candidates, _pools(candidates), strict=True)
        )
    ]
    return min(costs)[-1]


def first(candidates: Sequence[Candidate], turn: int) -> int:  # noqa: ARG001 (a Policy)
    """For questions that every instance answers alike: the same one each time."""
    return 0


def _pools(candidates: Sequence[Candidate]) -> list[Candidate | Pool]:
    """The pool that each candidate belongs to; an instance alone is its own."""
    groups: dict[int, Pool] = {}
    pools: list[Candidate | Pool] = []
    for candidate in candidates:
        if candidate.group is None:
            pools.append(candidate)
        else:
            pool = groups.setdefault(candidate.group, Pool())
            pool.add(candidate)
            pools.append(pool)
    return pools


POLICIES: dict[DispatchPolicy, Policy] = {
    DispatchPolicy.ROUND_ROBIN: round_robin,
    DispatchPolicy.LEAST_LOAD: least_load,
    DispatchPolicy.LMETRIC: lmetric,
}
