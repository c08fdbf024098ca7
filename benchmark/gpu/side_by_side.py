"""Check of KunServe beside the SGLang it is built on: in a burst, and where nothing is dropped.

Servers take long to start, so each starts once: the larger clusters become the smaller ones when
some of their instances leave. Everything shares one GPU and its compute; what differs is memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from benchmark.control import Control, control
from benchmark.gpu.burst import UPSTREAM, Burst, Latencies, judge, of_kunserve
from benchmark.gpu.check import Bench, Findings
from benchmark.gpu.clusters import check_installed, dummy_rig
from benchmark.gpu.load import calm, keep, load, requests
from benchmark.rounds import Round, fresh, median, ratio
from benchmark.workload import Shape
from kunserve_sglang.testing.cluster import ClusterError

SIZES = (4, 2)
_WARM_UP = 4
_PAIRS = 5
_LEAST = 0.99
_DECODE_GRAPHS = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """What is sent to instances of about `slots` token slots: a burst, and a load that fits.

    Answers are long and prompts short, so that it is memory that a burst lacks, not compute.
    """

    slots: int
    burst: Burst
    fits: Shape
    fits_each: int


ON_GPU = Plan(8_000, Burst(Shape(96, 416), times=2.5, over_s=2.0), Shape(96, 192), 16)
ON_CPU = Plan(1_200, Burst(Shape(24, 40), times=2.5, over_s=0.5), Shape(24, 40), 8)


def side_by_side(bench: Bench, found: Findings, sizes: Sequence[int] = SIZES) -> None:
    """Clusters of these sizes, the largest first, against as many plain servers."""
    check_installed()
    plan = ON_GPU if bench.on_gpu else ON_CPU
    with dummy_rig(bench, _DECODE_GRAPHS) as rig:
        ours = rig.kunserve("kunserve", plan.slots, instances=sizes[0])
        with ours:
            slots, dropping = asyncio.run(bursts_of_ours(ours.url, sizes, plan, found))
            try:
                # Beside the few of ours that are left there is room for all of theirs.
                with rig.upstream(slots, sizes[0]) as theirs:
                    asyncio.run(bursts_of_theirs(theirs.url, slots, dropping, plan, found))
                    asyncio.run(in_turns(ours.url, theirs.url, sizes[-1], plan, found))
            except ClusterError as error:
                raise AssertionError(f"upstream did not start: {error}") from error


async def bursts_of_ours(
    url: str, sizes: Sequence[int], plan: Plan, found: Findings
) -> tuple[int, dict[int, Latencies]]:
    """Token slots of an instance, and latencies with dropping by number of instances."""
    dropping: dict[int, Latencies] = {}
    async with control(url) as cluster:
        await calm(cluster)
        slots = await cluster.slots_of_each()
        found.note({"slots of an instance": slots})
        for size in sizes:
            await keep(cluster, size)
            await _warm_up(cluster, size)
            dropping[size] = await of_kunserve(cluster, size, slots, plan.burst, found)
    return slots, dropping


async def bursts_of_theirs(
    url: str, slots: int, dropping: dict[int, Latencies], plan: Plan, found: Findings
) -> None:
    """The same bursts on plain servers; `dropping` is what they are compared with."""
    async with control(url) as cluster:
        for size, ours in dropping.items():
            await keep(cluster, size)
            await load(url, _WARM_UP * size, plan.fits)
            theirs = await plan.burst.send(cluster, size * slots)
            found.note(theirs.figures(f"{size} {UPSTREAM}"))
            judge(size, ours, UPSTREAM, theirs, found)


async def in_turns(
    ours_url: str, theirs_url: str, size: int, plan: Plan, found: Findings, pairs: int = _PAIRS
) -> None:
    """Throughput of a load that fits, on the one cluster and then on the other, again and again."""
    fits = requests(plan.fits_each * size, plan.fits)
    ours: list[Round] = []
    theirs: list[Round] = []
    async with control(ours_url) as kunserve, control(theirs_url) as upstream:
        await calm(kunserve)
        for cluster in (kunserve, upstream):
            await fresh(cluster, fits)  # warm up
        for _ in range(pairs):
            ours.append(await fresh(kunserve, fits))
            theirs.append(await fresh(upstream, fits))
        status = await kunserve.status()
    assert all(i["mode"] == "independent" for i in status["instances"]), "something was dropped"
    for name, rounds in (("kunserve", ours), (UPSTREAM, theirs)):
        found.note(
            {
                f"tokens a second, {size} {name}": _middle([r.throughput for r in rounds]),
                f"TTFT P50 beside it, {size} {name}, ms": _middle(
                    [r.median_ttft_ms for r in rounds]
                ),
                f"TPOT P50 beside it, {size} {name}, ms": _middle(
                    [r.median_tpot_ms for r in rounds]
                ),
            }
        )
    found.at_least(
        f"throughput of {size} kunserve / {UPSTREAM}, nothing dropped",
        round(ratio([r.throughput for r in ours], [r.throughput for r in theirs]), 4),
        _LEAST,
    )


async def _warm_up(cluster: Control, size: int) -> None:
    """Kernels are compiled and peers have met: of the first two, in a group as well."""
    shape = Shape(16, 16)
    await load(cluster.url, _WARM_UP * size, shape)
    await cluster.drop(*range(2))
    await load(cluster.url, _WARM_UP * size, shape)
    await cluster.restore()


def _middle(values: Sequence[float]) -> float:
    return round(median(values), 2)
