"""Plans in steps: everything fits at every moment, and each step starts where the last ended."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.layout import arriving_pages, leaving_pages
from kunserve_sglang.core.messages import Transition
from kunserve_sglang.policy.planner import NoPlan, Plan, plan_drop, plan_restore
from kunserve_sglang.policy.shares import plan_rebalance
from kunserve_sglang.policy.staging import STEPS, staged
from kunserve_sglang.policy.state import ClusterState
from tests.support.clusters import carried_out, cluster, profile, with_load

ROOMY = profile()
"""The parameters of an instance take more than its KV pool."""

TIGHT = profile(pages=20_000)
"""A KV pool five times as large as the parameters: old and new place of KV do not both fit."""


def drop(state: ClusterState, **wanted: int) -> Plan:
    return staged(plan_drop(state, epoch=5, reason="", max_group_size=8, **wanted), state)


def used(state: ClusterState, slots: int) -> ClusterState:
    return ClusterState(
        instances=tuple(with_load(s, used=slots, demand=slots) for s in state.instances)
    )


def check_memory(state: ClusterState, step: Transition) -> None:
    """What is mapped at the same time fits the pages of each member."""
    for layout in step.after:
        for member in layout.members:
            memory = state.instance(member.instance).memory
            before = next(x for x in step.before if member.instance in x.ids)
            beside = 0
            if step.live:
                beside = leaving_pages(memory, member.instance, before, layout)
            for then in step.ahead:
                if member.instance in then.ids:
                    beside = arriving_pages(memory, member.instance, layout, then)
            shares = [m.capacity for m in layout.members]
            assert [memory.whole(slots) for slots in shares] == shares
            assert memory.fits(member.layers, shares, beside=beside)


def test_a_drop_hands_out_memory_at_once_and_the_rest_when_kv_has_moved() -> None:
    state = cluster(2, memory=ROOMY)
    plan = drop(state)
    first, growth = plan.steps
    assert first.live
    assert not first.grows
    assert growth.grows
    assert growth.before == first.after
    before, interim, final = (
        layout.members[0].capacity for layout in (first.before[0], first.after[0], growth.after[0])
    )
    assert before < interim < final
    assert [m.capacity for m in growth.after[0].members] == [
        m.capacity for m in plan.transition.after[0].members
    ]
    assert plan.undo is None


def test_a_drop_without_room_for_both_places_stops_the_world() -> None:
    plan = drop(cluster(2, memory=TIGHT))
    assert plan.steps == (plan.transition,)


def test_a_restore_makes_room_fetches_and_switches() -> None:
    state = cluster(2, memory=ROOMY)
    group = used(carried_out(state, drop(state)), 100)
    plan = staged(plan_restore(group, epoch=9, reason=""), group)
    room, switch = plan.steps
    assert room.ahead == switch.after
    assert switch.before == room.after
    assert not switch.ahead
    assert [m.layers for m in room.after[0].members] == [m.layers for m in room.before[0].members]
    assert room.after[0].members[0].capacity < state.instance(0).full_capacity
    assert plan.undo is not None
    assert plan.undo.grows
    assert plan.undo.before == room.after
    assert plan.undo.epoch == room.epoch + STEPS - 1


def test_all_steps_of_an_urgent_restore_are() -> None:
    state = cluster(2, memory=ROOMY)
    group = used(carried_out(state, drop(state)), 100)
    for urgent in (False, True):
        plan = staged(plan_restore(group, epoch=9, reason="", urgent=urgent), group)
        assert [step.urgent for step in plan.steps] == [urgent] * 2
        assert plan.undo is not None
        assert plan.undo.urgent == urgent


def test_a_restore_for_which_too_much_is_used_stops_the_world() -> None:
    state = cluster(2, memory=ROOMY)
    group = carried_out(state, drop(state))
    full = state.instance(0).full_capacity
    plan = staged(plan_restore(used(group, full - 1), epoch=9, reason=""), group)
    assert len(plan.steps) == 2  # the state it is planned with has nothing in it
    busy = used(group, full - 1)
    plan = staged(plan_restore(busy, epoch=9, reason=""), busy)
    assert plan.steps == (plan.transition,)


def test_a_rebalance_is_one_step() -> None:
    state = cluster(2, memory=ROOMY)
    group = used(carried_out(state, drop(state)), 100)
    plan = staged(plan_rebalance(_skewed(group), epoch=9, reason=""), group)
    assert plan.steps == (plan.transition,)


@given(
    st.integers(2, 6),
    st.integers(4200, 9000),
    st.integers(0, 400),
    st.integers(1, 60_000),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 16, 100]),
)
def test_every_step_fits(
    size: int, pages: int, held: int, tokens: int, stages: int, block: int
) -> None:
    memory = msgspec.structs.replace(profile(pages=pages), block_slots=block)
    state = cluster(size, memory=memory)
    try:
        plan = drop(state, tokens=tokens)
        group = used(carried_out(state, plan), held)
        back = staged(plan_restore(group, epoch=20, reason="", stages=stages), group)
    except NoPlan:
        return
    for each, start in ((plan, state), (back, group)):
        for step in (*each.steps, *([each.undo] if each.undo else [])):
            check_memory(start, step)
        assert all(a.after == b.before for a, b in pairwise(each.steps))
        epochs = [step.epoch for step in each.steps]
        assert epochs == list(range(epochs[0], epochs[0] + len(epochs)))


def _skewed(group: ClusterState) -> ClusterState:
    first, *others = group.instances
    busy = with_load(first, used=100, waiting=5, demand=60_000)
    return ClusterState(instances=(busy, *others))


@pytest.mark.parametrize("pages", [4000, 6287])
def test_a_drop_never_takes_slots_away_meanwhile(pages: int) -> None:
    state = cluster(4, memory=profile(pages=pages))
    plan = drop(state, tokens=1 << 40)
    for step in plan.steps:
        old = {m.instance: m.capacity for g in step.before for m in g.members}
        new = {m.instance: m.capacity for g in step.after for m in g.members}
        assert all(new[i] >= old[i] for i in old)
