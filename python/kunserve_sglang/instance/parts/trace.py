"""Where an instance's time goes: totals always, single spans on request."""

from __future__ import annotations

import time
from types import TracebackType

from kunserve_sglang.core.messages import Span

MAX_SPANS = 100_000
"""A recording stops there; a minute of single-token steps stays far below."""


class Tracer:
    """Sums up spans by name, and keeps each of them while recording.

    Times are monotonic seconds of this host, so that the traces of instances of one host line up.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._spans: list[Span] | None = None
        self._lost = 0

    def span(self, name: str, **details: int) -> _OpenSpan:
        """`with tracer.span("wait"): ...`"""
        return _OpenSpan(self, name, details)

    def add(self, name: str, start: float, end: float, details: dict[str, int]) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + end - start
        if self._spans is None:
            return
        if len(self._spans) < MAX_SPANS:
            self._spans.append(Span(name, start, end - start, details))
        else:
            self._lost += 1

    def start(self) -> None:
        """Record from now on; what an earlier recording has not fetched is gone."""
        self._spans, self._lost = [], 0

    def stop(self) -> tuple[list[Span], int]:
        """End the recording; returns its spans and how many found no room."""
        spans, self._spans = self._spans or [], None
        return spans, self._lost


class _OpenSpan:
    __slots__ = ("_details", "_name", "_start", "_tracer")

    def __init__(self, tracer: Tracer, name: str, details: dict[str, int]) -> None:
        self._tracer, self._name, self._details = tracer, name, details

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._tracer.add(self._name, self._start, time.monotonic(), self._details)
