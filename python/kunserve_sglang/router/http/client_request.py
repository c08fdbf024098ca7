"""A request and its answer, as it is written to the client."""

from __future__ import annotations

import asyncio
import http
from collections.abc import Callable, Mapping
from typing import Protocol

from starlette.responses import Response
from starlette.types import Scope

from kunserve_sglang.core.tenants import DEFAULT_TENANT
from kunserve_sglang.router.http.heads import BODILESS, HEAD_END, Headers

_STATUS_LINES = {int(s): b"HTTP/1.1 %d %b" % (s, s.phrase.encode()) for s in http.HTTPStatus}


class Source(Protocol):
    """Where an answer comes from: can be told to wait for a client that reads slowly."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Connection(Protocol):
    """The client's connection, as an answer sees it; `congested` while the client reads slowly."""

    transport: asyncio.Transport
    congested: bool

    def answered(self, request: ClientRequest) -> None:
        """All of the answer is written."""


class ClientRequest:
    """One request, read whole, and the state of its answer.

    `scope` is that of ASGI; `headers` are those in it by name, of several of one name the last.
    `wants_stream` is what the body says, None if that is no boolean; `streams` says that the answer
    comes in events as they happen. `refusal` is what the last instance without room has said.
    `tenant` is whose request it is.
    `gone` says that the client has left; `on_gone` is called then, which cancels the task of the
    request unless something else was set, and what is written afterwards goes nowhere.
    """

    __slots__ = (
        "_bodiless",
        "_chunked",
        "_connection",
        "_head",
        "_source",
        "arrived",
        "body",
        "ended",
        "gone",
        "headers",
        "keep_alive",
        "on_gone",
        "refusal",
        "scope",
        "started",
        "status",
        "streams",
        "tenant",
        "wants_stream",
    )

    def __init__(
        self,
        connection: Connection,
        scope: Scope,
        headers: Mapping[bytes, bytes],
        body: bytes,
        *,
        keep_alive: bool,
    ) -> None:
        self.scope = scope
        self.headers = headers
        self.body = body
        self.wants_stream: bool | None = False
        self.keep_alive = keep_alive
        self.arrived = 0.0
        self.started = False
        self.ended = False
        self.gone = False
        self.status = 0
        self.streams = False
        self.tenant = DEFAULT_TENANT
        self.refusal: Response | None = None
        self.on_gone: Callable[[], object] | None = None
        self._connection = connection
        self._source: Source | None = None
        self._head = b""
        self._chunked = False
        self._bodiless = False

    def start(self, status: int, headers: Headers) -> None:
        """Names of headers are in lower case; how the body is framed is decided here.

        They leave with what is written next: each write is a call of the system.
        """
        self.started = True
        self.status = status
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d " % status]
        lines += [b": ".join(header) for header in headers]
        if self.scope["method"] == "HEAD" or status in BODILESS:
            self._bodiless = True
        elif b"content-length" not in dict(headers):
            if self.scope["http_version"] == "1.0":
                self.keep_alive = False  # the end of the connection is the end of the answer
            else:
                self._chunked = True
                lines.append(b"transfer-encoding: chunked")
        if not self.keep_alive:
            lines.append(b"connection: close")
        lines.append(HEAD_END)
        self._head = b"\r\n".join(lines)

    def write(self, chunk: bytes) -> None:
        """Nothing is split or held back; without a chunk it is the head that leaves."""
        if not self._chunked or self._head or self.gone or not chunk:
            self._send(self._framed(chunk))
        else:  # most chunks of most streams
            self._connection.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    def end(self, last: bytes = b"") -> None:
        """`last` is what is left of the answer."""
        framed = self._framed(last)
        self._send(framed + b"0\r\n\r\n" if self._chunked else framed)
        self.ended = True
        if not self.gone:
            self._connection.answered(self)

    def answer(self, response: Response) -> None:
        """An answer of our own."""
        self.start(response.status_code, response.raw_headers)
        self.end(bytes(response.body))

    def comes_from(self, source: Source) -> None:
        """The source of the answer waits whenever the client reads more slowly."""
        self._source = source
        if self._connection.congested:
            source.pause()

    def congested(self, congested: bool) -> None:
        if self._source is not None:
            (self._source.pause if congested else self._source.resume)()

    def leave(self) -> None:
        self.gone = True
        if self.on_gone is not None:
            self.on_gone()

    def _framed(self, chunk: bytes) -> bytes:
        if not chunk or self._bodiless:
            return b""
        return b"%x\r\n%b\r\n" % (len(chunk), chunk) if self._chunked else chunk

    def _send(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        if data and not self.gone:
            self._connection.transport.write(data)
