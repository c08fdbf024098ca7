"""Broken HTTP: valid requests with a few faults each, each over a connection of its own."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import h11

_BODY = b'{"text":"Hello","sampling_params":{"max_new_tokens":4},"stream":false}'
_STREAM = b'{"text":"Hello","max_new_tokens":3,"stream":true}'


def _post(target: bytes, body: bytes, *headers: bytes) -> bytes:
    lines = (b"POST %s HTTP/1.1" % target, b"Host: 127.0.0.1", *headers)
    return b"\r\n".join((*lines, b"Content-Length: %d" % len(body), b"", body))


_CHUNKED = b"%x\r\n%s\r\n%x;a=b\r\n%s\r\n0\r\nX-Trailer: 1\r\n\r\n" % (
    *(20, _BODY[:20]),
    *(len(_BODY) - 20, _BODY[20:]),
)

TEMPLATES = (
    b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /kunserve/status HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer x\r\n\r\n",
    b"GET /kunserve/events?since=3&limit=2 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
    b"OPTIONS /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://example.org\r\n\r\n",
    b"GET /v1/models HTTP/1.0\r\n\r\n",
    _post(b"/generate", _BODY, b"Content-Type: application/json"),
    _post(b"/generate", _STREAM, b"Content-Type: application/json"),
    _post(b"/v1/chat/completions", b'{"messages":[{"role":"user","content":"Hi"}]}'),
    _post(b"/v1/completions", b'{"prompt":["a","b"],"max_tokens":2,"n":2}', b"X-Priority: 1"),
    _post(b"/generate", _BODY, b"Expect: 100-continue"),
    b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n" + _CHUNKED,
    _post(b"/generate", _BODY) + b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    _post(b"/kunserve/drop", b"{}", b"Content-Type: application/json"),
    _post(b"/kunserve/restore", b'{"instances":[0,1]}'),
    _post(b"/workers", b'{"url":"http://127.0.0.1:1"}', b"Content-Type: application/json"),
    _post(b"/flush_cache", b""),
    _post(b"/update_weights_from_disk", b'{"model_path":"x"}'),
    b'PUT /kunserve/policy HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 14\r\n\r\n{"auto":false}',
    b"DELETE /workers/0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
)

_PIECES = (
    *(b"\r\n", b"\n", b"\r", b"\x00", b"\t", b" ", b":", b";", b",", b"#", b"?", b"%2e%2e", b"//"),
    *(b"\xff", b"\xe2\x80\xa8", b"\x7f", b"\x0b", b"{", b"[" * 50, b'"', b"-", b"+", b"0x"),
    *(b"chunked", b"identity", b"gzip", b"close", b"keep-alive", b"HTTP/1.1", b"HTTP/2.0"),
    *(b"CONNECT ", b"TRACE ", b"http://example.org", b"/flush_cache", b"..", b"1e400", b"NaN"),
    b"\r\nContent-Length: 0",
    b"\r\nContent-Length: 4294967296",
    b"\r\nTransfer-Encoding: chunked",
    b"\r\nTransfer-Encoding: xchunked",
    b"\r\nHost: example.org",
    b"\r\nX: " + b"y" * 3000,
    b"\r\n folded: 1",
    b"\r\n\r\nGET /flush_cache HTTP/1.1\r\nHost: x\r\n\r\n",
)
_MOST_FAULTS = 4
_NUMBER = re.compile(rb"\d+")


def mutated(chance: random.Random) -> bytes:
    """A valid request with one to four faults; now and then with none."""
    data = chance.choice(TEMPLATES)
    for _ in range(chance.randrange(_MOST_FAULTS + 1)):
        data = chance.choice(_FAULTS)(data, chance)
    return data


def _flip(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(max(1, len(data)))
    return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]


def _insert(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice(_PIECES) + data[at:]


def _cut_out(data: bytes, chance: random.Random) -> bytes:
    begin, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:begin] + data[min(end, begin + 20) :]


def _truncate(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _repeat_line(data: bytes, chance: random.Random) -> bytes:
    lines = data.split(b"\r\n")
    at = chance.randrange(len(lines))
    return b"\r\n".join((*lines[: at + 1], *lines[at:]))


def _swap_lines(data: bytes, chance: random.Random) -> bytes:
    lines = data.split(b"\r\n")
    one, other = (chance.randrange(len(lines)) for _ in range(2))
    lines[one], lines[other] = lines[other], lines[one]
    return b"\r\n".join(lines)


def _other_line_ends(data: bytes, chance: random.Random) -> bytes:
    return data.replace(b"\r\n", chance.choice((b"\n", b"\r", b"\r\r\n")), chance.randrange(1, 4))


def _other_number(data: bytes, chance: random.Random) -> bytes:
    found = list(_NUMBER.finditer(data))
    if not found:
        return data
    number = chance.choice(found)
    new = chance.choice((b"0", b"-1", b"1", b"99", b"9" * 30, b"0" * 30 + b"5", b"1_0", b""))
    return data[: number.start()] + new + data[number.end() :]


def _splice(data: bytes, chance: random.Random) -> bytes:
    other = chance.choice(TEMPLATES)
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other)) :]


_FAULTS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _insert, _insert, _cut_out, _truncate, _repeat_line, _swap_lines),
    *(_other_line_ends, _other_number, _splice),
)


# --- one connection -------------------------------------------------------------------------------


class End(StrEnum):
    """How a connection went."""

    ANSWERED = "answered"
    """With a status."""

    INCOMPLETE = "incomplete"
    """What was sent was not a whole request, and the connection ended when the client's end did."""

    UNANSWERED = "unanswered"
    """It was closed in spite of a whole request."""

    HUNG = "hung"
    """Neither an answer nor an end."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one connection; `statuses` are those of all answers on it."""

    sent: bytes
    end: End
    statuses: tuple[int, ...]


