"""Who merges with whom: groups of one host first, the hottest first, and all sets equally hot.

Within a host a hop takes microseconds and KV moves through memory; between hosts both go through a
network. So sets are put where one host has all groups for them, and only what fits nowhere is made
of groups of several. But where requests wait and no neighbour is left to share with, others help.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from kunserve_sglang.core.layout import Layout
from kunserve_sglang.policy.state import ClusterState

Heat = tuple[float, int, Layout]
"""Less for more demand by slot, lowest id, group."""

Place = frozenset[str]
"""The hosts that a group is on."""


@dataclass(frozen=True, slots=True)
class Set:
    """Groups that become one, all named; `shape` is that of all of them together."""

    groups: list[Layout]
    shape: int


@dataclass(slots=True)
class _There:
    """The groups on some hosts by kind, the hottest first, and the sets that are made of them."""

    groups: list[list[Heat]]
    sets: list[Makeup]
    taken: Counter[int]
    left: Counter[int]

    def fits(self, needed: Counter[int]) -> bool:
        return all(self.taken[unit] + n <= len(self.groups[unit]) for unit, n in needed.items())

    def next_heat(self, needed: Counter[int], waits: Callable[[Layout], bool]) -> float:
        """Of the hottest group that a set would take from here; infinite if it had better not.

        If there are too few for a set, that is one where requests wait, to be `left` to others.
        """
        fits, found = self.fits(needed), float("inf")
        for unit in needed:
            begin = self.taken[unit] + (0 if fits else self.left[unit])
            for heat, _, group in self.groups[unit][begin : begin + 1]:
                if fits or waits(group):
                    found = min(found, heat)
        return found


@dataclass(frozen=True, slots=True)
class Makeup:
    """A set that is to be: how many groups of which kinds, by number; its shape."""

    units: tuple[int, ...]
    shape: int


def heat_of(state: ClusterState, group: Layout) -> tuple[float, int]:
    """What groups are sorted by, the hottest first."""
    demand = sum(state.instance(i).load.demand for i in group.ids)
    slots = sum(member.capacity for member in group.members)
    return -demand / max(1, slots), min(group.ids)


def placed(
    state: ClusterState, made: Mapping[Makeup, int], units: Sequence[Sequence[Heat]]
) -> Iterator[Set]:
    """All sets, named. `units` are the groups that there are, by kind."""
    by_place: dict[Place, _There] = {}
    for kind, all_groups in enumerate(units):
        for heat in sorted(all_groups):
            place = state.hosts_of(heat[2])
            if place not in by_place:
                by_place[place] = _There([[] for _ in units], [], Counter(), Counter())
            by_place[place].groups[kind].append(heat)
    across = _spread(made, list(by_place.values()), partial(_waits, state))
    for there in by_place.values():
        yield from _dealt(there.sets, there.groups)
    rest = [
        sorted(h for there in by_place.values() for h in there.groups[kind][there.taken[kind] :])
        for kind in range(len(units))
    ]
    yield from _dealt(across, rest)


def _waits(state: ClusterState, group: Layout) -> bool:
    return any(state.instance(i).load.waiting for i in group.ids)


def _spread(
    made: Mapping[Makeup, int], places: Sequence[_There], waits: Callable[[Layout], bool]
) -> list[Makeup]:
    """Say at each place which sets are made there; returns those that are made across places.

    Sets of many groups first: they fit in few places. The next set of a kind goes to where the
    hottest group is that is in none yet.
    """
    across: list[Makeup] = []
    for makeup, count in sorted(made.items(), key=lambda item: -len(item[0].units)):
        needed = Counter(makeup.units)
        heap = [(there.next_heat(needed, waits), n) for n, there in enumerate(places)]
        heapq.heapify(heap)
        for _ in range(count):
            hottest, number = heap[0]
            there = places[number]
            if hottest == float("inf"):
                across.append(makeup)
                continue
            if there.fits(needed):
                there.sets.append(makeup)
                there.taken += needed
            else:
                across.append(makeup)
                there.left += needed
            heapq.heapreplace(heap, (there.next_heat(needed, waits), number))
    return across


def _dealt(made: Sequence[Makeup], units: Sequence[Sequence[Heat]]) -> list[Set]:
    """The hottest groups of each kind, dealt so that sets are equally hot."""
    sets = [Set([], makeup.shape) for makeup in made]
    seats: defaultdict[int, list[list[Set]]] = defaultdict(list)
    for named, makeup in zip(sets, made, strict=True):
        for unit, n in Counter(makeup.units).items():
            rounds = seats[unit]
            while len(rounds) < n:
                rounds.append([])
            for turn in rounds[:n]:
                turn.append(named)
    for unit, rounds in seats.items():
        groups = iter(units[unit])
        for i, turn in enumerate(rounds):
            for named in reversed(turn) if i % 2 else turn:
                named.groups.append(next(groups)[-1])
    return sets
