"""What the router holds back while instances are busy, and what it says to those it turns away."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.router.proxy.busy import QUEUE_FULL
from kunserve_sglang.testing.mock_member import CAPACITY
from tests.support.mock_worker import Canned
from tests.support.router_harness import Answer, RouterCluster
from tests.support.waiting import until
from tests.unit.router.test_metrics import scrape, value

Start = Callable[..., RouterCluster]

REFUSAL = {"message": "The request queue is full."}


def queued(router: RouterCluster) -> int:
    number: int = router.status()["queue"]["requests"]
    return number


class Waiting:
    """Requests that wait in the router, each begun once the one before is in the queue."""

    def __init__(self, router: RouterCluster) -> None:
        self._router = router
        self._open: list[http.client.HTTPConnection] = []

    def add(self, name: str, priority: int | None = None) -> http.client.HTTPConnection:
        before = queued(self._router)
        connection = self.begin(name, priority)
        until(lambda: queued(self._router) == before + 1)
        return connection

    def begin(self, name: str, priority: int | None = None) -> http.client.HTTPConnection:
        headers = {} if priority is None else {"X-KunServe-Priority": str(priority)}
        connection = self._router.open("POST", "/generate", {"text": name}, headers)
        self._open.append(connection)
        return connection

    def close(self) -> None:
        for connection in self._open:
            connection.close()


@contextmanager
def busy(router: RouterCluster) -> Iterator[Waiting]:
    """Every instance has a stream under way, which is all it may have."""
    waiting = Waiting(router)
    for count in range(1, len(router.instances) + 1):
        waiting.begin("first")
        until(lambda count=count: sum(i.worker.streams for i in router.instances) == count)
    assert queued(router) == 0
    yield waiting
    waiting.close()


def answer_to(connection: http.client.HTTPConnection) -> Answer:
    response = connection.getresponse()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def assert_turned_away(answer: Answer, status: int, code: str) -> None:
    assert (answer.status, answer.error["code"]) == (status, code)
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def names(router: RouterCluster) -> list[str]:
    """In the order in which the only instance got them."""
    (instance,) = router.instances
    return [s.body.decode().split('"')[3] for s in instance.worker.requests("/generate")]


def test_requests_are_let_in_by_priority_and_one_at_a_time(start_router: Start) -> None:
    router = start_router(1, max_in_flight=1)
    worker = router.instances[0].worker
    with busy(router) as waiting:
        for name, priority in (("a", None), ("low", -1), ("high", 10), ("b", 0), ("high too", 10)):
            waiting.add(name, priority)
        for left in (4, 3, 2, 1, 0):
            worker.finish()
            until(lambda left=left: queued(router) == left)
            until(lambda: worker.streams == 1)
        assert names(router) == ["first", "high", "high too", "a", "b", "low"]
        worker.finish()
    samples = scrape(router)
    assert value(samples, "kunserve:queued_requests") == 0
    assert value(samples, "kunserve:queue_wait_seconds_count") == 5


def test_a_place_at_any_instance_is_taken(start_router: Start) -> None:
    router = start_router(2, max_in_flight=1)
    with busy(router) as waiting:
        for name in ("a", "b", "c"):
            waiting.add(name)
        free = router.instances[1].worker
        free.finish()
        until(lambda: len(free.requests("/generate")) == 2)
        assert queued(router) == 2
        assert [i.worker.streams for i in router.instances] == [1, 1]


def test_a_full_queue_turns_away_the_lowest_and_youngest(start_router: Start) -> None:
    router = start_router(1, max_in_flight=1, max_queued=2)
    with busy(router) as waiting:
        waiting.add("old")
        young = waiting.add("young")
        assert_turned_away(answer_to(waiting.begin("more")), 429, "queue_full")
        higher = waiting.begin("higher", 1)
        assert_turned_away(answer_to(young), 429, "queue_displaced")
        assert queued(router) == 2
        samples = scrape(router)
        assert value(samples, "kunserve:queued_requests") == 2
        shed = "kunserve:shed_requests_total"
        assert value(samples, shed, reason="full") == 1
        assert value(samples, shed, reason="displaced") == 1
        assert value(samples, shed, reason="timeout") == 0
        router.instances[0].worker.finish()
        until(lambda: names(router)[-1] == "higher")
        higher.close()


def test_without_a_queue_requests_are_turned_away_at_once(start_router: Start) -> None:
    router = start_router(1, max_in_flight=1, max_queued=0)
    with busy(router) as waiting:
        assert_turned_away(answer_to(waiting.begin("a", 10)), 429, "queue_full")


def test_nobody_is_held_for_longer_than_was_said(start_router: Start) -> None:
    router = start_router(1, max_in_flight=1, queue_timeout_s=0.05)
    with busy(router) as waiting:
        assert_turned_away(answer_to(waiting.begin("a")), 503, "queue_timeout")
        assert queued(router) == 0
        assert value(scrape(router), "kunserve:shed_requests_total", reason="timeout") == 1


def test_a_client_that_leaves_is_gone_from_the_queue(start_router: Start) -> None:
    router = start_router(1, max_in_flight=1)
    worker = router.instances[0].worker
    with busy(router) as waiting:
        leaver = waiting.add("leaver")
        waiting.add("stays")
        leaver.close()
        until(lambda: queued(router) == 1)
        worker.finish()
        until(lambda: names(router) == ["first", "stays"])
    until(lambda: value(scrape(router), "kunserve:requests_total", code="499") >= 1)
    assert not sum(value(scrape(router), "kunserve:shed_requests_total", reason=r) for r in
                   ("full", "displaced", "timeout", "stopping"))  # fmt: skip


def test_a_router_that_stops_sends_those_who_wait_away(start_router: Start) -> None:
    router = start_router(1, max_in_flight=1)
    with busy(router) as waiting:
        held = [waiting.add("a"), waiting.add("b")]
        router.stop_router()
        for connection in held:
            assert_turned_away(answer_to(connection), 503, "router_stopping")
    assert len(router.instances[0].worker.requests("/generate")) == 1


@pytest.mark.parametrize("given", ["11", "-11", "", "high", "1.0", "0x1", "1, 2", "--1", "\xb2"])
def test_a_priority_that_is_none_is_refused(idle_router: RouterCluster, given: str) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions")):
        headers = {"X-KunServe-Priority": given.encode("latin-1")}
        answer = idle_router.call(method, path, None, headers)
        assert (answer.status, answer.error["code"]) == (400, "bad_priority")
        assert answer.error["field"] == "X-KunServe-Priority"
        assert "X-KunServe-Priority" in answer.error["message"]
    assert not any(i.worker.requests("/v1/completions") for i in idle_router.instances)


@pytest.mark.parametrize("given", ["10", "-10", "0", "+3", " 3 "])
def test_priorities_are_whole_numbers(idle_router: RouterCluster, given: str) -> None:
    assert idle_router.post("/v1/embeddings", {}, **{"X-KunServe-Priority": given}).status == 200


def test_questions_do_not_wait(start_router: Start) -> None:
    router = start_router(1, max_in_flight=1)
    with busy(router) as waiting:
        waiting.add("a")
        assert router.get("/v1/models").status == 200


def test_as_many_wait_at_an_instance_as_run_there(
    start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a limit given; what an instance reports decides, with no answer having ended."""
    router = start_router(1)
    monkeypatch.setattr("kunserve_sglang.policy.queueing.READY_REQUESTS", 1)
    with busy(router) as waiting:
        waiting.add("a")
        waiting.add("b")
        router.instances[0].set_load(10, running=1)
        until(lambda: queued(router) == 1)
        until(lambda: router.instances[0].worker.streams == 2)


