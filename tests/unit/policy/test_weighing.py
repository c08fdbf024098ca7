"""Drops and restores by service level: which state calls for what, and what is said of it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.first_token import FirstTokenLimit
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.load import Load, Slots
from kunserve_sglang.policy import bounds as bounds_module
from kunserve_sglang.policy.bounds import AT_ONCE, Bounds
from kunserve_sglang.policy.controller import Controller
from kunserve_sglang.policy.decision import NoPlan
from kunserve_sglang.policy.dropping import weighed_restore
from kunserve_sglang.policy.planner import Plan, plan_drop
from kunserve_sglang.policy.service_level import ServiceLevel
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.transition_request import DropRequest, RestoreRequest
from kunserve_sglang.policy.weighing import Expected
from tests.support.clusters import carried_out, cluster

MEMORY_IS_SHORT = CostModel(prefill=(0.05, 0.01, 1e-3, 0, 0, 0), decode=(1.0, 1e-3, 0.0))
"""A step takes much the same whatever the batch."""

COMPUTING_IS_SHORT = CostModel(prefill=(0.05, 0.01, 0.2, 0, 0, 0), decode=(0.01, 1.0, 0.0))
"""Twice the batch takes twice as long, and prompts most of the time."""

PROMPT, OUTPUT = 100, 200
WEIGHED = DropRequest(tokens=1000, weighed=True, reason="demand exceeds capacity")


def overloaded(
    costs: CostModel | None, *, waiting: int = 60, size: int = 2, longest: int = 300
) -> ClusterState:
    """Instances that are full of requests halfway through their answers."""
    state = cluster(size)
    capacity = state.instances[0].load.slots.capacity
    running = capacity // (PROMPT + OUTPUT)
    used = running * (PROMPT + OUTPUT // 2)
    load = Load(
        slots=Slots(used=used, cached=0, capacity=capacity),
        running=running,
        waiting=waiting,
        demand=used + running * OUTPUT // 2 + waiting * (PROMPT + OUTPUT),
        prompts=waiting * PROMPT,
        longest=longest if waiting else 0,
        produced=running * OUTPUT // 2,
    )
    return ClusterState(
        instances=tuple(msgspec.structs.replace(s, load=load, costs=costs) for s in state.instances)
    )


def in_a_group(state: ClusterState) -> ClusterState:
    plan = plan_drop(state, epoch=1, reason="", max_group_size=8, tokens=1 << 60)
    return carried_out(state, plan)


def controller(**config: object) -> Controller:
    return Controller(ClusterConfig(num_instances=2, **config))  # type: ignore[arg-type]


def dropped(state: ClusterState, **config: object) -> Plan:
    return controller(**config).plan(WEIGHED, state, 1)


def test_where_memory_is_short_it_drops_and_says_why() -> None:
    plan = dropped(overloaded(MEMORY_IS_SHORT))
    assert plan.capacity_after > plan.capacity_before
    assert "demand exceeds capacity" in plan.reason
    assert plan.reason.endswith("memory is short")
    queue, drop = plan.decision.choices[:2]
    assert (queue.chosen, drop.chosen) == (False, True)
    assert queue.attainment is not None
    assert drop.attainment is not None
    assert drop.attainment > queue.attainment
    assert plan.decision.inputs["output_tokens"] == pytest.approx(OUTPUT, rel=0.1)
    assert plan.decision.inputs["prompt_tokens"] == pytest.approx(PROMPT, rel=0.1)


def test_where_computing_is_short_requests_queue_and_it_says_why() -> None:
    state = overloaded(COMPUTING_IS_SHORT)
    with pytest.raises(NoPlan, match="not memory is short but computing") as declined:
        dropped(state)
    decision = declined.value.decision
    assert decision is not None
    queue, *drops = decision.choices
    assert queue.chosen
    assert drops
    assert not any(choice.chosen for choice in drops)
    for choice in (queue, drops[0]):
        assert choice.tpot_ms is not None
        assert choice.tokens_per_s is not None
        assert "within their limits" in choice.verdict


def test_where_all_keep_their_limits_in_the_queue_it_says_so() -> None:
    patient = {"slo_ttft_ms": 1e9, "slo_tpot_ms": 1e9}
    with pytest.raises(NoPlan, match="requests that queue keep their limits"):
        dropped(overloaded(COMPUTING_IS_SHORT), **patient)


def test_dropping_always_asks_for_memory_alone() -> None:
    state = overloaded(COMPUTING_IS_SHORT)
    plan = dropped(state, overload_policy=OverloadPolicy.DROP_ALWAYS)
    assert plan.reason == WEIGHED.reason


def test_who_asks_by_hand_gets_what_was_asked_for() -> None:
    request = DropRequest(tokens=1000)
    assert controller().plan(request, overloaded(COMPUTING_IS_SHORT), 1).instances == [0, 1]


def test_without_measured_costs_memory_decides() -> None:
    assert dropped(overloaded(None)).reason == WEIGHED.reason
    half = overloaded(COMPUTING_IS_SHORT)
    known, unknown = half.instances
    mixed = ClusterState(instances=(known, msgspec.structs.replace(unknown, costs=None)))
    assert dropped(mixed).reason == WEIGHED.reason


@pytest.mark.parametrize("cost", [0.0, -1.0])
def test_costs_that_cannot_be_are_none(cost: float) -> None:
    state = overloaded(CostModel(prefill=(cost,) * 6, decode=(cost,) * 3))
    assert dropped(state).reason == WEIGHED.reason
    assert controller().limits(state) is None
    assert Bounds().look(in_a_group(state), expected(1.0)) == {}


def test_who_could_never_be_served_otherwise_gets_a_drop() -> None:
    assert dropped(overloaded(COMPUTING_IS_SHORT, longest=1 << 20)).reason == WEIGHED.reason


def test_a_hard_limit_holds_whatever_users_want() -> None:
    with pytest.raises(NoPlan, match="break the limit"):
        dropped(overloaded(MEMORY_IS_SHORT), tpot_limit_ms=1.0)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([MEMORY_IS_SHORT, COMPUTING_IS_SHORT]),
    st.integers(0, 3),
    st.floats(0.2, 5),
)
def test_with_memory_enough_it_never_drops(costs: CostModel, waiting: int, slower: float) -> None:
    """As many requests in instances with twenty times the slots: nothing is gained by more."""
    few = overloaded(costs, waiting=waiting)
    roomy = []
    for s in few.instances:
        slots = msgspec.structs.replace(s.load.slots, capacity=20 * s.load.slots.capacity)
        member = msgspec.structs.replace(s.layout.members[0], capacity=slots.capacity)
        layout = msgspec.structs.replace(s.layout, members=(member,))
        load = msgspec.structs.replace(s.load, slots=slots)
        costs = CostModel(
            prefill=tuple(slower * c for c in s.costs.prefill) if s.costs else (),
            decode=tuple(slower * c for c in s.costs.decode) if s.costs else (),
        )
        roomy.append(msgspec.structs.replace(s, load=load, layout=layout, costs=costs))
    with pytest.raises(NoPlan):
        dropped(ClusterState(instances=tuple(roomy)))


# -- restores ------------------------------------------------------------------------------------


def test_a_restore_waits_while_fewer_would_keep_their_limits() -> None:
    group = in_a_group(overloaded(MEMORY_IS_SHORT, waiting=0))
    plan = controller().plan(RestoreRequest(weighed=True), group, 2)
    assert plan.instances == [0, 1]
    many_come = Expected(level=ServiceLevel(), arrivals_per_s=11.0)
    with pytest.raises(NoPlan, match="later"):
        weighed_restore(group, plan, many_come)
    assert weighed_restore(group, plan, Expected(level=ServiceLevel())) is plan


# -- bounds --------------------------------------------------------------------------------------


def expected(tpot_ms: float | None = None) -> Expected:
    return Expected(level=ServiceLevel(tpot_ms=tpot_ms, ttft_ms=1e6))


def test_a_group_runs_no_more_than_hold_the_limit_of_a_token() -> None:
    group = in_a_group(overloaded(COMPUTING_IS_SHORT))
    running = group.instances[0].load.running
    limit = 2 * running * 30 * 1.15 * 1.1
    found = Bounds().look(group, expected(limit))
    assert set(found) == {0, 1}
    assert running <= found[0] < running + 60


def test_nobody_is_bounded_without_need() -> None:
    group = in_a_group(overloaded(COMPUTING_IS_SHORT))
    assert Bounds().look(group, expected(1e6)) == {}
    assert Bounds().look(overloaded(COMPUTING_IS_SHORT), expected(1.0)) == {}
    assert Bounds().look(in_a_group(overloaded(None)), expected(1.0)) == {}


def test_a_bound_is_never_below_what_would_run_without_a_drop() -> None:
    alone = overloaded(COMPUTING_IS_SHORT)
    found = Bounds().look(in_a_group(alone), expected(1.0))
    fits = alone.instances[0].load.slots.capacity // (PROMPT + OUTPUT)
    assert all(most >= fits * 0.9 for most in found.values())


def flooded(running: int, waiting: int, costs: CostModel = COMPUTING_IS_SHORT) -> ClusterState:
    """Two instances with slots for all that wait, who come faster than they are computed."""
    few = overloaded(costs, waiting=waiting)
    states = []
    for s in few.instances:
        slots = msgspec.structs.replace(s.load.slots, used=running * (PROMPT + OUTPUT // 2))
        load = msgspec.structs.replace(
            s.load,
            slots=slots,
            running=running,
            produced=running * OUTPUT // 2,
            demand=slots.used + running * OUTPUT // 2 + waiting * (PROMPT + OUTPUT),
        )
        states.append(msgspec.structs.replace(s, load=load))
    return ClusterState(instances=tuple(states))


def test_an_instance_alone_runs_no_more_than_hold_the_limit_of_a_token() -> None:
    step = 30 * 1.15  # milliseconds for each request
    state = flooded(running=4, waiting=10)
    found = Bounds().look(state, expected(8 * step))
    assert set(found) == {0, 1}
    assert all(4 <= most <= 8 for most in found.values())


def test_limits_that_nobody_can_keep_bound_no_instance_alone() -> None:
    assert Bounds().look(flooded(running=4, waiting=10), expected(1.0)) == {}


def test_an_instance_alone_is_looked_at_while_requests_wait_or_it_is_bounded() -> None:
    bounds = Bounds()
    limits = expected(8 * 30 * 1.15)
    assert bounds.look(flooded(running=4, waiting=0), limits) == {}
    assert set(bounds.look(flooded(running=4, waiting=10), limits)) == {0, 1}
    assert bounds.look(flooded(running=4, waiting=0), limits) == {}


def test_of_many_groups_some_are_looked_at_and_all_when_it_is_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = 2 * AT_ONCE + 1
    alone = cluster(2 * groups)
    everybody = plan_drop(alone, epoch=1, reason="", max_group_size=2, tokens=1 << 60)
    state = carried_out(alone, everybody)
    looked_at: list[tuple[int, ...]] = []

    def bound(_state: ClusterState, group: Layout, _expected: Expected) -> int:
        looked_at.append(group.ids)
        return min(group.ids) + 1

    monkeypatch.setattr(bounds_module, "bound", bound)
    bounds = Bounds()
    for looks in (1, 2, 3):
        found = bounds.look(state, expected())
        assert len(looked_at) == looks * AT_ONCE
    assert len(set(looked_at)) == groups
    assert found == {i: min(ids) + 1 for ids in looked_at for i in ids}
    assert bounds.look(alone, expected()) == {}


def test_instances_are_told_their_bounds() -> None:
    asked = controller(slo_tpot_ms=1.0, slo_ttft_ms=1e6)
    group = in_a_group(overloaded(COMPUTING_IS_SHORT))
    told = asked.admission(group)
    assert {i: said.running for i, said in told.items()} == asked.bounds(group)
    assert {said.first_token for said in told.values()} == {FirstTokenLimit(ms=1e6)}
    blind = controller(overload_policy=OverloadPolicy.DROP_ALWAYS)
    assert {said.running for said in blind.admission(group).values()} == {0}
    assert {said.first_token for said in blind.admission(group).values()} == {FirstTokenLimit()}
    off = carried_out(cluster(2), plan_drop(cluster(2), epoch=1, reason="", max_group_size=2))
    assert {said.running for said in controller().admission(off).values()} == {0}
