"""Which groups to merge and which to split (paper section 3.2).

A plan is a `Transition` and what it would bring. Planning changes nothing, so a dry run and the
real thing are the same call.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

import msgspec

from kunserve_sglang.errors import TransientError
from kunserve_sglang.layout import LayerRange, Layout, Member, even_cut
from kunserve_sglang.messages import Transition, TransitionKind
from kunserve_sglang.policy.state import ClusterState, InstanceState


class NoPlan(TransientError):
    """Nothing can be merged or split as asked; the message says why."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A transition and its effect. Capacities are token slots of all instances taking part."""

    transition: Transition
    reason: str
    freed_bytes: int
    capacity_before: int
    capacity_after: int

    @property
    def instances(self) -> list[int]:
        return sorted(i for layout in self.transition.after for i in layout.ids)


def plan_drop(
    state: ClusterState,
    *,
    epoch: int,
    reason: str,
    max_group_size: int,
    instances: Collection[int] | None = None,
    tokens: int | None = None,
) -> Plan:
    """Merge groups until enough memory is free.

    With `instances`, the groups of exactly these are merged into one. With `tokens`, the two
    smallest groups are merged until the capacity has grown by that many slots; with neither, one
    merge is done. Raises `NoPlan` if that cannot be.
    """
    if instances is not None:
        merged = [_groups_of(state, instances)]
        if len(merged[0]) < 2:
            raise NoPlan(f"instances {sorted(instances)} already share their parameters")
    else:
        merged = _merge_smallest(state, tokens or 1, max_group_size)
    for groups in merged:
        size = sum(len(g.members) for g in groups)
        if size > max_group_size:
            raise NoPlan(f"a group of {size} would exceed the largest group, {max_group_size}")
    after = tuple(merge(state, groups, epoch) for groups in merged)
    before = tuple(group for groups in merged for group in groups)
    plan = _plan(state, TransitionKind.DROP, epoch, reason, before, after)
    if plan.capacity_after <= plan.capacity_before:
        raise NoPlan(
            f"sharing parameters would leave {plan.capacity_after} token slots "
            f"instead of {plan.capacity_before}"
        )
    return plan


def plan_restore(
    state: ClusterState,
    *,
    epoch: int,
    reason: str,
    instances: Collection[int] | None = None,
) -> Plan:
    """Split groups back into full replicas: those of `instances`, or all.

    Raises `NoPlan` if there is nothing to split, or if an owner holds more than would fit.
    """
    if instances is None:
        groups = [g for g in state.groups() if g.cooperative]
    else:
        groups = [g for g in _groups_of(state, instances) if g.cooperative]
    if not groups:
        raise NoPlan("all parameters are in place already")
    after = tuple(_alone(state.instance(i), epoch) for group in groups for i in group.ids)
    for layout in after:
        owner = state.instance(layout.ids[0])
        if owner.load.slots.used > layout.members[0].capacity:
            raise NoPlan(
                f"requests on instance {owner.instance} hold {owner.load.slots.used} slots, "
                f"only {layout.members[0].capacity} would be left"
            )
    return _plan(state, TransitionKind.RESTORE, epoch, reason, tuple(groups), after)


def merge(state: ClusterState, groups: Sequence[Layout], epoch: int) -> Layout:
    """One group of all members, each keeping a part of what it holds.

    Members are ordered by the middle of their ranges and cut evenly inside them, so that no
    parameter has to be loaded for a drop.
    """
    members = sorted(
        (m for g in groups for m in g.members),
        key=lambda m: (m.layers.lo + m.layers.hi, m.instance),
    )
    ranges = even_cut([m.layers for m in members])
    states = [state.instance(m.instance) for m in members]
    capacity = min(s.memory.capacity(r, len(members)) for s, r in zip(states, ranges, strict=True))
    return Layout(
        epoch=epoch,
        members=tuple(
            Member(instance=s.instance, layers=r, capacity=capacity, address=s.address)
            for s, r in zip(states, ranges, strict=True)
        ),
    )


def _merge_smallest(state: ClusterState, tokens: int, max_group_size: int) -> list[list[Layout]]:
    """Greedy: merge the two smallest groups until `tokens` more slots exist. O(N log N)."""
    heap = [(len(g.members), min(g.ids), [g]) for g in state.groups()]
    heapq.heapify(heap)
    gained, done = 0, []
    while gained < tokens and len(heap) > 1:
        small, first, one = heapq.heappop(heap)
        large, second, other = heapq.heappop(heap)
        if small + large > max_group_size:
            heapq.heappush(heap, (large, second, other))
            done.append((small, first, one))
            break
        parts = [*one, *other]
        gain = _total(merge(state, parts, 0)) - _parts_total(state, one, other)
        if gain <= 0:
            # Few layers among many members: uneven stages waste more than a copy frees.
            heapq.heappush(heap, (large, second, other))
            done.append((small, first, one))
            continue
        gained += gain
        heapq.heappush(heap, (small + large, min(first, second), parts))
    merged = [parts for _, _, parts in (*heap, *done) if len(parts) > 1]
    if not merged:
        raise NoPlan("no two groups can be merged any further")
    return merged


def _parts_total(state: ClusterState, *parts: list[Layout]) -> int:
    return sum(_total(g[0] if len(g) == 1 else merge(state, g, 0)) for g in parts)


def _total(layout: Layout) -> int:
    return sum(m.capacity for m in layout.members)


def _groups_of(state: ClusterState, instances: Collection[int]) -> list[Layout]:
    wanted = set(instances)
    known = {s.instance for s in state.instances}
    if not wanted <= known:
        raise NoPlan(f"instances {sorted(wanted - known)} are not available")
    return [g for g in state.groups() if wanted & set(g.ids)]


def _alone(owner: InstanceState, epoch: int) -> Layout:
    layers = LayerRange(0, owner.layer_count)
    member = Member(
        instance=owner.instance,
        layers=layers,
        capacity=owner.full_capacity,
        address=owner.address,
    )
    return Layout(epoch=epoch, members=(member,))


def _plan(
    state: ClusterState,
    kind: TransitionKind,
    epoch: int,
    reason: str,
    before: tuple[Layout, ...],
    after: tuple[Layout, ...],
) -> Plan:
    held = {m.instance: m.layers for g in before for m in g.members}
    freed = sum(
        state.instance(m.instance).memory.parameter_pages(held[m.instance].minus(m.layers))
        * state.instance(m.instance).memory.page_bytes
        for g in after
        for m in g.members
    )
    return Plan(
        transition=Transition(epoch=epoch, kind=kind, before=before, after=after),
        reason=reason,
        freed_bytes=freed,
        capacity_before=sum(_total(g) for g in before),
        capacity_after=sum(_total(g) for g in after),
    )
