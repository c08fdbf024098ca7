"""Requests to one instance and its answer back, byte by byte as it comes."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field

from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.control.upstream import is_refusal
from kunserve_sglang.policy.dispatch import Policy, first
from kunserve_sglang.router.http.answers import error_answer, retry_later
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.http.heads import Headers, answer_headers, request_head
from kunserve_sglang.router.http.outbound import BrokenOff, InstanceConnections
from kunserve_sglang.router.proxy.busy import BACKPRESSURE, BusyAnswer
from kunserve_sglang.router.proxy.dispatcher import Dispatcher, Weight
from kunserve_sglang.router.proxy.latency import Latency, StreamTimer
from kunserve_sglang.router.proxy.request_queue import RequestQueue, TurnedAway

logger = logging.getLogger(__name__)

_SAME_EVERYWHERE = frozenset({"/get_model_info", "/model_info", "/v1/models"})

_CLIENT_CLOSED_REQUEST = 499


@dataclass(slots=True)
class ProxyStats:
    """Counted since start: answers by status, second choices, answers that broke off."""

    answers: Counter[int] = field(default_factory=Counter)
    retries: int = 0
    cut: int = 0


class Proxy:
    """Gives each request to an instance, and its answer back to the client.

    A request is sent again only if no instance can have run it: no connection could be made, or
    SGLang had no room for it in its queue.
    """

    def __init__(
        self,
        registry: Registry,
        connections: InstanceConnections,
        policy: Policy,
        latency: Latency,
        queue: RequestQueue,
        dispatcher: Dispatcher,
    ) -> None:
        self.stats = ProxyStats()
        self._latency = latency
        self._registry = registry
        self._connections = connections
        self._policy = policy
        self._queue = queue
        self._dispatcher = dispatcher

    async def __call__(self, request: ClientRequest) -> None:
        task = asyncio.current_task()
        assert task is not None
        request.on_gone = task.cancel
        request.arrived = self._latency.clock()
        try:
            await self._serve(request)
        except asyncio.CancelledError:
            if request.gone:
                self.stats.answers[_CLIENT_CLOSED_REQUEST] += 1
            elif not request.started:
                # Only the end of the router cancels us otherwise, and only after a grace.
                request.answer(retry_later("router_stopping", "the router is stopping"))
        else:
            self.stats.answers[request.status] += 1

    async def _serve(self, request: ClientRequest) -> None:
        """Send the request when it is its turn, or say why it is not sent."""
        # Whoever is let in has to go at once, so what takes time comes before.
        weight = await self._dispatcher.weigh(request.scope["path"], request.body)
        try:
            async with self._queue.admitted(request.scope):
                await self._dispatch(request, weight)
        except TurnedAway as refusal:
            request.answer(refusal.answer)

    async def _dispatch(self, request: ClientRequest, weight: Weight) -> None:
        """Try instances until one has taken the request."""
        policy = first if request.scope["path"] in _SAME_EVERYWHERE else self._policy
        tried: set[int] = set()
        while (instance := self._next(policy, weight, tried)) is not None:
            self.stats.retries += bool(tried)
            with self._dispatcher.under_way(instance, weight):
                if await self._relay(instance, request):
                    return
            tried.add(instance.number)
        if request.refusal is not None:
            request.answer(request.refusal)
            return
        known = len(self._registry.instances)
        request.answer(
            retry_later("no_instance", f"none of {known} instances can take requests now")
        )

    def _next(self, policy: Policy, weight: Weight, tried: set[int]) -> Instance | None:
        """One that has room, or else any: what was let in once is not held back again."""
        pick = self._dispatcher.pick
        return pick(policy, weight, tried | self._queue.full()) or pick(policy, weight, tried)

    async def _relay(self, instance: Instance, request: ClientRequest) -> bool:
        """False if the instance cannot have run it, and another may be tried."""
        head = request_head(request.scope, request.body, instance.url)
        try:
            connection = await self._connections.get(instance.url)
        except OSError as error:
            if is_refusal(error):
                instance.liveness.refuses()
            logger.warning("instance %d: %s", instance.number, error)
            return False
        relay = _Relay(request, self._latency)
        request.comes_from(connection)
        try:
            bodiless = request.scope["method"] == "HEAD"
            await connection.ask(head, request.body, relay, bodiless=bodiless)
            if relay.redirect:
                message = f"instance {instance.number} answered with a redirect ({relay.redirect})"
                request.answer(error_answer(502, "instance_failed", message))
            return relay.busy is None or self._refused(relay.busy, request)
        except BrokenOff as error:
            self._broken_off(instance, request, error)
            return True
        finally:
            # Unless it has all of the answer, this closes it: how an instance learns that nobody
            # waits any more.
            self._connections.put(connection)
            relay.close()

    def _refused(self, busy: BusyAnswer, request: ClientRequest) -> bool:
        """Pass on that the instance is busy, unless another may still have room."""
        request.refusal = busy.response(self._queue.retry_after_s())
        if busy.queue_full:
            return False
        request.answer(request.refusal)
        return True

    def _broken_off(self, instance: Instance, request: ClientRequest, error: BrokenOff) -> None:
        if not request.started:
            message = f"instance {instance.number} {error}"
            logger.warning("%s", message)
            request.answer(error_answer(502, "upstream_lost", message))
            return
        # Too late for a status: the client sees its connection closed before the end.
        self.stats.cut += 1
        logger.warning("instance %d in mid-answer %s", instance.number, error)


class _Relay:
    """An instance's answer on its way to the client; runs for every chunk of every stream.

    That it is busy is kept in `busy`: there may be another to try. The status of a redirect is kept
    in `redirect`, and nothing of it goes on: it names addresses that only instances know.
    """

    __slots__ = ("_latency", "_request", "_timer", "busy", "redirect")

    def __init__(self, request: ClientRequest, latency: Latency) -> None:
        self._request = request
        self._latency = latency
        self._timer: StreamTimer | None = None
        self.busy: BusyAnswer | None = None
        self.redirect = 0

    def head(self, status: int, headers: Headers) -> None:
        if status in BACKPRESSURE:
            self.busy = BusyAnswer(status, answer_headers(headers))
            return
        if 300 <= status < 400 and status != 304:
            self.redirect = status
            return
        self._request.start(status, answer_headers(headers))
        if status == 200 and _is_stream(headers):
            self._timer = StreamTimer(self._latency, self._request.arrived)

    def body(self, data: bytes) -> None:
        if self._timer is not None:
            self._timer.chunk()
        if self.busy is not None:
            self.busy.body += data
        elif not self.redirect:
            self._request.write(data)

    def end(self) -> None:
        if self.busy is None and not self.redirect:
            self._request.end()

    def close(self) -> None:
        """However it ended."""
        if self._timer is not None:
            self._timer.end()


def _is_stream(headers: Headers) -> bool:
    """Whether tokens come as they are made; of other answers the first chunk says nothing."""
    return any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
