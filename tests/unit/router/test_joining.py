"""Instances that ask to join: what they are told, who is refused, and the way from other hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import zmq

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.identity import ModelIdentity
from kunserve_sglang.core.keys import MemberKeys, new_keys
from kunserve_sglang.core.messages import PROTOCOL_VERSION, Hello
from kunserve_sglang.core.processes import this_host
from kunserve_sglang.instance.parts.control import ControlLink
from kunserve_sglang.router.settings import RouterConfig
from kunserve_sglang.testing.mock_member import CAPACITY, LAYERS, PROFILE
from tests.support.mock_instance import MODEL
from tests.support.router_harness import Answer, RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]

ADMIN = {"Authorization": "Bearer admin"}


def join(router: RouterCluster, model: ModelIdentity = MODEL, **headers: str) -> Answer:
    return router.post("/kunserve/join", {"model": msgspec.to_builtins(model)}, **headers)


def test_who_fits_is_told_what_it_has_to_know(start_router: Start) -> None:
    router = start_router(2, model=MODEL, api_key="k", join_room=1, max_group_size=5)
    answer = join(router, Authorization="Bearer k")
    assert answer.status == 200
    told = answer.json
    assert told["instance"] == 2
    assert (told["host"], told["control_address"]) == (this_host(), router.control_address)
    assert (told["owners"], told["api_key"]) == (3, "k")
    assert (told["overload_policy"], told["micro_batches"]) == ("none", "lookahead")
    assert told["peer_timeout_s"] == router.config.cluster.peer_timeout_s
    assert (told["control_tcp"], told["keys"], told["data_host"]) == (None, None, "")
    assert join(router, Authorization="Bearer k").json["instance"] == 3


def test_one_that_joined_is_one_of_them(start_router: Start) -> None:
    router = start_router(1, model=MODEL)
    number = join(router).json["instance"]
    assert router.get("/readiness").json == {"status": "ok", "available": 1, "expected": 1}
    router.instances.append(router.add(number))
    router.ready(2)
    assert router.get("/readiness").json == {"status": "ok", "available": 2, "expected": 2}
    event = router.post("/kunserve/drop").json
    assert (event["status"], event["instances"]) == ("committed", [0, number])
    assert router.call("DELETE", f"/workers/{number}").status == 200
    assert router.get("/readiness").json["expected"] == 1


def test_joining_waits_for_no_transition(start_router: Start) -> None:
    router = start_router(2, model=MODEL, vote_timeout_s=0.3)
    router.instances[0].on_prepare = lambda _: None
    assert router.post("/kunserve/drop?wait=false").status == 202
    assert router.status()["transition"]
    assert join(router).status == 200
    until(lambda: router.event())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "Other"}, "architecture: Other there, LlamaForCausalLM here"),
        ({"layers": 5}, f"number of layers: 5 there, {LAYERS} here"),
        ({"dtype": "bfloat16"}, "dtype: bfloat16 there, float32 here"),
        ({"context": 1}, "context length: 1 there, 2048 here"),
        ({"requests": 7}, "--max-running-requests: 7 there, 0 here"),
        ({"config": "x", "name": "n"}, "the configuration of the model (n there, tiny here)"),
        ({"weights": "x", "name": "n"}, "the weights of the model (n there, tiny here)"),
        ({"versions": {"sglang": "0"}}, "version of sglang: 0 there, 1 here"),
        ({"versions": {"sglang": "1"}}, "version of kunserve-sglang: None there, 2 here"),
    ],
)
def test_who_does_not_fit_is_told_why(
    start_router: Start, changes: dict[str, Any], message: str
) -> None:
    router = start_router(0, model=MODEL)
    answer = join(router, msgspec.structs.replace(MODEL, **changes))
    assert (answer.status, answer.error["code"]) == (409, "other_model")
    assert message in answer.error["message"]
    assert join(router).json["instance"] == 0


OTHER = msgspec.structs.replace(MODEL, layers=5)


def test_a_router_alone_serves_what_its_first_instance_serves(start_router: Start) -> None:
    router = start_router(0)
    assert join(router, OTHER).json["owners"] == 8  # asked, and never came
    number = join(router).json["instance"]
    router.instances.append(router.add(number))
    router.ready(1)
    assert join(router, OTHER).error["code"] == "other_model"
    assert join(router).status == 200
    assert router.call("DELETE", f"/workers/{number}").status == 200
    assert join(router, OTHER).status == 200


def test_who_comes_with_another_model_than_the_first_has_to_end(start_router: Start) -> None:
    router = start_router(0)
    late, first = join(router, OTHER).json["instance"], join(router).json["instance"]
    for number in (first, late):
        router.instances.append(router.add(number))
        router.ready(1)
    until(lambda: router.instances[1].obeyed["Leave"])
    assert [i["id"] for i in router.status()["instances"]] == [first]


@pytest.mark.parametrize(
    ("body", "field"),
    [({}, "model"), ({"model": 1}, "model"), ({"model": {}}, "model"), ({"x": 1}, "x")],
)
def test_bad_input_gets_no_number(start_router: Start, body: Any, field: str) -> None:
    router = start_router(0)
    answer = router.post("/kunserve/join", body)
    assert (answer.status, answer.error["field"]) == (422, field)
    assert router.call("POST", "/kunserve/join", b"{").error["code"] == "bad_json"
    assert join(router).json["instance"] == 0


def test_joining_needs_the_admin_key(start_router: Start) -> None:
    router = start_router(0, admin_api_key="admin", read_api_key="read")
    for key in ({}, router.reader):
        answer = join(router, **key)
        assert (answer.status, answer.error["code"]) == (401, "admin_key_required")
    assert join(router, **ADMIN).status == 200


# --- other hosts --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_members_on_other_hosts_take_part(start_router: Start, host: str) -> None:
    router = start_router(1, model=MODEL, admin_api_key="a", control_address=f"tcp://{host}:*")
    told = join(router, Authorization="Bearer a").json
    assert told["control_tcp"].startswith(f"tcp://{host}:")
    assert told["data_host"] == host
    keys = msgspec.convert(told["keys"], MemberKeys)
    number = told["instance"]
    router.instances.append(router.add(number, address=told["control_tcp"], keys=keys))
    router.ready(2)
    admin = {"Authorization": "Bearer a"}
    assert router.post("/kunserve/drop", **admin).json["status"] == "committed"
    until(lambda: {i["mode"] for i in router.status()["instances"]} == {"cooperative"})
    assert router.call("DELETE", f"/workers/{number}", headers=admin).status == 200
    until(lambda: router.instances[1].obeyed["Leave"])


@pytest.mark.parametrize("stranger", ["without keys", "with keys of its own", "with half of them"])
def test_strangers_are_not_heard(start_router: Start, stranger: str) -> None:
    router = start_router(0, model=MODEL, admin_api_key="a", control_address="tcp://127.0.0.1:*")
    told = join(router, Authorization="Bearer a").json
    own = new_keys().members
    keys = {
        "without keys": None,
        "with keys of its own": own,
        "with half of them": msgspec.structs.replace(own, router=told["keys"]["router"]),
    }[stranger]
    hello = Hello(
        version=PROTOCOL_VERSION,
        instance=66,
        url="http://127.0.0.1:9",
        data_address="",
        scheduler="",
        layer_count=LAYERS,
        memory=PROFILE,
        capacity=CAPACITY,
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = ControlLink(context, told["control_tcp"], hello, keys)
    assert link.receive(0.5) is None
    friend = router.add(
        1, address=told["control_tcp"], keys=msgspec.convert(told["keys"], MemberKeys)
    )
    router.instances.append(friend)
    until(lambda: router.status()["instances"])
    assert [i["id"] for i in router.status()["instances"]] == [1]
    link.close()
    context.term()


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:5", "tcp://h", "tcp://h:0", "tcp://h:65536", "tcp://:5", "ipc://x",
     "tcp://0.0.0.0:5", "tcp://*:5", "tcp://[::]:5", "tcp://a b:5"],
)  # fmt: skip
def test_an_address_that_nobody_can_use_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="--control-address"):
        ClusterConfig(control_address=address)


def test_other_hosts_need_a_key_to_ask_with() -> None:
    config = ClusterConfig(control_address="tcp://[::1]:5")
    assert config.data_host == "[::1]"
    with pytest.raises(ConfigurationError, match="--admin-api-key"):
        RouterConfig(cluster=config, control_address="ipc://c")
    with pytest.raises(ConfigurationError, match="--join-room"):
        ClusterConfig(join_room=-1)
