"""Tenants at the router: whose key opens what, whose turn it is, and what each may have."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.launch.options import LaunchOptions
from kunserve_sglang.launch.server import Supervisor
from tests.support.mock_worker import Canned, MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until
from tests.unit.router.test_metrics import scrape, value
from tests.unit.router.test_request_queue import answer_to, assert_turned_away, names, queued

Start = Callable[..., RouterCluster]

API, ADMIN = {"Authorization": "Bearer s3cret-api"}, {"Authorization": "Bearer s3cret-admin"}
A, B = {"Authorization": "Bearer s3cret-of-a"}, {"Authorization": "Bearer s3cret-of-b"}
FILE = """
[[tenants]]
name = "a"
key = "s3cret-of-a"
{a}
[[tenants]]
name = "b"
key = "s3cret-of-b"
{b}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tenants.toml"


@pytest.fixture
def start(start_router: Start, file: Path) -> Start:
    """A router with the tenants `a` and `b`, and further lines about each."""

    def started(count: int, a: str = "", b: str = "", **config: Any) -> RouterCluster:
        file.write_text(FILE.format(a=a, b=b))
        return start_router(count, tenants=str(file), **config)

    return started


def described(router: RouterCluster, name: str) -> dict[str, Any]:
    listed = router.get("/kunserve/tenants", **ADMIN).json["tenants"]
    found: dict[str, Any] = next(t for t in listed if t["name"] == name)
    return found


class Streams:
    """Requests of tenants, each begun once the one before is where it should be."""

    def __init__(self, router: RouterCluster) -> None:
        self._router = router
        self._open: list[http.client.HTTPConnection] = []

    def begin(self, who: dict[str, str], name: str, **fields: Any) -> http.client.HTTPConnection:
        body = {"text": name, "stream": True, **fields}
        self._open.append(self._router.open("POST", "/generate", body, who))
        return self._open[-1]

    def run(self, who: dict[str, str], name: str, **fields: Any) -> http.client.HTTPConnection:
        """One that goes to an instance at once."""
        before = self._running()
        connection = self.begin(who, name, **fields)
        until(lambda: self._running() == before + 1)
        return connection

    def wait(self, who: dict[str, str], name: str, **fields: Any) -> http.client.HTTPConnection:
        """One that has to wait."""
        before = queued(self._router)
        connection = self.begin(who, name, **fields)
        until(lambda: queued(self._router) == before + 1)
        return connection

    def _running(self) -> int:
        return sum(i.worker.streams for i in self._router.instances)

    def close(self) -> None:
        for connection in self._open:
            connection.close()


@contextmanager
def streams(router: RouterCluster) -> Iterator[Streams]:
    begun = Streams(router)
    yield begun
    begun.close()


def finish(router: RouterCluster) -> None:
    """The only instance ends one of its streams, and gets the next one."""
    (instance,) = router.instances
    got = len(instance.worker.requests("/generate"))
    instance.worker.finish()
    until(lambda: len(instance.worker.requests("/generate")) == got + 1)


# --- keys ---------------------------------------------------------------------------------------


def test_a_tenants_key_opens_inference_and_nothing_else(start: Start) -> None:
    router = start(1, api_key="s3cret-api", admin_api_key="s3cret-admin")
    for who in (API, A, B):
        assert router.get("/v1/models", **who).status == 200
    for wrong in ("", "Bearer s3cret-admin", "Bearer s3cret-of-", "s3cret-of-a"):
        answer = router.get("/v1/models", Authorization=wrong)
        assert (answer.status, answer.error["code"]) == (401, "api_key_required")
    assert router.post("/kunserve/drop", {}, **A).error["code"] == "admin_key_required"
    assert router.post("/kunserve/tenants/reload", **A).error["code"] == "admin_key_required"
    assert router.post("/flush_cache", **A).error["code"] == "admin_key_required"


