"""The list of routes against the routes that SGLang has, and its guard against its own."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.core.routes import SERVER_ROUTES, Handling, ServerRoute
from kunserve_sglang.sglang_seam.access import guard_admin_calls

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

API, ADMIN = {"Authorization": "Bearer api"}, {"Authorization": "Bearer admin"}


def flat(routes: Iterable[Any]) -> Iterator[Any]:
    """Those of included routers as well, which FastAPI keeps as branches."""
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is None:
            yield route
        else:
            assert not route.include_context.prefix
            yield from flat(included.routes)


@pytest.fixture(scope="module")
def served() -> dict[str, set[str]]:
    """The methods of every path that SGLang serves; a WebSocket begins with GET."""
    from sglang.srt.entrypoints.http_server import app

    methods: dict[str, set[str]] = defaultdict(set)
    for route in flat(app.routes):
        methods[route.path] |= set(getattr(route, "methods", None) or {"GET"})
    assert len(methods) > 50
    return methods


def test_every_route_of_sglang_is_on_the_list(served: dict[str, set[str]]) -> None:
    listed = {route.path: set(route.methods) for route in SERVER_ROUTES}
    missing = {p: m - listed.get(p, set()) for p, m in served.items() if m - listed.get(p, set())}
    assert not missing


def test_everything_on_the_list_is_a_route_of_sglang(served: dict[str, set[str]]) -> None:
    invented = {r.path: r.methods for r in SERVER_ROUTES if set(r.methods) - served[r.path]}
    assert not invented


def test_what_sglang_wants_a_key_for_is_not_open() -> None:
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import AuthLevel

    handling = {route.path: route.handling for route in SERVER_ROUTES}
    marked = [
        route.path
        for route in flat(app.routes)
        if getattr(route.endpoint, "_auth_level", AuthLevel.NORMAL) is not AuthLevel.NORMAL
    ]
    assert "/flush_cache" in marked
    assert not [path for path in marked if handling[path].open]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> ASGIApp:
    """SGLang's middleware, guarded by our list, before an application that says yes to all."""
    from fastapi import FastAPI, Response
    from sglang.srt.utils import auth

    name = "_get_auth_level_from_app_and_scope"
    monkeypatch.setattr(auth, name, getattr(auth, name))
    guard_admin_calls()
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    methods = ["GET", "POST", "PUT", "DELETE", "HEAD"]
    app.add_api_route("/{path:path}", lambda: Response(), methods=methods)
    auth.add_api_key_middleware(app, api_key="api", admin_api_key="admin")
    return app


def status(app: ASGIApp, method: str, path: str, key: str = "", root: str = "") -> int:
    """Of the answer to a request with this key; `path` is decoded, as a server hands it on."""
    statuses = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {
        "type": "http",
        "method": method,
        "path": root + path,
        "root_path": root,
        "query_string": b"",
        "headers": headers,
    }
    asyncio.run(app(scope, receive, send))
    (only,) = statuses
    return int(only)


CALLS = [(route, method) for route in SERVER_ROUTES for method in route.methods]


@pytest.mark.parametrize(("route", "method"), CALLS, ids=lambda part: getattr(part, "path", part))
def test_an_instance_asks_for_the_key_that_the_list_says(
    guarded: ASGIApp, route: ServerRoute, method: str
) -> None:
    path = route.path.replace("{model:path}", "org/name").replace("{response_id}", "resp_1")
    statuses = [status(guarded, method, path, key) for key in ("", "api", "admin")]
    if path.startswith("/health"):
        assert statuses == [200, 200, 200]
    elif route.handling in (Handling.FORWARD, Handling.ANSWER):
        assert statuses == [401, 200, 401]
    else:
        assert statuses == [401, 401, 200]


@pytest.mark.parametrize("path", ["/nothing", "/flush_cache/", "/dumper/x", "//", "/x//generate"])
def test_what_is_not_on_the_list_needs_the_admin_key(guarded: ASGIApp, path: str) -> None:
    assert status(guarded, "POST", path, "api") == 401
    assert status(guarded, "POST", path, "admin") == 200


def test_a_server_may_stand_below_a_prefix(guarded: ASGIApp) -> None:
    assert status(guarded, "POST", "/generate", "api", root="/prefix") == 200
    assert status(guarded, "POST", "/flush_cache", "api", root="/prefix") == 401
    assert status(guarded, "POST", "/prefix/generate", "api") == 401


def test_no_guard_is_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.utils import auth

    monkeypatch.delattr(auth, "_get_auth_level_from_app_and_scope")
    with pytest.raises(InternalError, match="_get_auth_level_from_app_and_scope"):
        guard_admin_calls()
