"""The fluid model: what must hold whatever the load, and cases that can be worked out by hand."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.policy.forecast import Forecast, Requests, Serving, forecast
from kunserve_sglang.policy.service_level import (
    LONE_FACTOR,
    LatencyLimits,
    ServiceLevel,
    StepTimes,
    times_of,
)

FLAT = StepTimes(prefill=(2.0, 1.0, 0.1, 0.0, 0.0, 0.0), decode=(20.0, 0.0, 0.0))
"""A step takes 20 ms, whatever the batch: only memory can be short."""

STEEP = StepTimes(prefill=(2.0, 1.0, 0.1, 0.0, 0.0, 0.0), decode=(0.1, 5.0, 0.0))
"""Twice the batch takes twice the time: only computing can be short."""

WIDE = LatencyLimits(ttft_ms=1e9, tpot_ms=1e9)

loads = st.builds(
    Requests,
    running=st.integers(0, 40),
    waiting=st.integers(0, 200),
    prompt=st.floats(1, 4000),
    output=st.floats(2, 1000),
    left=st.floats(1, 2),
    per_second=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    ahead_s=st.floats(0.1, 20),
    held=st.sampled_from([0.0, 500.0]),
)
ways = st.builds(
    Serving,
    capacity=st.floats(100, 50_000),
    stages=st.integers(1, 8),
    most=st.sampled_from([1.0, 8.0, math.inf]),
)
machines = st.sampled_from([FLAT, STEEP])
limits = st.builds(LatencyLimits, ttft_ms=st.floats(1, 1e5), tpot_ms=st.floats(1, 1e4))


def burst(waiting: float, running: float = 0.0) -> Requests:
    return Requests(running=running, waiting=waiting, prompt=50, output=50, left=25)


def served(asked: Requests, capacity: float, times: StepTimes, stages: int = 1) -> Forecast:
    way = Serving(capacity=capacity, stages=stages)
    return forecast(asked, way, times, LatencyLimits(ttft_ms=500, tpot_ms=100))


# -- by hand -------------------------------------------------------------------------------------


def test_one_request() -> None:
    """A prompt of 50 tokens takes 2 + 1 + 5 ms, and each of 50 tokens 20 ms."""
    found = served(burst(1), 1000, FLAT)
    assert found.ttft_ms == pytest.approx(8.0)
    assert found.tpot_ms == pytest.approx(20.0)
    assert found.e2e_ms == pytest.approx(8.0 + 1000.0)
    assert found.tokens_per_s == pytest.approx(50 / 1.008)
    assert found.attainment == 1.0


def test_requests_that_find_no_room_wait_for_those_that_run() -> None:
    """Ten fit at a time; the second ten begin when the first have ended."""
    asked = msgspec.structs.replace(burst(20), held=100.0)
    found, once = (served(asked, capacity, FLAT) for capacity in (1000, 2000))
    assert found.running == pytest.approx(10)
    assert once.running == pytest.approx(20)
    assert found.tokens_per_s == pytest.approx(once.tokens_per_s / 2, rel=0.1)
    assert found.attainment == pytest.approx(0.5)
    assert once.attainment == 1.0


def test_who_needs_more_than_there_is_never_ends() -> None:
    found = served(burst(1), 99, FLAT)
    assert (found.within, found.e2e_ms) == (0.0, math.inf)


def test_what_runs_now_counts_with_the_time_that_its_tokens_have_taken() -> None:
    slow = msgspec.structs.replace(burst(0, running=4), token_ms=400.0)
    fast = msgspec.structs.replace(slow, token_ms=20.0)
    assert served(fast, 1000, FLAT).attainment == 1.0
    assert served(slow, 1000, FLAT).attainment < 1.0


def test_slots_that_are_seen_to_be_kept_free_are_not_used() -> None:
    kept = msgspec.structs.replace(burst(20), held=200.0)
    assert served(kept, 1000, FLAT).running == pytest.approx(5)


# -- always --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(loads, ways, machines, limits)
def test_nobody_is_lost_and_no_figure_is_impossible(
    asked: Requests, way: Serving, times: StepTimes, wanted: LatencyLimits
) -> None:
    asked = msgspec.structs.replace(asked, left=min(asked.left, asked.output))
    found = forecast(asked, way, times, wanted)
    everybody = asked.running + asked.waiting + asked.per_second * asked.ahead_s
    assert found.requests == pytest.approx(everybody)
    assert -1e-9 <= found.within <= found.requests + 1e-9
    assert min(found.ttft_ms, found.tpot_ms, found.e2e_ms, found.tokens_per_s) >= 0
    assert found.running <= max(way.most, asked.running) + 1e-6


@settings(max_examples=100, deadline=None)
@given(loads, ways, machines, limits, st.floats(1, 10), st.floats(1, 10))
def test_wider_limits_are_kept_by_no_fewer(
    asked: Requests,
    way: Serving,
    times: StepTimes,
    wanted: LatencyLimits,
    first: float,
    each: float,
) -> None:
    wider = LatencyLimits(ttft_ms=first * wanted.ttft_ms, tpot_ms=each * wanted.tpot_ms)
    # In one order, by the usual limits: others may let others go first.
    strict, wide = (
        forecast(asked, way, times, wanted, ((1.0, of),)).within for of in (wanted, wider)
    )
    assert wide >= strict - 1e-9


@settings(max_examples=100, deadline=None)
@given(loads, ways, machines, st.sampled_from([1 / 8, 1 / 2, 2, 4, 8]))
def test_a_machine_and_a_load_that_are_slower_alike_make_no_difference(
    asked: Requests, way: Serving, times: StepTimes, factor: float
) -> None:
    # With powers of two nothing is rounded: whoever arrives just as another ends does so in both.
    way = msgspec.structs.replace(way, stages=1)
    asked = msgspec.structs.replace(asked, per_second=asked.per_second + 1)
    slower = StepTimes(
        prefill=tuple(factor * c for c in times.prefill),
        decode=tuple(factor * c for c in times.decode),
    )
    later = msgspec.structs.replace(
        asked, per_second=asked.per_second / factor, ahead_s=asked.ahead_s * factor
    )
    here, there = forecast(asked, way, times, WIDE), forecast(later, way, slower, WIDE)
    assert there.tpot_ms == factor * here.tpot_ms
    assert there.e2e_ms == factor * here.e2e_ms


@given(st.integers(1, 200))
def test_twice_as_many_wait_longer(waiting: int) -> None:
    few, many = (served(burst(n), 1000, FLAT) for n in (waiting, 2 * waiting))
    assert many.ttft_ms >= few.ttft_ms
    assert many.e2e_ms >= few.e2e_ms


@given(st.integers(1, 100), st.floats(300, 3000), st.floats(1, 4))
def test_where_a_step_takes_no_longer_more_memory_brings_more_tokens(
    waiting: int, capacity: float, factor: float
) -> None:
    little = served(burst(waiting), capacity, FLAT)
    much = served(burst(waiting), factor * capacity, FLAT)
    assert much.running >= little.running - 1e-6
    assert much.tokens_per_s >= little.tokens_per_s * 0.99


@given(st.integers(1, 100), st.floats(300, 3000), st.floats(1, 4))
def test_where_twice_the_batch_takes_twice_as_long_more_memory_brings_none(
    waiting: int, capacity: float, factor: float
) -> None:
    little = served(burst(waiting), capacity, STEEP)
    much = served(burst(waiting), factor * capacity, STEEP)
    assert much.tokens_per_s <= little.tokens_per_s * 1.1


def test_cooperating_costs_something_and_does_not_change_what_fits() -> None:
    alone, group = served(burst(8), 1000, FLAT), served(burst(8), 1000, FLAT, stages=4)
    assert group.tpot_ms > alone.tpot_ms
    assert group.running == pytest.approx(alone.running)


# -- service levels ------------------------------------------------------------------------------

COSTS = CostModel(prefill=(0.5, 0.1, 0.02, 1e-5, 0.0, 0.0), decode=(0.6, 0.05, 1e-4))


def test_limits_are_so_many_times_what_a_lone_request_takes_unless_named() -> None:
    times = times_of([COSTS, COSTS], 30)
    lone = times.alone(2000, 2500)
    found = ServiceLevel().limits(times, 2000, 1000)
    assert found.ttft_ms == pytest.approx(LONE_FACTOR * lone.ttft_ms)
    assert found.tpot_ms == pytest.approx(LONE_FACTOR * lone.tpot_ms)
    named = ServiceLevel(ttft_ms=700, tpot_ms=40).limits(times, 2000, 1000)
    assert (named.ttft_ms, named.tpot_ms) == (700, 40)


def test_short_requests_get_as_long_as_usual_ones() -> None:
    times = times_of([COSTS], 30)
    usual = ServiceLevel().limits(times)
    assert ServiceLevel().limits(times, 5, 5) == usual
    assert ServiceLevel().limits(times, 5000, 5).ttft_ms > usual.ttft_ms


def test_limits_that_nobody_has_measured_are_not_known() -> None:
    times, half = times_of([COSTS], 30), ServiceLevel(ttft_ms=700)
    assert ServiceLevel().known(None, 5, 5) == ServiceLevel()
    assert half.known(None, 5, 5) == half
    found, decided = half.known(times, 2000, 1000), half.limits(times, 2000, 1000)
    assert (found.ttft_ms, found.tpot_ms) == (decided.ttft_ms, decided.tpot_ms)


def test_what_one_level_leaves_open_another_says() -> None:
    both = ServiceLevel(ttft_ms=1, tpot_ms=2)
    assert ServiceLevel(tpot_ms=9).over(both) == ServiceLevel(ttft_ms=1, tpot_ms=9)
    assert ServiceLevel(ttft_ms=9).over(ServiceLevel()) == ServiceLevel(ttft_ms=9)
    assert ServiceLevel().over(both) == both == both.over(ServiceLevel(ttft_ms=9, tpot_ms=9))


def test_only_decode_steps_are_slower_than_measured() -> None:
    times = times_of([COSTS], 30)
    slower = times.slower(2.0)
    assert slower.step_ms(3, 900) == pytest.approx(2 * times.step_ms(3, 900))
    assert slower.prompts_ms(2, 70) == times.prompts_ms(2, 70)