def test_instances_see_the_clusters_key_in_place_of_a_tenants(
    start: Start, plain: MockWorker
) -> None:
    router = start(1, api_key="s3cret-api", admin_api_key="s3cret-admin")
    worker = router.instances[0].worker
    for path in ("/v1/models", "/v1/responses/r1", "/server_info"):
        worker.answers[path] = Canned({})
        for who in (A, API):
            assert router.get(path, **who).status == 200
        got = [s.headers.get("authorization") for s in worker.requests(path)]
        assert got == ["Bearer s3cret-api"] * 2
    body = {"url": plain.url, "api_key": "its own"}
    assert router.post("/workers", {**body, "api_key": "its-own"}, **ADMIN).status == 201
    router.instances[0].reporting = False
    until(lambda: router.get("/workers", **ADMIN).json["stats"]["healthy"] == 2)
    for _ in range(4):
        router.post("/v1/completions", {"prompt": "x"}, **A)
    shown = {s.headers.get("authorization") for s in plain.requests("/v1/completions")}
    assert shown == {"Bearer its-own"}


def test_without_a_key_of_the_cluster_a_tenants_key_goes_nowhere(start: Start) -> None:
    router = start(1)
    for who in (A, {}):
        assert router.get("/v1/models", **who).status == 200
    worker = router.instances[0].worker
    assert ["authorization" in s.headers for s in worker.requests("/v1/models")] == [False, False]
    router.get("/v1/models", Authorization="Bearer for-the-server")
    assert worker.requests("/v1/models")[-1].headers["authorization"] == "Bearer for-the-server"


def test_a_launcher_says_in_one_line_what_is_wrong_with_the_file(file: Path) -> None:
    from kunserve_sglang.core.cluster_config import ClusterConfig

    file.write_text(FILE.format(a="weight = 0", b=""))
    launcher = Supervisor(ClusterConfig(tenants=str(file), port=0), LaunchOptions(), [])
    with pytest.raises(ConfigurationError, match=f"--tenants {file}: .*weight"):
        launcher._check()
    file.write_text(FILE.format(a="", b=""))
    options = LaunchOptions(api_key="s3cret-of-b")
    with pytest.raises(ConfigurationError, match="a key of b is one of the cluster's own"):
        Supervisor(ClusterConfig(tenants=str(file), port=0), options, [])._check()


# --- whose turn it is ---------------------------------------------------------------------------


def test_a_burst_is_its_own(start: Start) -> None:
    router = start(1, max_in_flight=1)
    with streams(router) as these:
        these.run(A, "a")
        for _ in range(5):
            these.wait(A, "a")
        these.wait(B, "b")
        these.wait({}, "nobody's")
        for _ in range(4):
            finish(router)
        assert names(router)[:4] in (["a", "b", "nobody's", "a"], ["a", "nobody's", "b", "a"])


def test_shares_go_by_weight_and_tokens(start: Start) -> None:
    router = start(1, b="weight = 3", max_in_flight=1)
    size = {"sampling_params": {"max_new_tokens": 500}}
    with streams(router) as these:
        these.run({}, "first")
        for _ in range(8):
            these.wait(A, "a", **size)
            these.wait(B, "b", **size)
        for _ in range(8):
            finish(router)
        assert 5 <= names(router)[1:].count("b") <= 7


def test_priorities_are_among_ones_own(start: Start) -> None:
    router = start(1, max_in_flight=1)
    with streams(router) as these:
        these.run(A, "first")
        these.wait(A, "a low")
        these.wait({**A, "X-KunServe-Priority": "10"}, "a high")
        these.wait(B, "b")
        for _ in range(3):
            finish(router)
        order = names(router)
        assert order.index("a high") < order.index("a low")
        assert order.index("b") < order.index("a low")


def test_an_instance_gets_few_more_than_it_runs(start: Start) -> None:
    """Without a limit: the others wait here, and who has little passes them."""
    router = start(1)
    (instance,) = router.instances
    with streams(router) as these:
        these.run(A, "a")
        these.run(A, "a")
        these.wait(A, "a")
        these.run(B, "b")
        instance.set_load(demand=4, used=4, running=3)
        until(lambda: names(router) == ["a", "a", "b", "a"])


