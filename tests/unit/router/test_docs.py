"""The OpenAPI document says what the router does: all of it, and nothing else."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import jsonschema
import msgspec
import pytest

from kunserve_sglang.api.calls import CALLS
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.control_socket import ControlSocket
from kunserve_sglang.control.upstream import open_session
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.router.admin.access import Keys
from kunserve_sglang.router.admin.openapi import build_document
from kunserve_sglang.router.app import build_app
from kunserve_sglang.router.http.answers import ERROR_TYPES, Code
from kunserve_sglang.router.http.outbound import InstanceConnections
from kunserve_sglang.router.proxy.traffic import Traffic
from kunserve_sglang.router.settings import RouterConfig
from tests.support.mock_instance import MODEL
from tests.support.places import ROOT
from tests.support.router_harness import Answer, RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]

ADMIN = {"Authorization": "Bearer admin"}


def document(**keys: str) -> dict[str, Any]:
    config = RouterConfig(cluster=ClusterConfig(**keys), control_address="c")
    return build_document(CALLS, Keys(config))


def operations(described: dict[str, Any]) -> dict[tuple[str, str], Any]:
    return {
        (method.upper(), path): operation
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    }


class Checker:
    """Calls the router and holds every answer against the document, fields too many included."""

    def __init__(self, router: RouterCluster) -> None:
        self.router = router
        self.checked: set[tuple[str, int]] = set()
        answer = router.get("/kunserve/openapi.json", **ADMIN)
        self.described = answer.json
        self._operations = operations(self.described)
        self._schemas = copy.deepcopy(self.described["components"])
        for schema in self._schemas["schemas"].values():
            if "properties" in schema:
                schema["additionalProperties"] = False

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        answer = self.router.call(method, path, body, headers or ADMIN)
        template = re.sub(r"^/workers/.+", "/workers/{id}", path.split("?")[0])
        operation = self._operations[method, template]
        content = operation["responses"][str(answer.status)]["content"]["application/json"]
        jsonschema.validate(
            answer.json,
            {**content["schema"], "components": self._schemas},
            cls=jsonschema.Draft202012Validator,
        )
        self.checked.add((operation["operationId"], answer.status))
        return answer


def test_every_route_is_described(tmp_path: Path) -> None:
    config = RouterConfig(cluster=ClusterConfig(), control_address=f"ipc://{tmp_path}/c")

    async def routes() -> set[tuple[str, str]]:
        control = ControlPlane(config.cluster, ControlSocket(config.control_address))
        traffic = Traffic(control.registry, config.cluster)
        try:
            async with open_session() as session:
                app = build_app(
                    config, control, traffic, session, InstanceConnections(), follows=False
                )
        finally:
            control.close()
        return {
            (method, route.path)
            for route in app.routes
            if route.path.startswith("/kunserve")
            for method in (route.methods or ())
            if method != "HEAD"
        }

    found = asyncio.run(routes())
    assert ("POST", "/kunserve/drop") in found
    assert found == {(m, p) for m, p in operations(document()) if p.startswith("/kunserve")}


def test_answers_are_as_described(start_router: Start, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text("[default]\nmax_queued = 9")
    keys = {"admin_api_key": "admin", "read_api_key": "read"}
    router = start_router(2, **keys, tenants=str(tenants))
    checker = Checker(router)
    call = checker.call
    for path in ("status", "policy", "history", "openapi.json", "tenants"):
        call("GET", f"/kunserve/{path}")
    call("POST", "/kunserve/tenants/reload")
    call("GET", "/workers")
    call("POST", "/kunserve/plan", {})
    call("PUT", "/kunserve/policy", {"cooldown_s": 0})
    call("POST", "/kunserve/drop")
    until(lambda: {i["mode"] for i in router.status()["instances"]} == {"cooperative"})
    call("GET", "/kunserve/status")
    call("POST", "/kunserve/plan", {"kind": "restore"})
    call("POST", "/kunserve/restore?wait=false")
    until(lambda: router.event()["kind"] == "restore")
    until(lambda: {i["mode"] for i in router.status()["instances"]} == {"independent"})
    with router.instances[0].holding_votes():
        call("POST", "/kunserve/drop?wait=false")
        assert call("GET", "/kunserve/status").json["transition"]
    until(lambda: {i["mode"] for i in router.status()["instances"]} == {"cooperative"})
    until(lambda: len(call("GET", "/kunserve/events").json["events"]) == 3)
    call("POST", "/kunserve/restore")
    call("POST", "/kunserve/trace", {"seconds": 0.01})
    call("POST", "/kunserve/join", {"model": msgspec.to_builtins(MODEL)})
    worker = call("POST", "/workers", {"url": "http://127.0.0.1:9"}).json
    call("GET", "/kunserve/status")
    call("DELETE", f"/workers/{worker['id']}")
    until(lambda: {i["mode"] for i in router.status()["instances"]} == {"independent"})
    connection = router.open("POST", "/generate", {"stream": True}, ADMIN)
    until(lambda: any(i.worker.streams for i in router.instances))
    busy = next(i for i in router.instances if i.worker.streams)
    call("DELETE", f"/workers/{busy.number}?wait=false")
    call("GET", "/workers")
    connection.close()
    assert checker.checked == {(c.name, status) for c in CALLS for status in c.answers}


def test_errors_are_as_described(
    start_router: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("kunserve_sglang.router.admin.tracing._ANSWER_TIMEOUT_S", 0.1)
    tenants = tmp_path / "tenants.toml"
    tenants.write_text("")
    keys = {"admin_api_key": "admin", "read_api_key": "read"}
    router = start_router(1, **keys, model=MODEL, tenants=str(tenants))
    checker = Checker(router)
    tenants.write_text("[")
    assert checker.call("POST", "/kunserve/tenants/reload").status == 409
    expected = {("reload_tenants", 409)}
    for name in ("plan", "drop", "restore"):
        assert checker.call("POST", f"/kunserve/{name}", {}).status == 409
        expected.add((name, 409))
    assert checker.call("DELETE", "/workers/9").status == 404
    other = msgspec.structs.replace(MODEL, layers=1)
    assert (
        checker.call("POST", "/kunserve/join", {"model": msgspec.to_builtins(other)}).status == 409
    )
    expected.add(("join", 409))
    own = {"url": router.instances[0].worker.url}
    assert checker.call("POST", "/workers", own).status == 409
    connection = router.open("POST", "/generate", {"stream": True}, ADMIN)
    until(lambda: router.instances[0].worker.streams)
    router.instances[0].set_load(10, running=1)  # the drain below must not end within this test
    until(lambda: router.described(0)["demand"] == 10)
    assert checker.call("DELETE", "/workers/0?timeout_s=0").status == 504
    assert checker.call("DELETE", "/workers/0?wait=false").status == 202
    assert checker.call("DELETE", "/workers/0").status == 409
    router.instances[0].worker.finish()
    connection.close()
    checker.checked.discard(("drain", 202))
    expected |= {("drain", status) for status in (404, 409, 504)} | {("add_worker", 409)}
    router.instances[0].stop()
    assert checker.call("POST", "/kunserve/trace", {"seconds": 0.01}).status == 504
    router.instances.clear()
    conflict = {("trace", 409)}  # two at a time; what a recording refuses has tests of its own
    declared = {(call.name, status) for call in CALLS for status in call.errors}
    assert checker.checked == expected | {("trace", 504)} == declared - conflict


def test_an_instance_that_has_not_reported_is_as_described(start_router: Start) -> None:
    router = start_router(0, expect=1, admin_api_key="admin")
    router.instances.append(router.add(0, reporting=False))
    until(lambda: router.status()["instances"])
    (instance,) = Checker(router).call("GET", "/kunserve/status").json["instances"]
    assert "slots" not in instance


def test_it_says_which_keys_are_needed() -> None:
    assert not any("security" in o for o in operations(document()).values())
    described = document(admin_api_key="a")
    needed = {o["operationId"]: o.get("security") for o in operations(described).values()}
    assert needed["drop"] == [{"adminKey": []}]
    assert needed["status"] is None
    assert set(described["components"]["securitySchemes"]) == {"adminKey"}
    described = document(admin_api_key="a", read_api_key="b")
    needed = {o["operationId"]: o.get("security") for o in operations(described).values()}
    assert needed["status"] == [{"readKey": []}, {"adminKey": []}]
    assert needed["drop"] == [{"adminKey": []}]


def test_it_is_a_valid_document() -> None:
    """Every reference leads somewhere, every schema is one, every operation has its own name."""
    described = document(admin_api_key="a", read_api_key="b")
    assert described["openapi"].startswith("3.1")
    schemas = described["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    references = set(_values(described, "$ref"))
    assert references
    assert references <= {f"#/components/schemas/{name}" for name in schemas}
    names = [o["operationId"] for o in operations(described).values()]
    assert len(names) == len(set(names)) == len(CALLS)
    assert schemas["DropBody"]["additionalProperties"] is False
    assert "required" not in schemas["DropBody"] or not schemas["DropBody"]["required"]
    assert "error" in schemas["Event"]["required"]


def test_every_code_of_an_error_is_explained() -> None:
    text = (ROOT / "docs" / "features.md").read_text()
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| (\d{3}) \|", text, re.MULTILINE)
    explained = [code for codes, _ in rows for code in re.findall(r"`(\w+)`", codes)]
    assert sorted(explained) == sorted(get_args(Code))
    assert {int(status) for _, status in rows} <= ERROR_TYPES.keys()


def _values(node: Any, name: str) -> list[Any]:
    if isinstance(node, dict):
        own = [node[name]] if name in node else []
        return own + [v for child in node.values() for v in _values(child, name)]
    if isinstance(node, list):
        return [v for child in node for v in _values(child, name)]
    return []


class Page(HTMLParser):
    """What a page would fetch, where it leads, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag in ("script", "link", "img", "iframe", "object") or "src" in found:
            self.fetched.append(tag)
        if "href" in found:
            self.links.append(found["href"])
        if "id" in found:
            self.ids.add(found["id"])

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_from_elsewhere(idle_router: RouterCluster) -> None:
    answer = idle_router.get("/docs")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Page(answer.body.decode())
    assert not page.fetched
    assert "@import" not in page.text
    assert "url(" not in page.text
    for link in page.links:
        assert link == "/kunserve/openapi.json" or link.removeprefix("#") in page.ids
    assert not any(i.worker.requests("/docs") for i in idle_router.instances)
    for call in CALLS:
        assert f"{call.method} {call.path}" in page.text
    for name in idle_router.get("/kunserve/openapi.json").json["components"]["schemas"]:
        assert f"type-{name}" in page.ids
