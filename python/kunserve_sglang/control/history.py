"""The last half hour of a cluster, for those who come to look at it later."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from kunserve_sglang.api.history import History, HistorySample
from kunserve_sglang.api.service import AttainmentSummary
from kunserve_sglang.control.registry import Instance

SAMPLE_INTERVAL_S = 2.0
"""Seconds between two samples."""

KEPT_S = 1800.0
"""Older ones are forgotten. So there are 900 at most, which take less than a quarter of a MiB."""


class HistoryLog:
    """The latest samples, oldest first."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` tells Unix time."""
        self._clock = clock
        self._samples: deque[HistorySample] = deque(maxlen=int(KEPT_S / SAMPLE_INTERVAL_S))

    def add(self, instances: Iterable[Instance], attainment: AttainmentSummary) -> None:
        """Take a sample. Lost instances have nothing that is of use to anybody."""
        loads = [i.status.load for i in instances if i.status and not i.liveness.loss]
        requests = sum(c.requests for c in attainment.classes)
        kept = sum(c.kept for c in attainment.classes)
        sample = HistorySample(
            time=self._clock(),
            demand=sum(load.demand for load in loads),
            capacity=sum(load.slots.capacity for load in loads),
            attainment=kept / requests if requests else None,
        )
        self._samples.append(sample)

    def latest(self) -> History:
        """All of it."""
        return History(
            now=self._clock(),
            interval_s=SAMPLE_INTERVAL_S,
            kept_s=KEPT_S,
            samples=list(self._samples),
        )