def test_an_eighth_of_the_slots_is_kept_free(start: Start) -> None:
    router = start(1)
    (instance,) = router.instances
    with streams(router) as these:
        these.run(A, "a")
        slots = router.described(0)["slots"]["capacity"]
        instance.set_load(demand=slots, used=slots, running=1)
        until(lambda: router.described(0)["running"] == 1)
        these.wait(A, "a")
        these.run(B, "b")
        instance.set_load(demand=slots // 2, used=slots // 2, running=2)
        until(lambda: queued(router) == 0)


def test_an_instance_that_has_not_reported_gets_few_as_well(start: Start) -> None:
    router = start(0, expect=1)
    router.instances.append(router.add(0, reporting=False))
    until(lambda: [d["serving"] for d in router.status()["instances"]] == [True])
    with streams(router) as these:
        these.run(A, "a")
        these.run(A, "a")
        these.wait(A, "a")


def test_a_request_goes_where_its_tokens_have_room(start: Start) -> None:
    router = start(2)
    slots = router.described(0)["slots"]["capacity"]
    full, other = router.instances
    full.set_load(demand=slots - 20, used=slots - 20, running=1)
    other.set_load(demand=slots // 2, used=slots // 2, running=9)
    until(lambda: [d.get("running") for d in router.status()["instances"]] == [1, 9])
    with streams(router) as these:
        these.run(B, "b", sampling_params={"max_new_tokens": 50})
        assert (full.worker.streams, other.worker.streams) == (0, 1)
        these.run(B, "b", sampling_params={"max_new_tokens": 10**6})


# --- limits -------------------------------------------------------------------------------------


def test_what_is_above_a_limit_waits_and_then_is_turned_away(start: Start) -> None:
    router = start(1, a="max_requests = 1\nmax_queued = 1", max_in_flight=100)
    with streams(router) as these:
        these.run(A, "a1")
        these.wait(A, "a2")
        assert_turned_away(answer_to(these.begin(A, "a3")), 429, "tenant_queue_full")
        for _ in range(3):
            these.run(B, "b")
        before = len(names(router))
        router.instances[0].worker.finish()
        until(lambda: len(names(router)) == before + 1)
        assert names(router)[-1] == "a2"
    until(lambda: described(router, "a")["in_flight"] == described(router, "b")["in_flight"] == 0)
    assert described(router, "a")["rejected"] == 1
    assert value(scrape(router), "kunserve:tenant_rejected_total", tenant="a", reason="tenant") == 1
    assert value(scrape(router), "kunserve:shed_requests_total", reason="tenant") == 1


def test_tokens_are_limited_by_what_is_asked_for(start: Start) -> None:
    router = start(1, a="max_tokens = 300", max_in_flight=100)
    with streams(router) as these:
        these.run(A, "a1", sampling_params={"max_new_tokens": 200})
        these.wait(A, "a2", sampling_params={"max_new_tokens": 200})
        these.run(B, "b", sampling_params={"max_new_tokens": 10**6})
        assert 200 <= described(router, "a")["in_flight_tokens"] <= 300


def test_the_queue_of_all_is_not_filled_by_one(start: Start) -> None:
    router = start(1, max_in_flight=1, max_queued=2)
    with streams(router) as these:
        these.run(A, "first")
        these.wait(A, "old")
        young = these.wait(A, "young")
        assert_turned_away(answer_to(these.begin(A, "more")), 429, "queue_full")
        these.begin(B, "b")
        assert_turned_away(answer_to(young), 429, "queue_displaced")
        assert (described(router, "a")["queued"], described(router, "b")["queued"]) == (1, 1)


def test_who_asks_something_never_waits(start: Start) -> None:
    router = start(1, a="max_requests = 1\nmax_queued = 0")
    with streams(router) as these:
        these.run(A, "a")
        assert router.get("/v1/models", **A).status == 200


# --- counts -------------------------------------------------------------------------------------


def test_tokens_are_counted_as_they_were_made(start: Start) -> None:
    router = start(1)
    worker = router.instances[0].worker
    worker.journals = False
    with streams(router) as these:
        connection = these.run(A, "x" * 400, sampling_params={"max_new_tokens": 5000})
        expected = described(router, "a")["in_flight_tokens"]
        response = connection.getresponse()
        for _ in range(7):
            worker.emit(b"data: {}\n\n")
            assert response.readline() + response.readline() == b"data: {}\n\n"
        worker.finish()
        assert response.read() == b""
        until(lambda: described(router, "a")["requests"] == 1)
        assert described(router, "a")["tokens"] == expected - 5000 + 7
    usage = {"usage": {"completion_tokens": 30, "prompt_tokens": 5}}
    worker.answers["/v1/completions"] = Canned(usage)
    before = described(router, "b")["tokens"]
    router.post("/v1/completions", {"prompt": "y" * 400, "max_tokens": 50}, **B)
    took = described(router, "b")["tokens"] - before
    assert 130 <= took <= 150
    worker.answers["/v1/completions"] = Canned({"error": "no"}, 400)
    router.post("/v1/completions", {"prompt": "y" * 400, "max_tokens": 50}, **B)
    assert described(router, "b") == {**described(router, "b"), "tokens": took, "requests": 2}


def test_whoever_leaves_leaves_nothing(start: Start) -> None:
    router = start(1, max_in_flight=1)
    with streams(router) as these:
        running = these.run(A, "a")
        waiting = these.wait(B, "b")
        assert described(router, "b")["queued"] == 1
        waiting.close()
        until(lambda: described(router, "b")["queued"] == 0)
        running.close()
    until(lambda: described(router, "a")["in_flight"] == 0)
    for name in ("a", "b"):
        now = described(router, name)
        assert (now["in_flight"], now["in_flight_tokens"], now["queued"]) == (0, 0, 0)
    samples = scrape(router)
    assert value(samples, "kunserve:tenant_in_flight_requests", tenant="a") == 0
    assert value(samples, "kunserve:tenant_requests_total", tenant="a") == 1


def test_nobody_is_held_for_longer_than_was_said_here_either(start: Start) -> None:
    router = start(1, max_in_flight=1, queue_timeout_s=0.05)
    with streams(router) as these:
        these.run(A, "a")
        assert_turned_away(answer_to(these.begin(B, "b")), 503, "queue_timeout")
        assert described(router, "b")["queued"] == 0


def test_a_router_that_stops_tells_those_who_wait(start: Start) -> None:
    router = start(1, max_in_flight=1)
    with streams(router) as these:
        these.run(A, "a")
        waiting = these.wait(B, "b")
        router.stop_router()
        assert_turned_away(answer_to(waiting), 503, "router_stopping")
        router.start_router()


def test_keys_are_nowhere_to_be_seen(start: Start) -> None:
    router = start(1, admin_api_key="s3cret-admin")
    router.get("/v1/models", **A)
    listed = router.get("/kunserve/tenants").body + router.get("/metrics").body
    assert b'"name":"a"' in listed
    assert b"s3cret" not in listed


def test_without_a_file_there_are_no_tenants(start_router: Start) -> None:
    router = start_router(1)
    assert router.get("/kunserve/tenants").json == {"tenants": []}
    assert router.post("/kunserve/tenants/reload").json == {"tenants": []}
    assert b"kunserve:tenant" not in router.get("/metrics").body


# --- the file again -----------------------------------------------------------------------------


def test_the_file_can_be_read_again(start: Start, file: Path) -> None:
    router = start(1, api_key="s3cret-api", admin_api_key="s3cret-admin", max_in_flight=1)
    with streams(router) as these:
        these.run(A, "first")
        these.wait(B, "b")
        new = FILE.format(a="weight = 7", b="").replace("s3cret-of-b", "s3cret-of-c")
        file.write_text(new.replace('"b"', '"c"'))
        answer = router.post("/kunserve/tenants/reload", **ADMIN)
        assert [t["name"] for t in answer.json["tenants"]] == ["default", "a", "c"]
        assert described(router, "a")["weight"] == 7
        assert described(router, "a")["in_flight"] == 1
        assert router.get("/v1/models", **B).status == 401
        assert router.get("/v1/models", Authorization="Bearer s3cret-of-c").status == 200
        finish(router)
        assert names(router) == ["first", "b"], "what had come before ends"


def test_a_file_that_cannot_be_read_changes_nothing(start: Start, file: Path) -> None:
    router = start(1, api_key="s3cret-api", admin_api_key="s3cret-admin")
    file.write_text("[[tenants]]\nname = 'a'\nkey = 's3cret-api'")
    answer = router.post("/kunserve/tenants/reload", **ADMIN)
    assert (answer.status, answer.error["code"]) == (409, "tenants_unreadable")
    assert "s3cret" not in answer.error["message"]
    assert router.get("/v1/models", **B).status == 200


def test_the_next_router_reads_it_too(start: Start, file: Path) -> None:
    router = start(1, api_key="s3cret-api", admin_api_key="s3cret-admin")
    router.stop_router()
    file.write_text(FILE.format(a="max_requests = 3", b=""))
    router.start_router()
    until(lambda: router.get("/v1/models", **A).status == 200)
    assert described(router, "a")["max_requests"] == 3
