"""Clients that send what they should not, too much of it, or too slowly."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from kunserve_sglang.router.http.answers import json_answer
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.http.http_server import HttpServer
from kunserve_sglang.router.http.inbound import Handler
from kunserve_sglang.router.http.incoming import Incoming
from kunserve_sglang.router.http.limits import Limits
from tests.support.background import Background
from tests.support.raw_http import all_of, connect, statuses
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

HOST = b"Host: localhost\r\n"
POST = b"POST / HTTP/1.1\r\n" + HOST
Serve = Callable[..., int]


async def echo(request: ClientRequest) -> None:
    request.answer(json_answer(len(request.body)))


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers with a handler and limits; returns their ports."""
    background, servers = Background(), []

    def start(handler: Handler = echo, **limits: float) -> int:
        listener = socket.create_server(("127.0.0.1", 0))

        async def run() -> None:
            server = HttpServer(handler, Limits(**{"sweep_s": 0.02, **limits}))  # type: ignore[arg-type]
            servers.append(server)
            await server.start(listener, 100)

        background.run(run())
        port: int = listener.getsockname()[1]
        return port

    yield start
    for server in servers:
        background.run(server.stop(0))
    background.stop()


BAD_HEADS = {
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\n" + HOST + b"Host: b\r\n\r\n", 400),
    "the same host twice": (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    "two hosts of 1.0": (b"GET / HTTP/1.0\r\n" + HOST + HOST + b"\r\n", 400),
    "0.9": (b"GET /\r\n\r\n", 505),
    "0.9 by name": (b"GET / HTTP/0.9\r\n" + HOST + b"\r\n", 505),
    "2.0": (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "3.7": (b"GET / HTTP/3.7\r\n" + HOST + b"\r\n", 400),
    "gzip": (POST + b"Transfer-Encoding: gzip\r\n\r\nabc", 400),
    "gzip, chunked": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "chunked twice": (POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n", 400),
    "identity": (POST + b"Transfer-Encoding: identity\r\n\r\n", 400),
    "chunked of 1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "connect": (b"CONNECT a:1 HTTP/1.1\r\n" + HOST + b"\r\nGET / HTTP/1.1\r\n\r\n", 400),
    "connect of tls": (b"CONNECT a:1 HTTP/1.1\r\n" + HOST + b"\r\n\x16\x03\x01\x00\xff", 400),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "an offer without host": (b"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", 400),
    "many headers": (b"GET / HTTP/1.1\r\n" + HOST + b"X: 1\r\n" * 200 + b"\r\n", 431),
    "a long length": (POST + b"Content-Length: " + b"0" * 30 + b"2\r\n\r\n{}", 400),
    "large headers": (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 70_000 + b"\r\n\r\n", 431),
    "a large target": (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431),
    "a large body": (POST + b"Content-Length: 99999999999\r\n\r\n", 413),
    "a large body on demand": (
        POST + b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n",
        413,
    ),
}


@pytest.mark.parametrize(("data", "status"), BAD_HEADS.values(), ids=BAD_HEADS.keys())
@pytest.mark.parametrize("bytewise", [False, True])
def test_what_is_no_good_head_has_one_answer(
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    data: bytes,
    status: int,
    bytewise: bool,
) -> None:
    """And nothing that comes after it is read as a request."""
    after = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
    with closing(connect(serve())) as client, contextlib.suppress(ConnectionError):
        if bytewise and len(data) < 1000:
            for byte in data + after:
                client.sendall(bytes([byte]))
        else:
            client.sendall(data + after)
        assert statuses(all_of(client)) == [status]
    assert not caplog.records


@pytest.mark.parametrize("first", [1, 40_000, 70_000])
def test_a_head_has_its_limit_in_however_many_reads_it_comes(first: int) -> None:
    incoming = Incoming(Limits(), 0.0, first)
    incoming.arrived(70_000 - first)
    incoming.target = b"/" + b"x" * 69_900
    incoming.headers = [(b"host", b"a")]
    fault = incoming.head_fault("1.1")
    assert fault is not None
    assert fault.status == 431


def test_a_refused_client_can_read_why(serve: Serve) -> None:
    """It has sent more than anybody read, and gets its answer all the same."""
    port = serve(body=1 << 20)
    for head in (
        b"Content-Length: 4194304\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n400000\r\n",
    ):
        with closing(connect(port)) as client:
            client.sendall(POST + head + bytes(4 << 20))
            assert statuses(all_of(client)) == [413]


def test_trailers_and_chunk_extensions_have_a_limit(serve: Serve) -> None:
    port = serve()
    for endless in (b"2\r\n{}\r\n0\r\nX: ", b"2\r\n{}\r\n0\r\nX: 1\r\n" * 9000, b"2;x="):
        with closing(connect(port)) as client, contextlib.suppress(ConnectionError):
            client.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + endless)
            for _ in range(64):
                client.sendall(b"x" * 8192)
            assert statuses(all_of(client)) in ([431], [400])


def test_small_chunks_are_no_trailers(serve: Serve) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", serve(), timeout=20)) as client:
        client.request("POST", "/", iter([b"x"] * 50_000), encode_chunked=True)
        assert client.getresponse().read() == b"50000"


def test_all_bodies_have_a_limit_together(serve: Serve) -> None:
    port = serve(all_bodies=100_000)
    with closing(connect(port)) as first, closing(connect(port)) as second:
        first.sendall(POST + b"Content-Length: 80001\r\n\r\n" + bytes(80_000))
        second.sendall(POST + b"Content-Length: 80001\r\n\r\n" + bytes(80_000))
        # Whichever is read last is refused, and the room it took is given back.
        second.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            second.recv(1, socket.MSG_PEEK)
        first.shutdown(socket.SHUT_WR)
        answers = statuses(all_of(first))
        second.settimeout(20)
        second.shutdown(socket.SHUT_WR)
        assert sorted(answers + statuses(all_of(second))) == [503]
    for _ in range(5):
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as client:
            client.request("POST", "/", bytes(90_000))
            assert client.getresponse().status == 200


def test_one_address_has_so_many_connections(serve: Serve) -> None:
    port = serve(connections_per_address=3)
    clients = [connect(port) for _ in range(3)]
    for client in clients:
        client.sendall(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    with closing(connect(port)) as fourth:
        answer = all_of(fourth)
        assert (statuses(answer), b"retry-after" in answer) == ([503], True)
    clients.pop().close()

    def welcome() -> bool:
        with closing(connect(port)) as another:
            another.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n")
            return statuses(all_of(another)) == [200]

    until(welcome)
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    "trickle", [b"", b"\r\n", b"GET / HTTP/1.1\r\nX: ", POST + b"Content-Length: 99999\r\n\r\n"]
)
def test_one_byte_now_and_then_keeps_no_connection(serve: Serve, trickle: bytes) -> None:
    with closing(connect(serve(quiet_s=0.3, stalled_s=0.3))) as client:
        client.sendall(trickle)
        client.settimeout(0.05)
        for _ in range(400):
            try:
                data = client.recv(1 << 16)
                break
            except TimeoutError:
                client.sendall(trickle[-1:])
        else:
            pytest.fail("the connection is still there")
        assert statuses(data) in ([], [408])


def test_a_large_body_at_a_good_speed_may_take_longer(serve: Serve) -> None:
    with closing(connect(serve(stalled_s=0.4, step=1000))) as client:
        client.sendall(POST + b"Content-Length: 30000\r\n\r\n")
        client.settimeout(0.05)
        for _ in range(30):
            client.sendall(bytes(1000))
            with contextlib.suppress(TimeoutError):
                client.recv(1, socket.MSG_PEEK)
        client.settimeout(20)
        assert client.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("bites", [0, 1])
def test_a_client_that_does_not_read_loses_its_request(serve: Serve, bites: int) -> None:
    left = asyncio.Event()

    async def flood(request: ClientRequest) -> None:
        request.on_gone = left.set
        request.start(200, [])
        request.write(bytes(64 << 20))
        await left.wait()

    with closing(connect(serve(flood, stalled_s=0.3, step=1 << 20))) as client:
        client.sendall(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")

        def gone() -> bool:
            with contextlib.suppress(ConnectionError):
                client.recv(bites)
            return left.is_set()

        until(gone, poll_s=0.05)


def test_a_client_that_reads_slowly_gets_all(serve: Serve) -> None:
    async def large(request: ClientRequest) -> None:
        request.answer(json_answer("x" * (16 << 20)))

    with closing(connect(serve(large, stalled_s=1.0, step=1000))) as client:
        client.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n")
        assert len(all_of(client)) > 16 << 20


@pytest.mark.parametrize("started", [False, True])
def test_a_handler_that_fails_is_answered_and_logged_once(
    serve: Serve, caplog: pytest.LogCaptureFixture, started: bool
) -> None:
    async def fail(request: ClientRequest) -> None:
        if started:
            request.start(200, [])
        raise RuntimeError("a bug")

    port = serve(fail)
    for _ in range(2):
        with closing(connect(port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n")
            answer = all_of(client)
            assert statuses(answer) == [200 if started else 500]
            assert not answer.endswith(b"0\r\n\r\n")
    until(lambda: len(caplog.records) == 2)


def test_nothing_is_continued_after_its_answer(serve: Serve) -> None:
    """The second client's body has come before it was asked for."""
    expecting = POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}"
    with closing(connect(serve())) as client:
        client.sendall(expecting * 3 + b"GET / HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n")
        found = statuses(all_of(client))
        assert [s for s in found if s != 100] == [200] * 4
        assert found[-1] == 200
        assert 100 not in found[2:]


def test_an_interim_answer_comes_only_before_a_body(idle_router: RouterCluster) -> None:
    with closing(connect(idle_router.port)) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n"
            + HOST
            + b"\r\n"
        )
        assert client.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        client.sendall(b"{}")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
