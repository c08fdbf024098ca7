"""An instance in which requests wait, could run, and do not: found out, begun anew, or ended."""

from __future__ import annotations

import logging
import time

from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.sglang_seam.scheduling import Scheduling
from kunserve_sglang.sglang_seam.waiting import WaitingRequests

logger = logging.getLogger(__name__)

STALLED_AFTER_S = 2.0
"""From then on an instance says that it is stalled; its loop turns many times a second."""

_BEGIN_ANEW_AFTER_S = 4.0

END_AFTER_S = 34.0
"""By then beginning anew has not helped, several times."""

_MAX_TURN_S = 1.0
"""What one turn of the loop counts for, however long it took: it may have obeyed a command, or run
a long step whose result is only applied in the next turn."""


class Progress:
    """Watches SGLang's own loop; in cooperative mode waits for peers have a limit of their own.

    A long step is progress: while it runs, nobody looks. Ranks would have to begin anew together,
    so that an instance of several says that it is stalled, and ends if it stays so.
    """

    def __init__(self, scheduler: Scheduling, waiting: WaitingRequests) -> None:
        self._scheduler = scheduler
        self._waiting = waiting
        self.moved()

    def moved(self) -> None:
        """A step has been made."""
        self._moved = self._looked = time.monotonic()
        self._stuck_s = self._begun_at_s = 0.0

    @property
    def stalled(self) -> bool:
        """Whether the router should look for another instance."""
        return time.monotonic() - self._moved > STALLED_AFTER_S

    def look(self) -> None:
        """At every turn of the loop: begin anew where nothing has moved that could.

        Raises `InternalError`, which ends the instance, where that does not help.
        """
        now = time.monotonic()
        if now - self._moved < STALLED_AFTER_S / 2:
            return  # between two steps of a busy instance this is all there is to it
        if not self._could_move():
            self.moved()
            return
        self._stuck_s += min(now - self._looked, _MAX_TURN_S)
        self._looked = now
        if self._stuck_s > END_AFTER_S:
            raise InternalError("no step for long while requests could run: this instance ends")
        if self._scheduler.ranks.size > 1:
            return
        if self._stuck_s - self._begun_at_s > _BEGIN_ANEW_AFTER_S:
            logger.error("no step while requests could run: all are computed again")
            self._scheduler.wait_again(self._scheduler.take_back_everything([]))
            self._begun_at_s = self._stuck_s

    def _could_move(self) -> bool:
        scheduler = self._scheduler
        if scheduler.cooperating or scheduler.paused:
            return False
        return any(map(self._waiting.may_run, scheduler.waiting_queue)) or bool(
            scheduler.requests_with_slots()
        )
