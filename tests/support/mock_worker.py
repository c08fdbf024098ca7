"""The HTTP server of an instance without a model, which obeys the test."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from kunserve_sglang.core.resumption import JOURNAL_HEADER
from tests.support.background import Background

_DEATH = b"<death>"


@dataclass
class Canned:
    """An answer given at once, or the part of it that comes before the worker dies.

    `promised` is the length of the whole then.
    """

    body: Any = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    promised: int = 0

    def response(self) -> web.Response:
        if isinstance(self.body, str):
            return web.Response(text=self.body, status=self.status, headers=self.headers)
        return web.json_response(self.body, status=self.status, headers=self.headers)


@dataclass(frozen=True)
class Seen:
    """A request as it arrived, from which port; names of headers in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    port: int


class MockWorker:
    """The HTTP server of an instance; `/generate` streams what `emit` is given, until `finish`.

    It keeps a journal of these streams if it is asked to and `journals`; a test emits the records.
    """

    def __init__(self, background: Background) -> None:
        self.answers: dict[str, Canned] = {"/health": Canned()}
        self.hanging: set[str] = set()
        self.seen: list[Seen] = []
        self.streams = 0
        self.left = 0
        self.die_before_headers = False
        self.die_in_stream = False
        self.journals = True
        self._background = background
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def requests(self, path: str) -> list[Seen]:
        return [s for s in self.seen if s.target.split("?")[0] == path]

    def emit(self, chunk: bytes) -> None:
        self._background.loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)

    def finish(self) -> None:
        self.emit(b"")

    def die(self) -> None:
        """End the stream as a process that is killed."""
        self.emit(_DEATH)

    def start(self) -> None:
        """Listen; after a `stop`, at the same port."""
        self._background.run(self._start())

    def stop(self) -> None:
        """Close the port: connections are refused from now on."""
        self._background.run(self._runner.cleanup())

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()
        self._port = self._runner.addresses[0][1]

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        assert request.transport is not None
        port = request.transport.get_extra_info("peername")[1]
        self.seen.append(Seen(request.method, request.raw_path, headers, body, port))
        if request.path in self.hanging:
            await asyncio.Event().wait()
        if self.die_before_headers:
            _abort(request)
        if (canned := self.answers.get(request.path)) is not None:
            if canned.promised:
                await _break_off(request, canned)
            return canned.response()
        if request.path != "/generate":
            return web.json_response({"path": request.path, "worker": self._port})
        try:
            self.streams += 1
            return await self._stream(request)
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            raise
        finally:
            self.streams -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if self.journals and JOURNAL_HEADER.decode() in request.headers:
            response.headers[JOURNAL_HEADER.decode()] = "1"
        await response.prepare(request)
        while chunk := await self._chunks.get():
            if chunk == _DEATH:
                _abort(request)
            await response.write(chunk)
            if self.die_in_stream:
                _abort(request)
        await response.write_eof()
        return response


async def _break_off(request: web.Request, canned: Canned) -> None:
    response = web.StreamResponse(headers={"Content-Length": str(canned.promised)})
    await response.prepare(request)
    await response.write(str(canned.body).encode())
    _abort(request)


def _abort(request: web.Request) -> None:
    """What the peer sees of a process that is killed."""
    assert request.transport is not None
    request.transport.abort()
