"""Which groups to merge and which to split (paper section 3.2).

A plan is a `Transition`, what it would bring, and how it was chosen. Planning changes nothing, so a
dry run and the real thing are the same call.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from kunserve_sglang.errors import TransientError
from kunserve_sglang.layout import LayerRange, Layout, Member
from kunserve_sglang.messages import Transition, TransitionKind
from kunserve_sglang.policy.decision import Choice, Decision
from kunserve_sglang.policy.grouping import Grouping, group_up
from kunserve_sglang.policy.restoring import RestoreCost, cheapest_first
from kunserve_sglang.policy.shapes import Shapes
from kunserve_sglang.policy.state import ClusterState, InstanceState
from kunserve_sglang.policy.tpot import predicted_tpot_ms

_MOST_CHOICES = 8
"""A record of a decision is for people."""


class NoPlan(TransientError):
    """Nothing can be merged or split as asked; the message says why.

    `decision` is there if ways were compared and none would do: then requests queue.
    """

    def __init__(self, message: str, decision: Decision | None = None) -> None:
        super().__init__(message)
        self.decision = decision


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A transition and its effect. Capacities are token slots of all instances taking part."""

    transition: Transition
    reason: str
    freed_bytes: int
    capacity_before: int
    capacity_after: int
    decision: Decision

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
    tpot_limit_ms: float | None = None,
) -> Plan:
    """Merge groups until enough memory is free, with pipelines as short as that allows.

    With `instances`, the groups of exactly these are merged into one. With `tokens`, groups are
    merged until the capacity has grown by that many slots, or as far as possible; with neither,
    one merge is done. No plan lets an output token take longer than `tpot_limit_ms`, as far as
    instances have measured what they cost. Raises `NoPlan` if nothing can be done within all that.
    """
    search = _Search(state, epoch, max_group_size, tpot_limit_ms, tokens)
    if instances is not None:
        groups = _groups_of(state, instances)
        if len(groups) < 2:
            raise NoPlan(f"instances {sorted(instances)} already share their parameters")
        found = search.named(groups)
    else:
        found = search.cheapest(tokens or 1)
    before, after = found
    plan = _plan(state, TransitionKind.DROP, epoch, reason, before, after, search.decision())
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
        if owner.load.slots.used > layout.members[0].capacity:
            raise NoPlan(
                f"requests on instance {owner.instance} hold {owner.load.slots.used} slots, "
                f"only {layout.members[0].capacity} would be left"
            )
    decision = Decision(
        inputs={**_load(state), "groups": len(cooperative)},
        choices=_splits(cheapest_first(state, cooperative), {g.ids for g in groups}),
    )
    return _plan(state, TransitionKind.RESTORE, epoch, reason, groups, after, decision)


def merge(state: ClusterState, groups: Sequence[Layout], epoch: int) -> Layout:
    """One group of all members, each keeping a part of what it holds (see `policy.cuts`).

    Raises `NoPlan` if there are too few layers for so many.
    """
    shapes = Shapes(state)
    return _merge(state, shapes, groups, shapes.together(groups), epoch)


_Change = tuple[list[Layout], list[Layout]]
"""Groups before, and what becomes of them."""


