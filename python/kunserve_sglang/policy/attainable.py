"""How large a single request may be: the slots that an instance could get, whoever has them now."""

from __future__ import annotations

from kunserve_sglang.core.layout import Layout, largest
from kunserve_sglang.policy.decision import NoPlan
from kunserve_sglang.policy.search import DropSearch
from kunserve_sglang.policy.state import ClusterState

_ALL = 1 << 62
"""More slots than there are, so that the search frees what it can."""


def attainable(
    state: ClusterState, *, may_drop: bool, max_group_size: int, tpot_limit_ms: float | None
) -> dict[int, int]:
    """By instance, the most token slots that it could get for one request.

    Inside a group that is nearly all there are. Where parameters may be dropped, it is the group
    that a drop of as much as possible would make of it, within all limits.
    """
    layouts = {i: group for group in state.groups() for i in group.ids}
    if may_drop:
        search = DropSearch(state, 0, max_group_size, tpot_limit_ms, None)
        try:
            merged = search.cheapest(_ALL).after
        except NoPlan:
            merged = []
        layouts |= {i: group for group in merged for i in group.ids}
    return {i: _for_one(state, group, i) for i, group in layouts.items()}


def _for_one(state: ClusterState, group: Layout, owner: int) -> int:
    """Slots for `owner`, while the others of its group keep what an idle one keeps."""
    members = [(m, state.instance(m.instance).memory) for m in group.members]
    if len(members) == 1:
        member, memory = members[0]
        return memory.capacity(member.layers, 1)
    idle = min(memory.idle_share(m.layers, len(members)) for m, memory in members)

    def fits(slots: int) -> bool:
        capacities = [slots if i == owner else idle for i in group.ids]
        return all(memory.fits(m.layers, capacities) for m, memory in members)

    most = largest(min(memory.stride for _, memory in members) - 1, fits)
    return state.instance(owner).memory.whole(most)
