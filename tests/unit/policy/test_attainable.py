"""How large a request may be: what a drop would bring, or what peers could give."""

from __future__ import annotations

import msgspec

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.policy.attainable import attainable
from kunserve_sglang.policy.planner import plan_drop
from kunserve_sglang.policy.state import ClusterState
from tests.support.clusters import carried_out, cluster, profile


def largest(
    state: ClusterState, *, may_drop: bool, limit: float | None = None, size: int = 8
) -> list[int]:
    found = attainable(state, may_drop=may_drop, max_group_size=size, tpot_limit_ms=limit)
    return [found[s.instance] for s in state.instances]


def test_without_drops_it_is_what_an_instance_has() -> None:
    state = cluster(3)
    alone = [s.load.slots.capacity for s in state.instances]
    assert largest(state, may_drop=False) == alone
    assert largest(state, may_drop=True, size=1) == alone
    assert largest(cluster(1), may_drop=True) == alone[:1]


def test_a_drop_could_give_one_nearly_all_of_a_group() -> None:
    state = cluster(2)
    capacity = state.instances[0].load.slots.capacity
    found = largest(state, may_drop=True)
    assert found[0] == found[1] > 2 * capacity
    assert found[0] <= profile().max_slots()
    assert largest(cluster(4), may_drop=True)[0] > found[0]


def test_it_is_whole_blocks_of_slots() -> None:
    memory = msgspec.structs.replace(profile(), block_slots=48)
    state = cluster(2, memory=memory)
    dropped = carried_out(state, plan_drop(state, epoch=1, reason="", max_group_size=2))
    for now in (state, dropped):
        for found in largest(now, may_drop=True):
            assert found % 48 == 0
            assert found <= memory.max_slots()


def test_a_group_is_one_pool_whoever_made_it() -> None:
    before = cluster(2)
    state = carried_out(before, plan_drop(before, epoch=1, reason="", max_group_size=2))
    share = state.instances[0].load.slots.capacity
    found = largest(state, may_drop=False)
    assert 1.8 * share < found[0] < 2 * share
    assert found == largest(before, may_drop=True)


def test_a_drop_that_would_break_a_limit_gives_nothing() -> None:
    slow = CostModel(prefill=(1.0,) * 6, decode=(1.0, 1.0, 0.0))
    state = cluster(2, waiting=4, demand=400)
    costly = ClusterState(
        instances=tuple(msgspec.structs.replace(s, costs=slow) for s in state.instances)
    )
    alone = [s.load.slots.capacity for s in state.instances]
    assert largest(costly, may_drop=True, limit=1.0) == alone
    assert largest(costly, may_drop=True, limit=1e9) > alone