class _Search:
    """The search for a drop; remembers what it has looked at."""

    def __init__(
        self,
        state: ClusterState,
        epoch: int,
        largest: int,
        tpot_limit_ms: float | None,
        tokens: int | None,
    ) -> None:
        self._state = state
        self._epoch = epoch
        self._largest = largest
        self._limit_ms = tpot_limit_ms
        self._tokens = tokens
        self._shapes = Shapes(state)
        self._choices: list[Choice] = []

    def decision(self) -> Decision:
        inputs = {
            **_load(self._state),
            "waiting": sum(s.load.waiting for s in self._state.instances),
            "largest_group": self._largest,
        }
        if self._tokens is not None:
            inputs["slots_asked"] = self._tokens
        if self._limit_ms is not None:
            inputs["tpot_limit_ms"] = self._limit_ms
        return Decision(inputs=inputs, choices=tuple(self._choices[-_MOST_CHOICES:]))

    def named(self, groups: list[Layout]) -> _Change:
        """All `groups` as one."""
        size = sum(len(g.members) for g in groups)
        if size > self._largest:
            raise NoPlan(f"a group of {size} would exceed the largest group, {self._largest}")
        shape = self._shapes.together(groups)
        after = [_merge(self._state, self._shapes, groups, shape, self._epoch)]
        gained = _total(after) - _total(groups)
        what = f"these instances as one group of {size}"
        if (tpot_ms := self._slowest(after)) is not None and self._breaks(tpot_ms):
            self._reject(what, size, gained, tpot_ms)
            raise self._queue()
        self._choose(what, size, gained, tpot_ms, "as asked for")
        return groups, after

    def cheapest(self, tokens: int) -> _Change:
        """The shortest pipelines that bring `tokens` more slots within the limits."""
        largest = self._largest
        while True:
            found = group_up(self._state, self._shapes, tokens, largest, self._state.groups())
            if not found.sets:
                break
            before = [g for s in found.sets for g in s.groups]
            after = [
                _merge(self._state, self._shapes, s.groups, s.shape, self._epoch)
                for s in found.sets
            ]
            stages = max(len(g.members) for g in after)
            tpot_ms = self._slowest(after)
            what = f"pipelines of up to {stages} stages"
            if tpot_ms is None or not self._breaks(tpot_ms):
                self._too_short(found, tokens)
                self._choose(what, stages, found.gained, tpot_ms, _enough(found, tokens))
                return before, after
            self._reject(what, stages, found.gained, tpot_ms)
            largest = stages - 1
        raise self._queue() if self._choices else NoPlan("no two groups can be merged any further")

    def _slowest(self, layouts: Sequence[Layout]) -> float | None:
        times = [
            predicted_tpot_ms(layout, [self._state.instance(i) for i in layout.ids])
            for layout in layouts
        ]
        return max((t for t in times if t is not None), default=None)

    def _breaks(self, tpot_ms: float) -> bool:
        return self._limit_ms is not None and tpot_ms > self._limit_ms

    def _queue(self) -> NoPlan:
        return NoPlan(
            "every drop would break the limit for the time per output token, so requests queue: "
            + "; ".join(f"{c.what}: {c.verdict}" for c in self._choices),
            self.decision(),
        )

    def _too_short(self, found: Grouping, tokens: int) -> None:
        for stop in found.stops[:-1]:
            self._choices.append(
                Choice(
                    what=f"pipelines of up to {stop.stages} stages",
                    stages=stop.stages,
                    slots=stop.gained,
                    chosen=False,
                    verdict=f"{tokens - stop.gained} slots too few",
                )
            )

    def _choose(
        self, what: str, stages: int, slots: int, tpot_ms: float | None, verdict: str
    ) -> None:
        self._choices.append(
            Choice(
                what=what, stages=stages, slots=slots, chosen=True, verdict=verdict, tpot_ms=tpot_ms
            )
        )

    def _reject(self, what: str, stages: int, slots: int, tpot_ms: float) -> None:
        self._choices.append(
            Choice(
                what=what,
                stages=stages,
                slots=slots,
                chosen=False,
                verdict=f"an output token would take {tpot_ms:.0f} ms of {self._limit_ms:g} ms",
                tpot_ms=tpot_ms,
            )
        )


def _enough(found: Grouping, tokens: int) -> str:
    if found.gained >= tokens:
        return "the shortest pipelines that free enough"
    return f"frees the most; requests that need {tokens - found.gained} more slots queue"


def _merge(
    state: ClusterState, shapes: Shapes, groups: Sequence[Layout], shape: int, epoch: int
) -> Layout:
    ranges, capacity = shapes.cut(shape)
    ids = shapes.order(groups)
    if not ranges:
        raise NoPlan(f"{state.instance(ids[0]).layer_count} layers cannot be cut for {ids}")
    return Layout(
        epoch=epoch,
        members=tuple(
            Member(instance=i, layers=r, capacity=capacity, address=state.instance(i).address)
            for i, r in zip(ids, ranges, strict=True)
        ),
    )


def _splits(
    costs: Sequence[RestoreCost], chosen: Collection[tuple[int, ...]]
) -> tuple[Choice, ...]:
    """The cheapest groups, and all that are chosen as far as there is room."""
    shown = sorted(costs, key=lambda c: c.group.ids not in chosen)[:_MOST_CHOICES]
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


def _load(state: ClusterState) -> dict[str, float]:
    return {"demand": state.demand, "capacity": state.capacity}


def _total(layouts: Sequence[Layout]) -> int:
    return sum(m.capacity for layout in layouts for m in layout.members)


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
    state: ClusterState,
    kind: TransitionKind,
    epoch: int,
    reason: str,
    before: Sequence[Layout],
    after: Sequence[Layout],
    decision: Decision,
) -> Plan:
    held = {m.instance: m.layers for g in before for m in g.members}
    freed = 0
    for member in (m for g in after for m in g.members):
        memory, had = state.instance(member.instance).memory, held[member.instance]
        pages = memory.parameter_pages(had) - memory.parameter_pages(had.common(member.layers))
        freed += pages * memory.page_bytes
    return Plan(
        transition=Transition(epoch=epoch, kind=kind, before=tuple(before), after=tuple(after)),
        reason=reason,
        freed_bytes=freed,
        capacity_before=_total(before),
        capacity_after=_total(after),
        decision=decision,
    )
