"""Which groups to merge and which to split (paper section 3.2).

A plan is a `Transition`, what it would bring, and how it was chosen. Planning changes nothing, so a
dry run and the real thing are the same call.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from kunserve_sglang.layout import LayerRange, Layout, Member
from kunserve_sglang.messages import Transition, TransitionKind
from kunserve_sglang.policy.decision import MOST_CHOICES, Choice, Decision, NoPlan
from kunserve_sglang.policy.restoring import RestoreCost, cheapest_first
from kunserve_sglang.policy.search import Change, DropSearch, merged, slots
from kunserve_sglang.policy.shapes import Shapes
from kunserve_sglang.policy.state import ClusterState, InstanceState

__all__ = ["NoPlan", "Plan", "merge", "plan_drop", "plan_restore"]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A transition and its effect. Capacities are token slots of all instances taking part.

    `steps` carry it out, until `staging` knows better the transition itself; `undo` takes the first
    of them back if a later one cannot be done.
    """

    transition: Transition
    steps: tuple[Transition, ...]
    undo: Transition | None = None
    reason: str
    freed_bytes: int
    capacity_before: int
    capacity_after: int
    decision: Decision

    @property
    def instances(self) -> list[int]:
        return self.transition.instances


def plan_drop(
    state: ClusterState,
    *,
    epoch: int,
    reason: str,
    max_group_size: int,
    instances: Collection[int] | None = None,
    tokens: int | None = None,
    tpot_limit_ms: float | None = None,
) -> Plan:
    """Merge groups until enough memory is free, with pipelines as short as that allows.

    With `instances`, the groups of exactly these are merged into one. With `tokens`, groups are
    merged until the capacity has grown by that many slots, or as far as possible; with neither,
    one merge is done. No plan lets an output token take longer than `tpot_limit_ms`, as far as
    instances have measured what they cost. Raises `NoPlan` if nothing can be done within all that.
    """
    search = DropSearch(state, epoch, max_group_size, tpot_limit_ms, tokens)
    if instances is not None:
        groups = _groups_of(state, instances)
        if len(groups) < 2:
            raise NoPlan(f"instances {sorted(instances)} already share their parameters")
        found = search.named(groups)
    else:
        found = search.cheapest(tokens or 1)
    plan = _plan(TransitionKind.DROP, epoch, reason, found, search.decision())
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
    cooperative = [g for g in state.groups() if g.cooperative]
    if instances is None:
        groups = cooperative
    else:
        groups = [g for g in _groups_of(state, instances) if g.cooperative]
    if not groups:
        raise NoPlan("all parameters are in place already")
    after = [_alone(state.instance(i), epoch) for group in groups for i in group.ids]
    for layout in after:
        owner = state.instance(layout.ids[0])
        needed = max(owner.load.slots.used, owner.load.largest)
        if needed > layout.members[0].capacity:
            raise NoPlan(
                f"requests on instance {owner.instance} need {needed} slots, "
                f"only {layout.members[0].capacity} would be left"
            )
    decision = Decision(
        inputs={"demand": state.demand, "capacity": state.capacity, "groups": len(cooperative)},
        choices=_splits(cheapest_first(state, cooperative), {g.ids for g in groups}),
    )
    return _plan(TransitionKind.RESTORE, epoch, reason, Change(groups, after, 0), decision)


def merge(state: ClusterState, groups: Sequence[Layout], epoch: int) -> Layout:
    """One group of all members, each keeping a part of what it holds (see `policy.cuts`).

    Raises `NoPlan` if there are too few layers for so many.
    """
    shapes = Shapes(state)
    return merged(state, shapes, groups, shapes.together(groups), epoch)


def _splits(
    costs: Sequence[RestoreCost], chosen: Collection[tuple[int, ...]]
) -> tuple[Choice, ...]:
    """The cheapest groups, and all that are chosen as far as there is room."""
    shown = sorted(costs, key=lambda c: c.group.ids not in chosen)[:MOST_CHOICES]
    return tuple(
        Choice(
            what=f"split {', '.join(map(str, c.group.ids))}",
            stages=len(c.group.members),
            slots=-c.lost,
            chosen=c.group.ids in chosen,
            verdict=(
                f"{'splits now' if c.group.ids in chosen else 'stays'}: "
                f"would be {c.pressure:.0%} full, {c.moved} slots of KV to move"
            ),
            cost=c.slots_per_stage,
        )
        for c in shown
    )


def _groups_of(state: ClusterState, instances: Collection[int]) -> list[Layout]:
    wanted = set(instances)
    groups = [g for g in state.groups() if not wanted.isdisjoint(g.ids)]
    missing = wanted.difference(i for g in groups for i in g.ids)
    if missing:
        raise NoPlan(f"instances {sorted(missing)} are not available")
    return groups


def _alone(owner: InstanceState, epoch: int) -> Layout:
    member = Member(
        instance=owner.instance,
        layers=LayerRange(0, owner.layer_count),
        capacity=owner.full_capacity,
        address=owner.address,
    )
    return Layout(epoch=epoch, members=(member,))


def _plan(
    kind: TransitionKind, epoch: int, reason: str, change: Change, decision: Decision
) -> Plan:
    before, after = tuple(change.before), tuple(change.after)
    transition = Transition(epoch=epoch, kind=kind, before=before, after=after)
    return Plan(
        transition=transition,
        steps=(transition,),
        reason=reason,
        freed_bytes=change.freed_bytes,
        capacity_before=slots(before),
        capacity_after=slots(after),
        decision=decision,
    )
