"""What a cluster says of itself during a run, sampled at a fixed interval."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True)
class Sample:
    """All instances together at one moment; `modes` has one entry an instance."""

    at_s: float
    running: int
    waiting: int
    slots_used: int
    slots_capacity: int
    modes: tuple[str, ...]
    transition: bool

    @property
    def cooperative(self) -> int:
        """Instances that serve in a group."""
        return sum(mode not in ("independent", "preparing") for mode in self.modes)


@dataclass(slots=True)
class Timeline:
    """Samples in order of time; `missed` counts the questions that got no answer."""

    samples: list[Sample] = field(default_factory=list)
    missed: int = 0


class StatusReader:
    """Asks a router for `/kunserve/status` and `/kunserve/events`."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def status(self) -> dict[str, Any]:
        return await self._get("/kunserve/status")

    async def events(self) -> list[dict[str, Any]]:
        """All transitions so far, oldest first."""
        answer = await self._get("/kunserve/events")
        events: list[dict[str, Any]] = answer["events"]
        return events

    async def sample(self, at_s: float) -> Sample:
        return to_sample(await self.status(), at_s)

    async def _get(self, path: str) -> dict[str, Any]:
        async with self._session.get(self._url + path) as response:
            response.raise_for_status()
            answer: dict[str, Any] = await response.json()
            return answer


def to_sample(status: dict[str, Any], at_s: float) -> Sample:
    """A status record, summed over the instances that have reported."""
    instances = [i for i in status["instances"] if "slots" in i]
    return Sample(
        at_s=at_s,
        running=sum(i["running"] for i in instances),
        waiting=sum(i["waiting"] for i in instances),
        slots_used=sum(i["slots"]["used"] for i in instances),
        slots_capacity=sum(i["slots"]["capacity"] for i in instances),
        modes=tuple(i["mode"] for i in instances),
        transition=status["transition"] is not None,
    )


def counters(status: dict[str, Any]) -> Counter[str]:
    """What the instances have counted since their start, all together."""
    total: Counter[str] = Counter()
    for instance in status["instances"]:
        total.update(instance.get("counters", {}))
    return total


def bubble_fraction(counted: Counter[str]) -> float:
    """Of the stages' time, the share in which they waited for work under way; NaN without work."""
    busy, bubble = counted["busy_ms"], counted["bubble_ms"]
    return bubble / (busy + bubble) if busy + bubble else float("nan")


@asynccontextmanager
async def sampling(
    reader: StatusReader, origin: float, interval_s: float = INTERVAL_S
) -> AsyncIterator[Timeline]:
    """Sample while the block runs; times are seconds since `origin` (`time.perf_counter`)."""
    timeline = Timeline()
    task = asyncio.create_task(_sample_for_good(reader, timeline, origin, interval_s))
    try:
        yield timeline
    finally:
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled():
            task.result()  # ended by itself, so with an error


async def _sample_for_good(
    reader: StatusReader, timeline: Timeline, origin: float, interval_s: float
) -> None:
    while True:
        try:
            timeline.samples.append(await reader.sample(time.perf_counter() - origin))
        except (aiohttp.ClientError, TimeoutError):
            timeline.missed += 1
        await asyncio.sleep(interval_s)
