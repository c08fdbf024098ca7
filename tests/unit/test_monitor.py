"""When the monitor calls for a drop or a restore, and when it keeps still."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sglang.policy.monitor import (
    DropNeeded,
    OverloadMonitor,
    RestorePossible,
    Thresholds,
)
from kunserve_sglang.policy.planner import plan_drop, plan_restore
from kunserve_sglang.policy.state import ClusterState
from tests.support.clusters import carried_out, cluster, with_load


def loaded(state: ClusterState, share: float, waiting: int) -> ClusterState:
    """Every instance with a demand of `share` of its full-replica capacity."""
    return ClusterState(
        instances=tuple(
            with_load(s, demand=int(share * s.full_capacity), waiting=waiting)
            for s in state.instances
        )
    )


def pair() -> ClusterState:
    return carried_out(cluster(2), plan_drop(cluster(2), epoch=1, reason="", max_group_size=8))


def test_overload_must_last() -> None:
    monitor = OverloadMonitor(Thresholds())
    heavy = loaded(cluster(2), 1.4, waiting=5)
    assert monitor.observe(0.0, heavy) is None
    need = monitor.observe(0.3, heavy)
    assert isinstance(need, DropNeeded)
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
    assert isinstance(need, RestorePossible)
    assert need.instances == (0, 1)


def test_a_peak_starts_the_wait_again() -> None:
    monitor = OverloadMonitor(Thresholds(restore_hold_s=3, cooldown_s=0))
    light, busy = loaded(pair(), 0.2, 0), loaded(pair(), 0.7, 0)
    assert monitor.observe(0.0, light) is None
    assert monitor.observe(2.0, busy) is None
    assert monitor.observe(4.0, light) is None
    assert isinstance(monitor.observe(7.5, light), RestorePossible)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.4, 1.1), min_size=20, max_size=60))
def test_noisy_demand_does_not_make_the_cluster_swing(shares: list[float]) -> None:
    """One snapshot a second; a drop and a restore are never closer than the cool-down."""
    monitor = OverloadMonitor(Thresholds())
    state = cluster(2)
    changes: list[tuple[float, type]] = []
    for second, share in enumerate(shares):
        now = float(second)
        need = monitor.observe(now, loaded(state, share, waiting=2 if share > 0.9 else 0))
        if isinstance(need, DropNeeded) and len(state.groups()) == 2:
            plan = plan_drop(state, epoch=second + 1, reason="", max_group_size=8)
        elif isinstance(need, RestorePossible):
            plan = plan_restore(state, epoch=second + 1, reason="")
        else:
            continue
        state = carried_out(state, plan)
        monitor.transition_ended(now)
        changes.append((now, type(need)))
    for (earlier, first), (later, second_) in pairwise(changes):
        assert first is not second_
        if second_ is RestorePossible:
            assert later - earlier >= monitor.thresholds.cooldown_s
