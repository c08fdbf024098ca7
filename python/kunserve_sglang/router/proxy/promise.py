"""What one request was promised, and whether its answer keeps that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from kunserve_sglang.core.resumption import RESUMABLE_PATHS, reports_error
from kunserve_sglang.policy.service_level import ServiceLevel
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.proxy.attainment import Attainment
from kunserve_sglang.router.proxy.busy import QUEUE_FULL
from kunserve_sglang.router.proxy.latency import StreamTimer
from kunserve_sglang.router.proxy.slo_headers import read_slo

_JUDGED = RESUMABLE_PATHS | {"/v1/responses", "/invocations"}
"""Calls whose answers are made of tokens, and tell: they come as events, or with their number."""

_COUNTS = {
    name: re.compile(name + rb"\s*(\d{1,9})")
    for name in (b'"completion_tokens":', b'"output_tokens":')
}


class Promise:
    """Judges one request, once.

    An answer that is streamed is missed as soon as its first chunk is late, and else judged at its
    end. `timer` is there once it has begun; `whole` is an answer that is not streamed. `prompt` is
    about the number of tokens in the request.
    """

    __slots__ = (
        "_attainment",
        "_class",
        "_counts",
        "_level",
        "_open",
        "_own",
        "prompt",
        "timer",
        "whole",
    )

    def __init__(self, attainment: Attainment, request: ClientRequest) -> None:
        """Raises `RequestError` where the request names limits that are none."""
        scope = request.scope
        name, self._own = read_slo(request)
        self._attainment = attainment
        self._class = attainment.of(name)
        self._level = self._own.over(self._class.level)
        self._open = scope["path"] in _JUDGED and scope["method"] != "OPTIONS"
        self._counts = False
        self.prompt = 0
        self.timer: StreamTimer | None = None
        self.whole = b""

    @property
    def produced(self) -> int | None:
        """Tokens of all answers that there are so far; None where they do not say how many."""
        return self.timer.chunks if self.timer is not None else answer_tokens(self.whole, sum)

    def first_chunk(self, ttft_s: float, chunk: bytes) -> None:
        """Of an answer that is streamed."""
        if reports_error(chunk):
            self._refused(chunk)
            return
        limit = self._attainment.limits(self._level, self.prompt).ttft_ms if self._open else None
        if limit is not None and 1e3 * ttft_s > limit:
            self._judge(kept=False)

    def begins(self) -> None:
        """The request has been taken: what it wants counts in decisions until it has ended."""
        if self._open:
            self._counts = True
            self._attainment.begins(self._class, self._own)

    def ended(self, request: ClientRequest) -> None:
        """The answer has ended, however it did, or none will come."""
        if self.timer is not None:
            self.timer.end()
        if self._counts:
            self._counts = False
            self._attainment.ends(self._class, self._own)
        if not self._open or not self._attainment.promises(self._level):
            return
        if (kept := self._kept(request)) is not None:
            self._judge(kept=kept)

    def _refused(self, chunk: bytes) -> None:
        """In a stream SGLang says so behind a 200; whose fault anything else is, nobody knows."""
        promised = self._open and self._attainment.promises(self._level)
        if promised and any(message in chunk for message in QUEUE_FULL):
            self._judge(kept=False)
        self._open = False

    def _judge(self, *, kept: bool) -> None:
        self._open = False
        self._class.add(self._attainment.clock(), kept=kept)

    def _kept(self, request: ClientRequest) -> bool | None:
        """None where that cannot be said, as where the request is at fault."""
        tokens = self.timer.chunks if self.timer is not None else answer_tokens(self.whole)
        limits = self._attainment.limits(self._level, self.prompt, tokens or 0)
        if request.gone:
            return self._kept_so_far(request, limits)
        if not request.ended or request.status == 429 or request.status >= 500:
            return False
        if request.status != 200:
            return None
        if self.timer is not None:
            # The first chunk was in time, or this would have been judged.
            return _within(self.timer.pace_s, limits.tpot_ms) if tokens else None
        return self._whole_in_time(request, limits, tokens)

    def _kept_so_far(self, request: ClientRequest, limits: ServiceLevel) -> bool | None:
        """By what a client has got that did not wait for the end."""
        now, timer = self._attainment.clock(), self.timer
        if timer is None or not timer.chunks:
            waits = timer is not None or request.wants_stream is True
            late = waits and not _within(now - request.arrived, limits.ttft_ms)
            return False if late else None
        return _within(timer.pace_s, limits.tpot_ms) and _within(
            timer.since_first_s(now) / timer.chunks, limits.tpot_ms
        )

    def _whole_in_time(
        self, request: ClientRequest, limits: ServiceLevel, tokens: int | None
    ) -> bool | None:
        """Within what both limits allow together for an answer of so many tokens."""
        if tokens is None or limits.ttft_ms is None or limits.tpot_ms is None:
            return None
        allowed = limits.ttft_ms + limits.tpot_ms * max(0, tokens - 1)
        return _within(self._attainment.clock() - request.arrived, allowed)


def answer_tokens(body: bytes, of: Callable[[Iterable[int]], int] = max) -> int | None:
    """How many tokens an answer says that it has; of several answers in one, the longest.

    In a text the quotes would be escaped, so this is a field of the answer itself.
    """
    for name, count in _COUNTS.items():
        if name in body and (found := count.findall(body)):
            return of(map(int, found))
    return None


def _within(seconds: float | None, limit_ms: float | None) -> bool:
    """Without a time or a limit there is nothing to miss."""
    return seconds is None or limit_ms is None or 1e3 * seconds <= limit_ms
