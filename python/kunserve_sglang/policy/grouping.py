"""Which groups to merge: enough memory with the shortest pipelines (paper section 3.2).

The paper merges the two smallest groups until enough is free. Six instances that must free four
copies become groups of 4 and 2 that way, where 3 and 3 free as much. So what a plan merges stays
open until the plan is made: step by step the smallest set is taken apart, and its groups go one
after the other to the smallest of the other sets. Each step leaves one set less, which frees one
copy, and keeps all sets about equally large.

Most instances of a cluster are alike, so sets are counted by kind: a step is taken as often as it
repeats itself. N instances take O(N log N), for the sorting of who is in which set.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kunserve_sglang.layout import LayerRange, Layout, MemoryProfile
from kunserve_sglang.policy.cuts import best_cut
from kunserve_sglang.policy.state import ClusterState

_Kind = tuple[tuple[int, int, int], ...]
"""What a group is made of: `(budget, lo, hi)` of each member, in pipeline order."""


class Shapes:
    """Groups as numbers: what they hold and how much fits, whoever their members are.

    Most instances of a cluster are alike, so that few cuts have to be worked out, each once.
    """

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._budgets: dict[MemoryProfile, int] = {}
        self._memory: list[MemoryProfile] = []
        self._numbers: dict[_Kind, int] = {}
        self._kinds: list[_Kind] = []
        self._cuts: dict[int, tuple[list[LayerRange], int]] = {}
        self._merged: dict[tuple[int, int], int] = {}

    def of(self, group: Layout) -> int:
        """The shape of a group as it is."""
        return self._number([self._member(m.instance, m.layers) for m in group.members])

    def merged(self, one: int, other: int) -> int:
        """The shape of two groups together."""
        number = self._merged.get((one, other))
        if number is None:
            number = self._number([*self._kinds[one], *self._kinds[other]])
            self._merged[one, other] = number
        return number

    def slots(self, shape: int) -> int:
        """Token slots of all members, were they one group; 0 if no cut gives each a part."""
        _, slots = self.cut(shape)
        return slots * len(self._kinds[shape])

    def size(self, shape: int) -> int:
        """How many members it has."""
        return len(self._kinds[shape])

    def cut(self, shape: int) -> tuple[list[LayerRange], int]:
        """The layers of each member and the slots of each owner; no ranges if no cut exists."""
        if shape not in self._cuts:
            kind = self._kinds[shape]
            held = [LayerRange(lo, hi) for _, lo, hi in kind]
            try:
                found = best_cut(held, [self._memory[budget] for budget, _, _ in kind])
            except ValueError:
                found = [], 0
            self._cuts[shape] = found
        return self._cuts[shape]

    def together(self, groups: Sequence[Layout]) -> int:
        """The shape of all these groups as one."""
        return self._number([self._member(m.instance, m.layers) for g in groups for m in g.members])

    def order(self, groups: Sequence[Layout]) -> list[int]:
        """The instances of `groups` in the pipeline order that their merged shape assumes."""
        members = [
            (_place(self._member(m.instance, m.layers)), m.instance)
            for g in groups
            for m in g.members
        ]
        return [instance for _, instance in sorted(members)]

    def _member(self, instance: int, layers: LayerRange) -> tuple[int, int, int]:
        memory = self._state.instance(instance).memory
        budget = self._budgets.setdefault(memory, len(self._memory))
        if budget == len(self._memory):
            self._memory.append(memory)
        return budget, layers.lo, layers.hi

    def _number(self, members: list[tuple[int, int, int]]) -> int:
        kind = tuple(sorted(members, key=_place))
        number = self._numbers.setdefault(kind, len(self._kinds))
        if number == len(self._kinds):
            self._kinds.append(kind)
        return number


def _place(member: tuple[int, int, int]) -> tuple[int, int, int]:
    """Members stand in the order of the middle of what they hold."""
    budget, lo, hi = member
    return lo + hi, budget, lo


@dataclass(frozen=True, slots=True)
class Set:
    """Groups that become one, all named; `shape` is that of all of them together."""

    groups: list[Layout]
    shape: int


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

    More tokens never free less: the steps are the same, and the first that reaches enough is the
    last. Where groups are hot and cold, the hot ones are merged.
    """
    units = defaultdict(list)
    for group in groups:
        slots = sum(m.capacity for m in group.members)
        units[shapes.of(group), slots].append(group)
    kinds = _Kinds(shapes, list(units))
    counts = Counter({kinds.single(i): len(units[unit]) for i, unit in enumerate(units)})
    steps, gained, stops = _search(kinds, counts, tokens, largest)
    for step in steps:
        step.take(counts)
    named = [sorted(of, key=lambda g: _by_pressure(state, g)) for of in units.values()]
    merged = {kind: n for kind, n in counts.items() if n and len(kind.units) > 1}
    return Grouping(list(_name(merged, named)), gained, stops)


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
        """A set with one unit more; None if there are too few layers for so many members."""
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


