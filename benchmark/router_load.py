"""The load of the router's benchmark: mock instances and their clients in one event loop.

Both ends in one process see one clock, and a stream's next chunk can wait until the client has
read the one before. They know the few messages of this benchmark by sight and parse nothing else,
so that the process can load a router that is far faster than ours.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
from dataclasses import dataclass, field
from typing import ClassVar, cast

_TOKEN = b'data: {"stream":%06d,"text":" token","meta_info":{"id":"%032d","finish_reason":null,'
_TOKEN += b'"prompt_tokens":12,"completion_tokens":7,"cached_tokens":0,"weight_version":"default"}}'
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_STREAM_END = b"0\r\n\r\n"
_ANSWER_END = b'"finish_reason":{"type":"length","length":1}}}'
_ANSWER_BODY = b'{"text":" token","meta_info":{"id":"%032d",' % 7 + _ANSWER_END
_PROMPT = b"What is the capital of France, and how many people live there? " * 4

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_new_tokens":(\d+)')
_STREAM = re.compile(rb'"stream":(\d{6})')


def _answer(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


_ANSWER = _answer(_ANSWER_BODY)
_ABOUT = _answer(b'{"model_path":"mock","is_generation":true,"max_total_num_tokens":1000000}')


def _request(tokens: int, *, stream: bool) -> bytes:
    """As the SDKs send it, in the order of fields in which upstream's router sends it on."""
    body = b'{"text":"%s","sampling_params":{"max_new_tokens":%d},"stream":%s}' % (
        _PROMPT,
        tokens,
        b"true" if stream else b"false",
    )
    head = (
        b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: */*\r\n"
        b"user-agent: benchmark\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    return head % len(body) + body


class MockInstance:
    """Answers at once; a stream gets its further chunks at the steps, or when `pull` is called."""

    def __init__(self) -> None:
        self.port = 0
        self.running: dict[int, _MockStream] = {}

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _MockConnection(self), "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def run_steps(self, step_s: float, offset_s: float) -> None:
        """One chunk for every running stream each `step_s`, as a batch of decodes makes them."""
        loop = asyncio.get_running_loop()
        due = loop.time() + offset_s
        while True:
            await asyncio.sleep(due - loop.time())
            for stream in list(self.running.values()):
                stream.next()
            due += step_s


class _MockStream:
    numbers = itertools.count()
    by_number: ClassVar[dict[int, _MockStream]] = {}

    __slots__ = ("_chunk", "_instance", "_left", "_transport", "number")

    def __init__(self, instance: MockInstance, transport: asyncio.Transport, tokens: int) -> None:
        self.number = next(self.numbers) % 1_000_000
        text = _TOKEN % (self.number, self.number) + b"\n\n"
        self._chunk = b"%x\r\n%s\r\n" % (len(text), text)
        self._instance, self._transport, self._left = instance, transport, tokens
        instance.running[self.number] = self.by_number[self.number] = self

    def next(self, head: bytes = b"") -> None:
        self._left -= 1
        if self._left > 0:
            self._transport.write(head + self._chunk)
        else:
            self._transport.write(head + self._chunk + _STREAM_END)
            self.end()

    def finish(self) -> None:
        """The next chunk is the last."""
        self._left = 1

    def end(self) -> None:
        self._instance.running.pop(self.number, None)
        self.by_number.pop(self.number, None)


class _MockConnection(asyncio.Protocol):
    def __init__(self, instance: MockInstance) -> None:
        self._instance = instance
        self._data = b""
        self._stream: _MockStream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._data = data = self._data + data if self._data else data
        head = data.find(b"\r\n\r\n")
        if head < 0:
            return
        length = _LENGTH.search(data, 0, head)
        if len(data) < head + 4 + (int(length[1]) if length else 0):
            return
        self._data = b""
        if not data.startswith(b"POST /generate"):
            self._transport.write(_ABOUT)
        elif b'"stream":true' not in data:
            self._transport.write(_ANSWER)
        else:
            tokens = _TOKENS.search(data)
            assert tokens is not None, "a request of this benchmark names its tokens"
            self._stream = _MockStream(self._instance, self._transport, int(tokens[1]))
            self._stream.next(_STREAM_HEAD)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 (a Protocol)
        if self._stream is not None:
            self._stream.end()


@dataclass
class Tally:
    """What the clients of one measurement saw; TTFT in seconds."""

    ttft: list[float] = field(default_factory=list)
    chunks: int = 0
    answers: int = 0
    errors: list[str] = field(default_factory=list)


class Client(asyncio.Protocol):
    """One kept connection with one request at a time, the next one at once until `stop`."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.idle = asyncio.Event()
        self._stopping = False
        self._tail = b""
        self._sent = 0.0

    def begin(self) -> None:
        self._send(_request(1, stream=False))

    async def stop(self) -> None:
        """Let the request under way come to its end."""
        self._stopping = True
        await self.idle.wait()
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.idle.is_set():
            self.tally.errors.append(f"connection lost: {error!r}")
            self.idle.set()

    def data_received(self, data: bytes) -> None:
        if self._has_ended(data, _ANSWER_END):
            self._answered()

    def _send(self, request: bytes) -> None:
        self.idle.clear()
        self._tail = b""
        self._sent = time.perf_counter()
        self._transport.write(request)

    def _has_ended(self, data: bytes, end: bytes) -> bool:
        if not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self.tally.errors.append(data[:200].decode(errors="replace"))
            self._transport.abort()
        self._tail = (self._tail + data)[-len(end) :]
        return self._tail == end

    def _answered(self) -> None:
        self.tally.answers += 1
        self._again()

    def _again(self) -> None:
        if self._stopping:
            self.idle.set()
        else:
            self.begin()


class StreamClient(Client):
    """Streams of random lengths about a mean; with `pull` each chunk asks for the next one."""

    def __init__(self, tally: Tally, chance: random.Random, mean: int, *, pull: bool) -> None:
        super().__init__(tally)
        self._chance, self._mean, self._pull = chance, mean, pull
        self._stream: _MockStream | None = None
        self._first = True

    def begin(self) -> None:
        # Of one length, streams that began together would end and begin together for ever.
        tokens = self._chance.randint((self._mean + 1) // 2, self._mean * 3 // 2)
        self._first = True
        self._send(_request(tokens, stream=True))

    async def stop(self) -> None:
        if self._pull and self._stream is not None:
            self._stream.finish()
        await super().stop()

    def data_received(self, data: bytes) -> None:
        ended = self._has_ended(data, _STREAM_END)
        chunks = data.count(b"data: ")
        if self._first and chunks:
            self._first = False
            self.tally.ttft.append(time.perf_counter() - self._sent)
            number = _STREAM.search(data)
            assert number is not None, "every chunk names its stream"
            self._stream = _MockStream.by_number.get(int(number[1]))
        self.tally.chunks += chunks
        if ended:
            self._stream = None
            self._answered()
        elif self._pull and chunks and self._stream is not None:
            self._stream.next()

    def _answered(self) -> None:
        # Not within the step that ended this stream: arrivals have nothing to do with steps.
        self.tally.answers += 1
        asyncio.get_running_loop().call_later(self._chance.uniform(0, 0.02), self._again)


class BurstClient(StreamClient):
    """Streams of one chunk; the next one when all clients of the burst have theirs."""

    def __init__(self, tally: Tally) -> None:
        super().__init__(tally, random.Random(0), 1, pull=False)

    def _answered(self) -> None:
        self.tally.answers += 1
        self.idle.set()
