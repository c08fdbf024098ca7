"""Which web pages may call, and with which keys requests go to work."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kunserve_sglang.api.calls import CALLS, Access
from kunserve_sglang.core.routes import SERVER_ROUTES, Handling
from tests.support.router_harness import RouterCluster
from tests.unit.router.test_calls import path_of

Start = Callable[..., RouterCluster]

CHANGES = [(c.method, path_of(c)) for c in CALLS if c.access is Access.CHANGE]
CHANGES += [(m, r.path) for r in SERVER_ROUTES if r.handling is Handling.TO_ALL for m in r.methods]
INFERENCE = [
    (m, r.path)
    for r in SERVER_ROUTES
    if r.handling is Handling.FORWARD and "{" not in r.path
    for m in r.methods
]
EVIL = "http://evil.example:30000"
FOREIGN = [
    {"Origin": EVIL},
    {"Origin": "null"},
    {"Origin": EVIL, "Host": "evil.example:30000"},  # its name points to us
    {"Origin": "http://localhost.evil.example"},
]


@pytest.mark.parametrize(
    "page",
    [
        *FOREIGN,
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"User-Agent": "Mozilla/5.0 (X11)"},
    ],
)
def test_a_foreign_page_changes_nothing(idle_router: RouterCluster, page: dict[str, str]) -> None:
    for method, path in CHANGES:
        answer = idle_router.call(method, path, None if method == "GET" else {}, page)
        assert (answer.status, answer.error["code"]) == (403, "foreign_site"), (method, path)
    assert not any(i.worker.requests("/flush_cache") for i in idle_router.instances)


READING = [(c.method, path_of(c)) for c in CALLS if c.access is not Access.CHANGE]
READING += [("GET", path) for path in ("/metrics", "/dashboard", "/server_info", "/v1/models")]


def test_a_page_whose_name_points_here_reads_nothing(idle_router: RouterCluster) -> None:
    page = {"Host": "evil.example:30000", "User-Agent": "Mozilla/5.0 (X11)"}
    for method, path in READING:
        answer = idle_router.call(method, path, None if method == "GET" else {}, page)
        assert (answer.status, answer.error["code"]) == (403, "foreign_site"), (method, path)


@pytest.mark.parametrize(
    "caller",
    [
        {"Host": "evil.example", "User-Agent": "Prometheus/3"},
        {"Host": "10.0.0.1:1", "User-Agent": "Mozilla/5.0"},
        {"Host": "localhost", "User-Agent": "Mozilla/5.0"},
    ],
)
def test_everybody_else_may_look(idle_router: RouterCluster, caller: dict[str, str]) -> None:
    for method, path in READING:
        if method == "GET":
            assert idle_router.call(method, path, None, caller).status != 403, (method, path)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_form_can_send_changes_nothing(idle_router: RouterCluster, kind: str) -> None:
    for method, path in CHANGES:
        if method not in ("GET", "DELETE"):
            answer = idle_router.call(method, path, {}, {"Content-Type": kind})
            assert (answer.status, answer.error["field"]) == (415, "Content-Type"), (method, path)


@pytest.mark.parametrize(
    "caller",
    [
        {},
        {"Host": "localhost:30000"},
        {"Host": "[::1]"},
        {"Content-Type": "application/json; charset=utf-8"},
        {"User-Agent": "curl/8.0"},
        {"Sec-Fetch-Site": "none"},
        {"Host": "localhost:7", "Origin": "http://localhost:7", "Sec-Fetch-Site": "same-origin"},
    ],
)
def test_users_and_the_dashboard_may_change(start_router: Start, caller: dict[str, str]) -> None:
    router = start_router(1)
    assert router.put("/kunserve/policy", {"auto": False}, **caller).status == 200


@pytest.mark.parametrize("page", FOREIGN)
def test_a_foreign_page_gets_no_inference(idle_router: RouterCluster, page: dict[str, str]) -> None:
    for method, path in INFERENCE:
        answer = idle_router.call(method, path, None, page)
        assert answer.status == 403, (method, path)
    assert idle_router.call("OPTIONS", "/generate", None, page).status == 403


def test_local_pages_and_programs_get_inference(idle_router: RouterCluster) -> None:
    for caller in (
        {"Origin": "http://localhost:5173"},
        {"Origin": "http://127.0.0.1:8080"},
        {"Host": "kunserve.default.svc"},
        {"User-Agent": "Mozilla/5.0 (X11)"},
    ):
        assert idle_router.post("/v1/completions", {}, **caller).status == 200


def test_trusted_hosts_may_call(start_router: Start) -> None:
    router = start_router(1, trusted_hosts="UI.example")
    page = {"Origin": "https://ui.example", "Sec-Fetch-Site": "cross-site"}
    for headers in (page, {"Host": "ui.example:80"}):
        assert router.post("/v1/completions", {}, **headers).status == 200
        assert router.put("/kunserve/policy", {"auto": False}, **headers).status == 200
    assert router.post("/v1/completions", {}, Origin=EVIL).status == 403
    everybody = start_router(1, trusted_hosts="*")
    assert everybody.put("/kunserve/policy", {"auto": False}, Origin=EVIL).status == 200
    assert everybody.post("/v1/completions", {}, Origin=EVIL).status == 200


def test_who_has_the_key_may_call_from_anywhere(start_router: Start) -> None:
    router = start_router(1, api_key="k")
    page = {"Origin": EVIL, "Host": "evil.example", "Authorization": "Bearer k"}
    assert router.put("/kunserve/policy", {"auto": False}, **page).status == 200
    assert router.post("/v1/completions", {}, **page).status == 200


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer x", "Bearer kk", "Basic k", "Bearer k, k"])
def test_without_the_key_nothing_is_done(start_router: Start, given: str) -> None:
    router = start_router(1, api_key="k")
    for method, path in INFERENCE:
        answer = router.call(method, path, None, {"Authorization": given})
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer"), path
    assert not any(router.instances[0].worker.requests(path) for _, path in INFERENCE)
    assert router.call("OPTIONS", "/v1/completions").status == 200


def test_without_the_key_nobody_queues(start_router: Start) -> None:
    router = start_router(1, api_key="k", max_in_flight=1, max_queued=5)
    key = {"Authorization": "Bearer k"}
    first = router.open("POST", "/generate", {}, key)
    try:
        for _ in range(10):
            refused = router.post("/generate", {}, **{"X-KunServe-Priority": "10"})
            assert refused.status == 401
        assert router.status()["queue"]["requests"] == 0
    finally:
        first.close()
