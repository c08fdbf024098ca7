"""Busy is not dead, and gone is noticed at once: instances and plain servers alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest

from kunserve_sglang.control import control_plane, health, liveness
from kunserve_sglang.control.registry import Registry
from kunserve_sglang.testing.mock_member import CAPACITY
from tests.support.background import Background
from tests.support.mock_worker import Canned, MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]


@pytest.fixture
def plain() -> Iterator[MockWorker]:
    background = Background()
    worker = MockWorker(background)
    yield worker
    worker.stop()
    background.stop()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that serve are asked all the time, and have little time to answer."""
    monkeypatch.setattr(health, "_INTERVAL_S", 0.02)
    monkeypatch.setattr(health, "HEALTH_TIMEOUT_S", 0.05)


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that serve are not asked again: what is noticed, is noticed without."""
    monkeypatch.setattr(health, "_INTERVAL_S", 1000.0)


def keeps_busy(worker: MockWorker) -> None:
    """`/health` waits for the model from now on; the test's stream never ends."""
    worker.hanging.add("/health")


@pytest.mark.usefixtures("often")
def test_an_instance_in_a_long_step_is_not_lost(
    start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither reports nor answers /health; its HTTP process does answer."""
    seconds = 0.0
    monkeypatch.setattr(
        control_plane, "Registry", lambda count, model, _: Registry(count, model, lambda: seconds)
    )
    router = start_router(1)
    busy = router.instances[0]
    busy.reporting = False
    monkeypatch.setattr(liveness, "SILENT_AFTER_S", 0.5)
    keeps_busy(busy.worker)
    for _ in range(20):
        # Only one question is under way, so what has been answered is two steps old at most.
        asked = len(busy.worker.requests("/model_info"))
        seconds += 0.2
        until(lambda asked=asked: len(busy.worker.requests("/model_info")) > asked)
        assert "lost" not in router.described(0)
    assert router.post("/v1/completions", {}).status == 200


@pytest.mark.usefixtures("seldom")
def test_whether_it_is_there_is_asked_by_a_new_connection_each_time(
    start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was kept would say of a vanished host what it says of a busy process: nothing."""
    seconds = 0.0
    monkeypatch.setattr(
        control_plane, "Registry", lambda count, model, _: Registry(count, model, lambda: seconds)
    )
    router = start_router(1)
    worker = router.instances[0].worker
    router.instances[0].reporting = False

    def asked_often() -> bool:
        nonlocal seconds
        seconds += 0.05  # not at a stroke: an answer on its way would count as one of afterwards
        return len(worker.requests("/model_info")) >= 4

    until(asked_often)
    kept = {seen.port for seen in worker.requests("/health")}
    ports = [seen.port for seen in worker.requests("/model_info")]
    assert len({*kept, *ports}) == len(kept) + len(ports)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("status", [503, 500])
def test_a_busy_plain_server_is_not_lost(
    start_router: Start, plain: MockWorker, status: int
) -> None:
    router = start_router(0)
    number = router.post("/workers", {"url": plain.url}).json["id"]
    until(lambda: router.described(number)["serving"])
    plain.answers["/health"] = Canned("", status)
    asked = len(plain.requests("/health"))
    until(lambda: len(plain.requests("/health")) > asked + 10)
    keeps_busy(plain)
    asked = len(plain.requests("/health"))
    until(lambda: len(plain.requests("/health")) > asked + 5)
    assert "lost" not in router.described(number)
    assert router.post("/v1/completions", {}).status == 200


@pytest.mark.usefixtures("seldom")
def test_an_instance_that_ends_is_noticed_without_asking(start_router: Start) -> None:
    router = start_router(2)
    router.instances.pop(0).stop()
    until(lambda: router.described(0).get("lost") == "connection refused")
    assert router.get("/readiness").status == 503
    assert "lost" not in router.described(1)


@pytest.mark.usefixtures("often")
def test_a_plain_server_that_ends_is_noticed(start_router: Start, plain: MockWorker) -> None:
    router = start_router(0)
    number = router.post("/workers", {"url": plain.url}).json["id"]
    until(lambda: router.described(number)["serving"])
    plain.stop()
    until(lambda: router.described(number).get("lost") == "connection refused")
    plain.start()
    until(lambda: "lost" not in router.described(number))


@pytest.mark.usefixtures("seldom")
def test_an_instance_is_taken_back_when_it_returns(start_router: Start) -> None:
    router = start_router(2)
    router.instances[0].stop()
    until(lambda: router.described(0).get("lost"))
    router.instances[0] = router.add(0)
    router.ready(2)
    until(lambda: "lost" not in router.described(0))


def test_an_instance_that_is_stalled_gets_no_requests_until_it_moves(start_router: Start) -> None:
    router = start_router(2)
    stalled = router.instances[0]
    stalled.load = msgspec.structs.replace(stalled.load, stalled=True)
    until(lambda: router.described(0)["stalled"])
    for _ in range(4):
        assert router.post("/v1/completions", {"prompt": "to whom?"}).status == 200
    assert not stalled.worker.requests("/v1/completions")
    assert len(router.instances[1].worker.requests("/v1/completions")) == 4
    stalled.load = msgspec.structs.replace(stalled.load, stalled=False)
    until(lambda: not router.described(0)["stalled"])
    assert router.get("/readiness").status == 200


def overloaded(router: RouterCluster) -> None:
    """The controller has a reason to drop, and may."""
    assert router.put("/kunserve/policy", {"auto": True}).status == 200
    for instance in router.instances:
        instance.set_load(10 * CAPACITY, used=CAPACITY, waiting=5)


def test_silence_is_noticed_while_the_controller_waits_for_votes(
    start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "SILENT_AFTER_S", 0.5)
    router = start_router(3, vote_timeout_s=20.0)
    for instance in router.instances:
        instance.on_prepare = lambda _: None
    overloaded(router)
    until(lambda: router.status()["transition"] is not None)
    router.instances[2].reporting = False
    until(lambda: "silent" in router.described(2).get("lost", ""))
    assert router.status()["transition"] is not None


def test_a_planner_that_fails_ends_nothing(
    start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[object] = []

    def plan(*_: object) -> None:
        failed.append(1)
        raise ZeroDivisionError("a plan")

    monkeypatch.setattr("kunserve_sglang.policy.controller.Controller.plan", plan)
    router = start_router(2)
    overloaded(router)
    until(lambda: len(failed) > 1)
    assert router.get("/readiness").status == 200


@pytest.mark.usefixtures("often")
def test_one_whose_scheduler_says_nothing_gets_no_requests_though_its_server_answers(
    start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = start_router(2)
    quiet = router.instances[0]
    quiet.reporting = False
    monkeypatch.setattr(liveness, "QUIET_AFTER_S", 0.5)
    until(lambda: router.described(0)["stalled"])
    assert "lost" not in router.described(0)
    for _ in range(4):
        assert router.post("/v1/completions", {"prompt": "to whom?"}).status == 200
    assert not quiet.worker.requests("/v1/completions")
    other = router.instances[1]
    other.reporting = False
    until(lambda: router.described(1)["stalled"])
    until(lambda: router.post("/v1/completions").status == 200)  # it may be a long step of both
    other.reporting = True
    quiet.reporting = True
    until(lambda: not router.described(0)["stalled"])
