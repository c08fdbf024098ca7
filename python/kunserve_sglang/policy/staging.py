"""How a plan is carried out without stopping the world (paper sections 4.3 and 4.4).

A drop gives memory at once, and the KV of running requests follows its layers while the group
serves already; the memory it occupied twice is handed out when it has arrived. A restore first
makes room, fetches parameters and KV while the group serves, and then only switches.

Where memory is too short for either, the plan stays one step for which its members stand still.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kunserve_sglang.core.layout import Layout, arriving_pages, largest, leaving_pages
from kunserve_sglang.core.messages import Transition, TransitionKind
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.state import ClusterState

STEPS = 3
"""Epochs that a plan may use up, its own included."""


def staged(plan: Plan, state: ClusterState) -> Plan:
    """The plan with its steps, whose epochs follow on that of the plan."""
    if plan.transition.kind is TransitionKind.DROP:
        return _live_drop(plan, state) or plan
    if plan.transition.kind is TransitionKind.RESTORE:
        return _restore_ahead(plan, state) or plan
    return plan


def _live_drop(plan: Plan, state: ClusterState) -> Plan | None:
    whole = plan.transition
    interim = []
    for after in whole.after:
        parts = [g for g in whole.before if set(g.ids) <= set(after.ids)]
        capacity = _while_leaving(state, parts, after)
        if capacity < max(m.capacity for g in parts for m in g.members):
            return None
        interim.append(_layout(after, whole.epoch, capacity))
    first = msgspec.structs.replace(whole, after=tuple(interim), live=True)
    growth = _next(first, [_layout(after, whole.epoch + 1) for after in whole.after])
    return msgspec.structs.replace(plan, steps=(first, growth))


def _while_leaving(state: ClusterState, parts: Sequence[Layout], after: Layout) -> int:
    """Slots an owner that fit while members still hold KV of layers they have dropped."""

    def fits(slots: int) -> bool:
        for before in parts:
            for number in before.ids:
                memory = state.instance(number).memory
                beside = leaving_pages(memory, number, before, after)
                shares = [slots] * len(after.members)
                if not memory.fits(after.member(number).layers, shares, beside=beside):
                    return False
        return True

    return _whole(state, after, largest(min(m.capacity for m in after.members), fits))


def _restore_ahead(plan: Plan, state: ClusterState) -> Plan | None:
    whole = plan.transition
    narrow = []
    for group in whole.before:
        capacity = _while_fetching(state, group, whole.after)
        loads = [state.instance(i).load for i in group.ids]
        if capacity <= max(max(load.slots.used, load.largest) for load in loads):
            return None
        narrow.append(_layout(group, whole.epoch, capacity))
    ahead = tuple(_layout(layout, whole.epoch + 1) for layout in whole.after)
    room = msgspec.structs.replace(whole, after=tuple(narrow), ahead=ahead)
    undo = _next(room, [_layout(group, whole.epoch + 2) for group in whole.before], 2)
    return msgspec.structs.replace(plan, steps=(room, _next(room, ahead)), undo=undo)


def _while_fetching(state: ClusterState, group: Layout, then: Sequence[Layout]) -> int:
    """Slots an owner that fit while members fetch the layers that they will run."""

    def fits(slots: int) -> bool:
        now = _layout(group, group.epoch, slots)
        for layout in then:
            for number in set(layout.ids) & set(group.ids):
                memory = state.instance(number).memory
                beside = arriving_pages(memory, number, now, layout)
                shares = [slots] * len(group.members)
                if not memory.fits(group.member(number).layers, shares, beside=beside):
                    return False
        return True

    return _whole(state, group, largest(min(m.capacity for m in group.members), fits))


def _whole(state: ClusterState, layout: Layout, slots: int) -> int:
    """As many of them as are whole blocks, in which members hand them out."""
    return min(state.instance(number).memory.whole(slots) for number in layout.ids)


def _layout(layout: Layout, epoch: int, capacity: int | None = None) -> Layout:
    """The same placement under another epoch, with `capacity` slots an owner if given."""
    members = tuple(
        m if capacity is None else msgspec.structs.replace(m, capacity=capacity)
        for m in layout.members
    )
    return Layout(epoch=epoch, members=members)


def _next(first: Transition, after: Sequence[Layout], later: int = 1) -> Transition:
    """A step that starts where `first` has ended."""
    return Transition(
        epoch=first.epoch + later,
        kind=first.kind,
        before=first.after,
        after=tuple(after),
        urgent=first.urgent,
    )
