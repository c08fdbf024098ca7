"""When the monitor calls for a drop or a restore, and when it keeps still."""

from __future__ import annotations

import msgspec

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.monitor import OverloadMonitor
from kunserve_sglang.policy.planner import plan_drop, plan_restore
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.thresholds import Thresholds
from kunserve_sglang.policy.transition_request import DropRequest, RestoreRequest
from tests.support.clusters import carried_out, cluster, loaded, with_load


def pair() -> ClusterState:
    return carried_out(cluster(2), plan_drop(cluster(2), epoch=1, reason="", max_group_size=8))


def test_overload_must_last() -> None:
    monitor = OverloadMonitor(Thresholds())
    heavy = loaded(cluster(2), 1.4, waiting=5)
    assert monitor.observe(0.0, heavy) is None
    need = monitor.observe(0.3, heavy)
    assert isinstance(need, DropRequest)
    assert "10 requests wait" in need.reason
    assert need.tokens > 0.8 * heavy.instance(0).full_capacity


def test_nobody_waits_no_drop() -> None:
    monitor = OverloadMonitor(Thresholds(drop_hold_s=0))
    assert monitor.observe(0.0, loaded(cluster(2), 1.4, waiting=0)) is None


def test_restore_needs_room_patience_and_a_cooldown() -> None:
    monitor = OverloadMonitor(Thresholds(restore_hold_s=3, cooldown_s=5))
    monitor.transition_ended(0.0)
    light = loaded(pair(), 0.2, waiting=0)
    assert monitor.observe(1.0, light) is None
    assert monitor.observe(4.5, light) is None
    need = monitor.observe(5.5, light)
    assert isinstance(need, RestoreRequest)
    assert need.instances == (0, 1)


def test_a_peak_starts_the_wait_again() -> None:
    monitor = OverloadMonitor(Thresholds(restore_hold_s=3, cooldown_s=0))
    light, busy = loaded(pair(), 0.2, 0), loaded(pair(), 0.7, 0)
    assert monitor.observe(0.0, light) is None
    assert monitor.observe(2.0, busy) is None
    assert monitor.observe(4.0, light) is None
    assert isinstance(monitor.observe(7.5, light), RestoreRequest)


