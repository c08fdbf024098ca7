"""Who merges with whom: groups of one host first, the hottest first, and all sets equally hot.

Within a host a hop takes microseconds and KV moves through memory; between hosts both go through a
network. So sets are put where one host has all groups for them, and only what fits nowhere is made
of groups of several.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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


def hosts_of(state: ClusterState, groups: Iterable[Layout]) -> dict[int, str]:
    """Of all instances in these groups."""
    return {i: state.instance(i).host for group in groups for i in group.ids}


def place_of(group: Layout, hosts: Mapping[int, str]) -> Place:
    return frozenset(hosts[i] for i in group.ids)


def placed(
    made: Mapping[Makeup, int], units: Sequence[Sequence[Heat]], hosts: Mapping[int, str]
) -> Iterator[Set]:
    """All sets, named. `units` are the groups there are by kind, `hosts` those of instances."""
    by_place: defaultdict[Place, list[list[Heat]]] = defaultdict(lambda: [[] for _ in units])
    for kind, all_groups in enumerate(units):
        for heat in sorted(all_groups):
            by_place[place_of(heat[2], hosts)][kind].append(heat)
    there, left = _spread(made, by_place)
    for place, groups in by_place.items():
        yield from _dealt(there[place], [[g for *_, g in of] for of in groups])
    used = {place: Counter(u for m in there[place] for u in m.units) for place in by_place}
    rest = [
        sorted(h for place, of in by_place.items() for h in of[kind][used[place][kind] :])
        for kind in range(len(units))
    ]
    yield from _dealt(left, [[g for *_, g in of] for of in rest])


def _spread(
    made: Mapping[Makeup, int], by_place: Mapping[Place, Sequence[Sequence[Heat]]]
) -> tuple[dict[Place, list[Makeup]], list[Makeup]]:
    """Which sets are made where, and those for which no place has all groups.

    Sets of many groups first: they fit in few places. The next set of a kind goes to where the
    hottest group is that is in none yet.
    """
    there: dict[Place, list[Makeup]] = {place: [] for place in by_place}
    taken: dict[Place, Counter[int]] = {place: Counter() for place in by_place}
    left: list[Makeup] = []
    for makeup, count in sorted(made.items(), key=lambda item: -len(item[0].units)):
        needed = Counter(makeup.units)

        def heat(place: Place, needed: Counter[int] = needed) -> float:
            """Of the hottest group that would be in; too few groups: infinite."""
            hottest = float("inf")
            for unit, n in needed.items():
                groups, begin = by_place[place][unit], taken[place][unit]
                if begin + n > len(groups):
                    return float("inf")
                hottest = min(hottest, groups[begin][0])
            return hottest

        heap = [(heat(place), number, place) for number, place in enumerate(by_place)]
        heapq.heapify(heap)
        for _ in range(count):
            hottest, number, place = heap[0]
            if hottest == float("inf"):
                left.append(makeup)
                continue
            there[place].append(makeup)
            taken[place] += needed
            heapq.heapreplace(heap, (heat(place), number, place))
    return there, left


def _dealt(made: Sequence[Makeup], units: Sequence[Sequence[Layout]]) -> list[Set]:
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
                named.groups.append(next(groups))
    return sets
