"""TTFT and TPOT: what is measured, over which time, and where it can be read."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from kunserve_sglang.router.proxy.latency import WINDOW_S, Latency, StreamTimer
from tests.support.mock_worker import Canned
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until
from tests.unit.router.test_metrics import scrape, value

Start = Callable[..., RouterCluster]


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def stream(latency: Latency, clock: FakeClock, gaps: list[float]) -> None:
    """One answer whose chunks come after these pauses."""
    timer = StreamTimer(latency, clock.now, lambda *_: None)
    for gap in gaps:
        clock.now += gap
        timer.chunk(b"data: x")
    timer.end()


def test_without_answers_there_is_nothing_to_say(clock: FakeClock) -> None:
    nothing = {"p50": None, "p90": None, "p99": None}
    assert msgspec.to_builtins(Latency(clock).summary()) == {
        "ttft_ms": nothing,
        "tpot_ms": nothing,
        "samples": 0,
        "window_s": WINDOW_S,
    }


def test_first_chunk_and_pace(clock: FakeClock) -> None:
    latency = Latency(clock)
    stream(latency, clock, [0.5, 0.01, 0.03])
    summary = latency.summary()
    assert summary.samples == 1
    assert summary.ttft_ms.p50 == pytest.approx(500)
    assert summary.tpot_ms.p99 == pytest.approx(20)


@pytest.mark.parametrize(("gaps", "samples"), [([], 0), ([0.2], 1)])
def test_one_chunk_has_no_pace(clock: FakeClock, gaps: list[float], samples: int) -> None:
    latency = Latency(clock)
    stream(latency, clock, gaps)
    assert latency.summary().samples == samples
    assert latency.summary().tpot_ms.p50 is None


def test_quantiles_are_nearest_ranks(clock: FakeClock) -> None:
    latency = Latency(clock)
    for hundredth in range(100, 0, -1):
        latency.first_chunk(clock.now, hundredth / 100)
    quantiles = latency.summary().ttft_ms
    assert (quantiles.p50, quantiles.p90, quantiles.p99) == (
        pytest.approx(500),
        pytest.approx(900),
        pytest.approx(990),
    )


def test_quantiles_forget_and_histograms_do_not(clock: FakeClock) -> None:
    latency = Latency(clock)
    stream(latency, clock, [7.0, 0.1])
    clock.now += WINDOW_S - 0.05
    assert latency.summary().samples == 0
    assert latency.summary().tpot_ms.p50 == pytest.approx(100)
    clock.now += 1
    assert latency.summary().tpot_ms.p50 is None
    (ttft,) = latency.ttft_seconds.collect()
    counts = {s.labels["le"]: s.value for s in ttft.samples if s.name.endswith("_bucket")}
    assert (counts["6.0"], counts["12.0"]) == (0, 1)


def test_streams_are_measured_as_they_pass(start_router: Start) -> None:
    router = start_router(1)
    worker = router.instances[0].worker
    assert value(scrape(router), "kunserve:ttft_seconds_count") == 0
    connection = router.open("POST", "/generate", {"stream": True})
    until(lambda: worker.streams)
    worker.emit(b"data: 1\n\n")
    response = connection.getresponse()
    response.read1(100)
    # Long answers count from their first token on.
    assert router.status()["latency"]["samples"] == 1
    assert router.status()["latency"]["tpot_ms"]["p50"] is None
    worker.emit(b"data: 2\n\n")
    worker.finish()
    response.read()
    connection.close()
    until(lambda: router.status()["latency"]["tpot_ms"]["p50"])
    latency = router.status()["latency"]
    assert latency["samples"] == 1
    assert 0 < latency["ttft_ms"]["p50"] == latency["ttft_ms"]["p99"] < 20_000
    samples = scrape(router)
    assert value(samples, "kunserve:ttft_seconds_count") == 1
    assert value(samples, "kunserve:tpot_seconds_count") == 1
    assert value(samples, "kunserve:tpot_seconds_bucket", le="+Inf") == 1
    assert not any(name.endswith("_created") for name, _ in samples)


def test_other_answers_are_not_measured(start_router: Start) -> None:
    router = start_router(1)
    worker = router.instances[0].worker
    worker.answers["/v1/completions"] = Canned({"text": "whole"})
    events = {"Content-Type": "text/event-stream"}
    worker.answers["/v1/chat/completions"] = Canned("data: busy\n\n", 503, events)
    assert router.post("/v1/completions", {}).status == 200
    assert router.post("/v1/chat/completions", {}).status == 503
    assert router.status()["latency"]["samples"] == 0
