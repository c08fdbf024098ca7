"""Whatever demand does, the cluster does not swing."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.monitor import OverloadMonitor
from kunserve_sglang.policy.planner import NoPlan, plan_drop, plan_restore
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.thresholds import Thresholds
from kunserve_sglang.policy.transition_request import DropRequest, RestoreRequest
from tests.support.clusters import carried_out, cluster, loaded, with_load


def drive(demands: Iterable[tuple[float, float]], size: int) -> list[tuple[float, TransitionKind]]:
    """Monitor and planner on a cluster whose demand is a share of its full-replica capacity.

    Requests wait for what does not fit. Returns when what was done.
    """
    monitor = OverloadMonitor(Thresholds())
    state = cluster(size)
    done: list[tuple[float, TransitionKind]] = []
    for now, share in demands:
        state = ClusterState(
            instances=tuple(
                with_load(
                    s,
                    used=min(int(share * s.full_capacity), s.load.slots.capacity),
                    demand=int(share * s.full_capacity),
                    waiting=int(share * s.full_capacity > s.load.slots.capacity),
                )
                for s in state.instances
            )
        )
        need = monitor.observe(now, state)
        if need is None:
            continue
        try:
            if isinstance(need, DropRequest):
                plan = plan_drop(state, epoch=1, reason="", max_group_size=8, tokens=need.tokens)
            else:
                plan = plan_restore(
                    state, epoch=1, reason="", instances=need.instances, stages=need.stages
                )
        except NoPlan:
            continue
        state = carried_out(state, plan)
        done.append((now, plan.transition.kind))
        monitor.transition_ended(now, plan.transition.kind)
    return done


@pytest.mark.parametrize("level", [0.3, 0.5, 0.7, 0.94, 1.2, 2.0])
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_noise_about_any_level_settles(level: float, noise: float) -> None:
    """Ten minutes; what is done is done in the beginning, whatever the noise is like."""
    chance = random.Random(7)
    series = [(t / 5, level * chance.gauss(1, noise)) for t in range(3000)]
    done = drive(series, 8)
    assert len(done) <= 8 + 2
    assert sum(kind is TransitionKind.RESTORE for _, kind in done) <= 1


@pytest.mark.parametrize("period", [11, 12, 14, 20])
def test_bursts_in_the_worst_rhythm_are_learned(period: int) -> None:
    """Each comes when all is restored; without patience there would be a cycle in each period."""
    series = [(t / 5, 1.6 if t / 5 % period < 2 else 0.1) for t in range(5 * 600)]
    drops = sum(kind is TransitionKind.DROP for _, kind in drive(series, 2))
    assert 2 <= drops <= 4 + 600 / 30


@settings(max_examples=40)
@given(st.data(), st.integers(2, 6))
def test_no_demand_makes_the_cluster_swing(data: st.DataObject, size: int) -> None:
    """However it jumps: cycles of drop and restore are rare, and rarer the more there are."""
    jumps = data.draw(
        st.lists(st.tuples(st.integers(1, 12), st.floats(0, 2.5)), min_size=5, max_size=40)
    )
    series, now = [], 0.0
    for seconds, share in jumps:
        for _ in range(5 * seconds):
            series.append((now, share))
            now += 0.2
    done = drive(series, size)
    drops = restores = 0
    cycles, last = 0, TransitionKind.RESTORE
    for _, kind in done:
        cycles += kind is TransitionKind.DROP and last is TransitionKind.RESTORE
        drops += kind is TransitionKind.DROP
        restores += kind is TransitionKind.RESTORE
        last = kind
    assert cycles <= 4 + now / 30
    assert drops <= cycles * (size - 1) + restores
    for (earlier, first), (later, second) in pairwise(done):
        if (first, second) == (TransitionKind.DROP, TransitionKind.RESTORE):
            assert later - earlier >= Thresholds().cooldown_s


@settings(max_examples=50)
@given(st.lists(st.floats(0.4, 1.1), min_size=20, max_size=60))
def test_noisy_demand_does_not_make_the_cluster_swing(shares: list[float]) -> None:
    """One snapshot a second; a drop and a restore are never closer than the cool-down."""
    monitor = OverloadMonitor(Thresholds())
    state = cluster(2)
    changes: list[tuple[float, type]] = []
    for second, share in enumerate(shares):
        now = float(second)
        need = monitor.observe(now, loaded(state, share, waiting=2 if share > 0.9 else 0))
        if isinstance(need, DropRequest) and len(state.groups()) == 2:
            plan = plan_drop(state, epoch=second + 1, reason="", max_group_size=8)
        elif isinstance(need, RestoreRequest):
            plan = plan_restore(state, epoch=second + 1, reason="")
        else:
            continue
        state = carried_out(state, plan)
        monitor.transition_ended(now)
        changes.append((now, type(need)))
    for (earlier, first), (later, second_) in pairwise(changes):
        assert first is not second_
        if second_ is RestoreRequest:
            assert later - earlier >= monitor.thresholds.cooldown_s
