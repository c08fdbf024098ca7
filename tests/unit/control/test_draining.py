"""Instances that leave a running cluster: their group apart, their requests ended, then told."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable

import pytest

from kunserve_sglang.core.messages import Prepare, Vote
from kunserve_sglang.testing.mock_member import CAPACITY
from tests.support.mock_instance import MockInstance, vote_no, vote_yes
from tests.support.router_harness import Answer, RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]

ADMIN = {"Authorization": "Bearer admin"}


def drain(router: RouterCluster, number: int, query: str = "") -> Answer:
    return router.call("DELETE", f"/workers/{number}{query}", headers=router.reader and ADMIN)


def cooperate(router: RouterCluster) -> None:
    assert router.post("/kunserve/drop").json["status"] == "committed"
    until(lambda: {i["mode"] for i in router.status()["instances"]} == {"cooperative"})


def stream(router: RouterCluster) -> tuple[http.client.HTTPConnection, MockInstance]:
    """A request under way, and who has it."""
    connection = router.open("POST", "/generate", {"stream": True})
    until(lambda: any(i.worker.streams for i in router.instances))
    return connection, next(i for i in router.instances if i.worker.streams)


def hold_back(instance: MockInstance) -> threading.Event:
    """Its vote comes only once the event is set."""
    go = threading.Event()

    def vote(message: Prepare) -> Vote:
        assert go.wait(20)
        return Vote(call=message.call, epoch=message.transition.epoch, ok=True)

    instance.on_prepare = vote
    return go


def test_an_idle_instance_leaves_at_once(router: RouterCluster) -> None:
    answer = drain(router, 0)
    assert (answer.status, answer.json["id"], answer.json["draining"]) == (200, 0, True)
    assert [w["id"] for w in router.get("/workers").json["workers"]] == [1]
    until(lambda: router.instances[0].obeyed["Leave"] >= 1)
    assert router.get("/readiness").json == {"status": "ok", "available": 1, "expected": 1}
    for _ in range(3):
        assert router.post("/v1/completions", {}).status == 200
    assert not router.instances[0].worker.requests("/v1/completions")
    assert drain(router, 0).error["code"] == "unknown_worker"


def test_one_that_greets_again_is_told_again(router: RouterCluster) -> None:
    """Its end may have been lost on the way; it must not slip back in."""
    leaver = router.instances[0]
    assert drain(router, 0).status == 200
    until(lambda: leaver.obeyed["Leave"] >= 1)
    leaver.greet()
    until(lambda: leaver.obeyed["Leave"] >= 2)
    assert [i["id"] for i in router.status()["instances"]] == [1]


def test_a_new_process_may_take_the_number(router: RouterCluster) -> None:
    assert drain(router, 0).status == 200
    until(lambda: router.instances[0].obeyed["Leave"] >= 1)
    router.instances[0].stop()
    router.instances[0] = router.add(0)
    router.ready(2)
    assert router.get("/readiness").json["expected"] == 2


def test_requests_under_way_end_first(router: RouterCluster) -> None:
    connection, busy = stream(router)
    assert drain(router, busy.number, "?wait=false").status == 202
    assert router.described(busy.number)["draining"] is True
    assert busy.obeyed["Leave"] == 0
    for _ in range(3):
        assert router.post("/v1/completions", {}).status == 200
    assert not busy.worker.requests("/v1/completions")
    assert drain(router, busy.number).error["code"] == "drain_refused"
    assert router.get("/readiness").json == {"status": "ok", "available": 1, "expected": 1}
    busy.worker.emit(b"data: 1\n\n")
    busy.worker.finish()
    assert connection.getresponse().read() == b"data: 1\n\n"
    connection.close()
    until(lambda: busy.obeyed["Leave"] >= 1)
    assert busy.number not in {i["id"] for i in router.status()["instances"]}


def test_what_the_router_did_not_send_is_waited_for_too(router: RouterCluster) -> None:
    router.instances[0].set_load(10, running=1)
    until(lambda: router.described(0)["running"] == 1)
    assert drain(router, 0, "?timeout_s=0.1").error["code"] == "drain_timeout"
    router.instances[0].set_load(0)
    assert drain(router, 0).status == 200


def test_what_takes_too_long_puts_it_back(router: RouterCluster) -> None:
    connection, busy = stream(router)
    answer = drain(router, busy.number, "?timeout_s=0.1")
    assert (answer.status, answer.error["code"]) == (504, "drain_timeout")
    assert "1 requests are still under way" in answer.error["message"]
    assert router.described(busy.number)["draining"] is False
    assert router.get("/readiness").json["available"] == 2
    connection.close()


def test_it_ends_with_the_router(router: RouterCluster) -> None:
    """What it waits for may never come; `stop_router` looks for what is left of it."""
    connection, busy = stream(router)
    assert drain(router, busy.number, "?wait=false").status == 202
    router.stop_router()
    assert busy.obeyed["Leave"] == 0
    connection.close()


def test_the_group_comes_apart_first(router: RouterCluster) -> None:
    cooperate(router)
    assert drain(router, 1).status == 200
    event = router.event()
    assert (event["kind"], event["status"]) == ("restore", "committed")
    assert event["reason"] == "instance 1 leaves"
    until(lambda: router.described(0)["mode"] == "independent")
    assert router.described(0)["slots"]["capacity"] == CAPACITY


def test_somebody_waits_for_the_group_of_one_that_leaves(router: RouterCluster) -> None:
    """And for no other: it may take its time, and none from requests."""
    seen: list[Prepare] = []

    def vote(message: Prepare) -> Vote:
        seen.append(message)
        return vote_yes(message)

    router.instances[0].on_prepare = vote
    cooperate(router)
    assert router.post("/kunserve/restore").json["status"] == "committed"
    cooperate(router)
    assert not any(message.transition.urgent for message in seen)
    seen.clear()
    assert drain(router, 1).status == 200
    assert seen
    assert all(message.transition.urgent for message in seen)


def test_a_refused_restore_keeps_it(router: RouterCluster) -> None:
    cooperate(router)
    router.instances[0].on_prepare = vote_no
    answer = drain(router, 1)
    assert (answer.status, answer.error["code"]) == (409, "drain_refused")
    assert "instance 0 refused: not now" in answer.error["message"]
    assert router.described(1)["draining"] is False
    assert router.instances[1].obeyed["Leave"] == 0


def test_a_group_that_holds_too_much_stays(router: RouterCluster) -> None:
    cooperate(router)
    router.instances[0].set_load(2 * CAPACITY, used=2 * CAPACITY, running=1)
    until(lambda: router.described(0)["running"] == 1)
    for query in ("", "?wait=false"):
        answer = drain(router, 1, query)
        assert (answer.status, answer.error["code"]) == (409, "no_plan")
        assert "would be left" in answer.error["message"]
    assert router.described(1)["draining"] is False


def test_a_running_transition_goes_first(router: RouterCluster) -> None:
    cooperate(router)
    go = hold_back(router.instances[0])
    assert router.post("/kunserve/restore?wait=false").status == 202
    answer = drain(router, 1, "?timeout_s=0.1")
    assert (answer.status, answer.error["code"]) == (409, "transition_running")
    assert router.described(1)["draining"] is False
    assert drain(router, 1, "?wait=false").status == 202
    for _ in range(3):
        assert router.post("/v1/completions", {}).status == 200
    assert not router.instances[1].worker.requests("/v1/completions"), "it gets no new ones"
    go.set()
    until(lambda: router.instances[1].obeyed["Leave"] >= 1)
    assert router.event()["kind"] == "restore"


def test_one_that_is_about_to_join_a_group_does_not_leave_it_in_the_middle(
    router: RouterCluster,
) -> None:
    go = hold_back(router.instances[0])
    assert router.post("/kunserve/drop?wait=false").status == 202
    until(lambda: router.status()["transition"] is not None)
    assert drain(router, 1, "?wait=false").status == 202
    assert router.described(1)["draining"] is True
    assert router.instances[1].obeyed["Leave"] == 0
    router.instances[0].on_prepare = vote_yes
    go.set()
    until(lambda: router.instances[1].obeyed["Leave"] >= 1)
    events = [e["kind"] for e in router.get("/kunserve/events").json["events"]]
    assert sorted(events) == ["drop", "restore"]
    assert router.described(0)["mode"] == "independent"


def test_plans_leave_out_who_leaves(start_router: Start) -> None:
    router = start_router(3)
    connection, busy = stream(router)
    assert drain(router, busy.number, "?wait=false").status == 202
    others = sorted({0, 1, 2} - {busy.number})
    assert router.post("/kunserve/plan").json["instances"] == others
    answer = router.post("/kunserve/drop", {"instances": [0, 1, 2]})
    assert (answer.status, answer.error["code"]) == (409, "no_plan")
    assert f"[{busy.number}] are not available" in answer.error["message"]
    connection.close()


def test_a_lost_instance_is_forgotten_at_once(router: RouterCluster) -> None:
    router.instances[0].stop()
    until(lambda: router.post("/v1/completions", {}).status == 200 and router.described(0)["lost"])
    assert drain(router, 0).status == 200
    assert router.get("/readiness").status == 200
    router.instances.pop(0)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/workers/x", "id"),
        ("/workers/0?wait=perhaps", "wait"),
        ("/workers/0?timeout_s=-1", "timeout_s"),
        ("/workers/0?timeout_s=1e9", "timeout_s"),
        ("/workers/0?timeout_s=soon", "timeout_s"),
    ],
)
def test_bad_input_changes_nothing(idle_router: RouterCluster, path: str, field: str) -> None:
    answer = idle_router.call("DELETE", path)
    assert (answer.status, answer.error["field"]) == (422, field)
    assert idle_router.described(0)["draining"] is False


def test_draining_needs_the_admin_key(start_router: Start) -> None:
    router = start_router(2, admin_api_key="admin", read_api_key="read")
    for key in ({}, router.reader):
        answer = router.call("DELETE", "/workers/0", headers=key)
        assert (answer.status, answer.error["code"]) == (401, "admin_key_required")
    assert router.described(0)["draining"] is False
    assert drain(router, 0).status == 200
