"""Short loads that are sent again and again, so that medians can be compared."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmark.client import LoadGenerator, RequestResult
from benchmark.control import Control
from benchmark.experiment import RunError
from benchmark.prompts import PromptSource
from benchmark.workload import Request, Shape


@dataclass(frozen=True, slots=True)
class Round:
    """One load and what came of it. `began` is time 0 of the results, in Unix time."""

    results: list[RequestResult]
    began: float

    @property
    def throughput(self) -> float:
        """Output tokens per second, from the first request to the last token."""
        first = min(r.sent_s for r in self.results)
        last = max(r.sent_s + r.e2e_s for r in self.results)
        return sum(r.output_tokens for r in self.results) / (last - first)

    @property
    def ttfts_ms(self) -> list[float]:
        return [1e3 * r.ttft_s for r in self.results]

    @property
    def median_ttft_ms(self) -> float:
        return median(self.ttfts_ms)

    @property
    def p99_ttft_ms(self) -> float:
        return float(np.percentile(self.ttfts_ms, 99))

    @property
    def median_tpot_ms(self) -> float:
        return 1e3 * float(np.median([r.tpot_s for r in self.results]))


def requests(
    prompts: PromptSource, count: int, shape: Shape, *, start_s: float = 0.0, every_s: float = 0.0
) -> list[Request]:
    """`count` requests of one shape with prompts of their own, one each `every_s` seconds."""
    return [
        Request(
            start_s + i * every_s,
            prompts.tokens(shape.prompt_len),
            shape.prompt_len,
            shape.output_len,
        )
        for i in range(count)
    ]


async def send(url: str, load: Sequence[Request]) -> Round:
    """Send a load and wait for all of it; raises `RunError` if a request failed."""
    generator = LoadGenerator(url, timeout_s=300.0)
    results = await generator.run(load)
    for result in results:
        if not result.ok:
            raise RunError(f"a request failed: {result.error}")
    return Round(results, began=time.time() - (time.perf_counter() - generator.origin))


async def fresh(cluster: Control, load: Sequence[Request]) -> Round:
    """As `send` through the router, after the prefix caches were emptied."""
    await cluster.forget()
    return await send(cluster.url, load)


def span_of(event: Mapping[str, Any], load: Round) -> tuple[float, float]:
    """When a transition began and ended, in seconds since the load began."""
    start = float(event["time"]) - load.began
    return start, start + float(event["duration_ms"]) / 1e3


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of what was measured in pairs."""
    return median([a / b for a, b in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> float:
    """The range of the values as a share of their median: how far rounds differ by themselves."""
    return (max(values) - min(values)) / median(values)
