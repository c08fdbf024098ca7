"""Every way to merge a small cluster, to hold the planner against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kunserve_sglang.core.layout import Layout
from kunserve_sglang.policy.planner import NoPlan, merge
from kunserve_sglang.policy.state import ClusterState

T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class StageCounts:
    """Stages that requests pass (one request an instance), and those of the longest pipeline."""

    passed: int
    longest: int


@dataclass(frozen=True, slots=True)
class MergeOutcome:
    """A way to merge: the slots it gains and what it costs."""

    gained: int
    stages: StageCounts


def stages_of(groups: Sequence[Layout], merged: Sequence[Layout]) -> StageCounts:
    """Of a cluster with these `groups`, of which the `merged` ones are new."""
    return StageCounts(
        sum(len(g.members) ** 2 for g in groups), max((len(g.members) for g in merged), default=0)
    )


def every_outcome(state: ClusterState, largest: int) -> list[MergeOutcome]:
    """All set partitions of the groups into groups of at most `largest`; at most 8 groups."""
    groups = state.groups()
    if len(groups) > 8:
        raise ValueError(f"{len(groups)} groups can be merged in too many ways to try all")
    slots_of: dict[frozenset[int], int | None] = {}

    def slots(part: list[Layout]) -> int | None:
        key = frozenset(min(g.ids) for g in part)
        if key not in slots_of:
            slots_of[key] = _slots(state, part)
        return slots_of[key]

    before = sum(m.capacity for g in groups for m in g.members)
    found = []
    for partition in partitions(groups):
        sizes = [sum(len(g.members) for g in part) for part in partition]
        after = [slots(part) for part in partition]
        if max(sizes) > largest or None in after:
            continue
        merged = [size for size, part in zip(sizes, partition, strict=True) if len(part) > 1]
        stages = StageCounts(sum(size**2 for size in sizes), max(merged, default=0))
        found.append(MergeOutcome(sum(s for s in after if s is not None) - before, stages))
    return found


def partitions(items: Sequence[T]) -> Iterator[list[list[T]]]:
    """All set partitions."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for i, part in enumerate(smaller):
            yield [*smaller[:i], [first, *part], *smaller[i + 1 :]]


def _slots(state: ClusterState, part: list[Layout]) -> int | None:
    """None if there is no such group."""
    if len(part) == 1:
        return sum(m.capacity for m in part[0].members)
    try:
        return sum(m.capacity for m in merge(state, part, 0).members)
    except NoPlan:
        return None
