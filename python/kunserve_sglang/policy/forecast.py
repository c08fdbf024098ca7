"""What becomes of the requests that are there and expected, if an owner serves them in some way.

A fluid model of the mean owner: requests are amounts that need not be whole and go in parts that
share a fate. They wait in order, but for those whose first token is late already, enter as slots
allow, are prefilled while nobody decodes, and then decode together. It knows no chunks, no single
step and no spread of lengths; it is asked which of some ways is best, and what it leaves out is
much the same in all of them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import msgspec

from kunserve_sglang.core.first_token import FirstTokenLimit
from kunserve_sglang.policy.pipeline_times import PipelineTimes
from kunserve_sglang.policy.service_level import LatencyLimits, LimitsByShare, StepTimes

_PARTS = 32
"""In how many parts waiting and expected requests go, and the most that enter together."""

_RUNNING_PARTS = 8
"""Those that run are at all points of their answers."""

_LEAST_PART = 1 / 8
"""Of what runs at once: fewer do not enter, so that a forecast takes a bounded number of turns."""

_RESERVED = 0.5
"""SGLang admits as if running requests needed a part of what they may still produce."""

_HARDLY_ANY = 1e-3
"""Requests a second: with fewer, nothing is known of when those that wait came."""

_MARGIN = 0.25
"""How far a time may be off: so near to its limit, a request is within it in part."""

_TURNS = 512
"""About as many turns for the longest line: the longer it is, the larger the parts that enter."""


class Requests(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of an owner. Lengths are tokens, of the mean request.

    `left`: tokens that a running one will still produce, of `output`. `held`: slots for each that
    runs, at least, with those that are kept free for it. `per_second`: how many are
    going to come, for `ahead_s` seconds. `token_ms`: what a token has taken the running ones.
    """

    running: float
    waiting: float
    prompt: float
    output: float
    left: float
    held: float = 0.0
    per_second: float = 0.0
    ahead_s: float = 0.0
    token_ms: float = 0.0


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """A way to serve: token slots of the owner, stages of its pipeline, and the most that run.

    `across`: some of the stages are on other hosts.
    """

    capacity: float
    stages: int = 1
    most: float = float("inf")
    across: bool = False


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What comes of it: of `requests`, so many within both limits.

    Times are milliseconds, those of half the requests; the first token of those that run is past.
    `tokens_per_s` until all have ended; `running`: the most at once.
    """

    requests: float
    within: float
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
    tokens_per_s: float
    running: float

    @property
    def attainment(self) -> float:
        return self.within / self.requests if self.requests else 1.0


@dataclass(slots=True)
class _Batch:
    """`count` requests with the same fate. Milliseconds from now; the past is negative."""

    count: float
    arrived: float
    left: float
    context: float
    first: float = float("inf")
    end: float = float("inf")


def forecast(
    asked: Requests,
    serving: Serving,
    times: StepTimes,
    limits: LatencyLimits,
    by_share: LimitsByShare = (),
) -> Forecast:
    """Play it through, from now until all that are there and expected have ended.

    Whose turn it is goes by `limits`. Answers are held against these too, or against those that
    parts of the requests have.
    """
    pipeline = PipelineTimes(times=times, stages=serving.stages)
    return _Play(asked, serving, pipeline, limits, by_share or ((1.0, limits),)).through()


class _Play:
    def __init__(
        self,
        asked: Requests,
        serving: Serving,
        pipeline: PipelineTimes,
        limits: LatencyLimits,
        by_share: LimitsByShare,
    ) -> None:
        self._asked = asked
        self._serving = serving
        self._pipeline = pipeline
        self._by_share = by_share
        self._first_token = FirstTokenLimit(ms=limits.ttft_ms)
        self._now = 0.0
        self._peak = 0.0
        self._running = list(_running(asked))
        self._line = deque([*_waiting(asked), *_expected(asked)])
        self._late: deque[_Batch] = deque()
        self._ended: list[_Batch] = []
        most = min(serving.capacity / max(1.0, asked.prompt + asked.output), serving.most)
        longest = min(most / 2, sum(p.count for p in self._line) / _TURNS)
        self._least = max(_LEAST_PART * max(1.0, most), longest)

    def through(self) -> Forecast:
        served = True
        while served and (self._running or self._line or self._late):
            served = self._enter() | self._decode()
        # Whoever is left needs more slots than there are.
        return self._told([*self._ended, *self._running, *self._line, *self._late])

    def _next(self) -> deque[_Batch]:
        """The queue at whose head is who is next; empty if nobody waits."""
        while self._line and self._past(self._line[0]):
            self._late.append(self._line.popleft())
        here = self._line and self._line[0].arrived <= self._now
        return self._line if here else self._late

    def _past(self, part: _Batch) -> bool:
        return self._first_token.past(0, self._now - part.arrived)

    def _enter(self) -> bool:
        """Let those in for whom there is room; whether any have come in."""
        came = False
        while queue := self._next():
            head = queue[0]
            room = min(head.count, self._room(head))
            if room <= 0 or (room < min(head.count, self._least) and self._running):
                break
            entered = _Batch(room, head.arrived, head.left, head.context)
            head.count -= room
            if head.count <= 1e-9:
                queue.popleft()
            self._now += self._pipeline.prompts_ms(room, self._asked.prompt)
            entered.first = self._now
            self._running.append(entered)
            came = True
        return came

    def _room(self, head: _Batch) -> float:
        """How many of these may enter."""
        running = sum(p.count for p in self._running)
        reserved = sum(p.count * (p.context + _RESERVED * p.left) for p in self._running)
        capacity = self._serving.capacity
        seats = self._serving.most - running
        if self._asked.held:
            seats = min(seats, capacity / self._asked.held - running)
        slots = (capacity - reserved) / max(1.0, head.context + head.left)
        # Alone, one request needs to fit as a whole: a part of one is no use.
        return 0.0 if slots < 1 and not self._running else min(seats, slots)

    def _decode(self) -> bool:
        """Until a part ends or another arrives; whether there was anything to do."""
        head = self._line[0].arrived if self._line else float("inf")
        if not self._running:
            if head <= self._now or head == float("inf"):
                return False
            self._now = head
            return True
        count = sum(p.count for p in self._running)
        self._peak = max(self._peak, count)
        context = sum(p.count * p.context for p in self._running)
        tokens = min(p.left for p in self._running)
        step = self._pipeline.step_ms(count, context + count * tokens / 2)
        if self._now < head < self._now + tokens * step:
            tokens = (head - self._now) / step
            self._now = head
        else:
            self._now += tokens * step
        for part in self._running:
            part.left -= tokens
            part.context += tokens
            if part.left <= 1e-6:
                part.end = self._now
                self._ended.append(part)
        self._running = [p for p in self._running if p.left > 1e-6]
        return True

    def _told(self, parts: list[_Batch]) -> Forecast:
        output = max(1.0, self._asked.output)
        past = self._asked.output - self._asked.left
        requests = within = tokens = 0.0
        ttft, tpot, e2e = [], [], []
        for part in parts:
            began = part.arrived == float("-inf")
            since = -past * self._asked.token_ms if began else part.first
            each = (part.end - since) / output if part.end < float("inf") else float("inf")
            waited = 0.0 if began else part.first - part.arrived
            sure = _kept(waited, each, self._by_share)
            requests += part.count
            within += part.count * sure
            tokens += part.count * (self._asked.left if began else output)
            tpot.append((each, part.count))
            e2e.append((part.end - (since if began else part.arrived), part.count))
            if not began:
                ttft.append((waited, part.count))
        return Forecast(
            requests=requests,
            within=within,
            ttft_ms=_median(ttft),
            tpot_ms=_median(tpot),
            e2e_ms=_median(e2e),
            tokens_per_s=1e3 * tokens / self._now if self._now else 0.0,
            running=self._peak,
        )


def _running(asked: Requests) -> list[_Batch]:
    """Evenly spread over their answers, so that one ends after the other."""
    if asked.running <= 0:
        return []
    each = asked.running / _RUNNING_PARTS
    parts = []
    for i in range(_RUNNING_PARTS):
        left = max(1.0, asked.left * (2 * i + 1) / _RUNNING_PARTS)
        context = asked.prompt + max(0.0, asked.output - left)
        parts.append(_Batch(each, float("-inf"), left, context, first=float("-inf")))
    return parts


def _waiting(asked: Requests) -> list[_Batch]:
    """Those that came first have waited longest, if they came as fast as others are going to."""
    gap = 1e3 / asked.per_second if asked.per_second > _HARDLY_ANY else 0.0
    return _in_parts(asked, asked.waiting, -gap * asked.waiting, gap * asked.waiting)


def _expected(asked: Requests) -> list[_Batch]:
    return _in_parts(asked, asked.per_second * asked.ahead_s, 0.0, 1e3 * asked.ahead_s)


def _in_parts(asked: Requests, count: float, start_ms: float, lasts_ms: float) -> list[_Batch]:
    parts = min(_PARTS, max(1, round(count)))
    return [
        _Batch(count / parts, start_ms + lasts_ms * (i + 1) / parts, asked.output, asked.prompt)
        for i in range(parts)
        if count > 0
    ]


def _kept(ttft_ms: float, tpot_ms: float, by_share: LimitsByShare) -> float:
    """The share of requests with these times that are within their limits."""
    kept = [_within(ttft_ms, of.ttft_ms) * _within(tpot_ms, of.tpot_ms) for _, of in by_share]
    return sum([share * each for (share, _), each in zip(by_share, kept, strict=True)])


def _within(ms: float, limit: float) -> float:
    """How surely a predicted time is within its limit: 1 well below it, 0 well above."""
    return min(1.0, max(0.0, 0.5 + (1 - ms / limit) / (2 * _MARGIN)))


def _median(weighted: list[tuple[float, float]]) -> float:
    half = sum(weight for _, weight in weighted) / 2
    for value, weight in sorted(weighted):
        half -= weight
        if half <= 0:
            return value
    return 0.0
