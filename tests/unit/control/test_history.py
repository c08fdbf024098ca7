"""What is kept of the time before somebody looks, and how much of it."""

from __future__ import annotations

import sys
from itertools import count
from types import SimpleNamespace
from typing import cast

import msgspec

from kunserve_sglang.api.service import AttainmentSummary, ClassAttainment
from kunserve_sglang.control.history import KEPT_S, SAMPLE_INTERVAL_S, HistoryLog
from kunserve_sglang.control.registry import Instance
from kunserve_sglang.core.load import Load, Slots

NOBODY = AttainmentSummary(window_s=60, classes=[])


def instance(demand: int, capacity: int, *, loss: str = "", silent: bool = False) -> Instance:
    slots = Slots(used=0, cached=0, capacity=capacity)
    status = SimpleNamespace(load=Load(slots=slots, running=0, waiting=0, demand=demand))
    known = SimpleNamespace(status=None if silent else status, liveness=SimpleNamespace(loss=loss))
    return cast(Instance, known)


def judged(*classes: tuple[int, int]) -> AttainmentSummary:
    """Classes with so many requests, of which so many kept their limits."""
    described = [
        ClassAttainment(
            name="c", ttft_ms=None, tpot_ms=None, requests=requests, kept=kept, attainment=None
        )
        for requests, kept in classes
    ]
    return AttainmentSummary(window_s=60, classes=described)


def test_a_sample_is_about_all_that_report_and_are_there() -> None:
    log = HistoryLog(lambda: 7.5)
    there = [instance(30, 100), instance(50, 200)]
    gone = [instance(1000, 1000, loss="connection refused"), instance(5, 5, silent=True)]
    log.add([*there, *gone], judged((3, 3), (0, 0), (5, 1)))
    log.add([], NOBODY)
    assert [msgspec.to_builtins(s) for s in log.latest().samples] == [
        {"time": 7.5, "demand": 80, "capacity": 300, "attainment": 0.5},
        {"time": 7.5, "demand": 0, "capacity": 0, "attainment": None},
    ]


def test_half_an_hour_is_kept_and_no_more() -> None:
    ticks = (1e9 + SAMPLE_INTERVAL_S * i for i in count())
    log = HistoryLog(lambda: next(ticks))
    most = int(KEPT_S / SAMPLE_INTERVAL_S)
    for i in range(3 * most):
        log.add([instance(100_000 + i, 10**9)], judged((1000 + i, 999)))
    found = log.latest()
    assert (found.interval_s, found.kept_s, len(found.samples)) == (2, 1800, 900)
    times = [s.time for s in found.samples]
    assert times == sorted(times)
    assert found.now - times[0] == KEPT_S
    assert found.samples[-1].demand == 100_000 + 3 * most - 1
    values = [v for s in found.samples for v in (s, *msgspec.structs.astuple(s))]
    assert sum(map(sys.getsizeof, values)) < 1 << 18
