"""What is kept free at an instance while tenants share it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.load import Load, Slots
from kunserve_sglang.policy.queueing import with_held
from kunserve_sglang.policy.shared_room import (
    SharedRoom,
    fits,
    kept_share,
    shared_room,
    short_of_slots,
)
from kunserve_sglang.policy.state import ClusterState
from tests.support.clusters import cluster, with_load


def load(running: int = 0, waiting: int = 0, demand: int = 0, capacity: int = 1000) -> Load:
    slots = Slots(used=0, cached=0, capacity=capacity)
    return Load(slots=slots, running=running, waiting=waiting, demand=demand)


@pytest.mark.parametrize(
    ("given_", "of", "in_flight", "room"),
    [
        (None, load(), 0, SharedRoom(open=2, most=4)),
        (None, load(running=20, demand=100), 20, SharedRoom(open=2, most=4)),
        (None, load(running=160, demand=100), 165, SharedRoom(open=5, most=15)),
        (None, load(running=20, demand=900), 20, SharedRoom(open=0, most=4)),
        (None, load(running=20, demand=900), 25, SharedRoom(open=-3, most=-1)),
        (64, load(running=20, demand=100), 20, SharedRoom(open=40, most=44)),
        (64, load(running=20, demand=100, capacity=2000), 20, SharedRoom(open=100, most=108)),
        (64, load(running=20, demand=900), 20, SharedRoom(open=0, most=44)),
        (1, load(), 0, SharedRoom(open=1, most=1)),
        (32, None, 30, SharedRoom(open=0, most=2)),
        (None, None, 500, SharedRoom(open=math.inf, most=math.inf)),
    ],
)
def test_room(given_: int | None, of: Load | None, in_flight: int, room: SharedRoom) -> None:
    assert shared_room(given_, of, 1000, in_flight) == room


@given(
    st.one_of(st.none(), st.integers(1, 200)),
    st.builds(load, st.integers(0, 500), st.integers(0, 50), st.integers(0, 3000)),
    st.integers(0, 600),
)
def test_what_is_open_is_never_more_than_there_is(
    given_: int | None, of: Load, in_flight: int
) -> None:
    room = shared_room(given_, of, 1000, in_flight)
    assert room.open <= max(0, room.most)


def test_an_idle_instance_takes_requests_from_everybody() -> None:
    for limit in (None, 1, 15, 16):
        assert shared_room(limit, load(), 1000, 0).open > 0


def test_requests_that_are_too_recent_for_the_report_count() -> None:
    of = load(running=10, demand=500)
    assert not short_of_slots(of, 16)
    assert short_of_slots(of, 17)
    assert not short_of_slots(load(), 100), "of the first ones nothing is known"


def test_there_is_no_more_open_than_slots_for_it() -> None:
    """Requests need 50 each, and 875 may be in demand."""
    for running, room in ((14, 2), (15, 2), (16, 1), (17, 0), (18, 0)):
        of = load(running=running, demand=50 * running)
        assert shared_room(None, of, 1000, running).open == room
        assert short_of_slots(of, running) == (room == 0)


def test_what_fits_is_said_of_all_slots() -> None:
    of = load(running=10, demand=900)
    assert fits(of, 10, 100)
    assert not fits(of, 10, 101)
    assert not fits(of, 11, 50), "one more is on its way"


def test_who_is_held_for_want_of_memory_counts_though_nobody_waits_there() -> None:
    state = ClusterState(
        instances=tuple(with_load(s, used=500, demand=900) for s in cluster(2).instances)
    )
    assert with_held(state, 100) == state
    first, second = with_held(state, 100, short={1}).instances
    assert first == state.instances[0]
    assert (second.load.waiting, second.load.demand) == (50, 900 + 50 * 900)
    assert second.load.prompts == 50 * 500, "as long as those that run"


@given(st.floats(0, 1e6), st.integers(0, 10**5))
def test_what_is_reserved_is_kept_within_bounds(reserved: float, capacity: int) -> None:
    kept = kept_share(reserved, capacity)
    assert 1 / 8 <= kept <= 1 / 2
    assert kept == 1 / 2 or kept * capacity >= min(reserved, capacity / 2)


def test_slots_are_kept_for_more_than_the_least() -> None:
    of = load(running=20, demand=700)
    assert shared_room(None, of, 1000, 20).open == 2
    assert shared_room(None, of, 1000, 20, kept_share(300, 1000)) == SharedRoom(open=0, most=4)
