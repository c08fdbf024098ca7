"""HTTP/1.1 from clients: requests are read whole, answers are written as they come.

llhttp (`httptools`) does the parsing. No callback of a stream's chunks goes through a task: what an
instance sends is in the client's socket within the same turn of the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, cast

import httptools
from starlette.types import Scope

from kunserve_sglang.router.http.answers import Code, error_answer
from kunserve_sglang.router.http.client_request import ClientRequest

logger = logging.getLogger(__name__)

_MAX_HEAD_BYTES = 1 << 16
"""Of a request line and its headers, after the first read; more is no request but an attack."""

_QUIET_S = 75.0
"""Above what HTTP clients keep idle connections for, so that it is they who close them."""

_SWEEP_S = 5.0
_CANCEL_S = 0.5
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

Handler = Callable[[ClientRequest], Coroutine[Any, Any, None]]


class HttpServer:
    """Accepts connections and runs `handler`, one task a request."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections: set[ClientConnection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop = asyncio.get_running_loop()

    async def start(self, listener: Any, backlog: int) -> None:
        """`listener` is a bound socket."""
        self._server = await self.loop.create_server(
            lambda: ClientConnection(self), sock=listener, backlog=backlog
        )
        self._sweep()

    async def stop(self, grace_s: float) -> None:
        """Take no more requests; those under way have `grace_s`, then they are cancelled."""
        self._server.close()
        self._sweeping.cancel()
        for connection in list(self.connections):
            connection.finish()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=grace_s)
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=_CANCEL_S)
        for connection in list(self.connections):
            connection.transport.close()

    def _sweep(self) -> None:
        since = self.loop.time() - _QUIET_S
        for connection in list(self.connections):
            if connection.quiet_since < since:
                connection.finish()
        self._sweeping = self.loop.call_later(_SWEEP_S, self._sweep)


class ClientConnection(asyncio.Protocol):
    """One client's connection; its requests are answered one after the other."""

    def __init__(self, server: HttpServer) -> None:
        self.congested = False
        self.quiet_since = server.loop.time()
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._current: ClientRequest | None = None
        self._waiting: deque[ClientRequest] = deque()
        self._closing = False
        self._head_bytes = 0
        self._reading_head = False
        self._owes_continue = False

    # --- the connection ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # Two fields, where addresses of IPv6 have four.
        self._peer = transport.get_extra_info("peername")[:2]
        self._here = transport.get_extra_info("sockname")[:2]
        self._server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 (a Protocol)
        self._server.connections.discard(self)
        self._closing = True
        self._waiting.clear()
        if self._current is not None:
            self._current.leave()
            self._current = None

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._current is None:
            self.quiet_since = self._server.loop.time()
        if self._reading_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._refuse(431, "headers_too_large", "the headers are too large")
                return
        try:
            while data:
                try:
                    self._parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    data = self._without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(400, "bad_request", f"this is no HTTP request: {error}")

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

    def _without_upgrade(self, rest: bytes) -> bytes:
        """What is to be parsed in place of a request that offered another protocol, and of `rest`.

        The parser takes what follows such an offer for no HTTP, so a new one goes on as if it had
        not been made. CONNECT is refused: nothing follows it.
        """
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refuse(400, "bad_path", "CONNECT: this is no proxy to other hosts")
            return b""
        lines = [b"%b %b HTTP/1.1\r\n" % (method, self._target)]
        lines += [b"%b: %b\r\n" % header for header in self._headers if header[0] != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        return b"".join((*lines, b"\r\n", rest))

    def _refuse_more(self) -> None:
        self._closing = True
        self._waiting.clear()
        if self._current is not None:
            self._current.keep_alive = False

    def _refuse(self, status: int, code: Code, message: str) -> None:
        """For what cannot be parsed; not if an answer is under way, which must stay readable."""
        busy = self._current is not None
        self._refuse_more()
        if not busy:
            scope = {"method": "GET", "http_version": "1.1"}
            refused = self._current = ClientRequest(self, scope, b"", keep_alive=False)
            refused.answer(error_answer(status, code, message))

    # --- what the parser finds ---

    def on_message_begin(self) -> None:
        self._reading_head = True
        self._head_bytes = 0
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []

    def on_url(self, part: bytes) -> None:
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading_head:  # trailers come after the body, and have no say any more
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._reading_head = False
        if self._parser.should_upgrade():
            return
        if any(n == b"expect" and v.lower() == b"100-continue" for n, v in self._headers):
            self._owes_continue = self._current is not None
            if not self._owes_continue:
                self.transport.write(_CONTINUE)

    def on_body(self, part: bytes) -> None:
        self._body.append(part)

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        scope = self._scope()
        keep_alive = scope["http_version"] == "1.1" and self._parser.should_keep_alive()
        request = ClientRequest(self, scope, body, keep_alive=keep_alive)
        if self._current is None:
            self._begin(request)
        elif not self._closing:
            self._waiting.append(request)
            self.transport.pause_reading()

    def _scope(self) -> Scope:
        raw_path, _, query = self._target.partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": self._parser.get_http_version(),
            "method": self._parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": raw_path.decode("latin-1"),  # as it stands: what is encoded is another path
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": self._headers,
            "client": self._peer,
            "server": self._here,
        }

    # --- one request after the other ---

    def _begin(self, request: ClientRequest) -> None:
        self._current = request
        self.quiet_since = float("inf")
        task = self._server.loop.create_task(self._server.handler(request))
        self._server.tasks.add(task)
        task.add_done_callback(lambda task: self._handled(request, task))

    def _handled(self, request: ClientRequest, task: asyncio.Task[None]) -> None:
        self._server.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", request.scope["path"], exc_info=error)
        if not request.ended and not request.gone:
            # Half an answer must not look like a whole one.
            self.transport.close()

    def answered(self, request: ClientRequest) -> None:
        """All of the current request's answer is written."""
        self._current = None
        self.quiet_since = self._server.loop.time()
        if self._closing or not request.keep_alive:
            self._closing = True
            self.transport.close()
        elif self._waiting:
            self._begin(self._waiting.popleft())
            if not self._waiting:
                self.transport.resume_reading()
        elif self._owes_continue:
            self._owes_continue = False
            self.transport.write(_CONTINUE)
