"""Recordings: what an instance's tracer keeps, and what the admin API makes of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kunserve_sglang.instance.parts import trace
from kunserve_sglang.instance.parts.trace import Tracer
from tests.support.router_harness import RouterCluster

Start = Callable[..., RouterCluster]


def test_totals_are_kept_always_and_spans_on_request() -> None:
    tracer = Tracer()
    with tracer.span("step"):
        pass
    assert tracer.stop() == ([], 0)
    tracer.start()
    tracer.add("step", 5.0, 7.0, {"requests": 3})
    with tracer.span("wait", owner=1):
        pass
    spans, lost = tracer.stop()
    assert [(s.name, s.details) for s in spans] == [
        ("step", {"requests": 3}),
        ("wait", {"owner": 1}),
    ]
    assert (spans[0].start, spans[0].duration, lost) == (5.0, 2.0, 0)
    assert tracer.seconds["step"] >= 2.0
    tracer.start()
    assert tracer.stop() == ([], 0)


def test_a_span_that_ends_in_an_error_counts_too() -> None:
    tracer = Tracer()
    tracer.start()
    with pytest.raises(ValueError, match="inside"), tracer.span("step"):
        raise ValueError("inside")
    assert [s.name for s in tracer.stop()[0]] == ["step"]


def test_a_long_recording_says_what_it_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MAX_SPANS", 3)
    tracer = Tracer()
    tracer.start()
    for number in range(5):
        tracer.add("step", number, number + 1, {})
    spans, lost = tracer.stop()
    assert (len(spans), lost) == (3, 2)


def test_a_recording_comes_as_a_chrome_trace(idle_router: RouterCluster) -> None:
    answer = idle_router.post("/kunserve/trace", {"seconds": 0.01})
    assert answer.status == 200, answer.body
    events = answer.json["traceEvents"]
    named = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert named == {0: "instance 0", 1: "instance 1"}
    spans = [e for e in events if e["ph"] == "X"]
    assert [(e["pid"], e["name"], e["ts"], e["dur"], e["args"]) for e in spans] == [
        (0, "step", 0.0, 500_000.0, {"n": 1}),
        (1, "step", 1_000_000.0, 500_000.0, {"n": 1}),
    ]
    details = answer.json["otherData"]
    assert details.pop("began") > 0
    assert details == {"lost_spans": 0}


def test_a_recording_of_some_instances(idle_router: RouterCluster) -> None:
    answer = idle_router.post("/kunserve/trace", {"seconds": 0.01, "instances": [1]})
    assert {e["pid"] for e in answer.json["traceEvents"]} == {1}
    answer = idle_router.post("/kunserve/trace", {"instances": [7]})
    assert answer.status == 422
    assert answer.error["code"] == "unknown_instance"


@pytest.mark.parametrize("seconds", [0, -1, 61, "long"])
def test_a_recording_has_bounds(idle_router: RouterCluster, seconds: object) -> None:
    answer = idle_router.post("/kunserve/trace", {"seconds": seconds})
    assert answer.status == 422
    assert answer.error["field"] == "seconds"


def test_one_recording_at_a_time(idle_router: RouterCluster) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(idle_router.post, "/kunserve/trace", {"seconds": 1}) for _ in range(2)]
    assert sorted(f.result().status for f in both) == [200, 409]
    assert idle_router.post("/kunserve/trace", {"seconds": 0.01}).status == 200
