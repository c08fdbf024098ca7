"""When an instance is started again, and when one that stands still is ended."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.launch.restarts import (
    END_GRACE_S,
    FIRST_DELAY_S,
    GOOD_SERVICE_S,
    MAX_DELAY_S,
    STALLED_AFTER_S,
    Remedy,
    Restarts,
    Sight,
)

DEAD = Sight(running=False)
SERVING = Sight(running=True, serving=True)
STARTING = Sight(running=True)
STALLED = Sight(running=True, serving=True, stalled=True)
LEFT = Sight(running=False, left=True)
TICK_S = 0.1


def delay_to_restart(restarts: Restarts, now: float) -> tuple[Remedy, float]:
    """What comes of one that is dead, and how long that took."""
    began = now
    while (action := restarts.decide(DEAD, now)) is Remedy.NONE:
        now += TICK_S
        assert now - began < 2 * MAX_DELAY_S
    return action, now - began


def test_the_delay_doubles_up_to_a_limit() -> None:
    restarts, now, delays = Restarts(9), 0.0, []
    for _ in range(9):
        action, delay = delay_to_restart(restarts, now)
        assert action is Remedy.START
        now += delay
        delays.append(round(delay))
        assert restarts.decide(STARTING, now) is Remedy.NONE
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert delay_to_restart(restarts, now) == (Remedy.GIVE_UP, 0.0)
    assert restarts.over
    assert restarts.decide(DEAD, now + 1e6) is Remedy.NONE


def test_good_service_makes_up_for_what_was() -> None:
    restarts, now = Restarts(2), 0.0
    for _ in range(10):
        action, delay = delay_to_restart(restarts, now)
        assert action is Remedy.START
        assert delay < 2 * FIRST_DELAY_S
        now += delay
        restarts.decide(STARTING, now)
        restarts.decide(SERVING, now + 50)
        now += 51 + GOOD_SERVICE_S
        restarts.decide(SERVING, now)


def test_loading_is_no_good_service() -> None:
    restarts, now = Restarts(2), 0.0
    for _ in range(2):
        now += delay_to_restart(restarts, now)[1]
        restarts.decide(STARTING, now)
        now += 10 * GOOD_SERVICE_S
        restarts.decide(STARTING, now)
    assert delay_to_restart(restarts, now)[0] is Remedy.GIVE_UP


def test_one_that_stands_still_is_asked_and_then_made_to_end() -> None:
    restarts = Restarts(1)
    assert restarts.decide(SERVING, 0.0) is Remedy.NONE
    assert restarts.decide(STALLED, 10.0) is Remedy.NONE
    assert restarts.decide(SERVING, 20.0) is Remedy.NONE  # it has come round
    assert restarts.decide(STALLED, 30.0) is Remedy.NONE
    assert restarts.decide(STALLED, 30.0 + STALLED_AFTER_S) is Remedy.NONE
    asked = 31.0 + STALLED_AFTER_S
    assert restarts.decide(STALLED, asked) is Remedy.ASK_TO_END
    assert restarts.decide(STARTING, asked + END_GRACE_S) is Remedy.NONE
    assert restarts.decide(STARTING, asked + END_GRACE_S + 1) is Remedy.KILL
    assert delay_to_restart(restarts, asked + 20)[0] is Remedy.START


def test_one_that_has_left_stays_away_and_so_do_all_without_restarts() -> None:
    assert Restarts(3).decide(LEFT, 0.0) is Remedy.NONE
    never = Restarts(0)
    assert never.over
    assert {never.decide(sight, 1e3 * t) for t in range(9) for sight in (DEAD, STALLED)} == {
        Remedy.NONE
    }


SIGHTS = st.sampled_from([SERVING, STARTING, STALLED])


@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.floats(0, 100), st.one_of(SIGHTS, st.none())), max_size=120),
)
def test_what_is_done_makes_sense_in_any_life(
    limit: int, steps: list[tuple[float, Sight | None]]
) -> None:
    """The process ends at a `None` in the steps, and when it is killed."""
    restarts, now = Restarts(limit), 0.0
    running, starts, asked, given_up = True, 0, False, False
    for later, seen in steps:
        now += later
        running = running and seen is not None
        sight = seen if running and seen is not None else DEAD
        action = restarts.decide(sight, now)
        assert not given_up or action is Remedy.NONE
        if action is Remedy.START:
            assert not running
            running, starts, asked = True, starts + 1, False
        elif action is Remedy.ASK_TO_END:
            assert sight.stalled
            assert not asked
            asked = True
        elif action is Remedy.KILL:
            assert asked
            running = False
        elif action is Remedy.GIVE_UP:
            given_up = True
            assert restarts.count == limit
        assert 0 <= restarts.count <= limit
        assert starts >= restarts.count - (restarts.due is not None)
