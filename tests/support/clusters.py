"""Made-up clusters for the pure policies."""

from __future__ import annotations

import msgspec

from kunserve_sglang.core.layout import LayerRange, Layout, Member, MemoryProfile
from kunserve_sglang.core.load import Load, Slots
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.state import ClusterState, InstanceState


def profile(layers: int = 30, pages: int = 6287, layer_pages: int = 109) -> MemoryProfile:
    """An instance like SmolLM2 with 448 MiB unless told otherwise."""
    return MemoryProfile(
        page_bytes=64 << 10,
        pages=pages,
        layer_pages=(layer_pages,) * layers,
        key_row_bytes=384,
        value_row_bytes=384,
        stride=1 << 20,
        owners=8,
    )


def alone(
    instance: int,
    *,
    memory: MemoryProfile | None = None,
    used: int = 0,
    waiting: int = 0,
    demand: int = 0,
) -> InstanceState:
    """An independent instance."""
    memory = memory or profile()
    layers = LayerRange(0, len(memory.layer_pages))
    capacity = memory.capacity(layers, 1)
    member = Member(
        instance=instance, layers=layers, capacity=capacity, address=f"ipc://{instance}"
    )
    return InstanceState(
        instance=instance,
        address=member.address,
        memory=memory,
        layout=Layout(epoch=0, members=(member,)),
        load=_load(capacity, used, waiting, demand),
    )


def cluster(size: int, **values: int) -> ClusterState:
    return ClusterState(instances=tuple(alone(i, **values) for i in range(size)))


def loaded(state: ClusterState, share: float, waiting: int) -> ClusterState:
    """Every instance with a demand of `share` of its full-replica capacity."""
    return ClusterState(
        instances=tuple(
            with_load(s, demand=int(share * s.full_capacity), waiting=waiting)
            for s in state.instances
        )
    )


def carried_out(state: ClusterState, plan: Plan) -> ClusterState:
    """The cluster after a plan; loads stay, capacities follow the layouts."""
    layouts = {m.instance: layout for layout in plan.transition.after for m in layout.members}
    return ClusterState(
        instances=tuple(
            _moved(s, layouts[s.instance]) if s.instance in layouts else s for s in state.instances
        )
    )


def with_load(
    state: InstanceState, *, used: int = 0, waiting: int = 0, demand: int = 0
) -> InstanceState:
    load = _load(state.load.slots.capacity, used, waiting, demand)
    return msgspec.structs.replace(state, load=load)


def _moved(state: InstanceState, layout: Layout) -> InstanceState:
    capacity = layout.member(state.instance).capacity
    slots = msgspec.structs.replace(state.load.slots, capacity=capacity)
    load = msgspec.structs.replace(state.load, slots=slots)
    return msgspec.structs.replace(state, layout=layout, load=load)


def _load(capacity: int, used: int, waiting: int, demand: int) -> Load:
    return Load(
        slots=Slots(used=used, cached=0, capacity=capacity),
        running=1 if used else 0,
        waiting=waiting,
        demand=demand,
    )


def with_counts(state: ClusterState, arrived: int = 0, tokens: int = 0) -> ClusterState:
    """Every instance says that it has got and answered so many, since it began."""
    return ClusterState(
        instances=tuple(
            msgspec.structs.replace(
                s, load=msgspec.structs.replace(s.load, arrived=arrived, tokens=tokens)
            )
            for s in state.instances
        )
    )
