"""How much slower than predicted answers come is learnt, of instances alone and of groups."""

from __future__ import annotations

import msgspec
import pytest

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.load import Load, Slots
from kunserve_sglang.policy.calibration import Calibration
from kunserve_sglang.policy.pipeline_times import PipelineTimes
from kunserve_sglang.policy.planner import plan_drop
from kunserve_sglang.policy.service_level import times_of
from kunserve_sglang.policy.state import ClusterState
from tests.support.clusters import carried_out, cluster, with_counts

COSTS = CostModel(prefill=(0.05, 0.01, 1e-3, 0, 0, 0), decode=(1.0, 1e-3, 0.0))
RUNNING = 10
SECONDS = 40.0


def busy() -> ClusterState:
    """Two instances with requests halfway through their answers."""
    state = cluster(2)
    capacity = state.instances[0].load.slots.capacity
    load = Load(
        slots=Slots(used=2000, cached=0, capacity=capacity),
        running=RUNNING,
        waiting=0,
        demand=3000,
        produced=1000,
    )
    return ClusterState(
        instances=tuple(msgspec.structs.replace(s, load=load, costs=COSTS) for s in state.instances)
    )


def in_a_group(state: ClusterState) -> ClusterState:
    plan = plan_drop(state, epoch=1, reason="", max_group_size=2)
    return carried_out(state, plan)


def watch(learnt: Calibration, state: ClusterState, factor: float, since: float) -> None:
    """For `SECONDS` a step takes `factor` times as long as it should."""
    first = state.instances[0]
    times = times_of([COSTS], first.layer_count)
    pipeline = PipelineTimes(times=times, stages=len(first.layout.members))
    step_s = factor * pipeline.step_ms(RUNNING, first.load.slots.used) / 1e3
    for tick in range(int(20 * SECONDS)):
        at = tick / 20
        learnt.observe(since + at, with_counts(state, tokens=RUNNING * int(at / step_s)))


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.6])
def test_slowness_is_learnt_from_tokens_that_come(factor: float) -> None:
    learnt = Calibration()
    watch(learnt, busy(), factor, since=0)
    assert learnt.slowness.alone == pytest.approx(factor, rel=0.05)


def test_groups_are_as_slow_as_instances_alone_until_one_was_seen() -> None:
    learnt = Calibration()
    watch(learnt, busy(), 1.6, since=0)
    assert learnt.slowness.together == learnt.slowness.alone


def test_a_group_is_remembered_until_the_next() -> None:
    learnt = Calibration()
    alone = busy()
    group = in_a_group(alone)
    assert all(s.layout.cooperative for s in group.instances)
    watch(learnt, alone, 0.9, since=0)
    watch(learnt, group, 1.5, since=SECONDS)
    assert learnt.slowness.together == pytest.approx(1.5, rel=0.05)
    for hours in (1, 2, 3):
        watch(learnt, alone, 1.0, since=3600.0 * hours)
    assert learnt.slowness.alone == pytest.approx(1.0, rel=0.05)
    assert learnt.slowness.together == pytest.approx(1.5, rel=0.05)


def test_groups_across_hosts_are_learnt_apart() -> None:
    learnt = Calibration()
    group = in_a_group(busy())
    first, second = group.instances
    across = ClusterState(
        instances=(
            msgspec.structs.replace(first, host="a"),
            msgspec.structs.replace(second, host="b"),
        )
    )
    watch(learnt, group, 1.2, since=0)
    assert learnt.slowness.across == learnt.slowness.together
    watch(learnt, across, 4.0, since=SECONDS)
    assert learnt.slowness.across == pytest.approx(4.0, rel=0.15)
    assert learnt.slowness.together == pytest.approx(1.2, rel=0.05)
