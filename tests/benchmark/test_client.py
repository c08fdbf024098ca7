"""The load generator against a server in this process. Only counts and order are asserted."""

from __future__ import annotations

import asyncio
import copy
import json

from aiohttp import web

from benchmark.client import COMPLETIONS, GENERATE, Api, LoadGenerator, Progress, RequestResult
from benchmark.workload import Request
from tests.support.serving import Handler, serving


def event(tokens: int, **fields: object) -> bytes:
    data = {"text": "x" * tokens, "meta_info": {"completion_tokens": tokens}, **fields}
    return f"data: {json.dumps(data)}\n\n".encode()


def serve(
    handler: Handler, requests: list[Request], api: Api = GENERATE
) -> tuple[list[RequestResult], list[Progress]]:
    """Send `requests` to `handler`; also what the progress callback saw."""
    seen: list[Progress] = []

    async def run() -> list[RequestResult]:
        async with serving(handler) as url:
            generator = LoadGenerator(
                url, api=api, timeout_s=20, on_progress=lambda p: seen.append(copy.copy(p))
            )
            return await generator.run(requests)

    return asyncio.run(run()), seen


async def stream(request: web.Request, chunks: list[bytes]) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for chunk in chunks:
        await response.write(chunk)
        await asyncio.sleep(0.01)  # an event a read
    return response


def one(handler: Handler, output_len: int = 4) -> RequestResult:
    results, _ = serve(handler, [Request(0.0, "hello", 1, output_len)])
    return results[0]


def test_requests_are_sent_in_their_order_and_measured() -> None:
    bodies: list[dict[str, object]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        return await stream(request, [event(1), event(2), event(4), b"data: [DONE]\n\n"])

    requests = [Request(0.2, (5, 6), 2, 4), Request(0.0, "hello", 1, 4)]
    results, seen = serve(handler, requests)

    assert [r.index for r in results] == [0, 1]
    assert [("text" in b, "input_ids" in b) for b in bodies] == [(True, False), (False, True)]
    assert bodies[1]["input_ids"] == [5, 6]
    assert bodies[0]["sampling_params"] == {
        "max_new_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
    }
    assert results[1].sent_s < results[0].sent_s
    for result in results:
        assert result.ok
        assert result.output_tokens == 4
        assert len(result.itl_s) == 3
        assert 0 < result.ttft_s < result.e2e_s
    last = seen[-1]
    assert (last.total, last.sent, last.completed) == (2, 2, 2)
    assert (last.failed, last.queued, last.streaming) == (0, 0, 0)


def test_completions_count_tokens_by_what_their_events_say() -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append((request.path, await request.json()))
        events = [
            {"choices": [{"text": "x"}], "usage": {"completion_tokens": tokens}}
            for tokens in (1, 2, 4)
        ]
        last = {"choices": [], "usage": {"completion_tokens": 4}}
        lines = [f"data: {json.dumps(each)}\n\n".encode() for each in (*events, last)]
        return await stream(request, [*lines, b"data: [DONE]\n\n"])

    results, _ = serve(handler, [Request(0.0, (5, 6), 2, 4)], COMPLETIONS)
    assert results[0].ok, results[0].error
    assert len(results[0].itl_s) == 3
    ((path, body),) = asked
    assert path == "/v1/completions"
    assert body["prompt"] == [5, 6]
    assert body["max_tokens"] == 4
    assert body["ignore_eos"] is True


def test_tokens_of_one_event_share_its_time() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, [event(2), event(2), event(5), b"data: [DONE]\n\n"])

    result = one(handler, output_len=5)

    assert result.ok
    assert result.itl_s[0] == 0.0
    assert len(set(result.itl_s[1:])) == 1
    assert len(result.itl_s) == 4


def test_all_requests_are_in_flight_at_once() -> None:
    waiting: list[web.Request] = []
    everybody = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        waiting.append(request)
        if len(waiting) == 150:
            everybody.set()
        await everybody.wait()
        return await stream(request, [event(1), b"data: [DONE]\n\n"])

    results, seen = serve(handler, [Request(0.0, "hello", 1, 1)] * 150)

    assert all(r.ok for r in results)
    assert max(p.queued for p in seen) == 150


def test_a_refusal_is_a_failure() -> None:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": "busy"}, status=503)

    results, seen = serve(handler, [Request(0.0, "hello", 1, 4)] * 3)

    assert all(r.error.startswith("HTTP 503") for r in results)
    assert seen[-1].failed == 3


def test_a_short_answer_is_a_failure() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, [event(1), event(3), b"data: [DONE]\n\n"])

    assert one(handler).error == "answered 3 of 4 tokens"


def test_a_stream_that_just_ends_is_a_failure() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, [event(1), event(4)])

    assert one(handler).error == "the stream ended without [DONE]"


def test_a_connection_that_breaks_is_a_failure() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = await stream(request, [event(1)])
        assert request.transport is not None
        request.transport.abort()
        return response

    result = one(handler)

    assert not result.ok
    assert result.output_tokens == 1


def test_an_error_event_is_a_failure() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        error = b'data: {"error": {"message": "out of slots"}}\n\n'
        return await stream(request, [event(1), error, b"data: [DONE]\n\n"])

    assert "out of slots" in one(handler).error


def test_an_abort_is_a_failure() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        reason = {"type": "abort", "message": "shutting down"}
        meta = {"completion_tokens": 2, "finish_reason": reason}
        return await stream(request, [event(1), event(2, meta_info=meta)])

    assert one(handler).error == "aborted: shutting down"
