"""One request held against its limits: what is judged, and when."""

from __future__ import annotations

from typing import Any

import pytest

from kunserve_sglang.router.proxy.latency import WINDOW_S
from kunserve_sglang.router.proxy.promise import answer_tokens
from tests.support.promise_bench import PromiseBench


@pytest.fixture
def bench() -> PromiseBench:
    return PromiseBench()


@pytest.mark.parametrize(
    ("gaps_ms", "counts"),
    [
        ([99], (1, 0)),
        ([101], (0, 1)),
        ([99, 9, 9], (1, 0)),
        ([99, 19, 1], (1, 0)),  # on average
        ([99, 9, 12], (0, 1)),
        ([101, 1, 1], (0, 1)),
        ([], (0, 0)),
    ],
)
def test_a_stream_keeps_both_limits_or_not(
    bench: PromiseBench, gaps_ms: list[float], counts: tuple[int, int]
) -> None:
    request = bench.request()
    promise = bench.promise(request)
    bench.stream(request, gaps_ms, promise)
    request.end()
    promise.ended(request)
    assert bench.counts() == counts


def test_a_late_first_chunk_is_seen_at_once_and_counted_once(bench: PromiseBench) -> None:
    request = bench.request()
    promise = bench.promise(request)
    bench.stream(request, [150], promise)
    assert bench.counts() == (0, 1)
    request.end()
    promise.ended(request)
    assert bench.counts() == (0, 1)


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        (b'data: {"error":{"message":"The request queue is full."}}\n\n', (0, 1)),
        (b':kunserve 1\ndata: {"error": {"message": "The request queue is full."}}\n\n', (0, 1)),
        (b'data: {"error": {"message": "too long", "code": 400}}\n\n', (0, 0)),
        (b'data: {"text": "The request queue is full."}\n\n', (1, 0)),
    ],
)
def test_a_stream_that_is_a_refusal_is_no_answer(
    bench: PromiseBench, said: bytes, counts: tuple[int, int]
) -> None:
    request = bench.request()
    promise = bench.promise(request)
    bench.stream(request, [], promise)
    assert promise.timer is not None
    promise.timer.chunk(said)
    promise.timer.chunk(b"data: [DONE]\n\n")
    request.end()
    promise.ended(request)
    assert bench.counts() == counts


@pytest.mark.parametrize(("tokens", "ms", "counts"), [(10, 189, (1, 0)), (10, 191, (0, 1)),
                                                     (1, 99, (1, 0)), (0, 101, (0, 1)),
                                                     (None, 99, (0, 0))])  # fmt: skip
def test_a_whole_answer_has_the_time_of_all_its_tokens(
    bench: PromiseBench, tokens: int | None, ms: float, counts: tuple[int, int]
) -> None:
    request = bench.request(stream=False)
    promise = bench.promise(request)
    promise.whole = b"" if tokens is None else b'{"completion_tokens": %d}' % tokens
    bench.now += ms / 1e3
    request.start(200, [])
    request.end()
    promise.ended(request)
    assert bench.counts() == counts


@pytest.mark.parametrize(
    ("status", "counts"),
    [(400, (0, 0)), (404, (0, 0)), (429, (0, 1)), (500, (0, 1)), (502, (0, 1)), (503, (0, 1))],
)
def test_who_gets_no_answer_misses_limits_unless_the_request_is_at_fault(
    bench: PromiseBench, status: int, counts: tuple[int, int]
) -> None:
    request = bench.request()
    promise = bench.promise(request)
    request.start(status, [])
    request.end()
    promise.ended(request)
    assert bench.counts() == counts


def test_an_answer_that_is_cut_off_is_missed(bench: PromiseBench) -> None:
    request = bench.request()
    promise = bench.promise(request)
    bench.stream(request, [1, 1], promise)
    promise.ended(request)
    assert bench.counts() == (0, 1)


@pytest.mark.parametrize(
    ("gaps_ms", "then_ms", "counts"),
    [
        ([], 50, (0, 0)),  # nothing was due yet
        ([], 101, (0, 1)),
        ([50], 5, (1, 0)),
        ([50, 5], 5, (1, 0)),
        ([50, 25], 5, (0, 1)),
        ([50, 5, 5], 100, (0, 1)),  # it stood still
    ],
)
def test_a_client_that_leaves_counts_by_what_it_got(
    bench: PromiseBench, gaps_ms: list[float], then_ms: float, counts: tuple[int, int]
) -> None:
    request = bench.request()
    promise = bench.promise(request)
    if gaps_ms:
        bench.stream(request, gaps_ms, promise)
    bench.now += then_ms / 1e3
    request.leave()
    promise.ended(request)
    assert bench.counts() == counts


@pytest.mark.parametrize("stream", [False, None])
def test_who_leaves_before_a_whole_answer_is_not_judged(
    bench: PromiseBench, stream: bool | None
) -> None:
    """How long it would have become, nobody knows."""
    request = bench.request(stream=stream)
    promise = bench.promise(request)
    bench.now += 9
    request.leave()
    promise.ended(request)
    assert bench.counts() == (0, 0)


@pytest.mark.parametrize(
    ("path", "method"),
    [("/tokenize", "POST"), ("/v1/models", "GET"), ("/v1/embeddings", "POST"), ("/x", "POST"),
     ("/generate", "OPTIONS")],
)  # fmt: skip
def test_other_calls_are_not_judged(bench: PromiseBench, path: str, method: str) -> None:
    request = bench.request(path, method=method)
    promise = bench.promise(request)
    request.start(503, [])
    request.end()
    promise.ended(request)
    assert bench.counts() == (0, 0)


def test_the_last_minute_is_forgotten_and_the_totals_are_not(bench: PromiseBench) -> None:
    default = bench.attainment.of("default")
    for second in range(200):
        bench.now = 1000.0 + second
        for kept in (True, True, False):
            default.add(bench.now, kept=kept)
    found = bench.attainment.summary()
    assert [c.name for c in found.classes] == ["default", "slow"]
    first, second_class = found.classes
    assert (first.requests, first.kept) == (3 * WINDOW_S, 2 * WINDOW_S)
    assert first.attainment == pytest.approx(2 / 3)
    assert (first.ttft_ms, first.tpot_ms) == (100, 10)
    assert (second_class.ttft_ms, second_class.requests, second_class.attainment) == (5000, 0, None)
    bench.now += WINDOW_S + 1
    assert bench.attainment.summary().classes[0].requests == 0
    assert bench.counts() == (400, 200)


def test_lengths_of_answers_are_found() -> None:
    texts: dict[bytes, Any] = {
        b'{"usage": {"prompt_tokens": 7, "completion_tokens": 12}}': 12,
        b'[{"meta_info":{"completion_tokens":3}},{"meta_info":{"completion_tokens":9}}]': 9,
        b'{"usage":{"input_tokens":5,"output_tokens":6,"output_tokens_details":{}}}': 6,
        b'{"text": "\\"completion_tokens\\": 999"}': None,
        b'{"completion_tokens": null}': None,
        b"": None,
    }
    assert {text: answer_tokens(text) for text in texts} == texts
