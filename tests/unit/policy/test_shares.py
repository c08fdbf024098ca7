"""Elastic shares: slots follow demand inside a group, and never more than the pages hold."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.planner import NoPlan, plan_drop
from kunserve_sglang.policy.shares import plan_rebalance, shares, skewed
from kunserve_sglang.policy.state import ClusterState
from tests.support.clusters import carried_out, cluster, profile, with_load


def group(size: int, block_slots: int = 1) -> ClusterState:
    """`size` instances that cooperate, and hand out so many slots together."""
    state = cluster(size, memory=msgspec.structs.replace(profile(), block_slots=block_slots))
    plan = plan_drop(
        state, epoch=1, reason="", max_group_size=size, instances=range(size) if size else None
    )
    return carried_out(state, plan)


def loaded(state: ClusterState, *loads: tuple[int, int, int]) -> ClusterState:
    """Loads as `(used, waiting, demand)`."""
    return ClusterState(
        instances=tuple(
            with_load(s, used=used, waiting=waiting, demand=demand)
            for s, (used, waiting, demand) in zip(state.instances, loads, strict=True)
        )
    )


def test_all_load_on_one_owner_brings_it_nearly_all_slots() -> None:
    state = loaded(group(2), (9000, 5, 40_000), (0, 0, 0))
    busy, idle = shares(state, state.groups()[0])
    assert busy >= 0.9 * (busy + idle)
    assert idle > 0


def test_slots_come_back_when_the_other_owner_needs_them() -> None:
    skew = loaded(group(2), (9000, 5, 40_000), (0, 0, 0))
    after = carried_out(skew, plan_rebalance(skew, epoch=2, reason=""))
    turned = loaded(after, (100, 0, 200), (50, 9, 40_000))
    need = skewed(turned, 0.95)
    assert need is not None
    assert need.instances == turned.groups()[0].ids
    assert "instance 1" in need.reason
    again = carried_out(turned, plan_rebalance(turned, epoch=3, reason=need.reason))
    assert again.instance(1).layout.member(1).capacity > 0.9 * again.capacity / 2


def test_equal_demand_is_not_skewed() -> None:
    state = loaded(group(2), (9000, 5, 40_000), (9000, 5, 40_000))
    assert skewed(state, 0.95) is None


def test_nobody_waits_nothing_moves() -> None:
    state = loaded(group(2), (9000, 0, 40_000), (0, 0, 0))
    assert skewed(state, 0.95) is None


def test_independent_instances_share_nothing() -> None:
    state = loaded(cluster(2), (9000, 5, 40_000), (0, 0, 0))
    assert skewed(state, 0.95) is None
    with pytest.raises(NoPlan, match="no group"):
        plan_rebalance(state, epoch=1, reason="")


def test_slots_stay_where_all_owners_have_requests_too_large_for_one_another() -> None:
    """Each may need most of the slots to end its largest request: only more of them would help."""
    state = group(2)
    most = state.instance(0).load.slots.capacity
    state = ClusterState(
        instances=tuple(
            msgspec.structs.replace(
                s,
                load=msgspec.structs.replace(
                    s.load,
                    slots=msgspec.structs.replace(s.load.slots, used=most // 4),
                    running=1,
                    waiting=2,
                    demand=4 * most,
                    largest=3 * most // 2,
                ),
            )
            for s in state.instances
        )
    )
    assert shares(state, state.groups()[0]) == [m.capacity for m in state.groups()[0].members]
    assert skewed(state, 1.0) is None
    with pytest.raises(NoPlan, match="divided by demand already"):
        plan_rebalance(state, epoch=2, reason="")


def test_a_plan_moves_no_layer() -> None:
    state = loaded(group(2), (9000, 5, 40_000), (0, 0, 0))
    plan = plan_rebalance(state, epoch=2, reason="why")
    assert plan.transition.kind is TransitionKind.REBALANCE
    assert [m.layers for m in plan.transition.after[0].members] == [
        m.layers for m in plan.transition.before[0].members
    ]
    moved = carried_out(state, plan)
    with pytest.raises(NoPlan, match="already"):
        plan_rebalance(moved, epoch=3, reason="")


@given(st.integers(2, 6), st.sampled_from([1, 16, 64]), st.data())
def test_shares_hold_what_is_used_and_fill_the_pages(
    size: int, block: int, data: st.DataObject
) -> None:
    state = group(size, block)
    most = state.instance(0).load.slots.capacity
    used = [data.draw(st.integers(0, most)) for _ in range(size)]
    demand = [u + data.draw(st.integers(0, 3 * most)) for u in used]
    needed = [data.draw(st.integers(0, 2 * most)) for _ in used]
    state = loaded(state, *((u, 1, d) for u, d in zip(used, demand, strict=True)))
    state = ClusterState(
        instances=tuple(
            msgspec.structs.replace(s, load=msgspec.structs.replace(s.load, largest=n))
            for s, n in zip(state.instances, needed, strict=True)
        )
    )
    layout = state.groups()[0]
    capacities = shares(state, layout)
    for owner, capacity in zip(layout.ids, capacities, strict=True):
        assert capacity >= state.instance(owner).load.slots.used
        assert capacity % block == 0
        assert state.instance(owner).memory.fits(state.instance(owner).layers, capacities)
    equal = sum(m.capacity for m in layout.members)
    assert sum(capacities) >= 0.98 * equal
