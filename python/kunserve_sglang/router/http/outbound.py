"""HTTP/1.1 towards the instances: kept connections, and answers passed on as they arrive.

For what the proxy relays; what the router asks on its own account goes through `upstream.ask`.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import weakref
from collections import defaultdict
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from kunserve_sglang.control.upstream import CONNECT_TIMEOUT_S, KEEP_ALIVE_S, is_silence
from kunserve_sglang.core.heartbeats import watch_host
from kunserve_sglang.router.http.heads import BODILESS, Headers

_RACE_S = 1.0
"""An instance that closes an idle connection when a request is on its way has done so by then."""

_SMALL_BODY = 4096
_SAY_LENGTH = frozenset({b"content-length", b"transfer-encoding"})


class BrokenOff(ConnectionError):
    """The instance's answer ended before its end, or is no HTTP.

    `unread` says that the request only met the end of a connection that had been idle: servers
    close these without looking at what has come meanwhile. `silent`: its host does not answer.
    """

    def __init__(self, reason: str, *, unread: bool = False, silent: bool = False) -> None:
        super().__init__(reason)
        self.unread = unread
        self.silent = silent


class Sink(Protocol):
    """Where an answer goes; all calls come from the event loop, in this order.

    `body` gets what has arrived together as one piece, which is empty if that is only the head, and
    `end` the last one.
    """

    def head(self, status: int, headers: Headers) -> None: ...

    def body(self, data: bytes) -> None: ...

    def end(self, last: bytes) -> None: ...


class InstanceConnection(asyncio.Protocol):
    """One connection, and at most one request under way on it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self.reused = False
        self.lost = False
        self._ended = False
        self._parser = httptools.HttpResponseParser(self)
        self._sink: Sink | None = None
        self._answered: asyncio.Future[None] | None = None
        self._paused = False

    def ask(
        self, request: bytes, body: bytes, sink: Sink, *, bodiless: bool
    ) -> asyncio.Future[None]:
        """Done when all of the answer has gone to `sink`; fails with `BrokenOff`.

        `bodiless` answers end with their headers (those to HEAD).
        """
        self._sink = sink
        self._bodiless = bodiless
        self._headers: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []
        self._ended = False
        self._until_closed = False
        self._reusable = False
        self._begun = False
        self._asked_at = self._loop.time()
        self._answered = self._loop.create_future()
        if self.lost:
            self._closed()
        else:
            # In one packet if it is small, and without a copy if it is not.
            if len(body) > _SMALL_BODY:
                self._transport.write(request)
                self._transport.write(body)
            else:
                self._transport.write(request + body)
        return self._answered

    def release(self) -> bool:
        """Whether it can be used again; otherwise it is closed, which cancels at the instance."""
        self._sink = self._answered = None
        unsent = self._transport.get_write_buffer_size()
        if self.lost or not self._ended or not self._reusable or unsent:
            self._transport.abort()
            return False
        self.resume()
        return True

    def close(self) -> None:
        self._transport.abort()

    def pause(self) -> None:
        if not self._paused and not self.lost:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and not self.lost:
            self._paused = False
            self._transport.resume_reading()

    # --- the connection ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        watch_host(self._transport.get_extra_info("socket"))

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self._answered is None or self._answered.done():
            return
        if error is None and self._until_closed:
            self._end()
        else:
            self._closed(error)

    def data_received(self, data: bytes) -> None:
        sink = self._sink
        if sink is None or self._ended:
            # Nobody has asked for this: whose answer would the next one be?
            self._reusable = False
            self._transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._ended:
                sink.body(self._arrived())
                self._fail(BrokenOff(f"sent no HTTP answer: {error}"))
                self._transport.abort()
                return
            self._reusable = False
        if self._ended:
            self._end(self._arrived())
        elif self._begun:
            sink.body(self._arrived())

    def _arrived(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)  # of a single part this is no copy

    def _end(self, last: bytes = b"") -> None:
        assert self._sink is not None
        assert self._answered is not None
        self._ended = True
        self._sink.end(last)
        if not self._answered.done():
            self._answered.set_result(None)

    def _closed(self, error: Exception | None = None) -> None:
        early = self._loop.time() - self._asked_at < _RACE_S and not self._begun
        why = "closed the connection" + (f": {error}" if error else "")
        self._fail(BrokenOff(why, unread=self.reused and early, silent=is_silence(error)))

    def _fail(self, error: BrokenOff) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(error)

    # --- what the parser finds ---

    def on_message_begin(self) -> None:
        self._begun = True
        if self._ended:
            self._reusable = False  # more than was asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._ended:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._ended or status < 200:
            return
        assert self._sink is not None
        headers, self._headers = self._headers, []
        self._sink.head(status, headers)
        self._ended = self._bodiless
        self._until_closed = status not in BODILESS and _SAY_LENGTH.isdisjoint(dict(headers))

    def on_body(self, part: bytes) -> None:
        if not self._ended:
            self._parts.append(part)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:
            self._headers.clear()  # an interim answer; ours is still to come
        elif not self._ended:
            self._ended = True
            self._reusable = self._parser.should_keep_alive()


