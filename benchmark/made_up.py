"""Clusters that exist in memory only, for what can be measured without instances."""

from __future__ import annotations

from kunserve_sglang.core.layout import LayerRange, Layout, Member, MemoryProfile
from kunserve_sglang.core.load import Load, Slots
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.state import ClusterState, InstanceState


def memory(layers: int, pages_per_layer: int, layer_pages: int = 109) -> MemoryProfile:
    """`layers` layers with `pages_per_layer` pages of 64 KiB each, of which the parameters take 109
    as in SmolLM2-135M.
    """
    return MemoryProfile(
        page_bytes=64 << 10,
        pages=layers * pages_per_layer,
        layer_pages=(layer_pages,) * layers,
        key_row_bytes=384,
        value_row_bytes=384,
        stride=1 << 24,
        owners=8,
    )


def instance(number: int, profile: MemoryProfile, share: float) -> InstanceState:
    """A full replica whose demand is `share` of its slots."""
    layers = LayerRange(0, len(profile.layer_pages))
    slots = profile.capacity(layers, 1)
    member = Member(instance=number, layers=layers, capacity=slots, address=f"ipc://{number}")
    layout = Layout(epoch=0, members=(member,))
    return loaded(
        InstanceState(
            instance=number,
            address=member.address,
            memory=profile,
            layout=layout,
            load=Load(
                slots=Slots(used=0, cached=0, capacity=slots), running=0, waiting=0, demand=0
            ),
        ),
        layout,
        share,
    )


def loaded(state: InstanceState, layout: Layout, share: float) -> InstanceState:
    """In this layout, with a demand of `share` of its full-replica slots."""
    slots = layout.member(state.instance).capacity
    demand = int(share * state.full_capacity)
    return InstanceState(
        instance=state.instance,
        address=state.address,
        memory=state.memory,
        layout=layout,
        load=Load(
            slots=Slots(used=min(demand, slots), cached=0, capacity=slots),
            running=1,
            waiting=int(demand > slots),
            demand=demand,
        ),
    )


def with_demand(state: ClusterState, share: float) -> ClusterState:
    """Every instance as it is, with a demand of `share` of its full-replica slots."""
    return ClusterState(instances=tuple(loaded(s, s.layout, share) for s in state.instances))


def carried_out(state: ClusterState, plan: Plan) -> ClusterState:
    """The cluster after a plan."""
    layouts = {m.instance: layout for layout in plan.transition.after for m in layout.members}
    return ClusterState(
        instances=tuple(
            loaded(s, layouts.get(s.instance, s.layout), s.load.demand / s.full_capacity)
            for s in state.instances
        )
    )
