"""Tenants at the router: what each may have, what it has had, and their file read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.mock_worker import Canned
from tests.support.router_harness import RouterCluster
from tests.support.tenants import ADMIN, FILE, A, B, described, finish, streams
from tests.support.waiting import until
from tests.unit.router.test_metrics import scrape, value
from tests.unit.router.test_request_queue import answer_to, assert_turned_away, names

Start = Callable[..., RouterCluster]


# --- limits -------------------------------------------------------------------------------------


def test_what_is_above_a_limit_waits_and_then_is_turned_away(start_tenants: Start) -> None:
    router = start_tenants(1, a="max_requests = 1\nmax_queued = 1", max_in_flight=100)
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


def test_tokens_are_limited_by_what_is_asked_for(start_tenants: Start) -> None:
    router = start_tenants(1, a="max_tokens = 300", max_in_flight=100)
    with streams(router) as these:
        these.run(A, "a1", sampling_params={"max_new_tokens": 200})
        these.wait(A, "a2", sampling_params={"max_new_tokens": 200})
        these.run(B, "b", sampling_params={"max_new_tokens": 10**6})
        assert 200 <= described(router, "a")["in_flight_tokens"] <= 300


def test_the_queue_of_all_is_not_filled_by_one(start_tenants: Start) -> None:
    router = start_tenants(1, max_in_flight=1, max_queued=2)
    with streams(router) as these:
        these.run(A, "first")
        these.wait(A, "old")
        young = these.wait(A, "young")
        assert_turned_away(answer_to(these.begin(A, "more")), 429, "queue_full")
        these.begin(B, "b")
        assert_turned_away(answer_to(young), 429, "queue_displaced")
        assert (described(router, "a")["queued"], described(router, "b")["queued"]) == (1, 1)


def test_who_asks_something_never_waits(start_tenants: Start) -> None:
    router = start_tenants(1, a="max_requests = 1\nmax_queued = 0")
    with streams(router) as these:
        these.run(A, "a")
        assert router.get("/v1/models", **A).status == 200


# --- counts -------------------------------------------------------------------------------------


def test_tokens_are_counted_as_they_were_made(start_tenants: Start) -> None:
    router = start_tenants(1)
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


def test_whoever_leaves_leaves_nothing(start_tenants: Start) -> None:
    router = start_tenants(1, max_in_flight=1)
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


def test_nobody_is_held_for_longer_than_was_said_here_either(start_tenants: Start) -> None:
    router = start_tenants(1, max_in_flight=1, queue_timeout_s=0.05)
    with streams(router) as these:
        these.run(A, "a")
        assert_turned_away(answer_to(these.begin(B, "b")), 503, "queue_timeout")
        assert described(router, "b")["queued"] == 0


def test_a_router_that_stops_tells_those_who_wait(start_tenants: Start) -> None:
    router = start_tenants(1, max_in_flight=1)
    with streams(router) as these:
        these.run(A, "a")
        waiting = these.wait(B, "b")
        router.stop_router()
        assert_turned_away(answer_to(waiting), 503, "router_stopping")
        router.start_router()


def test_keys_are_nowhere_to_be_seen(start_tenants: Start) -> None:
    router = start_tenants(1, admin_api_key="s3cret-admin")
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


def test_the_file_can_be_read_again(start_tenants: Start, tenants_file: Path) -> None:
    router = start_tenants(1, api_key="s3cret-api", admin_api_key="s3cret-admin", max_in_flight=1)
    with streams(router) as these:
        these.run(A, "first")
        these.wait(B, "b")
        new = FILE.format(a="weight = 7", b="").replace("s3cret-of-b", "s3cret-of-c")
        tenants_file.write_text(new.replace('"b"', '"c"'))
        answer = router.post("/kunserve/tenants/reload", **ADMIN)
        assert [t["name"] for t in answer.json["tenants"]] == ["default", "a", "c"]
        assert described(router, "a")["weight"] == 7
        assert described(router, "a")["in_flight"] == 1
        assert router.get("/v1/models", **B).status == 401
        assert router.get("/v1/models", Authorization="Bearer s3cret-of-c").status == 200
        finish(router)
        assert names(router) == ["first", "b"], "what had come before ends"


def test_a_file_that_cannot_be_read_changes_nothing(
    start_tenants: Start, tenants_file: Path
) -> None:
    router = start_tenants(1, api_key="s3cret-api", admin_api_key="s3cret-admin")
    tenants_file.write_text("[[tenants]]\nname = 'a'\nkey = 's3cret-api'")
    answer = router.post("/kunserve/tenants/reload", **ADMIN)
    assert (answer.status, answer.error["code"]) == (409, "tenants_unreadable")
    assert "s3cret" not in answer.error["message"]
    assert router.get("/v1/models", **B).status == 200


def test_the_next_router_reads_it_too(start_tenants: Start, tenants_file: Path) -> None:
    router = start_tenants(1, api_key="s3cret-api", admin_api_key="s3cret-admin")
    router.stop_router()
    tenants_file.write_text(FILE.format(a="max_requests = 3", b=""))
    router.start_router()
    until(lambda: router.get("/v1/models", **A).status == 200)
    assert described(router, "a")["max_requests"] == 3
