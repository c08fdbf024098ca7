"""By which limits a request is judged: its own, those of its class, or those of all."""

from __future__ import annotations

import pytest

from kunserve_sglang.policy.service_level import ServiceLevel, StepTimes
from kunserve_sglang.router.http.answers import RequestError
from tests.support.promise_bench import PromiseBench

TIMES = StepTimes(prefill=(10.0, 0.0, 1.0, 0.0, 0.0, 0.0), decode=(2.0, 0.0, 0.001))
"""A prompt takes 10 ms and one for each token, a decode step 2 ms and one for 1000 tokens."""


@pytest.fixture
def bench() -> PromiseBench:
    return PromiseBench()


def test_limits_of_a_request_go_before_those_of_its_class(bench: PromiseBench) -> None:
    slow, patient = {"X-KunServe-Class": "slow"}, {"X-KunServe-SLO-TTFT-MS": "7000"}
    for headers, gaps_ms, name, counts in (
        (slow, [4000, 400], "slow", (1, 0)),
        ({"X-KunServe-Class": " slow "}, [6000], "slow", (1, 1)),
        (slow | patient, [6000, 400], "slow", (2, 1)),
        (slow | patient, [1, 600], "slow", (2, 2)),
        ({"X-KunServe-SLO-TPOT-MS": "0.5"}, [1, 1], "default", (0, 1)),
        ({"X-KunServe-Class": "default"}, [1, 1], "default", (1, 1)),
    ):
        request = bench.request(headers=headers)
        promise = bench.promise(request)
        bench.stream(request, list(map(float, gaps_ms)), promise)
        request.end()
        promise.ended(request)
        assert bench.counts(name) == counts, headers


@pytest.mark.parametrize("header", ["X-KunServe-SLO-TTFT-MS", "X-KunServe-SLO-TPOT-MS"])
@pytest.mark.parametrize("given", ["0", "-1", "", "soon", "nan", "inf", "1e9", "1, 2"])
def test_a_limit_that_is_none_is_refused(bench: PromiseBench, header: str, given: str) -> None:
    with pytest.raises(RequestError, match=header) as refused:
        bench.promise(bench.request(headers={header: given}))
    error = refused.value
    assert (error.status, error.code, error.field) == (400, "bad_limit", header)


def test_limits_given_twice_are_refused(bench: PromiseBench) -> None:
    request = bench.request(headers={"X-KunServe-Class": "slow"})
    request.scope["headers"] *= 2
    with pytest.raises(RequestError, match="X-KunServe-Class: one is expected"):
        bench.promise(request)


def test_an_unknown_class_is_refused_and_the_known_ones_are_named(bench: PromiseBench) -> None:
    with pytest.raises(RequestError, match="one of default, slow is expected") as refused:
        bench.promise(bench.request(headers={"X-KunServe-Class": "fast"}))
    error = refused.value
    assert (error.status, error.code, error.field) == (400, "unknown_class", "X-KunServe-Class")


def test_unnamed_limits_grow_with_the_request() -> None:
    """Five times what one takes alone: 522 ms for 512 tokens, 2010 ms for 2000."""
    bench = PromiseBench(ServiceLevel(), TIMES)
    for prompt, ttft_ms, counts in ((0, 2600, (1, 0)), (0, 2620, (1, 1)), (2000, 10_000, (2, 1))):
        request = bench.request()
        promise = bench.promise(request)
        promise.prompt = prompt
        bench.stream(request, [ttft_ms], promise)
        request.end()
        promise.ended(request)
        assert bench.counts() == counts


def test_where_nothing_is_promised_nothing_is_missed() -> None:
    for level, headers, counts in (
        (ServiceLevel(), {}, (0, 0)),
        (ServiceLevel(ttft_ms=100), {}, (0, 1)),
        (ServiceLevel(), {"X-KunServe-Class": "slow"}, (0, 0)),
        (ServiceLevel(), {"X-KunServe-SLO-TPOT-MS": "5"}, (0, 1)),
    ):
        bench = PromiseBench(level)
        bench.attainment.decided_by(level, None)
        request = bench.request(headers=headers)
        promise = bench.promise(request)
        bench.stream(request, [200, 20], promise)
        request.end()
        promise.ended(request)
        assert bench.counts() == counts
