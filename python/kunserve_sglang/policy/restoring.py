"""How far to split a group, and which group first (paper section 4.4).

A group need not come back at once. While demand is too high for full replicas, it can be split into
smaller groups, whose pipelines are shorter; each of them is split again when demand allows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from kunserve_sglang.core.cuts import best_cut
from kunserve_sglang.core.layout import LayerRange, Layout, Member
from kunserve_sglang.policy.search import slots
from kunserve_sglang.policy.state import ClusterState


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """`group` taken apart into `parts` of at most `stages` members, each with all layers."""

    group: Layout
    parts: tuple[Layout, ...]
    stages: int


def split(state: ClusterState, group: Layout, stages: int, epoch: int = 0) -> Split:
    """As few parts as have pipelines of at most `stages`, all of about the same length.

    Neighbours in the pipeline go to different parts: so the layers that a member will hold are
    around those that it holds, and it drops none of them.
    """
    count = -(-len(group.members) // stages)
    parts = tuple(_part(state, group.members[i::count], epoch) for i in range(count))
    return Split(group=group, parts=parts, stages=stages)


def splits(state: ClusterState, group: Layout) -> Iterator[Split]:
    """Into full replicas, and into groups of 2, 4, ... as far as `group` is larger than that."""
    stages = 1
    while stages < len(group.members):
        yield split(state, group, stages)
        stages *= 2


class RestoreCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a split costs, in token slots, and what it brings.

    `lost` slots go, which matters as far as they may be needed: by `pressure`, the demand as a
    fraction of what is left to the owner that is worst off. The KV of `moved` slots changes its
    holder. In return owners have fewer stages to pass: `stages` in all.
    """

    split: Split
    lost: int
    pressure: float
    moved: int
    stages: int

    @property
    def group(self) -> Layout:
        return self.split.group

    @property
    def slots_per_stage(self) -> float:
        """The cost: slots at risk or moved, for each stage gained back."""
        return (self.lost * self.pressure + self.moved) / self.stages


def restore_cost(state: ClusterState, wanted: Split) -> RestoreCost:
    """What a split into two parts or more would cost."""
    held = {m.instance: m.layers for m in wanted.group.members}
    pressure, moved = 0.0, 0.0
    for part in wanted.parts:
        staying = sum(len(m.layers.common(held[m.instance])) for m in part.members)
        for member in part.members:
            owner = state.instance(member.instance)
            pressure = max(pressure, owner.load.demand / max(1, member.capacity))
            moved += owner.load.slots.used * (1 - staying / owner.layer_count)
    return RestoreCost(
        split=wanted,
        lost=slots([wanted.group]) - slots(wanted.parts),
        pressure=pressure,
        moved=round(moved),
        stages=len(held) ** 2 - sum(len(part.members) ** 2 for part in wanted.parts),
    )


def cheapest_first(state: ClusterState, wanted: Iterable[Split]) -> list[RestoreCost]:
    """The costs of all splits; of equal cost, those that spare the most stages first."""
    costs = [restore_cost(state, each) for each in wanted]
    return sorted(costs, key=lambda c: (c.slots_per_stage, -c.stages, min(c.group.ids)))


def _part(state: ClusterState, members: Sequence[Member], epoch: int) -> Layout:
    """`members` as a group that holds every layer; alone, a full replica."""
    owners = [state.instance(m.instance) for m in members]
    whole = LayerRange(0, owners[0].layer_count)
    ranges, capacity = best_cut((whole,) * len(owners), tuple(o.memory for o in owners))
    return Layout(
        epoch=epoch,
        members=tuple(
            Member(instance=o.instance, layers=r, capacity=capacity, address=o.address)
            for o, r in zip(owners, ranges, strict=True)
        ),
    )
