"""Which groups to merge: enough memory with the shortest pipelines (paper section 3.2).

The paper merges the two smallest groups until enough is free. Six instances that must free four
copies become groups of 4 and 2 that way, where 3 and 3 free as much. So there is a second way: what
a plan merges stays open until the plan is made; step by step the smallest set is taken apart, and
its groups go one after the other to the smallest of the other sets. Either way each step leaves one
set less, which frees one copy. The plan with the fewest stages for a request is taken.

Most instances of a cluster are alike, so sets are counted by kind, and a step is taken as often as
it repeats itself. N instances take O(N log N), for sorting who is in which set.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from kunserve_sglang.core.layout import Layout
from kunserve_sglang.policy.placement import Heat, Makeup, Place, Set, heat_of, placed
from kunserve_sglang.policy.shapes import Shapes
from kunserve_sglang.policy.state import ClusterState


@dataclass(frozen=True, slots=True)
class Stop:
    """How many slots are gained by pipelines of at most `stages`."""

    stages: int
    gained: int


@dataclass(frozen=True, slots=True)
class Grouping:
    """`sets` of more than one group; `stops`: one for each length of pipelines, shortest first."""

    sets: list[Set]
    gained: int
    stops: list[Stop]


def group_up(
    state: ClusterState, shapes: Shapes, tokens: int, largest: int, groups: Sequence[Layout]
) -> Grouping:
    """Merge `groups` until they have `tokens` more slots, or as many as sets of `largest` allow.

    More tokens never free less: the steps of a way are the same whatever is asked for, and the
    first that brings enough is the last. Who is in which set: `policy.placement`.
    """
    units: defaultdict[tuple[int, int], list[Heat]] = defaultdict(list)
    for group in groups:
        slots = sum(member.capacity for member in group.members)
        units[shapes.of(group), slots].append((*heat_of(state, group), group))
    kinds = _Kinds(shapes, list(units))
    start = Counter({kinds.single(i): len(units[unit]) for i, unit in enumerate(units)})
    ways = [_search(kinds, start, tokens, largest, apart) for apart in (True, False)]
    best = min(ways, key=lambda way: way.price(tokens))
    made = {Makeup(kind.units, kind.shape): n for kind, n in best.merged().items()}
    sets = list(placed(state, made, list(units.values())))
    return Grouping(sets, best.gained, best.stops)


def group_up_within_hosts(
    state: ClusterState, shapes: Shapes, tokens: int, largest: int, groups: Sequence[Layout]
) -> Grouping:
    """As `group_up`, but no set is of groups on different hosts; the hottest hosts come first."""
    by_place: defaultdict[Place, list[Layout]] = defaultdict(list)
    for group in groups:
        by_place[state.hosts_of(group)].append(group)
    found = Grouping([], 0, [])
    for there in sorted(by_place.values(), key=lambda of: min(heat_of(state, g) for g in of)):
        if found.gained >= tokens:
            break
        more = group_up(state, shapes, tokens - found.gained, largest, there)
        found = Grouping([*found.sets, *more.sets], found.gained + more.gained, [])
    return found


@dataclass(frozen=True, slots=True)
class _SetKind:
    """Sets of the same make. `units` are numbers of unit kinds, `slots` what all owners get."""

    units: tuple[int, ...]
    size: int
    shape: int
    slots: int

    def order(self) -> tuple[int, int, tuple[int, ...]]:
        """Small sets first; of these, what can be spread most evenly."""
        return self.size, -len(self.units), self.units


class _Kinds:
    """Every kind of set that came up, once. A unit is a group as it is: `(shape, slots)`."""

    def __init__(self, shapes: Shapes, units: list[tuple[int, int]]) -> None:
        self._shapes = shapes
        self._units = units
        self._known: dict[tuple[int, ...], _SetKind | None] = {}

    def single(self, unit: int) -> _SetKind:
        shape, slots = self._units[unit]
        return _SetKind((unit,), self._shapes.size(shape), shape, slots)

    def size(self, unit: int) -> int:
        return self._shapes.size(self._units[unit][0])

    def joined(self, kind: _SetKind, unit: int) -> _SetKind | None:
        """A set with one unit more; None if it would have more members than layers."""
        units = tuple(sorted((*kind.units, unit)))
        if units not in self._known:
            shape = self._shapes.merged(kind.shape, self._units[unit][0])
            slots = self._shapes.slots(shape)
            self._known[units] = (
                _SetKind(units, self._shapes.size(shape), shape, slots) if slots else None
            )
        return self._known[units]


@dataclass(slots=True)
class _Step:
    """A set of kind `source` is spread over `targets`, which become `results`; `times` times."""

    source: _SetKind
    targets: list[_SetKind]
    results: list[_SetKind]
    times: int

    @property
    def gain(self) -> int:
        """Slots, each time."""
        after, before = (sum(k.slots for k in kinds) for kinds in (self.results, self.targets))
        return after - before - self.source.slots

    def take(self, counts: Counter[_SetKind]) -> None:
        counts[self.source] -= self.times
        for kind in self.targets:
            counts[kind] -= self.times
        for kind in self.results:
            counts[kind] += self.times


@dataclass(slots=True)
class _Way:
    """The sets after the best of some steps, the slots gained, and the stops on the way."""

    counts: Counter[_SetKind]
    gained: int
    stops: list[Stop]

    def merged(self) -> dict[_SetKind, int]:
        return {kind: n for kind, n in self.counts.items() if n and len(kind.units) > 1}

    def price(self, tokens: int) -> tuple[int, int, int]:
        """Enough is best, else much; then the fewest stages, for a request and at most."""
        merged = self.merged()
        passed = sum(n * kind.size**2 for kind, n in self.counts.items())
        return -min(self.gained, tokens), passed, max((k.size for k in merged), default=0)


def _search(
    kinds: _Kinds, start: Counter[_SetKind], tokens: int, largest: int, apart: bool
) -> _Way:
    """One of the two ways to merge: sets are taken `apart` again, or joined as they are.

    A step can cost slots where uneven stages waste more than a copy frees; the steps behind it may
    be worth that, so the search goes on, and ends where it was best if there is never enough.
    """
    counts = Counter(start)
    heap = [(kind.order(), kind) for kind in counts]
    heapq.heapify(heap)
    steps: list[_Step] = []
    gained, best, best_steps = 0, 0, 0
    most: dict[int, int] = {}  # slots gained, by the longest pipeline
    longest = 0
    while gained < tokens and heap:
        if not counts[heap[0][1]]:
            heapq.heappop(heap)
            continue
        step = _next_step(kinds, counts, heap, largest, apart)
        if step is None:
            # It fits nowhere, and never will: the others only grow.
            heapq.heappop(heap)
            continue
        if step.gain > 0:
            step.times = min(step.times, -(-(tokens - gained) // step.gain))
        step.take(counts)
        steps.append(step)
        gained += step.times * step.gain
        longest = max(longest, *(kind.size for kind in step.results))
        for kind in step.results:
            heapq.heappush(heap, (kind.order(), kind))
        if gained > best:
            best, best_steps = gained, len(steps)
            most[longest] = gained
    counts = Counter(start)
    for step in steps[:best_steps]:
        step.take(counts)
    return _Way(counts, best, [Stop(stages, slots) for stages, slots in most.items()])


def _next_step(
    kinds: _Kinds,
    counts: Counter[_SetKind],
    heap: list[tuple[tuple[int, int, tuple[int, ...]], _SetKind]],
    largest: int,
    apart: bool,
) -> _Step | None:
    """Spread one of the smallest sets over the next; None if it does not fit."""
    source = heap[0][1]
    wanted = len(source.units) if apart else 1
    targets: list[_SetKind] = []
    aside = []
    while heap and len(targets) < wanted:
        aside.append(heapq.heappop(heap))
        kind = aside[-1][1]
        if kind not in targets:
            free = counts[kind] - (kind == source)
            targets += [kind] * min(free, wanted - len(targets))
    for entry in aside:
        heapq.heappush(heap, entry)
    results = _spread(kinds, source, targets, largest)
    if results is None:
        return None
    first = targets[0]
    times = 1
    if all(kind == first for kind in targets):
        each = len(targets) + (first == source)
        times = counts[first] // each
        if first != source:
            times = min(times, counts[source])
    return _Step(source, targets, results, times)


def _spread(
    kinds: _Kinds, source: _SetKind, targets: Sequence[_SetKind], largest: int
) -> list[_SetKind] | None:
    """What `targets` become when each unit of `source`, largest first, joins the smallest.

    More targets than units are of no use: one that took a unit is larger than one that did not.
    """
    heap = [(kind.order(), i, kind) for i, kind in enumerate(targets)]
    if not heap:
        return None
    heapq.heapify(heap)
    for unit in sorted(source.units, key=kinds.size, reverse=True):
        _, i, kind = heap[0]
        if kind.size + kinds.size(unit) > largest:
            return None
        joined = kinds.joined(kind, unit)
        if joined is None:
            return None
        heapq.heapreplace(heap, (joined.order(), i, joined))
    return [kind for *_, kind in heap]
