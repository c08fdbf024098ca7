"""Who is gone for certain, and what the others of its group are told."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kunserve_sglang.control import health, liveness
from kunserve_sglang.control.registry import Instance
from kunserve_sglang.control.upstream import Reply
from kunserve_sglang.core.messages import Lost
from tests.support.mock_instance import MockInstance
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]


@pytest.fixture
def group(start_router: Start, monkeypatch: pytest.MonkeyPatch) -> RouterCluster:
    """Two instances that cooperate, and are asked for their health all the time."""
    monkeypatch.setattr(health, "_INTERVAL_S", 0.02)
    router = start_router(2)
    assert router.post("/kunserve/drop", {}).json["status"] == "committed"
    assert modes(router) == ["cooperative", "cooperative"]
    return router


def modes(router: RouterCluster) -> list[str]:
    return [d["mode"] for d in router.status()["instances"]]


def looked_at(instance: MockInstance) -> Callable[[], bool]:
    """Whether the router has asked it many times from now on."""
    asked = len(instance.worker.requests("/health"))
    return lambda: len(instance.worker.requests("/health")) > asked + 20


def test_survivors_are_told_and_can_drop_again(group: RouterCluster) -> None:
    survivor, dead = group.instances
    broken = survivor.layout.epoch
    dead.stop()
    until(lambda: survivor.lost)
    (lost,) = survivor.lost
    assert lost.instances == (1,)
    assert lost.broken == broken
    assert lost.epoch > broken
    until(lambda: modes(group) == ["independent", "dead"])

    group.instances[1] = group.add(1)
    until(lambda: modes(group) == ["independent", "independent"])
    assert group.post("/kunserve/drop", {}).json["status"] == "committed"
    assert survivor.layout.epoch > lost.epoch
    assert len(survivor.lost) == 1


def test_nothing_is_planned_with_what_is_left_of_a_group(start_router: Start) -> None:
    """Neither the dead nor a survivor that has not come back yet takes part."""
    router = start_router(3)
    asked = {"instances": [0, 1]}
    assert router.post("/kunserve/drop", asked).json["status"] == "committed"
    survivor, dead = router.instances[:2]
    survivor.heeds_losses = False
    dead.stop()
    until(lambda: survivor.lost)
    for kind in ("drop", "restore"):
        assert router.post(f"/kunserve/{kind}", {}).error["code"] == "no_plan"
    survivor.heeds_losses = True  # it is told again, since its status says that it has not heard
    until(lambda: modes(router) == ["independent", "dead", "independent"])
    event = router.post("/kunserve/drop", {}).json
    assert event["status"] == "committed"
    assert event["instances"] == [0, 2]
    router.instances.remove(dead)


def test_one_that_refuses_http_but_keeps_its_line_is_not_gone(group: RouterCluster) -> None:
    """As a scheduler that goes on for a moment after its server."""
    survivor, half = group.instances
    half.worker.stop()
    until(lambda: group.described(1).get("lost") == "connection refused")
    until(looked_at(survivor))
    assert not survivor.lost
    half.hang_up()
    until(lambda: survivor.lost)
    group.instances.pop()


def test_one_that_is_busy_or_stopped_is_not_gone(group: RouterCluster) -> None:
    """It neither reports nor answers /health; all its connections are there."""
    survivor, silent = group.instances
    silent.reporting = False
    silent.worker.hanging |= {"/health", "/model_info"}
    until(looked_at(survivor))
    assert not survivor.lost


def test_one_that_stands_still_for_good_is_gone_in_the_end(
    group: RouterCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may end it: its launcher stands still as well, with all of its host."""
    survivor, still = group.instances
    survivor.set_load(demand=1000)
    until(lambda: group.described(0).get("demand") == 1000)
    still.worker.hanging |= {"/health", "/model_info", "/v1/completions"}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(group.post, "/v1/completions", {})
        until(lambda: still.worker.requests("/v1/completions"))
        monkeypatch.setattr(liveness, "SILENT_AFTER_S", 0.5)
        still.reporting = False
        assert answer.result(30).status == 200
    assert "silent" in group.described(1)["lost"]
    until(lambda: survivor.lost)
    assert survivor.lost[0].instances == (1,)
    until(lambda: modes(group) == ["independent", "dead"])


