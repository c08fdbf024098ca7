"""HTTP/1.1 as clients may send it, good and bad, over plain sockets."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


class Wire:
    """A client that says what it likes."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._file = self._socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answer(self) -> tuple[int, dict[bytes, bytes], bytes]:
        status = int(self._file.readline().split()[1])
        headers = {}
        while line := self._file.readline().strip():
            name, _, value = line.partition(b": ")
            headers[name] = value
        if b"content-length" in headers:
            return status, headers, self._file.read(int(headers[b"content-length"]))
        body = b""
        while size := int(self._file.readline(), 16):
            body += self._file.read(size)
            self._file.readline()
        self._file.readline()
        return status, headers, body

    def closed(self) -> bool:
        return self._file.read() == b""

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.fixture
def wire(idle_router: RouterCluster) -> Iterator[Wire]:
    wire = Wire(idle_router.port)
    yield wire
    wire.close()


def seen(router: RouterCluster, path: str) -> list[tuple[dict[str, str], bytes]]:
    return [(s.headers, s.body) for i in router.instances for s in i.worker.requests(path)]


def test_requests_of_one_connection_are_answered_in_order(wire: Wire) -> None:
    wire.send(b"".join(b"GET /v1/models/n%d HTTP/1.1\r\nHost: x\r\n\r\n" % n for n in range(5)))
    for number in range(5):
        status, _, body = wire.answer()
        assert (status, b'/n%d"' % number in body) == (200, True)
    wire.send(b"GET /liveness HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    status, headers, _ = wire.answer()
    assert (status, headers[b"connection"]) == (200, b"close")
    assert wire.closed()


def test_a_body_in_chunks_goes_on_with_its_length(idle_router: RouterCluster, wire: Wire) -> None:
    wire.send(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    wire.send(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nAuthorization: trailer\r\n\r\n")
    assert wire.answer()[0] == 200
    ((headers, body),) = seen(idle_router, "/v1/score")
    assert (body, headers["content-length"]) == (b"abcde", "5")
    assert {"authorization", "transfer-encoding"}.isdisjoint(headers)


def test_a_client_may_ask_whether_to_go_on(wire: Wire) -> None:
    wire.send(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert wire._file.readline() == b"HTTP/1.1 100 Continue\r\n"
    assert wire._file.readline() == b"\r\n"
    wire.send(b"{}")
    assert wire.answer()[0] == 200


def test_an_upgrade_is_declined_and_the_body_is_read(
    idle_router: RouterCluster, wire: Wire
) -> None:
    """As Java's client offers HTTP/2 with its first request."""
    wire.send(
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\nContent-Length: 7\r\n\r\nall"
    )
    wire.send(b" of\n")
    assert wire.answer()[0] == 200
    ((headers, body),) = seen(idle_router, "/v1/embeddings")
    assert body == b"all of\n"
    assert {"upgrade", "http2-settings"}.isdisjoint(headers)
    wire.send(b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\n")
    assert wire.answer()[0] == 200


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 2\r\nContent-Length: 3\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Content-Length: +2\r\n",
        b"Content-Length : 2\r\n",
        b"Content-Length: 2\r\n X: folded\r\n",
        b"X: a\nContent-Length: 2\r\n",
        b"X: a\x00b\r\n",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(
    idle_router: RouterCluster, wire: Wire, lines: bytes
) -> None:
    before = len(seen(idle_router, "/v1/completions"))
    smuggled = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    wire.send(POST + lines + b"\r\n" + smuggled)
    assert wire.answer()[0] == 400
    assert wire.closed()
    assert len(seen(idle_router, "/v1/completions")) == before
    assert not seen(idle_router, "/smuggled")


def test_endless_headers_are_refused(wire: Wire) -> None:
    wire.send(b"GET / HTTP/1.1\r\nX: ")
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            wire.send(b"x" * 8192)
    assert wire.answer()[0] == 431


def test_a_client_of_http_1_0_gets_plain_bytes_and_the_end(
    start_router: Start,
) -> None:
    router = start_router(1)
    worker = router.instances[0].worker
    wire = Wire(router.port)
    wire.send(b'POST /generate HTTP/1.0\r\nContent-Length: 15\r\n\r\n{"stream":true}')
    until(lambda: worker.streams)
    worker.emit(b"data: 1\n\n")
    worker.finish()
    data = wire._file.read()
    assert data.endswith(b"\r\n\r\ndata: 1\n\n")
    assert b"transfer-encoding" not in data
    wire.close()


def test_head_has_no_body(wire: Wire) -> None:
    for path in (b"/", b"/liveness"):
        wire.send(b"HEAD %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        assert wire._file.readline() == b"HTTP/1.1 200 OK\r\n"
        while wire._file.readline() != b"\r\n":
            continue
    wire.send(b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\n")
    assert wire.answer()[0] == 200


def test_a_call_goes_on_when_its_client_leaves(start_router: Start) -> None:
    """A drop that was asked for is not taken back by a closed connection."""
    router = start_router(2)
    wire = Wire(router.port)
    wire.send(b"POST /kunserve/drop HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
    wire.close()
    until(lambda: (router.event() or {}).get("status") == "committed")


def test_a_slow_client_holds_back_its_instance_and_nobody_else(start_router: Start) -> None:
    router = start_router(1)
    worker = router.instances[0].worker
    wire = Wire(router.port)
    wire.send(POST.replace(b"/v1/completions", b"/generate") + b"Content-Length: 2\r\n\r\n{}")
    until(lambda: worker.streams)
    chunk = b"data: " + bytes(1 << 20) + b"\n\n"
    for _ in range(64):
        worker.emit(chunk)
    worker.finish()
    assert router.get("/liveness").status == 200
    assert worker.streams == 1  # far more than all buffers hold: it has not come to the end
    status, _, body = wire.answer()
    assert (status, len(body)) == (200, 64 * len(chunk))
    wire.close()
