"""The times between a request's tokens: how long it stood still, and when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from benchmark.client import RequestResult


@dataclass(frozen=True, slots=True)
class Gap:
    """The time between two tokens of one request; seconds since the run began."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Stall:
    """The longest gap of a run, and the largest multiple of a request's own median gap."""

    longest_s: float
    worst_ratio: float


def gaps(result: RequestResult) -> list[Gap]:
    """All gaps of a request, in order."""
    first = result.sent_s + result.ttft_s
    times = accumulate(result.gaps_s, initial=first)
    return [Gap(start, end) for start, end in pairwise(times)]


def stall(
    results: Iterable[RequestResult], start_s: float = 0.0, end_s: float = float("inf")
) -> Stall:
    """The worst of all requests; NaN if none has two tokens.

    Only gaps that have some time in common with `[start_s, end_s]` count; medians are of all gaps.
    """
    found = [
        (gap.length_s, gap.length_s / float(np.median(result.gaps_s)))
        for result in results
        if result.ok
        for gap in within([result], start_s, end_s)
    ]
    if not found:
        return Stall(float("nan"), float("nan"))
    return Stall(max(length for length, _ in found), max(ratio for _, ratio in found))


def within(results: Iterable[RequestResult], start_s: float, end_s: float) -> list[Gap]:
    """The gaps that have some time in common with `[start_s, end_s]`."""
    return [
        gap
        for result in results
        for gap in gaps(result)
        if gap.start_s < end_s and gap.end_s > start_s
    ]


def tpots_ms(
    results: Iterable[RequestResult], start_s: float, end_s: float, *, inside: bool = False
) -> list[float]:
    """Mean of the gaps of each request that `within` finds, in milliseconds.

    With `inside`, only gaps that have ended by `end_s` count.
    """
    means = []
    for result in results:
        found = [g for g in within([result], start_s, end_s) if not inside or g.end_s <= end_s]
        if found:
            means.append(1e3 * float(np.mean([g.length_s for g in found])))
    return means


def percentile_ms(lengths: Sequence[Gap], percent: float) -> float:
    """Of the lengths, in milliseconds; NaN without gaps."""
    if not lengths:
        return float("nan")
    return 1e3 * float(np.percentile([g.length_s for g in lengths], percent))
