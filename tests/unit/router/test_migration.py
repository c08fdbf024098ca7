"""Streams that a drain moves to another instance, and those that it has to wait for."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.recorded_streams import asked, begun, event, with_record
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]


def test_a_drain_that_migrates_waits_for_no_stream(router: RouterCluster) -> None:
    with begun(router, with_record(1)) as stream:
        stream.gets(event(1))
        number = stream.owner.number
        path = f"/workers/{number}?timeout_s=20&wait=false&migrate=true"
        assert router.call("DELETE", path).status == 202
        other = stream.moved(stream.owner).worker
        assert asked(other)[1].endswith(b"record 1\n")
        until(lambda: [i["id"] for i in router.status()["instances"]] == [1 - number])
        other.emit(with_record(2) + b"data: [DONE]\n\n")
        other.finish()
        assert stream.response.read() == event(2) + b"data: [DONE]\n\n"
    assert b"kunserve:answers_cut_total 0.0" in router.get("/metrics").body


def test_what_cannot_move_ends_where_it_is(router: RouterCluster) -> None:
    for instance in router.instances:
        instance.worker.journals = False
    with begun(router, event(1)) as stream:
        stream.gets(event(1))
        path = f"/workers/{stream.owner.number}?timeout_s=0.3&migrate=true"
        assert router.call("DELETE", path).error["code"] == "drain_timeout"
        stream.owner.worker.emit(event(2))
        stream.owner.worker.finish()
        assert stream.response.read() == event(2)


def test_nothing_moves_from_the_last_instance(start_router: Start) -> None:
    router = start_router(1)
    with begun(router, with_record(1)) as stream:
        stream.gets(event(1))
        path = "/workers/0?timeout_s=0.3&migrate=true"
        assert router.call("DELETE", path).error["code"] == "drain_timeout"
        stream.owner.worker.finish()
        assert stream.response.read() == b""


def test_migrate_is_true_or_false(idle_router: RouterCluster) -> None:
    answer = idle_router.call("DELETE", "/workers/0?migrate=often")
    assert (answer.status, answer.error["field"]) == (422, "migrate")
