"""One run of a workload on one cluster, with everything that is to be known of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmark.client import GENERATE, Api, LoadGenerator, Progress, RequestResult
from benchmark.noise import Noise
from benchmark.timeline import Sample, StatusReader, Timeline, counters, sampling, to_sample
from benchmark.workload import Request, Workload

_WARM_UP_OUTPUT = 8
_FLUSH_TIMEOUT_S = 5
_TAIL_S = 2.0
"""The timeline goes on for so long after a restore, to show what it led to."""


class RunError(Exception):
    """A run cannot begin or go on; the message says why in one line."""


@dataclass(slots=True)
class Run:
    """`restored_after_s`: from the last answer until all instances served alone again.

    `noise` is the share of the cores that other programs took meanwhile, and `counters` is what
    the instances counted.
    """

    results: list[RequestResult]
    timeline: Timeline
    capacity_before: int
    capacity_peak: int
    capacity_end: int
    restored_after_s: float | None
    noise: float
    events: list[dict[str, Any]] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)

    @property
    def errors(self) -> list[str]:
        return [r.error for r in self.results if r.error]

    def committed(self, kind: str) -> list[dict[str, Any]]:
        """The transitions of one kind that took place, oldest first."""
        return [e for e in self.events if e["kind"] == kind and e["status"] == "committed"]


async def run_workload(
    url: str,
    workload: Workload,
    *,
    warm_up: list[Request],
    restore_timeout_s: float,
    on_progress: Callable[[Progress], None] | None = None,
    api: Api = GENERATE,
    flush: bool = True,
) -> Run:
    """Warm up, send the workload, and wait until the cluster is as it was before.

    `restore_timeout_s` bounds the last part (0: do not wait); a cluster that never changed is
    through at once. Without `flush` prefixes of the warm-up stay cached: not every server forgets
    them when it is told to.
    """
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        reader = StatusReader(url, session)
        await _warm_up(url, warm_up, api)
        if flush:
            await _forget(url, session)
        status = await reader.status()
        before, counted = to_sample(status, 0.0).slots_capacity, counters(status)
        generator = LoadGenerator(url, api=api, on_progress=on_progress)
        noise = Noise()
        async with sampling(reader, time.perf_counter()) as timeline:
            results = await generator.run(workload.requests)
            ended = time.perf_counter()
            restored = await _wait_until_restored(reader, before, restore_timeout_s)
            await asyncio.sleep(_TAIL_S)
        status = await reader.status()
        last = to_sample(status, time.perf_counter() - ended)
        peak = max((s.slots_capacity for s in timeline.samples), default=before)
        return Run(
            results=results,
            timeline=timeline,
            capacity_before=before,
            capacity_peak=peak,
            capacity_end=last.slots_capacity,
            restored_after_s=restored - ended if restored is not None else None,
            noise=noise.share(),
            events=await reader.events(),
            counters=counters(status) - counted,
        )


async def _warm_up(url: str, requests: list[Request], api: Api) -> None:
    """First requests are slow and no part of the measurement."""
    for result in await LoadGenerator(url, api=api).run(requests):
        if not result.ok:
            raise RunError(f"a warm-up request failed: {result.error}")


async def _forget(url: str, session: aiohttp.ClientSession) -> None:
    """What is cached. The last answer is out a little before its request is off the books."""
    async with session.post(f"{url}/flush_cache?timeout={_FLUSH_TIMEOUT_S}") as response:
        response.raise_for_status()


async def _wait_until_restored(
    reader: StatusReader, capacity: int, timeout_s: float
) -> float | None:
    """When every instance served by itself with its old capacity; None if that took too long."""
    deadline = time.perf_counter() + timeout_s
    while (now := time.perf_counter()) < deadline:
        if _restored(await reader.sample(now), capacity):
            return now
        await asyncio.sleep(0.1)
    return None


def _restored(sample: Sample, capacity: int) -> bool:
    independent = all(mode == "independent" for mode in sample.modes)
    return independent and not sample.transition and sample.slots_capacity == capacity


def warm_up_requests(prompt: str, count: int) -> list[Request]:
    """`count` short requests at once, so that every instance gets some."""
    return [Request(0.0, f"{i} {prompt}", 0, _WARM_UP_OUTPUT) for i in range(count)]
