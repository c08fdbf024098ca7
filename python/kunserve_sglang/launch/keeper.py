"""Starts instances again that have died, and ends those that stand still for good."""

from __future__ import annotations

import time

from kunserve_sglang.api.types import ClusterStatus
from kunserve_sglang.launch.console import Console
from kunserve_sglang.launch.fleet import Fleet, Used
from kunserve_sglang.launch.restarts import Remedy, Restarts, Sight

_WINDOW_S = 5.0
_BUSY = 0.1
"""Share of a core above which an instance is at work, however little it says."""

_BUSY_STARTING = 0.01
"""The same for one that may get its parameters over a network; what it reads counts as well."""


class Keeper:
    """Does with the instances of one launcher what `Restarts` decides."""

    def __init__(self, fleet: Fleet, limit: int, console: Console) -> None:
        """`limit` is how often an instance is started again without good service between."""
        self._fleet = fleet
        self._limit = limit
        self._console = console
        self._restarts = {number: Restarts(limit) for number in fleet.numbers}
        self._measured: dict[int, tuple[float, Used, bool]] = {}
        """By instance: when, what it had used by then, and whether it was at work before."""
        self.ending: set[int] = set()
        """Those that are ended to be started again."""

    @property
    def done(self) -> bool:
        """Whether no instance runs, nor will again."""
        left, running = self._fleet.left, self._fleet.running
        return all(n in left or (n not in running and r.over) for n, r in self._restarts.items())

    def look(self, status: ClusterStatus | None) -> None:
        """Act on what is seen now; `status` is the router's, if it has answered."""
        now = time.monotonic()
        for number, restarts in self._restarts.items():
            match restarts.decide(self._sight(number, status, now), now):
                case Remedy.START:
                    self._console.note(
                        f"starting instance {number} again ({restarts.count} of {self._limit})"
                    )
                    self._measured.pop(number, None)
                    self.ending.discard(number)
                    self._fleet.restart(number)
                case Remedy.ASK_TO_END:
                    self._console.error(f"instance {number} stands still: ending it")
                    self.ending.add(number)
                    self._fleet.show_stacks(number)
                    self._fleet.ask(number)
                case Remedy.KILL:
                    self._fleet.kill(number)
                case Remedy.GIVE_UP:
                    self.ending.discard(number)
                    self._console.error(
                        f"instance {number} has ended again after {self._limit} restarts "
                        "(--restart-limit): it is given up"
                    )

    def _sight(self, number: int, status: ClusterStatus | None, now: float) -> Sight:
        url = self._fleet.url(number)
        # The router may know it still as it was before it died.
        known = next((i for i in status.instances if i.url == url), None) if status else None
        starting = known is None
        stalled = status is not None if known is None else known.stalled is True
        return Sight(
            running=number in self._fleet.running,
            left=number in self._fleet.left,
            serving=known is not None and known.serving,
            stalled=stalled and not self._is_at_work(number, now, starting=starting),
        )

    def _is_at_work(self, number: int, now: float, *, starting: bool) -> bool:
        """Whether it computes: a step may be longer than any limit, and is no standstill.

        One that turns without getting anywhere ends by itself.
        """
        if number not in self._measured:
            self._measured[number] = now, self._fleet.used(number), True
        since, before, at_work = self._measured[number]
        if now - since >= _WINDOW_S:
            used = self._fleet.used(number)
            busy = _BUSY_STARTING if starting else _BUSY
            at_work = used.cpu_s - before.cpu_s >= busy * (now - since)
            at_work |= starting and used.read_bytes > before.read_bytes
            self._measured[number] = now, used, at_work
        return at_work
