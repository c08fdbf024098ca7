"""What a burst does to latency: where parameters are dropped, and where requests queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from benchmark.client import RequestResult
from benchmark.control import Control
from benchmark.gpu.check import Findings
from benchmark.gpu.load import calm, load
from benchmark.workload import Shape

DROPPING, QUEUEING, UPSTREAM = "dropping", "queueing", "upstream"
_MIN_GAIN, _MAX_ADDED = 10.0, 1.15


@dataclass(frozen=True, slots=True)
class Burst:
    """`times` as many tokens as there are slots, in requests of one shape within `over_s`."""

    shape: Shape
    times: float
    over_s: float

    def count(self, slots: int) -> int:
        """Requests for a cluster of `slots` slots in all."""
        return round(self.times * slots / (self.shape.prompt_len + self.shape.output_len))

    async def send(self, cluster: Control, slots: int) -> Latencies:
        """To empty caches. Raises `AssertionError` if a request fails."""
        await cluster.forget()
        found = await load(cluster.url, self.count(slots), self.shape, self.over_s)
        return Latencies.of(found)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of the requests of one burst, in seconds."""

    ttft_p50: float
    ttft_p99: float
    tpot_p50: float

    @classmethod
    def of(cls, results: Sequence[RequestResult]) -> Self:
        ttft = [r.ttft_s for r in results]
        p50, p99 = (float(np.percentile(ttft, percent)) for percent in (50, 99))
        return cls(p50, p99, float(np.median([r.tpot_s for r in results])))

    def figures(self, name: str) -> dict[str, float]:
        return {
            f"TTFT P50, {name}, s": round(self.ttft_p50, 3),
            f"TTFT P99, {name}, s": round(self.ttft_p99, 3),
            f"TPOT P50, {name}, ms": round(1e3 * self.tpot_p50, 2),
        }


async def of_kunserve(
    cluster: Control, size: int, slots: int, burst: Burst, found: Findings
) -> Latencies:
    """The burst on `size` instances, first without dropping and then with it.

    Returns the latencies with dropping. Raises `AssertionError` if nothing was dropped.
    """
    await cluster.automatic(False)
    queueing = await burst.send(cluster, size * slots)
    found.note(queueing.figures(f"{size} {QUEUEING}"))
    before = len(await cluster.events())
    await cluster.automatic(True)
    dropping = await burst.send(cluster, size * slots)
    drops = [e for e in (await cluster.events())[before:] if e["kind"] == "drop"]
    await calm(cluster)
    found.note(dropping.figures(f"{size} {DROPPING}"))
    committed = sum(e["status"] == "committed" for e in drops)
    found.note(
        {f"requests, {size}": burst.count(size * slots), f"drops, {size} {DROPPING}": committed}
    )
    assert committed, f"the burst did not fill the memory of {size} instances"
    judge(size, dropping, QUEUEING, queueing, found)
    return dropping


def judge(size: int, ours: Latencies, name: str, theirs: Latencies, found: Findings) -> None:
    """Ours with dropping, against a cluster of the same size that queues."""
    found.note({f"TTFT P50 of {size} {name} / {DROPPING}": _ratio(theirs.ttft_p50, ours.ttft_p50)})
    found.at_least(
        f"TTFT P99 of {size} {name} / {DROPPING}",
        _ratio(theirs.ttft_p99, ours.ttft_p99),
        _MIN_GAIN,
    )
    found.at_most(
        f"TPOT P50 of {size} {DROPPING} / {name}",
        _ratio(ours.tpot_p50, theirs.tpot_p50),
        _MAX_ADDED,
    )


def _ratio(one: float, other: float) -> float:
    return round(one / other, 3)
