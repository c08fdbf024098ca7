"""What holds for plans of any cluster: coverage, conservation, monotone freeing, few stages."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sglang.policy.planner import NoPlan, plan_drop, plan_restore
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.testing.exhaustive_planner import MergeOutcome, every_outcome, stages_of
from tests.support.clusters import alone, carried_out, profile
from tests.support.plans import drop, gained, plan


def enough(outcomes: list[MergeOutcome], tokens: int) -> MergeOutcome:
    return min((o for o in outcomes if o.gained >= tokens), key=lambda o: o.stages)


@settings(max_examples=40, derandomize=True)
@given(st.integers(2, 7), st.integers(2, 8), st.integers(1, 6))
def test_no_plan_that_frees_enough_has_fewer_stages(size: int, largest: int, merges: int) -> None:
    """Against all partitions, where layers divide evenly, so that a merge frees a whole copy."""
    memory = profile(layers=840, pages=840 * 1600, layer_pages=1000)
    state = ClusterState(instances=tuple(alone(i, memory=memory) for i in range(size)))
    outcomes = every_outcome(state, largest)
    copy = gained(plan(state, 1))
    tokens = min(int((merges - 0.5) * copy), max(o.gained for o in outcomes))
    found = plan_drop(state, epoch=1, reason="", max_group_size=largest, tokens=tokens)
    assert gained(found) >= tokens
    after = carried_out(state, found).groups()
    assert stages_of(after, found.transition.after) == enough(outcomes, tokens).stages


def test_eight_instances_against_all_partitions() -> None:
    """Real layer counts, groups there already, two budgets: other plans are hardly ever better."""
    chance = random.Random(5)
    equal = cases = 0
    while cases < 40:
        layers = chance.choice([24, 28, 30, 32, 36, 48, 64, 80])
        kinds = [profile(layers=layers, pages=layers * p) for p in (160, chance.choice([160, 220]))]
        state = ClusterState(
            instances=tuple(
                alone(i, memory=chance.choice(kinds)) for i in range(chance.randint(3, 6))
            )
        )
        for _ in range(chance.randint(0, 2)):
            state = drop(state, 1) if len(state.groups()) > 2 else state
        outcomes = every_outcome(state, 8)
        most = max(o.gained for o in outcomes)
        if most <= 0:
            continue
        cases += 1
        tokens = chance.randint(1, most)
        found = plan(state, tokens)
        after = carried_out(state, found).groups()
        best = enough(outcomes, tokens).stages
        assert gained(found) >= min(tokens, 0.8 * most)
        equal += stages_of(after, found.transition.after) == best
    assert equal >= 0.9 * cases


@settings(max_examples=80)
@given(
    st.integers(2, 24),
    st.lists(st.sampled_from([140, 160, 240]), min_size=1, max_size=3),
    st.integers(8, 64),
    st.lists(st.integers(1, 200_000), min_size=2, max_size=8),
)
def test_more_asked_is_never_less_freed(
    size: int, pages: list[int], layers: int, asked: list[int]
) -> None:
    state = ClusterState(
        instances=tuple(
            alone(i, memory=profile(layers=layers, pages=layers * pages[i % len(pages)]))
            for i in range(size)
        )
    )
    freed = []
    for tokens in sorted(asked):
        try:
            freed.append(gained(plan(state, tokens)))
        except NoPlan:
            freed.append(0)
    assert freed == sorted(freed)


@settings(max_examples=60)
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
    for stages in (4, 2, 1):
        if all(len(g.members) <= stages for g in state.groups()):
            continue
        plan = plan_restore(state, epoch=99, reason="", stages=stages)
        for group in plan.transition.after:
            assert group.covers(layers)
            assert len(group.members) <= stages
            for m in group.members:
                assert m.capacity <= memory.capacity(m.layers, len(group.members))
        if stages == 1:  # shorter pipelines can have more slots where layers divide unevenly
            assert plan.capacity_after < plan.capacity_before
        state = carried_out(state, plan)
        assert sorted(i for g in state.groups() for i in g.ids) == list(range(size))
    assert all(g.members[0].layers.hi == layers for g in state.groups())
    assert state.capacity == first.capacity
