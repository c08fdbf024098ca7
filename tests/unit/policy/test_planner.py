"""Plans: which groups merge and split, and how far."""

from __future__ import annotations

import msgspec
import pytest

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.planner import NoPlan, plan_drop, plan_restore
from kunserve_sglang.policy.restoring import RestoreCost, cheapest_first, split, splits
from kunserve_sglang.policy.state import ClusterState
from tests.support.clusters import alone, carried_out, cluster, profile, with_load
from tests.support.plans import drop, gained, plan


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


def test_a_group_has_no_more_owners_than_its_members_have_room_for() -> None:
    memory = msgspec.structs.replace(profile(), owners=2)
    state = ClusterState(instances=tuple(alone(i, memory=memory) for i in range(4)))
    assert sizes(drop(state, 1 << 40)) == [2, 2]


def test_unknown_and_lone_instances_are_refused() -> None:
    with pytest.raises(NoPlan, match="not available"):
        drop(cluster(2), None, 0, 5)
    with pytest.raises(NoPlan, match="already share"):
        drop(cluster(2), None, 1)


def test_restore_refuses_what_would_not_fit() -> None:
    state = drop(cluster(2))
    full = state.instance(0).full_capacity
    heavy = ClusterState(instances=(with_load(state.instance(0), used=full + 1), state.instance(1)))
    with pytest.raises(NoPlan, match=f"need {full + 1} slots"):
        plan_restore(heavy, epoch=2, reason="")
    with pytest.raises(NoPlan, match="in place already"):
        plan_restore(cluster(2), epoch=2, reason="")


def sizes(state: ClusterState) -> list[int]:
    return sorted(len(g.members) for g in state.groups())


def copies(count: int) -> int:
    """Slots that so many dropped copies bring at least, when no stage is uneven."""
    memory = profile()
    return int(0.9 * count * 30 * 109 / (30 * memory.kv_pages(1000)) * 1000)


def test_two_copies_for_six_are_three_and_three() -> None:
    """Merging the two smallest again and again would make groups of four and two."""
    assert sizes(drop(cluster(6), copies(4))) == [3, 3]


def test_demand_that_keeps_rising_merges_groups_again() -> None:
    state = drop(cluster(3), 1)
    assert sizes(state) == [1, 2]
    assert sizes(drop(state, 1)) == [3]


def test_hot_instances_are_merged_and_cold_ones_left_alone() -> None:
    state = cluster(6)
    hot = {1: 9000, 4: 8000}
    state = ClusterState(
        instances=tuple(with_load(s, demand=hot.get(s.instance, 100)) for s in state.instances)
    )
    assert plan(state, 1).instances == [1, 4]


def test_the_smaller_budget_gets_fewer_layers() -> None:
    small, large = profile(pages=4500), profile(pages=9000)
    state = ClusterState(instances=(alone(0, memory=small), alone(1, memory=large)))
    (group,) = plan(state, 1).transition.after
    assert len(group.member(0).layers) < len(group.member(1).layers)
    even = min(
        m.capacity(held, 2) for m, held in ((small, LayerRange(0, 15)), (large, LayerRange(15, 30)))
    )
    assert group.members[0].capacity > 1.3 * even


def with_costs(state: ClusterState, decode: tuple[float, float, float]) -> ClusterState:
    costs = CostModel(prefill=(0.0,) * 6, decode=decode)
    return ClusterState(
        instances=tuple(msgspec.structs.replace(s, costs=costs) for s in state.instances)
    )


def loaded(state: ClusterState, demand: int, waiting: int) -> ClusterState:
    return ClusterState(
        instances=tuple(with_load(s, demand=demand, waiting=waiting) for s in state.instances)
    )


def test_no_plan_breaks_the_tpot_limit() -> None:
    """A longer pipeline lets more requests run at once, each of which makes a step longer."""
    state = with_costs(loaded(cluster(8), 60_000, 60), (0.1, 0.1, 0.0))
    asked = next(c.slots for c in plan(state, 1 << 40).decision.choices if c.stages == 4)
    free = plan(state, asked)
    (chosen,) = [c for c in free.decision.choices if c.chosen]
    assert chosen.stages == 4
    assert chosen.tpot_ms is not None
    limited = plan(state, asked, chosen.tpot_ms - 5)
    assert max(len(g.members) for g in limited.transition.after) < 4
    assert 0 < gained(limited) < gained(free)
    refused = next(c for c in limited.decision.choices if c.stages == 4)
    assert not refused.chosen
    assert "an output token would take" in refused.verdict
    assert limited.decision.inputs["tpot_limit_ms"] == chosen.tpot_ms - 5
    with pytest.raises(NoPlan, match="requests queue") as error:
        plan(state, asked, 3)
    assert error.value.decision is not None
    assert not any(c.chosen for c in error.value.decision.choices)
    with pytest.raises(NoPlan, match="requests queue"):
        plan_drop(state, epoch=1, reason="", max_group_size=8, instances=[0, 1], tpot_limit_ms=3)


