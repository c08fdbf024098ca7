"""The cluster as the policies see it: one immutable snapshot."""

from __future__ import annotations

import msgspec

from kunserve_sglang.layout import LayerRange, Layout, MemoryProfile
from kunserve_sglang.messages import Load


class InstanceState(msgspec.Struct, frozen=True, kw_only=True):
    """One live instance; `layout` is the group it runs in (a group of one if independent)."""

    instance: int
    address: str
    memory: MemoryProfile
    layout: Layout
    load: Load

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


class ClusterState(msgspec.Struct, frozen=True, kw_only=True):
    instances: tuple[InstanceState, ...]

    def instance(self, number: int) -> InstanceState:
        """Raises `KeyError` for an unknown or dead instance."""
        for state in self.instances:
            if state.instance == number:
                return state
        raise KeyError(number)

    def groups(self) -> list[Layout]:
        """Every group once, in order of its first member's id; incomplete groups left out."""
        known = {s.instance for s in self.instances}
        found: dict[tuple[int, ...], Layout] = {}
        for state in self.instances:
            if known.issuperset(state.layout.ids):
                found[state.layout.ids] = state.layout
        return sorted(found.values(), key=lambda layout: min(layout.ids))

    @property
    def capacity(self) -> int:
        return sum(s.load.slots.capacity for s in self.instances)
