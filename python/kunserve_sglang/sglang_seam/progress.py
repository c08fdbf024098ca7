"""An instance in which requests wait, could run, and do not: found out, and begun anew."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kunserve_sglang.sglang_seam.scheduler import KunServeScheduler

logger = logging.getLogger(__name__)

STALLED_AFTER_S = 2.0
"""From then on an instance says that it is stalled; its loop turns many times a second."""

_BEGIN_ANEW_AFTER_S = 4.0


class Progress:
    """Watches SGLang's own loop; in cooperative mode waits for peers have a limit of their own.

    A long step is progress: while it runs, nobody looks. Ranks would have to begin anew together,
    so that an instance of several only says that it is stalled.
    """

    def __init__(self, scheduler: KunServeScheduler) -> None:
        self._scheduler = scheduler
        self._moved = time.monotonic()

    def moved(self) -> None:
        """A step has been made."""
        self._moved = time.monotonic()

    @property
    def stalled(self) -> bool:
        """Whether the router should look for another instance."""
        return time.monotonic() - self._moved > STALLED_AFTER_S

    def look(self) -> None:
        """At every turn of the loop: begin anew where nothing has moved that could."""
        still_s = time.monotonic() - self._moved
        if still_s < STALLED_AFTER_S / 2:
            return  # between two steps of a busy instance this is all there is to it
        if not self._could_move():
            self.moved()
        elif still_s > _BEGIN_ANEW_AFTER_S and self._scheduler.ranks.size == 1:
            logger.error("no step while requests could run: all are computed again")
            self._scheduler.wait_again(self._scheduler.take_back_everything([]))
            self.moved()

    def _could_move(self) -> bool:
        scheduler = self._scheduler
        if scheduler.engine.cooperating or scheduler.paused:
            return False
        return any(map(scheduler.waiting.may_run, scheduler.waiting_queue)) or bool(
            scheduler.requests_with_slots()
        )
