"""Open-loop load: every request is sent when its time has come, however busy the server is."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmark.workload import Request

_READ_BUFFER = 4 << 20
"""An event carries all of the text so far; aiohttp refuses lines longer than its buffer."""


@dataclass(slots=True)
class RequestResult:
    """What became of one request. Times are seconds since the run began; empty `error`: success.

    `itl_s` has one entry for each token but the first. Tokens that arrive in one event share the
    time since the event before, as in `sglang.bench_serving`; `gaps_s` has the undivided times
    between events, so that no stall is hidden in them.
    """

    index: int
    prompt_len: int
    sent_s: float
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    output_tokens: int = 0
    itl_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first."""
        return (self.e2e_s - self.ttft_s) / max(1, self.output_tokens - 1)


@dataclass(slots=True)
class Progress:
    """Requests so far; `streaming` ones have their first token and not their last."""

    total: int
    sent: int = 0
    streaming: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def queued(self) -> int:
        """Sent, and without a first token."""
        return self.sent - self.streaming - self.completed - self.failed


class _RequestFailed(Exception):
    """The server answered, but not with what was asked for."""


@dataclass(frozen=True, slots=True)
class Api:
    """How a request is asked for, and how many tokens an event of its stream says there are."""

    path: str
    body: Callable[[Request], dict[str, Any]]
    tokens_so_far: Callable[[Mapping[str, Any]], int]


def _generation(request: Request) -> dict[str, Any]:
    text = isinstance(request.prompt, str)
    return {
        "text" if text else "input_ids": request.prompt if text else list(request.prompt),
        "sampling_params": {
            "max_new_tokens": request.output_len,
            "temperature": 0,
            "ignore_eos": True,
        },
        "stream": True,
    }


def _generated(event: Mapping[str, Any]) -> int:
    meta = event.get("meta_info", {})
    reason = meta.get("finish_reason") or {}
    if reason.get("type") == "abort":
        raise _RequestFailed(f"aborted: {reason.get('message', '')}"[:200])
    return int(meta.get("completion_tokens", 0))


def _completion(request: Request) -> dict[str, Any]:
    prompt = request.prompt
    return {
        "model": MODEL_NAME,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": request.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def _completed(event: Mapping[str, Any]) -> int:
    return int((event.get("usage") or {}).get("completion_tokens", 0))


MODEL_NAME = "model"
"""What servers have to call theirs that want to be asked for it by name."""

GENERATE = Api("/generate", _generation, _generated)
"""SGLang's own."""

COMPLETIONS = Api("/v1/completions", _completion, _completed)
"""OpenAI's, as SGLang and vLLM have extended it."""


class LoadGenerator:
    """Sends a workload to one URL and measures every stream."""

    def __init__(
        self,
        url: str,
        *,
        api: Api = GENERATE,
        timeout_s: float = 600.0,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """`timeout_s` bounds one request; `on_progress` runs on the event loop at every change."""
        self._api = api
        self._url = url + api.path
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._on_progress = on_progress
        self._progress = Progress(0)
        self._origin = 0.0

    @property
    def origin(self) -> float:
        """Time 0 of the latest run, in seconds of `time.perf_counter`."""
        return self._origin

    async def run(self, requests: Sequence[Request]) -> list[RequestResult]:
        """Send all requests and wait for all answers; results are in the order of `requests`."""
        self._progress = Progress(len(requests))
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connector, timeout=self._timeout, read_bufsize=_READ_BUFFER
        ) as session:
            self._origin = time.perf_counter()
            sending = (self._send(session, i, request) for i, request in enumerate(requests))
            return await asyncio.gather(*sending)

    async def _send(
        self, session: aiohttp.ClientSession, index: int, request: Request
    ) -> RequestResult:
        await asyncio.sleep(self._origin + request.arrival_s - time.perf_counter())
        started = time.perf_counter()
        result = RequestResult(index, request.prompt_len, sent_s=started - self._origin)
        self._progress.sent += 1
        self._report()
        try:
            await self._stream(session, request, result, started)
            if result.output_tokens != request.output_len:
                raise _RequestFailed(
                    f"answered {result.output_tokens} of {request.output_len} tokens"
                )
        except (_RequestFailed, aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            result.error = f"{type(error).__name__}: {error}".removeprefix("_RequestFailed: ")
        self._finish(result, started)
        return result

    async def _stream(
        self,
        session: aiohttp.ClientSession,
        request: Request,
        result: RequestResult,
        started: float,
    ) -> None:
        last = started
        async with session.post(self._url, json=self._api.body(request)) as response:
            if response.status != 200:
                raise _RequestFailed(f"HTTP {response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                tokens = self._tokens_so_far(data) - result.output_tokens
                if tokens <= 0:
                    continue
                now = time.perf_counter()
                if result.output_tokens == 0:
                    result.ttft_s = now - started
                    self._progress.streaming += 1
                    self._report()
                    # Tokens that came together with the first took no time of their own.
                    result.itl_s += [0.0] * (tokens - 1)
                else:
                    result.itl_s += [(now - last) / tokens] * tokens
                    result.gaps_s.append(now - last)
                result.output_tokens += tokens
                last = now
        raise _RequestFailed("the stream ended without [DONE]")

    def _tokens_so_far(self, data: bytes) -> int:
        """Raises for an event that reports an error."""
        event = json.loads(data)
        if "error" in event:
            raise _RequestFailed(str(event["error"])[:200])
        return self._api.tokens_so_far(event)

    def _finish(self, result: RequestResult, started: float) -> None:
        result.e2e_s = time.perf_counter() - started
        if result.output_tokens:
            self._progress.streaming -= 1
        if result.ok:
            self._progress.completed += 1
        else:
            self._progress.failed += 1
        self._report()

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._progress)
