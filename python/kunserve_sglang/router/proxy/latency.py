"""How fast streamed answers are, measured where they pass: TTFT and TPOT."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from prometheus_client import Histogram

from kunserve_sglang.api.types import LatencySummary, Quantiles

WINDOW_S = 60.0
"""The quantiles of the status are about this last stretch of time."""

_KEPT = 4096
"""Samples of each kind; with more in a window, the quantiles are those of the latest."""

# From below the best case to beyond the patience of most clients; a burst without KunServe is two
# orders of magnitude slower than idle, and both have to be told apart.
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200)
_TPOT_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6, 3.2)

Clock = Callable[[], float]
Began = Callable[[float, bytes], None]


class Latency:
    """TTFT and TPOT of the answers that the proxy streams.

    TTFT is the time from the whole request to the first chunk of the body, TPOT the mean time
    between the chunks of one answer. SGLang sends one chunk a token unless asked otherwise, and
    the chunks are not looked into, so TPOT is an estimate.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.ttft_seconds = Histogram(
            "kunserve:ttft_seconds",
            "Time to the first chunk of a streamed answer.",
            buckets=_TTFT_BUCKETS,
            registry=None,
        )
        self.tpot_seconds = Histogram(
            "kunserve:tpot_seconds",
            "Mean time between the chunks of a streamed answer.",
            buckets=_TPOT_BUCKETS,
            registry=None,
        )
        self._ttft: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        self._tpot: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def first_chunk(self, now: float, ttft_s: float) -> None:
        self.ttft_seconds.observe(ttft_s)
        self._ttft.append((now, ttft_s))

    def ended(self, now: float, tpot_s: float) -> None:
        self.tpot_seconds.observe(tpot_s)
        self._tpot.append((now, tpot_s))

    def summary(self) -> LatencySummary:
        """Quantiles over the last minute."""
        since = self.clock() - WINDOW_S
        ttft, tpot = _since(self._ttft, since), _since(self._tpot, since)
        return LatencySummary(
            ttft_ms=_quantiles(ttft),
            tpot_ms=_quantiles(tpot),
            samples=len(ttft),
            window_s=WINDOW_S,
        )


class StreamTimer:
    """Times one answer; `chunk` runs for every chunk of every stream."""

    __slots__ = ("_arrived", "_began", "_first", "_last", "_latency", "chunks")

    def __init__(self, latency: Latency, arrived: float, began: Began) -> None:
        """`began` is told the time to the first chunk, in seconds, and what that is."""
        self._latency = latency
        self._arrived = arrived
        self._began = began
        self.chunks = 0
        self._first = self._last = arrived

    def chunk(self, data: bytes) -> None:
        self._last = now = self._latency.clock()
        self.chunks += 1
        if self.chunks == 1:
            self._first = now
            self._latency.first_chunk(now, now - self._arrived)
            self._began(now - self._arrived, data)

    @property
    def pace_s(self) -> float | None:
        """The mean time between chunks; None before the second."""
        return (self._last - self._first) / (self.chunks - 1) if self.chunks > 1 else None

    def since_first_s(self, now: float) -> float:
        """To be asked after the first chunk."""
        return now - self._first

    def end(self) -> None:
        """However it ended: an answer that was cut short has had a pace as well."""
        if (pace := self.pace_s) is not None:
            self._latency.ended(self._last, pace)


def _since(samples: deque[tuple[float, float]], since: float) -> list[float]:
    return sorted(seconds for at, seconds in samples if at >= since)


def _quantiles(ordered: list[float]) -> Quantiles:
    """By nearest rank: each is a time that some answer really took."""

    def rank(share: float) -> float | None:
        return 1e3 * ordered[math.ceil(share * len(ordered)) - 1] if ordered else None

    return Quantiles(p50=rank(0.5), p90=rank(0.9), p99=rank(0.99))
