"""Clients without haste: some read nothing, some write a byte a second, most say nothing at all.

Two routers of the same kind run side by side, and only one of them has such clients. Both are
loaded in turns by clients as they should be, and what these see must be the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import socket
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from benchmark.experiment import RunError
from benchmark.hostile.scene import Scene

_READERS = _WRITERS = 200
_IDLE = 2000
_OTHERS = 16
_CHUNKS_UNREAD = 1000
_CHUNKS_OF_OTHERS = 4
_LENGTH_CLAIMED = 100_000
_PAUSE_S = 1.0
_SETTLE_S = 10.0
_UNREAD_FOR_S = 30.0
_WARM_UP_S = 1.0
_TIMEOUT_S = 20.0


def _stream(chunks: int) -> bytes:
    body = b'{"text":"Hello","max_new_tokens":%d,"stream":true}' % chunks
    head = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


_UNREAD, _SHORT = _stream(_CHUNKS_UNREAD), _stream(_CHUNKS_OF_OTHERS)
_SLOWLY = (
    b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % _LENGTH_CLAIMED
)
_END = b"0\r\n\r\n"


@dataclass(slots=True)
class Seen:
    """By those who wait for the first byte of a stream: milliseconds, and how often they failed."""

    ttft_ms: list[float]
    failures: int = 0

    def p99(self) -> float:
        return statistics.quantiles(self.ttft_ms, n=100)[98]


async def run(quiet: Scene, crowded: Scene, rounds: int, seconds: float) -> dict[str, Any]:
    """P99 TTFT of others at either router, in turns, and the memory of the crowded one."""
    before_mib = crowded.rss_mib()
    seen = {scene: Seen([]) for scene in (quiet, crowded)}
    ratios = []
    async with _crowd(crowded.port):
        for scene in (quiet, crowded):
            await _load(scene.port, _WARM_UP_S, Seen([]))
        for number in range(rounds):
            of_round = {scene: Seen([]) for scene in (quiet, crowded)}
            # Each is first as often as the other: who comes later finds the machine busier, or not.
            for scene in (quiet, crowded) if number % 2 == 0 else (crowded, quiet):
                await _load(scene.port, seconds, of_round[scene])
                seen[scene].ttft_ms += of_round[scene].ttft_ms
                seen[scene].failures += of_round[scene].failures
            ratios.append(of_round[crowded].p99() / of_round[quiet].p99())
        held_mib = crowded.rss_mib()
    return {
        "slow_readers": _READERS,
        "slow_writers": _WRITERS,
        "idle": _IDLE,
        "requests": {"quiet": len(seen[quiet].ttft_ms), "crowded": len(seen[crowded].ttft_ms)},
        "p99_ms": {"quiet": seen[quiet].p99(), "crowded": seen[crowded].p99()},
        "p99_ratio": statistics.median(ratios),
        "failures": seen[crowded].failures,
        "held_mib": held_mib - before_mib,
    }


async def _load(port: int, seconds: float, seen: Seen) -> None:
    """Streams one after another, by clients that read what they get."""
    until = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < until:
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    seen.ttft_ms.append(await _first_byte_ms(port))
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                seen.failures += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(_OTHERS):
            tasks.create_task(client())


async def _first_byte_ms(port: int) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        begin = time.perf_counter()
        writer.write(_SHORT)
        await reader.readuntil(b"data: ")
        first_ms = 1e3 * (time.perf_counter() - begin)
        await reader.readuntil(_END)
        return first_ms
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def _crowd(port: int) -> AsyncIterator[None]:
    """All of them, as long as the block runs: a process of its own, which holds up nobody here."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_be_slow, args=(port,), daemon=True)
    process.start()
    try:
        await asyncio.sleep(_SETTLE_S)
        if not process.is_alive():
            raise RunError("the slow clients have ended")
        yield
    finally:
        process.kill()
        await asyncio.to_thread(process.join)


def _be_slow(port: int) -> None:
    """Until this process is ended; whoever is sent away comes again."""

    async def all_of_them() -> None:
        visits = (_read_nothing,) * _READERS + (_write_slowly,) * _WRITERS + (_say_nothing,) * _IDLE
        await asyncio.gather(*(_again_and_again(visit, port) for visit in visits))

    asyncio.run(all_of_them())


async def _again_and_again(visit: Any, port: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            # As over a slow line: between two processes of one host, buffers grow to megabytes.
            own = socket.socket()
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            own.setblocking(False)
            await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", port))
            reader, writer = await asyncio.open_connection(sock=own, limit=1024)
            try:
                await visit(reader, writer)
            finally:
                writer.close()
        await asyncio.sleep(_PAUSE_S)


async def _read_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """With so small a limit the stream stops reading by itself."""
    writer.write(_UNREAD)
    await asyncio.sleep(random.uniform(0.5, 1.5) * _UNREAD_FOR_S)  # not all come back at once


async def _write_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(_SLOWLY)
    for _ in range(_LENGTH_CLAIMED):
        writer.write(b" ")
        try:
            async with asyncio.timeout(_PAUSE_S):
                await reader.read(1024)  # an answer, or the end: it was sent away
                return
        except TimeoutError:
            continue


async def _say_nothing(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
