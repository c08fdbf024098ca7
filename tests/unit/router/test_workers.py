"""Plain SGLang servers behind the router: added and removed by hand, and never part of a drop."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kunserve_sglang.control.registry import FIRST_WORKER
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.processes import free_port
from tests.support.mock_worker import Canned, MockWorker
from tests.support.refusing import refusal
from tests.support.router_harness import Client, RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]

ADMIN = {"Authorization": "Bearer admin"}


def add(router: Client, worker: MockWorker, **headers: str) -> int:
    """Add a worker and wait until it serves; returns its id."""
    answer = router.post("/workers", {"url": worker.url}, **headers)
    assert answer.status == 201, answer.body
    number: int = answer.json["id"]

    def serves() -> bool:
        workers = router.get("/workers", **headers).json["workers"]
        return any(w["id"] == number and w["is_healthy"] for w in workers)

    until(serves)
    return number


def test_a_worker_serves_from_when_it_is_healthy(start_router: Start, plain: MockWorker) -> None:
    router = start_router(0)
    plain.answers["/health"] = Canned("", 503)
    answer = router.post("/workers", {"url": plain.url + "/"})
    assert answer.json == {
        "id": FIRST_WORKER,
        "url": plain.url,
        "plain": True,
        "is_healthy": False,
        "draining": False,
        "load": 0,
        "mode": "dead",
    }
    assert router.post("/v1/completions", {}).status == 503
    assert router.get("/readiness").status == 503
    plain.answers["/health"] = Canned()
    until(lambda: router.get("/readiness").status == 200)
    assert router.post("/v1/completions", {}).json["path"] == "/v1/completions"
    (worker,) = router.get("/workers").json["workers"]
    assert (worker["is_healthy"], worker["mode"]) == (True, "independent")


def test_nothing_is_claimed_of_what_a_worker_holds(start_router: Start, plain: MockWorker) -> None:
    router = start_router(1)
    number = add(router, plain)
    assert router.described(number) == {
        "id": number,
        "url": plain.url,
        "mode": "independent",
        "serving": True,
        "in_flight": 0,
        "plain": True,
        "draining": False,
    }
    assert router.described(0)["plain"] is False


def test_requests_go_to_instances_and_workers_alike(start_router: Start, plain: MockWorker) -> None:
    router = start_router(1)
    add(router, plain)
    for _ in range(4):
        assert router.post("/v1/completions", {"prompt": "x"}).status == 200
    assert len(plain.requests("/v1/completions")) == 2
    router.instances[0].set_load(10)
    until(lambda: router.described(0)["demand"] == 10)
    router.post("/v1/completions", {"prompt": "x"})
    assert len(plain.requests("/v1/completions")) == 3


def test_what_was_sent_to_a_worker_counts_as_its_load(
    start_router: Start, plain: MockWorker
) -> None:
    router = start_router(1)
    number = add(router, plain)
    router.instances[0].set_load(1)
    until(lambda: router.described(0)["demand"] == 1)
    connection = router.open("POST", "/generate", {"sampling_params": {"max_new_tokens": 600}})
    until(lambda: plain.streams == 1)
    assert router.described(number)["in_flight"] == 1
    before = len(plain.requests("/v1/completions"))
    # It has 700 slots, and more than half of them are taken: the instance is far less loaded.
    assert router.post("/v1/completions", {}).status == 200
    assert len(plain.requests("/v1/completions")) == before
    plain.finish()
    connection.getresponse().read()
    connection.close()
    until(lambda: router.described(number)["in_flight"] == 0)


def test_a_worker_is_never_part_of_a_drop(start_router: Start, plain: MockWorker) -> None:
    router = start_router(2)
    number = add(router, plain)
    plan = router.post("/kunserve/plan").json
    assert plan["instances"] == [0, 1]
    for path in ("plan", "drop", "restore", "trace"):
        answer = router.post(f"/kunserve/{path}", {"instances": [0, number]})
        assert (answer.status, answer.error["code"]) == (422, "plain_instance")
        assert answer.error["field"] == "instances"
    assert router.post("/kunserve/drop").json["instances"] == [0, 1]
    assert router.post("/kunserve/trace", {"seconds": 0.01}).status == 200
    assert router.described(number)["mode"] == "independent"


def test_two_workers_cannot_be_merged(start_router: Start, plain: MockWorker) -> None:
    router = start_router(1)
    add(router, plain)
    answer = router.post("/kunserve/drop")
    assert (answer.status, answer.error["code"]) == (409, "no_plan")


def test_a_removed_worker_ends_what_it_has_begun(start_router: Start, plain: MockWorker) -> None:
    router = start_router(0)
    number = add(router, plain)
    connection = router.open("POST", "/generate", {"stream": True})
    until(lambda: plain.streams)
    answer = router.call("DELETE", f"/workers/{number}?wait=false")
    assert (answer.status, answer.json["id"], answer.json["load"]) == (202, number, 1)
    (worker,) = router.get("/workers").json["workers"]
    assert (worker["draining"], worker["is_healthy"]) == (True, False)
    assert router.post("/v1/completions", {}).error["code"] == "no_instance"
    plain.emit(b"data: 1\n\n")
    plain.finish()
    assert connection.getresponse().read() == b"data: 1\n\n"
    connection.close()
    until(lambda: router.get("/workers").json["total"] == 0)
    assert router.call("DELETE", f"/workers/{number}").error["code"] == "unknown_worker"
    assert add(router, plain) == number + 1


def test_a_worker_that_goes_away_is_lost_until_it_is_back(
    start_router: Start, plain: MockWorker
) -> None:
    router = start_router(0)
    number = add(router, plain)
    plain.stop()
    assert router.post("/v1/completions", {}).status == 503
    assert router.described(number)["lost"] == "connection refused"
    assert router.described(number)["mode"] == "dead"
    plain.start()
    until(lambda: router.post("/v1/completions", {}).status == 200)


def test_actions_reach_workers_with_our_key(start_router: Start, plain: MockWorker) -> None:
    router = start_router(1, api_key="k", admin_api_key="admin")
    add(router, plain, **ADMIN)
    assert router.post("/flush_cache", **ADMIN).status == 200
    (seen,) = plain.requests("/flush_cache")
    assert seen.headers["authorization"] == "Bearer k"
    assert plain.requests("/health")[0].headers["authorization"] == "Bearer k"


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:30000", "ftp://a", "http://", "http://a/b", "http://a?x=1", "http://u:p@a",
     "http://a b", "http://a:99999", "http://a:x", 7, None],
)  # fmt: skip
def test_a_wrong_url_is_refused(idle_router: RouterCluster, url: Any) -> None:
    answer = idle_router.post("/workers", {"url": url})
    assert (answer.status, answer.error["field"]) == (422, "url")
    assert idle_router.get("/workers").json["total"] == 2


def test_a_wrong_body_is_named(idle_router: RouterCluster) -> None:
    for body, field in ((None, "url"), ({}, "url"), ({"url": "http://a", "x": 1}, "x")):
        answer = idle_router.post("/workers", body)
        assert (answer.status, answer.error["field"]) == (422, field)
    assert idle_router.call("POST", "/workers", b"{").error["code"] == "bad_json"


def test_nobody_is_added_twice(start_router: Start, plain: MockWorker) -> None:
    router = start_router(1)
    add(router, plain)
    for url in (plain.url, plain.url + "/", router.instances[0].worker.url):
        answer = router.post("/workers", {"url": url})
        assert (answer.status, answer.error["code"]) == (409, "worker_exists")


def test_who_is_to_leave_has_to_be_known(idle_router: RouterCluster) -> None:
    for path, status, code in (
        ("/workers/7", 404, "unknown_worker"),
        ("/workers/x", 422, "invalid_field"),
        ("/workers/-1", 422, "invalid_field"),
        ("/workers/0/1", 404, "not_found"),
    ):
        answer = idle_router.call("DELETE", path)
        assert (answer.status, answer.error["code"]) == (status, code)
    assert idle_router.get("/workers").json["stats"] == {"total": 2, "healthy": 2}


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def launched(port: int, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher of a router without instances, once that is ready."""
    flags = ("--num-instances", "0", "--port", str(port), *words)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "kunserve_sglang.launch_server", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert launcher.stdout is not None
        line = launcher.stdout.readline().decode()
        assert line.startswith(f"KunServe is ready: http://127.0.0.1:{port} ")
        yield launcher
    finally:
        launcher.kill()
        launcher.communicate()


