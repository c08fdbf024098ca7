"""KunServe's own API: status, plans, policy; what is refused and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kunserve_sglang.testing.mock_member import CAPACITY
from tests.support.router_harness import Answer, RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]


def assert_field(answer: Answer, field: str) -> None:
    assert answer.status == 422, answer.body
    assert answer.error["field"] == field
    assert field in answer.error["message"]


def modes(router: RouterCluster) -> list[str]:
    return [d["mode"] for d in router.status()["instances"]]


def test_status_describes_every_instance(idle_router: RouterCluster) -> None:
    status = idle_router.status()
    assert status["epoch"] == 0
    assert status["transition"] is None
    assert [d["id"] for d in status["instances"]] == [0, 1]
    first = status["instances"][0]
    assert first["mode"] == "independent"
    assert first["slots"]["capacity"] == CAPACITY
    assert first["layers"] == [0, 4]


def test_a_plan_changes_nothing(idle_router: RouterCluster) -> None:
    for body in (None, {}, {"kind": "drop"}, {"instances": [0, 1]}, {"tokens": 10}):
        answer = idle_router.post("/kunserve/plan", body)
        assert answer.status == 200, answer.body
        plan = answer.json
        assert plan["kind"] == "drop"
        assert plan["instances"] == [0, 1]
        (group,) = plan["groups"]
        assert group["instances"] == [0, 1]
        assert group["layers"] == [[0, 2], [2, 4]]
        assert group["capacity"] == plan["capacity_after"]
        assert plan["capacity_before"] == 2 * CAPACITY < plan["capacity_after"]
        assert plan["freed_bytes"] == 4 * 25 * 4096
        assert plan["reason"]
    assert idle_router.event() is None
    assert modes(idle_router) == ["independent"] * 2


@pytest.mark.parametrize("path", ["/kunserve/plan", "/kunserve/drop", "/kunserve/restore"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"instances": []}, "instances"),
        ({"instances": [0, 7]}, "instances"),
        ({"instances": [0, "1"]}, "instances"),
        ({"instances": [True]}, "instances"),
        ({"instances": None}, "instances"),
        ({"instances": 0}, "instances"),
        ({"token": 1}, "token"),
        ([], "body"),
        ("drop", "body"),
    ],
)
def test_a_wrong_body_is_named(
    idle_router: RouterCluster, path: str, body: Any, field: str
) -> None:
    assert_field(idle_router.post(path, body), field)
    assert idle_router.event() is None


@pytest.mark.parametrize("tokens", [0, -5, 1.5, "9", True, None])
def test_tokens_are_a_positive_number(idle_router: RouterCluster, tokens: Any) -> None:
    assert_field(idle_router.post("/kunserve/plan", {"tokens": tokens}), "tokens")
    assert_field(idle_router.post("/kunserve/drop", {"tokens": tokens}), "tokens")


def test_tokens_are_for_drops_without_instances(idle_router: RouterCluster) -> None:
    assert_field(idle_router.post("/kunserve/restore", {"tokens": 5}), "tokens")
    assert_field(idle_router.post("/kunserve/plan", {"kind": "restore", "tokens": 5}), "tokens")
    assert_field(idle_router.post("/kunserve/drop", {"instances": [0, 1], "tokens": 5}), "tokens")
    assert_field(idle_router.post("/kunserve/plan", {"kind": "merge"}), "kind")


def test_unknown_instances_are_named(idle_router: RouterCluster) -> None:
    answer = idle_router.post("/kunserve/drop", {"instances": [0, 9, 8]})
    assert answer.error["code"] == "unknown_instance"
    assert "[8, 9]" in answer.error["message"]


@pytest.mark.parametrize("body", [b"{", b"nonsense", b"\xff\xfe", b"{} x"])
def test_no_json_is_a_bad_request(idle_router: RouterCluster, body: bytes) -> None:
    for method, path in (("POST", "/kunserve/drop"), ("PUT", "/kunserve/policy")):
        answer = idle_router.call(method, path, body)
        assert (answer.status, answer.error["code"]) == (400, "bad_json")


@pytest.mark.parametrize("query", ["limit=0", "limit=-1", "limit=x", "limit=", "limit=1.5"])
def test_a_limit_is_a_positive_number(idle_router: RouterCluster, query: str) -> None:
    assert_field(idle_router.get(f"/kunserve/events?{query}"), "limit")


def test_what_cannot_be_planned_is_a_conflict(start_router: Start) -> None:
    router = start_router(1)
    for path, body in (
        ("/kunserve/plan", {}),
        ("/kunserve/drop", {}),
        ("/kunserve/drop?wait=false", {}),
        ("/kunserve/restore", {}),
        ("/kunserve/drop", {"instances": [0]}),
    ):
        answer = router.post(path, body)
        assert (answer.status, answer.error["code"]) == (409, "no_plan")
    assert router.event() is None


def test_a_second_transition_is_a_conflict(start_router: Start) -> None:
    router = start_router(2)
    with router.instances[0].holding_votes():
        accepted = router.post("/kunserve/drop?wait=false")
        assert accepted.status == 202
        assert accepted.json["accepted"] is True
        assert accepted.json["instances"] == [0, 1]
        assert router.status()["transition"]["kind"] == "drop"
        for path in ("/kunserve/drop", "/kunserve/drop?wait=false", "/kunserve/restore"):
            answer = router.post(path)
            assert (answer.status, answer.error["code"]) == (409, "transition_running")
    until(lambda: router.event() is not None)
    assert router.event()["status"] == "committed"
    assert len(router.get("/kunserve/events").json["events"]) == 1
    assert_field(router.post("/kunserve/restore?wait=maybe"), "wait")


def test_policy_is_read_and_changed(router: RouterCluster) -> None:
    before = router.get("/kunserve/policy").json
    assert before["auto"] is False
    assert set(before) == {
        "auto", "drop", "restore", "drop_hold_s", "restore_hold_s", "cooldown_s", "lead_s"
    }  # fmt: skip
    after = router.put("/kunserve/policy", {"drop": 1, "restore": 0.25, "cooldown_s": 7}).json
    assert after == {**before, "drop": 1.0, "restore": 0.25, "cooldown_s": 7.0}
    assert router.get("/kunserve/policy").json == after
    assert router.put("/kunserve/policy", {"auto": True}).json == {**after, "auto": True}
    assert router.put("/kunserve/policy", {}).json == {**after, "auto": True}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"auto": 1}, "auto"),
        ({"auto": None}, "auto"),
        ({"drop": "0.9"}, "drop"),
        ({"drop": 0}, "drop"),
        ({"drop": 2.5}, "drop"),
        ({"drop": 0.4}, "drop"),
        ({"restore": -0.1}, "restore"),
        ({"restore": 0.95}, "restore"),
        ({"restore": 0.7, "drop": 0.6}, "restore"),
        ({"drop_hold_s": -1}, "drop_hold_s"),
        ({"restore_hold_s": True}, "restore_hold_s"),
        ({"cooldown_s": 1e9}, "cooldown_s"),
        ({"auto": True, "treshold": 0.9}, "treshold"),
        ([0.9], "body"),
    ],
)
def test_a_wrong_policy_changes_nothing(idle_router: RouterCluster, body: Any, field: str) -> None:
    before = idle_router.get("/kunserve/policy").json
    assert_field(idle_router.put("/kunserve/policy", body), field)
    assert idle_router.get("/kunserve/policy").json == before


CHANGES = [
    ("POST", "/kunserve/drop"),
    ("POST", "/kunserve/restore"),
    ("PUT", "/kunserve/policy"),
    ("POST", "/flush_cache"),
    ("GET", "/flush_cache"),
    ("POST", "/abort_request"),
    ("POST", "/pause_generation"),
    ("POST", "/continue_generation"),
    ("POST", "/slow_down"),
]


def test_changes_need_the_admin_key_and_reads_do_not(start_router: Start) -> None:
    router = start_router(2, api_key="k", admin_api_key="Schlüssel")
    wrong = ("", "Bearer", "Bearer k", "Basic Schlüssel", "Schlüssel")
    for method, path in CHANGES:
        for given in wrong:
            headers = {"Authorization": given.encode()} if given else {}
            answer = router.call(method, path, {}, headers)
            assert (answer.status, answer.error["code"]) == (401, "admin_key_required")
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/kunserve/status", "/kunserve/policy", "/kunserve/events", "/workers"):
        assert router.get(path).status == 200
    assert router.post("/kunserve/plan").status == 200
    key = {"Authorization": "Bearer Schlüssel".encode()}
    assert router.call("POST", "/kunserve/drop", {}, key).json["status"] == "committed"
    assert router.call("POST", "/flush_cache", {}, key).status == 200
    for instance in router.instances:
        (seen,) = instance.worker.requests("/flush_cache")
        assert seen.headers["authorization"] == f"Bearer {router.config.instance_admin_key}"


def test_without_an_admin_key_the_api_key_protects(start_router: Start) -> None:
    router = start_router(2, api_key="k")
    assert router.post("/kunserve/drop").status == 401
    assert router.post("/flush_cache", Authorization="Bearer k").status == 200
    assert router.get("/kunserve/status").status == 200


def test_workers_are_listed_as_by_the_gateway(idle_router: RouterCluster) -> None:
    body = idle_router.get("/workers").json
    assert body["stats"] == {"total": 2, "healthy": 2}
    assert body["workers"][1] == {
        "id": 1,
        "url": idle_router.instances[1].worker.url,
        "plain": False,
        "is_healthy": True,
        "draining": False,
        "load": 0,
        "mode": "independent",
    }


def test_wrong_methods_and_paths(idle_router: RouterCluster) -> None:
    assert idle_router.get("/kunserve/drop").status == 405
    assert idle_router.get("/kunserve/nothing").error["code"] == "not_found"
