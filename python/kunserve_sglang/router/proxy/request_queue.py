"""Holds requests back while every instance has enough of them, and turns away what is too much."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection
from enum import StrEnum

from prometheus_client import Histogram

from kunserve_sglang.api.types import QueueStatus
from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.policy.queueing import (
    EndRate,
    WaitingLine,
    in_flight_limit,
    retry_after_s,
)
from kunserve_sglang.router.http.answers import Code, retry_later
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.proxy.dispatcher import Weight
from kunserve_sglang.router.proxy.priority import TurnedAway, read_priority
from kunserve_sglang.router.proxy.promise import Promise

QUESTIONS = frozenset({"GET", "HEAD", "OPTIONS"})
"""They take no slots, and those who want to know what a busy cluster does must not wait for it."""

_WAIT_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class Shed(StrEnum):
    """Why a request leaves the queue without having been sent to an instance."""

    FULL = "full"
    DISPLACED = "displaced"
    TIMEOUT = "timeout"
    STOPPING = "stopping"
    TENANT = "tenant"


_ANSWERS: dict[Shed, tuple[int, Code, str]] = {
    Shed.FULL: (429, "queue_full", "the queue is full"),
    Shed.DISPLACED: (429, "queue_displaced", "the queue is full, and others have priority"),
    Shed.TIMEOUT: (503, "queue_timeout", "no instance had room for the request in time"),
    Shed.STOPPING: (503, "router_stopping", "the router is stopping"),
    Shed.TENANT: (429, "tenant_queue_full", "too many requests of this tenant wait"),
}


class Waiter:
    """A request in the queue; its verdict is None once it may go, or why it may not."""

    __slots__ = ("priority", "verdict")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.verdict: asyncio.Future[Shed | None] = asyncio.get_running_loop().create_future()

    def decide(self, verdict: Shed | None) -> bool:
        """False if it was decided already, or the client has gone."""
        if self.verdict.done():
            return False
        self.verdict.set_result(verdict)
        return True

    @property
    def may_go(self) -> bool:
        decided = self.verdict.done() and not self.verdict.cancelled()
        return decided and self.verdict.result() is None


class RequestQueue:
    """One queue for all instances, so that whoever has room first serves whose turn it is.

    A request is woken only when there is room for it, and that room is kept until it has gone.
    """

    def __init__(
        self,
        registry: Registry,
        config: ClusterConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shed: Counter[Shed] = Counter(dict.fromkeys(Shed, 0))
        self.wait_seconds = Histogram(
            "kunserve:queue_wait_seconds",
            "How long requests waited in the router that had to wait there.",
            buckets=_WAIT_BUCKETS,
            registry=None,
        )
        self._registry = registry
        self.given_limit = config.max_in_flight
        self.timeout_s = config.queue_timeout_s
        self._clock = clock
        self._line: WaitingLine[Waiter] = WaitingLine(config.max_queued)
        self._ends = EndRate(clock())
        self._leaving = 0
        self._stopping = False

    def __len__(self) -> int:
        return len(self._line)

    async def enter(self, request: ClientRequest, weight: Weight) -> None:  # noqa: ARG002
        """Wait for room, unless it only asks something; it has to be sent at once then.

        Raises `TurnedAway`, for a priority that is none as well.
        """
        priority = read_priority(request)
        if request.scope["method"] not in QUESTIONS and (self._line or not self._has_any()):
            await self._wait(Waiter(priority))

    def leave(self, request: ClientRequest, promise: Promise) -> None:  # noqa: ARG002
        """One that had entered has its answer, or has none to expect; `promise` is about that."""
        if request.scope["method"] not in QUESTIONS:
            self._ends.ended(self._clock())
            self.let_in()

    def has_room(self, instance: Instance) -> bool:
        """Whether it should get more requests now."""
        return instance.in_flight < self._limit(instance)

    def room_for(self, request: ClientRequest) -> Callable[[Instance], bool]:  # noqa: ARG002
        """Whether an instance should get this one, which has entered."""
        return self.has_room

    def held(self) -> int:
        """Of those that wait, those that more room would let in."""
        return len(self)

    def short(self) -> Collection[int]:
        """Instances that get none of those for want of memory alone."""
        return ()

    def let_in(self) -> None:
        """Wake as many as there is room for. To be called whenever there may be more of it."""
        if not self._line:
            return
        room = self._free()
        while room > 0 and (waiter := self._line.take()) is not None:
            if waiter.decide(None):
                self._leaving += 1
                room -= 1

    def retry_after_s(self) -> int:
        """When those who wait now, or are under way, will probably have been served."""
        under_way = sum(i.in_flight for i in self._available())
        rate = self._ends.per_second(self._clock())
        return retry_after_s(len(self._line) or under_way, rate)

    def status(self) -> QueueStatus:
        oldest = self._line.oldest()
        waited = 0.0 if oldest is None else self._clock() - oldest
        return QueueStatus(requests=len(self._line), oldest_s=round(waited, 3))

    def close(self) -> None:
        """The router stops: everybody in the queue is told to come again, and whoever comes now."""
        self._stopping = True
        while (waiter := self._line.take()) is not None:
            waiter.decide(Shed.STOPPING)

    async def _wait(self, waiter: Waiter) -> None:
        if not self._available() and not self._registry.awaited():
            return  # there is nobody to wait for, and the proxy says so
        if self._stopping:
            raise self._turned_away(Shed.STOPPING, waiter)
        joined = self._clock()
        displaced = self._join(waiter, joined)
        if displaced is not None:
            displaced.decide(Shed.FULL if displaced is waiter else Shed.DISPLACED)
        timer = asyncio.get_running_loop().call_later(self.timeout_s, waiter.decide, Shed.TIMEOUT)
        try:
            verdict = await waiter.verdict
        except asyncio.CancelledError:
            self._drop(waiter)
            if waiter.may_go:
                # The client left in the very moment: its room is the next one's.
                self._leaving -= 1
                self._give_back(waiter)
                self.let_in()
            raise
        finally:
            timer.cancel()
        if verdict is not None:
            self._drop(waiter)
            raise self._turned_away(verdict, waiter)
        self._leaving -= 1
        self.wait_seconds.observe(self._clock() - joined)

    def _join(self, waiter: Waiter, now: float) -> Waiter | None:
        """Returns who is turned away for it."""
        return self._line.join(waiter, waiter.priority, now)

    def _drop(self, waiter: Waiter) -> None:
        """It waits no more, if it still did."""
        self._line.leave(waiter)

    def _give_back(self, waiter: Waiter) -> None:
        """It was let in, and does not come."""

    def _turned_away(self, reason: Shed, waiter: Waiter) -> TurnedAway:  # noqa: ARG002
        return self._answer(reason, self.retry_after_s())

    def _answer(self, reason: Shed, after_s: int) -> TurnedAway:
        self.shed[reason] += 1
        status, code, message = _ANSWERS[reason]
        if reason is Shed.STOPPING:
            return TurnedAway(retry_later(code, message, status))
        return TurnedAway(retry_later(code, message, status, after_s))

    def _free(self) -> float:
        """For how many more requests there is room, besides those that are just leaving."""
        room = [self._limit(i) - i.in_flight for i in self._available()]
        return sum([r for r in room if r > 0]) - self._leaving

    def _has_any(self) -> bool:
        """Whether `_free` is above 0. This runs for every request, and most often the first has."""
        if not self._leaving:
            for instance in self._registry.instances.values():
                if instance.available and not instance.quiet and self.has_room(instance):
                    return True
        return self._free() > 0

    def _limit(self, instance: Instance) -> float:
        load = instance.status.load if instance.status else None
        return in_flight_limit(self.given_limit, load, instance.capacity)

    def _available(self) -> list[Instance]:
        return self._registry.available()
