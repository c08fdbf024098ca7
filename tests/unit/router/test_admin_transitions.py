"""Transitions by KunServe's own API: how they end, and what is known of them afterwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from kunserve_sglang.core.messages import Prepare, Vote
from kunserve_sglang.testing.mock_member import CAPACITY
from tests.support.mock_instance import vote_no, vote_yes
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]


def refuse(router: RouterCluster, message: Prepare) -> Vote:  # noqa: ARG001 (a script)
    return vote_no(message)


def never(router: RouterCluster, message: Prepare) -> None:  # noqa: ARG001 (a script)
    return None


def late(router: RouterCluster, message: Prepare) -> Vote:
    """A yes after the router has given up and told the other member so."""
    until(lambda: router.instances[0].obeyed["Abort"])
    return vote_yes(message)


def modes(router: RouterCluster) -> list[str]:
    return [d["mode"] for d in router.status()["instances"]]


def test_drop_and_restore(router: RouterCluster) -> None:
    drop = router.post("/kunserve/drop")
    assert drop.status == 200
    event = drop.json
    assert (event["kind"], event["status"], event["instances"]) == ("drop", "committed", [0, 1])
    assert event["freed_bytes"] == 2000
    assert event["exchanged_bytes"] == 20
    assert event["duration_ms"] > 0
    until(lambda: modes(router) == ["cooperative"] * 2)
    assert router.event() == event

    plan = router.post("/kunserve/plan", {"kind": "restore"}).json
    assert [g["instances"] for g in plan["groups"]] == [[0], [1]]
    restore = router.post("/kunserve/restore", {"instances": [1]}).json
    assert (restore["kind"], restore["status"]) == ("restore", "committed")
    assert restore["epoch"] > event["epoch"]
    until(lambda: modes(router) == ["independent"] * 2)
    events = router.get("/kunserve/events").json["events"]
    assert [e["kind"] for e in events] == ["drop", "restore"]
    assert [e["kind"] for e in router.get("/kunserve/events?limit=1").json["events"]] == ["restore"]


def test_an_event_says_why(router: RouterCluster) -> None:
    for instance in router.instances:
        instance.set_load(3 * CAPACITY, running=2, waiting=4)
    until(lambda: all(d["waiting"] == 4 for d in router.status()["instances"]))
    decision = router.post("/kunserve/drop", {"tokens": 20}).json["decision"]
    assert decision["inputs"] == {
        "demand": 6 * CAPACITY,
        "capacity": 2 * CAPACITY,
        "waiting": 8,
        "largest_group": 8,
        "slots_asked": 20,
    }
    (choice,) = decision["choices"]
    assert (choice["stages"], choice["chosen"]) == (2, True)
    assert choice["slots"] >= 20
    assert choice["tpot_ms"] > 4  # four layers, a millisecond for the step and for each request
    assert choice["verdict"] == "the shortest pipelines that free enough"
    assert router.event()["decision"] == decision


def test_what_would_break_the_tpot_limit_is_declined(start_router: Start) -> None:
    router = start_router(2, tpot_limit_ms=5)
    for instance in router.instances:
        instance.set_load(3 * CAPACITY, running=2, waiting=4)
    router.put("/kunserve/policy", {"auto": True})
    until(lambda: router.event() is not None)
    event = router.event()
    assert (event["kind"], event["status"]) == ("drop", "declined")
    assert "requests queue" in event["error"]
    assert "8 requests wait" in event["reason"]
    assert event["capacity_after"] == event["capacity_before"] == 2 * CAPACITY
    (choice,) = event["decision"]["choices"]
    assert (choice["stages"], choice["chosen"]) == (2, False)
    assert event["decision"]["inputs"]["tpot_limit_ms"] == 5
    assert modes(router) == ["independent"] * 2
    answer = router.post("/kunserve/drop", {"instances": [0, 1]})
    assert (answer.status, answer.error["code"]) == (409, "no_plan")
    assert all(i.obeyed["Prepare"] == 0 for i in router.instances)


def test_drop_of_named_instances(start_router: Start) -> None:
    router = start_router(3)
    event = router.post("/kunserve/drop", {"instances": [2, 0]}).json
    assert (event["status"], event["instances"]) == ("committed", [0, 2])
    until(lambda: modes(router) == ["cooperative", "independent", "cooperative"])


@pytest.mark.parametrize("script", [refuse, never, late])
def test_a_member_that_does_not_vote_yes_aborts(impatient: RouterCluster, script: Any) -> None:
    router = impatient
    router.instances[1].on_prepare = partial(script, router)
    answer = router.post("/kunserve/drop")
    assert (answer.status, answer.json["status"]) == (200, "aborted")
    assert "instance 1" in answer.json["error"]
    assert answer.json["capacity_after"] == answer.json["capacity_before"]
    assert modes(router) == ["independent"] * 2
    until(lambda: all(i.obeyed["Abort"] == 1 for i in router.instances))
    assert all(i.obeyed["Commit"] == 0 for i in router.instances)

    router.instances[1].on_prepare = vote_yes
    until(lambda: router.post("/kunserve/drop").json["status"] == "committed")
