"""The router as a client of instances: kept connections, and answers of all forms, good and bad."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.mock_worker import MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


class Script:
    """An instance that answers each request with the next of some bytes, whatever they are."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may have ended already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        first = True
        with connection, contextlib.suppress(OSError):
            while request := connection.recv(1 << 16):
                if request.startswith((b"GET /health", b"GET /server_info")):
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    continue
                self.connections += first
                first = False
                answer = self.answers.pop(0)
                if answer == b"<end>":
                    self.close()
                    return
                connection.sendall(answer.removesuffix(b"<close>"))
                if answer.endswith(b"<close>"):
                    return


@pytest.fixture
def script(start_router: Start) -> Iterator[tuple[RouterCluster, Script]]:
    """The only instance behind a router."""
    router, script = start_router(0), Script()
    assert router.post("/workers", {"url": script.url}).status == 201
    until(lambda: router.get("/readiness").status == 200)
    yield router, script
    script.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def test_connections_to_an_instance_are_kept(script: tuple[RouterCluster, Script]) -> None:
    router, instance = script
    instance.answers = [OK] * 5
    assert [router.post("/v1/completions").body for _ in range(5)] == [b"ok"] * 5
    assert instance.connections == 1


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nX: 1\r\n\r\nall until the end<close>", b"all until the end"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nab\r\n3\r\ncde\r\n0\r\nX-Trailer: 1\r\n\r\n",
            b"abcde",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\nmore", b"ok"),
    ],
)
def test_answers_of_all_forms_arrive(
    script: tuple[RouterCluster, Script], answer: bytes, body: bytes
) -> None:
    """And what an instance sends without having been asked is nobody's answer."""
    router, instance = script
    instance.answers = [answer, OK]
    assert router.post("/v1/completions").body == body
    assert router.post("/v1/completions").body == b"ok"


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "before", [OK, b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n"], ids=["ok", "failure"]
)
def test_a_kept_connection_that_has_just_closed_costs_no_request(
    script: tuple[RouterCluster, Script], method: str, before: bytes
) -> None:
    """What the instance has not looked at is sent again, once."""
    router, instance = script
    path = "/v1/models" if method == "GET" else "/v1/completions"
    instance.answers = [before, b"<close>", OK]
    assert router.call(method, path).status in (200, 500)
    assert router.call(method, path).body == b"ok"
    instance.answers = [b"<close>", b"<close>", OK]
    assert router.call(method, path).status == 502
    assert router.call(method, path).body == b"ok"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n<close>", b"H<close>"])
def test_what_may_have_been_run_is_not_sent_again(
    script: tuple[RouterCluster, Script], answer: bytes
) -> None:
    router, instance = script
    instance.answers = [OK, answer, OK]
    assert router.post("/v1/completions").status == 200
    assert router.post("/v1/completions").status == 502


def test_what_has_ended_an_instance_goes_to_one_more(
    script: tuple[RouterCluster, Script], worker: MockWorker
) -> None:
    router, instance = script
    instance.answers = [OK, b"<end>"]
    assert router.post("/v1/completions").status == 200
    assert router.post("/workers", {"url": worker.url}).status == 201
    until(lambda: router.get("/readiness").json.get("available") == 2)
    statuses: list[int] = []

    def it_has_ended() -> bool:
        statuses.append(router.post("/v1/completions").status)
        return any("lost" in i for i in router.status()["instances"])

    until(it_has_ended)
    assert set(statuses) == {200}


@pytest.mark.parametrize(
    "answer",
    [
        b"<close>",
        b"HTTP/1.1 200 OK\r\nContent-<close>",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
def test_what_is_no_answer_is_a_bad_gateway(
    script: tuple[RouterCluster, Script], answer: bytes
) -> None:
    router, instance = script
    instance.answers = [answer, OK]
    assert router.post("/v1/completions").status == 502
    assert router.post("/v1/completions").status == 200
