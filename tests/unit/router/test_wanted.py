"""What requests under way want of their answers, as decisions are told it."""

from __future__ import annotations

import pytest

from kunserve_sglang.policy.service_level import UNNAMED, ServiceLevel
from tests.support.promise_bench import PromiseBench

SLOW = {"X-KunServe-Class": "slow"}
TTFT = "X-KunServe-SLO-TTFT-MS"


@pytest.fixture
def bench() -> PromiseBench:
    return PromiseBench()


def wanted(bench: PromiseBench) -> dict[ServiceLevel, int]:
    return {each.level: each.requests for each in bench.attainment.wanted()}


def test_requests_count_from_when_they_are_taken_until_they_have_ended(bench: PromiseBench) -> None:
    requests = [
        bench.request(),
        bench.request(),
        bench.request(headers=SLOW),
        bench.request(headers={TTFT: "5"}),
        bench.request(headers={**SLOW, TTFT: "5"}),
    ]
    promises = [bench.promise(request) for request in requests]
    assert wanted(bench) == {}
    for promise in promises:
        promise.begins()
    assert wanted(bench) == {
        UNNAMED: 2,
        ServiceLevel(ttft_ms=5000.0, tpot_ms=500.0): 1,
        ServiceLevel(ttft_ms=5.0): 1,
        ServiceLevel(ttft_ms=5.0, tpot_ms=500.0): 1,
    }
    for request, promise in zip(requests, promises, strict=True):
        bench.stream(request, [1], promise)
        request.end()
        for _ in range(2):
            promise.ended(request)
    assert wanted(bench) == {}


def test_of_many_kinds_the_most_common_are_told(bench: PromiseBench) -> None:
    for limit in range(1, 100):
        bench.promise(bench.request(headers={TTFT: str(limit)})).begins()
    for _ in range(2):
        bench.promise(bench.request(headers=SLOW)).begins()
    found = wanted(bench)
    assert len(found) == 8
    assert found[ServiceLevel(ttft_ms=5000.0, tpot_ms=500.0)] == 2


def test_calls_that_make_no_tokens_want_nothing(bench: PromiseBench) -> None:
    bench.promise(bench.request(path="/tokenize")).begins()
    assert wanted(bench) == {}