def _search(
    kinds: _Kinds, start: Mapping[_SetKind, int], tokens: int, largest: int
) -> tuple[list[_Step], int, list[Stop]]:
    """The steps to take, the slots that they gain, and how far each length of pipelines got.

    A step can cost slots where uneven stages waste more than a copy frees; the steps behind it may
    be worth that, so the search goes on, and ends where it was best if there is never enough.
    """
    counts = Counter(start)
    heap = [(kind.order(), kind) for kind in counts]
    heapq.heapify(heap)
    steps: list[_Step] = []
    gained, best, best_steps, longest = 0, 0, 0, 0
    stops: list[Stop] = []
    while gained < tokens and heap:
        kind = heap[0][1]
        if not counts[kind]:
            heapq.heappop(heap)
            continue
        step = _next_step(kinds, counts, heap, largest)
        if step is None:
            # It fits nowhere, and never will: the others only grow.
            heapq.heappop(heap)
            continue
        size = max(k.size for k in step.results)
        if size > longest:
            if best:
                stops.append(Stop(longest, best))
            longest = size
        if step.gain > 0:
            step.times = min(step.times, -(-(tokens - gained) // step.gain))
        step.take(counts)
        steps.append(step)
        gained += step.times * step.gain
        for kind in step.results:
            heapq.heappush(heap, (kind.order(), kind))
        if gained > best:
            best, best_steps = gained, len(steps)
    if best and (not stops or stops[-1].gained < best):
        stops.append(Stop(max(k.size for s in steps[:best_steps] for k in s.results), best))
    return steps[:best_steps], best, stops


def _next_step(
    kinds: _Kinds,
    counts: Counter[_SetKind],
    heap: list[tuple[tuple[int, int, tuple[int, ...]], _SetKind]],
    largest: int,
) -> _Step | None:
    """Spread one of the smallest sets over the next; None if it does not fit."""
    source = heap[0][1]
    targets: list[_SetKind] = []
    aside = []
    while heap and len(targets) < len(source.units):
        entry = heapq.heappop(heap)
        aside.append(entry)
        kind = entry[1]
        if aside and any(kind is k or kind == k for k in targets):
            continue
        free = counts[kind] - (kind == source)
        targets += [kind] * min(free, len(source.units) - len(targets))
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

    As many targets as units are enough: one that took a unit is larger than one that did not.
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


def _by_pressure(state: ClusterState, group: Layout) -> tuple[float, int]:
    demand = sum(state.instance(m.instance).load.demand for m in group.members)
    slots = sum(m.capacity for m in group.members)
    return -demand / max(1, slots), min(group.ids)


def _name(merged: Mapping[_SetKind, int], units: Sequence[Sequence[Layout]]) -> Iterator[Set]:
    """Who is in the sets: the hottest groups of each kind, dealt so that sets are equally hot."""
    sets = [Set([], kind.shape) for kind, n in merged.items() for _ in range(n)]
    made = [kind for kind, n in merged.items() for _ in range(n)]
    seats: defaultdict[int, list[list[Set]]] = defaultdict(list)
    for named, kind in zip(sets, made, strict=True):
        for unit, n in Counter(kind.units).items():
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
    yield from sets
