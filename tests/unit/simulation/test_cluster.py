"""The simulator: hand-computed cases, and what must hold in every one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sglang.core.choices import MicroBatches
from kunserve_sglang.core.cost_model import CostModel, Work
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.layout import LayerRange, Layout, Member
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.simulation import instances as instances_module
from kunserve_sglang.simulation.cluster_profile import HostCost, StepCost
from kunserve_sglang.simulation.costs import Costs
from kunserve_sglang.simulation.group import Group
from kunserve_sglang.simulation.host import SimulatedHost
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.owner import Owner
from kunserve_sglang.simulation.traces import TraceRow
from tests.support.simulated import LAYERS, PREFILL, loads, profile, simulate

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


def test_one_micro_batch_at_a_time() -> None:
    burst = [TraceRow(0.01 * i, 100, 80) for i in range(30)]
    outcome = simulate(burst, 2, "drop-always", micro_batches=MicroBatches.ONE)
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


class Watched(Owner):
    """Checks its slots at every change, and remembers in which order it admitted whom."""

    log: dict[int, list[int]]

    def admit(  # type: ignore[override]
        self, chunk_limit: int, now: float
    ) -> list[tuple[object, int, int]]:
        pieces = super().admit(chunk_limit, now)
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


@settings(max_examples=60)
@given(
    loads, st.integers(1, 4), st.sampled_from(["none", "drop", "drop-always"]), st.integers(16, 128)
)
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
    if not outcome.retractions and policy != "drop":  # by service level, some may be put off
        for number, admitted in Watched.log.items():
            assert admitted == [j.index for j in outcome.jobs if j.instance == number]
    assert outcome.samples[-1].running == outcome.samples[-1].waiting == 0
    assert outcome.samples[-1].slots_used == 0
    assert outcome.samples[-1].slots_capacity == outcome.capacity
    for event in outcome.events:
        assert event.waited_s >= 0
        assert event.stall_s >= 0
        assert event.moving_s >= 0


@settings(max_examples=10)
@given(loads, st.integers(1, 3), st.sampled_from(["drop", "drop-always"]))
def test_the_same_input_gives_the_same_output(
    rows: list[TraceRow], instances: int, policy: str
) -> None:
    first, second = (simulate(rows, instances, policy) for _ in range(2))
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
