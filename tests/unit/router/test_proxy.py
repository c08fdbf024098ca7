"""Requests through the router: streams, clients that leave, instances that fail."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable

import pytest

from tests.support.mock_instance import MockInstance
from tests.support.mock_worker import Canned
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]


def streaming(router: RouterCluster) -> MockInstance:
    """The instance that has a stream under way."""
    until(lambda: any(i.worker.streams for i in router.instances))
    return next(i for i in router.instances if i.worker.streams)


def test_a_request_arrives_and_returns_unchanged(start_router: Start) -> None:
    router = start_router(1)
    worker = router.instances[0].worker
    worker.answers["/v1/rerank"] = Canned(
        {"a": 1}, status=418, headers={"X-Answer": "7", "Connection": "X-Hop", "X-Hop": "1"}
    )
    body = b'{"text": "\xc3\xa4", "stream": false}'
    headers = {
        "Authorization": "Bearer k",
        "X-Request-Id": "r1",
        "Content-Type": "application/json",
        "Connection": "keep-alive, X-Private",
        "X-Private": "1",
        "TE": "trailers",
    }
    answer = router.call("PUT", "/v1/rerank?a=1&b=%2F", body, headers)
    assert (answer.status, answer.json) == (418, {"a": 1})
    assert answer.headers["x-answer"] == "7"
    assert "x-hop" not in answer.headers
    seen = worker.seen[-1]
    assert (seen.method, seen.target, seen.body) == ("PUT", "/v1/rerank?a=1&b=%2F", body)
    assert seen.headers["authorization"] == "Bearer k"
    assert seen.headers["x-request-id"] == "r1"
    assert seen.headers["content-type"] == "application/json"
    assert {"x-private", "te", "accept", "user-agent"}.isdisjoint(seen.headers)


def test_a_large_body_arrives_whole(idle_router: RouterCluster) -> None:
    body = bytes(range(1, 128)) * 24_000
    assert idle_router.call("POST", "/v1/embeddings", body).status == 200
    (seen,) = [s for i in idle_router.instances for s in i.worker.requests("/v1/embeddings")]
    assert seen.body == body
    assert seen.headers["content-length"] == str(len(body))


def test_chunks_pass_one_by_one(router: RouterCluster) -> None:
    connection = router.open("POST", "/generate", {"stream": True})
    worker = streaming(router).worker
    response: http.client.HTTPResponse | None = None
    for chunk in (b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n"):
        worker.emit(chunk)
        response = response or connection.getresponse()
        assert response.read1(1000) == chunk
        assert worker.streams == 1
    assert response is not None
    assert response.getheader("Content-Type") == "text/event-stream"
    worker.finish()
    assert response.read() == b""
    connection.close()


@pytest.mark.parametrize("when", ["before the first chunk", "in mid-stream"])
def test_a_client_that_leaves_ends_the_upstream_request(router: RouterCluster, when: str) -> None:
    connection = router.open("POST", "/generate", {"stream": True})
    instance = streaming(router)
    worker = instance.worker
    if when == "in mid-stream":
        worker.emit(b"data: 1\n\n")
        response = connection.getresponse()
        response.read1(10)
        response.close()
    connection.close()
    until(lambda: worker.left == 1)
    until(lambda: router.described(instance.number)["in_flight"] == 0)
    until(lambda: b'kunserve:requests_total{code="499"} 1.0' in router.get("/metrics").body)


def test_a_refused_request_goes_to_the_other_instance(router: RouterCluster) -> None:
    dead, alive = router.instances
    dead.reporting = False
    alive.set_load(demand=1000)
    until(lambda: router.described(1).get("demand") == 1000)
    dead.worker.stop()
    answer = router.post("/v1/completions", {"prompt": "x"})
    assert answer.status == 200
    assert len(alive.worker.requests("/v1/completions")) == 1
    assert router.described(0)["lost"] == "connection refused"
    assert b"kunserve:dispatch_retries_total 1.0" in router.get("/metrics").body
    dead.worker.start()
    until(lambda: "lost" not in router.described(0))


def test_only_an_answer_ends_a_refusal(router: RouterCluster) -> None:
    """A status record says that its scheduler lives, not that anybody listens at its address."""
    lost = router.instances[0]
    lost.worker.stop()
    until(lambda: router.post("/v1/completions", {"prompt": "x"}).status == 200)
    until(lambda: router.described(0).get("lost") == "connection refused")
    lost.set_load(demand=7)
    until(lambda: router.described(0)["demand"] == 7)
    assert router.described(0)["lost"] == "connection refused"
    lost.worker.start()
    until(lambda: "lost" not in router.described(0))


@pytest.mark.parametrize("status", [429, 503])
def test_backpressure_is_no_death(router: RouterCluster, status: int) -> None:
    for instance in router.instances:
        instance.worker.answers["/generate"] = Canned("busy", status, {"Retry-After": "3"})
        instance.worker.answers["/health"] = Canned("", 503)
    for _ in range(20):
        answer = router.post("/generate", {"text": "x"})
        assert (answer.status, answer.body) == (status, b"busy")
        assert answer.headers["retry-after"] == "3"
    assert router.get("/readiness").status == 200
    asked = [len(i.worker.requests("/generate")) for i in router.instances]
    assert sorted(asked) == [10, 10]


def test_without_instances_clients_are_told_to_come_back(start_router: Start) -> None:
    router = start_router(0, expect=2)
    answer = router.post("/v1/chat/completions", {})
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.error["code"] == "no_instance"


def test_an_instance_that_breaks_off_is_a_bad_gateway(start_router: Start) -> None:
    router = start_router(1)
    router.instances[0].worker.die_before_headers = True
    answer = router.post("/generate", {"text": "x"})
    assert (answer.status, answer.error["code"]) == (502, "upstream_lost")
    assert len(router.instances[0].worker.requests("/generate")) == 1


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_what_a_lost_instance_had_is_answered_by_another(router: RouterCluster, path: str) -> None:
    dying, other = router.instances
    dying.worker.die_before_headers = True
    other.worker.answers[path] = Canned({"whole": True})
    other.set_load(demand=1000)
    until(lambda: router.described(1).get("demand") == 1000)
    body = {"prompt": "x", "n": 2, "logprobs": 1}
    answer = router.post(path, body)
    assert (answer.status, answer.json) == (200, {"whole": True})
    (first,), (second,) = (i.worker.requests(path) for i in router.instances)
    assert first.body == second.body
    assert b"kunserve:dispatch_retries_total 1.0" in router.get("/metrics").body
    until(lambda: not any(i["in_flight"] for i in router.status()["instances"]))


def test_an_answer_that_breaks_off_in_its_body_is_had_from_another(router: RouterCluster) -> None:
    dying, other = router.instances
    dying.worker.answers["/v1/completions"] = Canned("half an answer", promised=1000)
    other.set_load(demand=1000)
    until(lambda: router.described(1).get("demand") == 1000)
    answer = router.post("/v1/completions", {"prompt": "x"})
    assert (answer.status, answer.json["path"]) == (200, "/v1/completions")
    assert len(dying.worker.requests("/v1/completions")) == 1


def test_what_two_instances_were_lost_with_is_not_tried_again(start_router: Start) -> None:
    router = start_router(3)
    for instance in router.instances:
        instance.worker.die_before_headers = True
    answer = router.post("/generate", {"text": "x"})
    assert (answer.status, answer.error["code"]) == (502, "upstream_lost")
    assert "not tried again" in answer.error["message"]
    assert sum(len(i.worker.requests("/generate")) for i in router.instances) == 2


def test_what_was_taken_once_waits_for_room_elsewhere(router: RouterCluster) -> None:
    dying, full = router.instances
    dying.worker.die_before_headers = True
    full.worker.answers["/v1/completions"] = Canned("busy", 503)
    full.set_load(demand=1000)
    until(lambda: router.described(1).get("demand") == 1000)
    connection = router.open("POST", "/v1/completions", {"prompt": "x"})
    until(lambda: len(full.worker.requests("/v1/completions")) > 1)
    full.worker.answers["/v1/completions"] = Canned({"whole": True})
    assert connection.getresponse().status == 200
    connection.close()
    assert len(dying.worker.requests("/v1/completions")) == 1


def test_what_was_taken_once_does_not_wait_for_ever(start_router: Start) -> None:
    """Its client learns that it was lost, and not that it should wait a little."""
    router = start_router(2, queue_timeout_s=0.3)
    dying, full = router.instances
    dying.worker.die_before_headers = True
    full.worker.answers["/generate"] = Canned({"error": "The request queue is full."}, 503)
    full.set_load(demand=1000)
    until(lambda: router.described(1).get("demand") == 1000)
    assert router.post("/generate", {"text": "x"}).error["code"] == "upstream_lost"


def test_an_answer_that_breaks_off_is_not_taken_for_complete(start_router: Start) -> None:
    router = start_router(1)
    worker = router.instances[0].worker
    worker.die_in_stream = True
    connection = router.open("POST", "/generate", {"stream": True})
    until(lambda: worker.streams)
    worker.emit(b"data: 1\n\n")
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        connection.getresponse().read()
    connection.close()
    assert b"kunserve:answers_cut_total 1.0" in router.get("/metrics").body


@pytest.mark.parametrize("target", ["@127.0.0.1:1/x", "http://127.0.0.1:1/x", "*"])
def test_a_target_cannot_name_another_host(idle_router: RouterCluster, target: str) -> None:
    with socket.create_connection(("127.0.0.1", idle_router.port)) as client:
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert b" 400 " in client.makefile("rb").readline()
    assert not any("/x" in s.target for i in idle_router.instances for s in i.worker.seen)


def test_questions_with_one_answer_go_to_the_first_instance(router: RouterCluster) -> None:
    for path in ("/v1/models", "/get_model_info", "/model_info"):
        for _ in range(3):
            assert router.get(path).status == 200
        assert len(router.instances[0].worker.requests(path)) == 3


def test_the_less_loaded_instance_is_preferred(router: RouterCluster) -> None:
    busy, idle = router.instances
    busy.set_load(demand=50, running=1)
    until(lambda: router.described(0).get("demand") == 50)
    for _ in range(5):
        router.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert len(idle.worker.requests("/v1/completions")) == 5


def test_requests_under_way_count_before_they_are_reported(router: RouterCluster) -> None:
    connections = [
        router.open("POST", "/generate", {"text": "x", "stream": True}) for _ in range(8)
    ]
    until(lambda: sum(i.worker.streams for i in router.instances) == 8)
    assert [i.worker.streams for i in router.instances] == [4, 4]
    for connection in connections:
        connection.close()
    until(lambda: sum(i.worker.left for i in router.instances) == 8)
