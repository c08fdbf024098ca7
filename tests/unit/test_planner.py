"""Plans: coverage, ranges inside what is held, conservation, monotone freeing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sglang.messages import TransitionKind
from kunserve_sglang.policy.planner import NoPlan, plan_drop, plan_restore
from kunserve_sglang.policy.state import ClusterState
from tests.support.clusters import alone, carried_out, cluster, profile, with_load


def drop(state: ClusterState, tokens: int | None = None, *instances: int) -> ClusterState:
    plan = plan_drop(
        state,
        epoch=1,
        reason="",
        max_group_size=8,
        tokens=tokens,
        instances=instances or None,
    )
    return carried_out(state, plan)


def test_one_merge_frees_one_copy() -> None:
    state = cluster(2)
    plan = plan_drop(state, epoch=7, reason="why", max_group_size=8)
    assert plan.transition.kind is TransitionKind.DROP
    assert plan.transition.epoch == 7
    assert plan.freed_bytes == 30 * 109 * (64 << 10)
    assert plan.capacity_after > plan.capacity_before
    assert [m.layers for m in plan.transition.after[0].members] == [
        m.layers for m in carried_out(state, plan).groups()[0].members
    ]


def test_the_smallest_groups_merge_first() -> None:
    state = drop(cluster(4), 1)
    assert [g.ids for g in state.groups()] == [(0, 1), (2,), (3,)]
    state = drop(state, 1)
    assert [g.ids for g in state.groups()] == [(0, 1), (2, 3)]
    state = drop(state, 1)
    assert sorted(state.groups()[0].ids) == [0, 1, 2, 3]
    with pytest.raises(NoPlan, match="no two groups"):
        drop(state, 1)


def test_named_instances_bring_their_groups() -> None:
    state = drop(drop(cluster(4), None, 0, 1), None, 1, 2)
    assert {g.ids for g in state.groups()} == {(0, 2, 1), (3,)}


def test_a_group_cannot_grow_beyond_the_limit() -> None:
    with pytest.raises(NoPlan, match="largest group"):
        plan_drop(cluster(3), epoch=1, reason="", max_group_size=2, instances=[0, 1, 2])
    plan = plan_drop(cluster(3), epoch=1, reason="", max_group_size=2, tokens=1 << 40)
    assert max(len(g.members) for g in plan.transition.after) == 2


def test_unknown_and_lone_instances_are_refused() -> None:
    with pytest.raises(NoPlan, match="not available"):
        drop(cluster(2), None, 0, 5)
    with pytest.raises(NoPlan, match="already share"):
        drop(cluster(2), None, 1)


def test_restore_refuses_what_would_not_fit() -> None:
    state = drop(cluster(2))
    full = state.instance(0).full_capacity
    heavy = ClusterState(instances=(with_load(state.instance(0), used=full + 1), state.instance(1)))
    with pytest.raises(NoPlan, match=f"hold {full + 1} slots"):
        plan_restore(heavy, epoch=2, reason="")
    with pytest.raises(NoPlan, match="in place already"):
        plan_restore(cluster(2), epoch=2, reason="")


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(8, 48), st.lists(st.integers(1, 40_000), max_size=6))
def test_any_sequence_of_drops_keeps_the_invariants(
    size: int, layers: int, wanted: list[int]
) -> None:
    """Coverage, sub-ranges, growing capacity; and a restore undoes everything."""
    memory = profile(layers=layers, pages=layers * 160)
    state = ClusterState(instances=tuple(alone(i, memory=memory) for i in range(size)))
    first = state
    for epoch, tokens in enumerate(wanted, 1):
        try:
            plan = plan_drop(state, epoch=epoch, reason="", max_group_size=8, tokens=tokens)
        except NoPlan:
            break
        held = {m.instance: m.layers for g in plan.transition.before for m in g.members}
        for group in plan.transition.after:
            assert group.covers(layers)
            assert all(m.layers.within(held[m.instance]) for m in group.members)
            for m in group.members:
                assert m.capacity <= memory.capacity(m.layers, len(group.members))
        assert plan.capacity_after > plan.capacity_before
        assert plan.freed_bytes > 0
        state = carried_out(state, plan)
        assert sorted(i for g in state.groups() for i in g.ids) == list(range(size))
    if any(g.cooperative for g in state.groups()):
        plan = plan_restore(state, epoch=99, reason="")
        assert carried_out(state, plan).groups()[0].members[0].layers.hi == layers
        assert carried_out(state, plan).capacity == first.capacity