def test_a_transition_ends_when_a_member_dies(start_router: Start) -> None:
    """Long before its vote is overdue."""
    router = start_router(2, vote_timeout_s=60.0)
    survivor, dead = router.instances
    dead.on_prepare = lambda _: None
    assert router.post("/kunserve/drop?wait=false", {}).status == 202
    until(lambda: dead.obeyed["Prepare"])
    dead.stop()
    until(lambda: router.event() and router.event()["status"] == "aborted")
    assert "instance 1 is gone" in router.event()["error"]
    assert not survivor.layout.cooperative
    router.instances.pop()


def test_a_new_process_under_the_number_of_a_dead_one_is_no_member(group: RouterCluster) -> None:
    """It came before anybody had looked for the old one."""
    survivor, dead = group.instances
    dead.hang_up()
    group.instances[1] = group.add(1)
    dead.worker.stop()
    until(lambda: survivor.lost)
    assert survivor.lost[0].instances == (1,)
    until(lambda: modes(group) == ["independent", "independent"])


def test_requests_to_a_host_that_has_vanished_end(
    start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections stay open for ever, as far as this host can tell."""
    router = start_router(1, queue_timeout_s=0.1)
    (vanished,) = router.instances
    vanished.worker.hanging.add("/v1/completions")

    async def no_answer(_session: object, instance: Instance, *_: object) -> Reply:
        return Reply(instance=instance.number, error="could not be reached", unreachable=True)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(router.post, "/v1/completions", {})
        until(lambda: vanished.worker.requests("/v1/completions"))
        monkeypatch.setattr(health, "ask", no_answer)
        vanished.hang_up()
        assert answer.result(30).error["code"] == "upstream_lost"
    assert router.described(0)["lost"] == "host does not answer"


class Hosts:
    """In place of `ask`: some instances are on hosts that cannot be reached now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ask = health.ask
        self._away: set[int] = set()
        monkeypatch.setattr(health, "ask", self._answer)

    def vanish(self, instance: MockInstance, number: int) -> None:
        self._away.add(number)
        instance.hang_up()

    def come_back(self) -> None:
        self._away.clear()

    async def _answer(self, session: Any, instance: Instance, *about: Any) -> Reply:
        if instance.number in self._away:
            return Reply(instance=instance.number, error="away", unreachable=True)
        return await self._ask(session, instance, *about)


def test_a_request_is_not_the_reason_why_hosts_vanish(
    start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many had it, it goes to the next; the first to take it has the least to do."""
    router, path = start_router(4), "/v1/completions"
    hosts = Hosts(monkeypatch)
    for number, instance in enumerate(router.instances):
        instance.set_load(demand=100 * number)
        until(lambda n=number: router.described(n).get("demand") == 100 * n)
    *vanishing, last = router.instances
    for instance in vanishing:
        instance.worker.hanging.add(path)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(router.post, path, {})
        for number, instance in enumerate(vanishing):
            until(lambda i=instance: i.worker.requests(path))
            hosts.vanish(instance, number)
        assert answer.result(30).status == 200
    assert len(last.worker.requests(path)) == 1


def test_an_instance_whose_host_is_back_may_have_the_request_again(
    start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, path = start_router(1), "/v1/completions"
    hosts = Hosts(monkeypatch)
    (instance,) = router.instances
    instance.worker.hanging.add(path)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(router.post, path, {})
        until(lambda: instance.worker.requests(path))
        hosts.vanish(instance, 0)
        until(lambda: not router.described(0)["in_flight"])  # its connection has been given up
        instance.worker.hanging.clear()
        hosts.come_back()
        assert answer.result(30).status == 200
    assert len(instance.worker.requests(path)) == 2


def test_one_answer_that_is_missing_is_no_loss(
    start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the router itself that has stood still."""
    router = start_router(1)
    ask, asked = health.ask, []

    async def every_other(*about: Any) -> Reply:
        asked.append(about)
        if len(asked) % 2:
            return Reply(instance=0, error="could not be reached", unreachable=True)
        return await ask(*about)

    monkeypatch.setattr(health, "ask", every_other)
    monkeypatch.setattr(health, "_INTERVAL_S", 1e9)
    until(lambda: router.instances[0].worker.requests("/health"))
    router.instances[0].hang_up()  # who ends a connection is looked after
    until(lambda: len(asked) >= 6)
    assert "lost" not in router.described(0)


def test_what_a_loss_is_called() -> None:
    losses = (Lost(epoch=2, broken=1, instances=gone) for gone in ((1,), (1, 3), ()))
    assert [lost.reason for lost in losses] == [
        "instance 1 is gone",
        "instances 1, 3 are gone",
        "the group has come apart",
    ]