def test_a_router_alone_is_launched_without_sglang(plain: MockWorker) -> None:
    port = free_port()
    with launched(port, "--api-key", "k") as launcher:
        client = Client(port)
        key = {"Authorization": "Bearer k"}
        assert json.loads(client.get("/kunserve/status").body)["instances"] == []
        add(client, plain, **key)
        assert client.post("/v1/completions", {}, **key).status == 200
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=20)
        assert launcher.returncode == 0


def test_a_router_alone_that_is_stopped_finishes_its_answers(plain: MockWorker) -> None:
    port = free_port()
    with launched(port) as launcher:
        client = Client(port)
        add(client, plain)
        connection = client.open("POST", "/generate", {"stream": True})
        until(lambda: plain.streams)
        plain.emit(b"data: 1\n\n")
        response = connection.getresponse()
        assert response.read1(100) == b"data: 1\n\n"
        launcher.send_signal(signal.SIGTERM)
        until(lambda: not listens(port))
        plain.emit(b"data: 2\n\n")
        plain.finish()
        assert response.read() == b"data: 2\n\n"
        connection.close()
        launcher.communicate(timeout=20)
        assert launcher.returncode == 0


def test_flags_for_no_instance_are_refused() -> None:
    words = ("--num-instances", "0", "--port", str(free_port()), "--model-path", "m")
    line = refusal("kunserve_sglang.launch_server", *words)
    assert "--model-path: with --num-instances 0" in line
    with pytest.raises(ConfigurationError, match="--num-instances"):
        ClusterConfig(num_instances=-1)
