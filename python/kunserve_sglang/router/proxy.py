"""Requests to one instance and its answer back, byte by byte as it comes."""

from __future__ import annotations

import asyncio
import io
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kunserve_sglang.policy.dispatch import Policy, first
from kunserve_sglang.router.answers import error_answer, retry_later
from kunserve_sglang.router.dispatch import Dispatcher, Weight
from kunserve_sglang.router.latency import Latency, StreamTimer
from kunserve_sglang.router.queueing import RequestQueue, TurnedAway
from kunserve_sglang.router.registry import Instance, Registry
from kunserve_sglang.router.upstream import (
    BACKPRESSURE,
    REFUSED,
    answer_headers,
    busy_answer,
    instance_url,
    is_queue_full,
    is_refusal,
    request_headers,
)

logger = logging.getLogger(__name__)

_SAME_EVERYWHERE = frozenset({"/get_model_info", "/model_info", "/v1/models"})

_WRITE_AT_ONCE = 1 << 19
"""Larger bodies are written in pieces, or the other streams would have to wait."""

_CLIENT_CLOSED_REQUEST = 499


@dataclass(slots=True)
class ProxyStats:
    """Counted since start: answers by status, second choices, answers that broke off."""

    answers: Counter[int] = field(default_factory=Counter)
    retries: int = 0
    cut: int = 0


class _Exchange:
    """One request and the state of its answer."""

    __slots__ = ("_receive", "_send", "arrived", "body", "refusal", "scope", "started", "status")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.body = b""
        self.arrived = 0.0
        self.refusal: Response | None = None
        self.started = False
        self.status = 0
        self._receive = receive
        self._send = send

    async def read_body(self) -> bool:
        """False if the client went away before it had sent everything."""
        parts = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return False
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                self.body = parts[0] if len(parts) == 1 else b"".join(parts)
                return True

    async def client_gone(self) -> None:
        """Returns once the client has closed its connection, or has got all of its answer."""
        while (await self._receive())["type"] != "http.disconnect":
            continue

    async def start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.started = True
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, chunk: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def answer(self, response: Response) -> None:
        """An answer of our own."""
        await self.start(response.status_code, response.raw_headers)
        await self.write(bytes(response.body), more=False)


