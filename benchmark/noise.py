"""How much of the cores other programs took: whether a measurement can be trusted."""

from __future__ import annotations

import os

import psutil

from kunserve_sglang.core.processes import family


class Noise:
    """Counts from its creation on; only the cores that this process may use."""

    def __init__(self) -> None:
        self._busy, self._total = _cores()
        self._ours = _family()

    def share(self) -> float:
        """The part of all CPU time since then that neither we nor our descendants used.

        Descendants must still be alive: the time of those that have ended counts as others'.
        """
        busy, total = _cores()
        before = self._ours
        ours = sum(used - before.get(process, 0.0) for process, used in _family().items())
        spent = total - self._total
        return max(0.0, busy - self._busy - ours) / spent if spent > 0 else 0.0


def cpu_s(root: int) -> float:
    """CPU seconds that a process and its descendants have used that are there now."""
    return sum(_family(root).values())


def _cores() -> tuple[float, float]:
    """Busy and total seconds since the machine started."""
    times = psutil.cpu_times(percpu=True)
    cores = [times[i] for i in os.sched_getaffinity(0)]
    total = sum(sum(core[:8]) for core in cores)  # what follows is part of user time already
    idle = sum(core.idle + core.iowait for core in cores)
    return total - idle, total


def _family(root: int | None = None) -> dict[psutil.Process, float]:
    times: dict[psutil.Process, float] = {}
    for process in family(root):
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        times[process] = used.user + used.system
    return times
