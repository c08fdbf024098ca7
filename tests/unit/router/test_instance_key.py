"""The key that only the router shows instances, and what answers say of keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.launch.options import LaunchOptions
from kunserve_sglang.launch.server import Supervisor
from tests.support.mock_worker import Canned, MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]

KEY = {"Authorization": "Bearer s3cret"}


def bearers(worker: MockWorker, path: str) -> list[str]:
    return [s.headers.get("authorization", "") for s in worker.requests(path)]


@pytest.mark.parametrize("keys", [{}, {"api_key": "k"}, {"admin_api_key": "s3cret"}])
def test_instances_see_their_own_key_and_plain_servers_never(
    start_router: Start, worker: MockWorker, keys: dict[str, str]
) -> None:
    router = start_router(1, **keys)
    caller = {"Authorization": f"Bearer {next(iter(keys.values()), 'theirs')}"}
    worker.answers["/server_info"] = Canned({})
    assert router.post("/workers", {"url": worker.url}, **caller).status == 201
    until(lambda: len(router.get("/workers").json["workers"]) == 2)
    until(lambda: router.get("/readiness").status == 200)
    assert router.post("/flush_cache", **caller).status == 200
    secret = router.config.instance_admin_key
    assert bearers(router.instances[0].worker, "/flush_cache") == [f"Bearer {secret}"]
    to_plain = {"api_key": "Bearer k", "admin_api_key": ""}.get("".join(keys), "Bearer theirs")
    assert bearers(worker, "/flush_cache") == [to_plain]
    for path in ("/v1/loads", "/server_info", "/health_generate", "/v1/responses/resp_1"):
        router.get(path, **caller)
    router.post("/v1/completions", **caller)
    assert not any(secret in repr(s) for s in worker.seen)


def test_every_cluster_has_another_key() -> None:
    clusters = [Supervisor(ClusterConfig(), LaunchOptions(), []) for _ in range(3)]
    keys = {cluster._instance(0, (), 0).admin_key for cluster in clusters}
    assert len(keys) == 3
    assert min(map(len, keys)) > 40
    assert clusters[0]._instance(0, (), 0).admin_key == clusters[0]._instance(1, (), 0).admin_key


@pytest.mark.parametrize("key", [{}, KEY])
@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_tells_no_secrets(start_router: Start, path: str, key: dict[str, str]) -> None:
    router = start_router(1, admin_api_key="s3cret")
    said = {"api_key": "k1", "admin_api_key": "k2", "ssl_keyfile_password": "k3", "tp_size": 1}
    router.instances[0].worker.answers[path] = Canned({**said, "internal_states": [said]})
    body = router.get(path, **key).json
    shut = {"api_key": "[key]", "admin_api_key": "[key]", "ssl_keyfile_password": "[key]"}
    body.pop("kunserve")
    assert body == {**shut, "tp_size": 1, "internal_states": [{**shut, "tp_size": 1}]}
    assert bearers(router.instances[0].worker, path) == [""]
    router.instances[0].worker.answers[path] = Canned([1])
    assert router.get(path).error["code"] == "instance_failed"
