"""The cluster as the policies see it: one immutable snapshot."""

from __future__ import annotations

from functools import cached_property

import msgspec

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.layout import LayerRange, Layout, MemoryProfile
from kunserve_sglang.core.load import Load
from kunserve_sglang.policy.service_level import Wanted


class InstanceState(msgspec.Struct, frozen=True, kw_only=True):
    """One live instance; `layout` is the group it runs in (a group of one if independent).

    Those of one `host` share memory; it is empty if an instance does not say where it is. `costs`
    is what micro-batches take there, if it has measured that.
    """

    instance: int
    address: str
    memory: MemoryProfile
    layout: Layout
    load: Load
    costs: CostModel | None = None
    host: str = ""

    @property
    def layers(self) -> LayerRange:
        return self.layout.member(self.instance).layers

    @property
    def layer_count(self) -> int:
        return self.layout.members[-1].layers.hi

    @property
    def full_capacity(self) -> int:
        """Slots it has when it holds all layers and serves itself only."""
        return self.memory.capacity(LayerRange(0, self.layer_count), 1)

    def short(self, threshold: float) -> bool:
        """Requests wait there and demand is above this fraction of its slots."""
        load = self.load
        return load.waiting > 0 and load.demand > threshold * load.slots.capacity


class ClusterState(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Looking anything up costs the same in a cluster of any size.

    `wanted` is what requests want that are under way, at whatever instance; empty if nobody says.
    """

    instances: tuple[InstanceState, ...]
    wanted: tuple[Wanted, ...] = ()

    @cached_property
    def _by_number(self) -> dict[int, InstanceState]:
        return {s.instance: s for s in self.instances}

    @cached_property
    def _groups(self) -> tuple[Layout, ...]:
        known = self._by_number
        found: dict[int, Layout] = {}
        for state in self.instances:
            layout = state.layout
            members = [known.get(m.instance) for m in layout.members]
            if all(m is not None and m.layout == layout for m in members):
                found[min(layout.ids)] = layout
        return tuple(layout for _, layout in sorted(found.items()))

    def instance(self, number: int) -> InstanceState:
        """Raises `KeyError` for an unknown or dead instance."""
        return self._by_number[number]

    def hosts_of(self, layout: Layout) -> frozenset[str]:
        """Those that its members are on, as far as these are there."""
        known = self._by_number
        return frozenset([known[i].host for i in layout.ids if i in known])

    def spans_hosts(self, layout: Layout) -> bool:
        """Whether they are several."""
        return len(self.hosts_of(layout)) > 1

    def groups(self) -> list[Layout]:
        """Every group once, in order of its lowest id.

        A group is left out while a member is missing, or reports another layout than the others.
        """
        return list(self._groups)

    @property
    def capacity(self) -> int:
        return sum(s.load.slots.capacity for s in self.instances)

    @property
    def demand(self) -> int:
        return sum(s.load.demand for s in self.instances)
