"""Groups are made within hosts as far as that goes, of the hottest, and equally hot."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sglang.policy.decision import NoPlan
from kunserve_sglang.policy.planner import Plan, plan_drop
from kunserve_sglang.policy.service_level import Slowness
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.transition_request import DropRequest
from tests.support.clusters import carried_out, cluster, with_load
from tests.unit.policy.test_weighing import MEMORY_IS_SHORT, controller, overloaded

EVERYTHING = 1 << 60


def on_hosts(state: ClusterState, *hosts: str) -> ClusterState:
    return ClusterState(
        instances=tuple(
            msgspec.structs.replace(s, host=host)
            for s, host in zip(state.instances, hosts, strict=True)
        )
    )


def hot(state: ClusterState, *instances: int) -> ClusterState:
    return ClusterState(
        instances=tuple(
            with_load(s, demand=5000, waiting=3) if s.instance in instances else s
            for s in state.instances
        )
    )


def plan(state: ClusterState, tokens: int, largest: int = 8, *, across: bool = True) -> Plan:
    return plan_drop(
        state, epoch=1, reason="", max_group_size=largest, tokens=tokens, across=across
    )


def groups(made: Plan) -> list[list[int]]:
    return sorted(sorted(layout.ids) for layout in made.transition.after)


def test_pairs_are_made_within_hosts() -> None:
    state = on_hosts(cluster(8), *"abababab")
    made = groups(plan(state, EVERYTHING, largest=2))
    assert len(made) == 4
    assert all(first % 2 == second % 2 for first, second in made)


def test_the_host_where_it_is_hot_is_the_one_that_merges() -> None:
    state = hot(on_hosts(cluster(8), *"aaaabbbb"), 5, 7)
    assert groups(plan(state, 1)) == [[5, 7]]


def test_who_is_hot_gets_the_room_of_a_neighbour_and_not_of_another_host() -> None:
    state = hot(on_hosts(cluster(4), *"aabb"), 0, 2)
    one_pair = plan(state, 1)
    tokens = 2 * (one_pair.capacity_after - one_pair.capacity_before)
    assert groups(plan(state, tokens, largest=2)) == [[0, 1], [2, 3]]


def test_where_requests_wait_and_no_neighbour_is_left_another_host_helps() -> None:
    state = hot(on_hosts(cluster(5), *"aabbc"), 4)
    ((lonely, _),) = [sorted(group, reverse=True) for group in groups(plan(state, 1))]
    assert lonely == 4
    # Two pairs: the other one is within a host again.
    one = plan(state, 1)
    tokens = 2 * (one.capacity_after - one.capacity_before)
    with_four, other = sorted(groups(plan(state, tokens, largest=2)), key=lambda g: 4 not in g)
    assert 4 in with_four
    assert other in ([0, 1], [2, 3])


def test_what_fits_nowhere_goes_across_hosts_if_it_may() -> None:
    state = on_hosts(cluster(3), *"abc")
    assert len(groups(plan(state, 1))) == 1
    with pytest.raises(NoPlan):
        plan(state, 1, across=False)


def test_within_hosts_there_is_as_much_as_these_bring() -> None:
    state = on_hosts(cluster(5), *"aabbc")
    everything = plan(state, EVERYTHING)
    near = plan(state, EVERYTHING, across=False)
    assert groups(near) == [[0, 1], [2, 3]]
    assert near.capacity_before < near.capacity_after < everything.capacity_after


def test_a_group_across_hosts_goes_with_others_on_the_same_hosts() -> None:
    state = on_hosts(cluster(6), *"ababac")
    for pair in ((0, 1), (2, 3)):
        named = plan_drop(state, epoch=1, reason="", max_group_size=8, instances=pair)
        state = carried_out(state, named)
    assert groups(plan(state, EVERYTHING, largest=4, across=False)) == [[0, 1, 2, 3]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from("abcd"), min_size=2, max_size=24),
    st.integers(1, 60_000),
    st.integers(2, 8),
    st.data(),
)
def test_where_instances_are_changes_who_and_nothing_else(
    hosts: list[str], tokens: int, largest: int, data: st.DataObject
) -> None:
    all_hot = st.sets(st.integers(0, len(hosts) - 1))
    somewhere = hot(cluster(len(hosts)), *data.draw(st.just(set()) | all_hot))
    placed = on_hosts(somewhere, *hosts)
    anywhere, made = plan(somewhere, tokens, largest), plan(placed, tokens, largest)
    assert made.capacity_after - made.capacity_before == (
        anywhere.capacity_after - anywhere.capacity_before
    )
    sizes, expected = (Counter(len(g) for g in groups(p)) for p in (made, anywhere))
    assert sizes == expected
    members = [i for group in groups(made) for i in group]
    assert len(members) == len(set(members))
    _no_pair_could_be_nearer(placed, groups(made), hosts)


def _no_pair_could_be_nearer(state: ClusterState, made: list[list[int]], hosts: list[str]) -> None:
    """Where all groups are pairs, at most one of each host is left for pairs across hosts."""
    if any(len(group) != 2 for group in made) or any(s.load.waiting for s in state.instances):
        return
    by_number = {s.instance: s.host for s in state.instances}
    across = [g for g in made if len({by_number[i] for i in g}) > 1]
    within = Counter(by_number[g[0]] for g in made if g not in across)
    free = {host: n - 2 * within[host] for host, n in Counter(hosts).items()}
    assert not across or all(n < 2 for n in free.values())


# -- weighed -------------------------------------------------------------------------------------


def weighed(slowness: Slowness) -> Plan:
    """A burst at three instances, of which two are on one host."""
    state = overloaded(MEMORY_IS_SHORT, size=3)
    asked = controller()
    asked._calibration = _Learnt(slowness)  # type: ignore[assignment]
    request = DropRequest(tokens=EVERYTHING, weighed=True, reason="demand exceeds capacity")
    return asked.plan(request, on_hosts(state, *"aab"), 1)


class _Learnt:
    def __init__(self, slowness: Slowness) -> None:
        self.slowness = slowness


def test_what_waits_across_hosts_is_no_bar_to_what_is_near() -> None:
    """Full plan: two pairs within hosts and one across; over a slow network, the two alone."""
    asked = controller()
    asked._calibration = _Learnt(Slowness(across=20.0))  # type: ignore[assignment]
    state = on_hosts(overloaded(MEMORY_IS_SHORT, size=6), *"aabbcd")
    request = DropRequest(tokens=EVERYTHING, weighed=True, reason="demand exceeds capacity")
    made = asked.plan(request, state, 1)
    assert groups(made) == [[0, 1], [2, 3]]


def test_over_a_slow_network_groups_stay_within_hosts() -> None:
    near = Slowness()
    assert groups(weighed(near)) == [[0, 1, 2]]
    slow = weighed(Slowness(across=20.0))
    assert groups(slow) == [[0, 1]]
    chosen = {choice.what: choice.chosen for choice in slow.decision.choices if choice.e2e_ms}
    assert chosen == {
        "let requests queue": False,
        "pipelines of up to 3 stages, some across hosts": False,
        "pipelines of up to 2 stages": True,
    }
