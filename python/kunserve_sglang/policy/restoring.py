"""Which group to split first when several could be (paper section 4.4)."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from kunserve_sglang.layout import Layout
from kunserve_sglang.policy.state import ClusterState


class RestoreCost(msgspec.Struct, frozen=True, kw_only=True):
    """What splitting `group` costs, in token slots, and what it brings.

    `lost` slots go, which matters as far as they may be needed: by `pressure`, the demand as a
    fraction of what is left on the member that is worst off. The KV of `moved` slots travels home.
    In return each of the k owners has k - 1 stages less to pass: `stages` in all.
    """

    group: Layout
    lost: int
    pressure: float
    moved: int
    stages: int

    @property
    def slots_per_stage(self) -> float:
        """The cost: slots at risk or moved, for each stage gained back."""
        return (self.lost * self.pressure + self.moved) / self.stages


def restore_cost(state: ClusterState, group: Layout) -> RestoreCost:
    """Of a group of two or more."""
    full, pressure, moved = 0, 0.0, 0.0
    for member in group.members:
        owner = state.instance(member.instance)
        full += owner.full_capacity
        pressure = max(pressure, owner.load.demand / max(1, owner.full_capacity))
        moved += owner.load.slots.used * (1 - len(member.layers) / owner.layer_count)
    size = len(group.members)
    return RestoreCost(
        group=group,
        lost=sum(m.capacity for m in group.members) - full,
        pressure=pressure,
        moved=round(moved),
        stages=size * (size - 1),
    )


def cheapest_first(state: ClusterState, groups: Iterable[Layout]) -> list[RestoreCost]:
    """The costs of all `groups`; of equal cost, the longest pipelines first."""
    costs = [restore_cost(state, group) for group in groups]
    return sorted(costs, key=lambda c: (c.slots_per_stage, -c.stages, min(c.group.ids)))