def test_what_is_held_counts_as_demand(start_router: Start) -> None:
    """The instances alone would fit; with those held back their slots do not suffice."""
    router = start_router(2, max_in_flight=1)
    with busy(router) as waiting:
        for instance in router.instances:
            instance.set_load(CAPACITY // 2, running=1, waiting=1)
        until(lambda: all(d["waiting"] == 1 for d in router.status()["instances"]))
        for number in range(8):
            waiting.add(str(number))
        inputs = router.post("/kunserve/plan").json["decision"]["inputs"]
        assert inputs["waiting"] == 2 + 8
        assert inputs["demand"] == 3 * 2 * (CAPACITY // 2)
        assert router.described(0)["demand"] == CAPACITY // 2
        router.put("/kunserve/policy", {"auto": True, "drop_hold_s": 0})
        until(lambda: router.event() is not None)
        assert (router.event()["kind"], router.event()["status"]) == ("drop", "committed")
        assert "10 requests wait" in router.event()["reason"]


def test_sglang_still_says_so_when_its_queue_is_full() -> None:
    found = find_spec("sglang")
    assert found is not None
    assert found.origin is not None
    scheduler = Path(found.origin).parent / "srt" / "managers" / "scheduler.py"
    said = scheduler.read_bytes()
    assert all(b'message = "' + message + b'"' in said for message in QUEUE_FULL)


@pytest.mark.parametrize("message", [message.decode() for message in QUEUE_FULL])
def test_what_sglang_has_not_run_goes_to_the_other_instance(
    router: RouterCluster, message: str
) -> None:
    full, idle = router.instances
    idle.set_load(demand=1000)
    until(lambda: router.described(1)["demand"] == 1000)
    full.worker.answers["/v1/completions"] = Canned({"message": message}, 503)
    answer = router.post("/v1/completions", {"prompt": "x"})
    assert (answer.status, answer.json["worker"]) == (200, int(idle.worker.url.split(":")[-1]))
    assert len(full.worker.requests("/v1/completions")) == 1
    assert "lost" not in router.described(0)


def test_when_all_refuse_the_refusal_is_passed_on(router: RouterCluster) -> None:
    for instance in router.instances:
        instance.worker.answers["/v1/completions"] = Canned(REFUSAL, 503, {"X-Answer": "7"})
    answer = router.post("/v1/completions", {"prompt": "x"})
    assert (answer.status, answer.json) == (503, REFUSAL)
    assert answer.headers["x-answer"] == "7"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert [len(i.worker.requests("/v1/completions")) for i in router.instances] == [1, 1]
    assert not any("lost" in d for d in router.status()["instances"])


@pytest.mark.parametrize("status", [429, 503])
def test_what_may_have_been_run_is_not_sent_again(router: RouterCluster, status: int) -> None:
    for instance in router.instances:
        instance.worker.answers["/generate"] = Canned({"message": "aborted"}, status)
    answer = router.post("/generate", {"text": "x"})
    assert (answer.status, answer.json) == (status, {"message": "aborted"})
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert sum(len(i.worker.requests("/generate")) for i in router.instances) == 1


@pytest.mark.parametrize(
    ("flag", "nonsense"),
    [("max_in_flight", 0), ("max_queued", -1), ("queue_timeout_s", 0), ("queue_timeout_s", 1e9)],
)
def test_limits_that_make_no_sense_are_refused(flag: str, nonsense: Any) -> None:
    with pytest.raises(ConfigurationError, match="--" + flag.replace("_", "-")):
        ClusterConfig(**{flag: nonsense})
