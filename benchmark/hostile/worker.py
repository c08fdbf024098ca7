"""An instance that trusts nobody: what arrives is read by another parser than the router's.

h11 is stricter than most servers. So what it cannot read, or reads as more requests than one, would
be read in one way by the router and in another behind it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass

import h11

_READ_BYTES = 1 << 16
_WIDE = 50
"""As many chunks come as one if there are to be more: those are for whoever does not read."""

_CHUNK = b'data: {"text": "%s"}\n\n' % (b"token " * 40)


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request as it was read behind the router."""

    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class StrictWorker:
    """Answers every request at once; a stream has as many chunks as the body asks for tokens."""

    def __init__(self, on_arrival: Callable[[Arrived], None]) -> None:
        self._on_arrival = on_arrival
        self._tasks: set[asyncio.Task[None]] = set()
        self.unreadable = 0
        """Connections on which something arrived that is no request."""
        self.url = ""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=4096)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = h11.Connection(h11.SERVER)
        try:
            while (arrived := await _next_request(parser, reader)) is not None:
                self._on_arrival(arrived)
                await self._answer(parser, arrived, writer)
                if parser.our_state is h11.MUST_CLOSE:
                    break
                parser.start_next_cycle()
        except h11.RemoteProtocolError:
            self.unreadable += 1
        except ConnectionError:
            return  # the router has ended a request whose client has left
        finally:
            writer.close()

    async def _answer(
        self, parser: h11.Connection, arrived: Arrived, writer: asyncio.StreamWriter
    ) -> None:
        headers = [("content-type", "application/json"), ("content-length", "2")]
        parts = [b"{}"]
        if arrived.method == "HEAD":
            parts = []
        elif chunks := _chunks_wanted(arrived):
            headers = [("content-type", "text/event-stream")]
            parts = [_CHUNK * (_WIDE if chunks > _WIDE else 1)] * chunks
        writer.write(parser.send(h11.Response(status_code=200, headers=headers)) or b"")
        for part in parts:
            writer.write(parser.send(h11.Data(data=part)) or b"")
            await writer.drain()
        writer.write(parser.send(h11.EndOfMessage()) or b"")
        await writer.drain()


async def _next_request(parser: h11.Connection, reader: asyncio.StreamReader) -> Arrived | None:
    """None when the connection has ended. Raises `h11.RemoteProtocolError` for no request."""
    request: h11.Request | None = None
    body = bytearray()
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            parser.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            return Arrived(
                request.method.decode(),
                request.target.decode(),
                tuple(request.headers),
                bytes(body),
            )
        else:
            return None


def _chunks_wanted(arrived: Arrived) -> int:
    """Of a stream; 0 if it wants none, as any question does whatever its body says."""
    try:
        asked = json.loads(arrived.body)
        wanted = arrived.method == "POST" and asked.get("stream") is True
        return max(0, int(asked["max_new_tokens"])) if wanted else 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0
