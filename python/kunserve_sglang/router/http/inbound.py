"""HTTP/1.1 from clients: requests are read whole, answers are written as they come.

llhttp (`httptools`) does the parsing. No callback of a stream's chunks goes through a task: what an
instance sends is in the client's socket within the same turn of the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Any, cast

import httptools

from kunserve_sglang.router.http.answers import error_answer
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.http.incoming import Fault, Incoming
from kunserve_sglang.router.http.limits import Limits, Pace

logger = logging.getLogger(__name__)

_LINGER_S = 2.0
"""How long what a refused client still sends is read, so that it comes to reading its answer."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

Handler = Callable[[ClientRequest], Coroutine[Any, Any, None]]


class Clients:
    """What all connections of clients have in common.

    `handler` runs in one task a request. `body_bytes` are those of all requests that are read or
    under way; `addresses` counts the connections of each client.
    """

    def __init__(self, handler: Handler, limits: Limits) -> None:
        self.handler = handler
        self.limits = limits
        self.body_bytes = 0
        self.addresses: Counter[str] = Counter()
        self.connections: set[ClientConnection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop = asyncio.get_running_loop()


class ClientConnection(asyncio.Protocol):
    """One client's connection; its requests are answered one after the other."""

    def __init__(self, clients: Clients) -> None:
        self.congested = False
        self._clients = clients
        self._quiet_since = clients.loop.time()
        self._parser = httptools.HttpRequestParser(self)
        self._incoming: Incoming | None = None
        self._current: ClientRequest | None = None
        self._waiting: deque[ClientRequest] = deque()
        self._closing = False
        self._refused = False
        self._owes_continue = False
        self._held = 0
        self._read_size = 0
        self._draining: Pace | None = None
        self._unsent = 0

    # --- the connection ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # Two fields, where addresses of IPv6 have four, and paths none.
        peer, here = (transport.get_extra_info(name) for name in ("peername", "sockname"))
        self._peer = peer[:2] if isinstance(peer, tuple) else ("", 0)
        self._here = here[:2] if isinstance(here, tuple) else ("", 0)
        if isinstance(peer, tuple):
            self._clients.limits.bound(transport.get_extra_info("socket"))
        self._scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        clients, address = self._clients, self._peer[0]
        clients.connections.add(self)
        clients.addresses[address] += 1
        if clients.addresses[address] > clients.limits.connections_per_address:
            self._refuse(Fault(503, "too_many_connections", "too many connections of this address"))

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 (a Protocol)
        clients, address = self._clients, self._peer[0]
        clients.connections.discard(self)
        clients.addresses[address] -= 1
        if not clients.addresses[address]:
            del clients.addresses[address]
        self._let_go(self._held)
        self._closing = True
        self._waiting.clear()
        if self._current is not None:
            self._current.leave()
            self._current = None

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._read_size = len(data)
        if self._incoming is not None:
            self._incoming.arrived(len(data))
        try:
            self._feed(data)
        except httptools.HttpParserCallbackError as error:
            logger.error("a request could not be read", exc_info=error)
            self._refuse(Fault(500, "internal_error", "the request could not be read"))
        except httptools.HttpParserError as error:
            self._refuse(Fault(400, "bad_request", f"this is no HTTP request: {error}"))
        else:
            if self._incoming is not None and (fault := self._incoming.oversize()):
                self._refuse(fault)

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade(data[upgrade.args[0] :])

    def pause_writing(self) -> None:
        self.congested = True
        if self._current is not None:
            self._current.congested(True)

    def resume_writing(self) -> None:
        self.congested = False
        if self._current is not None:
            self._current.congested(False)

    def finish(self) -> None:
        """Close as soon as the request under way, if there is one, has its answer."""
        self._refuse_more()
        if self._current is None:
            self.transport.close()

    def sweep(self, now: float) -> None:
        """Part with a client that has not moved for too long, in whichever direction."""
        limits = self._clients.limits
        if self.congested or self.transport.is_closing():
            unsent = self.transport.get_write_buffer_size()
            if self._draining is None:
                self._draining, self._unsent = Pace(now, 0), unsent
            elif self._draining.stalled(now, self._unsent - unsent, limits):
                self.transport.abort()
            return
        self._draining = None
        if self._current is not None:
            return
        if self._incoming is not None:
            if self._incoming.stalled(now):
                self._refuse(Fault(408, "too_slow", "the request has not come in time"))
        elif now - self._quiet_since > limits.quiet_s:
            self.finish()

    def _without_upgrade(self, rest: bytes) -> bytes:
        """What is to be parsed in place of a request that offered another protocol, and of `rest`.

        The parser takes what follows such an offer for no HTTP, so a new one goes on as if it had
        not been made. CONNECT is refused: nothing follows it.
        """
        method, offered = self._parser.get_method(), self._incoming
        if self._closing or offered is None:
            return b""
        if method == b"CONNECT":
            self._refuse(Fault(400, "bad_path", "CONNECT: this is no proxy to other hosts"))
            return b""
        version = self._parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (method, offered.target, version)]
        lines += [b"%b: %b\r\n" % header for header in offered.headers if header[0] != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        return b"".join((*lines, b"\r\n", rest))

    def _refuse_more(self) -> None:
        self._closing = True
        self._waiting.clear()
        if self._current is not None:
            self._current.keep_alive = False

    def _refuse(self, fault: Fault) -> None:
        """For what is not read to its end; an answer that is under way must stay readable."""
        if self._refused:
            return
        self._refused = True
        self._refuse_more()
        if self._current is None:
            scope = {"method": "GET", "http_version": "1.1"}
            refused = self._current = ClientRequest(self, scope, {}, b"", keep_alive=False)
            refused.answer(fault.answer())

    # --- what the parser finds ---

    def on_message_begin(self) -> None:
        if not self._refused:
            clients = self._clients
            self._incoming = Incoming(clients.limits, clients.loop.time(), self._read_size)

    def on_url(self, part: bytes) -> None:
        if self._incoming is not None:
            self._incoming.target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        incoming = self._incoming
        # Trailers come after the body, and have no say any more.
        if incoming is not None and not incoming.head_done:
            incoming.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        incoming = self._incoming
        if incoming is None or self._parser.should_upgrade():
            return
        if fault := incoming.head_fault(self._parser.get_http_version()):
            self._refuse(fault)
        elif incoming.wants_continue():
            self._owes_continue = self._current is not None
            if not self._owes_continue:
                self.transport.write(_CONTINUE)

    def on_body(self, part: bytes) -> None:
        if self._incoming is None or self._refused:
            return
        self._owes_continue = False
        self._incoming.part(part)
        self._held += len(part)
        self._clients.body_bytes += len(part)
        if self._clients.body_bytes > self._clients.limits.all_bodies:
            self._refuse(Fault(503, "bodies_too_large", "the bodies of all requests are too large"))

    def on_message_complete(self) -> None:
        incoming = self._incoming
        if incoming is None or self._refused or self._parser.should_upgrade():
            return
        self._incoming, self._owes_continue = None, False
        if fault := incoming.oversize():
            self._refuse(fault)
            return
        method = self._parser.get_method()
        scope = incoming.scope(method, self._scheme, self._peer, self._here)
        keep_alive = incoming.version == "1.1" and self._parser.should_keep_alive()
        named, body = incoming.by_name, incoming.whole_body()
        request = ClientRequest(self, scope, named, body, keep_alive=keep_alive)
        if self._current is None:
            self._begin(request)
        elif not self._closing:
            self._waiting.append(request)
            self.transport.pause_reading()

    # --- one request after the other ---

    def _begin(self, request: ClientRequest) -> None:
        self._current = request
        task = self._clients.loop.create_task(self._clients.handler(request))
        request.on_gone = task.cancel
        self._clients.tasks.add(task)
        task.add_done_callback(lambda task: self._handled(request, task))

    def _handled(self, request: ClientRequest, task: asyncio.Task[None]) -> None:
        self._clients.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", request.scope["path"], exc_info=error)
            if not request.started and not request.gone:
                request.answer(error_answer(500, "internal_error", "a bug in the router"))
        if not request.ended and not request.gone:
            request.write(b"")
            self.transport.close()  # half an answer must not look like a whole one

    def answered(self, request: ClientRequest) -> None:
        """All of the current request's answer is written."""
        self._current = None
        self._let_go(len(request.body))
        self._quiet_since = self._clients.loop.time()
        if self._refused:
            self._linger()
        elif self._closing or not request.keep_alive:
            self._closing = True
            self.transport.close()
        elif self._waiting:
            self._begin(self._waiting.popleft())
            if not self._waiting:
                self.transport.resume_reading()
        elif self._incoming is not None:
            self._incoming.go_on(self._quiet_since)
            if self._owes_continue:
                self._owes_continue = False
                self.transport.write(_CONTINUE)

    def _linger(self) -> None:
        """Close in a moment: a connection with unread bytes takes its last answer with it."""
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.transport.resume_reading()
        self._clients.loop.call_later(_LINGER_S, self.transport.close)

    def _let_go(self, size: int) -> None:
        """Of the bytes of bodies that this connection holds."""
        size = min(size, self._held)
        self._held -= size
        self._clients.body_bytes -= size