_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_READ_BYTES = 1 << 16
_QUIET_S = 0.05
_SOON_S = 0.2
_DEADLINE_S = 10.0


async def exchange(port: int, sent: bytes) -> Outcome:
    """Send it over a new connection, and see what comes of it."""
    form = _form(sent)
    answer = bytearray()
    try:
        # An answer may have come before a reset.
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(sent)
                async with asyncio.timeout(_DEADLINE_S):
                    if form is Form.WHOLE or await _answered(reader, answer):
                        await _read(reader, answer, quiet_s=_QUIET_S)
                    else:
                        writer.write_eof()
                        await _read(reader, answer, quiet_s=None)
            finally:
                writer.close()
    except TimeoutError:
        return Outcome(sent, End.HUNG, ())
    statuses = tuple(int(s) for s in _STATUS.findall(answer))
    if statuses:
        return Outcome(sent, End.ANSWERED, statuses)
    return Outcome(sent, End.INCOMPLETE if form is Form.PART else End.UNANSWERED, ())


async def _answered(reader: asyncio.StreamReader, answer: bytearray) -> bool:
    """Whether something comes soon although the request may go on."""
    try:
        async with asyncio.timeout(_SOON_S):
            answer += await reader.read(_READ_BYTES)
    except TimeoutError:
        return False
    return True


async def _read(reader: asyncio.StreamReader, answer: bytearray, *, quiet_s: float | None) -> None:
    """All that comes until the end, or until there was an answer and then nothing for `quiet_s`."""
    while True:
        try:
            async with asyncio.timeout(quiet_s if answer else None):
                data = await reader.read(_READ_BYTES)
        except TimeoutError:
            return
        if not data:
            return
        answer += data


class Form(StrEnum):
    """What was sent, as another parser sees it."""

    WHOLE = "whole"
    """A request, whatever follows it."""

    BROKEN = "broken"
    """Its head ends, and it cannot become a request any more."""

    PART = "part"
    """The rest is missing."""


def _form(sent: bytes) -> Form:
    parser = h11.Connection(h11.SERVER)
    try:
        parser.receive_data(sent)
        event = parser.next_event()
        while isinstance(event, h11.Request | h11.Data):
            event = parser.next_event()
    except h11.RemoteProtocolError:
        return Form.BROKEN if b"\r\n\r\n" in sent.lstrip(b"\r\n") else Form.PART
    return Form.WHOLE if isinstance(event, h11.EndOfMessage) else Form.PART
