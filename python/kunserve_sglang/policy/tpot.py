"""Predicted time per output token of a group (paper section 4.4: the cost model).

A decode step of an owner passes all stages, each of which also runs the steps of all others. So an
output token takes as long as its way through the pipeline, or as long as the busiest stage needs
for one step of everybody, whichever is longer.
"""

from __future__ import annotations

from collections.abc import Sequence

from kunserve_sglang.core.cost_model import Work
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.policy.state import InstanceState

HOP_MS = 1.0
"""Handing hidden states to the next stage, within a host. Small beside a stage's work."""


def predicted_tpot_ms(layout: Layout, members: Sequence[InstanceState]) -> float | None:
    """Milliseconds per output token of the slowest owner of `layout`, once its load has moved in.

    `members` are its instances in pipeline order. None if one of them has not measured its costs.
    """
    costs = [m.costs for m in members if m.costs is not None]
    if len(costs) < len(members):
        return None
    steps = [
        decode_step(state, member.capacity)
        for state, member in zip(members, layout.members, strict=True)
    ]
    layers = [len(m.layers) for m in layout.members]
    times: list[list[float]] = [
        [n * c.predict(step) for n, c in zip(layers, costs, strict=True)] for step in steps
    ]
    hops = HOP_MS * len(members) if layout.cooperative else 0.0
    busiest: float = max(sum(stage) for stage in zip(*times, strict=True))
    slowest: float = max(sum(way) for way in times)
    return max(busiest, slowest + hops)


def decode_step(state: InstanceState, capacity: int) -> Work:
    """The decode step of an owner with room for `capacity` slots.

    Of all its requests, as many run as fit; each holds its part of the demand.
    """
    load = state.load
    requests = load.running + load.waiting
    context = min(load.demand, capacity)
    if not requests or context <= 0:
        return Work()
    running = max(1, round(requests * context / load.demand))
    return Work(decodes=running, context=context)