class InstanceConnections:
    """All connections to instances that wait for a next request, by address."""

    def __init__(self) -> None:
        self._idle: dict[str, list[InstanceConnection]] = {}
        self._open: defaultdict[str, weakref.WeakSet[InstanceConnection]] = defaultdict(
            weakref.WeakSet
        )
        self._loop = asyncio.get_running_loop()
        self._tls: ssl.SSLContext | None = None
        self._sweeping: asyncio.TimerHandle | None = None

    def kept(self, url: str) -> InstanceConnection | None:
        """One that waits for a next request, if there is one."""
        idle = self._idle.get(url)
        since = self._loop.time() - KEEP_ALIVE_S
        while idle:
            connection = idle.pop()
            if not connection.lost and connection.idle_since > since:
                connection.reused = True
                return connection
            connection.close()
        return None

    async def make(self, url: str) -> InstanceConnection:
        """A new one. Raises `OSError` if none could be made in time."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await self._connect(url)
        except TimeoutError:
            raise TimeoutError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None

    def put(self, connection: InstanceConnection) -> None:
        """After the answer, whole or not: it is kept if it can be used again."""
        if not connection.release():
            return
        connection.idle_since = self._loop.time()
        self._idle.setdefault(connection.url, []).append(connection)
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(KEEP_ALIVE_S, self._sweep)

    def abort(self, url: str) -> None:
        """End all connections to an instance that is gone, and the requests under way on them."""
        for connection in self._open.pop(url, ()):
            connection.close()

    def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()

    def _sweep(self) -> None:
        since = self._loop.time() - KEEP_ALIVE_S
        for idle in self._idle.values():
            fresh = [c for c in idle if not c.lost and c.idle_since > since]
            for connection in set(idle).difference(fresh):
                connection.close()
            idle[:] = fresh
        self._idle = {url: idle for url, idle in self._idle.items() if idle}
        self._sweeping = self._loop.call_later(KEEP_ALIVE_S, self._sweep) if self._idle else None

    async def _connect(self, url: str) -> InstanceConnection:
        """To the first of the host's addresses that takes it; else the last one's error."""
        address = urlsplit(url)
        secure = address.scheme == "https"
        if secure and self._tls is None:
            self._tls = ssl.create_default_context()
        port = address.port or (443 if secure else 80)
        found = await self._loop.getaddrinfo(address.hostname, port, type=socket.SOCK_STREAM)
        failure: OSError = OSError(errno.EADDRNOTAVAIL, f"no address of {address.hostname}")
        for *_, where in found:
            try:
                _, connection = await self._loop.create_connection(
                    lambda: InstanceConnection(url),
                    str(where[0]),
                    port,
                    ssl=self._tls if secure else None,
                    server_hostname=address.hostname if secure else None,
                )
            except OSError as error:
                failure = error
            else:
                self._open[url].add(connection)
                return connection
        raise failure
