"""Keys of plain servers: whose each is, and who may see it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kunserve_sglang.core.hosts import is_private
from tests.support.mock_worker import MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]


def test_a_worker_with_a_key_of_its_own_sees_no_other(
    start_router: Start, plain: MockWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kunserve.audit")
    router = start_router(1, api_key="cluster", read_api_key="look")
    router.reader = {"Authorization": "Bearer look"}
    key = {"Authorization": "Bearer cluster"}
    body = {"url": plain.url, "api_key": "theirs"}
    assert router.post("/workers", body, **key).status == 201
    until(lambda: router.get("/readiness").json.get("available") == 2)
    for _ in range(4):
        assert router.post("/v1/completions", {}, **key).status == 200
    for path in ("/server_info", "/v1/loads", "/health_generate", "/metrics"):
        router.get(path, **key)
    assert router.post("/flush_cache", **key).status == 200
    assert {s.headers.get("authorization") for s in plain.seen} == {"Bearer theirs"}
    shown = {s.headers["authorization"] for s in router.instances[0].worker.requests("/health")}
    assert shown == {"Bearer cluster"}
    assert "theirs" not in caplog.text
    assert "theirs" not in router.get("/workers", **router.reader).body.decode()


@pytest.mark.parametrize("bad", ["", "a b", "a\r\nX: 1", "\u00e9"])
def test_what_is_no_key_is_refused(start_router: Start, bad: str) -> None:
    answer = start_router(0).post("/workers", {"url": "http://127.0.0.1:1", "api_key": bad})
    assert (answer.status, answer.error["field"]) == (422, "api_key")


@pytest.mark.parametrize(
    ("given", "key", "shown"),
    [
        ({}, "cluster", ""),  # in clear, to whoever listens
        ({"api_key": "cluster"}, "cluster", "Bearer cluster"),
        ({}, None, "Bearer client"),  # the client's own, which is none of ours
    ],
)
def test_the_key_of_the_cluster_goes_in_clear_only_to_whom_it_is_named_for(
    start_router: Start,
    plain: MockWorker,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    key: str | None,
    shown: str,
) -> None:
    monkeypatch.setattr("kunserve_sglang.router.admin.members.is_private", lambda _url: False)
    router = start_router(0, api_key=key)
    client = {"Authorization": f"Bearer {key or 'client'}"}
    assert router.post("/workers", {"url": plain.url, **given}, **client).status == 201
    until(lambda: router.get("/readiness").status == 200)
    router.post("/v1/completions", {}, **client)
    (seen,) = plain.requests("/v1/completions")
    assert seen.headers.get("authorization", "") == shown
    if not given:
        assert not any("cluster" in repr(s) for s in plain.seen)


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.9.9.9:1", True),
        ("http://[::1]:1", True),
        ("http://localhost:1", True),
        ("https://gpu7:1", True),
        ("http://gpu7:1", False),
        ("http://10.0.0.7:1", False),
        ("http://localhost.example:1", False),
        ("http://[::]:1", False),
    ],
)
def test_where_others_can_read_along(url: str, *, private: bool) -> None:
    assert is_private(url) == private