def test_used_slots_that_will_run_out_are_overload_before_anybody_waits() -> None:
    """Growing by a tenth of the capacity each second: the runtime would retract at 10 s."""
    monitor = OverloadMonitor(Thresholds())
    state = cluster(2)
    full = state.instance(0).full_capacity
    fired = None
    for tick in range(200):
        used = int(full * tick / 200)
        busy = with_load(state.instance(0), used=used, demand=used + full // 2)
        need = monitor.observe(tick / 20, ClusterState(instances=(busy, state.instance(1))))
        if isinstance(need, DropRequest):
            fired = tick / 20
            assert "0 requests wait" in need.reason
            assert "within 1 s" in need.reason
            break
    assert fired is not None
    assert 8 < fired < 9.5


def test_full_pools_that_nobody_needs_more_of_are_no_overload() -> None:
    monitor = OverloadMonitor(Thresholds(drop_hold_s=0))
    state = cluster(1)
    used = int(0.94 * state.instance(0).full_capacity)
    for second in range(5):
        full = ClusterState(instances=(with_load(state.instance(0), used=used, demand=used),))
        assert monitor.observe(float(second), full) is None


def test_a_drop_is_sized_for_where_demand_is_going() -> None:
    rising, steady = OverloadMonitor(Thresholds()), OverloadMonitor(Thresholds())
    for tick in range(40):
        share = 1 + tick / 80
        grown = rising.observe(tick / 20, loaded(cluster(2), share, waiting=3))
        level = steady.observe(tick / 20, loaded(cluster(2), share if tick > 38 else 1.4, 3))
    assert isinstance(grown, DropRequest)
    assert isinstance(level, DropRequest)
    assert grown.tokens > 1.1 * level.tokens


def groups_of_two(count: int) -> ClusterState:
    state = cluster(2 * count)
    for i in range(count):
        plan = plan_drop(
            state, epoch=i + 1, reason="", max_group_size=2, instances=[2 * i, 2 * i + 1]
        )
        state = carried_out(state, plan)
    return state


def test_groups_come_back_one_after_the_other() -> None:
    """The one with the least to lose first; of many, a quarter at once."""
    monitor = OverloadMonitor(Thresholds(restore_hold_s=1))
    state = groups_of_two(3)
    shares = {0: 0.3, 1: 0.3, 2: 0.1, 3: 0.1, 4: 0.2, 5: 0.2}
    state = ClusterState(
        instances=tuple(
            with_load(s, demand=int(shares[s.instance] * s.full_capacity)) for s in state.instances
        )
    )
    order = []
    for second in range(0, 20, 2):
        need = monitor.observe(float(second), state)
        if isinstance(need, RestoreRequest):
            order.append(need.instances)
            plan = plan_restore(
                state, epoch=9, reason="", instances=need.instances, stages=need.stages
            )
            state = carried_out(state, plan)
            monitor.transition_ended(float(second), TransitionKind.RESTORE)
    assert order == [(2, 3), (4, 5), (0, 1)]

    many = loaded(groups_of_two(9), 0.1, waiting=0)
    monitor = OverloadMonitor(Thresholds(restore_hold_s=1))
    assert monitor.observe(0.0, many) is None
    need = monitor.observe(2.0, many)
    assert isinstance(need, RestoreRequest)
    assert len(need.instances) == 4


def test_a_group_comes_back_as_far_as_demand_allows() -> None:
    """Too much for full replicas, little for pairs: pairs until demand has fallen further."""
    monitor = OverloadMonitor(Thresholds(restore_hold_s=1))
    start = cluster(4)
    plan = plan_drop(start, epoch=1, reason="", max_group_size=8, instances=[0, 1, 2, 3])
    state = carried_out(start, plan)
    done = []
    for second, share in enumerate([1.5] * 4 + [0.65] * 6 + [0.2] * 10):
        state = loaded(state, share, waiting=0)
        need = monitor.observe(float(second), state)
        if isinstance(need, RestoreRequest):
            done.append((second, need.stages, need.instances, need.reason))
            plan = plan_restore(
                state, epoch=9, reason="", instances=need.instances, stages=need.stages
            )
            state = carried_out(state, plan)
            monitor.transition_ended(float(second), TransitionKind.RESTORE)
    assert [(stages, len(instances)) for _, stages, instances, _ in done] == [
        (2, 4),
        (1, 2),
        (1, 2),
    ]
    assert 4 < done[0][0] < 10 <= done[1][0]
    assert "below 50% of the capacity in groups of 2" in done[0][3]
    assert "below 50% of full-replica capacity" in done[1][3]


def test_a_request_too_large_for_a_replica_keeps_its_group() -> None:
    """However little else there is to do: it could not even end."""
    monitor = OverloadMonitor(Thresholds(restore_hold_s=0))
    state = loaded(pair(), 0.1, waiting=0)
    first, second = state.instances
    load = msgspec.structs.replace(first.load, largest=first.full_capacity + 1)
    large = msgspec.structs.replace(first, load=load)
    assert monitor.observe(0.0, ClusterState(instances=(large, second))) is None
    assert isinstance(monitor.observe(1.0, state), RestoreRequest)


def test_a_restore_that_came_too_early_makes_the_next_wait_longer() -> None:
    monitor = OverloadMonitor(Thresholds(cooldown_s=5))
    drop, restore = TransitionKind.DROP, TransitionKind.RESTORE
    waits = []
    now = 0.0
    for _ in range(5):
        monitor.transition_ended(now, drop)
        waits.append(monitor.cooldown_s)
        now += monitor.cooldown_s
        monitor.transition_ended(now, restore)
        now += 1
    assert waits == [5, 10, 20, 40, 40]
    monitor.transition_ended(now + 1000, drop)
    assert monitor.cooldown_s == 5