class Proxy:
    """ASGI application without a framework: it runs for every chunk of every stream.

    A request is sent again only if no instance can have run it: no connection could be made, or
    SGLang had no room for it in its queue.
    """

    def __init__(
        self,
        registry: Registry,
        session: aiohttp.ClientSession,
        policy: Policy,
        latency: Latency,
        queue: RequestQueue,
        dispatcher: Dispatcher,
    ) -> None:
        self.stats = ProxyStats()
        self._latency = latency
        self._registry = registry
        self._session = session
        self._policy = policy
        self._queue = queue
        self._dispatcher = dispatcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(scope, receive, send)
        if not await exchange.read_body():
            return
        exchange.arrived = self._latency.clock()
        relay = asyncio.create_task(self._serve(exchange))
        gone = asyncio.create_task(exchange.client_gone())
        try:
            await asyncio.wait((relay, gone), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # Only the end of the router cancels us from outside, and only after a grace.
            await _cancel(relay)
            if not exchange.started:
                await exchange.answer(retry_later("router_stopping", "the router is stopping"))
            return
        finally:
            gone.cancel()
        if relay.done():
            relay.result()
            self.stats.answers[exchange.status] += 1
        else:
            # Closing the connection is how an instance learns that nobody waits any more.
            await _cancel(relay)
            self.stats.answers[_CLIENT_CLOSED_REQUEST] += 1

    async def _serve(self, exchange: _Exchange) -> None:
        """Send the request when it is its turn, or say why it is not sent."""
        # Whoever is let in has to go at once, so what takes time comes before.
        weight = await self._dispatcher.weigh(exchange.scope["path"], exchange.body)
        try:
            async with self._queue.admitted(exchange.scope):
                await self._dispatch(exchange, weight)
        except TurnedAway as refusal:
            await exchange.answer(refusal.answer)

    async def _dispatch(self, exchange: _Exchange, weight: Weight) -> None:
        """Try instances until one has taken the request."""
        policy = first if exchange.scope["path"] in _SAME_EVERYWHERE else self._policy
        tried: set[int] = set()
        while (instance := self._next(policy, weight, tried)) is not None:
            self.stats.retries += bool(tried)
            with self._dispatcher.under_way(instance, weight):
                if await self._relay(instance, exchange):
                    return
            tried.add(instance.number)
        if exchange.refusal is not None:
            await exchange.answer(exchange.refusal)
            return
        known = len(self._registry.instances)
        await exchange.answer(
            retry_later("no_instance", f"none of {known} instances can take requests now")
        )

    def _next(self, policy: Policy, weight: Weight, tried: set[int]) -> Instance | None:
        """One that has room, or else any: what was let in once is not held back again."""
        pick = self._dispatcher.pick
        return pick(policy, weight, tried | self._queue.full()) or pick(policy, weight, tried)

    async def _relay(self, instance: Instance, exchange: _Exchange) -> bool:
        """False if the instance cannot have run it, and another may be tried."""
        try:
            response = await self._request(instance, exchange)
        except ValueError as error:
            await exchange.answer(error_answer(400, "bad_path", str(error)))
            return True
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            if is_refusal(error):
                instance.lost = REFUSED
            logger.warning("instance %d: %s", instance.number, error)
            return False
        except (aiohttp.ClientError, OSError) as error:
            await _lost(instance, error, exchange)
            return True
        try:
            if response.status in BACKPRESSURE:
                return await self._refused(response, exchange)
            await self._stream(response, exchange)
        except (aiohttp.ClientError, OSError) as error:
            if not exchange.started:
                await _lost(instance, error, exchange)
                return True
            # Too late for a status: the client sees its connection closed before the end.
            self.stats.cut += 1
            logger.warning("instance %d broke off in mid-answer: %r", instance.number, error)
        finally:
            response.close()
        return True

    async def _request(self, instance: Instance, exchange: _Exchange) -> aiohttp.ClientResponse:
        scope, body = exchange.scope, exchange.body
        return await self._session.request(
            scope["method"],
            instance_url(instance, scope["raw_path"], scope["query_string"]),
            headers=request_headers(scope["headers"]),
            data=(body or None) if len(body) < _WRITE_AT_ONCE else io.BytesIO(body),
            allow_redirects=False,
        )

    async def _refused(self, response: aiohttp.ClientResponse, exchange: _Exchange) -> bool:
        """Pass on that the instance is busy, unless another may still have room."""
        body = await response.read()
        refusal = busy_answer(response, body, self._queue.retry_after_s())
        if is_queue_full(body):
            exchange.refusal = refusal
            return False
        await exchange.answer(refusal)
        return True

    async def _stream(self, response: aiohttp.ClientResponse, exchange: _Exchange) -> None:
        await exchange.start(response.status, answer_headers(response.raw_headers))
        read, write = response.content.readany, exchange.write
        if not _is_stream(response):
            while chunk := await read():
                await write(chunk, more=True)
        else:
            timer = StreamTimer(self._latency, exchange.arrived)
            try:
                while chunk := await read():
                    timer.chunk()
                    await write(chunk, more=True)
            finally:
                timer.end()
        await write(b"", more=False)


async def _lost(instance: Instance, error: Exception, exchange: _Exchange) -> None:
    message = f"instance {instance.number} broke off: {error!r}"
    logger.warning("%s", message)
    await exchange.answer(error_answer(502, "upstream_lost", message))


def _is_stream(response: aiohttp.ClientResponse) -> bool:
    """Whether tokens come as they are made; of other answers the first chunk says nothing."""
    kind = response.headers.get("Content-Type", "")
    return response.status == 200 and kind.startswith("text/event-stream")


async def _cancel(task: asyncio.Task[None]) -> None:
    """Returns when the task has ended and with it its connection to the instance."""
    task.cancel()
    await asyncio.wait((task,))
