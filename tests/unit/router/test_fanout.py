"""Endpoints that concern all instances: actions, loads, information, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kunserve_sglang.core.routes import SERVER_ROUTES, Handling, ServerRoute
from tests.support.mock_worker import Canned
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]

ACTIONS = [
    (route.path, method)
    for route in SERVER_ROUTES
    if route.handling is Handling.TO_ALL
    for method in route.methods
]
REFUSED = [route for route in SERVER_ROUTES if route.handling is Handling.REFUSE]


@pytest.mark.parametrize(("path", "method"), ACTIONS)
def test_actions_reach_every_instance(idle_router: RouterCluster, path: str, method: str) -> None:
    for instance in idle_router.instances:
        instance.worker.answers[path] = Canned("done")
    answer = idle_router.call(method, f"{path}?a=1", b'{"rid": "r"}', {"Authorization": "Bearer k"})
    assert (answer.status, answer.body) == (200, b"done")
    for instance in idle_router.instances:
        seen = instance.worker.requests(path)[-1]
        assert (seen.method, seen.target, seen.body) == (method, f"{path}?a=1", b'{"rid": "r"}')
        key = idle_router.config.instance_admin_key
        assert seen.headers["authorization"] == f"Bearer {key}"


def test_an_action_fails_if_one_instance_fails(router: RouterCluster) -> None:
    router.instances[1].worker.answers["/flush_cache"] = Canned("requests are running", 400)
    answer = router.post("/flush_cache")
    assert (answer.status, answer.error["code"]) == (502, "instance_failed")
    assert "instance 1 answered 400: requests are running" in answer.error["message"]
    router.instances[1].worker.stop()
    for _ in range(2):
        answer = router.post("/flush_cache")
        assert "instance 1 connection refused" in answer.error["message"]
        router.post("/v1/completions", {})
    router.instances[1].worker.start()


def test_without_instances_there_is_nothing_to_ask(start_router: Start) -> None:
    router = start_router(0, expect=1)
    for path in ("/flush_cache", "/get_load", "/server_info"):
        answer = router.get(path)
        assert (answer.status, answer.error["code"]) == (503, "no_instance")
        assert answer.headers["retry-after"]


@pytest.mark.parametrize("route", REFUSED, ids=lambda route: route.path)
def test_what_a_cluster_cannot_do_is_refused_with_the_reason(
    idle_router: RouterCluster, route: ServerRoute
) -> None:
    for method in (*route.methods, "PATCH"):
        answer = idle_router.call(method, route.path, {})
        assert (answer.status, answer.error["code"]) == (501, "not_supported")
        assert answer.error["message"] == f"{route.path} is refused: {route.reason}"
    assert not any(i.worker.requests(route.path) for i in idle_router.instances)


@pytest.mark.parametrize("path", ["/get_load", "/get_loads"])
def test_loads_are_labelled_by_instance(router: RouterCluster, path: str) -> None:
    for instance in router.instances:
        load = [{"dp_rank": 0, "num_reqs": 5 + instance.number}]
        instance.worker.answers["/get_load"] = Canned(load)
    assert router.get(path).json == [
        {"instance": 0, "dp_rank": 0, "num_reqs": 5},
        {"instance": 1, "dp_rank": 0, "num_reqs": 6},
    ]


def test_v1_loads_keeps_its_shape(router: RouterCluster) -> None:
    for instance in router.instances:
        body = {"version": "v", "loads": [{"num_running_reqs": instance.number}]}
        instance.worker.answers["/v1/loads"] = Canned(body)
    assert router.get("/v1/loads?include=core").json == {
        "version": "v",
        "loads": [
            {"instance": 0, "num_running_reqs": 0},
            {"instance": 1, "num_running_reqs": 1},
        ],
    }
    assert router.instances[0].worker.requests("/v1/loads")[0].target == "/v1/loads?include=core"
    for instance in router.instances:
        text = f"# TYPE sglang_reqs gauge\nsglang_reqs {instance.number}\n"
        instance.worker.answers["/v1/loads"] = Canned(text)
    assert router.get("/v1/loads?format=prometheus").body.splitlines() == [
        b"# TYPE sglang_reqs gauge",
        b'sglang_reqs{instance="0"} 0',
        b'sglang_reqs{instance="1"} 1',
    ]
    router.instances[1].worker.answers["/v1/loads"] = Canned({"error": "no key"}, 401)
    assert router.get("/v1/loads").status == 401


@pytest.mark.parametrize("path", ["/get_server_info", "/server_info"])
def test_server_info_has_both_views(router: RouterCluster, path: str) -> None:
    info = {"max_total_num_tokens": 77, "internal_states": [{}]}
    router.instances[0].worker.answers[path] = Canned(info)
    body = router.get(path).json
    assert body.pop("kunserve") == router.status()
    assert body == info
    router.instances[0].worker.answers[path] = Canned({"error": "Unauthorized"}, 401)
    assert router.get(path).status == 401


def test_probes(start_router: Start) -> None:
    router = start_router(1, expect=2)
    assert router.get("/liveness").status == 200
    assert router.get("/health").status == 200
    answer = router.get("/readiness")
    assert (answer.status, answer.error["code"]) == (503, "not_ready")
    assert "1 of 2" in answer.error["message"]
    router.instances.append(router.add(1))
    until(lambda: router.get("/readiness").status == 200)

    for instance in router.instances:
        instance.worker.answers["/health_generate"] = Canned()
    assert router.get("/health_generate").status == 200
    router.instances[1].worker.answers["/health_generate"] = Canned("", 503)
    answer = router.get("/health_generate")
    assert (answer.status, answer.error["code"]) == (503, "unhealthy")


def test_a_cluster_without_instances_is_alive_but_not_healthy(start_router: Start) -> None:
    router = start_router(0, expect=1)
    assert router.get("/liveness").status == 200
    for path in ("/health", "/health_generate", "/readiness"):
        answer = router.get(path)
        assert answer.status == 503
        assert answer.headers["retry-after"]


def test_an_instance_serves_once_its_health_is_200(start_router: Start) -> None:
    router = start_router(0, expect=1, api_key="k")
    router.instances.append(router.add(0))
    worker = router.instances[0].worker
    worker.answers["/health"] = Canned("", 503)
    until(lambda: router.status()["instances"] and len(worker.requests("/health")) > 1)
    assert worker.requests("/health")[0].headers["authorization"] == "Bearer k"
    assert router.described(0)["serving"] is False
    assert router.get("/health").status == 503
    worker.answers["/health"] = Canned()
    until(lambda: router.get("/health").status == 200)
