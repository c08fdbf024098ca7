"""Elastic shares: inside a group, slots follow demand.

Every stage holds a sub-range for every owner, so moving slots from one owner to another is a
matter of mapping pages: a transition that leaves all layers where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from kunserve_sglang.core.layout import Layout, in_blocks, largest
from kunserve_sglang.core.messages import Transition, TransitionKind
from kunserve_sglang.policy.decision import MOST_CHOICES, Choice, Decision, NoPlan
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.search import slots
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.transition_request import RebalanceRequest

_WORTH_IT = 1.1
"""A transition costs a step or two; an owner in need must gain at least this factor."""


def shares(state: ClusterState, group: Layout) -> list[int]:
    """Slots for each owner of `group`, in the order of its members.

    Every owner keeps what its requests hold, and what the largest of them needs to end; the rest is
    divided by demand, as far as every stage has pages for it. Where there are no pages even for the
    former, slots stay as they are: there is nothing to divide, and only a drop makes more of them.
    """
    owners = [state.instance(i) for i in group.ids]
    idle = min(o.memory.idle_share(o.layers, len(owners)) for o in owners)
    blocks = [o.memory.block_slots for o in owners]
    needs = [max(o.load.slots.used, o.load.largest, idle) for o in owners]
    floors = [in_blocks(need, block) for need, block in zip(needs, blocks, strict=True)]
    wants = [max(0, o.load.demand - floor) for o, floor in zip(owners, floors, strict=True)]
    if not any(wants):
        wants = [1] * len(owners)

    def divided(slots: int) -> list[int]:
        whole = sum(wants)
        return [
            floor + slots * want // (whole * block) * block
            for floor, want, block in zip(floors, wants, blocks, strict=True)
        ]

    def fits(slots: int) -> bool:
        capacities = divided(slots)
        return all(o.memory.fits(o.layers, capacities) for o in owners)

    if not fits(0):
        return [m.capacity for m in group.members]
    return divided(largest(sum(o.memory.stride for o in owners), fits))


def skewed(state: ClusterState, threshold: float) -> RebalanceRequest | None:
    """To rebalance the first group in which an owner waits for slots that it would get by demand.

    `threshold` is the fraction of its slots above which an owner is short of them.
    """
    for group in state.groups():
        if not group.cooperative:
            continue
        for number, share in zip(group.ids, shares(state, group), strict=True):
            owner = state.instance(number)
            if owner.short(threshold) and share >= _WORTH_IT * owner.load.slots.capacity:
                return RebalanceRequest(
                    instances=group.ids,
                    reason=f"{owner.load.waiting} requests wait on instance {number}, which has "
                    f"{owner.load.slots.capacity} slots and would get {share} by demand",
                )
    return None


def plan_rebalance(
    state: ClusterState, *, epoch: int, reason: str, instances: Collection[int] | None = None
) -> Plan:
    """Divide the slots of groups by demand: those of `instances`, or all.

    Raises `NoPlan` if there is no group, or if every owner has its share already.
    """
    groups = [
        g
        for g in state.groups()
        if g.cooperative and (instances is None or set(instances) & set(g.ids))
    ]
    if not groups:
        raise NoPlan("no group shares its slots")
    before, after = [], []
    for group in groups:
        capacities = shares(state, group)
        if capacities != [m.capacity for m in group.members]:
            before.append(group)
            after.append(_resized(group, epoch, capacities))
    if not after:
        raise NoPlan("the slots are divided by demand already")
    transition = Transition(
        epoch=epoch, kind=TransitionKind.REBALANCE, before=tuple(before), after=tuple(after)
    )
    return Plan(
        transition=transition,
        steps=(transition,),
        reason=reason,
        freed_bytes=0,
        capacity_before=slots(before),
        capacity_after=slots(after),
        decision=_decision(state, before, after),
    )


def _decision(state: ClusterState, before: Sequence[Layout], after: Sequence[Layout]) -> Decision:
    """Who gets and who gives, and what for."""
    changes = [
        (old, new)
        for was, will in zip(before, after, strict=True)
        for old, new in zip(was.members, will.members, strict=True)
    ]
    choices = tuple(
        Choice(
            what=f"instance {new.instance}: {new.capacity} slots",
            stages=len(after[0].members),
            slots=new.capacity - old.capacity,
            chosen=True,
            verdict=f"its demand is {state.instance(new.instance).load.demand}",
        )
        for old, new in changes[:MOST_CHOICES]
    )
    return Decision(inputs={"demand": state.demand, "capacity": state.capacity}, choices=choices)


def _resized(group: Layout, epoch: int, capacities: Sequence[int]) -> Layout:
    return Layout(
        epoch=epoch,
        members=tuple(
            msgspec.structs.replace(m, capacity=c)
            for m, c in zip(group.members, capacities, strict=True)
        ),
    )
