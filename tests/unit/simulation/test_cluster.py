"""The simulator: hand-computed cases, and what must hold in every one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sglang.core.cost_model import CostModel, Work
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.layout import LayerRange, Layout, Member
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.core.settings import (
    ClusterConfig,
    DispatchPolicy,
    ExchangeMode,
    MicroBatches,
    OverloadPolicy,
)
from kunserve_sglang.simulation import Profile, SimulatedCluster, SimulationResult
from kunserve_sglang.simulation import instances as instances_module
from kunserve_sglang.simulation.cluster_profile import HostCost, Links, StepCost
from kunserve_sglang.simulation.costs import Costs
from kunserve_sglang.simulation.group import Group
from kunserve_sglang.simulation.host import SimulatedHost
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.owner import Owner
from kunserve_sglang.simulation.solo import Solo
from kunserve_sglang.simulation.traces import TraceRow

PREFILL = (0.5, 0.25, 0.125, 0.0, 0.0, 0.0)
DECODE = (2.0, 0.5, 0.0)
LAYERS = 4


def profile(slots: int = 400, chunk: int = 64, **values: object) -> Profile:
    """Four layers of 2 KiB, KV of 64 bytes a token: about `slots` slots beside the parameters."""
    settings = {
        "name": "tiny",
        "source": "made up",
        "layers": LAYERS,
        "memory_budget": str(LAYERS * 2048 + slots * 64 + LAYERS * 2 * 64),
        "resident_bytes": 0,
        "layer_bytes": 2048,
        "kv_bytes_per_token": 64,
        "activation_bytes_per_token": 8,
        "page_bytes": 64,
        "chunked_prefill_size": chunk,
        "cost": CostModel(prefill=PREFILL, decode=DECODE),
        "links": Links(
            exchange_bytes_per_s=1e6,
            parameters_bytes_per_s=1e6,
            activations_bytes_per_s=1e6,
            hop_ms=0.125,
            transition_ms=1.0,
        ),
    }
    return Profile(**{**settings, **values})  # type: ignore[arg-type]


def slow(parameters_bytes_per_s: float) -> Links:
    """The links of `profile`, but for parameters."""
    return msgspec.structs.replace(profile().links, parameters_bytes_per_s=parameters_bytes_per_s)


def simulate(
    rows: Sequence[TraceRow],
    instances: int = 1,
    policy: str = "none",
    machine: Profile | None = None,
    **config: object,
) -> SimulationResult:
    settings = ClusterConfig(
        num_instances=instances,
        overload_policy=OverloadPolicy(policy),
        **config,  # type: ignore[arg-type]
    )
    return SimulatedCluster(machine or profile(), settings).run(rows)


# -- by hand -------------------------------------------------------------------------------------


def test_one_request() -> None:
    """Prefill 4 * (0.5 + 0.25 + 16 * 0.125) = 11 ms; two decode steps of 4 * 2.5 = 10 ms."""
    (job,) = simulate([TraceRow(1.0, 16, 3)]).jobs
    assert job.ttft == pytest.approx(0.011)
    assert job.end == pytest.approx(1.031)
    assert job.tpot == pytest.approx(0.010)


def test_a_long_prompt_goes_in_chunks() -> None:
    """Of 64, 64 and 2 tokens: 4 * 0.75 each, and 4 * 0.125 a token."""
    (job,) = simulate([TraceRow(0.0, 130, 1)]).jobs
    assert job.ttft == pytest.approx(3 * 0.003 + 130 * 0.0005)
    assert job.end == job.first


def test_an_arrival_waits_for_the_step_and_then_comes_first() -> None:
    """The first decodes from 11 ms on; at 25 ms its second step runs until 31 ms."""
    first, second = simulate([TraceRow(0.0, 16, 5), TraceRow(0.025, 8, 1)]).jobs
    assert second.first == pytest.approx(0.031 + 4 * (0.75 + 1.0) / 1e3)
    assert first.end == pytest.approx(0.031 + 0.007 + 2 * 0.010)


def test_requests_that_arrive_together_share_a_prefill_and_a_decode_step() -> None:
    """4 * (0.5 + 2 * 0.25 + 32 * 0.125) = 20 ms, then one step of 4 * (2 + 2 * 0.5) = 12 ms.

    The second does not share: the first is being computed when it arrives.
    """
    jobs = simulate([TraceRow(0.0, 2, 2), *[TraceRow(0.001, 16, 2)] * 2]).jobs
    start = 4 * (0.75 + 0.25) / 1e3
    assert jobs[1].first == jobs[2].first == pytest.approx(start + 0.020)
    # All three decode together: 4 * (2 + 3 * 0.5).
    assert [j.end for j in jobs] == pytest.approx([start + 0.034] * 3)


def test_the_owners_part_of_a_step_counts() -> None:
    step = StepCost(fixed_ms=3.0, request_ms=2.0, token_ms=0.5)
    machine = profile(step=step, frontend_ms=6.0)
    (job,) = simulate([TraceRow(0.0, 16, 2)], machine=machine).jobs
    assert job.ttft == pytest.approx(0.006 + 0.011 + 0.003 + 0.002 + 16 * 0.0005)
    assert job.end - job.first == pytest.approx(0.010 + 0.003 + 0.002 + 0.0005)


def test_instances_of_one_core_halve_their_speed() -> None:
    """Three instances on two cores: the first and the last share one, as `divide_cpus` says."""
    machine = profile(host=HostCost(cores=2))
    first, second, last = simulate([TraceRow(0.0, 16, 1)] * 3, 3, machine=machine).jobs
    assert second.ttft == pytest.approx(0.011)
    assert last.ttft == pytest.approx(2 * 0.011)
    assert first.ttft == pytest.approx(0.011)  # the last began after it


def test_frontends_take_idle_cores_first() -> None:
    """A core and a half of frontends on two cores: half a core is left, if no other is idle."""
    host = SimulatedHost(HostCost(cores=2, token_ms=1.0))
    host.delivered(1.0, 750)  # averaged over half a second
    assert host.begin(0, 1.0, 0.1) == pytest.approx(0.1 / 0.5)
    assert host.begin(1, 1.0, 0.1) == pytest.approx(0.1 / 0.25)
    host.end(0)
    host.end(1)
    assert host.begin(1, 5.0, 0.1) == pytest.approx(0.1)  # long ago


def test_first_tokens_leave_a_step_later_where_results_wait_for_the_next() -> None:
    """11 ms for the prompt; the step after it lasts 10 ms, and the answer of one token has none."""
    machine = profile(step=StepCost(delayed=True))
    longer, single = simulate([TraceRow(0.0, 16, 5), TraceRow(1.0, 16, 1)], machine=machine).jobs
    assert longer.ttft == pytest.approx(0.021)
    assert longer.end == pytest.approx(0.051)
    assert single.ttft == pytest.approx(0.011)


def test_steps_get_slower_when_frontends_have_much_to_do() -> None:
    rows = [TraceRow(0.001 * i, 16, 40) for i in range(8)]
    machine = profile(host=HostCost(cores=2, token_ms=1.0))
    alone, shared = (simulate(rows, 2, machine=m).jobs for m in (profile(), machine))
    assert all(b.tpot > 1.1 * a.tpot for a, b in zip(alone, shared, strict=True))


def test_a_full_pool_makes_requests_wait() -> None:
    """400 slots: two of 150 + 40 are admitted, the third when one of them has ended."""
    jobs = simulate([TraceRow(0.0, 150, 40), TraceRow(0.0, 150, 41), TraceRow(0.0, 150, 40)]).jobs
    assert jobs[0].first <= jobs[1].first < jobs[0].end <= jobs[2].first


@pytest.mark.parametrize("position", [0, 1])
def test_a_pipeline_of_two_stages(position: int) -> None:
    """Two layers a stage: 2 * (0.75 + 2) ms each for the prompt, 2 * 2.5 for the decode step.

    Two hops of 0.125 ms and 8 us a token, whichever stage the owner is.
    """
    machine = profile()
    owners = [Owner(i, 400, machine) for i in range(2)]
    layout = Layout(
        epoch=1,
        members=tuple(
            Member(instance=i, layers=LayerRange(2 * i, 2 * i + 2), capacity=400, address="")
            for i in range(2)
        ),
    )
    group = Group(layout, owners, Costs(machine), SimulatedHost(machine.host), machine.links, 8)
    job = Job(0, 0.0, 16, 2)
    owners[position].add(job)
    group.arrived(position, 0.0)
    while not group.resting:
        changed = group.fire(group.due)
        assert changed is None or changed is owners[position]
    assert job.first == pytest.approx(0.011 + 2 * (0.000125 + 16 * 8e-6))
    assert job.end - job.first == pytest.approx(0.010 + 2 * (0.000125 + 8e-6))
    assert owners[position].used == owners[position].running == 0


def test_a_drop_lets_more_requests_in() -> None:
    burst = [TraceRow(0.01 * i, 20, 60) for i in range(60)]
    queued, dropped = (simulate(burst, 2, policy) for policy in ("none", "drop"))
    (drop,) = dropped.committed(TransitionKind.DROP)
    assert drop.freed_bytes == LAYERS * 2048
    assert drop.capacity_after > drop.capacity_before == queued.capacity
    assert drop.stall_s > 0.001
    assert dropped.committed(TransitionKind.RESTORE)
    assert max(s.running for s in dropped.samples) > max(s.running for s in queued.samples)
    assert dropped.samples[-1].slots_capacity == queued.capacity


BURST = [TraceRow(0.01 * i, 150, 60) for i in range(12)]


def test_a_restore_loads_what_was_dropped() -> None:
    """Members stop twice for 1 ms, to make room and to switch.

    In between, two layers come to each member: 4,096 bytes at 1 MB/s; KV of nobody.
    """
    (restore,) = simulate(BURST, 2, "drop").committed(TransitionKind.RESTORE)
    assert restore.loaded_bytes == LAYERS * 2048
    assert restore.exchanged_bytes == 0
    assert restore.stall_s == pytest.approx(0.002)
    assert restore.moving_s == pytest.approx(0.004096)


def test_busy_members_take_their_time_with_a_restore() -> None:
    """Both always have a request to serve, so a tenth of the time goes into 0.4096 s of loading."""
    machine = profile(links=slow(1e4))
    trickle = [TraceRow(0.5 * i, 4, 55) for i in range(80)]
    outcome = simulate(sorted(BURST + trickle, key=lambda r: r.arrival_s), 2, "drop", machine)
    restore = outcome.committed(TransitionKind.RESTORE)[0]
    assert restore.time < 30
    assert restore.moving_s == pytest.approx(4.096, rel=0.1)


def test_without_steps_members_stand_still_for_all_bytes() -> None:
    outcome = simulate(BURST, 2, "drop", exchange=ExchangeMode.STOP)
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
    outcome = simulate(BURST, 2, "drop", machine)
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
    first = simulate(BURST, 2, "drop", profile(links=slow(1e3)))
    (restore,) = first.committed(TransitionKind.RESTORE)
    again = [TraceRow(restore.time + 1 + r.arrival_s, 150, 60) for r in BURST]
    outcome = simulate(BURST + again, 2, "drop", profile(links=slow(1e3)))
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
    result = simulate(BURST, 2, "drop", tpot_limit_ms=1.0)
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
        overload_policy=OverloadPolicy.DROP,
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


def test_one_micro_batch_at_a_time() -> None:
    burst = [TraceRow(0.01 * i, 100, 80) for i in range(30)]
    outcome = simulate(burst, 2, "drop", micro_batches=MicroBatches.ONE)
    assert outcome.committed(TransitionKind.DROP)
    assert all(job.done and not job.failed for job in outcome.jobs)


def test_what_never_fits_is_refused() -> None:
    outcome = simulate([TraceRow(0.0, 500, 1), TraceRow(0.0, 10, 1)])
    assert outcome.refused == 1
    assert [job.prompt for job in outcome.jobs] == [10]
    with pytest.raises(ConfigurationError, match="no request of the trace fits"):
        simulate([TraceRow(0.0, 500, 1)])


# -- closed forms --------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(0, 500_000), st.integers(1, 400))
def test_a_run_of_steps_costs_what_its_steps_cost(count: int, context: int, steps: int) -> None:
    machine = profile(cost=CostModel(prefill=PREFILL, decode=(0.8, 0.04, 0.0011)))
    costs = Costs(machine)
    one_by_one = sum(
        LAYERS * machine.cost.predict(Work(decodes=count, context=context + i * count)) / 1e3
        for i in range(steps)
    )
    assert costs.decode_run(count, context, steps) == pytest.approx(one_by_one)


@given(st.integers(1, 300), st.integers(0, 500_000), st.floats(0, 1e4))
def test_steps_within_a_time_are_complete(count: int, context: int, seconds: float) -> None:
    costs = Costs(profile(cost=CostModel(prefill=PREFILL, decode=(0.8, 0.04, 0.0011))))
    steps = costs.steps_within(count, context, seconds)
    assert costs.decode_run(count, context, steps) <= seconds
    assert costs.decode_run(count, context, steps + 1) > seconds


# -- always --------------------------------------------------------------------------------------

loads = st.lists(
    st.tuples(st.floats(0, 6), st.integers(1, 180), st.integers(1, 150)), min_size=1, max_size=60
).map(lambda rows: [TraceRow(*row) for row in sorted(rows)])


class Watched(Owner):
    """Checks its slots at every change, and remembers in which order it admitted whom."""

    log: dict[int, list[int]]

    def admit(self, chunk_limit: int) -> list[tuple[object, int, int]]:  # type: ignore[override]
        pieces = super().admit(chunk_limit)
        for job, before, _ in pieces:
            if before == 0 and not job.retractions:
                self.log.setdefault(self.number, []).append(job.index)
        self.check()
        return pieces  # type: ignore[return-value]

    def check(self) -> None:
        assert 0 <= self.used <= self.capacity
        decoding = self.decoding
        assert 0 <= decoding.expected <= decoding.remaining
        running = [job for _, _, job in decoding.by_step] or decoding.ready
        assert self.largest_request() >= max((job.in_the_end for job in running), default=0)
        if decoding.by_step:
            steps = [step - decoding.steps for step, _, _ in decoding.by_step]
            assert decoding.expected == sum(steps)

    def advance(self, steps: int, now: float) -> bool:
        finished = super().advance(steps, now)
        self.check()
        return finished

    def take_ready(self, share: int) -> list[object]:  # type: ignore[override]
        batch = super().take_ready(share)
        self.check()
        return batch  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(loads, st.integers(1, 4), st.sampled_from(["none", "drop"]), st.integers(16, 128))
def test_every_request_is_served_once_and_in_order(
    rows: list[TraceRow], instances: int, policy: str, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        Watched.log = {}
        patched.setattr(instances_module, "Owner", Watched)
        outcome = simulate(rows, instances, policy, profile(chunk=chunk))
    assert len(outcome.jobs) == len(rows)  # none is longer than the slots
    for job in outcome.jobs:
        if not job.failed:
            assert job.arrival < job.first <= job.end
            assert job.produced == job.output
            assert (job.first == job.end) == (job.output == 1)
    if not outcome.retractions:
        for number, admitted in Watched.log.items():
            assert admitted == [j.index for j in outcome.jobs if j.instance == number]
    assert outcome.samples[-1].running == outcome.samples[-1].waiting == 0
    assert outcome.samples[-1].slots_used == 0
    assert outcome.samples[-1].slots_capacity == outcome.capacity
    for event in outcome.events:
        assert event.waited_s >= 0
        assert event.stall_s >= 0
        assert event.moving_s >= 0


@settings(max_examples=10, deadline=None)
@given(loads, st.integers(1, 3))
def test_the_same_input_gives_the_same_output(rows: list[TraceRow], instances: int) -> None:
    first, second = (simulate(rows, instances, "drop") for _ in range(2))
    assert [(j.first, j.end) for j in first.jobs] == [(j.first, j.end) for j in second.jobs]
    assert first.events == second.events
    assert first.samples == second.samples


def test_retracted_requests_come_back() -> None:
    """SGLang bets on outputs being short; here they are as long as their limit."""
    rows = [TraceRow(0.0, 20, 150) for _ in range(100)]
    outcome = simulate(rows, machine=profile(slots=1000))
    assert outcome.retractions > 0
    assert all(job.produced == job.output for job in outcome.jobs)
    assert not any(math.isnan(job.end) for job in outcome.jobs)
