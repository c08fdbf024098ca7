"""One request held against its limits: what is judged, when, and by which limits."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kunserve_sglang.core.service_classes import read_classes
from kunserve_sglang.policy.service_level import ServiceLevel, StepTimes
from kunserve_sglang.router.http.answers import RequestError
from kunserve_sglang.router.http.client_request import ClientRequest, Connection
from kunserve_sglang.router.proxy.attainment import Attainment
from kunserve_sglang.router.proxy.latency import WINDOW_S, Latency, StreamTimer
from kunserve_sglang.router.proxy.promise import Promise, answer_tokens

TIMES = StepTimes(prefill=(10.0, 0.0, 1.0, 0.0, 0.0, 0.0), decode=(2.0, 0.0, 0.001))
"""A prompt takes 10 ms and one for each token, a decode step 2 ms and one for 1000 tokens."""


class Bench:
    """A clock that a test turns, and requests that are judged by it: limits of 100 and 10 ms."""

    def __init__(self, level: ServiceLevel | None = None, times: StepTimes | None = None) -> None:
        self.now = 1000.0
        self.latency = Latency(lambda: self.now)
        self.attainment = Attainment(read_classes(["slow=5000:500"]), lambda: self.now)
        self.attainment.decided_by(level or ServiceLevel(ttft_ms=100, tpot_ms=10), times)

    def request(
        self,
        path: str = "/generate",
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
        *,
        stream: bool | None = True,
    ) -> ClientRequest:
        given = [(n.lower().encode(), v.encode()) for n, v in (headers or {}).items()]
        scope = {"method": method, "path": path, "headers": given, "http_version": "1.1"}
        transport = SimpleNamespace(write=lambda _: None)
        client = SimpleNamespace(transport=transport, congested=False, answered=lambda _: None)
        connection = cast(Connection, client)
        request = ClientRequest(connection, scope, dict(given), b"", keep_alive=True)
        request.wants_stream = stream
        request.arrived = self.now
        return request

    def promise(self, request: ClientRequest) -> Promise:
        return Promise(self.attainment, request)

    def stream(self, request: ClientRequest, gaps_ms: list[float], promise: Promise) -> None:
        """The answer's chunks come after these pauses."""
        request.start(200, [])
        timer = promise.timer = StreamTimer(self.latency, request.arrived, promise.first_chunk)
        for gap in gaps_ms:
            self.now += gap / 1e3
            timer.chunk(b"data: x\n\n")

    def counts(self, name: str = "default") -> tuple[int, int]:
        """Of a class: requests that kept their limits, and that did not."""
        total = self.attainment.of(name).total
        return total[True], total[False]


@pytest.fixture
def bench() -> Bench:
    return Bench()


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
    bench: Bench, gaps_ms: list[float], counts: tuple[int, int]
) -> None:
    request = bench.request()
    promise = bench.promise(request)
    bench.stream(request, gaps_ms, promise)
    request.end()
    promise.ended(request)
    assert bench.counts() == counts


def test_a_late_first_chunk_is_seen_at_once_and_counted_once(bench: Bench) -> None:
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
    bench: Bench, said: bytes, counts: tuple[int, int]
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
    bench: Bench, tokens: int | None, ms: float, counts: tuple[int, int]
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
    bench: Bench, status: int, counts: tuple[int, int]
) -> None:
    request = bench.request()
    promise = bench.promise(request)
    request.start(status, [])
    request.end()
    promise.ended(request)
    assert bench.counts() == counts


def test_an_answer_that_is_cut_off_is_missed(bench: Bench) -> None:
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
    bench: Bench, gaps_ms: list[float], then_ms: float, counts: tuple[int, int]
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
def test_who_leaves_before_a_whole_answer_is_not_judged(bench: Bench, stream: bool | None) -> None:
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
def test_other_calls_are_not_judged(bench: Bench, path: str, method: str) -> None:
    request = bench.request(path, method=method)
    promise = bench.promise(request)
    request.start(503, [])
    request.end()
    promise.ended(request)
    assert bench.counts() == (0, 0)


def test_limits_of_a_request_go_before_those_of_its_class(bench: Bench) -> None:
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
def test_a_limit_that_is_none_is_refused(bench: Bench, header: str, given: str) -> None:
    with pytest.raises(RequestError, match=header) as refused:
        bench.promise(bench.request(headers={header: given}))
    error = refused.value
    assert (error.status, error.code, error.field) == (400, "bad_limit", header)


def test_limits_given_twice_are_refused(bench: Bench) -> None:
    request = bench.request(headers={"X-KunServe-Class": "slow"})
    request.scope["headers"] *= 2
    with pytest.raises(RequestError, match="X-KunServe-Class: one is expected"):
        bench.promise(request)


def test_an_unknown_class_is_refused_and_the_known_ones_are_named(bench: Bench) -> None:
    with pytest.raises(RequestError, match="one of default, slow is expected") as refused:
        bench.promise(bench.request(headers={"X-KunServe-Class": "fast"}))
    error = refused.value
    assert (error.status, error.code, error.field) == (400, "unknown_class", "X-KunServe-Class")


def test_unnamed_limits_grow_with_the_request() -> None:
    """Five times what one takes alone: 522 ms for 512 tokens, 2010 ms for 2000."""
    bench = Bench(ServiceLevel(), TIMES)
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
        bench = Bench(level)
        bench.attainment.decided_by(level, None)
        request = bench.request(headers=headers)
        promise = bench.promise(request)
        bench.stream(request, [200, 20], promise)
        request.end()
        promise.ended(request)
        assert bench.counts() == counts


def test_the_last_minute_is_forgotten_and_the_totals_are_not(bench: Bench) -> None:
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
