"""The line in the router: who is next, who is turned away, and that nobody starves."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kunserve_sglang.core.load import Load, Slots
from kunserve_sglang.policy.queueing import (
    AGEING_S,
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    READY_REQUESTS,
    EndRate,
    WaitingLine,
    in_flight_limit,
    retry_after_s,
    with_held,
)
from kunserve_sglang.policy.state import ClusterState
from tests.support.clusters import cluster, with_load

priorities = st.integers(LOWEST_PRIORITY, HIGHEST_PRIORITY)


class LineMachine(RuleBasedStateMachine):
    """The line against a list that is searched from one end to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.count = 0
        self.waiting: list[tuple[int, int, float]] = []

    @initialize(limit=st.integers(0, 6))
    def begin(self, limit: int) -> None:
        self.limit = limit
        self.line: WaitingLine[int] = WaitingLine(limit)

    @rule(seconds=st.floats(0, 300))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(priority=priorities)
    def join(self, priority: int) -> None:
        self.count += 1
        newcomer = (self.count, priority, self.now)
        turned_away = self.line.join(self.count, priority, self.now)
        self.waiting.append(newcomer)
        if len(self.waiting) <= self.limit:
            assert turned_away is None
            return
        least = min(self.waiting, key=lambda w: (w[1], -w[0]))
        assert turned_away == least[0]
        self.waiting.remove(least)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        numbers = [w[0] for w in self.waiting]
        number = data.draw(st.sampled_from([*numbers, 0]))
        self.line.leave(number)
        self.waiting = [w for w in self.waiting if w[0] != number]

    @rule()
    def take(self) -> None:
        taken = self.line.take()
        if not self.waiting:
            assert taken is None
            return
        (chosen,) = [w for w in self.waiting if w[0] == taken]
        self.waiting.remove(chosen)
        _, priority, arrived = chosen
        for number, other, since in self.waiting:
            if other == priority:
                assert number > chosen[0], "one priority is served in order of arrival"
            if other > priority:
                assert since - arrived >= AGEING_S * (other - priority) - 1e-6
            else:
                # The bound on overtaking, and so on waiting: nobody is passed for longer.
                assert arrived - since <= AGEING_S * (priority - other) + 1e-6

    @invariant()
    def counts(self) -> None:
        assert len(self.line) == len(self.waiting)
        assert self.line.oldest() == min((w[2] for w in self.waiting), default=None)


TestLine = LineMachine.TestCase


@given(st.lists(priorities, min_size=1, max_size=40))
def test_those_who_came_together_go_by_priority_then_by_arrival(given_: list[int]) -> None:
    line: WaitingLine[int] = WaitingLine(100)
    for number, priority in enumerate(given_):
        assert line.join(number, priority, 5.0) is None
    order = [line.take() for _ in given_]
    assert order == sorted(range(len(given_)), key=lambda n: (-given_[n], n))
    assert line.take() is None


@given(priorities, st.integers(1, 5))
def test_nobody_waits_for_ever(priority: int, many: int) -> None:
    """Higher requests come all the time, faster than they are served: the lower one is served."""
    line: WaitingLine[str] = WaitingLine(100_000)
    line.join("first", priority, 0.0)
    seconds = 0
    while line.take() != "first":
        for n in range(many + 1):
            line.join(f"{seconds}/{n}", HIGHEST_PRIORITY, float(seconds))
        seconds += 1
        bound = AGEING_S * (HIGHEST_PRIORITY - priority)
        assert seconds <= (many + 1) * (bound + 1) + 1


def test_a_full_line_turns_away_the_lowest_and_youngest() -> None:
    line: WaitingLine[str] = WaitingLine(3)
    for name, priority in (("old", -2), ("young", -2), ("high", 5)):
        assert line.join(name, priority, 0.0) is None
    assert line.join("equal", -2, 1.0) == "equal"
    assert line.join("higher", 0, 1.0) == "young"
    assert line.join("highest", 10, 1.0) == "old"
    assert line.join("again", 10, 1.0) == "higher"
    assert [line.take() for _ in range(4)] == ["highest", "again", "high", None]


@given(st.floats(0.1, 50), st.floats(1, 1000))
def test_a_steady_rate_is_found(per_second: float, seconds: float) -> None:
    rate = EndRate(100.0)
    count = int(per_second * seconds)
    for n in range(1, min(count, 5000) + 1):
        rate.ended(100.0 + n / per_second)
    now = 100.0 + min(count, 5000) / per_second
    if count > 20:
        assert rate.per_second(now) == pytest.approx(per_second, rel=0.25, abs=0.1)
    assert rate.per_second(now + 1000) < 1e-9 + per_second / 100


@given(st.integers(0, 10**6), st.floats(0, 1e6))
def test_retry_after_is_bounded_and_long_enough(ahead: int, per_second: float) -> None:
    seconds = retry_after_s(ahead, per_second)
    assert 1 <= seconds <= 60
    assert seconds == 60 or seconds * per_second >= ahead * (1 - 1e-9)


@pytest.mark.parametrize(
    ("ahead", "per_second", "seconds"),
    [(0, 0, 60), (10, 5, 2), (11, 5, 3), (1, 50, 1), (99, 1, 60)],
)
def test_retry_after_follows_the_rate(ahead: int, per_second: float, seconds: int) -> None:
    assert retry_after_s(ahead, per_second) == seconds


def load(*, running: int = 0, waiting: int = 0, capacity: int = 1000, demand: int = 0) -> Load:
    slots = Slots(used=0, cached=0, capacity=capacity)
    return Load(slots=slots, running=running, waiting=waiting, demand=demand)


@pytest.mark.parametrize(
    ("given_", "of", "limit"),
    [
        (None, None, math.inf),
        (7, None, 7),
        (None, load(running=0), READY_REQUESTS),
        (None, load(running=10), READY_REQUESTS + 10),
        (None, load(running=1000), 2000),
        (7, load(capacity=1000), 7),
        (7, load(capacity=2500), 17),
        (7, load(capacity=100), 7),
    ],
)
def test_limits(given_: int | None, of: Load | None, limit: float) -> None:
    assert in_flight_limit(given_, of, 1000) == limit


def waiting_everywhere(state: ClusterState) -> ClusterState:
    return ClusterState(
        instances=tuple(with_load(s, demand=900, waiting=9) for s in state.instances)
    )


@given(st.integers(1, 6), st.integers(0, 5000))
def test_held_requests_wait_for_slots_as_well(size: int, held: int) -> None:
    state = waiting_everywhere(cluster(size))
    seen = with_held(state, held)
    assert sum(s.load.waiting for s in seen.instances) == 9 * size + held
    assert 0 <= state.demand + 100 * held - seen.demand < size
    shares = [s.load.waiting for s in seen.instances]
    assert max(shares) - min(shares) <= 1


def test_plain_servers_take_their_part_of_those_held() -> None:
    state = waiting_everywhere(cluster(2))
    seen = with_held(state, 100, plain_slots=state.capacity)
    assert sum(s.load.waiting for s in seen.instances) == 18 + 50


def test_who_waits_for_the_limit_does_not_wait_for_memory() -> None:
    state = ClusterState(
        instances=tuple(
            msgspec.structs.replace(s, load=load(running=3, demand=900))
            for s in cluster(2).instances
        )
    )
    assert with_held(state, 100) == state


def test_before_the_first_report_nothing_is_known_of_what_a_request_needs() -> None:
    assert with_held(cluster(2), 100) == cluster(2)
