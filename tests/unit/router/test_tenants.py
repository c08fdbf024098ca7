"""Tenants at the router: whose key opens what, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.launch.options import LaunchOptions
from kunserve_sglang.launch.server import Supervisor
from tests.support.mock_worker import Canned, MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.tenants import ADMIN, API, FILE, A, B, finish, streams
from tests.support.waiting import until
from tests.unit.router.test_request_queue import names, queued

Start = Callable[..., RouterCluster]


# --- keys ---------------------------------------------------------------------------------------


def test_a_tenants_key_opens_inference_and_nothing_else(start_tenants: Start) -> None:
    router = start_tenants(1, api_key="s3cret-api", admin_api_key="s3cret-admin")
    for who in (API, A, B):
        assert router.get("/v1/models", **who).status == 200
    for wrong in ("", "Bearer s3cret-admin", "Bearer s3cret-of-", "s3cret-of-a"):
        answer = router.get("/v1/models", Authorization=wrong)
        assert (answer.status, answer.error["code"]) == (401, "api_key_required")
    assert router.post("/kunserve/drop", {}, **A).error["code"] == "admin_key_required"
    assert router.post("/kunserve/tenants/reload", **A).error["code"] == "admin_key_required"
    assert router.post("/flush_cache", **A).error["code"] == "admin_key_required"


def test_instances_see_the_clusters_key_in_place_of_a_tenants(
    start_tenants: Start, plain: MockWorker
) -> None:
    router = start_tenants(1, api_key="s3cret-api", admin_api_key="s3cret-admin")
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


def test_without_a_key_of_the_cluster_a_tenants_key_goes_nowhere(start_tenants: Start) -> None:
    router = start_tenants(1)
    for who in (A, {}):
        assert router.get("/v1/models", **who).status == 200
    worker = router.instances[0].worker
    assert ["authorization" in s.headers for s in worker.requests("/v1/models")] == [False, False]
    router.get("/v1/models", Authorization="Bearer for-the-server")
    assert worker.requests("/v1/models")[-1].headers["authorization"] == "Bearer for-the-server"


def test_a_launcher_says_in_one_line_what_is_wrong_with_the_file(tenants_file: Path) -> None:
    from kunserve_sglang.core.cluster_config import ClusterConfig

    tenants_file.write_text(FILE.format(a="weight = 0", b=""))
    launcher = Supervisor(ClusterConfig(tenants=str(tenants_file), port=0), LaunchOptions(), [])
    with pytest.raises(ConfigurationError, match=f"--tenants {tenants_file}: .*weight"):
        launcher._check()
    tenants_file.write_text(FILE.format(a="", b=""))
    options = LaunchOptions(api_key="s3cret-of-b")
    with pytest.raises(ConfigurationError, match="a key of b is one of the cluster's own"):
        Supervisor(ClusterConfig(tenants=str(tenants_file), port=0), options, [])._check()


# --- whose turn it is ---------------------------------------------------------------------------


def test_a_burst_is_its_own(start_tenants: Start) -> None:
    router = start_tenants(1, max_in_flight=1)
    with streams(router) as these:
        these.run(A, "a")
        for _ in range(5):
            these.wait(A, "a")
        these.wait(B, "b")
        these.wait({}, "nobody's")
        for _ in range(4):
            finish(router)
        assert names(router)[:4] in (["a", "b", "nobody's", "a"], ["a", "nobody's", "b", "a"])


def test_shares_go_by_weight_and_tokens(start_tenants: Start) -> None:
    router = start_tenants(1, b="weight = 3", max_in_flight=1)
    size = {"sampling_params": {"max_new_tokens": 500}}
    with streams(router) as these:
        these.run({}, "first")
        for _ in range(8):
            these.wait(A, "a", **size)
            these.wait(B, "b", **size)
        for _ in range(8):
            finish(router)
        assert 5 <= names(router)[1:].count("b") <= 7


def test_priorities_are_among_ones_own(start_tenants: Start) -> None:
    router = start_tenants(1, max_in_flight=1)
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


def test_an_instance_gets_few_more_than_it_runs(start_tenants: Start) -> None:
    """Without a limit: the others wait here, and who has little passes them."""
    router = start_tenants(1)
    (instance,) = router.instances
    with streams(router) as these:
        these.run(A, "a")
        these.run(A, "a")
        these.wait(A, "a")
        these.run(B, "b")
        instance.set_load(demand=4, used=4, running=3)
        until(lambda: names(router) == ["a", "a", "b", "a"])


def test_an_eighth_of_the_slots_is_kept_free(start_tenants: Start) -> None:
    router = start_tenants(1)
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


def test_an_instance_that_has_not_reported_gets_few_as_well(start_tenants: Start) -> None:
    router = start_tenants(0, expect=1)
    router.instances.append(router.add(0, reporting=False))
    until(lambda: [d["serving"] for d in router.status()["instances"]] == [True])
    with streams(router) as these:
        these.run(A, "a")
        these.run(A, "a")
        these.wait(A, "a")


def test_a_request_goes_where_its_tokens_have_room(start_tenants: Start) -> None:
    router = start_tenants(2)
    slots = router.described(0)["slots"]["capacity"]
    full, other = router.instances
    full.set_load(demand=slots - 20, used=slots - 20, running=1)
    other.set_load(demand=slots // 2, used=slots // 2, running=9)
    until(lambda: [d.get("running") for d in router.status()["instances"]] == [1, 9])
    with streams(router) as these:
        these.run(B, "b", sampling_params={"max_new_tokens": 50})
        assert (full.worker.streams, other.worker.streams) == (0, 1)
        these.run(B, "b", sampling_params={"max_new_tokens": 10**6})
