"""Drops and restores in the simulated cluster: what moves, who waits, and what it is worth."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest

from kunserve_sglang.core.choices import DispatchPolicy, OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.core.transports import ExchangeMode
from kunserve_sglang.simulation import SimulatedCluster
from kunserve_sglang.simulation.cluster_profile import HostCost
from kunserve_sglang.simulation.costs import Costs
from kunserve_sglang.simulation.host import SimulatedHost
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.owner import Owner
from kunserve_sglang.simulation.solo import Solo
from kunserve_sglang.simulation.traces import TraceRow
from tests.support.simulated import BURST, LAYERS, profile, simulate, slow


def test_a_drop_lets_more_requests_in() -> None:
    burst = [TraceRow(0.01 * i, 20, 60) for i in range(60)]
    queued, dropped = (simulate(burst, 2, policy) for policy in ("none", "drop-always"))
    (drop,) = dropped.committed(TransitionKind.DROP)
    assert drop.freed_bytes == LAYERS * 2048
    assert drop.capacity_after > drop.capacity_before == queued.capacity
    assert drop.stall_s > 0.001
    assert dropped.committed(TransitionKind.RESTORE)
    assert max(s.running for s in dropped.samples) > max(s.running for s in queued.samples)
    assert dropped.samples[-1].slots_capacity == queued.capacity


def test_a_restore_loads_what_was_dropped() -> None:
    """Members stop twice for 1 ms, to make room and to switch.

    In between, two layers come to each member: 4,096 bytes at 1 MB/s; KV of nobody.
    """
    (restore,) = simulate(BURST, 2, "drop-always").committed(TransitionKind.RESTORE)
    assert restore.loaded_bytes == LAYERS * 2048
    assert restore.exchanged_bytes == 0
    assert restore.stall_s == pytest.approx(0.002)
    assert restore.moving_s == pytest.approx(0.004096)


def test_busy_members_take_their_time_with_a_restore() -> None:
    """Both always have a request to serve, so a tenth of the time goes into 0.4096 s of loading."""
    machine = profile(links=slow(1e4))
    trickle = [TraceRow(0.5 * i, 4, 55) for i in range(80)]
    outcome = simulate(
        sorted(BURST + trickle, key=lambda r: r.arrival_s), 2, "drop-always", machine
    )
    restore = outcome.committed(TransitionKind.RESTORE)[0]
    assert restore.time < 30
    assert restore.moving_s == pytest.approx(4.096, rel=0.1)


def test_without_steps_members_stand_still_for_all_bytes() -> None:
    outcome = simulate(BURST, 2, "drop-always", exchange=ExchangeMode.STOP)
    (restore,) = outcome.committed(TransitionKind.RESTORE)
    assert restore.stall_s == pytest.approx(0.001 + 0.004096)
    drop = outcome.committed(TransitionKind.DROP)[0]
    assert drop.exchanged_bytes > 0
    assert drop.stall_s > 0.001 + drop.exchanged_bytes / 2 / 1e6 - 1e-9
    assert drop.moving_s == restore.moving_s == 0


def test_a_drop_gives_some_slots_at_once_and_the_rest_when_kv_has_moved() -> None:
    links = msgspec.structs.replace(profile().links, exchange_bytes_per_s=1e4)
    budget = str(LAYERS * 16384 + 400 * 64 + LAYERS * 2 * 64)
    machine = profile(links=links, layer_bytes=16384, memory_budget=budget)
    outcome = simulate(BURST, 2, "drop-always", machine)
    drop = outcome.committed(TransitionKind.DROP)[0]
    assert drop.stall_s == pytest.approx(0.001)
    # Each of two members sends half of all that moves, or somewhat more, while both serve.
    assert drop.moving_s == pytest.approx(drop.exchanged_bytes / 2 / 1e4, rel=0.2)
    assert drop.moving_s > 0.2
    meanwhile = {
        s.slots_capacity
        for s in outcome.samples
        if drop.time + drop.waited_s + drop.stall_s < s.at_s < drop.time + drop.moving_s
    }
    assert len(meanwhile) == 1
    assert drop.capacity_before < meanwhile.pop() < drop.capacity_after


def test_a_restore_is_given_up_when_requests_wait_again() -> None:
    """4 s of loading, or more while members are busy, and another burst in the middle of it."""
    first = simulate(BURST, 2, "drop-always", profile(links=slow(1e3)))
    (restore,) = first.committed(TransitionKind.RESTORE)
    again = [TraceRow(restore.time + 1 + r.arrival_s, 150, 60) for r in BURST]
    outcome = simulate(BURST + again, 2, "drop-always", profile(links=slow(1e3)))
    given_up = [e for e in outcome.events if e.status == "aborted"]
    assert [e.kind for e in given_up] == [TransitionKind.RESTORE]
    assert given_up[0].capacity_after == given_up[0].capacity_before > outcome.capacity
    assert given_up[0].loaded_bytes == 0
    assert 1 < given_up[0].moving_s < 2
    assert outcome.committed(TransitionKind.RESTORE)
    assert all(job.done and not job.failed for job in outcome.jobs)


def test_a_drop_that_would_break_the_tpot_limit_is_declined() -> None:
    """It is put on record once, however often it is looked for, and requests queue."""
    queued = simulate(BURST, 2, "none")
    result = simulate(BURST, 2, "drop-always", tpot_limit_ms=1.0)
    (declined,) = result.events
    assert (declined.kind, declined.status) == (TransitionKind.DROP, "declined")
    assert "requests wait" in declined.reason
    assert declined.capacity_before == declined.capacity_after == result.capacity
    assert not result.committed(TransitionKind.DROP)
    assert [j.end for j in result.jobs] == [j.end for j in queued.jobs]


def test_slots_of_a_group_follow_demand() -> None:
    """In turn, one instance gets all the long requests, and the other one the short ones."""
    rows = [TraceRow(0.02 * i, 4 if i % 2 else 120, 20 if i % 2 else 100) for i in range(60)]
    config = ClusterConfig(
        num_instances=2,
        dispatch=DispatchPolicy.ROUND_ROBIN,
        overload_policy=OverloadPolicy.DROP_ALWAYS,
    )
    outcome = SimulatedCluster(profile(), config).run(rows)
    rebalances = outcome.committed(TransitionKind.REBALANCE)
    assert rebalances
    for event in rebalances:
        assert event.exchanged_bytes == event.loaded_bytes == event.freed_bytes == 0
        assert event.stall_s == pytest.approx(0.001)
    assert all(a.time + a.stall_s <= b.time for a, b in pairwise(outcome.events))


def test_the_largest_request_is_known_while_it_runs() -> None:
    owner = Owner(0, 400, profile())
    solo = Solo(owner, Costs(profile()), SimulatedHost(HostCost()))
    for i, output in enumerate((30, 5, 10)):
        owner.add(Job(i, 0.0, 10, output))
    assert owner.load().largest == 0
    solo.resume(0.0)
    seen = []
    while solo.busy:
        seen.append(owner.load().largest)
        solo.fire(solo.due)
    assert seen[0] == seen[-1] == 10 + 30 + 1
    assert owner.load().largest == 0


def test_demand_follows_the_answers_there_were() -> None:
    """Without history, 0.7 of what is left; then, of outputs of 20 tokens, 20."""
    owner = Owner(0, 400, profile())
    for i in range(6):
        owner.add(Job(i, 0.0, 10, 20))
    assert owner.demand() == 6 * (10 + 14)
    solo = Solo(owner, Costs(profile()), SimulatedHost(HostCost()))
    for i in range(6, 20):
        owner.add(Job(i, 0.0, 10, 20))
    solo.resume(0.0)
    while solo.busy:
        solo.fire(solo.due)
    assert owner.finished == 20
    assert owner.demand() == 0
    for i in range(6):
        owner.add(Job(i, 0.0, 10, 20))
    assert owner.demand() == 6 * (10 + 20)
