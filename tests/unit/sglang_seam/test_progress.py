"""When an instance that does nothing though it could begins anew, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.sglang_seam import progress as module
from kunserve_sglang.sglang_seam.progress import END_AFTER_S, Progress

TURN_S = 0.5


@dataclass
class Idle:
    """A scheduler in which one request waits and could run."""

    size: int = 1
    paused: bool = False
    cooperating: bool = False
    waiting_queue: list[Any] = field(default_factory=lambda: ["request"])
    anew: int = 0

    def __post_init__(self) -> None:
        self.ranks = SimpleNamespace(size=self.size)
        self.waiting = SimpleNamespace(may_run=lambda _: True)

    def requests_with_slots(self) -> list[Any]:
        return []

    def take_back_everything(self, requests: list[Any]) -> list[Any]:
        self.anew += 1
        return requests

    def wait_again(self, requests: list[Any]) -> None:
        assert requests == []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


def watched(scheduler: Idle) -> Progress:
    return Progress(scheduler, scheduler.waiting)  # type: ignore[arg-type]


def turn(progress: Progress, clock: SimpleNamespace, seconds: float) -> None:
    """The loop turns for so long, and nothing moves."""
    for _ in range(int(seconds / TURN_S)):
        clock.now += TURN_S
        progress.look()


def test_it_begins_anew_some_times_and_then_ends(clock: SimpleNamespace) -> None:
    scheduler = Idle()
    progress, began = watched(scheduler), clock.now
    turn(progress, clock, module.STALLED_AFTER_S)
    assert not progress.stalled
    turn(progress, clock, END_AFTER_S / 2)
    assert progress.stalled
    with pytest.raises(InternalError, match="this instance ends"):
        turn(progress, clock, 2 * END_AFTER_S)
    assert END_AFTER_S < clock.now - began < END_AFTER_S + 3
    assert 5 < scheduler.anew < 9


def test_ranks_do_not_begin_anew_but_end(clock: SimpleNamespace) -> None:
    scheduler = Idle(size=2)
    progress = watched(scheduler)
    with pytest.raises(InternalError):
        turn(progress, clock, 2 * END_AFTER_S)
    assert scheduler.anew == 0


@pytest.mark.parametrize("reason", ["a step", "nothing to do", "paused", "in a group"])
def test_it_goes_on_where_there_is_a_reason(clock: SimpleNamespace, reason: str) -> None:
    scheduler = Idle()
    progress = watched(scheduler)
    for number in range(int(4 * END_AFTER_S / TURN_S)):
        clock.now += TURN_S
        progress.look()
        if number % 60 == 30:
            scheduler.waiting_queue = [] if reason == "nothing to do" else ["request"]
            scheduler.paused = reason == "paused"
            scheduler.cooperating = reason == "in a group"
            if reason == "a step":
                progress.moved()
        elif number % 60 == 35:
            scheduler.waiting_queue, scheduler.paused = ["request"], False
            scheduler.cooperating = False


def test_turns_that_take_long_are_no_standstill(clock: SimpleNamespace) -> None:
    scheduler = Idle()
    progress = watched(scheduler)
    for number in range(60):
        clock.now += END_AFTER_S
        progress.look()
        if number % 2:
            progress.moved()  # results are applied one turn late
    assert scheduler.anew == 0