def test_what_was_not_measured_limits_nothing() -> None:
    choices = plan(loaded(cluster(2), 60_000, 60), 1, 3).decision.choices
    assert [c.tpot_ms for c in choices] == [None]


def test_a_plan_says_what_it_was_made_from() -> None:
    state = loaded(cluster(4), 5000, 7)
    found = plan(state, copies(3))
    assert found.decision.inputs == {
        "demand": 20_000,
        "capacity": state.capacity,
        "waiting": 28,
        "largest_group": 8,
        "slots_asked": copies(3),
    }
    pairs, all_four = found.decision.choices
    assert (pairs.stages, pairs.chosen, all_four.stages, all_four.chosen) == (2, False, 4, True)
    assert pairs.verdict == f"{copies(3) - pairs.slots} slots too few"
    assert all_four.slots == gained(found)


def costs(state: ClusterState) -> list[RestoreCost]:
    """Of splitting each group into full replicas, cheapest first."""
    return cheapest_first(state, [split(state, g, 1) for g in state.groups() if g.cooperative])


def test_the_cheapest_split_is_of_the_group_with_the_least_to_lose() -> None:
    state = drop(drop(cluster(4), None, 0, 1), None, 2, 3)
    busy = {0: 900, 1: 100, 2: 500, 3: 100}
    state = ClusterState(
        instances=tuple(
            with_load(s, used=busy[s.instance], demand=busy[s.instance]) for s in state.instances
        )
    )
    first, second = costs(state)
    assert (set(first.group.ids), set(second.group.ids)) == ({2, 3}, {0, 1})
    assert first.lost == second.lost
    assert first.moved == 300
    assert first.slots_per_stage < second.slots_per_stage
    restore = plan_restore(state, epoch=9, reason="", instances=[2])
    assert [c.chosen for c in restore.decision.choices] == [True, False]
    assert sizes(carried_out(state, restore)) == [1, 1, 2]


def test_longer_pipelines_are_split_first() -> None:
    """As empty as the others, and every request gets rid of more stages."""
    state = drop(drop(cluster(6), None, 0, 1), None, 2, 3, 4, 5)
    assert len(costs(state)[0].group.members) == 4


def test_a_group_of_four_becomes_two_pairs_and_each_member_keeps_its_layers() -> None:
    four = drop(drop(cluster(4), copies(2)), 1)
    (group,) = four.groups()
    plan = plan_restore(four, epoch=9, reason="", stages=2)
    pairs = carried_out(four, plan)
    assert sizes(pairs) == [2, 2]
    for pair in plan.transition.after:
        assert pair.epoch == 9
        assert pair.covers(30)
        assert all(group.member(m.instance).layers.within(m.layers) for m in pair.members)
    again = drop(cluster(4), copies(2))
    assert pairs.capacity == plan.capacity_after == again.capacity
    assert [(c.what, c.chosen) for c in plan.decision.choices] == [
        ("split 0, 1, 2, 3 into groups of 2", True),
        ("split 0, 1, 2, 3", False),
    ]
    assert plan.decision.choices[0].slots == pairs.capacity - four.capacity
    assert sizes(carried_out(pairs, plan_restore(pairs, epoch=10, reason=""))) == [1] * 4
    with pytest.raises(NoPlan, match="in place already"):
        plan_restore(pairs, epoch=10, reason="", stages=2)


def test_a_split_into_pairs_moves_only_the_kv_of_layers_that_change_hands() -> None:
    state = drop(drop(cluster(4), copies(2)), 1)
    state = ClusterState(
        instances=tuple(with_load(s, used=300, demand=300) for s in state.instances)
    )
    (group,) = state.groups()
    whole, pairs = cheapest_first(state, splits(state, group))[::-1]
    assert (whole.split.stages, pairs.split.stages) == (1, 2)
    assert (whole.stages, pairs.stages) == (12, 8)
    assert (whole.moved, pairs.moved) == (900, 600)
    assert pairs.pressure < whole.pressure


@pytest.mark.parametrize("size", range(2, 9))
def test_splits_go_from_full_replicas_to_two_parts(size: int) -> None:
    state = drop(cluster(size), None, *range(size))
    (group,) = state.groups()
    found = list(splits(state, group))
    lengths = [sorted(len(p.members) for p in s.parts) for s in found]
    assert lengths[0] == [1] * size
    assert len(lengths[-1]) == 2 or size == 2
    for each in found:
        assert sorted(i for p in each.parts for i in p.ids) == list(range(size))
        assert max(len(p.members) for p in each.parts) <= each.stages
        assert all(p.covers(30) for p in each.parts)
    capacities = [sum(m.capacity for p in s.parts for m in p.members) for s in found]
    assert capacities == sorted(capacities)


def test_members_that_disagree_on_their_group_are_left_alone() -> None:
    together = drop(cluster(3), None, 0, 1)
    half = ClusterState(instances=(together.instance(0), *cluster(3).instances[1:]))
    assert [g.ids for g in half.groups()] == [(1,), (2,)]
    with pytest.raises(NoPlan, match="not available"):
        drop(half, None, 0, 2)
