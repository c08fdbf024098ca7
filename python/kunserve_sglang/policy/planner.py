"""Which groups to merge and which to split (paper section 3.2).

A plan is a `Transition`, what it would bring, and how it was chosen. Planning changes nothing, so a
dry run and the real thing are the same call.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.messages import Transition, TransitionKind
from kunserve_sglang.policy.decision import MOST_CHOICES, Choice, Decision, NoPlan
from kunserve_sglang.policy.restoring import RestoreCost, Split, cheapest_first, split, splits
from kunserve_sglang.policy.search import Change, DropSearch, merged, slots
from kunserve_sglang.policy.shapes import Shapes
from kunserve_sglang.policy.state import ClusterState

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
    across: bool = True,
) -> Plan:
    """Merge groups until enough memory is free, with pipelines as short as that allows.

    With `instances`, the groups of exactly these are merged into one. With `tokens`, groups are
    merged until the capacity has grown by that many slots, or as far as possible; with neither,
    one merge is done. Without `across` these are within a host. No plan lets an output token take
    longer than `tpot_limit_ms`, as far as instances have measured what they cost. Raises `NoPlan`
    if nothing can be done within all that.
    """
    search = DropSearch(state, epoch, max_group_size, tpot_limit_ms, tokens)
    if instances is not None:
        groups = _groups_of(state, instances)
        if len(groups) < 2:
            raise NoPlan(f"instances {sorted(instances)} already share their parameters")
        found = search.named(groups)
    else:
        found = search.cheapest(tokens or 1, across=across)
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
    stages: int = 1,
    urgent: bool = False,
) -> Plan:
    """Split the groups of `instances`, or all, so that no pipeline has more than `stages` stages.

    With 1, into full replicas. What is `urgent` takes time from requests that run. Raises `NoPlan`
    if there is nothing to split, or if an owner holds more than would fit.
    """
    cooperative = [g for g in state.groups() if g.cooperative]
    named = cooperative if instances is None else _groups_of(state, instances)
    groups = [g for g in named if len(g.members) > stages]
    if not groups:
        raise NoPlan("all parameters are in place already")
    made = [split(state, group, stages, epoch) for group in groups]
    after = [part for each in made for part in each.parts]
    for member in (m for part in after for m in part.members):
        owner = state.instance(member.instance)
        needed = max(owner.load.slots.used, owner.load.largest)
        if needed > member.capacity:
            raise NoPlan(
                f"requests on instance {owner.instance} need {needed} slots, "
                f"only {member.capacity} would be left"
            )
    decision = Decision(
        inputs={"demand": state.demand, "capacity": state.capacity, "groups": len(cooperative)},
        choices=_compared(state, cooperative, made),
    )
    change = Change(groups, after, 0)
    return _plan(TransitionKind.RESTORE, epoch, reason, change, decision, urgent=urgent)


def merge(state: ClusterState, groups: Sequence[Layout], epoch: int) -> Layout:
    """One group of all members, each keeping a part of what it holds (see `core.cuts`).

    Raises `NoPlan` if there would be more members than layers.
    """
    shapes = Shapes(state)
    return merged(state, shapes, groups, shapes.together(groups), epoch)


def _compared(
    state: ClusterState, groups: Sequence[Layout], made: Sequence[Split]
) -> tuple[Choice, ...]:
    """The splits that are made and, as far as there is room, the cheapest of all others."""
    shown = [_choice(cost, chosen=True) for cost in cheapest_first(state, made)]
    if len(shown) < MOST_CHOICES:
        chosen = {(each.group.ids, each.stages) for each in made}
        others = [s for g in groups for s in splits(state, g) if (g.ids, s.stages) not in chosen]
        shown += [_choice(cost, chosen=False) for cost in cheapest_first(state, others)]
    return tuple(shown[:MOST_CHOICES])


def _choice(cost: RestoreCost, *, chosen: bool) -> Choice:
    into = f" into groups of {cost.split.stages}" if cost.split.stages > 1 else ""
    return Choice(
        what=f"split {', '.join(map(str, cost.group.ids))}{into}",
        stages=len(cost.group.members),
        slots=-cost.lost,
        chosen=chosen,
        verdict=(
            f"{'splits now' if chosen else 'not now'}: "
            f"would be {cost.pressure:.0%} full, {cost.moved} slots of KV to move"
        ),
        cost=cost.slots_per_stage,
    )


def _groups_of(state: ClusterState, instances: Collection[int]) -> list[Layout]:
    wanted = set(instances)
    groups = [g for g in state.groups() if not wanted.isdisjoint(g.ids)]
    missing = wanted.difference(i for g in groups for i in g.ids)
    if missing:
        raise NoPlan(f"instances {sorted(missing)} are not available")
    return groups


def _plan(
    kind: TransitionKind,
    epoch: int,
    reason: str,
    change: Change,
    decision: Decision,
    *,
    urgent: bool = False,
) -> Plan:
    before, after = tuple(change.before), tuple(change.after)
    transition = Transition(epoch=epoch, kind=kind, before=before, after=after, urgent=urgent)
    return Plan(
        transition=transition,
        steps=(transition,),
        reason=reason,
        freed_bytes=change.freed_bytes,
        capacity_before=slots(before),
        capacity_after=slots(after),
        decision=decision,
    )
